"""What Windows and macOS do otherwise, as far as it can be simulated elsewhere (docs/platforms.md)."""

from __future__ import annotations

import ast
import gc
import importlib.util
import io
import json
import ntpath
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from systems import needs_posix

from sgm_finetune.base import device, files, memory
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import is_link, remove, rename, sync, whole_folder, write_text
from sgm_finetune.commands import doctor_machine, exit_status, requests
from sgm_finetune.commands.cli import main
from sgm_finetune.data import template_trial
from sgm_finetune.measure import probe as probing
from sgm_finetune.results import paths
from sgm_finetune.results.export import target
from sgm_finetune.results.export.llama_process import run_apart
from sgm_finetune.results.files import clear_results
from sgm_finetune.train import callbacks

SOURCE = Path(files.__file__).parents[1]
ABSENT = ("resource", "fcntl", "termios", "pty", "pwd", "grp")
"""Modules that Windows does not have."""


def as_windows(**changed: Any) -> Any:
    """The module `os` as Windows has it, for one of our modules: no folder can be opened."""
    system = SimpleNamespace(**vars(os))
    system.name = "nt"

    def open_(path: Any, *flags: int, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, *flags, **options)

    system.open = open_
    vars(system).update(changed)
    return system


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Takes away what Windows does not have, and gives what only it has."""
    for name in ABSENT:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("fork", "wait4", "sched_getaffinity", "preadv", "O_DIRECT"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(signal, "SIGBREAK", getattr(signal, "SIGUSR1", None), raising=False)
    for name in ("SIGHUP", "SIGXCPU", "SIGKILL", "SIGUSR1"):
        monkeypatch.delattr(signal, name, raising=False)
    monkeypatch.setattr(files, "os", as_windows())
    monkeypatch.setattr(memory, "sys", SimpleNamespace(platform="win32"))
    numbers = SimpleNamespace(rss=2**30, peak_wset=3 * 2**30)
    process = SimpleNamespace(memory_info=lambda: numbers)
    available = SimpleNamespace(available=2**34)
    monkeypatch.setattr(memory, "psutil", SimpleNamespace(Process=lambda: process, virtual_memory=lambda: available))
    return monkeypatch


def fresh(module: ModuleType) -> ModuleType:
    """The module, made once more beside itself."""
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_again", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = again
    try:
        spec.loader.exec_module(again)
    finally:
        del sys.modules[spec.name]
    return again


# a whole run


@needs_posix
def test_a_run_needs_nothing_that_windows_lacks(settings, windows, tmp_path, monkeypatch):
    """It prints to a file in the encoding of Western Europe, which lacks some of its marks."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="\r\n")
    monkeypatch.setattr(sys, "stdout", printed)
    (tmp_path / "empty.yaml").write_text("model: {task: sequence-classification}\n", encoding="utf-8")
    few = ("training.max_steps=2", "data.num_train=64", "data.num_validation=8", "data.num_test=16")
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--config", str(tmp_path / "empty.yaml"), *settings, *few])
    assert caught.value.code == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["peak_memory_bytes"] == 3 * 2**30
    printed.flush()
    assert b"train    2 steps in" in printed.buffer.getvalue()
    for path in (tmp_path / "out").glob("*.json"):
        assert b"\r\n" not in path.read_bytes()


# modules, signals, the console


@needs_posix
def test_modules_are_made_without_what_windows_lacks(windows):
    """Those that ask the system for something."""
    asks = ("import os", "import signal", "import mmap", "import ctypes", "import sys")
    names = [path for path in SOURCE.rglob("*.py") if any(line in path.read_text(encoding="utf-8") for line in asks)]
    skipped = {"__main__.py", "ask_llama_cpp.py", "quantise_gguf.py"}  # programs
    made = 0
    for path in names:
        module = "sgm_finetune." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        if path.name not in skipped and module in sys.modules:
            fresh(sys.modules[module])
            made += 1
    assert made > 15


@needs_posix
def test_ctrl_break_ends_a_command_in_one_line(windows, capfd):
    with pytest.raises(SystemExit) as caught:
        exit_status.run_and_exit(lambda: signal.raise_signal(signal.SIGBREAK))  # type: ignore[attr-defined]
    assert caught.value.code == 128 + signal.SIGBREAK  # type: ignore[attr-defined]
    assert capfd.readouterr().err.startswith("Ended by SIG")


@needs_posix
def test_ctrl_break_lets_the_training_save_its_checkpoint(windows, capfd):
    with fresh(callbacks).Interruption() as interruption:
        signal.raise_signal(signal.SIGBREAK)  # type: ignore[attr-defined]
    assert interruption.signal_name is not None
    assert "finishing this step and saving a checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_character_that_the_output_lacks_is_an_escape_code(encoding, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def command() -> None:
        print("r² 0.5 ± 0.1 · a → b − c ⟦d⟧ 東京 ✓")
        raise UserError("Kein Öl für 東京")

    with pytest.raises(SystemExit):
        exit_status.run_and_exit(command)
    out.flush(), err.flush()
    assert "a \\u2192 b \\u2212 c \\u27e6d\\u27e7 \\u6771\\u4eac \\u2713" in out.buffer.getvalue().decode(encoding)
    assert "\\u6771\\u4eac" in err.buffer.getvalue().decode(encoding)


def test_what_a_program_says_in_another_encoding_is_read(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys; sys.stderr.buffer.write(b'caf\\x81 \\xff\\n'); sys.exit(3)", encoding="utf-8")
    reason = run_apart(str(program))
    assert reason is not None
    assert reason.startswith("caf")


def test_intels_fortran_leaves_ctrl_c_to_python():
    code = (
        "import os; from sgm_finetune.commands.libraries import configure_libraries; configure_libraries(False); "
        "print(os.environ['FOR_DISABLE_CONSOLE_CTRL_HANDLER'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def text_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that open a text file."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        modes = call.args[0 if owner is not None else 1 :][:1]
        if name == "open" and getattr(owner, "id", None) not in ("os", "archive", "gzip", "bz2", "lzma"):
            if not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes):
                yield call
        elif owner is not None and name in ("read_text", "write_text"):
            yield call


def test_every_text_file_has_an_encoding():
    """Windows would otherwise take the encoding of the country."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for call in text_calls(ast.parse(text)) if "open(" in text or "_text(" in text else ():
            if "encoding" not in {keyword.arg for keyword in call.keywords}:
                found.append(f"{path.relative_to(SOURCE)}:{call.lineno}")
    assert found == []


def test_a_text_has_the_same_bytes_on_every_system(tmp_path, monkeypatch):
    """Windows would otherwise write two characters for the end of a line."""
    written = Path.write_text
    ends: list[str] = []

    def kept(path: Path, text: str, **options: Any) -> int:
        ends.append(options["newline"])
        return written(path, text, **options)

    monkeypatch.setattr(Path, "write_text", kept)
    write_text(tmp_path / "a", "one\ntwo\n")
    assert ends == ["\n"]


# files that somebody has open


class Held:
    """Something in a cycle, as a mapped tensor may be: only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def refusing(is_open: Any, refused: list[Path]) -> Any:
    """`os.replace` as Windows has it, for a file that is open while `is_open()`."""

    def replace(path: Any, new: Any) -> None:
        if is_open():
            refused.append(Path(path))
            raise PermissionError(13, "Access is denied", str(path))
        os.replace(path, new)

    return replace


def test_windows_renames_what_a_forgotten_tensor_had_open(tmp_path, monkeypatch):
    import weakref

    gc.disable()
    try:
        held, refused = Held(), []
        alive = weakref.ref(held)
        del held
        monkeypatch.setattr(files, "os", as_windows(replace=refusing(lambda: alive() is not None, refused)))
        write_text(tmp_path / "a", "new")
    finally:
        gc.enable()
    assert len(refused) == 1
    assert (tmp_path / "a").read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_windows_renames_a_folder_that_was_open_for_a_moment(tmp_path, monkeypatch):
    refused: list[Path] = []
    monkeypatch.setattr(files, "os", as_windows(replace=refusing(lambda: len(refused) < 2, refused)))
    for content in ("old", "new"):
        refused.clear()
        with whole_folder(tmp_path / "out") as scratch:
            (scratch / "file").write_text(content, encoding="utf-8")
        assert len(refused) == 2
    assert (tmp_path / "out" / "file").read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_stays_open_is_one_line_and_the_earlier_one_stays(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old", encoding="utf-8")
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    monkeypatch.setattr(files, "os", as_windows(replace=refusing(lambda: True, [])))
    with pytest.raises(UserError, match=r"Cannot write .*a: Access is denied"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_elsewhere_a_rename_that_is_refused_is_not_tried_again(tmp_path, monkeypatch):
    refused: list[Path] = []
    system = as_windows(replace=refusing(lambda: True, refused))
    system.name = "posix"
    monkeypatch.setattr(files, "os", system)
    with pytest.raises(PermissionError):
        rename(tmp_path / "a", tmp_path / "b")
    assert len(refused) == 1


def test_an_earlier_result_that_a_program_has_open_is_named(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("", encoding="utf-8")

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "The process cannot access the file", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(UserError, match=r"Cannot write .*: The process cannot access the file; close the program"):
        clear_results(tmp_path)


def test_windows_syncs_files_and_leaves_folders(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("", encoding="utf-8")
    synced: list[int] = []
    monkeypatch.setattr(files, "os", as_windows(fsync=synced.append))
    sync(tmp_path)
    assert synced == []
    sync(tmp_path / "a")
    assert len(synced) == 1


def test_a_junction_is_a_link(tmp_path, monkeypatch):
    """Windows lets everybody make junctions, and only some make symbolic links."""
    (tmp_path / "junction").mkdir()
    (tmp_path / "folder").mkdir()
    tags = {tmp_path / "junction": 0xA0000003}

    def lstat(path: Path) -> Any:
        os.lstat(path)
        return SimpleNamespace(st_reparse_tag=tags.get(path, 0))

    monkeypatch.setattr(files, "os", as_windows(lstat=lstat))
    assert is_link(tmp_path / "junction")
    assert not is_link(tmp_path / "folder")
    assert not is_link(tmp_path / "absent")
    removed: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok: removed.append(path.name))
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: pytest.fail(f"{path} leads elsewhere"))
    remove(tmp_path / "junction")
    assert removed == ["junction"]


# paths


@pytest.fixture
def windows_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "os", SimpleNamespace(path=ntpath, sep="\\"))


@pytest.mark.parametrize(
    ("start", "end", "way"),
    [
        (r"C:\runs\first", r"C:\models\pico", r"..\..\models\pico"),
        (r"C:\runs\first", r"c:\Models\pico", r"..\..\Models\pico"),
        (r"D:\runs\first", r"C:\models\pico", None),
        (r"\\server\share\runs", r"C:\models\pico", None),
        ("runs/first", "data/reviews.csv", r"..\..\data\reviews.csv"),
    ],
)
def test_the_way_from_a_run_to_its_model_on_windows(start, end, way, windows_paths):
    assert paths._way(start, end) == way


def test_a_model_on_another_drive_stays_where_it_was(windows_paths, tmp_path):
    stored = {"model": {"name": r"C:\models\pico"}, "output": {"dir": r"D:\runs\first"}, "plan": None}
    stored |= {"data": dict.fromkeys(("name", "train", "validation", "test")), "snr": {"scan": None}}
    stored |= {"adapter": {"from_run": None}}
    assert paths.found_from(stored, tmp_path)["model"]["name"] == r"C:\models\pico"


class WindowsPath(PureWindowsPath):
    """A path of Windows where nothing exists."""

    def expanduser(self) -> WindowsPath:
        return self

    def exists(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("name", "is_hub"), [("owner/name", True), ("C:/models", False), (r"C:\models/mine", False), ("./mine", False)]
)
def test_a_path_of_windows_is_no_model_of_the_hub(name, is_hub, monkeypatch):
    monkeypatch.setattr(target, "Path", WindowsPath)
    assert (target.hub_model(name) is not None) == is_hub


# the machine


def test_a_taken_port_is_refused_on_windows_too(monkeypatch):
    """SO_REUSEADDR allows two servers at one port there."""
    options: list[Any] = []

    class Socket:
        def __init__(self, *kind: Any): ...

        def __enter__(self) -> Socket:
            return self

        def __exit__(self, *error: object) -> None: ...

        def setsockopt(self, *option: Any) -> None:
            options.append(option)

        def bind(self, address: Any) -> None: ...

    for name, expected in (("nt", 0), ("posix", 1)):
        monkeypatch.setattr(requests, "os", SimpleNamespace(name=name))
        monkeypatch.setattr(requests.socket, "socket", Socket)
        options.clear()
        requests._check_free("127.0.0.1", 7860)
        assert len(options) == expected


def test_the_gpu_of_a_mac_is_not_used_and_doctor_says_why(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda name: None)
    assert device.device_for() == torch.device("cpu")
    (finding,) = doctor_machine._gpus()
    assert "Mac" in finding.text
    assert "processor" in finding.text


def test_a_model_on_the_gpu_of_a_mac_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"\(mps\).*use_cpu=True"):
        device.check_has_float64(torch.device("mps"))
    device.check_has_float64(torch.device("cpu"))
    asked: list[torch.device] = []
    monkeypatch.setattr(probing, "check_has_float64", asked.append)
    from conftest import make_batches, make_model

    probing.probe(make_model(), make_batches(2))
    assert asked == [torch.device("cpu")]


@needs_posix
@pytest.mark.parametrize(("number", "reason"), [("SIGXCPU", "1 second"), ("SIGABRT", "")])
def test_only_the_signal_of_a_bound_says_that_a_template_exceeds_it(number, reason, monkeypatch):
    """macOS ends a copy of a process that has used some of its libraries: that says nothing of the template."""

    def die(template: str, special: Any) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(getattr(signal, number), signal.SIG_DFL)
        os.kill(os.getpid(), getattr(signal, number))
        time.sleep(5)
        os._exit(9)

    monkeypatch.setattr(template_trial, "_try", die)
    assert template_trial._find_reason("", {}) == reason


def test_a_template_is_not_tried_without_fork(monkeypatch):
    monkeypatch.delattr(os, "fork", raising=False)
    monkeypatch.setattr(template_trial, "_try", lambda *given: pytest.fail("tried"))
    assert template_trial._find_reason("{{ messages }}", {}) == ""


# the repository


def test_every_name_in_the_repository_is_possible_on_windows():
    """No reserved name, no character that it forbids, and none that another name has in other letters."""
    root = SOURCE.parents[1]
    folders = (root / name for name in ("src", "tests", "docs", "configs", "benchmarks", "notebooks", ".github", ".ci"))
    names = [path.relative_to(root) for folder in folders for path in folder.rglob("*") if path.name != "__pycache__"]
    assert len(names) > 400
    impossible = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[<>:\"|?*\\].*|.*[. ]")
    assert [str(name) for name in names if any(impossible.fullmatch(part) for part in name.parts)] == []
    assert len({str(name).lower() for name in names}) == len(names)


def test_the_workflow_tests_three_systems_with_the_packages_of_the_repository():
    root = SOURCE.parents[1]
    workflow = yaml.safe_load((root / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    tests, checks = workflow["jobs"]["tests"], workflow["jobs"]["checks"]
    systems = tests["strategy"]["matrix"]["system"]
    assert [system.partition("-")[0] for system in systems] == ["ubuntu", "windows", "macos"]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for python in tests["strategy"]["matrix"]["python"]:
        assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    runs = [step["run"] for job in (tests, checks) for step in job["steps"] if "run" in step]
    (installed,) = [found[1] for run in runs if (found := re.search(r"-r (\S+)", run))]
    assert (root / installed).is_file()
    targets = next(run for run in runs if run.startswith("make ")).split()[1:]
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in targets)
