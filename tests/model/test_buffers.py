"""A base in the host's memory, copied into buffers block by block: equal to the resident one bit for bit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapted, llama_config, make_batches
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.model.load import load_model
from sgm_finetune.model.names import block_of
from sgm_finetune.model.residence.buffers import Block, Buffers, copy_beside, frozen_tensors, stream
from sgm_finetune.train.fast.adapter_forward import use_fast_step


def moved(tensors: dict[str, list[Tensor]]) -> dict[str, Block]:
    return {name: Block(block, pinned=False) for name, block in tensors.items()}


def frozen(model: nn.Module) -> dict[str, list[Tensor]]:
    """Block -> its tensors that are not trained, with the scales of 4-bit weights."""
    blocks = dict.fromkeys(block for name, _ in model.named_parameters() if (block := block_of(name)) is not None)
    return {block: frozen_tensors(model.get_submodule(block)) for block in blocks}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(llama_config(num_hidden_layers=5)).save_pretrained(place)
    return place


def made(folder: Path, quantization: str, num_buffers: int | None) -> nn.Module:
    """An adapted model with checkpointing; None: in memory as a whole."""
    config = ModelConfig(name=str(folder), task="causal-lm", dtype="bfloat16", quantization=quantization)  # type: ignore
    base = load_model(config, folder)[0]
    torch.manual_seed(4)
    model = adapted(base)
    use_fast_step(model)
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    if num_buffers is not None:
        stream(model, moved(frozen(model)), torch.device("cpu"), num_buffers)
    return model


def two_steps(model: nn.Module) -> list[Tensor]:
    """The loss of an evaluation, then loss and gradients of two steps, an evaluation between them."""
    found = []
    for batch in make_batches(2, task="causal-lm"):
        model.eval()
        with torch.no_grad():
            found.append(model(**batch).loss)
        model.train()
        loss = model(**batch).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize("num_buffers", [2, 3])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loss_and_every_gradient_are_those_of_the_resident_base(quantization, num_buffers, folder):
    expected = two_steps(made(folder, quantization, None))
    found = two_steps(made(folder, quantization, num_buffers))
    assert len(expected) == len(found) > 100
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_a_step_may_follow_an_evaluation_in_inference_mode(folder):
    steps = []
    for num_buffers in (None, 2):
        model = made(folder, "none", num_buffers)
        batch = make_batches(task="causal-lm")[0]
        with torch.inference_mode():
            model(**batch)
        loss = model.train()(**batch).loss
        loss.backward()
        steps.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*steps, strict=True))


class Product(torch.autograd.Function):
    """x Wᵀ, which keeps W where autograd does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight.detach()
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.weight, None


class Layer(nn.Linear):
    hides = False

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight) if self.hides else super().forward(x)  # type: ignore[return-value]


def gradient_of(model: nn.Sequential) -> Tensor:
    x = torch.ones(2, 8, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    return x.grad


kept: list[Buffers] = []
"""The buffers of the last model that `streamed` made."""


def streamed(num_buffers: int) -> tuple[nn.Sequential, Tensor]:
    """Seven layers without checkpointing, each in a block, and the gradient that they gave before."""
    model = nn.Sequential(*(nn.Sequential(Layer(8, 8, bias=False)) for _ in range(7))).requires_grad_(False)
    expected = gradient_of(model)
    blocks = {str(n): list(block.parameters()) for n, block in enumerate(model)}
    kept[:] = [stream(model, moved(blocks), torch.device("cpu"), num_buffers)]
    return model, expected


@pytest.mark.parametrize("num_buffers", [2, 3])
def test_a_buffer_that_is_used_again_under_a_kept_tensor_is_noticed(num_buffers):
    """Autograd keeps weights here, since nothing is checkpointed."""
    model, _ = streamed(num_buffers)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient_of(model)


@pytest.mark.parametrize("num_buffers", [2, 3])
def test_what_a_function_keeps_by_itself_is_right_since_a_block_returns_to_its_buffer(num_buffers, monkeypatch):
    """In another buffer it would not be: the comparison of gradients notices."""
    monkeypatch.setattr(Layer, "hides", True)
    model, expected = streamed(num_buffers)
    assert torch.equal(gradient_of(model), expected)
    fetched: list[int] = []

    def another(buffers: Buffers, index: int) -> int:
        fetched.append(index)
        return (index + (len(fetched) > 7)) % num_buffers

    monkeypatch.setattr(Buffers, "place", another)
    model, expected = streamed(num_buffers)
    assert not torch.equal(gradient_of(model), expected)


def test_no_more_than_the_buffers_is_on_the_device(folder):
    model = made(folder, "none", None)
    buffers = stream(model, moved(frozen(model)), torch.device("cpu"), 2)
    largest = max(block.host.numel() for block in buffers.blocks)
    assert [buffer.numel() for buffer in buffers.buffers] == [largest, largest]
    assert not any(is_there(tensor) for tensors in frozen(model).values() for tensor in tensors)
    two_steps(model)
    held = [n for n, tensors in enumerate(frozen(model).values()) if is_there(tensors[0])]
    assert held == sorted(n for n in buffers.holds if n is not None) == [0, 1]


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor has all of its numbers; one that is elsewhere has a single NaN."""
    there = tensor.untyped_storage().nbytes() > tensor.element_size()
    assert there or not tensor.dtype.is_floating_point or bool(tensor.isnan().all())
    return there


@pytest.mark.parametrize("num_buffers", [2, 3])
def test_without_checkpointing_autograd_reads_what_it_kept_where_its_block_is(num_buffers):
    model, expected = streamed(num_buffers)
    with kept[0].kept_by_place():
        assert torch.equal(gradient_of(model), expected)


def test_autograd_refuses_what_it_kept_by_place_when_another_block_is_there(monkeypatch):
    model, _ = streamed(2)
    buffers = kept[0]
    with buffers.kept_by_place():
        loss = model(torch.ones(2, 8, requires_grad=True)).sum()
    buffers.enter(0, 1)
    monkeypatch.setattr(buffers, "_fetch", lambda index: None)  # nothing comes back for the backward pass
    with pytest.raises(AssertionError, match="another block"):
        loss.backward()


def test_an_interrupt_while_a_block_is_fetched_leaves_a_model_that_computes(monkeypatch):
    """Whoever stops an answer goes on with the next one."""
    model, _ = streamed(2)
    x = torch.ones(2, 8)
    with torch.no_grad():
        expected = model(x)
        for when in range(1, 12):
            copies = []

            def interrupted(*given: Any, when: int = when, copies: list = copies) -> None:
                copies.append(given)
                if len(copies) == when:
                    raise KeyboardInterrupt
                copy_beside(*given)

            with monkeypatch.context() as patched:
                patched.setattr("sgm_finetune.model.residence.buffers.copy_beside", interrupted)
                with suppress(KeyboardInterrupt):
                    model(x)
                    model(x)
            assert torch.equal(model(x), expected), when
