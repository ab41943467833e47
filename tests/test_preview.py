"""`sgm data` shows what the model will see."""

from __future__ import annotations

import json
import re
from io import StringIO

import pytest
from architectures import save_pico
from rich.console import Console

from sgm_finetune.base.config_file import load_config
from sgm_finetune.commands.cli import main
from sgm_finetune.commands.data import preview


@pytest.fixture
def rows(tmp_path):
    def write(*rows: dict) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({**row, "number": n}) + "\n" for n in range(12) for row in rows))
        return f"data.train={path}"

    return write


def shown(overrides: list[str], **options) -> tuple[dict, str]:
    words = StringIO()
    found = preview(load_config(None, overrides), Console(file=words, width=160, **options), 1)
    return found, words.getvalue()


def test_what_the_loss_does_not_count_is_dimmed_or_outside_of_brackets(rows, tmp_path):
    model = f"model.name={save_pico('llama', tmp_path / 'model')}"
    path = tmp_path / "r.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"film the {'a ' * n}", "completion": "good"}) + "\n" for n in range(12))
    )
    overrides = [model, "model.task=causal-lm", f"data.train={path}"]
    found, plain = shown(overrides)
    (example,) = found["examples"]
    assert example["parts"][-1] == ["good <eos>", True]
    assert "⟦good <eos>⟧" in plain
    _, coloured = shown(overrides, force_terminal=True, color_system="standard", _environ={})
    assert "\x1b[2m" in coloured
    assert "⟦" not in coloured
    assert found["tokens"]["train"]["examples"] == 10
    assert found["tokens"]["train"]["longest"] >= found["tokens"]["train"]["median"] >= 4


@pytest.mark.parametrize(
    ("name", "task", "row", "part"),
    [
        ("bert", "sequence-classification", {"label": ["a", "b"]}, "→ a, b"),
        ("bert", "sequence-classification", {"label": 1.5}, "→ 1.5"),
        ("bert", "sequence-classification", {"label": "a"}, "→ a"),
        ("bart", "seq2seq-lm", {"target": "good"}, "→ good <eos>"),
    ],
)
def test_the_label_or_target_is_below_the_text(name, task, row, part, tmp_path):
    column = "source" if task == "seq2seq-lm" else "text"
    other = (
        {"label": ["b"]} if isinstance(row.get("label"), list) else {"label": 0.5} if row.get("label") == 1.5 else {}
    )
    other = other or ({"label": "b"} if "label" in row else {"target": "bad"})
    lines = [{column: f"film {'the ' * n}", **(row if n != 3 else other)} for n in range(16)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = [f"model.name={save_pico(name, tmp_path / name)}", f"model.task={task}", f"data.train={path}"]
    words = StringIO()
    preview(load_config(None, overrides), Console(file=words, width=160), 16)
    assert part in words.getvalue()


def test_the_command_prints_json_alone_and_leaves_nothing(tmp_path, reviews, capfd, monkeypatch):
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    model = save_pico("bert", tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(["data", "--json", "-n", "2", f"model.name={model}", f"data.train={reviews}"])
    assert caught.value.code == 0
    found = json.loads(capfd.readouterr().out)
    assert len(found["examples"]) == 2
    assert {example["label"] for example in found["examples"]} <= {"good", "bad"}
    assert found["num_truncated"] == {"train": 0, "validation": 0, "test": 0}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("label", "names", "counts"),
    [
        ("ab", ("a", "b"), (7, 7)),
        ((["x", "y"], ["y"]), ("x", "y"), (7, 14)),
        (([1, 1, 0], [1, 0, 0]), ("0", "1", "2"), (14, 7, 0)),
        ((True, False), ("False", "True"), (7, 7)),
    ],
)
def test_the_classes_are_named_with_their_numbers(label, names, counts, tmp_path):
    model = f"model.name={save_pico('bert', tmp_path / 'model')}"
    path = tmp_path / "r.jsonl"
    rows = [{"text": f"the film {'good ' * n}", "label": label[n % 2]} for n in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, words = shown([model, f"data.train={path}", "data.max_length=32"])
    assert [sum(found["classes"][name].values()) for name in names] == list(counts)
    assert list(found["classes"]) == list(names)
    assert "examples of each class" in words
    for name in names:
        assert re.search(rf"^ {name} +{found['classes'][name]['train']} ", words, re.M)


def test_the_words_of_each_tag_are_counted(tmp_path):
    model = f"model.name={save_pico('bert', tmp_path / 'model')}"
    path = tmp_path / "r.jsonl"
    rows = [{"tokens": ["the", "film", *["good"] * n], "tags": ["O", "B-X", *["O"] * n]} for n in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, words = shown([model, "model.task=token-classification", f"data.train={path}", "data.max_length=32"])
    assert sum(found["classes"]["B-X"].values()) == 14
    assert sum(found["classes"]["O"].values()) == 14 + sum(range(14))
    assert "words of each class" in words


def test_of_many_classes_the_most_frequent_and_the_rarest_are_shown(tmp_path):
    model = f"model.name={save_pico('bert', tmp_path / 'model')}"
    path = tmp_path / "r.jsonl"
    names = ["often"] * 60 + [f"class {n // 3}" for n in range(300)]
    rows = [{"text": f"{n} film", "label": name} for n, name in enumerate(names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, words = shown([model, f"data.train={path}", "data.max_length=32"])
    assert len(found["classes"]) == 101
    assert "... 77 more ..." in words
    assert words.count("class ") < 30
    assert " often " in words


def test_columns_that_nothing_reads_are_said_in_one_line(rows, tmp_path):
    data = rows({"text": "the good film", "label": "a"}, {"text": "a bad film", "label": "b"})
    path = tmp_path / "rows.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "text": f"{line['text']} {n}"}) + "\n" for n, line in enumerate(lines)))
    found, words = shown([f"model.name={save_pico('bert', tmp_path / 'model')}", data])
    assert found["not_read"] == ["number"]
    assert "not read: number\n" in words
