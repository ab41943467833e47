"""`sgm init`, the reference page and the JSON Schema come from the types of the configuration."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from systems import needs_posix

from sgm_finetune.base.config import Task, known_keys
from sgm_finetune.base.config_file import load_config, parse_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.reference import commented_yaml, json_schema, keys, reference_page
from sgm_finetune.commands.cli import main
from sgm_finetune.commands.init import Answers, write_first_config
from sgm_finetune.model.architecture import fitting_tasks

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["init", *arguments])
    return caught.value.code


def test_the_file_that_init_writes_is_the_configuration_that_was_asked_for(tmp_path, reviews, llama_folder):
    path = tmp_path / "mine.yaml"
    assert run(str(path), "--yes", "--model", str(llama_folder), "--data", str(reviews)) == 0
    config = load_config(path)
    assert (config.model.name, config.data.train) == (str(llama_folder), str(reviews))
    assert config.model.task == "sequence-classification"
    assert config.model.quantization == "none"
    text = path.read_text()
    assert "# Peak learning rate." in text
    schema = Path(text.splitlines()[0].partition("$schema=")[2])
    assert json.loads(schema.read_text()) == json_schema()


@needs_posix
def test_a_cache_that_cannot_be_written_does_not_stop_init(tmp_path, reviews, llama_folder, monkeypatch):
    """The schema in the cache only helps editors."""
    (tmp_path / "file").write_text("")
    for place in ("/proc/nowhere/cache", str(tmp_path / "file" / "cache")):
        monkeypatch.setenv("SGM_CACHE", place)
        path = tmp_path / "mine.yaml"
        assert run(str(path), "--yes", "--force", "--model", str(llama_folder), "--data", str(reviews)) == 0
        assert load_config(path).data.train == str(reviews)
        assert "$schema" not in path.read_text()


def test_init_does_not_replace_a_file(tmp_path, capfd):
    path = tmp_path / "config.yaml"
    path.write_text("mine")
    assert run(str(path), "--yes") == 2
    assert path.read_text() == "mine"
    assert capfd.readouterr().err == f"{path} exists; name another file, or replace it with --force\n"
    assert run(str(path), "--yes", "--force") == 0
    assert load_config(path) == parse_config(
        {"model": {"name": "smollm2-135m-instruct"}, "data": {"name": "rotten-tomatoes"}}
    )


@pytest.mark.parametrize(
    ("header", "rows", "task", "columns"),
    [
        ("text,label", ["good film,a", "bad,b"], "sequence-classification", {}),
        ("words,stars", ["a long one,1", "more,2"] * 3, "sequence-classification", {"text": "words", "label": "stars"}),
        ("prompt,completion", ["a,b"] * 3, "causal-lm", {}),
        ("source,target", ["a,b"] * 3, "seq2seq-lm", {}),
        ("text", ["some text"] * 3, "causal-lm", {}),
    ],
)  # fmt: skip
def test_the_task_is_guessed_from_the_columns(header, rows, task, columns, tmp_path):
    (tmp_path / "d.csv").write_text("\n".join([header, *rows]) + "\n")
    config = write_first_config(
        tmp_path / "c.yaml", Console(quiet=True), Answers("m/m", str(tmp_path / "d.csv")), ask=False
    )
    assert config.model.task == task
    assert dict(config.data.columns) == columns
    assert load_config(tmp_path / "c.yaml") == config


def test_four_questions_are_asked_and_the_columns_if_necessary(tmp_path, monkeypatch):
    (tmp_path / "d.csv").write_text("no,question,reply\n1,a b c,d\n2,e f g,h\n")
    answers = io.StringIO(f"owner/model\n{tmp_path / 'd.csv'}\ncausal-lm\nquestion\nreply\nnf4\n")
    monkeypatch.setattr("sys.stdin", answers)
    console = Console(file=io.StringIO(), width=200)
    config = write_first_config(tmp_path / "c.yaml", console)
    assert (config.model.name, config.model.task, config.model.quantization) == ("owner/model", "causal-lm", "nf4")
    assert dict(config.data.columns) == {"prompt": "question", "completion": "reply"}
    said = console.file.getvalue()
    assert [f"{n}/4" in said for n in range(1, 5)] == [True] * 4


def test_an_answer_that_cannot_be_used_is_asked_for_again_and_the_others_stay(tmp_path, monkeypatch):
    (tmp_path / "d.csv").write_text("text,label\na b c,good\nd e f,bad\n")
    given = ("./none", "owner/model", "none.csv", "roten-tomatoes", str(tmp_path / "d.csv"), "poetry", "", "")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(given) + "\n"))
    console = Console(file=io.StringIO(), width=200)
    config = write_first_config(tmp_path / "c.yaml", console)
    assert (config.model.name, config.data.train) == ("owner/model", str(tmp_path / "d.csv"))
    assert (config.model.task, config.model.quantization) == ("sequence-classification", "none")
    said = console.file.getvalue()
    assert [said.count(f"{n}/4") for n in range(1, 5)] == [2, 3, 2, 1]
    assert "No model folder ./none" in said
    assert "No data file none.csv" in said
    assert "`rotten-tomatoes`?" in said


def test_the_tasks_of_a_model_are_those_that_transformers_has_for_it(bert_folder, llama_folder):
    assert not {"seq2seq-lm", "preference"} & set(fitting_tasks(str(bert_folder)))
    assert "reward" in fitting_tasks(str(bert_folder))
    assert "causal-lm" in fitting_tasks(str(llama_folder))
    assert fitting_tasks("owner/model") == get_args(Task)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--data", "none.csv"], "No data file none.csv"),
        (["--task", "poetry"], "'poetry' is not one of"),
    ],
)
def test_wrong_answers_are_one_line(arguments, error, tmp_path, capfd):
    assert run(str(tmp_path / "c.yaml"), "--yes", *arguments) == 2
    said = capfd.readouterr().err
    assert error in said
    assert said.count("\n") == 1


def test_init_without_a_terminal_asks_nobody(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(str(tmp_path / "c.yaml")) == 2
    assert "there is no terminal" in capfd.readouterr().err


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "rank": st.integers(1, 40),
            "dropout": st.floats(0, 0.9),
            "name": st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1).filter(
                lambda name: not name.startswith("~")  # a home folder
            ),
        }
    ),
    st.sets(st.sampled_from(known_keys())),
)
def test_a_commented_file_loads_as_the_configuration_it_shows(values, said):
    config = parse_config(
        {
            "adapter": {"rank": values["rank"], "dropout": values["dropout"]},
            "model": {"name": values["name"]},
            "data": {"columns": {"text": values["name"]}},
        }
    )
    assert parse_config(yaml.safe_load(commented_yaml(config, said)) or {}) == config


def test_every_key_has_a_type_and_a_description():
    assert [key.name for key in keys()] == known_keys()
    assert all(key.type and len(key.description) > 10 for key in keys())


def test_the_pages_of_the_documentation_are_those_of_this_version():
    """`python -m sgm_finetune.base.reference docs/reference` generates them."""
    assert (ROOT / "docs/reference/config.md").read_text(encoding="utf-8") == reference_page()
    assert json.loads((ROOT / "docs/reference/config.schema.json").read_text()) == json_schema()


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/*.yaml"), ROOT / "config.yaml"]), ids=lambda path: path.name
)
def test_the_schema_accepts_the_files_that_are_here(path):
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), json_schema())


@pytest.mark.parametrize(
    "wrong",
    [
        {"training": {"epoch": 1}}, {"adapter": {"rank": 0}}, {"model": {"task": "poetry"}}, {"data": {"num_train": 0}},
        {"merge": {"threshold": 2}}, {"memory": {"budget": 1000}}, {"adapter": {"parameters": 0}},
    ],
)  # fmt: skip
def test_the_schema_refuses_an_unknown_key_and_a_number_out_of_range(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json_schema())


@pytest.mark.parametrize("written", ["wandb", ["wandb", "mlflow"], None, []])
def test_the_schema_takes_one_tracker_or_several(written):
    jsonschema.validate({"training": {"report_to": written}}, json_schema())


NUMBERS = {
    "memory.budget": {
        True: ["8GiB", "8 gib", "' 512MB '", "1.5 tb", ".5GiB", "1_000 MB", "1e1GiB", "+8GiB", "2000000000", "2e9"],
        False: ["8g", "08GiB", "8GiBs", "1_0GiB", "300k", "-8GiB", "1000", "true", "1:30", "GiB", "[8GiB]"],
    },
    "adapter.parameters": {
        True: ["300k", "300 K", "1.5M", "3e2k", "' 1.k '", ".5k", "1_000k", "+3k", "300000", "1_000", "3e5", "200.0"],
        False: ["3 kk", "-3k", "03k", "8GiB", "k", "0", "-1", "2.5", "true", "1_0k", "2000000000000", "[3k]"],
    },
}


@pytest.mark.parametrize(
    ("key", "text", "accepted"),
    [(key, text, accepted) for key, texts in NUMBERS.items() for accepted in texts for text in texts[accepted]],
)
def test_the_schema_and_the_program_accept_the_same_sizes_and_counts(key, text, accepted, tmp_path):
    """An editor follows YAML 1.2, in which 1_000 is a text; PyYAML follows 1.1, in which 3e5 is one."""
    section, _, leaf = key.partition(".")
    path = tmp_path / "config.yaml"
    path.write_text(f"{section}: {{{leaf}: {text}}}")
    value = yaml.safe_load(path.read_text())[section][leaf]
    validator = jsonschema.Draft202012Validator(json_schema())
    read = [value, text.strip("'")] if accepted else [value]
    assert [validator.is_valid({section: {leaf: form}}) for form in read] == [accepted] * len(read)
    try:
        load_config(path)
    except UserError:
        assert not accepted
    else:
        assert accepted
