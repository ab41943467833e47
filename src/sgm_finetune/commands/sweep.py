"""`sgm sweep`: tries settings of a configuration one after another, by validation loss (docs/tutorials/sweeps.md)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sgm_finetune.base.config import Config, sections
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import Interrupted, UserError, is_out_of_memory
from sgm_finetune.base.files import HeldFolder, lock_folder, write_json, write_text
from sgm_finetune.base.text import about, first_line, one_line
from sgm_finetune.commands.finetune import choose_rate, training_job
from sgm_finetune.commands.requests import SweepRequest
from sgm_finetune.commands.session import Session, step_log
from sgm_finetune.commands.shared import Shared
from sgm_finetune.data.encoding import fingerprint
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.results.files import write_config
from sgm_finetune.results.folder import Start
from sgm_finetune.results.paths import with_absolute_paths
from sgm_finetune.results.report.sweep_page import render_sweep, sweep_table
from sgm_finetune.results.sweep_folder import (
    BEST,
    PAGE,
    SWEEP,
    Sweep,
    describe,
    open_folder,
    save_sweep,
    try_folder,
    write_best,
)
from sgm_finetune.train.arguments import training_arguments
from sgm_finetune.train.callbacks import TrainingBar
from sgm_finetune.train.suggestions import Pruning, suggest
from sgm_finetune.train.trainer import make_trainer
from sgm_finetune.train.tries import Try

if TYPE_CHECKING:
    from optuna import Trial


def sweep(request: SweepRequest, console: Console) -> dict[str, Any]:
    """Tries settings until there are `request.tries` of them; returns the content of sweep.json.

    The tries that the folder holds count. Raises UserError where no try is complete, and Interrupted for Ctrl-C: the
    try in progress is not kept then, and the next call tries the same settings again.
    """
    log = step_log(console)
    with lock_folder(request.output) as held:
        sweeping = Sweeping(request, log, held)
        try:
            sweeping.run()
        except KeyboardInterrupt:
            publish(sweeping.found, request)
            number = len(sweeping.found.tries) + 1
            raise Interrupted(
                f"Stopped in try {number} of {sweeping.total}, which is not kept; the same command begins it again"
            ) from None
        publish(sweeping.found, request)
    report(sweeping.found, request, log)
    return {"folder": str(request.output), **sweeping.found.to_dict()}


class OtherExamplesError(UserError):
    """The validation examples are not those of the tries before, so that no loss can be compared."""


class Sweeping:
    """A sweep in progress: what was found so far, and what its tries share."""

    def __init__(self, request: SweepRequest, log: StepLog, held: HeldFolder):
        self.request, self.log, self.held = request, log, held
        self.found = open_folder(request.output, request.space)
        self.done_before = len(self.found.tries)
        self.total = int(min(request.tries, request.space.size))
        self.shared = Shared(list(request.space.texts))
        self.started = time.perf_counter()

    @property
    def begins(self) -> bool:
        """Whether this is the first try of this call."""
        return len(self.found.tries) == self.done_before

    def run(self) -> None:
        """Tries until there are `total` tries, or the next one would not end in time."""
        if self.total < self.request.tries:
            self.log.line("sweep", f"{self.total} tries are all that differ")
        if self.done_before:
            self.log.line("sweep", f"goes on after {self.done_before} of {self.total} tries")
        while len(self.found.tries) < self.total:
            if (line := self._no_time()) is not None:
                self.log.line("sweep", line)
                return
            self._record(*self._next())

    def _no_time(self) -> str | None:
        """A line where --minutes leave no time for another try. The first one of a call always begins."""
        minutes, lasting = self.request.minutes, [one.seconds for one in self.found.tries if one.state == "complete"]
        if minutes is None or self.begins:
            return None
        one, left = max(lasting, default=0.0), 60 * minutes - (time.perf_counter() - self.started)
        if left > one:
            return None
        return f"--minutes {minutes:g} leave no time for another try, which takes about {about(one)}"

    def _next(self) -> tuple[Try, float]:
        """The next try, and the seconds that it took. It has failed where the configuration, the memory or a number
        that is not finite ended it."""
        space, number, began = self.request.space, len(self.found.tries) + 1, time.perf_counter()
        trial, settings = suggest(space, self.found.tries, space.config(space.first).training.seed)
        self.log.line(f"try {number}", describe(settings))
        try:
            one = self._train(number, settings, trial)
        except OtherExamplesError:
            raise
        except UserError as error:
            one = Try(number=number, settings=settings, state="failed", reason=one_line(error, limit=500))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = f"the memory was not enough: {first_line(error)}"
            one = Try(number=number, settings=settings, state="failed", reason=reason)
        return one, time.perf_counter() - began

    def _record(self, one: Try, seconds: float) -> None:
        self.held.check()
        one = one.model_copy(update={"seconds": round(seconds, 3)})
        best = self.found.winner
        self.found = self.found.model_copy(update={"tries": (*self.found.tries, one)})
        folder = self.request.output
        write_json(try_folder(folder, one.number) / "metrics.json", {**one.model_dump(mode="json"), "loss": one.loss})
        is_best = self.found.winner != best
        if is_best:
            write_best(one, folder)
        save_sweep(self.found, folder)  # last: until then, the try has not been
        self.log.line("", f"{one.outcome}{' · the best so far' if is_best else ''}")

    def _train(self, number: int, settings: dict[str, str], trial: Trial) -> Try:
        """Trains with `settings`, validates, and leaves the configuration and the history in the try's folder."""
        folder, asked = try_folder(self.request.output, number), self.request.space.config(settings)
        write_config(folder / "config.yaml", with_absolute_paths(asked))
        log = self.log if self.begins else StepLog(Console(quiet=True))
        self._check_examples(self.shared.prepared(asked, log))
        s = self.shared.session(asked, log)
        require_settings(s.config, asked, settings)
        if self.begins:
            self._announce(s)
        pruning = Pruning(trial)
        with self.shared.adapted(s) as (base, plan, adapted):
            start = choose_rate(s, base, adapted, Start(plan, {}, [], None))
            write_config(folder / "config.yaml", with_absolute_paths(s.config))
            arguments = training_arguments(s.config, folder, len(s.prepared.train.dataset), 1, saves=False)
            trainer = make_trainer(
                training_job(s, base, adapted, start, arguments), [pruning, TrainingBar(self.log.console)]
            )
            trainer.train()
            state, num_trainable = trainer.state, adapted.num_trainable
            del trainer, adapted, base  # the base is taken back
        write_json(folder / "history.json", [row for row in state.log_history if "train_loss" not in row])
        return Try(
            number=number,
            settings=settings,
            state="pruned" if pruning.pruned else "complete",
            validations=tuple(pruning.validations),
            reason=pruning.reason,
            steps=state.global_step,
            learning_rate=s.config.peak_learning_rate(state.max_steps),
            trainable_parameters=num_trainable,
        )

    def _check_examples(self, prepared: PreparedData) -> None:
        """Raises OtherExamplesError unless the validation examples are those of the tries before."""
        now = fingerprint(prepared.validation.dataset)
        if self.found.validation not in (None, now):
            raise OtherExamplesError(
                f"The validation examples are not those that the sweep in {self.request.output} began with; bring back "
                "the files as they were, or name another --output"
            )
        if self.found.validation is None:
            self.found = self.found.model_copy(update={"validation": now})
            save_sweep(self.found, self.request.output)

    def _announce(self, s: Session) -> None:
        """Says how long the sweep will take, where that can be predicted."""
        if s.estimate is None:
            return
        one = sum(s.estimate.seconds.get(name, 0.0) for name in ("rate_trials", "train"))
        shared = sum(s.estimate.seconds.get(name, 0.0) for name in ("reference", "probe"))
        left, minutes = self.total - self.done_before, self.request.minutes
        line = f"{left} tries of about {about(one)}: about {about(left * one + shared)} after the scan"
        self.log.line("sweep", line if minutes is None else f"{line}, or --minutes {minutes:g}")


def require_settings(config: Config, asked: Config, settings: Mapping[str, str]) -> None:
    """Raises UserError where another key has overruled a setting of the try: adapter.parameters, a memory.budget."""
    for key in settings:
        section, _, leaf = key.rpartition(".")
        now, wanted = (
            getattr(getattr(one, section) if section in sections(Config) else one, leaf) for one in (config, asked)
        )
        if now != wanted:
            raise UserError(f"{key}={wanted} would become {now}: memory.budget or adapter.parameters decides it")


def publish(found: Sweep, request: SweepRequest) -> None:
    """Writes the page of the sweep, if a try is complete."""
    if found.winner is not None:
        write_text(request.output / PAGE, render_sweep(found, request.space))


def report(found: Sweep, request: SweepRequest, log: StepLog) -> None:
    """Prints the table and the files. Raises UserError where no try is complete."""
    if found.winner is None:
        reason = next((one.reason for one in found.tries if one.reason), "there is none")
        raise UserError(f"No try of this sweep is complete; the first one failed: {reason}")
    log.console.print(sweep_table(found))
    log.line("best", f"try {found.winner.number}: {describe(found.winner.settings)}")
    log.line("saved", ", ".join(str(request.output / name) for name in (SWEEP, BEST, PAGE)))
    log.line("", f"train the best one and test it: sgm finetune --config {request.output / BEST}")
