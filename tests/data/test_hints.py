"""A message about a missing column proposes what the columns look like, and following it trains on the right thing."""

from __future__ import annotations

import json
import re
import shlex
from io import StringIO

import pytest
from architectures import save_pico
from rich.console import Console

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.data import preview
from sgm_finetune.data.hints import describe_columns
from sgm_finetune.data.splits import check_data, load_splits

LM, CLASSES, PAIRS, TAGS = "causal-lm", "sequence-classification", "seq2seq-lm", "token-classification"
WORDS = ["good", "bad", "fine", "dull", "warm", "cold"]


def word(n: int) -> str:
    return f"{WORDS[n % 6]} {WORDS[n // 6 % 6]}"


CASES = {
    "question and answer": (LM, ["question", "answer"], "data.columns='{prompt: question, completion: answer}'"),
    "without the task": (
        CLASSES, ["question", "answer"], "model.task=causal-lm data.columns='{prompt: question, completion: answer}'",
    ),
    "dolly": (LM, ["instruction", "context", "response", "category"],
              "data.columns='{input: context, output: response}'"),
    "dolly without the task": (CLASSES, ["instruction", "context", "response"],
                               "model.task=causal-lm data.columns='{input: context, output: response}'"),
    "a question with its context": (LM, ["context", "question", "answer"],
                                    "data.columns='{instruction: question, input: context, output: answer}'"),
    "instruction and response": (LM, ["instruction", "response"], "data.columns='{output: response}'"),
    "query and answer": (LM, ["id", "query", "answer"], "data.columns='{prompt: query, completion: answer}'"),
    "input and target": (LM, ["input", "target"], "data.columns='{prompt: input, completion: target}'"),
    "source and target": (LM, ["source", "target"], "data.columns='{prompt: source, completion: target}'"),
    "prompt and response": (LM, ["prompt", "response"], "data.columns='{completion: response}'"),
    "answers that people prefer": (LM, ["prompt", "chosen", "rejected"], "data.columns='{completion: chosen}'"),
    "capitals and spaces": (LM, ["The id", "Question", "Answer"],
                            "data.columns='{prompt: Question, completion: Answer}'"),
    "an article and its highlights": (PAIRS, ["article", "highlights", "id"],
                                      "data.columns='{source: article, target: highlights}'"),
    "a document and its summary": (PAIRS, ["document", "summary"],
                                   "data.columns='{source: document, target: summary}'"),
    "a document and its summary, for a decoder": (
        LM, ["document", "summary"], "data.columns='{prompt: document, completion: summary}'",
    ),
    "premise and hypothesis": (CLASSES, ["premise", "hypothesis", "label"],
                               "data.columns='{text: premise, text_pair: hypothesis}'"),
    "two sentences": (CLASSES, ["sentence1", "sentence2", "label"],
                      "data.columns='{text: sentence1, text_pair: sentence2}'"),
    "sentence and label": (CLASSES, ["sentence", "label"], "data.columns='{text: sentence}'"),
    "review and sentiment": (CLASSES, ["sentiment", "review"], "data.columns='{text: review, label: sentiment}'"),
    "body and class": (CLASSES, ["title", "body", "class"], "data.columns='{text: body, label: class}'"),
    "labels by their values": (CLASSES, ["words about it", "verdict"],
                               "data.columns='{text: words about it, label: verdict}'"),
    "a classification, for a decoder": (
        LM, ["review", "sentiment"],
        "model.task=sequence-classification data.columns='{text: review, label: sentiment}'",
    ),
    "tags": (TAGS, ["tokens", "ner_tags"], "data.columns='{tags: ner_tags}'"),
    "tags without the task": (CLASSES, ["words", "labels"],
                              "model.task=token-classification data.columns='{tokens: words, tags: labels}'"),
    "messages without the task": (CLASSES, ["messages"], "model.task=causal-lm"),
    "a conversation": (LM, ["conversation"], "data.columns='{messages: conversation}'"),
    "one column of texts": (LM, ["note"], "data.columns='{text: note}'"),
}  # fmt: skip
LABELS = ("label", "sentiment", "class", "verdict", "category")
LISTS = ("tokens", "words", "ner_tags", "labels")
CHATS = ("messages", "conversation")


def value(column: str, n: int):
    if column in CHATS:
        return [
            {"role": "user", "content": f"messages: user {n}"},
            {"role": "assistant", "content": f"{column}: {word(n)}"},
        ]
    if column in LISTS:
        return [f"{column}: {word(n)}", "film"] if column in ("tokens", "words") else ["B-X", "O"]
    if column == "id":
        return n
    return WORDS[n % 2] if column in LABELS else f"{column}: {word(n)} and more"


def remedy(overrides: list[str]) -> str:
    config = load_config(None, overrides)
    with pytest.raises(UserError) as caught:
        check_data(config.data, config.model.task)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(("task", "columns", "hint"), CASES.values(), ids=CASES)
def test_a_hint_is_followed_literally_and_learns_the_right_column(task, columns, hint, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({c: value(c, n) for c in columns}) + "\n" for n in range(30)), encoding="utf-8")
    overrides = [f"data.train={path}", f"model.task={task}"]
    line = remedy(overrides)
    assert line.endswith(f" {hint}")
    followed = [*overrides, *shlex.split(line[line.index(hint) :])]
    config = load_config(None, followed)
    check_data(config.data, config.model.task)
    splits = load_splits(config.data, config.model.task)
    row = splits.train[0]
    given = {**{role: role for role in row}, **config.data.columns}
    for role in ("text", "text_pair", "prompt", "completion", "source", "target"):
        if role in row:
            assert row[role].startswith(f"{given[role]}: ")
    if "label" in row:
        assert set(splits.labels) == {"good", "bad"}
    if "tags" in row:
        assert splits.labels == ("B-X", "O")
    if "messages" in row:
        asked, answer = row["messages"][-2:]
        assert answer["content"].startswith(f"{given.get('output', given['messages'])}: ")
        for role in ("instruction", "input"):
            if role in columns or role in config.data.columns:
                assert f"{config.data.columns.get(role, role)}: " in asked["content"]


def test_sgm_data_shows_as_learnt_what_the_hint_said(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"film {'the ' * n}", "answer": "good"}) + "\n" for n in range(12)))
    overrides = [f"model.name={save_pico('llama', tmp_path / 'model')}", f"data.train={path}"]
    followed = shlex.split(re.search(r"look like (.*)", remedy(overrides))[1])
    found = preview(load_config(None, [*overrides, *followed]), Console(file=StringIO()), 1)
    assert [text for text, learnt in found["examples"][0]["parts"] if learnt] == ["good <eos>"]


@pytest.mark.parametrize("chosen", ["{prompt: query}", "{completion: reply}"])
def test_a_column_that_was_named_keeps_its_role(chosen, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a", "reply": "b"}\n' * 20, encoding="utf-8")
    overrides = [f"data.train={path}", "model.task=causal-lm", f"data.columns={chosen}"]
    line = remedy(overrides)
    pairs = sorted(line.partition("data.columns='{")[2].removesuffix("}'").split(", "))
    assert pairs == ["completion: reply", "prompt: query"]


def test_a_named_format_keeps_its_roles_in_the_hint(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"context": "c", "question": "a", "answer": "b"}\n' * 20, encoding="utf-8")
    overrides = [f"data.train={path}", "model.task=causal-lm", "data.format=completion"]
    assert remedy(overrides).endswith("data.columns='{prompt: question, completion: answer}'")


def test_columns_that_look_like_nothing_are_not_guessed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x y", "b": "z"}\n' * 20, encoding="utf-8")
    line = remedy([f"data.train={path}", "model.task=causal-lm"])
    assert line.endswith(
        "say with data.columns which of them are messages or instruction, output or prompt, completion or text"
    )


@pytest.mark.parametrize("name", ["a: b", "it's", '"x"', "a, b", "#1", "null", "{", "né", "- a", "~", "a\\b", " a"])
def test_a_hint_reads_back_as_the_name_of_its_column_through_shell_and_configuration(name):
    (override,) = shlex.split(describe_columns({"text": name}))
    assert load_config(None, [override]).data.columns == {"text": name}


def test_two_texts_with_a_score_are_a_pair_and_a_number(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("sentence1,sentence2,score\n" + "".join(f"a {n},b {n},{n / 8}\n" for n in range(30)))
    overrides = [f"data.train={path}"]
    followed = shlex.split(re.search(r"name it with (.*)", remedy(overrides))[1])
    config = load_config(None, [*overrides, *followed])
    splits = load_splits(config.data, config.model.task)
    assert splits.label_kind == "number"
    assert splits.train[0]["text_pair"].startswith("b ")


def test_a_single_column_of_a_folder_with_another_separator_is_named(tmp_path):
    (tmp_path / "train.csv").write_text("text;label\n" + "".join(f"film {n};a\n" for n in range(9)))
    config = load_config(None, [f"data.name={tmp_path}"])
    with pytest.raises(UserError, match=r"the column `text;label` alone; separate the fields with commas"):
        load_splits(config.data, config.model.task)


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        (CLASSES, lambda n: {"text": f"film {n}", "toxic": n % 2, "obscene": n // 2 % 2, "threat": n // 4 % 2}),
        (LM, lambda n: {"question": f"film {n}", "answers": {"text": [f"good {n}"]}}),
        (LM, lambda n: {"title": f"film {n}", "paragraphs": [{"context": f"good {n}"}]}),
    ],
)
def test_columns_that_look_like_nothing_known_get_no_hint(task, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(rows(n)) + "\n" for n in range(30)))
    assert "; say with data.columns which of them are " in remedy([f"data.train={path}", f"model.task={task}"])


def test_a_first_line_that_is_a_row_is_spoken_of(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("".join(f"film {n},{'pos' if n % 2 else 'neg'}\n" for n in range(30)))
    assert remedy([f"data.train={path}"]).endswith("looks like a row, so write the names above it: text, label")
