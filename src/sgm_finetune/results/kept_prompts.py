"""prompts.json: the first prompts of the test data as token ids, to which `sgm export` compares the answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sgm_finetune.base.config import Task
from sgm_finetune.base.files import write_text
from sgm_finetune.base.text import first_mistake
from sgm_finetune.base.untrusted import read_json, refuse
from sgm_finetune.data.questions import answer_limit, has_answers, questions

if TYPE_CHECKING:
    from datasets import Dataset

PROMPTS = "prompts.json"
NUM_KEPT = 8


@dataclass(frozen=True)
class KeptPrompts:
    prompts: list[list[int]]
    """Token ids."""
    limit: int
    """The most tokens of an answer."""


class _Content(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    format: str = Field(pattern="^sgm-prompts/1$")
    prompts: list[Annotated[list[int], Field(min_length=1)]] = Field(max_length=64)
    max_new_tokens: int = Field(ge=1, le=2**20)


def save_prompts(encoded: Dataset, task: Task, folder: Path) -> None:
    """Writes prompts.json, where the test data `encoded` has answers."""
    if not has_answers(encoded, task):
        return
    asked = questions(encoded, range(min(NUM_KEPT, len(encoded))), task)
    content = {
        "format": "sgm-prompts/1",
        "max_new_tokens": answer_limit(asked),
        "prompts": [question.prompt for question in asked if question.prompt],
    }
    write_text(folder / PROMPTS, json.dumps(content) + "\n")


def load_prompts(folder: Path, vocabulary: int, longest: int) -> KeptPrompts | None:
    """The prompts of the run in `folder`; None where it kept none.

    Raises UserError for a file that the run did not write: with ids of other tokens than the first `vocabulary`, or
    more than `longest` in a prompt.
    """
    path = folder / PROMPTS
    if not path.is_file():
        return None
    try:
        content = _Content.model_validate(read_json(path))
        beyond = [id for prompt in content.prompts for id in prompt if not 0 <= id < vocabulary]
        if beyond:
            raise ValueError(f"it has the token {beyond[0]}, and the model has {vocabulary}")
        if most := max((len(prompt) for prompt in content.prompts if len(prompt) > longest), default=0):
            raise ValueError(f"a prompt has {most:,} tokens, and data.max_length is {longest:,}")
    except (OSError, ValueError) as error:
        refuse(
            path, "file of prompts", ValueError(first_mistake(error)) if isinstance(error, ValidationError) else error
        )
    return KeptPrompts(content.prompts, content.max_new_tokens) if content.prompts else None
