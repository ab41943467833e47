"""Predicts what a run needs before its model is loaded: memory in each phase, disk space and time (docs/estimate.md).

The model is built without numbers and the run's own code is followed over it (`phases.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from sgm_finetune.base.config import Config
from sgm_finetune.base.device import has_gpu
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.memory import held_memory, release_memory
from sgm_finetune.base.processes import processes
from sgm_finetune.base.text import first_line
from sgm_finetune.data.batches import num_steps
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.measure.make_plan import check_rank
from sgm_finetune.method.plan import Plan
from sgm_finetune.model.load import check_checkpointing, skeleton
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.adapters.apply import apply_plan, check_plan
from sgm_finetune.train.adapters.optimizer import state_bytes, workspace_bytes
from sgm_finetune.train.budget.assumed_plan import assume_plan
from sgm_finetune.train.budget.needs import Estimate
from sgm_finetune.train.budget.phases import Follower, Work
from sgm_finetune.train.budget.speed import measure_speed
from sgm_finetune.train.budget.weights import count_weights, num_entries
from sgm_finetune.train.fast.gated_mlp import recomputed_width
from sgm_finetune.train.fast.prepare import prepare_adapters
from sgm_finetune.train.trial_size import FEWEST, trial_size

LIBRARIES_LATER = 80 * 2**20
"""Bytes of library code and tables that a run on a CPU loads after its model (docs/estimate.md)."""
ALLOCATOR = {"probe": 1.44, "step": 1.29, "test": 1.6}
"""Resident bytes on a CPU for each byte of short-lived tensors at their peak, in the probe, in a step and in tests.
They exceed 1 because the allocator cannot reuse freed memory of the wrong size. Fitted (docs/estimate.md)."""
_NUM_CHECKPOINTS = 3
"""The two that are kept, and the one that is being written."""
_T = TypeVar("_T")


class PredictionError(UserError):
    """The model's code asks for numbers where there are none, so what it needs cannot be predicted."""


def estimate(
    config: Config, prepared: PreparedData, plan: Plan | None = None, cache: dict[tuple, Any] | None = None
) -> Estimate:
    """Predicts what `finetune` needs with this configuration, data and plan. Loads nothing.

    Without a plan, all selected matrices are adapted and those that read the same activations share a factor. `cache`
    keeps what was followed for the next call, which may change only batch sizes, checkpointing, adapter and selection.
    Raises PredictionError when the model's code does not run without numbers.
    """
    release_memory()
    process_bytes = 0 if has_gpu() else held_memory() + LIBRARIES_LATER
    try:
        model = skeleton(config.model, prepared.folder, prepared.head)
        return _Estimator(config, prepared, model, process_bytes, {} if cache is None else cache).run(plan)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise PredictionError(
            f"What model.name={config.model.name} needs cannot be predicted: {first_line(error)}"
        ) from error


@dataclass(frozen=True)
class _Trained:
    """The number of trained parameters, and bytes of what belongs to them."""

    num_parameters: int
    written_bytes: int
    """Bytes in an adapter's file, which holds a shared factor once a layer."""
    state_bytes: int
    workspace_bytes: int

    @property
    def factor_bytes(self) -> int:
        return 4 * self.num_parameters


@dataclass(frozen=True)
class _Works:
    """The work of each phase."""

    test: Work
    answer: Work
    probe: Work
    sketch_bytes: int
    """Bytes of the probe's sketches."""
    step: Work
    validate: Work
    test_after: Work
    answer_after: Work
    num_dropped: int
    """Entries of the products that gated MLPs drop in a step and compute again."""


class _Estimator:
    """One estimate: follows the phases, then counts what each holds."""

    def __init__(
        self,
        config: Config,
        prepared: PreparedData,
        model: PreTrainedModel,
        process_bytes: int,
        cache: dict[tuple, Any],
    ):
        self.config, self.prepared, self.model = config, prepared, model
        self.process_bytes, self.cache = process_bytes, cache
        self.matrices = adaptable(model)  # now: an adapter's factors are linear layers too
        self.num_processes = processes().num_processes
        self.follower = Follower(config, prepared, model)
        largest = max(self.follower.micro_batch_size, config.training.eval_batch_size)
        rows = 2 if config.model.task == "preference" else 1
        num_tokens = rows * largest * max(map(max, self.follower.lengths.values()))
        self.weights = count_weights(config, prepared, model, self.matrices, num_tokens)

    def run(self, plan: Plan | None) -> Estimate:
        self._check_predictable(plan)
        held = self.process_bytes + self.weights.held
        trained, works = self._follow(plan)
        phases = self._phase_bytes(held, trained, works)
        peak_phase = max(phases, key=phases.__getitem__)
        steps = num_steps(self.config, len(self.prepared.train.dataset))
        return Estimate(
            device=torch.cuda.get_device_name() if has_gpu() else "CPU",
            peak_bytes=phases[peak_phase],
            peak_phase=peak_phase,
            phases=phases,
            process_bytes=self.process_bytes,
            weights_bytes=self.weights.held,
            mapped_bytes=self.weights.mapped,
            store_bytes=self.weights.store,
            adapter_bytes=trained.factor_bytes,
            gradient_bytes=trained.factor_bytes,
            optimizer_bytes=trained.state_bytes,
            activation_bytes=max(0, works.step.peak - works.step.wide - trained.factor_bytes),
            logits_bytes=works.step.wide,
            probe_bytes=works.sketch_bytes // 2 + works.probe.peak,
            disk_bytes=_disk_bytes(trained),
            seconds=self._seconds(works, steps),
            trainable_parameters=trained.num_parameters,
            micro_batch_size=self.follower.micro_batch_size,
            longest=max(self.follower.lengths["train"]),
            steps=steps,
        )

    def _check_predictable(self, plan: Plan | None) -> None:
        if plan is None:
            check_rank(self.config, {name: matrix.shape for name, matrix in self.matrices.items()})
        if any(matrix.num_experts is not None for matrix in self.matrices.values()):
            raise PredictionError("What adapters on stacks of experts need cannot be predicted")

    def _follow(self, plan: Plan | None) -> tuple[_Trained, _Works]:
        """Follows the run's phases in their order, over the base model and then over the adapted one."""
        follower, training = self.follower, self.config.training
        batch, micro_batch = training.eval_batch_size, (follower.micro_batch_size, training.checkpointing)
        adapter = (str(self.config.adapter), str(self.config.selection))

        test = self._once(("test", batch), lambda: follower.test("test", self.model))
        answer = self._once(("answers", batch), lambda: follower.answer(self.model))
        probe, sketch_bytes = Work(), 0
        if plan is None and self.config.merge.side != "none":
            probe, sketch_bytes = self._once(("probe", *micro_batch), follower.probe)

        plan = plan or self._once(("plan", *adapter), lambda: assume_plan(self.config, self.matrices, follower.readers))
        lowest = min((matrix.layer or 0 for matrix in plan.selected), default=0)
        width = recomputed_width(self.model, lowest)
        adapted = self._adapt(plan)
        step = self._once(("step", *micro_batch, *adapter), lambda: follower.step(adapted))
        validate = self._once(("validate", batch, *adapter), lambda: follower.test("validation", adapted))
        test_after = self._once(("test after", batch, *adapter), lambda: follower.test("test", adapted))
        answer_after = self._once(("answers after", batch, *adapter), lambda: follower.answer(adapted))
        num_dropped = width * step.tokens
        works = _Works(test, answer, probe, sketch_bytes, step, validate, test_after, answer_after, num_dropped)
        return self._count_trained(adapted), works

    def _once(self, key: tuple, follow: Callable[[], _T]) -> _T:
        if key not in self.cache:
            self.cache[key] = follow()
        return self.cache[key]

    def _adapt(self, plan: Plan) -> PeftModel:
        check_plan(self.model, plan)
        with torch.device("meta"):
            adapted = apply_plan(self.model, plan, self._new_modules())
        prepare_adapters(self.config, adapted)
        if self.config.training.checkpointing:
            check_checkpointing(self.model)
            adapted.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return adapted

    def _new_modules(self) -> tuple[str, ...]:
        """The classification head, which is new."""
        if self.config.model.task not in ("sequence-classification", "token-classification"):
            return ()
        return tuple(name for name, _ in self.model.named_children() if name in ("classifier", "score"))

    def _count_trained(self, adapted: nn.Module) -> _Trained:
        trained = [p for p in adapted.parameters() if p.requires_grad]
        named = adapted.named_parameters(remove_duplicate=False)
        return _Trained(
            num_parameters=sum(p.numel() for p in trained),
            written_bytes=sum(4 * p.numel() for _, p in named if p.requires_grad),
            state_bytes=state_bytes(trained, self.config.training.optimizer),
            workspace_bytes=workspace_bytes(trained),
        )

    def _phase_bytes(self, held: int, trained: _Trained, works: _Works) -> dict[str, int]:
        """Phase -> bytes of the whole process."""
        training = held + trained.factor_bytes + trained.state_bytes
        step = max(works.step.peak, trained.factor_bytes + trained.workspace_bytes)
        test, test_after = max(works.test.peak, works.answer.peak), max(works.test_after.peak, works.answer_after.peak)
        half = works.sketch_bytes // 2  # the part of the sketches that is in the probe's peak
        return {
            "load": held + self.weights.loading,
            "test": held + _resident(test, "test"),
            "probe": held + works.sketch_bytes + _resident(works.probe.peak - half, "probe"),
            "step": training + _resident(step, "step") + self._hole_bytes(works.num_dropped),
            "validate": training + _resident(works.validate.peak, "test"),
            "test after": training + _resident(test_after, "test"),
        }

    def _hole_bytes(self, num_dropped: int) -> int:
        """Bytes of the holes that a step on a CPU leaves between the activations that it keeps: as large as the weights
        that it dequantises and the `num_dropped` entries of products of gated MLPs that it drops."""
        if has_gpu():
            return 0
        dequantized = num_entries(self.matrices) if self.config.model.quantization != "none" else 0
        return (dequantized + num_dropped) * self.model.dtype.itemsize

    def _seconds(self, works: _Works, steps: int) -> dict[str, float]:
        """Seconds after the scan: each batch's time in proportion to the average number of tokens of an example."""
        speed = measure_speed(self.model.config.get_text_config().hidden_size, self.model.dtype)

        def per_token(work: Work) -> float:
            return speed.seconds(work.flops, work.traffic) / work.tokens

        size = {name: len(lengths) for name, lengths in self.follower.lengths.items()}
        tokens = {name: number / size[name] for name, number in self.follower.num_tokens.items()}
        training, probe = self.config.training, self.config.probe
        num_validations = 4 if training.eval_steps is None else max(1, steps // training.eval_steps)
        num_probed = min(probe.num_batches * probe.batch_size, size["train"])
        one_step = per_token(works.step) * tokens["train"] * training.batch_size / self.num_processes
        validate = per_token(works.validate) * tokens["validation"] * size["validation"] / self.num_processes
        reference, trials = {}, {}
        if self.config.model.task == "preference" and self.config.preference.has_reference:
            reference = {"reference": per_token(works.test) * sum(self.follower.num_tokens.values())}
        if training.learning_rate == "auto":
            trial = trial_size(self.config, size["train"])
            tested = per_token(works.validate) * tokens["train"] * trial.num_held_out / self.num_processes
            trials = {"rate_trials": FEWEST * (trial.steps * one_step + tested)}
        seconds = {
            **reference,
            "probe": per_token(works.probe) * tokens["train"] * num_probed,
            **trials,
            "train": steps * one_step + num_validations * validate,
            "evaluate": 2 * per_token(works.test) * tokens["test"] * size["test"],
        }
        return {name: round(number, 1) for name, number in seconds.items()}


def _resident(transient: int, phase: str) -> int:
    return transient if has_gpu() else int(ALLOCATOR[phase] * transient)


def _disk_bytes(trained: _Trained) -> int:
    """The adapter as PEFT's file and as .pth, and the checkpoints, each with the optimizer's state."""
    return 2 * trained.written_bytes + _NUM_CHECKPOINTS * (trained.written_bytes + trained.state_bytes)
