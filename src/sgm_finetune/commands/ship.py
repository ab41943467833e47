"""`sgm ship`: a result compared with its base, on the task and on what must not be lost; and whether to ship it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from sgm_finetune.base.config import DECODER_TASKS, Config
from sgm_finetune.base.files import write_json
from sgm_finetune.base.memory import release_memory
from sgm_finetune.commands.requests import ShipRequest
from sgm_finetune.commands.session import Session, prepare_trained, step_log
from sgm_finetune.commands.steps import attach_trained, load_base, make_test_set
from sgm_finetune.data.batches import collator
from sgm_finetune.data.questions import Question, has_answers, questions, spread
from sgm_finetune.results.answers import When, answer, is_chat_model
from sgm_finetune.results.harness import check_harness, harness_outcomes
from sgm_finetune.results.load import LoadedResult, find_base, read_stored
from sgm_finetune.results.report.page import remake_report
from sgm_finetune.results.sampling import Sampling
from sgm_finetune.results.ship.answer_form import answer_forms
from sgm_finetune.results.ship.calls import CallReader
from sgm_finetune.results.ship.general_text import general_windows
from sgm_finetune.results.ship.judge import Measured, judge
from sgm_finetune.results.ship.refusals import HARMFUL, HARMLESS, MAX_NEW_TOKENS, refuses
from sgm_finetune.results.ship.rules import Check, failed, ships, unmeasured
from sgm_finetune.results.ship.task import class_counts, perplexity_sums, task_sums
from sgm_finetune.results.stops import model_stops
from sgm_finetune.train.base_model import Base
from sgm_finetune.train.budget.reuse import replaced
from sgm_finetune.train.losses import Progress, TestSet, example_losses

LOOKED_AT = 1000
"""Test examples among which calls are looked for."""


def ship(config: Config, overrides: Sequence[str], request: ShipRequest, console: Console) -> dict[str, Any]:
    """Prints the checks of the result in output.dir; returns them (the content of ship.json), and renders the report.

    Raises UserError, before the base model is loaded, for what can be known then.
    """
    request.check(config, overrides)
    log = step_log(console)
    stored = read_stored(config, request.changes(overrides), log)
    check_harness(request.keep, stored.config.model.task, "--keep")
    stored = replace(stored, config=replaced(stored.config, "evaluation", harness=list(request.keep)))
    result = find_base(stored, log)
    s = prepare_trained(stored, log)
    base = load_base(s)
    model, former = attach_trained(s, base, stored)
    trained = LoadedResult(**vars(result), model=model, former=former)
    exam = set_exam(s, base, trained)
    before = measure(s, trained, exam, "before")
    exam = without_refusals(exam, before)
    checks = [*judge(before, measure(s, trained, exam, "after")), *exam.unmeasured]
    print_checks(s, checks)
    verdict = describe(s, request, checks)
    write_json(s.output / "ship.json", verdict)
    log.line("saved", f"{s.output / 'ship.json'}, {remake_report(s.output)}")
    return verdict


@dataclass(frozen=True)
class Exam:
    """What both models are given."""

    test_set: TestSet
    text: TestSet | None = None
    asked: tuple[Question, ...] = ()
    reader: CallReader | None = None
    callers: tuple[int, ...] = ()
    """Places in `asked` of the questions that the data answer with a call."""
    with_requests: bool = False
    """Whether the harmful requests are asked, and the harmless ones too if one of those was refused."""
    unmeasured: tuple[Check, ...] = ()


def set_exam(s: Session, base: Base, trained: LoadedResult) -> Exam:
    """What the task of the run allows to compare."""
    config, prepared = s.config, s.prepared
    exam = Exam(make_test_set(s, base, prepared.test.dataset))
    if config.model.task in DECODER_TASKS:
        exam = _with_text(s, exam)
    if has_answers(prepared.test.dataset, config.model.task):
        exam = _with_questions(s, trained, exam)
    return replace(exam, with_requests=is_chat_model(trained))


def _with_text(s: Session, exam: Exam) -> Exam:
    tokenizer = s.prepared.tokenizer
    windows = general_windows(tokenizer, s.config.data.max_length)
    if windows is None:
        return _without(exam, "text", "perplexity of general text", "the tokenizer makes too few tokens of the text")
    text = replace(exam.test_set, encoded=windows, collate=collator(tokenizer, "causal-lm", 8), task="causal-lm")
    return replace(exam, text=text)


def _with_questions(s: Session, trained: LoadedResult, exam: Exam) -> Exam:
    """evaluation.num_generated questions of the test data, and as many that the data answer with a call."""
    number, encoded, task = s.config.evaluation.num_generated, s.prepared.test.dataset, s.config.model.task
    if not number:
        return _without(exam, "answers", "answers", "evaluation.num_generated=0 asks for none")
    reader, callers = _call_reader(s, trained), []
    if reader is not None:
        looked = questions(encoded, range(min(len(encoded), LOOKED_AT)), task)
        callers = spread([at for at, one in enumerate(looked) if reader.is_call(one.answer)], number)
        if not callers:
            exam = _without(exam, "calls", "calls", "no answer in the test data ends with a call that can be read")
    order = sorted({*spread(range(len(encoded)), number), *callers})
    places = tuple(order.index(at) for at in callers)
    return replace(exam, asked=tuple(questions(encoded, order, task)), reader=reader, callers=places)


def _call_reader(s: Session, trained: LoadedResult) -> CallReader | None:
    """Reads the calls of the chat template; None where the test data have none."""
    rows, tokenizer = s.prepared.splits.test, s.prepared.tokenizer
    if "messages" not in rows.column_names:
        return None
    if not any(said.get("tool_calls") for turns in rows["messages"] for said in turns):
        return None
    tools = rows["tools"][:] if "tools" in rows.column_names else []
    return CallReader(tokenizer, model_stops(trained.model, tokenizer), tools)


def _without(exam: Exam, subject: Any, name: str, why: str) -> Exam:
    return replace(exam, unmeasured=(*exam.unmeasured, unmeasured(subject, name, why)))


def without_refusals(exam: Exam, before: Measured) -> Exam:
    """The exam without requests, if the base refuses none of the harmful ones."""
    if not exam.with_requests or any(before.refused):
        return exam
    exam = replace(exam, with_requests=False)
    return _without(exam, "refusals", "refusals", "the base refuses none of the harmful requests")


def measure(s: Session, trained: LoadedResult, exam: Exam, when: When) -> Measured:
    """What the exam finds of the result, or of its base. Decoding is greedy."""
    config, model, tokenizer = s.config, trained.model, s.prepared.tokenizer
    size, tasks = config.training.eval_batch_size, config.evaluation.harness
    model.eval()
    with s.log.bar(when) as progress:
        with nullcontext() if when == "after" else trained.as_base():
            kept = (
                harness_outcomes(model, tokenizer, tasks, size, config.evaluation.harness_limit) if tasks else {}
            )  # first: a task that cannot be compared ends the command here
            task, predictions = task_sums(model, exam.test_set, progress)
            text = perplexity_sums(example_losses(model, exam.text, progress)) if exam.text is not None else None
            forms = answer_forms(model, exam.asked, tokenizer, config.model.task, size, progress) if exam.asked else []
        refused = ask(trained, HARMFUL, when, progress) if exam.with_requests else []
        also = when == "after" or any(refused)
        refused_too = ask(trained, HARMLESS, when, progress) if exam.with_requests and also else []
    release_memory()
    return Measured(
        task=task,
        classes=class_counts(exam.test_set, predictions) if predictions else (),
        text=text,
        answers=forms,
        calls=[exam.reader.is_call(forms[at].ids) for at in exam.callers] if exam.reader is not None else (),
        refused=refused,
        answered=[not one for one in refused_too],
        kept=kept,
    )


def ask(trained: LoadedResult, requests: Sequence[str], when: When, progress: Progress) -> list[bool]:
    """Whether each request is refused."""
    rows = answer(trained, requests, Sampling(MAX_NEW_TOKENS), when, progress=progress)
    return [refuses(row["answer"]) for row in rows]


def print_checks(s: Session, checks: Sequence[Check]) -> None:
    words = {True: "passed", False: "FAILED", None: "not measured"}
    for check in checks:
        s.log.line(check.subject, f"{words[check.passed]} · {check.line}")
    measured, lost = [check for check in checks if check.passed is not None], failed(checks)
    if ships(checks):
        s.log.line("ship", f"yes: all {len(measured)} checks passed")
    else:
        names = "; ".join(f"{check.name} (required: {check.rule})" for check in lost) or "the task was not measured"
        s.log.line("ship", f"no: {len(lost)} of {len(measured)} checks failed: {names}")


def describe(s: Session, request: ShipRequest, checks: Sequence[Check]) -> dict[str, Any]:
    """The content of ship.json."""
    return {
        "format": "sgm-ship/1",
        "ship": ships(checks),
        "model": s.config.model.name,
        "data": s.prepared.splits.description,
        "task_test": None if request.task_test is None else str(request.task_test),
        "keep": list(request.keep),
        "general_text": f"help topics of Python {platform.python_version()}",
        "checks": [check.to_dict() for check in checks],
    }
