"""What a run will need, before its model is loaded: memory in each phase, disk, time (docs/estimate.md).

The model is built without numbers and the run's own code is followed over it (`measure/footprint.py`): tests, the
answers, the probe, one step. Batches are the largest that the data have, in the order in which they will come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from sgm_finetune.base.config import Config
from sgm_finetune.base.device import has_gpu
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.memory import held_memory, release_memory
from sgm_finetune.base.processes import processes
from sgm_finetune.base.text import first_line
from sgm_finetune.data.batches import LengthGroupedSampler, divide_batch, longest_first, num_predictions, num_steps
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.data.questions import answer_limit, has_answers, questions
from sgm_finetune.measure.make_plan import check_rank
from sgm_finetune.measure.probe import following
from sgm_finetune.measure.probe_batches import probe_batches, probe_pieces
from sgm_finetune.method.plan import Group, MatrixNumbers, Plan, PlannedMatrix, PlanSettings
from sgm_finetune.method.selection import select_matrices
from sgm_finetune.model.load import Head, check_checkpointing, skeleton
from sgm_finetune.model.matrices import Matrix, adaptable
from sgm_finetune.model.names import kind_of, layer_of
from sgm_finetune.model.stand_ins import stored_bytes
from sgm_finetune.train.adapters.apply import apply_plan, check_plan
from sgm_finetune.train.budget.footprint import Footprint
from sgm_finetune.train.fast.gated_mlp import recomputed_width
from sgm_finetune.train.fast.prepare import prepare_adapters, prepare_base
from sgm_finetune.train.losses import summed_loss

LIBRARIES_LATER = 80 * 2**20
"""Bytes of library code and tables that a run on a CPU loads after its model (docs/estimate.md)."""
ALLOCATOR = {"probe": 1.44, "step": 1.29, "test": 1.6}
"""On a CPU: resident bytes for each byte of tensors that come and go, at their peak, since freed memory of the wrong
size is not used again: in the probe, in a step and in tests. Fitted (docs/estimate.md)."""
_T = TypeVar("_T")
_EPOCHS_LOOKED_AT = 3
_KEPT_CHECKPOINTS = 3
"""Two, and the one that is being written."""


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of one process. The parts are of the training step; a phase's bytes are all of the process."""

    device: str
    peak_bytes: int
    peak_phase: str
    phases: dict[str, int]
    process_bytes: int
    """Libraries and data, measured now (0 on a GPU)."""
    weights_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logits_bytes: int
    probe_bytes: int
    """Activations and sketches of the probe."""
    disk_bytes: int
    seconds: dict[str, float]
    trainable_parameters: int
    micro_batch_size: int
    longest: int
    """Tokens of the longest training example."""
    steps: int

    @property
    def firm_phase(self) -> str:
        """The phase that needs most of what cannot be given back: loading holds pages of files that can."""
        return max((phase for phase in self.phases if phase != "load"), key=self.phases.__getitem__)

    @property
    def firm_bytes(self) -> int:
        return self.phases[self.firm_phase]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_seconds": sum(self.seconds.values())}


class PredictionError(UserError):
    """A model whose code asks for numbers where there are none."""


@dataclass
class _Work:
    """What one batch needs above what is held."""

    peak: int = 0
    wide: int = 0
    left: int = 0
    flops: int = 0
    traffic: int = 0
    tokens: int = 1


def estimate(
    config: Config, prepared: PreparedData, plan: Plan | None = None, followed: dict[tuple, Any] | None = None
) -> Estimate:
    """What `finetune` will need with this configuration and data, and with this plan, where there is one (without: all
    that can be adapted, readers of the same activations sharing). Nothing is loaded. `followed` keeps what has been
    followed for a call with another batch, checkpointing, adapter or selection, and all else the same."""
    release_memory()
    process = 0 if has_gpu() else held_memory() + LIBRARIES_LATER
    try:
        splits, padding = prepared.splits, prepared.tokenizer.pad_token_id
        head = Head(splits.labels, splits.label_kind, padding)  # type: ignore[arg-type]  # one token's id
        model = skeleton(config.model, prepared.folder, head)
        return _Estimator(config, prepared, model, process, {} if followed is None else followed).run(plan)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise PredictionError(
            f"What model.name={config.model.name} needs cannot be predicted: {first_line(error)}"
        ) from error


class _Estimator:
    def __init__(
        self, config: Config, prepared: PreparedData, model: PreTrainedModel, process: int, followed: dict[tuple, Any]
    ):
        self.config, self.prepared, self.model, self.process = config, prepared, model, process
        self.followed = followed
        self.matrices = adaptable(model)  # before adapters are, whose factors are linear layers too
        self.num_processes = processes().num_processes
        self.micro, self.num_micro = divide_batch(config, self.num_processes)
        self.vocabulary = getattr(model.config.get_text_config(), "vocab_size", -1)
        self.weights = stored_bytes(model)
        splits = {name: getattr(prepared, name).dataset for name in ("train", "validation", "test")}
        self.lengths = {name: [len(ids) for ids in dataset["input_ids"]] for name, dataset in splits.items()}
        first, _ = self._batch("train", min(2, len(prepared.train.dataset)))
        with Footprint(num_selected=len(first["input_ids"])):
            self.head_loss, _ = prepare_base(config, model, (), first)

    def run(self, plan: Plan | None) -> Estimate:
        if plan is None:
            check_rank(self.config, {name: matrix.shape for name, matrix in self.matrices.items()})
        if any(matrix.num_experts is not None for matrix in self.matrices.values()):
            raise PredictionError("What adapters on stacks of experts need cannot be predicted")
        held = self._held()
        training, probing = self.config.training, plan is None and self.config.merge.side != "none"
        batch, adapters = training.eval_batch_size, (str(self.config.adapter), str(self.config.selection))
        tested = self._once(("test", batch), lambda: self._tested("test", self.model))
        answered = self._once(("answers", batch), lambda: self._answered(self.model))
        probed, sketches = _Work(), 0
        if probing:
            probed, sketches = self._once(("probe", self.micro, training.checkpointing), self._probed)
        plan = plan or self._once(("plan", *adapters), self._assumed_plan)
        lowest = min((matrix.layer or 0 for matrix in plan.selected), default=0)
        products = recomputed_width(self.model, lowest)
        adapted = self._adapted(plan)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        state = self._optimizer_state(adapted)
        stepped = self._once(("step", self.micro, training.checkpointing, *adapters), lambda: self._stepped(adapted))
        validated = self._once(("validate", batch, *adapters), lambda: self._tested("validation", adapted))
        tested_after = self._once(("test after", batch, *adapters), lambda: self._tested("test", adapted))
        answered_after = self._once(("answers after", batch, *adapters), lambda: self._answered(adapted))
        factors = 4 * trained
        optimizing = factors + optimizer_workspace(adapted)
        phases = {
            "load": held + self._loading(),
            "test": held + _resident(max(tested.peak, answered.peak), "test"),
            "probe": held + sketches + _resident(probed.peak - sketches // 2, "probe"),
            "step": held
            + factors
            + state
            + _resident(max(stepped.peak, optimizing), "step")
            + self._holes(products * stepped.tokens),
            "validate": held + factors + state + _resident(validated.peak, "test"),
            "test after": held + factors + state + _resident(max(tested_after.peak, answered_after.peak), "test"),
        }
        peak_phase = max(phases, key=phases.__getitem__)
        steps = num_steps(self.config, len(self.prepared.train.dataset))
        return Estimate(
            device=torch.cuda.get_device_name() if has_gpu() else "CPU",
            peak_bytes=phases[peak_phase],
            peak_phase=peak_phase,
            phases=phases,
            process_bytes=self.process,
            weights_bytes=held - self.process,
            adapter_bytes=factors,
            gradient_bytes=factors,
            optimizer_bytes=state,
            activation_bytes=max(0, stepped.peak - stepped.wide - factors),
            logits_bytes=stepped.wide,
            probe_bytes=sketches // 2 + probed.peak,
            disk_bytes=self._disk(adapted, state),
            seconds=self._seconds(tested, answered, probed, stepped, validated, steps),
            trainable_parameters=trained,
            micro_batch_size=self.micro,
            longest=max(self.lengths["train"]),
            steps=steps,
        )

    def _once(self, key: tuple, follow: Callable[[], _T]) -> _T:
        if key not in self.followed:
            self.followed[key] = follow()
        return self.followed[key]

    def _held(self) -> int:
        if not (self.config.training.shard and self.num_processes > 1):
            return self.process + self.weights
        num_blocks = len({layer_of(name) for name in self.matrices})
        inside = min(self.weights, self._entries() * self.weights // sum(p.numel() for p in self.model.parameters()))
        return self.process + self.weights - inside + inside // self.num_processes + inside // num_blocks

    def _holes(self, dropped: int) -> int:
        """What a step leaves between the activations that it keeps, on a CPU: as much as the weights that it
        dequantised, and as the `dropped` entries of products of gated MLPs."""
        if has_gpu():
            return 0
        entries = self._entries() if self.config.model.quantization != "none" else 0
        return (entries + dropped) * self.model.dtype.itemsize

    def _entries(self) -> int:
        return sum(rows * cols for rows, cols in (matrix.shape for matrix in self.matrices.values()))

    def _loading(self) -> int:
        """Files that are read while what is made of them is there already: of weights that change their type."""
        stored = getattr(self.model.config, "dtype", None)
        converted = self.config.model.quantization != "none" or (
            self.config.model.dtype != "auto" and str(stored) != f"torch.{self.config.model.dtype}"
        )
        sizes = [path.stat().st_size for path in self.prepared.folder.glob("*.safetensors")]
        return sum(sizes) if converted and not has_gpu() else 0

    def _batch(self, split: str, size: int) -> tuple[dict[str, Tensor], int]:
        """The longest examples of a split, and how many predictions they make."""
        dataset = getattr(self.prepared, split).dataset
        return self._described(self.prepared.collate([dataset[i] for i in longest_first(self.lengths[split])[:size]]))

    def _largest_step(self) -> tuple[dict[str, Tensor], int]:
        """Of the first epochs' micro-batches, in the order in which they will come, the one with the most tokens."""
        dataset, batch, lengths = self.prepared.train.dataset, self.config.training.batch_size, self.lengths["train"]
        sampler = LengthGroupedSampler(lengths, batch, self.config.training.seed)
        left, largest, most = batch * num_steps(self.config, len(lengths)), [0], 0
        for epoch in range(_EPOCHS_LOOKED_AT):
            sampler.set_epoch(epoch)
            order = list(sampler)[: max(0, left)]
            left -= len(order)
            for at in range(0, len(order), self.micro):
                chosen = order[at : at + self.micro]
                if (size := len(chosen) * max(lengths[i] for i in chosen)) > most:
                    largest, most = chosen, size
        return self._described(self.prepared.collate([dataset[i] for i in largest]))

    def _described(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        predicted = num_predictions(batch["labels"], self.config.model.task)
        return {name: tensor.to("meta") for name, tensor in batch.items()}, max(1, predicted)

    @contextmanager
    def _followed(self, model: nn.Module, predicted: int, work: _Work) -> Iterator[Footprint]:
        known = [*model.parameters(), *model.buffers()]
        with Footprint(known, predicted, self.vocabulary) as footprint:
            yield footprint
        work.peak, work.wide, work.left = footprint.peak, footprint.wide_at_peak, footprint.now
        work.flops, work.traffic = footprint.flops, footprint.traffic

    def _tested(self, split: str, model: nn.Module) -> _Work:
        batch, predicted = self._batch(split, self.config.training.eval_batch_size)
        work = _Work(tokens=batch["input_ids"].numel())
        with self._followed(model, predicted, work), torch.no_grad():
            model.eval()
            self._loss(model, batch)
        return work

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        task = self.config.model.task
        if self.head_loss is not None:
            return self.head_loss.mean(model, batch)
        labels = batch["labels"]
        inputs = batch if task == "seq2seq-lm" else {name: x for name, x in batch.items() if name != "labels"}
        return summed_loss(model(**inputs).logits, labels, task)[0]

    def _answered(self, model: nn.Module) -> _Work:
        task, test = self.config.model.task, self.prepared.test.dataset
        number = min(self.config.evaluation.num_generated, len(test))
        if not number or not has_answers(test, task):
            return _Work()
        asked = questions(test, range(number), task)
        size, prompt = min(self.config.training.eval_batch_size, number), max(len(q.prompt) for q in asked)
        limit = answer_limit(asked)
        ids = torch.zeros(size, prompt, dtype=torch.long, device="meta")
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
        if task == "seq2seq-lm":
            inputs["decoder_input_ids"] = torch.zeros(size, limit, dtype=torch.long, device="meta")
        elif self.head_loss is not None:
            inputs["logits_to_keep"] = 1
        work = _Work(tokens=size * prompt)
        with self._followed(model, 1, work) as footprint, torch.no_grad():
            model.eval()
            outputs = model(**inputs)
            cache = footprint.now
            del outputs
        grown = cache if task == "seq2seq-lm" else cache * (prompt + limit) // prompt
        work.peak = max(work.peak, 2 * grown)  # a layer's keys and values are copied as they grow
        work.tokens = size * (prompt + limit)
        return work

    def _probed(self) -> tuple[_Work, int]:
        """The largest piece of a batch, and the bytes of all sketches."""
        batches = probe_batches(self.config, self.prepared)
        pieces = [piece for batch in batches for piece, _ in probe_pieces(self.config, batch)]
        batch, predicted = self._described(max(pieces, key=lambda piece: piece["input_ids"].numel()))
        work = _Work(tokens=batch["input_ids"].numel())
        with following(self.model, self.config.probe.sketch_size, self.config.probe.seed) as sketch_bytes:
            with self._followed(self.model, predicted, work):
                self._loss(self.model, batch).backward()
            sketches = sketch_bytes()
        return work, 2 * sketches  # of both halves; those of this batch are among its peak too

    def _adapted(self, plan: Plan) -> PeftModel:
        check_plan(self.model, plan)
        with torch.device("meta"):
            adapted = apply_plan(self.model, plan, self._new_modules())
        prepare_adapters(self.config, adapted)
        if self.config.training.checkpointing:
            check_checkpointing(self.model)
            adapted.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return adapted

    def _new_modules(self) -> tuple[str, ...]:
        """A classification head is new."""
        if self.config.model.task not in ("sequence-classification", "token-classification"):
            return ()
        return tuple(name for name, _ in self.model.named_children() if name in ("classifier", "score"))

    def _assumed_plan(self) -> Plan:
        config, matrices = self.config, self.matrices
        settings = PlanSettings(
            config.adapter.rank, config.adapter.alpha, config.adapter.dropout,
            top_fraction=config.selection.top_fraction, prefer_depth=config.selection.prefer_depth,
        )  # fmt: skip
        # without a scan all are alike: of a kind the first are chosen, as low in the model as any choice by SNR
        alike = [MatrixNumbers(n, kind_of(n), layer_of(n), m.shape, 1.0, 0.0, None) for n, m in matrices.items()]
        chosen = set(select_matrices(alike, settings))
        planned = tuple(
            PlannedMatrix(n, kind_of(n), layer_of(n), m.shape, n in chosen, num_experts=m.num_experts)
            for n, m in matrices.items()
        )
        groups = ()
        if config.merge.side != "none" and config.merge.scope == "activation":
            readers = self._readers({n: m for n, m in matrices.items() if n in chosen and m.num_experts is None})
            groups = tuple(
                Group(members[0], kind_of(members[0]), "input", tuple(members), "random")
                for members in readers
                if len(members) > 1
            )
        return Plan(config.model.name, settings, planned, groups)

    def _readers(self, matrices: dict[str, Matrix]) -> list[list[str]]:
        """Names of the layers that are given the same activations, all of them."""
        given: list[Any] = []  # which also keeps what was given, so that no other has its identity
        read: dict[str, list[int]] = {name: [] for name in matrices}

        def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            given.append(args[0])
            read[name].append(id(args[0]))

        hooks = [m.module.register_forward_pre_hook(partial(note, name)) for name, m in matrices.items()]
        batch, _ = self._batch("train", 1)
        try:
            with Footprint(num_selected=1), torch.no_grad():
                self._loss(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        together: dict[tuple[int, ...], list[str]] = {}
        for name, activations in read.items():
            if activations:
                together.setdefault(tuple(activations), []).append(name)
        return list(together.values())

    def _stepped(self, model: PeftModel) -> _Work:
        batch, predicted = self._largest_step()
        work = _Work(tokens=batch["input_ids"].numel())
        elsewhere = self.config.training.checkpointing == "offload"
        with self._followed(model, predicted, work), saved_elsewhere() if elsewhere else nullcontext():
            model.train()
            own = self.head_loss is None and self.config.model.task in ("causal-lm", "sequence-classification")
            loss = model(**batch).loss if own else self._loss(model, batch)
            loss.backward()
            del loss
        if self.num_micro > 1:  # the gradients of earlier micro-batches are there
            work.peak += work.left
        for parameter in model.parameters():
            parameter.grad = None
        return work

    def _optimizer_state(self, model: PeftModel) -> int:
        trained = [p for p in model.parameters() if p.requires_grad]
        match self.config.training.optimizer:
            case "adamw":
                return sum(8 * p.numel() for p in trained)
            case "adamw_8bit" | "paged_adamw_8bit":  # tensors of less than 4,096 numbers keep 32 bits
                return sum(2 * p.numel() if p.numel() >= 4096 else 8 * p.numel() for p in trained)
        return sum(4 * (p.numel() + max(p.shape)) if p.dim() == 2 else 8 * p.numel() for p in trained)

    def _disk(self, model: PeftModel, state: int) -> int:
        """The adapter, written for PEFT (shared factors once a layer) and as .pth; checkpoints with the optimizer."""
        written = sum(4 * p.numel() for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
        return 2 * written + _KEPT_CHECKPOINTS * (written + state)

    def _seconds(
        self, tested: _Work, answered: _Work, probed: _Work, stepped: _Work, validated: _Work, steps: int
    ) -> dict[str, float]:
        speed = _speed(self.model.config.get_text_config().hidden_size, self.model.dtype)
        size = {name: len(lengths) for name, lengths in self.lengths.items()}
        tokens = {name: sum(lengths) / len(lengths) for name, lengths in self.lengths.items()}
        one_step = speed.seconds(stepped) / stepped.tokens * tokens["train"] * self.config.training.batch_size
        one_step /= self.num_processes
        validations = 4 if self.config.training.eval_steps is None else max(1, steps // self.config.training.eval_steps)
        validate = validations * speed.seconds(validated) / validated.tokens * tokens["validation"]
        test = 2 * speed.seconds(tested) / tested.tokens * tokens["test"] * size["test"]
        found = {
            "probe": speed.seconds(probed) / probed.tokens * tokens["train"]
            * min(self.config.probe.num_batches * self.config.probe.batch_size, size["train"]),
            "train": steps * one_step + validate * size["validation"] / self.num_processes,
            "evaluate": test,
        }  # fmt: skip
        return {name: round(seconds, 1) for name, seconds in found.items()}


def saved_elsewhere() -> saved_tensors_hooks:
    """A context in which what is kept for the backward pass, as of checkpointed blocks what they read, does not count:
    the host holds it instead of the GPU."""
    return saved_tensors_hooks(
        lambda kept: (kept.shape, kept.dtype), lambda sent: torch.empty(sent[0], dtype=sent[1], device="meta")
    )


def _resident(transient: int, phase: str) -> int:
    return transient if has_gpu() else int(ALLOCATOR[phase] * transient)


def optimizer_workspace(model: PeftModel) -> int:
    """Factors of one shape step together, in about five tensors of their size, beside what has been made of all."""
    buckets: dict[torch.Size, int] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            buckets[parameter.shape] = buckets.get(parameter.shape, 0) + 4 * parameter.numel()
    return sum(buckets.values()) + 5 * max(buckets.values(), default=0)


@dataclass(frozen=True)
class _Speed:
    """Products at the rate of one measured now, all else at the rate of a copy: per second."""

    flops: float
    traffic: float

    def seconds(self, work: _Work) -> float:
        return work.flops / self.flops + work.traffic / self.traffic


@cache
def _speed(width: int, dtype: torch.dtype) -> _Speed:
    """This machine's, for layers that wide."""
    device, dtype = "cuda" if has_gpu() else "cpu", dtype if dtype.is_floating_point else torch.bfloat16
    x, w = (torch.ones(shape, dtype=dtype, device=device) for shape in ((1024, width), (2 * width, width)))
    block = torch.ones(2**22, dtype=dtype, device=device)
    return _Speed(
        flops=2 * 1024 * width * 2 * width / _least_seconds(lambda: x @ w.T),
        traffic=2 * block.numel() * block.element_size() / _least_seconds(lambda: block.clone()),
    )


def _least_seconds(compute: Callable[[], Any], repeats: int = 5) -> float:
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        compute()
        if has_gpu():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
