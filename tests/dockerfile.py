"""Follows the Dockerfile without Docker: copies and runs what it says in a folder that holds a Debian, by chroot.

    debootstrap --variant=minbase bookworm /tmp/debian
    python tests/dockerfile.py /tmp/debian --arg TORCH=cpu --env PIP_INDEX_URL=... --bind /folder/with/wheels

It needs root. `--env` and `--bind` give the build what this machine needs to reach its packages; they change nothing in
the Dockerfile. The build has no variable of this shell, and no command of this machine.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile as (name, rest), without comments, each on one line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def command(rest: str) -> str:
    """What the shell runs for `RUN rest`, without Docker's own options."""
    return re.sub(r"^(--\S+\s+)+", "", rest)


def pairs(rest: str, known: dict[str, str]) -> dict[str, str]:
    """`A=x B=${A}/y` of an ENV or ARG instruction, with the values that are known put in."""
    found = {}
    for word in rest.split():
        name, _, value = word.partition("=")
        found[name] = re.sub(r"\$\{(\w+)\}", lambda match: known.get(match[1], ""), value)
    return found


def ignored(name: str, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves out the file `name`, relative to the repository."""
    parts = Path(name).parts
    ancestors = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return any(
        fnmatch.fnmatchcase(Path(path).name if pattern.startswith("**/") else path, pattern.removeprefix("**/"))
        for path in ancestors
        for pattern in patterns
    )


def context() -> Iterator[Path]:
    """The files that `docker build .` sends: all but those that .dockerignore names."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for folder, folders, files in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not ignored((here / name).as_posix(), patterns)]
        yield from (here / name for name in files if not ignored((here / name).as_posix(), patterns))


def copy_context(target: Path) -> None:
    """What `COPY . .` does: mode and time of every file stay."""
    for name in context():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


@contextmanager
def mounted(root: Path, folders: list[str]) -> Iterator[None]:
    """/proc, /dev and `folders` of this machine, in the chroot; it cannot write to `folders`."""
    with ExitStack() as stack:
        for folder in ("/proc", "/dev", *folders):
            inside = root / folder.lstrip("/")
            inside.mkdir(parents=True, exist_ok=True)
            options = "bind,ro" if folder in folders else "bind"
            subprocess.run(["mount", "-o", options, folder, str(inside)], check=True)
            stack.callback(subprocess.run, ["umount", str(inside)], check=True)
        yield


def run(root: Path, line: str, folder: str, variables: dict[str, str], user: str = "0:0") -> None:
    """One command in the chroot, by /bin/sh as Docker runs it. Prints its seconds. Raises CalledProcessError."""
    started = time.perf_counter()
    settings = [f"{name}={value}" for name, value in variables.items()]
    inside = ["/usr/bin/env", "-i", *settings, "/bin/sh", "-c", f"cd {folder} && {line}"]
    subprocess.run(["chroot", f"--userspec={user}", str(root), *inside], check=True, stdin=subprocess.DEVNULL)
    print(f"-- {time.perf_counter() - started:.0f} s: {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder that holds a Debian")
    parser.add_argument("--arg", action="append", default=[], help="as --build-arg of docker build")
    parser.add_argument("--env", action="append", default=[], help="a variable for every command")
    parser.add_argument("--bind", action="append", default=[], help="a folder of this machine for every command")
    parser.add_argument("--user", default="1234:1234", help="as --user of docker run")
    parser.add_argument("--command", help="what to run in place of the Dockerfile's CMD")
    parser.add_argument("--built", action="store_true", help="the root is built; only run the command")
    given = parser.parse_args()
    given_args, machine = (dict(word.split("=", 1) for word in words) for words in (given.arg, given.env))
    folder, variables, args, last = "/", {"PATH": PATHS}, {}, "true"
    for host in ("/etc/resolv.conf", "/etc/hosts"):
        shutil.copy(host, given.root / host.lstrip("/"))
    with mounted(given.root, given.bind):
        for name, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
            known = {**args, **variables}
            if name == "ARG":
                args.update({key: given_args.get(key, value) for key, value in pairs(rest, known).items()})
            elif name == "ENV":
                variables.update(pairs(rest, known))
            elif name == "WORKDIR":
                folder = rest
                (given.root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif name == "COPY" and not given.built:
                assert rest == ". ."
                copy_context(given.root / folder.lstrip("/"))
            elif name == "RUN" and not given.built:
                run(given.root, command(rest), folder, {**args, **variables, **machine})
            elif name == "CMD":
                last = " ".join(re.findall(r'"([^"]*)"', rest))
            elif name not in ("FROM", "USER", "COPY", "RUN"):
                raise SystemExit(f"Dockerfile: {name} is not known here")
        run(given.root, given.command or last, folder, {**variables, **machine}, given.user)


if __name__ == "__main__":
    main()
