"""Commands and Python lines to copy, which use a result where its folder is now."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sgm_finetune.base.config import DECODER_TASKS, HEAD_TASKS, Config, Task


class Command(NamedTuple):
    purpose: str
    line: str


def commands(config: Config, folder: Path) -> list[Command]:
    """Returns shell commands. They name the absolute path of `folder`, so that they work from anywhere."""
    absolute = os.path.abspath(folder)
    here = shlex.quote(f"output.dir={absolute}")
    use = Command("Ask it a question, before and after fine-tuning", f'sgm generate --prompt "..." --compare {here}')
    if config.model.task == "reward":
        use = Command("Score the answers in a file (prompt, completion)", f"sgm generate --input answers.jsonl {here}")
    found = [Command("Evaluate it again on the test data", f"sgm evaluate {here}"), use]
    if config.model.task in DECODER_TASKS:
        found += [
            Command("Chat with it", f"sgm chat {here}"),
            Command("Export it for llama.cpp and Ollama", f"sgm export --to gguf {here}"),
        ]
    repeat = f"sgm finetune --config {shlex.quote(os.path.join(absolute, 'config.yaml'))} output.dir=again"
    return [
        *found,
        Command("Merge it into a whole model for Transformers and vLLM", f"sgm export --to merged {here}"),
        Command("Repeat the run, with the same digits on the same machine", repeat),
        Command("Make this page again", f"sgm report {shlex.quote(absolute)}"),
    ]


_NAMED_CLASSES = 30
"""More classes than these are not named in the lines to copy."""
_AUTO_CLASSES: dict[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "preference": "AutoModelForCausalLM",
    "reward": "AutoModelForSequenceClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def head_arguments(labels: Sequence[str], head_is_new: bool) -> str:
    """Returns the arguments that give the base model its head of classes, as Python text.

    >>> head_arguments(["bad", "good"], head_is_new=False), head_arguments([], head_is_new=True)
    (", id2label={0: 'bad', 1: 'good'}", ', num_labels=1, ignore_mismatched_sizes=True')
    """
    named = 0 < len(labels) <= _NAMED_CLASSES
    given = f", id2label={dict(enumerate(labels))}" if named else f", num_labels={len(labels) or 1}"
    return f"{given}, ignore_mismatched_sizes=True" if head_is_new else given


def python_snippet(config: Config, metrics: Mapping[str, Any], folder: Path) -> str:
    """Returns Python lines that load the adapter with PEFT alone, on the base in full precision; of whole matrices, the
    merged model with Transformers."""
    model = config.model
    if config.is_full:
        merged = json.dumps(os.path.join(os.path.abspath(folder), "export", "merged"), ensure_ascii=False)
        auto = _AUTO_CLASSES[model.task]
        return "\n".join([
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({merged})",
            f"model = {auto}.from_pretrained({merged})",
        ])  # fmt: skip
    adapter = json.dumps(os.path.join(os.path.abspath(folder), "adapter"), ensure_ascii=False)
    auto, arguments = _AUTO_CLASSES[model.task], ""
    if model.task in HEAD_TASKS:
        arguments = head_arguments(metrics["labels"], metrics.get("head_is_new", False))
        arguments += ", pad_token_id=tokenizer.pad_token_id"
    if model.revision is not None:
        arguments += f", revision={json.dumps(model.revision)}"
    name = json.dumps(model.name, ensure_ascii=False)
    is_hub_id = "/" in model.name and not model.name.startswith("~")  # else an embedded model or a local folder
    lines = [
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer",
        *([] if is_hub_id else ["from sgm_finetune.model.folder import local_folder"]),
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({adapter})",
        f"base = {auto}.from_pretrained({name if is_hub_id else f'local_folder({name})'}{arguments})",
        f"model = PeftModel.from_pretrained(base, {adapter})",
    ]
    return "\n".join(lines)
