"""Full disks, folders in use, numbers that are not finite and too little memory end a run in one line and lose
nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from processes import ROOT, environment, free_port
from rich.console import Console
from safetensors.torch import load_file
from systems import needs_posix

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import Interrupted, UserError
from sgm_finetune.base.files import lock_folder, remove, whole_file
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands import session
from sgm_finetune.commands.cli import main
from sgm_finetune.train import callbacks
from sgm_finetune.train.checkpoints import last_whole_checkpoint, seal
from sgm_finetune.train.trainer import SGMTrainer


def finetune(settings: list[str]) -> dict:
    return pipeline.finetune(load_config(None, settings), Console(quiet=True))


def refused(settings: list[str], tmp_path: Path, capfd) -> str:
    """The one line that the command prints."""
    (tmp_path / "empty.yaml").write_text("")
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--config", str(tmp_path / "empty.yaml"), *settings])
    lines = capfd.readouterr().err.strip().splitlines()
    assert caught.value.code == 2
    assert "Traceback" not in "".join(lines)
    return lines[-1]


@contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own; only root can mount it."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("only root can mount file systems")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_checkpoint_leaves_the_one_before(settings, tmp_path, capfd, monkeypatch):
    """The disk has 32 KiB left when the second checkpoint begins, which needs about ten times as much."""
    settings = [*settings, "training.eval_steps=5", "training.learning_rate=1e-2"]
    with small_disk(tmp_path / "disk", "1m") as disk:
        monkeypatch.setattr(session, "disk_free", lambda folder: 2**40)
        fill = disk / "other"
        output = disk / "out"
        begin = SGMTrainer._save_checkpoint

        def crowded(self, model, trial):
            if self.state.global_step == 10:
                free = os.statvfs(disk)
                fill.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 2**15)))
            return begin(self, model, trial)

        with monkeypatch.context() as patch:
            patch.setattr(SGMTrainer, "_save_checkpoint", crowded)
            line = refused([*settings, f"output.dir={output}"], tmp_path, capfd)
        assert line.startswith(f"Cannot write {output / 'checkpoints'}: ")
        assert "make room and continue with training.resume=true" in line
        kept = last_whole_checkpoint(output / "checkpoints")
        assert kept is not None
        assert kept.name == "checkpoint-5"
        fill.unlink()
        metrics = finetune([*settings, f"output.dir={output}", "training.resume=true"])
        whole = finetune([*settings, f"output.dir={tmp_path / 'whole'}"])
        assert metrics["after"] == whole["after"]


@pytest.mark.parametrize(
    "write", [lambda path: torch.save(torch.zeros(2**20), path), lambda path: path.write_bytes(bytes(2**22))]
)
def test_a_file_that_does_not_fit_is_not_there(write, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        with pytest.raises(UserError, match=r"Cannot write .*file.bin: "), whole_file(disk / "file.bin") as scratch:
            write(scratch)
        assert list(disk.iterdir()) == []


def test_a_file_of_torch_that_does_not_fit_is_one_line_whatever_part_does_not(tmp_path):
    """torch has an exception for a record, one for the directory behind the records, and one for the last flush."""
    resource = pytest.importorskip("resource")
    path, content = tmp_path / "file.pth", {f"t{i}": torch.randn(64, 64) for i in range(4)}
    with whole_file(path) as scratch:
        torch.save(content, scratch)
    size = path.stat().st_size
    path.unlink()
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in [*range(0, size, 1021), size - 1]:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, whole[1]))
            with pytest.raises(UserError, match=r"^Cannot write .*file\.pth: "), whole_file(path) as scratch:
                torch.save(content, scratch)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 2**15, 2**16])
def test_a_disk_that_fills_up_while_the_result_is_written_ends_with_one_line(
    kept, settings, tmp_path, capfd, monkeypatch
):
    """`kept` bytes are left when the .pth file begins. With room again, the run is resumed and ends."""
    settings = [*settings, "training.max_steps=2"]
    with small_disk(tmp_path / "disk", "4m") as disk:
        monkeypatch.setattr(session, "disk_free", lambda folder: 2**40)
        output, fill, save = disk / "out", disk / "other", pipeline.save_pth

        def crowded(*arguments):
            free = os.statvfs(disk)
            fill.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - kept)))
            save(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "save_pth", crowded)
            line = refused([*settings, f"output.dir={output}"], tmp_path, capfd)
        assert line.startswith(f"Cannot write {output / 'sgm_finetuned.pth'}: ")
        assert not [path for path in output.iterdir() if path.name.startswith(".") or path.suffix == ".pth"]
        fill.unlink()
        finetune([*settings, f"output.dir={output}", "training.resume=true"])
        assert (output / "metrics.json").is_file()


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_loaded(settings, tmp_path, capfd, monkeypatch):
    (tmp_path / "file").write_text("mine")
    line = refused([*settings, f"output.dir={tmp_path / 'file' / 'out'}"], tmp_path, capfd)
    assert line.endswith(f"cannot be made: {tmp_path / 'file'} is a file; name another folder")
    monkeypatch.setattr(os, "access", lambda path, mode, **options: mode != os.W_OK)
    monkeypatch.setattr(session, "checked_data", lambda *arguments: pytest.fail("read the data"))
    assert "is read-only for you" in refused(settings, tmp_path, capfd)


def test_a_second_run_into_one_folder_is_refused(settings, tmp_path, capfd):
    output = tmp_path / "out"
    with lock_folder(output):
        line = refused([*settings, f"output.dir={output}"], tmp_path, capfd)
    assert line.startswith(f"{output} is in use by process {os.getpid()} on ")
    assert list(output.iterdir()) == []


def test_the_lock_of_a_process_that_was_killed_is_gone(tmp_path):
    code = f"""
import time
from pathlib import Path
from sgm_finetune.base.files import lock_folder
with lock_folder(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"is in use by process {process.pid} on "), lock_folder(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with lock_folder(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_stops_no_run(number, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with lock_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_finite_stops_before_the_step_and_is_named(settings, tmp_path, capfd, monkeypatch):
    """In step 7 two factors' gradients hold a NaN. The error names the one nearer to the loss, and the weights are
    those of step 6, which a checkpoint holds."""
    settings = [*settings, "training.eval_steps=3", "training.learning_rate=1e-2"]
    seen: dict[str, torch.Tensor] = {}
    step = SGMTrainer.training_step

    def poisoned(self, model, *arguments, **options):
        loss = step(self, model, *arguments, **options)
        if self.state.global_step == 6:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    seen[name] = parameter.detach().clone()
                if "layers.2.mlp.down_proj.lora_B" in name or "layers.1.mlp.up_proj.lora_A" in name:
                    parameter.grad[0, 0] = float("nan")
            seen["model"] = model
        return loss

    monkeypatch.setattr(SGMTrainer, "training_step", poisoned)
    line = refused(settings, tmp_path, capfd)
    assert (
        "The gradient of `model.layers.2.mlp.down_proj.lora_B.weight` and 1 before it is not finite at step 7" in line
    )
    model = seen.pop("model")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], before) for name, before in seen.items())
    kept = last_whole_checkpoint(tmp_path / "out" / "checkpoints")
    assert kept is not None
    assert kept.name == "checkpoint-6"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
     torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")],
)  # fmt: skip
def test_memory_that_is_not_enough_is_one_line_with_what_helps(error, settings, tmp_path, capfd, monkeypatch):
    def train(*arguments, **options):
        raise error

    monkeypatch.setattr(pipeline, "train", train)
    line = refused(settings, tmp_path, capfd)
    assert line.startswith("The memory is not enough")
    assert "training.micro_batch_size" in line
    if isinstance(error, RuntimeError):
        assert ("4096 bytes" in line) or ("2.50 GiB" in line)


@pytest.mark.slow
def test_missing_data_are_named_when_a_run_resumes(settings, reviews, tmp_path, capfd):
    copy = tmp_path / "copy.csv"
    copy.write_bytes(reviews.read_bytes())
    settings = [*settings, f"data.train={copy}", "training.eval_steps=5", "training.max_steps=5"]
    finetune(settings)
    copy.unlink()
    assert f"data.train={copy} does not exist" in refused([*settings, "training.resume=true"], tmp_path, capfd)
    assert last_whole_checkpoint(tmp_path / "out" / "checkpoints") is not None


@pytest.mark.slow
def test_one_seed_gives_one_run_and_records_where_it_was_made(settings, tmp_path):
    """The same bits of adapter, plan and numbers; environment.json records what must be equal for that."""
    found = [finetune([*settings, "adapter.dropout=0.1", f"output.dir={tmp_path / name}"]) for name in "ab"]
    for name in ("before", "after", "probe", "best_step"):
        assert found[0][name] == found[1][name]
    left, right = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert (tmp_path / "a" / "plan.json").read_bytes() == (tmp_path / "b" / "plan.json").read_bytes()
    recorded = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert recorded["versions"]["torch"] == torch.__version__
    assert recorded["seeds"] == {"training": 0, "data": 0, "probe": 0}
    assert recorded["machine"]["threads"] == torch.get_num_threads()
    assert not [name for name in recorded["variables"] if "TOKEN" in name]


@needs_posix
@pytest.mark.slow
def test_a_signal_at_a_step_that_validates_lets_it_validate(settings, tmp_path, monkeypatch):
    """So a resumed run chooses its best checkpoint among the same ones."""
    settings = [*settings, "training.eval_steps=3", "training.max_steps=6", "training.learning_rate=1e-2"]
    whole = finetune([*settings, f"output.dir={tmp_path / 'whole'}"])
    step = SGMTrainer.training_step

    def ended(self, *arguments, **options):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SGMTrainer, "training_step", ended)
        with pytest.raises(Interrupted, match="after step 3 of 6"):
            finetune(settings)
    last = last_whole_checkpoint(tmp_path / "out" / "checkpoints")
    assert last is not None
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3]
    resumed = finetune([*settings, "training.resume=true"])
    assert (resumed["after"], resumed["best_step"]) == (whole["after"], whole["best_step"])


@needs_posix
def test_a_signal_outside_of_training_ends_with_one_line(settings, tmp_path, capfd, monkeypatch):
    def prepared(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("continued")

    monkeypatch.setattr(session, "checked_data", prepared)
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--config", str(tmp_path / "empty.yaml"), *settings])
    assert caught.value.code == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "Ended by SIGTERM\n"
    assert list((tmp_path / "out").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_resumes_only_with_the_same_examples_and_a_whole_best_checkpoint(settings, reviews, tmp_path, capfd):
    copy = tmp_path / "copy.csv"
    copy.write_bytes(reviews.read_bytes())
    settings = [
        *settings, f"data.train={copy}", "training.eval_steps=2", "training.max_steps=6", "training.learning_rate=1e-6",
    ]  # fmt: skip
    finetune(settings)
    resumed = [*settings, "training.resume=true"]
    text = copy.read_text()
    copy.write_text(text.replace("good", "bad", 1))
    assert "examples are not those that the run began with" in refused(resumed, tmp_path, capfd)
    copy.write_text(text)
    assert finetune(resumed)["steps"] == 6
    last, earlier = (tmp_path / "out" / "checkpoints" / f"checkpoint-{step}" for step in (6, 4))
    state = json.loads((last / "trainer_state.json").read_text())
    (last / "trainer_state.json").write_text(json.dumps({**state, "best_model_checkpoint": str(earlier)}))
    seal(last)
    (earlier / "adapter_model.safetensors").write_bytes(b"")
    assert f"{earlier}, the best checkpoint of the run to resume, is damaged" in refused(resumed, tmp_path, capfd)
    shutil.rmtree(earlier)
    assert f"{earlier}, the best checkpoint of the run to resume, is gone" in refused(resumed, tmp_path, capfd)


@pytest.mark.parametrize(
    ("lost", "says"), [("checkpoint-2", "is gone"), ("checkpoint-2/adapter_model.safetensors", "is damaged")]
)
def test_a_best_checkpoint_that_is_lost_in_training_gives_no_other_weights(lost, says, settings, tmp_path, monkeypatch):
    """Trainer warns only, and keeps the weights of the last step."""
    step, evaluate = SGMTrainer.training_step, SGMTrainer.evaluate

    def worse_and_worse(self, *arguments, **options):
        return evaluate(self, *arguments, **options) | {"eval_loss": float(self.state.global_step)}

    def losing(self, *arguments, **options):
        if self.state.global_step == 5:
            remove(tmp_path / "out" / "checkpoints" / lost)
        return step(self, *arguments, **options)

    monkeypatch.setattr(SGMTrainer, "evaluate", worse_and_worse)
    monkeypatch.setattr(SGMTrainer, "training_step", losing)
    with pytest.raises(UserError, match=f"checkpoint-2, the best checkpoint of this run, {says}"):
        finetune([*settings, "training.eval_steps=2", "training.max_steps=6", "training.learning_rate=1e-3"])
    assert not (tmp_path / "out" / "sgm_finetuned.pth").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there are no terminals that close")
def test_a_terminal_that_closes_leaves_a_checkpoint(settings, tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    settings = [*settings, "training.max_steps=400", "training.eval_steps=400", "training.learning_rate=1e-3"]
    process = subprocess.Popen(
        [sys.executable, "src/finetune.py", "--config", str(tmp_path / "empty.yaml"), *settings],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "plan.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1.0)
    process.send_signal(signal.SIGHUP)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    assert "SIGHUP: finishing this step and saving a checkpoint" in printed
    assert "continue with training.resume=true" in printed
    assert last_whole_checkpoint(tmp_path / "out" / "checkpoints") is not None


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_whose_peer_never_came_ends_with_one_line(rank, settings, tmp_path):
    port = free_port()
    (tmp_path / "empty.yaml").write_text("")
    program = (
        "from datetime import timedelta; from sgm_finetune.base import processes; "
        "processes.JOIN_LIMIT = timedelta(seconds=3); from sgm_finetune.__main__ import main; main()"
    )
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, "finetune", "--config", str(tmp_path / "empty.yaml"), *settings],
        env=environment() | place, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"process {rank}: of the 2 processes of this run, one did not come within 3 s; ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_checkpoint_leaves_what_others_leave(settings, tmp_path, monkeypatch):
    """The kill comes before the older checkpoints are deleted: the history has all its rows, and no third checkpoint
    stays."""
    settings = [*settings, "training.eval_steps=2", "training.max_steps=6", "training.learning_rate=1e-2"]

    class Killed(BaseException):
        pass

    def kill(args, state):
        if state.global_step == 6:
            raise Killed

    finetune([*settings, f"output.dir={tmp_path / 'whole'}"])
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "delete_older", kill)
        with pytest.raises(Killed):
            finetune(settings)
    assert len(list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))) == 3
    finetune([*settings, "training.resume=true"])
    left, right = (
        [{key: value for key, value in row.items() if not key.startswith("train_")} for row in rows]
        for rows in (json.loads((tmp_path / name / "history.json").read_text()) for name in ("out", "whole"))
    )
    assert left == right
    left, right = (sorted(os.listdir(tmp_path / name / "checkpoints")) for name in ("out", "whole"))
    assert left == right
