"""Installs what `make gpu-pack` gathered, on a machine without a network, into a scratch folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL_PARTS = ("model-1", "model-2")


def scratch() -> Path:
    """The folder into which this user's packs are unpacked."""
    return Path(tempfile.gettempdir()) / f"sgm-gpu-pack-{os.getuid()}"


def unpack(pack: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The environment variables with which Python finds what the folders `names` of the pack hold.

    A folder's wheels are installed once, without their dependencies and without a network. Later folders come before
    earlier ones. Both halves of a model become one file in SGM's cache. A folder that the pack lacks adds nothing, so
    that parts which were brought one after the other need not be there together.
    """
    folders = [name for name in reversed(names) if name not in MODEL_PARTS]
    sites = [_install(pack / name, scratch() / name) for name in folders]
    found = {"PYTHONPATH": os.pathsep.join(str(site) for site in sites if site.is_dir())}
    if any(name in MODEL_PARTS for name in names):
        join_model(pack, scratch() / "cache" / "models")
        found["SGM_CACHE"] = str(scratch() / "cache")
    return found


def _install(wheels: Path, target: Path) -> Path:
    done = target / ".installed"
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    listed = "\n".join(Path(file).name for file in files)
    if files and not (done.exists() and done.read_text(encoding="utf-8") == listed):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--upgrade"]
        subprocess.run([*pip, "--disable-pip-version-check", "--target", str(target), *files], check=True)
        if (wheels / "data").is_dir():
            shutil.copytree(wheels / "data", target, dirs_exist_ok=True)
        done.write_text(listed, encoding="utf-8")
    return target


def join_model(pack: Path, models: Path) -> None:
    """Keeps the halves that the pack has now in `models`, and makes one file of them when both are there."""
    models.mkdir(parents=True, exist_ok=True)
    for part in MODEL_PARTS:
        for half in (pack / part).glob("*.part*"):
            (models / half.name).write_bytes(half.read_bytes())
    halves = sorted(models.glob("*.part*"))
    if len(halves) == len(MODEL_PARTS):
        whole = models / halves[0].name.rpartition(".part")[0]
        with whole.with_suffix(".unfinished").open("wb") as file:
            for half in halves:
                file.write(half.read_bytes())
                half.unlink()
        whole.with_suffix(".unfinished").rename(whole)
