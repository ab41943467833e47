"""The phases of a run, followed over a model without numbers: the test, the answers, the probe, a step.

Each phase runs the run's own code on tensors of device "meta" (`footprint.py`), on the largest batch that the data
have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sgm_finetune.base.config import Config, Optimizer
from sgm_finetune.base.processes import processes
from sgm_finetune.data.batches import (
    PAIR_COLUMNS,
    LengthGroupedSampler,
    divide_batch,
    draw_of,
    longest_first,
    num_predictions,
    num_steps,
)
from sgm_finetune.data.encoding import num_tokens, sequence_lengths
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.data.questions import answer_limit, asked_indices, has_answers, questions
from sgm_finetune.measure.probe import following, readers_of_same_activations
from sgm_finetune.measure.probe_batches import probe_batches, probe_pieces
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.budget.footprint import Footprint, Piece, saved_elsewhere
from sgm_finetune.train.budget.repeats import Block, NotAlikeError, Repeats, block_lists, repeating
from sgm_finetune.train.fast.prepare import prepare_base
from sgm_finetune.train.full.optimizers import update_bytes
from sgm_finetune.train.losses import summed_loss
from sgm_finetune.train.preference import PreferenceLoss

_NUM_EPOCHS = 3
"""Epochs whose batches are looked at for the largest one."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Work:
    """What one batch needs beside the model."""

    peak: int = 0
    """Most bytes of tensors that are alive at one time."""
    wide: int = 0
    """Bytes at the peak of tensors as wide as the vocabulary."""
    flops: int = 0
    """Floating-point operations of matrix products."""
    traffic: int = 0
    """Bytes that all operations read and wrote."""
    tokens: int = 1


class Follower:
    """Follows the phases of the run that `config` and `prepared` describe over `model`, which has no numbers.

    Changes `model` as the run does before it tests it (`prepare_base`).
    """

    def __init__(self, config: Config, prepared: PreparedData, model: PreTrainedModel):
        self.config, self.prepared, self.model = config, prepared, model
        self.micro_batch_size, self.num_micro_batches = divide_batch(config, processes().num_processes)
        self.vocabulary_size = getattr(model.config.get_text_config(), "vocab_size", -1)
        splits = {name: getattr(prepared, name).dataset for name in ("train", "validation", "test")}
        self.lengths = {name: sequence_lengths(dataset) for name, dataset in splits.items()}
        """Split -> number of tokens of each example, of the longer sequence if it has two."""
        self.num_tokens = {name: num_tokens(dataset) for name, dataset in splits.items()}
        """Split -> number of tokens of all sequences."""
        first, _ = self._longest_batch("train", min(2, len(prepared.train.dataset)))
        self._blocks: dict[nn.Module, list[list[Block]]] = {}
        self.may_repeat = self._can_repeat(first)
        blocks = self._block_lists(model) if self.may_repeat else []
        with Footprint(num_selected=len(first["input_ids"])) as footprint, repeating(model, footprint, blocks):
            self.head_loss = prepare_base(config, model, (), first).head_loss
        self.preference = (
            PreferenceLoss(config.preference, self.head_loss) if config.model.task == "preference" else None
        )

    def test(self, split: str, model: nn.Module) -> Work:
        """The loss of the longest batch of `split`, without gradients."""
        batch, predicted = self._longest_batch(split, self.config.training.eval_batch_size)

        def run(_: Repeats) -> None:
            model.eval()
            with torch.no_grad():
                self._loss(model, batch)

        needed, _ = self._follow(model, predicted, run)
        return _work(needed, batch["input_ids"].numel())

    def answer(self, model: nn.Module) -> Work:
        """The answers to the first test questions: a forward pass over the prompts, and a cache that grows by the
        answers. Nothing where the task has no answers or `evaluation.num_generated` is 0."""
        task, test = self.config.model.task, self.prepared.test.dataset
        indices = asked_indices(test, self.config.evaluation.num_generated)
        if not indices or not has_answers(test, task):
            return Work()
        asked = questions(test, indices, task)
        size, prompt = min(self.config.training.eval_batch_size, len(indices)), max(len(q.prompt) for q in asked)
        limit = answer_limit(asked)
        ids = torch.zeros(size, prompt, dtype=torch.long, device="meta")
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
        if task == "seq2seq-lm":
            inputs["decoder_input_ids"] = torch.zeros(size, limit, dtype=torch.long, device="meta")
        elif self.head_loss is not None:
            inputs["logits_to_keep"] = 1

        def run(_: Repeats) -> Any:
            model.eval()
            with torch.no_grad():
                return model(**inputs)  # its cache counts

        needed, _ = self._follow(model, 1, run)
        grown = needed.kept if task == "seq2seq-lm" else needed.kept * (prompt + limit) // prompt
        # a layer copies its keys and values whenever they grow
        return _work(needed, size * (prompt + limit), peak=max(needed.peak, 2 * grown))

    def probe(self) -> tuple[Work, int]:
        """The gradients of the largest piece of a probe batch, and the bytes of the sketches of both halves. The
        sketches of one half are among the work's peak too."""
        batches = probe_batches(self.config, self.prepared)
        pieces = [piece for batch in batches for piece, _ in probe_pieces(self.config, batch)]
        batch, predicted = self._without_numbers(max(pieces, key=lambda piece: piece["input_ids"].numel()))
        predicted = self._at_once(predicted)

        def run(repeats: Repeats) -> int:
            with following(self.model, self.config.probe.sketch_size, self.config.probe.seed) as sketch_bytes:
                self._loss(self.model, batch).backward()
                return sketch_bytes(repeats.expand)

        needed, num_bytes = self._follow(self.model, predicted, run)
        return _work(needed, batch["input_ids"].numel()), 2 * num_bytes

    def step(self, model: nn.Module) -> Work:
        """The forward and backward pass of the largest micro-batch, beside the gradients of earlier ones. KTO first
        computes the other answers."""
        batch, predicted = self._largest_micro_batch()
        predicted = self._at_once(predicted)
        offload = self.config.training.checkpointing == "offload"
        own = self.head_loss is None and self.config.model.task in ("causal-lm", "sequence-classification")

        def run(_: Repeats) -> None:
            model.train()
            with saved_elsewhere() if offload else nullcontext():
                if self.preference is not None and not self.preference.settings.has_pairs:
                    self.preference.moved(model, batch)
                loss = model(**batch).loss if own else self._loss(model, batch)
                loss.backward()

        with _updates(model, self.config.optimizer) if self.config.is_full else nullcontext():
            needed, _ = self._follow(model, predicted, run)
        earlier_gradients = 0
        if self.num_micro_batches > 1:
            whole = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            earlier_gradients = whole if self.config.is_full else needed.kept
        return _work(needed, batch["input_ids"].numel(), peak=needed.peak + earlier_gradients)

    def readers(self) -> list[list[str]]:
        """Names of all matrices of the model, those that read the same activations together."""
        batch, _ = self._longest_batch("train", 1)

        def run(repeats: Repeats) -> list[list[str]]:
            with torch.no_grad():
                groups = readers_of_same_activations(self.model, lambda: self._loss(self.model, batch))
            return repeats.group(groups, adaptable(self.model))

        return self._follow(self.model, 1, run)[1]

    def _block_lists(self, model: nn.Module) -> list[list[Block]]:
        if model not in self._blocks:
            self._blocks[model] = block_lists(model)
        return self._blocks[model]

    def _can_repeat(self, batch: dict[str, Tensor]) -> bool:
        """Whether the model runs without some of the blocks that are alike."""
        footprint, blocks = Footprint(num_selected=len(batch["input_ids"])), self._block_lists(self.model)
        try:
            with footprint, repeating(self.model, footprint, blocks) as repeats, torch.no_grad():
                self.model(**{name: x for name, x in batch.items() if name not in PAIR_COLUMNS})
                repeats.total()
        except Exception:  # whatever the model's code raises, the whole model may run
            return False
        return True

    def _follow(self, model: nn.Module, predicted: int, run: Callable[[Repeats], _T]) -> tuple[Piece, _T]:
        """What `run` needs when it computes `model`, and what it returns, which counts as alive at its end.

        Of blocks that are alike few are computed, or all if they differ after all.
        """
        if self.may_repeat:
            try:
                return self._follow_with(model, predicted, run, self._block_lists(model))
            except NotAlikeError:
                pass
        return self._follow_with(model, predicted, run, [])

    def _follow_with(
        self, model: nn.Module, predicted: int, run: Callable[[Repeats], _T], blocks: list[list[Block]]
    ) -> tuple[Piece, _T]:
        try:
            with self._footprint(model, predicted) as footprint, repeating(model, footprint, blocks) as repeats:
                result = run(repeats)
                return repeats.total(), result
        finally:
            for parameter in model.parameters():
                parameter.grad = None

    def _longest_batch(self, split: str, size: int) -> tuple[dict[str, Tensor], int]:
        """The `size` longest examples of a split, and the number of their predictions."""
        dataset = getattr(self.prepared, split).dataset
        indices = longest_first(self.lengths[split])[:size]
        return self._without_numbers(self.prepared.collate([dataset[i] for i in indices]))

    def _largest_micro_batch(self) -> tuple[dict[str, Tensor], int]:
        """The micro-batch with the most tokens of the first epochs, in the order in which training takes them."""
        dataset, lengths = self.prepared.train.dataset, self.lengths["train"]
        batch_size = self.config.training.batch_size
        seed = self.config.training.seed
        sampler = LengthGroupedSampler(lengths, batch_size, seed, draw_of(self.config, dataset, seed))
        num_left, largest, most = batch_size * num_steps(self.config, len(lengths)), [0], 0
        for epoch in range(_NUM_EPOCHS):
            sampler.set_epoch(epoch)
            order = list(sampler)[: max(0, num_left)]
            num_left -= len(order)
            for first in range(0, len(order), self.micro_batch_size):
                indices = order[first : first + self.micro_batch_size]
                num_tokens = len(indices) * max(lengths[i] for i in indices)
                if num_tokens > most:
                    largest, most = indices, num_tokens
        return self._without_numbers(self.prepared.collate([dataset[i] for i in largest]))

    def _at_once(self, predicted: int) -> int:
        """The predictions of a batch that are computed together: KTO's two halves are not."""
        halves = self.preference is not None and not self.preference.settings.has_pairs
        return max(1, predicted // 2) if halves else predicted

    def _without_numbers(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """The batch on device "meta", and the number of its predictions."""
        is_preference = self.config.model.task == "preference"  # whose head predicts tokens, and whose loss pairs
        predicted = num_predictions(batch["labels"], "causal-lm" if is_preference else self.config.model.task)
        if is_preference and self.config.preference.has_reference:
            batch = {**batch, "reference": torch.zeros(len(batch["labels"]))}
        return {name: tensor.to("meta") for name, tensor in batch.items()}, max(1, predicted)

    def _footprint(self, model: nn.Module, predicted: int) -> Footprint:
        return Footprint([*model.parameters(), *model.buffers()], predicted, self.vocabulary_size)

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        task = self.config.model.task
        if self.preference is not None:
            return self.preference.mean(model, batch)
        if self.head_loss is not None:
            return self.head_loss.mean(model, batch)
        labels = batch["labels"]
        inputs = batch if task == "seq2seq-lm" else {name: x for name, x in batch.items() if name != "labels"}
        return summed_loss(model(**inputs).logits, labels, task)[0]


@contextmanager
def _updates(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """A context in which the backward pass frees each gradient after an update, as `BackwardUpdates` does."""

    def update(parameter: Tensor) -> None:
        # the tensors of the update live together for a moment
        _ = torch.empty(update_bytes(optimizer, parameter), dtype=torch.uint8, device=parameter.device)
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(update) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _work(needed: Piece, num_tokens: int, peak: int | None = None) -> Work:
    return Work(needed.peak if peak is None else peak, needed.wide_at_peak, needed.flops, needed.traffic, num_tokens)
