"""Runs tasks of lm-evaluation-harness on a model: `evaluation.harness`, which needs the extra `harness`."""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from sgm_finetune.base.config import DECODER_TASKS
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.base.text import first_line
from sgm_finetune.results.stops import model_stops, stopping_at


def check_harness(tasks: Sequence[str], task: str, option: str = "evaluation.harness") -> None:
    """Raises UserError if the harness is not installed, does not know a task, or cannot run the model. `option` is what
    the tasks were given to."""
    if not tasks:
        return
    if task not in DECODER_TASKS:
        raise UserError(f"{option} evaluates a language model and does not go with model.task={task}; leave it out")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{option} needs lm-eval; leave it out, or {install_line('harness')}")
    manager, names = _task_manager(tuple(tasks))
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(
                f"{option}: lm-eval has no task `{name}`; name one of its tasks, or a .yaml file with a task"
            )


@cache
def _task_manager(tasks: tuple[str, ...]) -> tuple[Any, list[str]]:
    """Returns lm-eval's tasks with those of our own files, and the names to run. lm-eval takes seconds to read them."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    files = [Path(name) for name in tasks if name.endswith((".yaml", ".yml"))]
    named = {}
    for file in files:
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), Loader=_TaskFileLoader)
            named[str(file)] = str(content["task"])
        except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
            raise UserError(
                f"evaluation.harness: {file} is not a task file of lm-eval ({first_line(error)}); correct it, or "
                "leave it out"
            ) from None
    manager = TaskManager(include_path=[str(folder) for folder in dict.fromkeys(file.parent for file in files)] or None)
    return manager, [named.get(name, name) for name in tasks]


def harness_metrics(
    model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Returns task -> its metrics."""
    found = _evaluate(model, tokenizer, tasks, batch_size, limit)
    return {
        name: {
            key.removesuffix(",none"): float(value)
            for key, value in numbers.items()
            if "," in key and isinstance(value, float | int)
        }
        for name, numbers in found["results"].items()
    }


def harness_outcomes(
    model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int, limit: int | None = None
) -> dict[str, tuple[str, list[float]]]:
    """Returns task -> (its first metric, the value of that metric for each question, in the order of the task).

    The questions of a group are those of all its tasks. Raises UserError for a task without a metric that is a mean
    over questions and better when it is higher.
    """
    found = _evaluate(model, tokenizer, tasks, batch_size, limit)
    outcomes = {}
    for asked, name in zip(tasks, _task_manager(tuple(tasks))[1], strict=True):
        values: list[float] = []
        metric = ""
        for leaf in _leaves(name, found):
            metric, own = _first_mean(found["samples"][leaf], found["higher_is_better"].get(leaf, {}))
            values += own
        if not values:
            raise UserError(f"`{asked}` has no metric that is a mean over its questions; leave it out")
        outcomes[name] = metric, values
    return outcomes


def _leaves(name: str, found: Any) -> list[str]:
    """The tasks with questions of their own behind the name of a task, a group or a tag."""
    if name in found["samples"]:
        return [name]
    if name in found["group_subtasks"]:
        return [leaf for child in found["group_subtasks"][name] for leaf in _leaves(child, found)]
    return [leaf for leaf in found["samples"] if name in _as_list(found["configs"].get(leaf, {}).get("tag"))]


def _first_mean(samples: Sequence[dict[str, Any]], higher_is_better: dict[str, bool]) -> tuple[str, list[float]]:
    """The first metric that is a number for each question and better when it is higher, and its values; ("", []) if
    there is none. A task with several filters of the answers has its first one."""
    kept = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    for metric in kept[0]["metrics"] if kept else ():
        values = [sample[metric] for sample in sorted(kept, key=lambda sample: sample["doc_id"])]
        if all(isinstance(value, Real) for value in values) and higher_is_better.get(metric) is not False:
            return metric, [float(value) for value in values]
    return "", []


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _evaluate(model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int, limit: int | None) -> Any:
    """What lm-eval's `simple_evaluate` finds. Restores the model's training mode."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]

    evaluate: Any = lm_eval.simple_evaluate  # decorators hide the types of both
    wrap: Any = huggingface.HFLM
    manager, names = _task_manager(tuple(tasks))
    was_training = model.training
    model.eval()
    try:
        # hides lm-eval's own progress bars
        with redirect_stderr(io.StringIO()), stopping_at(model, model_stops(model, tokenizer)):
            wrapped = wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            return evaluate(wrapped, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)
    finally:
        model.train(was_training)


class _TaskFileLoader(yaml.SafeLoader):
    """Ignores lm-eval's own YAML tags (`!function`) and runs nothing."""


_TaskFileLoader.add_multi_constructor("!", lambda loader, suffix, node: None)
