"""What only a GPU can show: its kernels give the numbers of a CPU, and a whole run works."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import llama_config, make_batches, make_model, make_tokenizer, on_gpu, short_run
from peft import LoraConfig, get_peft_model
from processes import losses, remove
from rich.console import Console
from torch import nn

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import NotFiniteError
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands.evaluate import evaluate
from sgm_finetune.method.rounding import stochastic_round
from sgm_finetune.model.load import Head, load_model
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.adapters.optimizer import FactorDescent, Pair
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.head_loss import find_head_loss, linear_cross_entropy
from sgm_finetune.train.fast.liger import use_liger
from sgm_finetune.train.full.optimizers import make_optimizers
from sgm_finetune.train.full.update import BackwardUpdates

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


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


def test_ligers_kernels_stay_with_their_model() -> None:
    """A model made later is on device "meta" where memory is predicted: a kernel there would read from address 0."""
    pytest.importorskip("liger_kernel")
    batch = make_batches(1, task="causal-lm", length=40)[0]
    expected = make_model("causal-lm")(**batch).loss
    for _ in range(2):
        model = make_model("causal-lm").cuda()
        assert use_liger(model, {"input_ids": batch["input_ids"].cuda()}) is None
        assert "liger" in model.model.norm.forward.__module__
        assert make_model("causal-lm")(**batch).loss == expected
        with torch.device("meta"):
            empty = type(model)(model.config)
        assert empty(batch["input_ids"].to("meta")).logits.is_meta
        torch.cuda.synchronize()
        assert float(model(**on_gpu(batch)).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


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
    more = (f"model.quantization={quantization}", f"training.checkpointing={checkpointing}")
    overrides = short_run(model, reviews, tmp_path / "out", *more)
    printed = StringIO()
    metrics = pipeline.finetune(load_config(None, overrides), Console(file=printed, width=200))
    assert metrics["after"]["loss"] < 0.8 * metrics["before"]["loss"]
    again = evaluate(load_config(None, overrides), overrides, Console(file=printed, width=200))
    assert again["loss"] == pytest.approx(metrics["after"]["loss"], rel=0.02)


def test_rounding_is_unbiased_and_takes_one_of_the_two_neighbours() -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    values = torch.randn(1000, generator=draw, device="cuda")
    bits = values.view(torch.int32).bitwise_and(-(2**16))
    nearer, farther = bits.view(torch.float32), (bits + 2**16).view(torch.float32)  # seen from zero
    drawn = torch.stack([stochastic_round(values, draw) for _ in range(2000)])
    assert drawn.dtype == torch.bfloat16
    assert bool(((drawn == nearer) | (drawn == farther)).all())
    unit = (farther - nearer).abs().double()
    off_by = (drawn.double().mean(0) - values.double()) / unit
    assert float(off_by.abs().max()) < 5 * 0.5 / math.sqrt(2000)
    exact = values.bfloat16()
    assert torch.equal(stochastic_round(exact.float(), draw), exact)
    again = [stochastic_round(values, torch.Generator("cuda").manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)


def whole_matrices(model: Path, reviews: Path, output: Path, *more: str) -> list[str]:
    """Overrides of a run that trains whole matrices in bfloat16."""
    return [
        f"model.name={model}", "model.dtype=bfloat16", f"data.train={reviews}", "data.max_length=32",
        "adapter.kind=full", "training.batch_size=16", "training.learning_rate=1e-3", *more, f"output.dir={output}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "checkpointing"), [("adafactor", "false"), ("adamw_8bit", "true"), ("muon", "true")]
)
def test_whole_matrices_learn_and_are_evaluated_again(
    optimizer: str, checkpointing: str, tmp_path: Path, llama_folder: Path, reviews: Path
) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    overrides = whole_matrices(
        llama_folder, reviews, tmp_path / "out", "training.max_steps=40", f"training.optimizer={optimizer}",
        f"training.checkpointing={checkpointing}",
    )  # fmt: skip
    console = Console(file=StringIO(), width=200)
    metrics = pipeline.finetune(load_config(None, overrides), console)
    assert metrics["optimizer"] == optimizer
    assert metrics["after"]["loss"] < 0.8 * metrics["before"]["loss"]
    trained = torch.load(tmp_path / "out" / "sgm_finetuned.pth", weights_only=True)["tensors"]
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in trained.values())
    again = evaluate(load_config(None, overrides), overrides, console)
    assert again["loss"] == pytest.approx(metrics["after"]["loss"], rel=0.02)


def test_a_gradient_that_is_not_finite_leaves_every_later_matrix_as_it_was() -> None:
    model = make_model("causal-lm").to("cuda", torch.bfloat16)
    named = {f"{name}.weight": matrix.module.weight for name, matrix in adaptable(model).items()}
    updates = BackwardUpdates(named, lambda s: make_optimizers("adamw", s, set(named), 1e-2, 0.0), 1e-2, 1.0)
    name = "model.layers.1.self_attn.q_proj.weight"
    before = {n: p.detach().clone() for n, p in named.items()}
    model.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)
    with updates.attached():
        model(**on_gpu(make_batches(1, task="causal-lm")[0])).loss.backward()
        with pytest.raises(NotFiniteError, match=rf"`{name}` is not finite at step 1"):
            updates.step()
    changed = {n for n, p in named.items() if not torch.equal(before[n], p)}
    assert changed  # those above it
    assert name not in changed
    assert not [n for n in changed if ".layers.0." in n]
    assert all(bool(p.isfinite().all()) for p in named.values())


def test_a_resumed_run_of_whole_matrices_is_the_uninterrupted_one(
    tmp_path: Path, llama_folder: Path, reviews: Path
) -> None:
    """Stochastic rounding, gradients of two micro-batches, the upper half of the matrices; bit for bit."""

    def run(output: Path, *more: str) -> dict:
        overrides = whole_matrices(
            llama_folder, reviews, output, "selection.top_fraction=0.5", "selection.by=depth", "training.max_steps=8",
            "training.eval_steps=4", "training.micro_batch_size=8", *more,
        )  # fmt: skip
        return pipeline.finetune(load_config(None, overrides), Console(file=StringIO(), width=200))

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    for name in ("sgm_finetuned.pth", "metrics.json", "report.html", "history.json", "examples.json"):
        remove(tmp_path / "out" / name)
    remove(tmp_path / "out" / "checkpoints" / "checkpoint-8" / "trainer_state.json")
    resumed = run(tmp_path / "out", "training.resume=true")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    found, again = (
        torch.load(tmp_path / name / "sgm_finetuned.pth", weights_only=True)["tensors"] for name in ("whole", "out")
    )
    assert found.keys() == again.keys()
    assert [name for name in found if not torch.equal(found[name], again[name])] == []
    assert resumed["after"] == whole["after"]
