"""What the tries of a sweep share: data, scan, loaded base, probe and plan, each as long as it does not change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.memory import Room, release_memory, room
from sgm_finetune.commands.checked_data import checked_data
from sgm_finetune.commands.session import Session, fit_to_parameters, settle, with_plans_kind
from sgm_finetune.commands.steps import (
    Adapted,
    apply,
    choose_plan,
    load_base,
    needs_probe,
    probe_gradients,
    refer,
    scan_weights,
)
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.measure.plan_file import load_plan
from sgm_finetune.measure.probe import Probe
from sgm_finetune.measure.scan_result import Scan
from sgm_finetune.method.plan import Plan
from sgm_finetune.train.adapters.apply import check_plan, check_starts
from sgm_finetune.train.arguments import check_machine
from sgm_finetune.train.base_model import Base
from sgm_finetune.train.budget.needs import Estimate
from sgm_finetune.train.launch import check_launch
from sgm_finetune.train.lending import condition, take_back

_TRAINING_ALONE = (
    "output", "evaluation", "memory.budget", "training.epochs", "training.max_steps", "training.eval_batch_size",
    "training.optimizer", "training.learning_rate", "training.schedule", "training.warmup_fraction",
    "training.weight_decay", "training.max_grad_norm", "training.eval_steps", "training.eval_seconds",
    "training.early_stopping_patience", "training.save_total_limit", "training.report_to", "training.resume",
)  # fmt: skip
"""Sections and keys that only the training reads."""
_NO_MEMORY = (
    "snr", "merge.criterion", "merge.threshold", "merge.snr_tolerance_db", "merge.max_group_size", "adapter.alpha",
    "output.dir", "output.overwrite", "training.epochs", "training.max_steps", "training.schedule",
    "training.warmup_fraction", "training.weight_decay", "training.max_grad_norm", "training.eval_steps",
    "training.eval_seconds", "training.early_stopping_patience", "training.save_total_limit", "training.seed",
    "training.report_to",
)  # fmt: skip
"""Sections and keys that change nothing in the prediction of the memory that a try needs."""
_PLAN_ALONE = (
    "snr", "selection", "merge", "plan", "adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.parameters",
)  # fmt: skip
"""Sections and keys that only the plan and the training read."""
_NUM_TRAIN = "data.num_train"
_PROBE_ALONE = ("probe", "training.batch_size", "training.micro_batch_size", _NUM_TRAIN)
"""Sections and keys that only the probe, the plan and the training read."""


def _all_but(config: Config, *names: str) -> str:
    """The configuration without some sections and keys, as a text: equal texts, equal results."""
    values = config.model_dump(mode="json")
    for name in names:
        section, _, leaf = name.rpartition(".")
        (values[section] if section else values).pop(leaf)
    return json.dumps(values)


class Shared:
    """Keeps what a try measured or loaded for the next ones, by the configuration that it depends on.

    The base is lent to one try after another. One that does not come back as it was is loaded again. Whole matrices and
    a base outside of the device's memory are loaded again for each try. `varied` are the keys that the sweep varies.
    """

    def __init__(self, varied: Sequence[str]):
        self.varied = varied
        self.data: dict[str, PreparedData] = {}
        self.referred: dict[str, PreparedData] = {}
        self.scans: dict[str, Scan] = {}
        self.plans: dict[str, Plan] = {}
        self.probe: tuple[str, Probe | None] | None = None
        self.base: tuple[str, Base] | None = None
        self.estimates: dict[str, Estimate | None] = {}
        self.room: Room | None = None

    def prepared(self, config: Config, log: StepLog) -> PreparedData:
        """The data of a try. Raises UserError for what is wrong with them."""
        key = json.dumps([config.data.model_dump(mode="json"), config.model.model_dump(mode="json")])
        if key not in self.data:
            self.data[key] = checked_data(config, log)
        return self.data[key]

    def session(self, config: Config, log: StepLog) -> Session:
        """The session of a try. Raises UserError, before the base is loaded, for what can be known then."""
        check_machine(config)
        check_launch(config, 1)
        given_plan = None if config.plan is None else load_plan(config.plan)
        asked = config
        if given_plan is not None:
            config = with_plans_kind(config, given_plan)
        prepared = self.prepared(config, log)
        if self.room is None:
            self.room = room()
        s = Session(config, asked, prepared, log, given_plan)
        rate = config.training.learning_rate
        needs = json.dumps([_all_but(config, *_NO_MEMORY, "training.learning_rate"), rate == "auto"])
        if config.memory.budget is None and needs in self.estimates:
            fit_to_parameters(s)
            s.estimate = self.estimates[needs]  # it fits
        else:
            settle(s, self.room)
            self.estimates[needs] = s.estimate
        return s

    @contextmanager
    def adapted(self, s: Session) -> Iterator[tuple[Base, Plan, Adapted]]:
        """The base, the plan and the model that trains what the plan selects. It is gone when the context ends."""
        if s.given_plan is None:
            self._scan(s)  # before the base takes its memory
        base = self._loaded(s)
        self._refer(s, base)
        plan = self._plan(s, base)
        before, adapted = condition(base.model), None
        try:
            adapted = apply(s, base, plan)
            yield base, plan, adapted
        finally:
            if not self._returns(s.config, adapted, before):
                self.base = None
            del base, adapted
            release_memory()

    def _returns(self, config: Config, adapted: Adapted | None, before: list[tuple[Any, ...]]) -> bool:
        """Takes the base back; whether it is as it was."""
        elsewhere = config.model.residence not in (None, "device")
        if adapted is None or not isinstance(adapted.model, PeftModel) or elsewhere:
            return False
        return take_back(adapted.model, before)

    def _loaded(self, s: Session) -> Base:
        key = _all_but(s.config, *_TRAINING_ALONE, *_PLAN_ALONE, *_PROBE_ALONE)
        if self.base is None or self.base[0] != key:
            self.base = None  # two do not fit
            release_memory()
            with s.clock.time("load"):
                self.base = key, load_base(s, will_train=True)
        return self.base[1]

    def _refer(self, s: Session, base: Base) -> None:
        """Adds to the data of preferences what the base says of them."""
        key = _all_but(s.config, *_TRAINING_ALONE, *_PLAN_ALONE, *(name for name in _PROBE_ALONE if name != _NUM_TRAIN))
        if key not in self.referred:
            refer(s, base, base.model, ("train", "validation"))
            self.referred[key] = s.prepared
        s.prepared = self.referred[key]

    def _plan(self, s: Session, base: Base) -> Plan:
        if s.given_plan is not None:
            check_plan(base.model, s.given_plan)
            check_starts(s.given_plan)
            return s.given_plan
        key = _all_but(s.config, *_TRAINING_ALONE)
        if key not in self.plans:
            plan = choose_plan(s, base, self._scan(s), self._probe(s, base))
            if not any(_is_of(key, (*_PLAN_ALONE, "training.seed")) for key in self.varied):
                self.probe = None  # its sketches are large, and no other plan will follow from them
                release_memory()
            self.plans[key] = plan
        return self.plans[key]

    def _scan(self, s: Session) -> Scan:
        key = json.dumps([s.config.model.model_dump(mode="json"), s.config.snr.model_dump(mode="json")])
        if key not in self.scans:
            self.scans[key] = scan_weights(s)
        return self.scans[key]

    def _probe(self, s: Session, base: Base) -> Probe | None:
        if not needs_probe(s.config):
            return None
        key = _all_but(s.config, *_TRAINING_ALONE, *_PLAN_ALONE)
        if self.probe is None or self.probe[0] != key:
            self.probe = None
            self.probe = key, probe_gradients(s, base)
        return self.probe[1]


def _is_of(key: str, names: Sequence[str]) -> bool:
    """Whether a key is one of the names, or in a section among them."""
    return key in names or key.partition(".")[0] in names
