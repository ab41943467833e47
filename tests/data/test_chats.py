"""What people write into conversations reaches the chat template, and the loss counts what the assistant writes."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sgm_finetune.base.config import Config, DataConfig, ModelConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.generate import read_prompts
from sgm_finetune.data.chat import asked_text
from sgm_finetune.data.encoding import IGNORED, Encoded, encode
from sgm_finetune.data.prepared import not_read
from sgm_finetune.data.questions import questions
from sgm_finetune.data.sources import open_source
from sgm_finetune.data.splits import DataSplits, load_splits, split_source
from sgm_finetune.data.tables import Table
from sgm_finetune.results.answers import encode_prompts, prompt_ids
from sgm_finetune.results.stops import reasoning_remark

PLAIN = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = (
    "{% if tools %}{% for t in tools %}[tool]{{ t | tojson }}</s>\n{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ARGUMENTS_AS_TEXT = TOOLS.replace("c.function.arguments | tojson", "c.function.arguments + ''")
ARGUMENTS_PRINTED = TOOLS.replace("c.function.arguments | tojson", "c.function.arguments")
CALLS_OF_NULL = (  # calls are written for a content that is null, with arguments as text; another content follows
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is none %}"
    "{% for c in m['tool_calls'] %}<call>{{ c['function']['name'] + ' ' + c['function']['arguments'] }}</call>"
    "{% endfor %}{% else %}{{ m['content'] }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SWITCHED = (  # an empty reasoning on a line of its own, whose end the template's switch decides
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{{ '\n<think>' + (m.reasoning_content or '') + '</think>\n' }}{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>' }}{% endif %}{% endif %}"
)
THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer_of(template: str | None, adds_bos: bool = False):
    """Bytes as tokens, with <s> and </s>; offsets as any fast tokenizer has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1}
    vocabulary |= {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=2)}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = template
    return made


def said(role: str, content: object, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: object, **more: object) -> dict:
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


def write(path: Path, *rows: dict) -> Path:
    """The rows as a file: JSON lines, or Parquet, where nested values have fixed types."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def loaded(path: Path, **config: object) -> DataSplits:
    """All rows of the file as training data, in some order; two other rows are the validation and test data."""
    config_of_rows = DataConfig(train=str(path), **config)
    source = open_source(config_of_rows)
    for split in ("validation", "test"):
        turns = [said("user", split), said("assistant", "a")]
        row = {"messages": turns, "conversations": turns, "prompt": turns[:1], "completion": turns[1:],
               "instruction": split, "output": "a"}  # fmt: skip
        if isinstance(source.tables["train"].columns.get("prompt", [[]])[0], str):
            row |= {"prompt": split, "completion": "a"}
        there = {name: [value] for name, value in row.items() if name in source.tables["train"].columns}
        source.tables[split] = Table(f"{split} data", there)
    return split_source(source, config_of_rows, "causal-lm")


def encoded(path: Path, tokenizer, **config: object) -> tuple[DataSplits, Encoded]:
    splits = loaded(path, **config)
    return splits, encode(splits.train, tokenizer, "causal-lm", 4096, splits.origins["train"])


def marked(tokenizer, row: dict) -> str:
    """The text with ⟦ ⟧ around what the loss counts, without the end of its last line."""
    text = ""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for is_ignored, run in groupby(pairs, key=lambda pair: pair[1] == IGNORED):
        part = tokenizer.decode([token for token, _ in run])
        text += part if is_ignored else f"⟦{part}⟧"
    return text.removesuffix("\n")


def shown(path: Path, template: str | None, *rows: dict, adds_bos: bool = False, **config: object) -> list[str]:
    tokenizer = tokenizer_of(template, adds_bos)
    _, found = encoded(write(path, *rows), tokenizer, **config)
    return sorted(marked(tokenizer, row) for row in found.dataset)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("content", "calls"),
    [
        ("", [call("weather", {"town": 3}, id="c1")]),
        (None, [call("weather", {"town": 3})]),
        (None, [call("weather", '{"town": 3}')]),
        (None, [{"name": "weather", "arguments": {"town": 3}}]),
    ],
)
def test_a_call_is_learnt_and_the_template_sees_the_tools(tmp_path, ending, content, calls):
    row = {
        "messages": [said("user", "rain?"), said("assistant", content, tool_calls=calls), said("tool", "no")],
        "tools": [TOOL],
    }
    row["messages"].append(said("assistant", "It is dry."))
    if ending == "parquet":  # a struct for all messages: every other one has tool_calls=None
        row["tools"][0] = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    (text,) = shown(tmp_path / f"r.{ending}", TOOLS, row)
    assert text == (
        f"[tool]{json.dumps(TOOL)}</s>\n[user]rain?</s>\n"
        '[assistant]⟦<call>weather {"town": 3}</call></s>⟧\n[tool]no</s>\n[assistant]⟦It is dry.</s>⟧'
    )


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_arguments_of_different_shapes_stay_apart(tmp_path, ending):
    """Arrow merges them into one struct whose other keys are None."""
    rows = [
        {"messages": [said("user", f"q{n}"), said("assistant", None, tool_calls=[call("f", arguments)])]}
        for n, arguments in enumerate([{"town": 3}, {"street": "a", "number": 1.5}, {}])
    ]
    if ending == "parquet":
        rows.pop()  # Parquet has no object without keys
    texts = shown(tmp_path / f"r.{ending}", TOOLS, *rows)
    assert [re.findall(r"<call>f (.*)</call>", text)[0] for text in texts] == [
        '{"town": 3}', '{"street": "a", "number": 1.5}', "{}",
    ][: len(rows)]  # fmt: skip


def test_a_null_among_the_arguments_of_a_json_file_stays(tmp_path):
    row = {"messages": [said("user", "q"), said("assistant", None, tool_calls=[call("f", {"town": None})])]}
    assert '<call>f {"town": null}</call>' in shown(tmp_path / "r.jsonl", TOOLS, row)[0]


def test_tools_may_be_a_json_text_or_functions_alone(tmp_path):
    turns = [said("user", "q"), said("assistant", "a")]
    rows = [{"messages": turns, "tools": tools} for tools in ([TOOL], json.dumps([TOOL]), [TOOL["function"]])]
    for row in rows:
        assert f"[tool]{json.dumps(TOOL)}</s>" in shown(tmp_path / "r.jsonl", TOOLS, row)[0]
    for tools in ([], "", "[]", None):
        assert "[tool]" not in shown(tmp_path / "r.jsonl", TOOLS, {"messages": turns, "tools": tools})[0]


def test_a_template_that_wants_arguments_as_text_gets_them_so(tmp_path):
    row = {"messages": [said("user", "q"), said("assistant", None, tool_calls=[call("f", {"town": "Ås"})])]}
    for template in (ARGUMENTS_AS_TEXT, ARGUMENTS_PRINTED, CALLS_OF_NULL):
        assert '<call>f {"town": "Ås"}</call>' in shown(tmp_path / "r.jsonl", template, row)[0]


def test_an_older_function_call_is_a_call(tmp_path):
    turns = [
        said("user", "q"),
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
    ]
    turns += [said("function", "4", name="f"), said("assistant", "a")]
    assert shown(tmp_path / "r.jsonl", TOOLS, {"messages": turns}) == [
        "[user]q</s>\n[assistant]⟦<call>f {}</call></s>⟧\n[tool]4</s>\n[assistant]⟦a</s>⟧"
    ]


def test_functions_are_tools_under_their_older_name(tmp_path):
    row = {"messages": [said("user", "q"), said("assistant", "a")], "functions": [{"name": "f", "parameters": {}}]}
    (text,) = shown(tmp_path / "r.jsonl", TOOLS, row)
    assert text == shown(tmp_path / "r.jsonl", TOOLS, {"messages": row["messages"], "tools": row["functions"]})[0]
    assert '"name": "f"' in text


def test_messages_as_python_prints_them_are_refused_with_their_remedy(tmp_path):
    row = {"messages": str([said("user", "q"), said("assistant", "a")])}
    with pytest.raises(UserError, match=r"which is not JSON: Expecting property .*; write it as json\.dumps does$"):
        shown(tmp_path / "r.jsonl", PLAIN, row)


def test_a_developer_is_the_system(tmp_path):
    (text,) = shown(
        tmp_path / "r.jsonl",
        PLAIN,
        {"messages": [said("developer", "be brief"), said("user", "q"), said("assistant", "a")]},
    )
    assert text.startswith("[system]be brief</s>")


def test_calls_that_the_template_does_not_write_are_refused(tmp_path):
    row = {"messages": [said("user", "q"), said("assistant", None, tool_calls=[call("f", {})])]}
    with pytest.raises(UserError, match=r"^r\.jsonl, row 1: the model's chat template does not write `tool_calls`"):
        shown(tmp_path / "r.jsonl", PLAIN, row)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([{"id": 3}], " calls {'id': 3}; write {'type': 'function'"),
        ("no", " is 'no', which is not JSON"),
        ([call("f", "{")], ", arguments is '{', which is not JSON"),
        ([call("f", [1])], " calls `f` with [1]; write arguments as an object"),
        ([call("f", '{"a": "\\ud800"}')], "half of a surrogate pair"),
    ],
)
def test_a_mistake_in_a_call_names_the_message(tmp_path, calls, message):
    row = {"messages": [said("user", "q"), said("assistant", "", tool_calls=calls)]}
    with pytest.raises(UserError, match=rf"r\.jsonl, row 1: `messages`, message 2.*{re.escape(message)}"):
        loaded(write(tmp_path / "r.jsonl", row))


@pytest.mark.parametrize(("tools", "value"), [(["f"], "holds 'f', not a tool"), (3, "is 3, not a list"), ("f", "JSON")])
def test_a_mistake_in_the_tools_names_the_row(tmp_path, tools, value):
    rows = [{"messages": [said("user", "q"), said("assistant", "a")], "tools": tools}]
    with pytest.raises(UserError, match=rf"r\.jsonl, row 1: `tools`.*{value}"):
        loaded(write(tmp_path / "r.jsonl", *rows))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_learnt_where_the_template_writes_it(tmp_path, field):
    turns = [
        said("user", "2+2"),
        said("assistant", "4", **{field: "add"}),
        said("user", "and 1"),
        said("assistant", "5"),
    ]
    turns[3][field] = "add again"
    texts = shown(tmp_path / "r.jsonl", THINKING, {"messages": turns})
    assert texts == sorted([
        "[user]2+2</s>\n[assistant]⟦<think>\nadd\n</think>\n\n4</s>⟧",
        "[user]2+2</s>\n[assistant]4</s>\n[user]and 1</s>\n[assistant]⟦<think>\nadd again\n</think>\n\n5</s>⟧",
    ])  # fmt: skip


def test_an_empty_reasoning_that_the_template_writes_is_not_learnt(tmp_path):
    opened = THINKING.replace(
        "{% if add_generation_prompt %}[assistant]", "{% if add_generation_prompt %}[assistant]<think>\n"
    )
    for template in (THINKING, opened, THINKING.replace("<think>", "[T]").replace("</think>", "[/T]")):
        for reasoning in ({}, {"reasoning_content": None}, {"reasoning_content": ""}):
            row = {"messages": [said("user", "2+2"), said("assistant", "4", **reasoning)]}
            (text,) = shown(tmp_path / "r.jsonl", template, row)
            assert text.endswith("\n\n⟦4</s>⟧"), text


def test_an_answer_without_reasoning_is_not_asked_for_with_its_beginning(tmp_path):
    opens = PLAIN.replace(
        "{% if add_generation_prompt %}[assistant]", "{% if add_generation_prompt %}[assistant]<think>\n"
    )
    turns = [said("user", "2+2"), said("assistant", "4"), said("user", "and 1"), said("assistant", "5")]
    assert shown(tmp_path / "r.jsonl", opens, {"messages": turns}) == [
        "[user]2+2</s>\n[assistant]⟦4</s>⟧\n[user]and 1</s>\n[assistant]⟦5</s>⟧"
    ]
    tokenizer = tokenizer_of(opens)
    assert asked_text(turns[:1], tokenizer) == "[user]2+2</s>\n[assistant]<think>\n"
    assert asked_text(turns[:1], tokenizer, reasons=False) == "[user]2+2</s>\n[assistant]"
    assert "ends a question without '<think>\\n'" in str(reasoning_remark(tokenizer))
    assert "ends a question with '<think>" in str(reasoning_remark(tokenizer_of(THINKING)))
    assert reasoning_remark(tokenizer_of(PLAIN)) is None


def test_reasoning_that_the_template_drops_is_refused(tmp_path):
    drops = PLAIN.replace(
        "{% if add_generation_prompt %}[assistant]", "{% if add_generation_prompt %}[assistant]<think>\n"
    )
    drops = drops.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    row = {"messages": [said("user", "2+2"), said("assistant", "<think>add</think>4")]}
    with pytest.raises(UserError, match="give prompt and completion as texts"):
        shown(tmp_path / "r.jsonl", drops, row)


def test_an_empty_reasoning_ends_where_the_template_without_reasoning_lets_a_question_end(tmp_path):
    row = {"messages": [said("user", "2+2"), said("assistant", "4")]}
    begin = "[user]2+2</s>\n[assistant]"
    assert shown(tmp_path / "r.jsonl", SWITCHED, row) == [f"{begin}\n<think></think>⟦\n4</s>⟧"]
    asked = asked_text(row["messages"][:1], tokenizer_of(SWITCHED), reasons=False)
    assert asked == f"{begin}\n<think></think>"
    unswitched = SWITCHED.replace("enable_thinking is defined and not enable_thinking", "false").replace("enable", "")
    assert shown(tmp_path / "r.jsonl", unswitched, row) == [f"{begin}\n<think></think>\n⟦4</s>⟧"]
    row["messages"][1]["reasoning"] = "add"
    assert shown(tmp_path / "r.jsonl", SWITCHED, row) == [f"{begin}⟦\n<think>add</think>\n4</s>⟧"]


def test_a_content_that_is_null_is_not_printed(tmp_path):
    printed = TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ m['content'] }}")
    needs_text = TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ m['content'] + '' }}")
    row = {"messages": [said("user", "q"), said("assistant", None, tool_calls=[call("f", {})])]}
    for template in (printed, needs_text):
        assert shown(tmp_path / "r.jsonl", template, row) == ["[user]q</s>\n[assistant]⟦<call>f {}</call></s>⟧"]


def test_an_empty_reasoning_in_the_answer_itself_is_learnt(tmp_path):
    row = {"messages": [said("user", "2+2"), said("assistant", "<think></think>4")]}
    assert shown(tmp_path / "r.jsonl", PLAIN, row) == ["[user]2+2</s>\n[assistant]⟦<think></think>4</s>⟧"]


def test_a_prompt_has_the_empty_reasoning_that_a_model_without_reasoning_was_trained_on(tmp_path):
    tokenizer, question = tokenizer_of(THINKING), [said("user", "2+2")]
    assert asked_text(question, tokenizer) == "[user]2+2</s>\n[assistant]"
    assert asked_text(question, tokenizer, reasons=False) == "[user]2+2</s>\n[assistant]<think>\n\n</think>\n\n"
    assert asked_text(question, tokenizer_of(PLAIN), reasons=False) == "[user]2+2</s>\n[assistant]"
    path = tmp_path / "r.jsonl"
    assert loaded(write(path, {"messages": [*question, said("assistant", "4")]})).roles == ("messages",)
    for answer in (said("assistant", "4", reasoning="add"), said("assistant", "<think>add</think>4")):
        assert loaded(write(path, {"messages": [*question, answer]})).roles == ("messages", "reasoning")


@pytest.mark.parametrize("weight", [0, 0.0, False])
def test_a_turn_without_weight_is_not_learnt(tmp_path, weight):
    turns = [said("user", "a"), said("assistant", "WRONG", weight=weight), said("user", "b")]
    turns += [said("assistant", "right", weight=1), said("user", "c"), said("assistant", "LAST", weight=weight)]
    for template in (PLAIN, TOOLS, THINKING.replace("\n</think>\n\n", ""), MARKED):
        text = "".join(shown(tmp_path / "r.jsonl", template, {"messages": turns}))
        (learnt,) = re.findall("⟦(.*?)⟧", text, re.DOTALL)
        assert "right" in learnt
        assert "WRONG" in text
        assert "WRONG" not in learnt
        assert "LAST" not in text
    shared = [{"from": "human", "value": "a", "weight": None}, {"from": "gpt", "value": "WRONG", "weight": weight}]
    shared += [{"from": "human", "value": "b", "weight": 0}, {"from": "gpt", "value": "right", "weight": 1.0}]
    (text,) = shown(tmp_path / "s.jsonl", PLAIN, {"conversations": shared})
    assert re.findall("⟦(.*?)⟧", text) == ["right</s>"]


@pytest.mark.parametrize("weight", [0.5, "0", [0], 2])
def test_another_weight_is_refused(tmp_path, weight):
    turns = [said("user", "a"), said("assistant", "b", weight=weight)]
    with pytest.raises(UserError, match=r"message 2 has the weight .*; write 1 to learn the message, 0 not to"):
        loaded(write(tmp_path / "r.jsonl", {"messages": turns}))


def test_a_conversation_of_turns_without_weight_has_nothing_to_learn(tmp_path):
    turns = [said("user", "a"), said("assistant", "b", weight=0)]
    with pytest.raises(UserError, match="row 1: `messages` has no answer by the assistant"):
        loaded(write(tmp_path / "r.jsonl", {"messages": turns}))


def test_a_column_holds_the_system_message(tmp_path):
    rows = {
        "a": {"system": "Be brief.", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "b": {"system": "Be brief.", "messages": [said("user", "q"), said("assistant", "a")]},
        "c": {
            "system": "Be brief.",
            "messages": [said("system", "Be brief."), said("user", "q"), said("assistant", "a")],
        },
        "d": {"system": "Be brief.", "instruction": "q", "output": "a"},
        "e": {"system": "Be brief.", "prompt": [said("user", "q")], "completion": [said("assistant", "a")]},
    }
    for row in rows.values():
        assert shown(tmp_path / "r.jsonl", PLAIN, row) == ["[system]Be brief.</s>\n[user]q</s>\n[assistant]⟦a</s>⟧"]
    row = {"about": "Be brief.", "messages": [said("user", "q"), said("assistant", "a")]}
    path = write(tmp_path / "r.jsonl", row)
    assert loaded(path).unread == ("about",)


@pytest.mark.parametrize("system", ["", None])
def test_an_empty_system_message_is_none(tmp_path, system):
    row = {"system": system, "messages": [said("user", "q"), said("assistant", "a")]}
    assert shown(tmp_path / "r.jsonl", PLAIN, row) == ["[user]q</s>\n[assistant]⟦a</s>⟧"]


def test_two_different_system_messages_are_refused(tmp_path):
    row = {"system": "Be brief.", "messages": [said("system", "Be long."), said("user", "q"), said("assistant", "a")]}
    with pytest.raises(UserError, match="row 1: `system` and `messages` have different system messages; keep one"):
        loaded(write(tmp_path / "r.jsonl", row))


@pytest.mark.parametrize(
    "history",
    [
        [["q1", "a1"]],
        '[["q1", "a1"]]',
        [said("user", "q1"), said("assistant", "a1")],
        [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}],
    ],
)
def test_the_history_of_an_alpaca_row_comes_before_it(tmp_path, history):
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": history}
    assert shown(tmp_path / "r.jsonl", PLAIN, row) == [
        "[system]s</s>\n[user]q1</s>\n[assistant]⟦a1</s>⟧\n[user]q\n\ni</s>\n[assistant]⟦a</s>⟧"
    ]
    for nothing in ([], None, ""):
        (text,) = shown(tmp_path / "r.jsonl", PLAIN, {**row, "history": nothing})
        assert text.startswith("[system]s</s>\n[user]q\n\ni</s>")
    with pytest.raises(UserError, match=r"row 1: `history`, turn 1 is \['q'\]; write \[question, answer\]"):
        loaded(write(tmp_path / "r.jsonl", {**row, "history": [["q"]]}))


@pytest.mark.parametrize(
    ("caller", "observer"),
    [("function_call", "observation"), ("tool_call", "tool"), ("function_call", "function_response")],
)
@pytest.mark.parametrize(
    "value", ['{"name": "f", "arguments": {"a": 1}}', '[{"name": "f", "arguments": "{\\"a\\": 1}"}]']
)
def test_sharegpt_calls_and_results_are_a_call_and_its_result(tmp_path, caller, observer, value):
    turns = [("human", "q"), (caller, value), (observer, "42"), ("gpt", "a")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    assert shown(tmp_path / "r.jsonl", TOOLS, row) == [
        '[user]q</s>\n[assistant]⟦<call>f {"a": 1}</call></s>⟧\n[tool]42</s>\n[assistant]⟦a</s>⟧'
    ]
    assert shown(tmp_path / "r.jsonl", PLAIN, row) == [
        f"[user]q</s>\n[assistant]⟦{value}</s>⟧\n[tool]42</s>\n[assistant]⟦a</s>⟧"
    ]


def test_a_call_that_is_no_json_stays_the_text_that_it_is(tmp_path):
    turns = [("human", "q"), ("function_call", "look(3)"), ("observation", "42"), ("gpt", "a")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    assert "[assistant]⟦look(3)</s>⟧" in shown(tmp_path / "r.jsonl", TOOLS, row)[0]


def test_parts_that_are_text_are_joined_and_others_are_named(tmp_path):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    for content in (
        parts,
        ["one ", "two"],
        [{"type": "input_text", "text": "one two"}],
        [{**parts[0], "image_url": None}, parts[1]],
    ):
        (text,) = shown(tmp_path / "r.jsonl", PLAIN, {"messages": [said("user", content), said("assistant", content)]})
        assert text == "[user]one two</s>\n[assistant]⟦one two</s>⟧"
    for other in (
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "image"},
        3,
        {"type": "image", "text": "x"},
    ):
        row = {"messages": [said("user", [parts[0], other]), said("assistant", "a")]}
        kind = re.escape(repr(other["type"] if isinstance(other, dict) else other))
        with pytest.raises(UserError, match=f"row 1: `messages`, message 1 has a part of the type {kind}"):
            loaded(write(tmp_path / "r.jsonl", row))


def test_a_chat_may_be_a_prompt_and_a_completion(tmp_path):
    row = {
        "prompt": [said("user", "q1"), said("assistant", "given"), said("user", "q2")],
        "completion": [said("assistant", "a")],
        "tools": [TOOL],
    }
    assert shown(tmp_path / "r.jsonl", TOOLS, row) == [
        f"[tool]{json.dumps(TOOL)}</s>\n[user]q1</s>\n[assistant]given</s>\n[user]q2</s>\n[assistant]⟦a</s>⟧"
    ]
    chain = [said("assistant", None, tool_calls=[call("f", {})]), said("tool", "4"), said("assistant", "a")]
    (text,) = shown(tmp_path / "r.jsonl", TOOLS, {"prompt": [said("user", "q")], "completion": chain})
    assert re.findall("⟦(.*?)⟧", text) == ["<call>f {}</call></s>", "a</s>"]
    (text,) = shown(tmp_path / "r.jsonl", MARKED, row)
    assert re.findall("⟦(.*?)⟧", text) == ["a"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("q", [said("assistant", "a")]), None),
        (([said("user", "q")], "a"), None),
        (([said("user", "q")], [said("assistant", "a")]), ("q", "a")),
        (("q", "a"), ([said("user", "q")], [said("assistant", "a")])),
    ],
)
def test_texts_and_lists_of_messages_are_not_mixed(tmp_path, first, second):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in filter(None, (first, second))]
    path = write(tmp_path / "r.jsonl", *rows)
    with pytest.raises(
        UserError, match=rf"r\.jsonl, row {len(rows)}: `prompt` is .*; write all of them as texts, or all"
    ):
        load_splits(DataConfig(train=str(path)), "causal-lm")
    held = write(tmp_path / "h.jsonl", {"prompt": "q", "completion": "a"})
    path = write(tmp_path / "r.jsonl", {"prompt": [said("user", "q")], "completion": [said("assistant", "a")]})
    with pytest.raises(UserError, match=r"data\.train has lists of messages and data\.test has texts; write both"):
        load_splits(DataConfig(train=str(path), test=str(held)), "causal-lm")


def test_what_texts_as_prompts_cannot_have_is_not_read_or_refused(tmp_path):
    path = write(tmp_path / "r.jsonl", *({"prompt": f"q{n}", "completion": "a", "system": "s"} for n in range(9)))
    assert load_splits(DataConfig(train=str(path)), "causal-lm").unread == ("system",)
    with pytest.raises(UserError, match="has texts as prompts, which cannot have `system`"):
        load_splits(DataConfig(train=str(path), columns={"system": "system"}), "causal-lm")


def test_a_row_that_the_template_refuses_is_named(tmp_path):
    rows = [{"messages": [said("user", f"q{n}"), said("assistant", "a")]} for n in range(12)]
    rows[7]["messages"].insert(0, said("system", "Be brief."))
    with pytest.raises(
        UserError, match=r"^r\.jsonl, row 8: the model's chat template refuses this .*: no system here$"
    ):
        shown(tmp_path / "r.jsonl", STRICT, *rows)
    rows[7]["messages"].pop(0)
    rows[4] = {"messages": [said("assistant", "hi"), *rows[4]["messages"]]}
    with pytest.raises(UserError, match=r"^r\.jsonl, row 5: the conversation begins with the assistant"):
        shown(tmp_path / "r.jsonl", STRICT, *rows)
    unlike = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    with pytest.raises(UserError, match=r"^r\.jsonl, row \d+: this model's chat template does not write a question"):
        shown(tmp_path / "r.jsonl", unlike, *rows[:3])
    rows[2]["messages"].append(said("user", "more"))
    rows[2]["messages"].append(said("assistant", "more"))
    with pytest.raises(UserError, match=r"^r\.jsonl, row 3: this model's tokenizer has no chat template"):
        shown(tmp_path / "r.jsonl", None, *rows[:3])


def test_a_text_with_its_own_ends_has_one_of_each(tmp_path):
    for prompt, completion in (("<s>q", " a</s>"), ("q", " a"), ("<s><s>q", " a</s></s>"), ("<s>q", " a")):
        for adds_bos in (True, False):
            texts = shown(tmp_path / "r.jsonl", None, {"prompt": prompt, "completion": completion}, adds_bos=adds_bos)
            assert texts == [("<s>" if adds_bos or "<s>" in prompt else "") + "q⟦ a</s>⟧"]
    tokenizer = tokenizer_of(None, adds_bos=True)
    split = datasets.Dataset.from_dict({"text": ["<s>one</s>", "two"]})
    (row,) = encode(split, tokenizer, "causal-lm", 64).dataset
    assert tokenizer.decode(row["input_ids"]) == "<s>one</s><s>two</s>"


@pytest.mark.parametrize("answer", ["a", "a</s>", "a</s>\n"])
def test_a_message_with_its_own_ends_has_one_of_each(tmp_path, answer):
    for question in ("q", "<s>q"):
        row = {"messages": [said("user", question), said("assistant", answer)]}
        assert shown(tmp_path / "r.jsonl", STRICT, row, adds_bos=True) == ["<s>[user]q</s>\n[assistant]⟦a</s>⟧"]


def test_doubled_special_tokens_are_counted(tmp_path):
    tokenizer = tokenizer_of(None)
    rows = [{"prompt": f"q{n}", "completion": " a</s></s>b" if n < 3 else " a"} for n in range(5)]
    split = datasets.Dataset.from_list(rows)
    assert encode(split, tokenizer, "causal-lm", 64).doubled == {"</s>": 3}


def test_fields_that_nothing_reads_are_named(tmp_path):
    turns = [said("user", "q", name="Ada", category="x"), said("assistant", "a", reasoning_content="r", score=None)]
    row = {"messages": turns, "source": "web", "tools": [TOOL]}
    named = PLAIN.replace("m['role']", "m['role'] + (m['name'] or '')")
    expected = {
        PLAIN: ["source", "category", "name", "reasoning_content", "tools"],
        named: ["source", "category", "reasoning_content", "tools"],
        TOOLS: ["source", "category", "name", "reasoning_content"],
        THINKING: ["source", "category", "name", "tools"],
    }
    for template, unread in expected.items():
        splits, found = encoded(write(tmp_path / "r.jsonl", row), tokenizer_of(template))
        assert sorted(not_read(splits, found)) == sorted(unread)
    rows = [{"text": f"good {n}", "label": "ab"[n % 2], "id": n} for n in range(20)]
    splits = load_splits(DataConfig(train=str(write(tmp_path / "c.jsonl", *rows))), "sequence-classification")
    assert splits.unread == ("id",)


def test_names_and_numbers_of_messages_do_not_hide_duplicates(tmp_path):
    rows = [
        {"messages": [said("user", f"q{n // 2}", id=n), said("assistant", None, tool_calls=[call("f", {}, id=str(n))])]}
        for n in range(20)
    ]
    made = load_splits(DataConfig(train=str(write(tmp_path / "r.jsonl", *rows))), "causal-lm")
    assert "10 duplicates dropped" in made.description


def test_the_templates_own_marks_are_followed(tmp_path):
    turns = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    assert shown(tmp_path / "r.jsonl", MARKED, {"messages": turns}) == [
        "[user]a</s>\n[assistant]⟦b⟧</s>\n[user]c</s>\n[assistant]⟦d⟧</s>"
    ]


def test_a_tokenizer_without_offsets_learns_the_same(tmp_path):
    """ByT5's has no tokenizer.json; its tokens are bytes too."""
    from transformers import ByT5Tokenizer

    turns = [said("user", "a", name="x"), said("assistant", "é", weight=0), said("user", "c"), said("assistant", "dä")]
    for template in (PLAIN, MARKED, THINKING):
        path = write(tmp_path / "r.jsonl", {"messages": turns})
        slow, fast = ByT5Tokenizer(), tokenizer_of(template)
        slow.chat_template = template
        learnt = []
        for tokenizer in (slow, fast):
            _, found = encoded(path, tokenizer)
            learnt.append(
                [tokenizer.decode([label for label in row["labels"] if label != IGNORED]) for row in found.dataset]
            )
        assert learnt[0] == learnt[1]


CHAIN = [
    said("user", "q"), said("assistant", None, tool_calls=[call("f", {})]), said("tool", "4"), said("assistant", "a"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (TOOLS, {"tools": [TOOL], "system": "s", "messages": [said("user", "q"), said("assistant", "a")]}),
        (TOOLS, {"messages": [said("user", "q"), said("assistant", None, tool_calls=[call("f", {"a": None})])]}),
        (TOOLS, {"messages": CHAIN}),
        (ARGUMENTS_AS_TEXT, {"messages": CHAIN}),
        (PLAIN, {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        (PLAIN, {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q1", "a1"]]}),
        (PLAIN, {"prompt": [said("user", "q")], "completion": [said("assistant", "a")]}),
        (PLAIN, {"messages": [said("user", [{"type": "text", "text": "q"}]), said("assistant", "a</s>")]}),
        (CALLS_OF_NULL, {"messages": CHAIN}),
        (SWITCHED, {"messages": [said("user", "q"), said("assistant", "a")]}),
        (THINKING, {"messages": [said("user", "q"), said("assistant", "a")]}),
        (THINKING, {"messages": [said("user", "q"), said("assistant", "a", reasoning="r")]}),
        (STRICT, {"messages": [said("user", "<s>q"), said("assistant", "a")]}),
    ],
)  # fmt: skip
def test_a_prompt_from_a_file_is_the_question_of_the_test(tmp_path, template, row):
    tokenizer, path = tokenizer_of(template), write(tmp_path / "r.jsonl", row)
    splits, found = encoded(path, tokenizer)
    (asked,) = questions(found.dataset, [0], "causal-lm")
    config = Config(model=ModelConfig(task="causal-lm"))
    result = SimpleNamespace(tokenizer=tokenizer, config=config, roles=splits.roles)
    (prompt,) = read_prompts(path, config)
    assert tokenizer.decode(prompt_ids(result, prompt)) == tokenizer.decode(asked.prompt)
    assert prompt_ids(result, prompt) == asked.prompt


def test_the_prompt_that_a_template_refuses_is_numbered():
    result = SimpleNamespace(
        tokenizer=tokenizer_of(STRICT), config=Config(model=ModelConfig(task="causal-lm")), roles=("messages",)
    )
    with pytest.raises(UserError, match=r"^Prompt 2: the model's chat template refuses this .*: no system here"):
        encode_prompts(result, ["q", [said("system", "s"), said("user", "q")]])
