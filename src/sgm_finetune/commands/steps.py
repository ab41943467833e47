"""The steps that commands share: scan, load the base, test, probe, plan, apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sgm_finetune.base.config import Config
from sgm_finetune.base.memory import release_memory
from sgm_finetune.base.processes import on_main, processes
from sgm_finetune.base.text import mib
from sgm_finetune.commands.session import Session
from sgm_finetune.data.encoding import Encoded
from sgm_finetune.data.sources import Split
from sgm_finetune.data.splits import SPLITS
from sgm_finetune.measure.make_plan import make_plan
from sgm_finetune.measure.plan_summary import describe_plan, plan_remarks
from sgm_finetune.measure.probe import Probe, probe
from sgm_finetune.measure.probe_batches import probe_batches, probe_pieces
from sgm_finetune.measure.scan import scan
from sgm_finetune.measure.scan_formats import load_scan
from sgm_finetune.measure.scan_result import Scan
from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.method.plan import Plan
from sgm_finetune.model.matrices import adaptable, out_of_reach
from sgm_finetune.results.earlier_run import take_factors
from sgm_finetune.results.evaluation import evaluate_answers, evaluate_model
from sgm_finetune.results.examples import kept_predictions
from sgm_finetune.results.harness import harness_metrics
from sgm_finetune.results.load import StoredResult, attach
from sgm_finetune.results.metric_names import describe_metrics
from sgm_finetune.results.report.scan_table import scan_summary
from sgm_finetune.train import base_model
from sgm_finetune.train.adapters.apply import apply_plan, check_plan
from sgm_finetune.train.adapters.shard import reduce_factors_only
from sgm_finetune.train.base_model import Base
from sgm_finetune.train.fast.prepare import prepare_adapters
from sgm_finetune.train.full.apply import train_whole
from sgm_finetune.train.full.changed import trained_parameters
from sgm_finetune.train.launch import model_is_sharded
from sgm_finetune.train.losses import TestSet, mean_reward_loss
from sgm_finetune.train.preference import PreferenceLoss, add_reference, reference_columns

TEST_LOSS = "test loss"
"""The clock's name for the part of a test that a validation has too: all but generated answers and the harness."""


@dataclass(frozen=True)
class Tested:
    """A model's metrics on the test data, and the predictions that are kept for the report."""

    metrics: dict[str, Any]
    predictions: list[Any]


@dataclass(frozen=True)
class Adapted:
    """The base model with its adapters, and how many parameters it trains."""

    model: PeftModel | PreTrainedModel
    """Without adapters, a model whose matrices are trained whole."""
    num_trainable: int
    num_without_sharing: int | None
    """Parameters that plain LoRA would train: no matrices share a factor. None for whole matrices."""

    def to_dict(self) -> dict[str, int]:
        """The entries of metrics.json."""
        plain = {} if self.num_without_sharing is None else {"plain_lora_parameters": self.num_without_sharing}
        return {"trainable_parameters": self.num_trainable, **plain}


def scan_weights(s: Session) -> Scan:
    """The signal-to-noise ratio of every weight matrix: from the model's files, or from the file in snr.scan."""
    config = s.config
    if config.snr.scan is not None:
        scanned = load_scan(config.snr.scan, config.snr.estimator)
        s.log.line("scan", f"{scan_summary(scanned)} · from {config.snr.scan}")
        return scanned

    def run_scan() -> Scan:
        with s.clock.time("scan"), s.log.bar("scan") as progress:
            return scan(s.prepared.folder, estimator=config.snr.estimator, progress=progress)

    scanned = on_main(run_scan)
    s.log.line("scan", scan_summary(scanned))
    return scanned


def load_base(s: Session, will_train: bool = False) -> Base:
    """The frozen base model, ready for the step that training.step names; `will_train` checks that it can train."""
    return base_model.load_base(s.config, s.prepared, s.log, will_train)


def go_on(s: Session, base: Base) -> Adapted | None:
    """The model of the earlier run, to be trained further; None if the run begins with a new adapter."""
    if s.earlier is None or s.given_plan is None:
        return None
    check_plan(base.model, s.given_plan)
    adapted = apply(s, base, s.given_plan)
    assert isinstance(adapted.model, PeftModel)
    take_factors(adapted.model, s.earlier)
    s.log.line("", f"goes on from {s.earlier.path.parent}: `before` is its model")
    return adapted


def refer(s: Session, base: Base, model: nn.Module, splits: Sequence[Split] = SPLITS) -> None:
    """Adds to the data of preferences what `model` says of them, where the loss compares with it: the base model, or
    that of an earlier run."""
    config, prepared = s.config, s.prepared
    if config.model.task != "preference" or not config.preference.has_reference:
        return
    found: dict[str, Encoded] = {}
    for split in splits:
        encoded = getattr(prepared, split)
        test_set = make_test_set(s, base, encoded.dataset)
        with s.clock.time("reference"), s.log.bar("reference") as progress:
            columns = agree(config, partial(reference_columns, model, test_set, progress))
        found[split] = replace(encoded, dataset=add_reference(encoded.dataset, columns))
    s.prepared = replace(prepared, **found)
    release_memory()


def make_test_set(s: Session, base: Base, encoded: Dataset, is_base: bool = False) -> TestSet:
    """The encoded examples, and how the run tests a model on them."""
    config, prepared = s.config, s.prepared
    return TestSet(
        encoded,
        prepared.collate,
        config.model.task,
        config.training.eval_batch_size,
        prepared.splits.labels,
        base.head_loss,
        config.preference,
        is_base=is_base,
        sources=prepared.splits.sources,
    )


def attach_trained(
    s: Session, base: Base, stored: StoredResult
) -> tuple[PeftModel | PreTrainedModel, dict[str, Tensor]]:
    """The base as `stored` trained it, ready for the fast step, and what `without_update` needs (results/load.py)."""
    model, former = attach(base.model, stored.content, stored.path)
    if isinstance(model, PeftModel):
        prepare_fast_adapters(s, model)
    return model, former


def test(s: Session, base: Base, model: nn.Module, when: str) -> Tested:
    """Tests `model` on the test data: loss and metrics, generated answers, and the tasks of evaluation.harness."""
    config, prepared = s.config, s.prepared
    test_set = make_test_set(s, base, prepared.test.dataset, is_base=when == "before")
    with s.clock.time("evaluate"), s.log.bar(when) as progress:
        with s.clock.time(TEST_LOSS):
            found = evaluate_model(model, test_set, progress)
        metrics = found.metrics
        answered = evaluate_answers(model, test_set, prepared.tokenizer, config.evaluation.num_generated, progress)
        for name, numbers in answered.pop("sources", {}).items():
            metrics["sources"][name] |= numbers
        metrics |= answered
        if tasks := config.evaluation.harness:
            size, limit = config.training.eval_batch_size, config.evaluation.harness_limit
            metrics["harness"] = harness_metrics(model, prepared.tokenizer, tasks, size, limit)
    release_memory()
    s.log.line(when, describe_metrics(metrics))
    for name, numbers in metrics.get("sources", {}).items():
        s.log.line("", f"{name}: {describe_metrics(numbers)}")
    for name, numbers in metrics.get("harness", {}).items():
        s.log.line("", " · ".join([name, *(f"{key} {value:.4f}" for key, value in numbers.items())]))
    return Tested(metrics, kept_predictions(found.predictions))


def needs_probe(config: Config) -> bool:
    """Whether the plan depends on gradients."""
    return not (config.merge.side == "none" or config.is_full) or config.selection.by == "gradient"


def probe_gradients(s: Session, base: Base) -> Probe | None:
    """Sketches of every matrix's gradient, from a few batches; None where merge.side=none merges nothing."""
    config = s.config
    if not needs_probe(config):
        s.log.line("probe", f"not needed: {'adapter.kind=full' if config.is_full else 'merge.side=none'}")
        return None
    with s.clock.time("probe"), s.log.bar("probe") as progress:
        probed = probe(
            base.model,
            probe_batches(config, s.prepared),
            sketch_size=config.probe.sketch_size,
            seed=config.probe.seed,
            progress=progress,
            mean_loss=_mean_loss(config, base),
            pieces=partial(probe_pieces, config),
        )
    s.log.line(
        "probe",
        f"{probed.num_batches} batches, {probed.num_tokens:,} tokens in {probed.seconds:.1f} s · sketches "
        f"{mib(probed.sketch_bytes)} · activations at most {mib(probed.activation_bytes)}",
    )
    return probed


def _mean_loss(config: Config, base: Base) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor] | None:
    """A function from model and batch to the loss; None for the model's own."""
    if config.model.task == "preference":
        return PreferenceLoss(config.preference, base.head_loss).mean
    if config.model.task == "reward":
        return mean_reward_loss
    return base.head_loss and base.head_loss.mean


def choose_plan(s: Session, base: Base, scanned: Scan, probed: Probe | None) -> Plan:
    """The plan that follows from the scan and the probe; prints which matrices cannot be trained, and why."""
    release_memory()
    model = base.model
    plan = make_plan(scanned, probed, s.config, model)
    if beyond := out_of_reach(model):
        s.log.line("", f"PEFT takes them for experts, so they are not trained: {_some(beyond)}")
    if probed is not None and probed.unused:
        s.log.line("", f"the loss does not use them, so they are not trained: {_some(probed.unused)}")
    planned = {matrix.name for matrix in plan.matrices}
    measured = adaptable(model) if probed is None else probed.shapes
    if missing := [name for name in measured if name not in planned]:
        s.log.line("", f"the scan does not have them, so they are not trained: {_some(missing)}")
    return plan


def print_plan(s: Session, plan: Plan) -> None:
    s.log.line("plan", describe_plan(plan))
    for remark in plan_remarks(plan):
        s.log.line("", remark)


def apply(s: Session, base: Base, plan: Plan) -> Adapted:
    """The model that `plan` describes: PEFT LoRA whose groups share one factor, ready for the fast step, or the base
    with the selected matrices trained whole."""
    print_plan(s, plan)
    set_seed(s.config.training.seed)
    if plan.settings.kind == "full":
        whole = train_whole(base.model, plan, base.new_modules)
        trained = trained_parameters(whole)
        num_trainable = sum(parameter.numel() for parameter in trained.values())
        s.log.line("apply", _describe_whole(whole, trained, num_trainable, s.config.optimizer))
        return Adapted(whole, num_trainable, None)
    model = apply_plan(base.model, plan, base.new_modules)
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_factors, num_plain = adapter_parameters(plan)
    adapted = Adapted(model, num_trainable, num_trainable - num_factors + num_plain)
    s.log.line("apply", _describe_parameters(adapted, num_factors, num_plain, bool(base.new_modules)))
    prepare_fast_adapters(s, model)
    reduce_factors_only(model)
    return adapted


def _describe_whole(
    model: PreTrainedModel, trained: Mapping[str, nn.Parameter], num_trainable: int, optimizer: str
) -> str:
    """What is trained of a model whose matrices are trained whole."""
    total, dtype = sum(parameter.numel() for parameter in model.parameters()), str(model.dtype).removeprefix("torch.")
    rounding = " with stochastic rounding" if dtype == "bfloat16" else ""
    line = (
        f"{num_trainable:,} of {total:,} parameters train whole ({len(trained)} tensors), in {dtype}{rounding}, by "
        f"{optimizer} in the backward pass"
    )
    if processes().num_processes > 1:
        reduced = sum(parameter.numel() * parameter.element_size() for parameter in trained.values())
        line += f" · gradients of {reduced / 2**20:,.2f} MiB reduced a step"
    return line


def prepare_fast_adapters(s: Session, model: PeftModel) -> None:
    """Switches the adapters to the fast step, and prints which of them PEFT's own forward still computes."""
    if slow := prepare_adapters(s.config, model):
        s.log.line("", f"PEFT's own forward still computes {_some(slow)}")


def agree(config: Config, measure: Callable[[], Any]) -> Any:
    """What the first process measures, on every process. If the model is sharded, all of them compute it together."""
    if not model_is_sharded(config):
        return on_main(measure)
    found = measure()
    return on_main(lambda: found)


def _some(names: Sequence[str]) -> str:
    return f"{names[0]}" if len(names) == 1 else f"{len(names)} matrices ({names[0]}, ...)"


def _describe_parameters(adapted: Adapted, num_factors: int, num_plain: int, head_is_new: bool) -> str:
    total = adapted.num_trainable
    head = f" (and {total - num_factors:,} of {'a new' if head_is_new else 'the'} head)" if total > num_factors else ""
    line = f"PEFT LoRA: {num_factors:,} trainable adapter parameters{head}"
    if num_plain > num_factors:
        line += f"; without sharing {num_plain:,}"
    if processes().num_processes > 1 and adapted.num_without_sharing is not None:  # gradients are float32
        reduced, unshared = (f"{4 * size / 2**20:,.2f}" for size in (total, adapted.num_without_sharing))
        line += f" · gradients of {reduced} MiB reduced a step"
        line += f", {unshared} without sharing" if unshared != reduced else ""
    return line
