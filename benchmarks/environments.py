"""Installs the packages of the tests into an empty environment, and runs the tests there.

    .ci/without-compiler python benchmarks/environments.py python3.12
    .ci/without-compiler python benchmarks/environments.py python3.13 --uv

--uv installs with uv, else pip does; --fresh downloads every package; --install-only runs no test. Results:
benchmarks/results/environments.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recording import append_run, processor

ROOT = Path(__file__).parents[1]
SHOWN = ["torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pydantic", "typer"]


def install(python: str, folder: Path, requirements: str, uv: bool, fresh: bool) -> tuple[Path, float]:
    """Makes the environment; returns its interpreter and the seconds that it took."""
    started, inside = time.perf_counter(), folder / "bin" / "python"
    if uv:
        command = ["uv", "pip", "install", "--python", str(inside), *(["--no-cache"] if fresh else [])]
        subprocess.run(["uv", "venv", "-q", "--python", python, str(folder)], check=True)
    else:
        command = [str(inside), "-m", "pip", "install", *(["--no-cache-dir"] if fresh else [])]
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    subprocess.run([*command, "-r", requirements], check=True, cwd=ROOT)
    return inside, time.perf_counter() - started


def test(python: Path) -> dict:
    """Runs the default tests; returns their counts and seconds."""
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout[-5000:])
    counts = {
        what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-300:])
    }
    return {"pytest": counts, "pytest_seconds": round(time.perf_counter() - started), "rc": done.returncode}


def installed(python: Path) -> dict[str, str]:
    program = (
        "import json, platform; from importlib.metadata import version; "
        f"print(json.dumps({{'python': platform.python_version(), **{{n: version(n) for n in {SHOWN}}}}}))"
    )
    return json.loads(subprocess.check_output([str(python), "-c", program], text=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="an interpreter: python3.12, or its path")
    parser.add_argument("--requirements", default="requirements/test.txt")
    parser.add_argument("--uv", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--install-only", action="store_true")
    given = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        python, seconds = install(given.python, Path(scratch) / "venv", given.requirements, given.uv, given.fresh)
        row = {
            "installer": "uv" if given.uv else "pip",
            "requirements": given.requirements,
            "compiler": shutil.which("cc") or shutil.which("gcc"),
            "packages_cached": not given.fresh,
            "install_seconds": round(seconds),
            "mebibytes": int(subprocess.check_output(["du", "-sm", scratch], text=True).split()[0]),
            "installed": installed(python),
        }
        if not given.install_only:
            row |= test(python)
    command = f"python benchmarks/environments.py {' '.join(sys.argv[1:])}"
    append_run("environments", command, started, [row], (), processor=processor(), cores=os.cpu_count())


if __name__ == "__main__":
    main()
