"""One run of benchmarks/quality.py: adapts, trains and measures a method, and returns its record.

All methods see the same batches of the same seed. The learning rate warms up for 6 % of the steps and then falls
linearly to zero; gradients are clipped to norm 1; a new classification head learns at 1e-3 in every method. For causal
language models, logits are formed only where an answer is predicted.
"""

from __future__ import annotations

import math
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from quality_adapt import Adapted, Base, adapter_only, budget_of, head_parameters
from quality_methods import METHODS
from quality_tasks import TASKS, TUNING_SEED, Task
from recording import processor
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.data.batches import LengthGroupedSampler, by_length
from sgm_finetune.data.prepared import PreparedData, prepare_data
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.adapters.optimizer import HEAD_RATE
from sgm_finetune.train.base_model import load_base_weights
from sgm_finetune.train.budget.reuse import with_rank

WARMUP = 0.06


def load(task: Task, seed: int) -> Base:
    """Loads the task's data and base model."""
    logging.disable_progress_bar()
    log = StepLog(Console(quiet=True))
    with tempfile.TemporaryDirectory() as scratch:
        settings = [*task.configuration(Path(scratch)), f"adapter.rank={task.rank}", f"training.seed={seed}"]
        config = load_config(None, settings)
        prepared = prepare_data(config, log)
    model, _ = load_base_weights(config, prepared.folder, prepared.head, log)
    if task.parameters is None:
        return Base(task.name, config, prepared, model, log, budget_of(model, task.rank), seed)
    config = with_rank(config, max(1, task.parameters // budget_of(model, 1)))
    return Base(task.name, config, prepared, model, log, task.parameters, seed)


def train_once(task_name: str, method_name: str, rate: float, seed: int, threads: int) -> dict[str, Any]:
    """The record of one run. The tuning seed is measured on validation data, every other seed on test data."""
    torch.set_num_threads(threads)
    task, base = TASKS[task_name], load(TASKS[task_name], seed)
    prepared, num_layers = base.prepared, len(adaptable(base.model))
    torch.manual_seed(seed)
    adapted = METHODS[method_name].adapt(base)
    optimizers = optimizers_of(adapted, rate)
    losses, seconds = train(adapted, optimizers, base, task) if optimizers else ([], [])
    part = "validation" if seed == TUNING_SEED else "test"
    adapter = adapter_only(adapted.model)
    device = next(adapted.model.parameters()).device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "task": task_name,
        "method": method_name,
        "rate": rate,
        "seed": seed,
        "tier": "GPU" if gpu else "CPU",
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "rank": adapted.rank,
        "steps": len(losses),
        "batch_size": task.batch_size,
        "layers": num_layers,
        "trained_parameters": sum(p.numel() for p in adapter),
        "budget": base.budget,
        "optimizer_bytes": state_bytes(optimizers, adapter),
        "adapter_file_bytes": adapter_file(adapted.model),
        "measuring_seconds": round(adapted.seconds, 1),
        "energy_retained": adapted.energy_retained and round(adapted.energy_retained, 4),
        "seconds_per_step": round(statistics.median(seconds), 4) if seconds else None,
        "train_loss": round(statistics.fmean(losses[-20:]), 4) if losses else None,
        part: evaluate(adapted.model, getattr(prepared, part).dataset, prepared),
        "threads": threads,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
        "device": gpu or processor()["processor"],
        "versions": {
            "python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "peft")},
        },
    }  # fmt: skip


def optimizers_of(adapted: Adapted, rate: float) -> list[torch.optim.Optimizer]:
    """The method's own optimizers, and AdamW for a new classification head; empty for the untouched model."""
    optimizers, heads = adapted.optimizers(rate), head_parameters(adapted.model)
    if optimizers and heads:
        optimizers.append(torch.optim.AdamW(heads, lr=HEAD_RATE, weight_decay=0.0))
    return optimizers


def time_steps(task_name: str, method_name: str, threads: int, num_steps: int = 12) -> float:
    """Seconds per step: the median of `num_steps` steps without the first two."""
    torch.set_num_threads(threads)
    task, base = TASKS[task_name], load(TASKS[task_name], 0)
    method = METHODS[method_name]
    torch.manual_seed(0)
    adapted = method.adapt(base)
    optimizers = optimizers_of(adapted, method.rates[0])
    return statistics.median(train(adapted, optimizers, base, replace(task, num_steps=num_steps))[1][2:])


def train(
    adapted: Adapted, optimizers: list[torch.optim.Optimizer], base: Base, task: Task
) -> tuple[list[float], list[float]]:
    """Trains; returns the loss and the seconds of every step. Stops early at a loss that is not finite."""
    warmup = max(1, round(WARMUP * task.num_steps))

    def share(step: int) -> float:
        return min((step + 1) / warmup, (task.num_steps - step) / (task.num_steps - warmup + 1))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    model = adapted.model
    trained = [p for p in model.parameters() if p.requires_grad]
    losses: list[float] = []
    seconds: list[float] = []
    model.train()
    for batch in islice(batches(base.prepared, task.batch_size, base.seed), task.num_steps):
        started = time.perf_counter()
        loss = mean_loss(adapted, batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return losses, seconds


def batches(prepared: PreparedData, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yields batches of similar length, epoch after epoch."""
    dataset = prepared.train.dataset
    sampler = LengthGroupedSampler([len(ids) for ids in dataset["input_ids"]], batch_size, seed)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for at in range(0, len(order), batch_size):
            yield prepared.collate([dataset[i] for i in order[at : at + batch_size]])
        epoch += 1


def mean_loss(adapted: Adapted, batch: dict[str, Tensor]) -> Tensor:
    if adapted.head_loss is None:
        return nn.functional.cross_entropy(*predictions(adapted.model, batch))
    device = next(adapted.model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    total, count = adapted.head_loss(adapted.model, batch, batch.pop("labels"))
    return total / count


def predictions(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits in float32 and their targets, one row for each example (classification), tagged word or answer token."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    targets = batch.pop("labels")
    if targets.dim() == 1:
        return model(**batch).logits.float(), targets
    if tags_words(model):
        logits = model(**batch).logits
        return logits[targets != -100].float(), targets[targets != -100]
    following = targets[:, 1:]
    places = (following != -100).any(0).nonzero().squeeze(1)
    logits, following = model(**batch, logits_to_keep=places).logits, following[:, places]
    return logits[following != -100].float(), following[following != -100]


def tags_words(model: nn.Module) -> bool:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base).__name__.endswith("ForTokenClassification")


def evaluate(model: nn.Module, dataset: Dataset, prepared: PreparedData, batch_size: int = 32) -> dict[str, float]:
    """Mean loss per example (classification), tagged word or answer token, and `right`: accuracy, or the fraction of
    sentences or answers whose every tag or token, the end included, is the model's first choice (for an answer: so that
    greedy decoding reproduces it exactly)."""
    order, total, count, right = by_length(dataset), 0.0, 0, 0
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(order), batch_size):
            batch = prepared.collate([dataset[i] for i in order[at : at + batch_size]])
            tokens = [1] * len(batch["labels"])
            if batch["labels"].dim() == 2:
                first = 0 if tags_words(model) else 1
                tokens = (batch["labels"][:, first:] != -100).sum(1).tolist()
            logits, targets = predictions(model, batch)
            total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
            hits = (logits.argmax(-1) == targets).split(tokens)
            right += sum(bool(hit.all()) for hit in hits)
    return {"loss": round(total / count, 5), "right": round(right / len(order), 5), "num_examples": len(order)}


def state_bytes(optimizers: list[torch.optim.Optimizer], adapter: list[nn.Parameter]) -> int:
    """Bytes of the adapter's optimizer states, without scalars."""
    states = [optimizer.state.get(p, {}) for p in adapter for optimizer in optimizers]
    tensors = [t for state in states for t in state.values() if isinstance(t, Tensor) and t.dim()]
    return sum(t.numel() * t.element_size() for t in tensors)


def adapter_file(model: nn.Module) -> int | None:
    """Bytes that `save_pretrained` writes, without a classification head; None for a model without an adapter."""
    if not hasattr(model, "peft_config"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        stored = load_file(Path(folder) / "adapter_model.safetensors")
        return sum(t.numel() * t.element_size() for name, t in stored.items() if "classifier" not in name)
