"""A model that has learnt classes keeps them: a class that its head names keeps its row, from the test before to the
exports."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import BAD, GOOD, make_tokenizer
from rich.console import Console

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.data import preview
from sgm_finetune.commands.evaluate import evaluate
from sgm_finetune.commands.export import ExportRequest, export_result
from sgm_finetune.commands.finetune import finetune
from sgm_finetune.data.prepared import prepare_data
from sgm_finetune.model.classes import choose_head, named_classes
from sgm_finetune.results.answers import answer
from sgm_finetune.results.load import load_trained, read_result
from sgm_finetune.results.pth import load_pth
from sgm_finetune.results.sampling import Sampling

SHORT = [
    "model.dtype=float32", "data.max_length=32", "probe.num_batches=2", "probe.sketch_size=12", "adapter.rank=4",
    "training.max_steps=2", "training.batch_size=8",
]  # fmt: skip
SEQUENCES, TOKENS = "sequence-classification", "token-classification"


def quiet() -> Console:
    return Console(file=StringIO(), width=200)


def save_head(folder: Path, names: list[str] | int, task: str = SEQUENCES, first: float = 3.0) -> Path:
    """A model with a head of these classes (or of so many without names) that prefers the class of row 0."""
    torch.manual_seed(2)
    auto = hf.BertForSequenceClassification if task == SEQUENCES else hf.BertForTokenClassification
    config = hf.BertConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, num_labels=names if isinstance(names, int) else len(names),
    )  # fmt: skip
    if not isinstance(names, int):
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model = auto(config)
    with torch.no_grad():
        model.classifier.bias[0] = first
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_rows(path: Path, good: object, bad: object, number: int = 40) -> Path:
    words = [(GOOD[i % 6], good) if i % 2 else (BAD[i % 6], bad) for i in range(number)]
    rows = [{"text": f"the film {word} {'very ' * (i // 12)}", "label": label} for i, (word, label) in enumerate(words)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_tagged(path: Path, tags: dict[str, object], number: int = 40) -> Path:
    words = list(tags)
    rows = [{"tokens": [words[i % len(words)], "film", *["very"] * (i // 4)]} for i in range(number)]
    for row in rows:
        row["tags"] = [tags.get(word, tags["film"]) for word in row["tokens"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(model: Path, data: Path, *more: str):
    """The prepared data, and the line about the head."""
    words = StringIO()
    config = load_config(None, [f"model.name={model}", f"data.train={data}", "data.max_length=32", *more])
    found = prepare_data(config, StepLog(Console(file=words, width=400)))
    return found, next((line[9:] for line in words.getvalue().splitlines() if line.startswith("head ")), None)


@pytest.mark.parametrize(
    ("names", "labels", "kept", "words"),
    [
        (["pos", "neg"], ("neg", "pos"), {"neg": 1, "pos": 0}, "the model's own is kept: pos, neg"),
        (["B", "C", "A"], ("A", "B"), {"A": 2, "B": 0}, "the model's own is kept: B, C, A"),
        (["POSITIVE", "NEGATIVE"], ("negative", "positive"), {"negative": 1, "positive": 0}, "negative = NEGATIVE"),
        (["pos", "neg"], ("0", "1"), {"0": 0, "1": 1}, "in the data 0 = pos, 1 = neg"),
        (["Pos", "pos"], ("pos", "Pos"), {"pos": 1, "Pos": 0}, "is kept: Pos, pos"),
        (["5", "1"], ("1", "5"), {"1": 1, "5": 0}, "is kept: 5, 1"),
        (3, ("0", "1", "2"), {"0": 0, "1": 1, "2": 2}, "its rows are the classes 0, 1, 2"),
        (3, ("LABEL_0", "LABEL_2"), None, "a new head for LABEL_0, LABEL_2; the model's own has 3 rows without names"),
        (["pos", "neg"], ("bad", "good"), None, "a new head for bad, good; the model's own has pos, neg"),
        (["pos", "neg"], ("mixed", "neg", "pos"), None, "a new head for mixed, neg, pos; the model's own has pos, neg"),
        (["a", "b", "c"], ("0", "1"), None, "a new head for 0, 1; the model's own has a, b, c"),
        (["1", "2", "3"], ("0", "1", "2"), None, "a new head for 0, 1, 2; the model's own has 1, 2, 3"),
        (2, ("neg", "pos"), None, "a new head for neg, pos; the model's own has 2 rows without names"),
        (["x", "x"], ("x", "y"), None, "2 rows without names"),
        ([f"c{i}" for i in range(2000)], ("a", "b"), None, "c6, c7, ... (2,000)"),
    ],
)  # fmt: skip
def test_a_class_keeps_the_row_that_the_models_head_names(names, labels, kept, words):
    config = hf.BertConfig(num_labels=names if isinstance(names, int) else len(names))
    config.architectures = ["BertForSequenceClassification"]
    if not isinstance(names, int):
        config.id2label = dict(enumerate(names))
    chosen = choose_head(labels, config, SEQUENCES)
    assert words in (chosen.line or "")
    assert len(chosen.line or "") < 400
    assert chosen.is_new == (kept is None)
    if kept is not None:
        assert dict(zip(labels, chosen.rows, strict=True)) == kept
        assert chosen.labels == (tuple(names) if not isinstance(names, int) else labels)
    else:
        assert (chosen.labels, chosen.rows) == (labels, tuple(range(len(labels))))


@pytest.mark.parametrize("architectures", [None, [], ["BertModel"], ["BertForMaskedLM"], [3]])
def test_a_model_without_a_head_has_nothing_to_keep(architectures):
    config = hf.BertConfig(num_labels=2)
    config.architectures = architectures
    chosen = choose_head(("neg", "pos"), config, SEQUENCES)
    assert (chosen.labels, chosen.is_new, chosen.line) == (("neg", "pos"), False, None)


@pytest.mark.parametrize(
    "id2label",
    [{0: "a", 2: "b"}, {0: "a", 1: 5}, {0: "a", 1: " "}, {0: "a", 1: None}, {0: "a", 1: "a"}, None, [], "ab"],
)
def test_names_that_are_not_usable_are_no_names(id2label):
    config = hf.BertConfig()
    object.__setattr__(config, "id2label", id2label)
    assert named_classes(config) is None


def test_the_head_of_another_task_is_not_read(tmp_path):
    model = save_head(tmp_path / "m", ["pos", "neg"], TOKENS)
    found, line = prepared(model, save_rows(tmp_path / "r.jsonl", "pos", "neg"))
    assert line == "a new head for neg, pos; the model's own is for token-classification"
    assert found.head.is_new


def test_a_trained_head_is_kept_from_the_test_before_to_the_exports(tmp_path):
    model = save_head(tmp_path / "m", ["pos", "neutral", "neg"])
    data = save_rows(tmp_path / "r.jsonl", "pos", "neg")
    where = [f"output.dir={tmp_path / 'out'}"]
    metrics = finetune(load_config(None, [f"model.name={model}", f"data.train={data}", *SHORT, *where]), quiet())
    assert metrics["labels"] == ["pos", "neutral", "neg"]
    table = metrics["before"]["confusion_matrix"]
    assert [sum(row) for row in table] == [sum(row) if i != 1 else 0 for i, row in enumerate(table)]
    assert [row[1:] for row in table] == [[0, 0]] * 3  # the kept head answers "pos" to all
    assert metrics["before"]["accuracy"] == pytest.approx(sum(table[0]) / metrics["before"]["num_examples"])
    log = StepLog(quiet())
    result = load_trained(read_result(load_config(None, where), [], log), log)
    for when in ("before", "after"):
        (found,) = answer(result, ["the film"], Sampling(), when)
        assert list(found["scores"]) == ["pos", "neutral", "neg"]
        assert found["answer"] == "pos"
    stored = hf.BertForSequenceClassification.from_pretrained(model)
    tokens = make_tokenizer()("the film", return_tensors="pt")
    expected = stored(input_ids=tokens["input_ids"]).logits.softmax(-1)[0].tolist()
    (before,) = answer(result, ["the film"], Sampling(), "before")
    assert list(before["scores"].values()) == pytest.approx(expected, abs=1e-5)
    again = evaluate(load_config(None, where), [], quiet())
    assert again["loss"] == pytest.approx(metrics["after"]["loss"], abs=1e-6)
    for to in ("merged", "adapter"):
        export_result(load_config(None, where), where, ExportRequest(to), quiet())
    described = json.loads((tmp_path / "out/export/merged/config.json").read_text())
    assert described["id2label"] == {"0": "pos", "1": "neutral", "2": "neg"}
    card = (tmp_path / "out/export/adapter/README.md").read_text()
    assert "id2label={0: 'pos', 1: 'neutral', 2: 'neg'}" in card


def test_a_new_head_takes_nothing_from_the_rows_for_other_classes(tmp_path):
    model = save_head(tmp_path / "m", ["pos", "neg"], first=50.0)
    data = save_rows(tmp_path / "r.jsonl", "fine", "poor")
    where = [f"output.dir={tmp_path / 'out'}"]
    metrics = finetune(load_config(None, [f"model.name={model}", f"data.train={data}", *SHORT, *where]), quiet())
    assert metrics["labels"] == ["fine", "poor"]
    assert metrics["before"]["loss"] < 2  # the stored bias of 50 would make it 25
    assert load_pth(tmp_path / "out/sgm_finetuned.pth")["head_is_new"]
    again = evaluate(load_config(None, where), [], quiet())
    assert again["loss"] == pytest.approx(metrics["after"]["loss"], abs=1e-6)
    export_result(load_config(None, where), where, ExportRequest("merged"), quiet())
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/export/merged")
    assert loaded.config.id2label == {0: "fine", 1: "poor"}
    assert loaded.classifier.bias.abs().max() < 2


@pytest.mark.parametrize("as_ids", [False, True])
def test_tags_keep_the_rows_of_a_trained_tagger(as_ids, tmp_path):
    names = ["B-PER", "O", "I-PER", "B-LOC"]
    model = save_head(tmp_path / "m", names, TOKENS)
    tags = {"good": "B-PER", "great": "I-PER", "bad": "B-LOC", "film": "O"}
    if as_ids:
        tags = {word: names.index(tag) for word, tag in tags.items()}
    found, line = prepared(model, save_tagged(tmp_path / "r.jsonl", tags), "model.task=token-classification")
    assert found.splits.labels == tuple(names)
    assert "is kept: B-PER, O, I-PER, B-LOC" in line
    assert ("0 = B-PER" in line) == as_ids
    for row in found.splits.train:
        assert row["tags"] == [names.index({"good": "B-PER", "great": "I-PER", "bad": "B-LOC"}.get(w, "O"))
                               for w in row["tokens"]]  # fmt: skip


def test_tags_that_the_tagger_lacks_get_a_new_head(tmp_path):
    model = save_head(tmp_path / "m", ["O", "B-PER"], TOKENS)
    data = save_tagged(tmp_path / "r.jsonl", {"good": "B-ORG", "film": "O"})
    found, line = prepared(model, data, "model.task=token-classification")
    assert line == "a new head for B-ORG, O; the model's own has O, B-PER"
    assert (found.splits.labels, found.head.is_new) == (("B-ORG", "O"), True)


def test_sets_of_classes_keep_their_rows_too(tmp_path):
    model = save_head(tmp_path / "m", ["sad", "old", "fun"])
    found, line = prepared(model, save_rows(tmp_path / "r.jsonl", ["fun", "old"], ["old"]))
    assert line == "the model's own is kept: sad, old, fun"
    assert {tuple(row["label"]) for row in found.splits.train} == {(0.0, 1.0, 1.0), (0.0, 1.0, 0.0)}


def test_numbers_to_predict_get_a_new_head_where_the_models_own_has_classes(tmp_path):
    model = save_head(tmp_path / "m", ["sad", "old", "fun"])
    found, line = prepared(model, save_rows(tmp_path / "r.jsonl", 1.5, 2.25))
    assert line == "a new head for a number; the model's own has 3 classes"
    assert found.splits.labels == ()


def test_a_result_is_evaluated_on_data_that_has_some_of_its_classes(tmp_path):
    model = save_head(tmp_path / "m", ["pos", "neutral", "neg"])
    where = [f"output.dir={tmp_path / 'out'}"]
    data = save_rows(tmp_path / "r.jsonl", "pos", "neg")
    finetune(load_config(None, [f"model.name={model}", f"data.train={data}", *SHORT, *where]), quiet())
    other = save_rows(tmp_path / "s.jsonl", "neutral", "neg")
    assert evaluate(load_config(None, where), [f"data.train={other}"], quiet())["num_examples"] > 2
    other = save_rows(tmp_path / "t.jsonl", "strange", "neg")
    with pytest.raises(
        UserError, match=r"labels \['neg', 'strange'\], .* was trained with \['pos', 'neutral', 'neg'\]"
    ):
        evaluate(load_config(None, where), [f"data.train={other}"], quiet())


def test_sgm_data_shows_the_names_of_the_models_head(tmp_path):
    model = save_head(tmp_path / "m", ["pos", "neg"])
    data = save_rows(tmp_path / "r.jsonl", 0, 1)
    words = StringIO()
    config = load_config(None, [f"model.name={model}", f"data.train={data}", "data.max_length=32"])
    found = preview(config, Console(file=words, width=200), 40)
    by_text = {example["text"]: example["label"] for example in found["examples"]}
    assert {label for text, label in by_text.items() if any(word in text for word in BAD)} == {"neg"}
    assert "in the data 0 = pos, 1 = neg" in words.getvalue()
