"""Reads changed files in a process of its own, because a reader in C may crash.

Prints a line of JSON for each reader: how many files gave a result, and how many the one line of a UserError. Any other
outcome ends the process with status 1, a traceback and the file's bytes. So does a file that takes more than 20 s, or,
below 1 MB, more than 2 s of processor time or 200 MiB above what the process had.

    python tests/fuzz_worker.py INPUTS SEED [READER ...]
"""

from __future__ import annotations

import copy
import faulthandler
import json
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzz_seeds import Reader, places, readers
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from sgm_finetune.base.errors import UserError, in_one_line

SLOWEST = 20  # seconds for a file
SECONDS, MIB = 2, 200  # of processor time, and of memory, for a file below 1 MB
_TEXT = st.text(max_size=8) | st.sampled_from(
    ["", "..", "/etc/passwd", "../x", "nan", "\ud800", "a" * 3000, "{{", "true", "1e999", "\0", "(a+)+$"]
)
_NUMBERS = st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 1e308, float("inf"), float("nan"), 0.5, True, None])
_ODD = st.recursive(
    _NUMBERS | _TEXT | st.integers(-4, 40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_data(draw: st.DrawFn, good: Any) -> Any:
    """`good` with up to three values replaced, removed, repeated or renamed; sometimes nested very deeply."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        found = list(places(value))
        path = found[draw(st.integers(0, len(found) - 1))]
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(_ODD)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "replace", "drop", "rename", "wrap", "deep"]))
        if what == "drop":
            del holder[path[-1]]
        elif what == "rename" and isinstance(holder, dict):
            holder[draw(_TEXT)] = holder.pop(path[-1])
        elif what == "wrap":
            holder[path[-1]] = [holder[path[-1]]]
        elif what == "deep":
            deep: Any = 1
            for _ in range(draw(st.sampled_from([50, 200]))):
                deep = [deep]
            holder[path[-1]] = deep
        else:
            holder[path[-1]] = draw(_ODD)
    return value


@st.composite
def changed_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` with up to four cuts, insertions, repetitions and changed bytes."""
    held = bytearray(good)
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        at = draw(st.integers(0, len(held)))
        end = min(len(held), at + draw(st.sampled_from([1, 2, 4, 8, 64, 10**6])))
        what = draw(st.sampled_from(["set", "set", "flip", "cut", "insert", "repeat"]))
        if what == "set":
            held[at : at + 8] = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8]))
        elif what == "flip" and at < len(held):
            held[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del held[at:end]
        elif what == "insert":
            held[at:at] = draw(st.binary(max_size=16) | st.sampled_from([b"[" * 2000, b"&a [*a, *a]\n", b"\n\n", b'"']))
        else:
            held[at:at] = held[at : min(end, at + 64)]
    return bytes(held)


@st.composite
def files(draw: st.DrawFn, reader: Reader) -> bytes:
    if reader.write is not None and draw(st.integers(0, 2)):
        try:
            return reader.write(draw(changed_data(reader.good)))
        except (TypeError, ValueError, RecursionError, OverflowError, UnicodeEncodeError):
            pass  # the writer cannot write this value
    return draw(changed_bytes(reader.write(reader.good) if reader.write is not None else reader.good))


def write_case(reader: Reader, content: bytes, folder: Path) -> Path:
    """Writes the file and its companion files; returns its path."""
    for name, held in {**(reader.beside or {}), reader.file: content}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(held)
    return folder / reader.file


def clear_peak() -> float:
    """Forgets how much memory this process had at most, and returns what it has now, in MiB. Linux alone can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> float:
    """The most memory, in MiB, that this process has had since `clear_peak`; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def fuzz(reader: Reader, inputs: int, number: int) -> dict[str, Any]:
    found = {"inputs": 0, "results": 0, "errors": 0, "slowest_seconds": 0.0, "most_seconds": 0.0, "most_mib": 0}
    started = time.monotonic()

    @seed(number)
    @settings(
        max_examples=inputs, database=None, deadline=None, suppress_health_check=list[Any](HealthCheck),
        phases=[Phase.generate], print_blob=False,
    )  # fmt: skip
    @given(files(reader))
    def run(content: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="sgm-fuzz-") as folder:
            path = write_case(reader, content, Path(folder))
            begun, used, held = time.monotonic(), time.process_time(), clear_peak()
            faulthandler.dump_traceback_later(SLOWEST, exit=True)
            try:
                reader.read(path)
                found["results"] += 1
            except UserError as error:
                in_one_line(str(error))
                found["errors"] += 1
            except BaseException:
                print(content[:20000], file=sys.stderr)
                raise
            finally:
                faulthandler.cancel_dump_traceback_later()
            seconds, mib = time.process_time() - used, peak() - held
            if len(content) < 10**6 and (seconds > SECONDS or mib > MIB):
                print(content[:20000], file=sys.stderr)
                raise AssertionError(f"{len(content):,} bytes took {seconds:.1f} s and {mib:,.0f} MiB")
            found["inputs"] += 1
            found["most_seconds"] = max(found["most_seconds"], round(seconds, 3))
            found["most_mib"] = max(found["most_mib"], round(mib))
            found["slowest_seconds"] = max(found["slowest_seconds"], round(time.monotonic() - begun, 3))

    with tempfile.TemporaryDirectory(prefix="sgm-fuzz-") as folder:
        reader.read(write_case(reader, reader.write(reader.good) if reader.write else reader.good, Path(folder)))
    run()
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def main(inputs: str, number: str, *chosen: str) -> None:
    warnings.simplefilter("ignore")
    known = readers()
    for name in chosen or known:
        print(json.dumps({"reader": name, **fuzz(known[name], int(inputs), int(number))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
