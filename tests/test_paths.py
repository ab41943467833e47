"""A result finds its model and its data from any folder, also after it moved, alone or with them."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path

import pytest
import yaml
from conftest import BAD, GOOD, make_tokenizer
from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import load_config, parse_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.evaluate import evaluate
from sgm_finetune.commands.finetune import finetune
from sgm_finetune.commands.generate import GenerateRequest, generate
from sgm_finetune.results.claim import claim_output
from sgm_finetune.results.load import read_stored
from sgm_finetune.results.paths import found_from, with_absolute_paths

SHORT = [
    "model.dtype=float32", "data.max_length=32", "probe.num_batches=2", "probe.sketch_size=12", "adapter.rank=4",
    "training.max_steps=2", "training.batch_size=8",
]  # fmt: skip


def quiet() -> Console:
    return Console(file=StringIO(), width=200)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A run in `project/a`, of a model and data that it names by relative paths."""
    from conftest import make_model

    folder = tmp_path_factory.mktemp("paths") / "project"
    make_model("causal-lm").save_pretrained(folder / "models/m")
    make_tokenizer().save_pretrained(folder / "models/m")
    rows = [f"the film {GOOD[n % 6] if n % 2 else BAD[n % 6]} {'very ' * (n // 12)},{n % 2}" for n in range(40)]
    (folder / "a").mkdir()
    (folder / "a/rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    before = os.getcwd()
    os.chdir(folder / "a")
    try:
        settings = ["model.name=../models/m", "data.train=rows.csv", "output.dir=o", *SHORT]
        finetune(load_config(None, settings), quiet())
    finally:
        os.chdir(before)
    return folder


def old(project: Path) -> None:
    """Makes the result one that holds the paths as they were typed."""
    import torch

    path = project / "a/o/sgm_finetuned.pth"
    content = torch.load(path, weights_only=True)
    content["config"]["model"]["name"] = "../models/m"
    content["config"]["data"]["train"] = "rows.csv"
    content["config"]["output"]["dir"] = "o"
    torch.save(content, path)


def test_what_a_run_stores_names_files_by_absolute_paths(project):
    stored = yaml.safe_load((project / "a/o/config.yaml").read_text())
    assert stored["model"]["name"] == str(project / "models/m")
    assert stored["data"]["train"] == str(project / "a/rows.csv")
    described = json.loads((project / "a/o/adapter/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(project / "models/m")


@pytest.mark.parametrize("age", ["new", "old"])
@pytest.mark.parametrize("moved", ["nothing", "the run", "all"])
def test_a_result_is_used_from_another_folder(age, moved, project, tmp_path, monkeypatch):
    import shutil

    folder = shutil.copytree(project, tmp_path / "project")
    if age == "new" and moved == "nothing":
        folder = project
    if age == "old":
        old(folder)
    output = folder / "a/o"
    if moved == "the run":
        output = output.rename(tmp_path / "elsewhere")
    if moved == "all":
        folder = folder.rename(tmp_path / "renamed")
        output = folder / "a/o"
    monkeypatch.chdir(folder / "a" if (age, moved) == ("old", "the run") else "/")
    where = [f"output.dir={output}"]
    assert evaluate(load_config(None, where), [], quiet())["num_examples"] == 3
    (row,) = generate(load_config(None, where), [], GenerateRequest(["the film"]), quiet())
    assert row["answer"] in ("0", "1")


def test_a_path_on_the_command_line_is_relative_to_where_one_stands(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    where = ["output.dir=a/o", "data.test=a/rows.csv"]
    stored = read_stored(load_config(None, where), where, StepLog(quiet()))
    assert stored.config.data.test == "a/rows.csv"
    assert stored.config.output.dir == "a/o"


def test_a_model_that_is_nowhere_gives_one_line(project, tmp_path, monkeypatch):
    import shutil

    output = shutil.copytree(project / "a/o", tmp_path / "o")
    import torch

    content = torch.load(output / "sgm_finetuned.pth", weights_only=True)
    content["config"]["model"]["name"] = "../gone"
    torch.save(content, output / "sgm_finetuned.pth")
    monkeypatch.chdir("/")
    where = [f"output.dir={output}"]
    with pytest.raises(UserError, match=r"No model folder ../gone.*model\.name=FOLDER"):
        generate(load_config(None, where), where, GenerateRequest(["the film"]), quiet())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.name", "smollm2-135m-instruct"), ("model.name", "owner/name"), ("data.name", "imdb"),
        ("data.name", "owner/name:subset"),
    ],
)  # fmt: skip
def test_hub_ids_and_embedded_names_stay(key, value, tmp_path, monkeypatch):
    (tmp_path / "imdb").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(None, [f"{key}={value}"])
    section, leaf = key.split(".")
    for made in (with_absolute_paths(config).model_dump(), found_from(config.model_dump(), tmp_path / "o")):
        assert made[section][leaf] == value


@pytest.mark.parametrize(
    "override",
    ["model.name=m", "data.name=m", "data.train=x.csv", "plan=x.csv", "snr.scan=x.csv", "data.train=~/x.csv"],
)
def test_every_key_that_names_a_file_is_stored_whole_and_found_again(override, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "x.csv").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    key, _, value = override.partition("=")
    config = load_config(None, [override, "output.dir=o"])
    expected = str(tmp_path / value.removeprefix("~/"))
    whole = with_absolute_paths(config)
    renamed = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-renamed"))
    for stored, output in ((config, renamed / "o"), (whole, renamed / "o")):
        found = found_from(stored.model_dump(), output)
        for name in key.split("."):
            found = found[name]
        if "~" not in value or stored is whole:
            assert found == expected.replace(str(tmp_path), str(renamed))
    values = whole.model_dump()
    for name in key.split("."):
        values = values[name]
    assert values == expected


@pytest.mark.parametrize("name", ["\0", "~nobody/x", "x" * 5000, "/", "..", "\ud800"])
def test_a_strange_path_stays_a_path(name):
    values = Config().model_dump()
    for section, key in (("model", "name"), ("data", "train"), ("output", "dir")):
        values[section][key] = name
    found = found_from(values, Path("o"))
    assert isinstance(found["model"]["name"], str)
    if name == "":  # no path at all
        with pytest.raises(UserError, match=r"`model\.name`"):
            parse_config(found)
    else:
        assert isinstance(parse_config(found).model.name, str)


def test_a_run_is_resumed_from_another_folder_with_the_same_files(project, monkeypatch):
    monkeypatch.chdir(project)
    again = ["model.name=models/m", "data.train=a/rows.csv", "output.dir=a/o", *SHORT, "training.resume=true"]
    checkpoint = claim_output(load_config(None, again), Path("a/o"))
    assert checkpoint is not None
    other = [item.replace("models/m", "smollm2-135m-instruct") for item in again]
    with pytest.raises(UserError, match=r"`model.name` is 'smollm2-135m-instruct' now and was"):
        claim_output(load_config(None, other), Path("a/o"))
