"""A session: the state that travels through a command, and what is settled before a model is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import Clock, StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import HeldFolder, disk_free, lock_folder
from sgm_finetune.base.memory import Room, memory_within_reach, release_memory
from sgm_finetune.base.processes import on_main, processes
from sgm_finetune.base.text import gib, mib
from sgm_finetune.commands.checked_data import checked_data
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.measure.plan_file import load_plan
from sgm_finetune.method.plan import Plan
from sgm_finetune.model.load import Head, skeleton
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.results.claim import as_it_began, claim_output
from sgm_finetune.results.earlier_run import EarlierRun, check_labels, check_same_earlier, read_earlier
from sgm_finetune.results.folder import check_same_data
from sgm_finetune.results.load import StoredResult
from sgm_finetune.train.arguments import check_machine
from sgm_finetune.train.budget.estimate import PredictionError, estimate
from sgm_finetune.train.budget.fit import check_fits, fit
from sgm_finetune.train.budget.needs import Estimate
from sgm_finetune.train.budget.parameters import fit_parameters
from sgm_finetune.train.budget.reuse import replaced
from sgm_finetune.train.budget.table import describe_estimate
from sgm_finetune.train.launch import apply_launcher, check_launch
from sgm_finetune.train.trial_size import trial_size


@dataclass
class Session:
    """The configuration, the data and the console of a command, and where its run continues."""

    config: Config
    """The configuration of the run, with what `fit_to_parameters` and `fit_to_memory` chose."""
    asked: Config
    """The configuration before these changes."""
    prepared: PreparedData
    log: StepLog
    given_plan: Plan | None = None
    """The plan of the run that is resumed or went before, or of the file in `plan`; None: it is measured."""
    earlier: EarlierRun | None = None
    """The run from whose adapter this one goes on."""
    checkpoint: Path | None = None
    """The checkpoint that the run resumes from."""
    estimate: Estimate | None = None
    """What the run needs; None where it cannot be predicted."""
    clock: Clock = field(default_factory=Clock)
    started: float = field(default_factory=time.perf_counter)
    lock: ExitStack = field(default_factory=ExitStack)
    """Holds the output folder against other runs, once `hold_output` was called."""
    held: HeldFolder | None = None
    """The output folder, once it is locked; None on processes other than the first."""

    @property
    def output(self) -> Path:
        return Path(self.config.output.dir)

    def hold_output(self) -> None:
        """Locks the output folder until the session ends; the first process does it for all of them.

        Raises UserError if another run has it, has finished there since this one began, or has removed it.
        """
        if not processes().is_main_process:
            return
        if self.held is None:
            self.held = self.lock.enter_context(lock_folder(self.output))
        self.held.check()
        claim_output(self.config, self.output)  # again: it was not locked before it was made

    def check_output(self) -> None:
        """Raises UserError if the output folder that this process holds was removed or replaced."""
        if self.held is not None:
            self.held.check()


def step_log(console: Console) -> StepLog:
    """A log on `console`; only the first process prints."""
    return StepLog(console if processes().is_main_process else Console(quiet=True))


def prepare_session(config: Config, log: StepLog, trained: Head | None = None) -> Session:
    """A session with its data prepared, for a `trained` head if there is one.

    Raises UserError for what can be checked without the model's weights.
    """
    return Session(config, config, checked_data(config, log, trained), log)


def prepare_trained(stored: StoredResult, log: StepLog) -> Session:
    """A session with the data of a trained result. Raises UserError also for data with other labels."""
    s = prepare_session(stored.config, log, stored.head)
    labels = s.prepared.splits.labels
    if labels != stored.labels:
        raise UserError(
            f"The data has the labels {list(labels)}, {stored.path} was trained with {list(stored.labels)}; "
            "choose other test data"
        )
    return s


@contextmanager
def open_session(config: Config, console: Console, dry_run: bool = False) -> Iterator[Session]:
    """The session of a training run: output folder claimed and locked, checkpoint found, data read, memory checked.

    Raises UserError, before anything large is loaded, for what can be known then. The lock ends with the session. A dry
    run neither locks nor writes.
    """
    started, log = time.perf_counter(), step_log(console)
    config = apply_launcher(config)
    output = Path(config.output.dir)
    with ExitStack() as lock:
        held = None
        if output.is_dir() and not dry_run and processes().is_main_process:
            held = lock.enter_context(lock_folder(output))
        asked = config
        if config.training.resume:
            config = as_it_began(config, output)
        checkpoint = claim_output(config, output)
        check_machine(config)
        check_launch(config, processes().num_processes, checkpoint)
        earlier = read_earlier(config)
        given_plan = load_plan(output / "plan.json") if checkpoint is not None else given_plan_of(config, earlier)
        if given_plan is not None:
            config = with_plans_kind(config, given_plan)
        prepared = checked_data(config, log)
        if checkpoint is not None:
            check_same_data(prepared, output)
            check_same_earlier(config, output)
        if earlier is not None:
            check_labels(earlier, prepared.splits.labels)
        s = Session(
            config, asked, prepared, log, given_plan, earlier, checkpoint,
            started=started, lock=lock, held=held,
        )  # fmt: skip
        settle(s)
        yield s


def settle(s: Session, room: Room | None = None) -> None:
    """Settles the rank that adapter.parameters allows and what memory.budget asks for, as the last step before a model
    is loaded. `room` is the memory before that, if a model is there already. Raises UserError for what cannot be."""
    if s.config.training.learning_rate == "auto":
        trial_size(s.config, len(s.prepared.train.dataset))  # whether there are enough examples
    fit_to_parameters(s)
    fit_to_memory(s, room)


def given_plan_of(config: Config, earlier: EarlierRun | None) -> Plan | None:
    """The plan of the earlier run or of the file in `plan`; None: it is to be measured."""
    if earlier is not None:
        return earlier.plan
    return load_plan(config.plan) if config.plan is not None else None


def with_plans_kind(config: Config, plan: Plan) -> Config:
    """`config` with the rank of a given plan, or with what the plan trains beside its matrices. Raises UserError for a
    plan of another kind."""
    settings = plan.settings
    if settings.kind != config.adapter.kind:
        raise UserError(
            f"The plan is for adapter.kind={settings.kind}, and this run has adapter.kind={config.adapter.kind}; give "
            f"adapter.kind={settings.kind}, or make a new plan"
        )
    if settings.kind == "full":
        return replaced(config, "adapter", also=list(settings.also))
    return replaced(config, "adapter", rank=settings.rank, alpha=settings.alpha)


def fit_to_parameters(s: Session) -> None:
    """Chooses the rank that adapter.parameters allows, and prints it.

    A resumed run keeps the rank that it began with. Raises UserError when there is no such rank.
    """
    if s.config.adapter.parameters is None or s.given_plan is not None:
        return

    def decide() -> tuple[Config, str]:
        return fit_parameters(s.config, adaptable(skeleton(s.config.model, s.prepared.folder, s.prepared.head)))

    s.config, line = on_main(decide)
    s.log.line("adapter", line)


def fit_to_memory(s: Session, room: Room | None = None) -> None:
    """Estimates what the run needs; with memory.budget, changes the configuration until it fits.

    A resumed run keeps the configuration that it began with. Where the needs cannot be predicted, it prints why and
    leaves `s.estimate` None. Raises UserError where memory or disk are not enough, and for a budget that cannot be
    checked.
    """

    def decide() -> tuple[Config, Estimate | None, int]:
        reach, held = (memory_within_reach(), None) if room is None else (room.within_reach, room.held)
        try:
            if s.checkpoint is not None:
                return s.config, estimate(s.config, s.prepared, s.given_plan), reach
            return *fitted_estimate(s, reach, held), reach
        except PredictionError as error:
            if s.config.memory.budget is not None:
                raise
            s.log.line("memory", str(error))
            return s.config, None, reach

    s.config, s.estimate, reach = on_main(decide)
    release_memory()
    if s.estimate is None:
        return
    check_fits(s.estimate, reach, s.config)
    s.log.line("memory", describe_estimate(s.estimate, reach))
    free = disk_free(s.output)
    if s.estimate.disk_bytes > free:
        raise UserError(
            f"output.dir={s.output} will take about {mib(s.estimate.disk_bytes)}, and its disk has {mib(free)} free; "
            "make room, or name a folder on another disk"
        )


def fitted_estimate(s: Session, within_reach: int, held: int | None = None) -> tuple[Config, Estimate]:
    """The configuration that fits into memory.budget (without one: as it is), and what it needs. `held` is as in
    `estimate`."""
    if s.config.memory.budget is None:
        return s.config, estimate(s.config, s.prepared, s.given_plan, held=held)
    budget = min(s.config.memory.budget, within_reach)
    fitted = fit(s.config, s.prepared, budget, s.given_plan, held)
    if fitted.given_up:
        s.log.line("memory", f"to fit into {gib(budget)}: {', '.join(fitted.given_up)}")
    return fitted.config, fitted.estimate
