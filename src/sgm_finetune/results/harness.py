"""Tasks of the lm-evaluation-harness, on the model as it is: `evaluation.harness`, an extra."""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sgm_finetune.base.errors import UserError


def check_harness(tasks: Sequence[str], task: str) -> None:
    """Raises UserError where the harness is not installed, does not know a task, or cannot run the model."""
    if not tasks:
        return
    if task != "causal-lm":
        raise UserError(
            f"evaluation.harness asks a language model; it does not go with model.task={task}; leave it out"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation.harness needs lm-eval; pip install 'sgm-finetune[harness]', or leave it out")
    manager, names = _manager(tuple(tasks))
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(
                f"evaluation.harness: lm-eval knows no task `{name}`; name one of its tasks, or a .yaml file that "
                "describes one"
            )


@cache
def _manager(tasks: tuple[str, ...]) -> tuple[Any, list[str]]:
    """lm-eval's tasks with those of our own files, and the names to run. Reading its thousands takes seconds."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    files = [Path(name) for name in tasks if name.endswith((".yaml", ".yml"))]
    named = {}
    for file in files:
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Lenient)
            named[str(file)] = str(content["task"])
        except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
            raise UserError(f"evaluation.harness: {file} describes no task of lm-eval: {error}") from None
    manager = TaskManager(include_path=[str(folder) for folder in dict.fromkeys(file.parent for file in files)] or None)
    return manager, [named.get(name, name) for name in tasks]


def harness_metrics(
    model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Task -> its metrics, by lm-eval's `simple_evaluate`; the model's mode is restored."""
    import lm_eval
    from lm_eval.models import huggingface

    evaluate: Any = lm_eval.simple_evaluate  # both decorated out of their types
    wrap: Any = huggingface.HFLM
    manager, names = _manager(tuple(tasks))
    was_training = model.training
    model.eval()
    try:
        with redirect_stderr(io.StringIO()):  # bars of its own
            wrapped = wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = evaluate(wrapped, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)
    finally:
        model.train(was_training)
    return {
        name: {
            key.removesuffix(",none"): float(value)
            for key, value in numbers.items()
            if "," in key and isinstance(value, float | int)
        }
        for name, numbers in found["results"].items()
    }


class _Lenient(yaml.SafeLoader):
    """Reads past lm-eval's own tags (`!function`), running nothing."""


_Lenient.add_multi_constructor("!", lambda loader, suffix, node: None)
