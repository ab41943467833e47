"""Links in folders of others: what they lead to is neither written, nor removed, nor copied; and a person's own links
to folders on another disk work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from systems import needs_posix

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import LOCK, lock_folder, remove, whole_file, whole_folder, write_text
from sgm_finetune.commands.finetune import finetune as run
from sgm_finetune.results.files import RESULTS, clear_results

pytestmark = needs_posix


@pytest.fixture
def private(tmp_path) -> Path:
    path = tmp_path / "private"
    path.write_text("mine")
    return path


def test_a_link_at_a_scratch_name_is_replaced(private, tmp_path):
    (tmp_path / ".report.html.partial").symlink_to(private)
    write_text(tmp_path / "report.html", "page")
    assert private.read_text() == "mine"
    assert (tmp_path / "report.html").read_text() == "page"
    assert not (tmp_path / "report.html").is_symlink()


def test_a_link_at_a_files_name_is_replaced(private, tmp_path):
    (tmp_path / "report.html").symlink_to(private)
    write_text(tmp_path / "report.html", "page")
    assert private.read_text() == "mine"
    assert not (tmp_path / "report.html").is_symlink()


def test_a_failed_write_leaves_the_file_behind_a_link(private, tmp_path):
    (tmp_path / ".a.partial").symlink_to(private)
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a"):
        raise ZeroDivisionError
    assert private.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["private"]


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_link_at_the_locks_name_is_not_written(kind, private, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    if kind == "symbolic":
        (folder / LOCK).symlink_to(private)
        with pytest.raises(UserError, match=r"Cannot write .*\.lock: Too many levels of symbolic links"):
            lock_folder(folder).__enter__()
    else:
        os.link(private, folder / LOCK)
        with lock_folder(folder):
            pass
    assert private.read_text() == "mine"


@pytest.mark.parametrize("name", [".out.partial", ".out.old"])
def test_a_link_at_a_scratch_folders_name_is_replaced(name, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("mine")
    (tmp_path / name).symlink_to(other)
    with whole_folder(tmp_path / "out") as scratch:
        (scratch / "file").write_text("new")
    assert (other / "mine").read_text() == "mine"
    assert os.listdir(other) == ["mine"]
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    disk = tmp_path / "disk"
    (disk / "export").mkdir(parents=True)
    (disk / "export" / "old").write_text("")
    (tmp_path / "export").symlink_to(disk / "export")
    with whole_folder(tmp_path / "export") as scratch:
        (scratch / "new").write_text("")
    assert (tmp_path / "export").is_symlink()
    assert os.listdir(disk) == ["export"]
    assert os.listdir(disk / "export") == ["new"]


def test_a_link_is_removed_and_not_what_it_leads_to(private, tmp_path):
    (tmp_path / "link").symlink_to(private)
    remove(tmp_path / "link")
    remove(tmp_path / "absent")
    assert os.listdir(tmp_path) == ["private"]


# results on another disk


def on_another_disk(output: Path, disk: Path, *names: str) -> None:
    output.mkdir(exist_ok=True)
    for name in names:
        (disk / name).mkdir(parents=True)
        (output / name).symlink_to(disk / name)


@pytest.mark.slow
def test_a_run_whose_folders_are_links_ends_and_is_replaced(settings, tmp_path):
    output, disk = tmp_path / "out", tmp_path / "disk"
    on_another_disk(output, disk, "checkpoints", "adapter", "export")
    (disk / "export" / "merged").mkdir()
    (disk / "export" / "merged" / "export.json").write_text("{}")
    again = [*settings, "training.max_steps=2", "training.eval_steps=1", "output.overwrite=true"]
    for _ in range(2):
        run(load_config(None, again), Console(quiet=True))
        assert all((output / name).is_symlink() for name in ("checkpoints", "adapter", "export"))
        assert (disk / "adapter" / "adapter_model.safetensors").is_file()
        assert sorted(os.listdir(disk / "checkpoints")) == ["checkpoint-1", "checkpoint-2", "progress.json"]
        assert os.listdir(disk / "export") == []
        assert sorted(os.listdir(disk)) == ["adapter", "checkpoints", "export"]


@pytest.mark.parametrize(
    ("name", "holds", "says"),
    [("adapter", "letter.txt", "with letter.txt in it, which SGM did not write"),
     ("checkpoints", "letter.txt", "with letter.txt in it, which SGM did not write"),
     ("export", "merged", "with merged in it, which SGM did not write"),
     ("plan.json", "letter.txt", "with letter.txt in it, which SGM did not write"),
     ("adapter", None, "which does not exist; make that folder")],
)  # fmt: skip
def test_a_link_to_a_folder_of_something_else_stops_before_anything_is_removed(name, holds, says, tmp_path):
    output, disk = tmp_path / "out", tmp_path / "disk"
    on_another_disk(output, disk, name)
    (output / RESULTS[0]).write_text("earlier")
    if holds is None:
        (disk / name).rmdir()
    else:
        (disk / name / holds).write_text("mine")
    with pytest.raises(UserError, match=says):
        clear_results(output)
    assert (output / RESULTS[0]).read_text() == "earlier"
    assert holds is None or (disk / name / holds).read_text() == "mine"


def test_a_checkpoint_that_is_a_link_is_discarded_alone(tmp_path):
    from sgm_finetune.train.checkpoints import discard_after

    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("mine")
    (tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-10").symlink_to(other)
    discard_after(tmp_path / "checkpoints" / "checkpoint-5")
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint-5"]
    assert (other / "mine").read_text() == "mine"


# links in a model's folder


def test_files_outside_a_models_folder_are_found(llama_folder, tmp_path):
    """A snapshot in the hub's cache consists of links to its repository's blobs."""
    from sgm_finetune.results.export.shards import check_own_files

    repository = tmp_path / "models--someone--pico"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(llama_folder.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    check_own_files(snapshot)
    check_own_files(llama_folder)
    private = tmp_path / "private"
    private.write_text(json.dumps({"mine": 1}))
    (snapshot / "model-2.safetensors").symlink_to(private)  # weights are never copied as they are
    check_own_files(snapshot)
    for name in ("LICENSE.txt", "generation_config.json", "chat_template.jinja", "vocab.txt"):
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(private)
        with pytest.raises(UserError, match=f"{name} is a link to {private}, outside of the model's folder"):
            check_own_files(snapshot)
        (snapshot / name).unlink()
