"""What only a GPU can show: its kernels give the numbers of a CPU, and a whole run works."""

from __future__ import annotations

import copy
import warnings
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import llama_config, make_batches, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.config_file import load_config
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands.evaluate import evaluate
from sgm_finetune.model.load import Head, load_model
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.adapters.optimizer import FactorDescent, Pair
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.head_loss import find_head_loss, linear_cross_entropy
from sgm_finetune.train.fast.liger import use_liger

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def _llama_as_it_was():
    """Restores Transformers' module, of which Liger replaces parts for the whole process, also for later CPU models."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.cuda() for name, x in batch.items()}


def adapted(model: nn.Module):
    """As conftest's `adapted`, but with the same numbers on every device."""
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(adaptable(model))))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return made


def gradients(model: nn.Module, batch: dict[str, torch.Tensor], in_parts=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss if in_parts is None else in_parts.mean(model, batch)
    loss.backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def off(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    difference = sum(float((found[name] - g).square().sum()) for name, g in wanted.items())
    return (difference / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=str)
def test_ligers_kernels_and_the_fast_step_have_the_gradients_of_a_cpu(dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("liger_kernel")
    slow = adapted(make_model("causal-lm"))
    batch = make_batches(1, task="causal-lm", length=40)[0]
    wanted = gradients(slow, batch)
    fast = adapted(make_model("causal-lm").to("cuda", dtype))
    assert use_liger(fast.get_base_model(), {"input_ids": batch["input_ids"].cuda()}) is None
    assert use_fast_step(fast) == []
    in_parts = find_head_loss(fast, {"input_ids": batch["input_ids"].cuda()})
    assert in_parts is not None
    assert off(gradients(fast, on_gpu(batch), in_parts), wanted) < tolerance


def test_a_model_that_liger_does_not_know_is_named() -> None:
    pytest.importorskip("liger_kernel")
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2)).cuda()
    assert (
        use_liger(model, {"input_ids": torch.ones(1, 4, dtype=torch.long).cuda()})
        == "liger-kernel has no kernels for gpt2"
    )


def test_in_four_bits_the_fast_step_has_pefts_gradients(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(llama_config(num_hidden_layers=2)).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), task="causal-lm", quantization="nf4")
    slow = adapted(load_model(config, tmp_path, Head(pad_token_id=0))[0])
    fast = copy.deepcopy(slow)
    assert use_fast_step(fast) == []
    batch = on_gpu(make_batches(1, task="causal-lm", length=40)[0])
    assert off(gradients(fast, batch), gradients(slow, batch)) < 0.03


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (96, 160), (320, 1024)])
def test_one_kernel_dequantises_as_bitsandbytes_does(shape: tuple[int, int], nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    pytest.importorskip("triton")
    from sgm_finetune.train.fast.nf4_kernel import dequantize

    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(shape).to("cuda", dtype)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
        assert torch.equal(dequantize(packed, state, dtype), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_in_parts_is_the_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgm_finetune.train.fast.head_loss.NUM_LOGITS", {"cpu": 100, "cuda": 100})
    hidden = torch.randn(2, 9, 16).to("cuda", dtype).requires_grad_()
    weight = torch.randn(32, 16).to("cuda", dtype)
    labels = torch.randint(0, 32, (2, 9)).cuda()
    labels[0, :4] = -100
    total, _ = linear_cross_entropy(hidden, weight, labels)
    (found,) = torch.autograd.grad(total, hidden)
    logits = (hidden.double() @ weight.double().T)[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, hidden)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(total.double(), expected, atol=0, rtol=tolerance)
    torch.testing.assert_close(
        found.double(), wanted.double(), atol=tolerance * float(wanted.abs().max()), rtol=tolerance
    )


def factors(device: str) -> list[Pair]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for width in (64, 64, 96):
        a, b = (nn.Parameter(torch.randn(*s, generator=draw).to(device)) for s in ((8, 128), (width, 8)))
        a.grad, b.grad = (torch.randn(*s, generator=draw).to(device) for s in ((8, 128), (width, 8)))
        made.append(Pair(a, b, 2.0))
    return [*made, Pair(made[0].a, made[2].b, 2.0)]


def test_the_optimizer_steps_as_on_a_cpu() -> None:
    here, there = factors("cuda"), factors("cpu")
    for pairs in (here, there):
        optimizer = FactorDescent(pairs, lr=0.1)
        for _ in range(3):
            optimizer.step()
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one.a.detach().cpu(), other.a.detach(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(one.b.detach().cpu(), other.b.detach(), atol=1e-4, rtol=1e-3)


def test_a_step_waits_for_the_gpu_a_few_times_whatever_the_number_of_layers() -> None:
    model = adapted(make_model("causal-lm", num_hidden_layers=8).cuda())
    assert use_fast_step(model) == []
    batch = on_gpu(make_batches(1, task="causal-lm")[0])
    labels = batch.pop("labels")
    in_parts = find_head_loss(model, batch)
    assert in_parts is not None
    from sgm_finetune.train.adapters.optimizer import create_optimizer

    optimizer = create_optimizer(model, lr=0.01)

    def step() -> None:
        total, count = in_parts(model, batch, labels)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= 8, waits


@pytest.mark.parametrize(
    ("quantization", "checkpointing"), [("none", "false"), ("nf4", "true"), ("nf4", "offload"), ("int8", "false")]
)
def test_a_whole_run_learns_and_is_evaluated_again(
    quantization: str, checkpointing: str, tmp_path: Path, reviews: Path
) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    model = tmp_path / "pico"
    LlamaForCausalLM(llama_config(num_hidden_layers=2)).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    overrides = [
        f"model.name={model}", f"model.quantization={quantization}", "model.dtype=bfloat16", f"data.train={reviews}",
        "data.max_length=32", "probe.num_batches=4", "probe.sketch_size=12", "adapter.rank=4", "training.max_steps=20",
        "training.batch_size=16", f"training.checkpointing={checkpointing}", f"output.dir={tmp_path / 'out'}",
    ]  # fmt: skip
    printed = StringIO()
    metrics = pipeline.finetune(load_config(None, overrides), Console(file=printed, width=200))
    assert metrics["after"]["loss"] < 0.8 * metrics["before"]["loss"]
    again = evaluate(load_config(None, overrides), overrides, Console(file=printed, width=200))
    assert again["loss"] == pytest.approx(metrics["after"]["loss"], rel=0.02)
