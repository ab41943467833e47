"""Predicts what a run needs before its model is loaded: memory in each phase, disk space and time (docs/estimate.md).

The model is built without numbers and the run's own code is followed over it (`phases.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from sgm_finetune.base.config import HEAD_TASKS, PAIR_TASKS, Config
from sgm_finetune.base.device import has_gpu
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.memory import held_memory, release_memory
from sgm_finetune.base.processes import processes
from sgm_finetune.base.text import first_line
from sgm_finetune.data.batches import num_steps, tokens_per_example
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.measure.make_plan import check_rank
from sgm_finetune.method.plan import Plan
from sgm_finetune.model.load import check_checkpointing, skeleton
from sgm_finetune.model.matrices import Matrix, adaptable
from sgm_finetune.model.names import block_of
from sgm_finetune.train.adapters.apply import apply_plan, check_plan
from sgm_finetune.train.adapters.optimizer import state_bytes, workspace_bytes
from sgm_finetune.train.budget.assumed_plan import assume_plan
from sgm_finetune.train.budget.needs import Estimate
from sgm_finetune.train.budget.phases import Follower, Work
from sgm_finetune.train.budget.reading import Reads, count_reads
from sgm_finetune.train.budget.speed import measure_speed
from sgm_finetune.train.budget.weights import count_weights, num_entries
from sgm_finetune.train.fast.gated_mlp import recomputed_width
from sgm_finetune.train.fast.prepare import prepare_adapters
from sgm_finetune.train.full.apply import CLASSIFICATION_HEADS, train_whole
from sgm_finetune.train.full.changed import trained_parameters
from sgm_finetune.train.full.optimizers import whole_state_bytes
from sgm_finetune.train.trial_size import FEWEST, trial_size

LIBRARIES_LATER = 80 * 2**20
"""Bytes of library code and tables that a run on a CPU loads after its model (docs/estimate.md)."""
ALLOCATOR = {"probe": 1.44, "step": 1.29, "test": 1.6}
"""Resident bytes on a CPU for each byte of short-lived tensors at their peak, in the probe, in a step and in tests.
They exceed 1 because the allocator cannot reuse freed memory of the wrong size. Fitted (docs/estimate.md)."""
_T = TypeVar("_T")


class PredictionError(UserError):
    """The model's code asks for numbers where there are none, so what it needs cannot be predicted."""


def estimate(
    config: Config,
    prepared: PreparedData,
    plan: Plan | None = None,
    cache: dict[tuple, Any] | None = None,
    held: int | None = None,
) -> Estimate:
    """Predicts what `finetune` needs with this configuration, data and plan. Loads nothing.

    Without a plan, all selected matrices are adapted and those that read the same activations share a factor. `cache`
    keeps what was followed for the next call, which may change only batch sizes, checkpointing, adapter and selection.
    `held` is the memory of this process without a model, in bytes; None: what it holds now, so that none is loaded.
    Raises PredictionError when the model's code does not run without numbers.
    """
    release_memory()
    process_bytes = 0 if has_gpu() else (held_memory() if held is None else held) + LIBRARIES_LATER
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
    """Bytes in an adapter's file, which holds a shared factor once a layer, or of the whole matrices."""
    state_bytes: int
    workspace_bytes: int
    """Of the optimizer's step after the backward pass. 0 for whole matrices, which step in the backward pass."""
    factor_bytes: int
    """Beside the base's weights: 0 for whole matrices, which are among these."""
    gradient_bytes: int
    """Of whole matrices, one gradient; where gradients accumulate, all of them."""


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
        rows = 2 if config.model.task in PAIR_TASKS else 1
        num_tokens = rows * largest * max(map(max, self.follower.lengths.values()))
        in_parts = self.follower.head_loss is not None
        self.weights = count_weights(config, prepared, model, self.matrices, num_tokens, in_parts)

    def run(self, plan: Plan | None) -> Estimate:
        self._check_predictable(plan)
        held = self.process_bytes + self.weights.held
        trained, works = self._follow(plan)
        phases = self._phase_bytes(held, trained, works)
        peak_phase = max(phases, key=phases.__getitem__)
        at_once = max(self.weights.rows, self.weights.output)
        reads = count_reads(
            self.prepared.folder, self.weights, phases["step"] - at_once - self.weights.block, works.step.tokens
        )
        steps = num_steps(self.config, len(self.prepared.train.dataset))
        return Estimate(
            device=torch.cuda.get_device_name() if has_gpu() else "CPU",
            peak_bytes=phases[peak_phase],
            peak_phase=peak_phase,
            phases=phases,
            process_bytes=self.process_bytes,
            weights_bytes=self.weights.held + at_once,
            host_bytes=self.weights.host,
            mapped_bytes=0 if self.weights.host else self.weights.block + at_once,
            store_bytes=self.weights.store,
            read_bytes=reads.step * self.follower.num_micro_batches,
            read_rate=reads.rate,
            adapter_bytes=trained.factor_bytes,
            gradient_bytes=trained.gradient_bytes,
            optimizer_bytes=trained.state_bytes,
            activation_bytes=max(0, works.step.peak - works.step.wide - trained.gradient_bytes),
            logits_bytes=works.step.wide,
            probe_bytes=works.sketch_bytes // 2 + works.probe.peak,
            disk_bytes=_disk_bytes(trained, self.config),
            seconds=self._seconds(works, steps, reads),
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
        probes = self.config.selection.by == "gradient" if self.config.is_full else self.config.merge.side != "none"
        if plan is None and probes:
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
        return self._count_trained(adapted, plan), works

    def _once(self, key: tuple, follow: Callable[[], _T]) -> _T:
        if key not in self.cache:
            self.cache[key] = follow()
        return self.cache[key]

    def _adapt(self, plan: Plan) -> PeftModel | PreTrainedModel:
        check_plan(self.model, plan)
        if plan.settings.kind == "full":
            if self.config.training.checkpointing:
                check_checkpointing(self.model, self.config.model)
                self.model.activation_checkpointing_enable({"use_reentrant": False})
            return train_whole(self.model, plan, self._new_modules())
        with torch.device("meta"):
            adapted = apply_plan(self.model, plan, self._new_modules())
        prepare_adapters(self.config, adapted)
        if self.config.training.checkpointing:
            check_checkpointing(self.model, self.config.model)
            adapted.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return adapted

    def _new_modules(self) -> tuple[str, ...]:
        """The classification head, which is new."""
        if self.config.model.task not in HEAD_TASKS:
            return ()
        return tuple(name for name, _ in self.model.named_children() if name in CLASSIFICATION_HEADS)

    def _count_trained(self, adapted: nn.Module, plan: Plan) -> _Trained:
        if plan.settings.kind == "full":
            return self._count_whole(trained_parameters(adapted), {f"{matrix.name}.weight" for matrix in plan.selected})
        trained = [p for p in adapted.parameters() if p.requires_grad]
        size = sum(p.numel() for p in trained)
        named = adapted.named_parameters(remove_duplicate=False)
        return _Trained(
            num_parameters=size,
            written_bytes=sum(4 * p.numel() for _, p in named if p.requires_grad),
            state_bytes=state_bytes(trained, self.config.optimizer),
            workspace_bytes=workspace_bytes(trained),
            factor_bytes=4 * size,
            gradient_bytes=4 * size,
        )

    def _count_whole(self, trained: Mapping[str, nn.Parameter], matrices: Collection[str]) -> _Trained:
        sizes = [p.numel() * p.element_size() for p in trained.values()]
        return _Trained(
            num_parameters=sum(p.numel() for p in trained.values()),
            written_bytes=sum(sizes),
            state_bytes=whole_state_bytes(self.config.optimizer, trained, matrices),
            workspace_bytes=0,
            factor_bytes=0,
            gradient_bytes=sum(sizes) if self.follower.num_micro_batches > 1 else max(sizes),
        )

    def _phase_bytes(self, held: int, trained: _Trained, works: _Works) -> dict[str, int]:
        """Phase -> bytes of the whole process."""
        training = held + trained.factor_bytes + trained.state_bytes
        kept = trained.written_bytes if self.config.is_full and self._keeps_a_copy() else 0
        step = max(works.step.peak, trained.factor_bytes + trained.workspace_bytes)
        half = works.sketch_bytes // 2  # the part of the sketches that is in the probe's peak
        answer = self.weights.output_layer + _resident(works.answer.peak, "test")  # the fast step is tried too
        answer_after = works.answer_after.peak and self.weights.output_layer + _resident(
            works.answer_after.peak, "test"
        )
        return {
            "load": held + self.weights.loading,
            "test": held + max(self._beside(works.test.peak, "test"), answer),
            "probe": held + works.sketch_bytes + self._beside(works.probe.peak - half, "probe"),
            "step": training
            + kept
            + self._beside(step, "step")
            + self._hole_bytes(works.num_dropped)
            + self._state_hole_bytes(trained, works.step.peak),
            "validate": training + self._beside(works.validate.peak, "test"),
            "test after": training + max(self._beside(works.test_after.peak, "test"), answer_after),
        }

    def _beside(self, transient: int, phase: str) -> int:
        """Bytes of a batch that takes `transient` bytes at its peak, with what is in memory of embeddings and output
        layer on disk; the embeddings come and go before there are activations."""
        return max(self.weights.rows, self.weights.output + _resident(transient, phase))

    def _keeps_a_copy(self) -> bool:
        """Whether trials of the learning rate hold what they will restore in the memory that is predicted."""
        return self.config.training.learning_rate == "auto" and not has_gpu()

    def _hole_bytes(self, num_dropped: int) -> int:
        """Bytes of the holes that a step on a CPU leaves between the activations that it keeps: as large as the weights
        that it dequantises and the `num_dropped` entries of products of gated MLPs that it drops. With checkpointing a
        block keeps its activations until it is done, and its holes are free again for the next one."""
        if has_gpu():
            return 0
        dequantized = 0
        if self.config.model.quantization != "none":
            dequantized = num_entries(self.matrices)
            if self.config.training.checkpointing:
                blocks: dict[str | None, dict[str, Matrix]] = {}
                for name, matrix in self.matrices.items():
                    blocks.setdefault(block_of(name), {})[name] = matrix
                dequantized = max(map(num_entries, blocks.values()))
        return (dequantized + num_dropped) * self.model.dtype.itemsize

    def _state_hole_bytes(self, trained: _Trained, step: int) -> int:
        """Bytes of the holes that the first step on a CPU leaves where whole matrices step: their states are made while
        its activations are freed, and take their places, so that later steps find none as large."""
        return min(trained.state_bytes, step) if self.config.is_full and not has_gpu() else 0

    def _seconds(self, works: _Works, steps: int, reads: Reads) -> dict[str, float]:
        """Seconds after the scan: each batch's time in proportion to the average number of tokens of an example. While
        a block of a base on disk computes, the next one is read, so that the longer of the two counts."""
        speed = measure_speed(self.model.config.get_text_config().hidden_size, self.model.dtype)

        def per_token(work: Work) -> float:
            return speed.seconds(work.flops, work.traffic) / work.tokens

        size = {name: len(lengths) for name, lengths in self.follower.lengths.items()}
        tokens = {name: number / size[name] for name, number in self.follower.num_tokens.items()}
        tokens["train"] = tokens_per_example(self.config, self.prepared.train.dataset)
        training, probe = self.config.training, self.config.probe

        def tested(work: Work, split: str, number: int) -> float:
            batches = math.ceil(number / training.eval_batch_size)
            return max(per_token(work) * tokens[split] * number, reads.seconds(batches * reads.forward))

        num_probed = min(probe.num_batches * probe.batch_size, size["train"])
        num_pieces = num_probed if training.checkpointing else num_probed / max(1, self.follower.micro_batch_size // 2)
        one_step = max(
            per_token(works.step) * tokens["train"] * training.batch_size / self.num_processes,
            reads.seconds(reads.step * self.follower.num_micro_batches),
        )
        if training.eval_seconds is not None:
            num_validations = 1 + int(steps * one_step / training.eval_seconds)
        else:
            num_validations = 4 if training.eval_steps is None else max(1, steps // training.eval_steps)
        validate = tested(works.validate, "validation", math.ceil(size["validation"] / self.num_processes))
        reference, trials = {}, {}
        if self.config.model.task == "preference" and self.config.preference.has_reference:
            reference = {"reference": per_token(works.test) * sum(self.follower.num_tokens.values())}
        if training.learning_rate == "auto":
            trial = trial_size(self.config, size["train"])
            held_out = tested(works.validate, "train", math.ceil(trial.num_held_out / self.num_processes))
            trials = {"rate_trials": FEWEST * (trial.steps * one_step + held_out)}
        probed = per_token(works.probe) * tokens["train"] * num_probed
        seconds = {
            **reference,
            "probe": max(probed, reads.seconds(math.ceil(num_pieces) * reads.step)) if probed else 0.0,
            **trials,
            "train": steps * one_step + num_validations * validate,
            "evaluate": 2 * tested(works.test, "test", size["test"]),
        }
        return {name: round(number, 1) for name, number in seconds.items()}


def _resident(transient: int, phase: str) -> int:
    return transient if has_gpu() else int(ALLOCATOR[phase] * transient)


def _disk_bytes(trained: _Trained, config: Config) -> int:
    """The adapter as PEFT's file and as .pth, whole matrices as .pth alone, and the checkpoints, each with the
    optimizer's state: the newest, the best, others that are kept, and the one that is being written."""
    num_checkpoints = max(2, config.training.save_total_limit) + 1
    return (1 if config.is_full else 2) * trained.written_bytes + num_checkpoints * (
        trained.written_bytes + trained.state_bytes
    )
