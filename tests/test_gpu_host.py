"""A base in the host's memory, on a GPU: loss and every gradient are those of the base on the GPU, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from io import StringIO

import pytest
import torch
from architectures import assert_equal, save_pico, task_of
from architectures import load_pico as load
from conftest import adapted, llama_config, make_batches, on_gpu, short_run
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sgm_finetune.base.config_file import load_config
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands.evaluate import evaluate
from sgm_finetune.measure.probe import probe
from sgm_finetune.model.residence import host
from sgm_finetune.model.residence.host import differentiable
from sgm_finetune.model.residence.host_memory import HostMemory, pin
from sgm_finetune.train.adapters.shard import reduce_factors_only
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.head_loss import find_head_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def steps(model: nn.Module, name: str, checkpointing: bool) -> dict[str, Tensor]:
    """The losses and every gradient of two steps, an evaluation before each."""
    torch.manual_seed(4)
    model = adapted(model, fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()))
    model.cuda() if not getattr(model, "is_loaded_in_4bit", False) else None
    use_fast_step(model)
    task = task_of(name)
    batches = [on_gpu(batch) for batch in make_batches(2, task="causal-lm" if task == "seq2seq-lm" else task)]
    in_parts = find_head_loss(model, {"input_ids": batches[0]["input_ids"]}) if task == "causal-lm" else None
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    found: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        model.eval()
        with torch.no_grad():
            found[f"{number} tested"] = model(**batch).loss
        model.train()
        loss = model(**batch).loss if in_parts is None else in_parts.mean(model, batch)
        loss.backward()
        found |= {f"{number} {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[f"{number} loss"] = loss.detach()
        model.zero_grad()
    assert len(found) > 6
    return found


CASES = [
    ("llama", "bfloat16", "nf4", True), ("llama", "bfloat16", "nf4", False), ("llama", "bfloat16", "none", True),
    ("llama", "float32", "none", False), ("gpt2", "float32", "none", True), ("gemma3", "bfloat16", "nf4", True),
    ("mixtral", "bfloat16", "none", True), ("bert", "bfloat16", "nf4", True), ("bert", "float32", "none", False),
    ("t5", "float32", "none", True), ("t5", "float32", "none", False), ("bart", "float32", "none", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "quantization", "checkpointing"), CASES)
def test_loss_and_every_gradient_are_those_of_the_base_on_the_gpu(name, dtype, quantization, checkpointing, tmp_path):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = save_pico(name, tmp_path / name)
    expected = steps(load(folder, name, (dtype, quantization), "device"), name, checkpointing)
    model = load(folder, name, (dtype, quantization), "host")
    with nullcontext() if checkpointing else differentiable(model):
        assert_equal(expected, steps(model, name, checkpointing))


@pytest.mark.parametrize("num_buffers", [2, 3])
@pytest.mark.parametrize("width", [512, 4096])
def test_large_blocks_arrive_before_they_compute(num_buffers, width, tmp_path, monkeypatch):
    """Blocks of 5 and 350 MiB: what computes too early reads another block's weights."""
    monkeypatch.setattr(host, "NUM_BUFFERS", num_buffers)
    config = llama_config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    expected = steps(load(tmp_path / "m", "llama", ("bfloat16", "none"), "device"), "llama", True)
    assert_equal(expected, steps(load(tmp_path / "m", "llama", ("bfloat16", "none"), "host"), "llama", True))


def test_only_buffers_are_on_the_gpu(tmp_path):
    config = llama_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=32_000)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load(tmp_path / "m", "llama", ("bfloat16", "none"), "host")
    held = torch.cuda.memory_allocated() - before
    block = sum(2 * p.numel() for p in model.model.layers[0].parameters())  # type: ignore[union-attr]
    assert 2 * block <= held < 2.2 * block
    table = 2 * 32_000 * 512
    assert torch.cuda.max_memory_allocated() - before < 2 * max(block, table)
    memories = [block.memory for block in host._buffers[model].blocks]
    assert all(memory.is_pinned for memory in memories)


def test_memory_is_pinned_as_long_as_it_is_used_and_never_twice():
    """An error of the system must not stay for the next kernel."""
    few = [HostMemory(100, pinned=True) for _ in range(50)]
    assert all(memory.is_pinned for memory in few)
    assert not pin(few[0].bytes)
    assert float(torch.ones(3, device="cuda").sum()) == 3
    place = few[0].bytes
    del few
    assert pin(place)
    assert int(torch.cuda.cudart().cudaHostUnregister(place.data_ptr())) == 0  # type: ignore[operator]
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_memory_that_cannot_be_pinned_is_copied_and_said(tmp_path, monkeypatch):
    folder = save_pico("llama", tmp_path / "m")
    expected = steps(load(folder, "llama", ("bfloat16", "none"), "device"), "llama", True)
    monkeypatch.setattr("sgm_finetune.model.residence.host_memory.pin", lambda tensor: False)
    said: list[str] = []
    model = load(folder, "llama", ("bfloat16", "none"), "host", said)
    assert len(said) == 1
    assert "the system pins no more memory" in said[0]
    assert_equal(expected, steps(model, "llama", True))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_probe_finds_the_same_sketches(quantization, tmp_path):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = save_pico("llama", tmp_path / "m")
    batches = make_batches(2, task="causal-lm")
    one, other = (
        probe(load(folder, "llama", ("bfloat16", quantization), place), batches, sketch_size=8)
        for place in ("device", "host")
    )
    assert one.loss == other.loss
    for name, halves in one.halves.items():
        for half, same in zip(halves, other.halves[name], strict=True):
            assert torch.equal(half.input, same.input)
            assert torch.equal(half.output, same.output)


def test_data_parallelism_leaves_the_base_where_it_is(tmp_path):
    from torch import distributed

    model = adapted(load(save_pico("llama", tmp_path / "m"), "llama", ("bfloat16", "none"), "host")).cuda()
    base = [p for n, p in model.named_parameters() if ".layers." in n and "lora" not in n]
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        reduce_factors_only(model)  # type: ignore[arg-type]
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[torch.cuda.current_device()])
        wrapped.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        wrapped(**on_gpu(make_batches(task="causal-lm")[0])).loss.backward()
    finally:
        distributed.destroy_process_group()
    assert len(base) > 10
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_whole_run_ends_with_the_adapter_of_the_base_on_the_gpu(quantization, tmp_path, llama_folder, reviews):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    found = {}
    for place in ("device", "host"):
        more = (f"model.quantization={quantization}", f"model.residence={place}", "training.checkpointing=true")
        overrides = short_run(llama_folder, reviews, tmp_path / place, *more)
        said = StringIO()
        metrics = pipeline.finetune(load_config(None, overrides), Console(file=said, width=200))
        assert metrics["after"]["loss"] < 0.8 * metrics["before"]["loss"]
        again = evaluate(load_config(None, overrides), overrides, Console(file=said, width=200))
        assert again["loss"] == pytest.approx(metrics["after"]["loss"], rel=0.02)
        tensors = load_file(tmp_path / place / "adapter" / "adapter_model.safetensors")
        found[place] = {"before": metrics["before"]["loss"], "after": metrics["after"]["loss"], "tensors": tensors}
        assert ("of base in the host's memory" in said.getvalue()) == (place == "host")
    assert found["host"]["before"] == found["device"]["before"]
    assert found["host"]["after"] == found["device"]["after"]
    assert_equal(found["device"]["tensors"], found["host"]["tensors"])
