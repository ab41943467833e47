"""Reads preferences from the rows of a table: a chosen and a rejected answer, or an answer and whether it is good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgm_finetune.base.config import Role
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import num_common, short_repr
from sgm_finetune.data.columns import is_missing, read_texts
from sgm_finetune.data.conversations import Message, RowReader, answers, is_json_list, is_learnt
from sgm_finetune.data.tables import Table


def read_pairs(
    table: Table, column: dict[Role, str], chosen: Mapping[Role, str]
) -> tuple[dict[str, list[Any]], dict[Role, str]]:
    """The two answers of each row behind their prompt, and the columns that were read.

    Texts become `prompt`, `completion` (the chosen answer) and `rejected`. Messages become `messages` (the prompt and
    the chosen answer) and `rejected` (the prompt and the rejected answer); behind a prompt of messages, an answer may
    be a list of messages, a single one or a text. What both answers have in common at their beginning belongs to the
    prompt if there is no column for it. `chosen` is `data.columns`. Raises UserError with the row of an invalid pair,
    and of two answers that are equal.
    """
    roles: tuple[Role, ...] = ("chosen", "rejected", "prompt")
    if any(isinstance(_first(table, column[role]), list | dict) for role in roles if role in column):
        return _read_conversations(table, column), column
    for role in ("system", "tools"):
        if role in chosen:
            raise UserError(
                f"data.columns: {table.name} has texts as answers, which cannot have `{role}`; write chosen and "
                "rejected as lists of messages"
            )
    used: dict[Role, str] = {role: name for role, name in column.items() if role in roles}
    return _read_texts(table, used), used


def read_verdicts(table: Table, column: str) -> list[int]:
    """1 for each good answer and 0 for each bad one. Raises UserError with the row of another value."""
    found = []
    for row, value in enumerate(table.columns[column][:], start=1):
        verdict = _VERDICTS.get(str(value).strip().lower())
        if verdict is None:
            what = "is missing" if is_missing(value) else f"is {short_repr(value)}"
            raise UserError(
                f"{table.name}, row {row}: `{column}` {what}; write true for a good answer and false for a bad one"
            )
        found.append(verdict)
    return found


_VERDICTS = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}


def _first(table: Table, column: str) -> Any:
    return next((value for value in table.columns[column][:] if not is_missing(value)), None)


def _read_texts(table: Table, column: Mapping[Role, str]) -> dict[str, list[Any]]:
    answered = read_texts(table, column["chosen"], may_be_empty=False)
    refused = read_texts(table, column["rejected"], may_be_empty=False)
    for row, (better, worse) in enumerate(zip(answered, refused, strict=True), start=1):
        if better == worse:
            raise _equal(f"{table.name}, row {row}", column)
    if "prompt" in column:
        prompts = read_texts(table, column["prompt"], may_be_empty=True)
    else:
        prompts = [better[: _common_text(better, worse)] for better, worse in zip(answered, refused, strict=True)]
        for row, texts in enumerate(zip(prompts, answered, refused, strict=True), start=1):
            if len(texts[0].rstrip()) >= min(len(text.rstrip()) for text in texts[1:]):
                raise UserError(
                    f"{table.name}, row {row}: one answer is the beginning of the other, so that nothing is left of it "
                    "behind their common beginning; give the prompt in a column of its own"
                )
        answered, refused = (
            [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)] for texts in (answered, refused)
        )
    return {"prompt": prompts, "completion": answered, "rejected": refused}


def _common_text(left: str, right: str) -> int:
    """The length of the common beginning of two texts, without a space at its end: that belongs to the answers.

    >>> _common_text("Is it? Yes.", "Is it? No.")
    6
    """
    number = num_common(left, right)
    return number - 1 if number and left[number - 1] == " " else number


def _read_conversations(table: Table, column: Mapping[Role, str]) -> dict[str, list[Any]]:
    rows: dict[Role, Any] = {role: table.columns[name][:] for role, name in column.items()}
    found: dict[str, list[Any]] = {"messages": [], "rejected": []}
    tools = []
    for at in range(len(rows["chosen"])):
        row: dict[Role, Any] = {role: values[at] for role, values in rows.items()}
        reader = RowReader(f"{table.name}, row {at + 1}", column, table.fills_nulls)
        try:
            better, worse = _pair(reader, row, column)
            tools.append(reader.tools(row.get("tools")))
        except RecursionError:
            raise UserError(f"{reader.row} is nested too deeply; correct or remove the row") from None
        found["messages"].append(better)
        found["rejected"].append(worse)
    return {**found, **({"tools": tools} if any(tools) else {})}


def _pair(
    reader: RowReader, row: Mapping[Role, Any], column: Mapping[Role, str]
) -> tuple[list[Message], list[Message]]:
    """The conversation with the chosen answer and the one with the rejected answer; both begin with the prompt."""
    better, worse = _answer(reader, row, "chosen"), _answer(reader, row, "rejected")
    if better == worse:
        raise _equal(reader.row, column)
    prompt = _prompt(reader, row)
    alone = [_is_alone(row[role]) for role in ("chosen", "rejected")]
    if any(alone) and not (all(alone) and prompt):
        raise UserError(
            f"{reader.row}: `{column['chosen']}` and `{column['rejected']}` are not both lists of messages, nor both "
            "single answers to a prompt; write them alike, and what they answer into a column `prompt`"
        )
    if prompt and (better[: len(prompt)] == prompt) == (worse[: len(prompt)] == prompt) and better[0] == prompt[0]:
        better, worse = better[len(prompt) :], worse[len(prompt) :]  # whole conversations beside their prompt
    shared = num_common(better, worse)
    asked = [{**said, "weight": 0} if is_learnt(said) else said for said in [*prompt, *better[:shared]]]
    conversations = []
    sides: tuple[tuple[Role, list[Message]], ...] = ("chosen", better[shared:]), ("rejected", worse[shared:])
    for role, answer in sides:
        if not any(answers(said) for said in answer):
            raise UserError(
                f"{reader.where(role)} has no answer by the assistant behind the prompt, so there is nothing to learn; "
                "correct or remove the row"
            )
        conversations.append(reader.after_system(row.get("system"), [*asked, *answer], role))
    return conversations[0], conversations[1]


def _answer(reader: RowReader, row: Mapping[Role, Any], role: Role) -> list[Message]:
    """The messages of an answer, or of a conversation that ends with it; a text is said by the assistant."""
    value = row[role]
    if isinstance(value, str) and value.strip() and _is_alone(value):
        return [{"role": "assistant", "content": value}]
    return reader.messages(role, {role: [value]} if isinstance(value, dict) else row)


def _is_alone(answer: Any) -> bool:
    """Whether an answer is one message or a text, which needs a prompt beside it."""
    return isinstance(answer, dict) or (isinstance(answer, str) and not is_json_list(answer))


def _prompt(reader: RowReader, row: Mapping[Role, Any]) -> list[Message]:
    """The messages of the prompt; a text is a question of the user."""
    given = row.get("prompt")
    if is_missing(given) or (isinstance(given, str) and not given.strip()):
        return []
    if isinstance(given, str) and not is_json_list(given):
        return [{"role": "user", "content": given}]
    return reader.messages("prompt", row)


def _equal(row: str, column: Mapping[Role, str]) -> UserError:
    return UserError(f"{row}: `{column['chosen']}` and `{column['rejected']}` are equal; remove the row")
