"""4-bit bases: the adapters get the gradients of the dequantised base, also after an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import llama_config, make_batches, make_tokenizer, measured_numbers

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.commands.cli import main
from sgm_finetune.measure.probe import probe
from sgm_finetune.method.build_plan import build_plan
from sgm_finetune.method.plan import Plan, PlanSettings
from sgm_finetune.model.folder import local_folder
from sgm_finetune.model.four_bit import ready_for_backward
from sgm_finetune.model.load import Head, load_model
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.tokenizer import load_tokenizer
from sgm_finetune.train.adapters.apply import apply_plan

pytest.importorskip("bitsandbytes")

TOLERANCE = {
    "gradient cosine": 0.999,
    "gradient cosine, 30 layers": 0.995,  # the dequantised model has 0.996 between bfloat16 and float32
    "merged logits": 0.02,  # bfloat16 has three digits; relative to the largest logit
}

ORIGINS = ["loaded by SGM", "loaded and evaluated by Transformers"]


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pico LLaMA whose matrices consist of whole blocks of 64, which 4 bits need."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("models") / "pico-4bit"
    LlamaForCausalLM(llama_config(num_hidden_layers=2)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def four_bit(folder: Path, task: str = "causal-lm", labels: tuple[str, ...] = (), dtype: str = "bfloat16"):
    torch.manual_seed(4)  # a new head is random
    config = ModelConfig(name=str(folder), task=task, quantization="nf4", dtype=dtype)
    return load_model(config, folder, Head(labels, pad_token_id=0))[0]


def transformers_four_bit(folder: Path):
    """The model as Transformers loads it: on some CPUs an evaluation repacks its layers for inference."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=settings,
        dtype=torch.bfloat16,
        device_map={"": torch.device("cpu")},
        attn_implementation="eager",
    ).eval()


def dequantised(model):
    """The same model, with every 4-bit layer replaced by an nn.Linear with its dequantised values."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            values = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(model.dtype)
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = torch.nn.Parameter(values.reshape(layer.out_features, layer.in_features), False)
            if layer.bias is not None:
                plain.bias = layer.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    model.is_loaded_in_4bit = False
    del model.hf_quantizer, model.config.quantization_config
    return model


def a_plan(model, batches) -> Plan:
    numbers = measured_numbers(probe(model, batches, sketch_size=10))
    return build_plan("pico", numbers, PlanSettings(rank=4, alpha=8, threshold=0.0))


def evaluate(model, batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def gradients(model, batch) -> torch.Tensor:
    """The gradient of all trainable parameters as one vector; no LoRA factor is zero."""
    generator = torch.Generator().manual_seed(6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.grad = None
    model.train()
    model(**batch).loss.backward()
    return torch.cat([p.grad.float().flatten() for p in parameters])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def weight_bytes(model) -> dict[str, bytes]:
    return {n: m.module.weight.data.view(torch.uint8).numpy().tobytes() for n, m in adaptable(model).items()}


def prepared(folder: Path, origin: str, batch):
    if origin == "loaded by SGM":
        return four_bit(folder)
    model = transformers_four_bit(folder)
    evaluate(model, batch)
    return model


@pytest.mark.parametrize("origin", ORIGINS)
def test_gradients_of_a_4_bit_base_are_those_of_the_dequantised_base(folder, origin):
    """Their cosine is above 0.999, before and after an evaluation."""
    batches = make_batches(task="causal-lm")
    plan = a_plan(four_bit(folder), batches)
    expected = gradients(apply_plan(dequantised(four_bit(folder)), plan), batches[0])
    model = apply_plan(prepared(folder, origin, batches[0]), plan)
    assert cosine(gradients(model, batches[0]), expected) > TOLERANCE["gradient cosine"]
    evaluate(model, batches[1])
    assert cosine(gradients(model, batches[0]), expected) > TOLERANCE["gradient cosine"]


def test_ready_for_backward_unpacks_what_an_evaluation_packed(folder):
    batch = make_batches(task="causal-lm")[0]
    model = transformers_four_bit(folder)
    untouched = four_bit(folder)
    evaluate(model, batch)
    ready_for_backward(model)
    assert weight_bytes(model) == weight_bytes(untouched)
    assert torch.equal(evaluate(model, batch), evaluate(untouched, batch))


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_probe_measures_a_4_bit_base_and_leaves_its_bytes(folder, origin):
    batches = make_batches(task="causal-lm")
    expected = probe(dequantised(four_bit(folder)), batches, sketch_size=10)
    model = prepared(folder, origin, batches[0])
    ready_for_backward(model)
    before = weight_bytes(model)
    found = probe(model, batches, sketch_size=10)
    assert weight_bytes(model) == before
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in model.parameters())
    assert found.halves.keys() == expected.halves.keys()
    for name, halves in found.halves.items():
        for half, other in zip(halves, expected.halves[name], strict=True):
            assert cosine(half.input.flatten(), other.input.flatten()) > TOLERANCE["gradient cosine"]
            assert cosine(half.output.flatten(), other.output.flatten()) > TOLERANCE["gradient cosine"]


def test_heads_and_embeddings_are_not_quantised(folder):
    from bitsandbytes.nn import Linear4bit

    model = four_bit(folder, "sequence-classification", ("bad", "good"))
    assert not isinstance(model.score, Linear4bit)
    assert all(isinstance(matrix.module, Linear4bit) for matrix in adaptable(model).values())
    assert not isinstance(four_bit(folder).lm_head, Linear4bit)


@pytest.fixture
def command(tmp_path, capfd):
    """Runs a command in this process with an empty config file; returns its JSON."""
    (tmp_path / "empty.yaml").write_text("")

    def run(name: str, overrides: list[str]) -> dict:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([name, "--config", str(tmp_path / "empty.yaml"), "--json", *overrides])
        written, said = capfd.readouterr()
        assert caught.value.code == 0, said
        return json.loads(written)

    return run


@pytest.mark.slow
def test_an_8_bit_run_learns_and_evaluates_to_the_same_numbers(folder, settings, command):
    changes = [f"model.name={folder}", "model.quantization=int8", "model.dtype=auto", "training.max_steps=30"]
    metrics = command("finetune", [*settings, *changes])
    assert metrics["after"]["loss"] < 0.7 * metrics["before"]["loss"]
    again = command("evaluate", settings[-1:])
    assert {key: again[key] for key in metrics["after"]} == metrics["after"]


def test_a_4_bit_run_evaluates_to_the_same_numbers_and_its_adapter_merges(folder, settings, tmp_path, command):
    """`finetune` and `evaluate` agree in every number; merged into the dequantised base, the adapter gives the same."""
    from peft import PeftModel

    changes = [f"model.name={folder}", "model.quantization=nf4", "model.dtype=auto", "training.max_steps=30"]
    metrics = command("finetune", [*settings, *changes])
    assert metrics["after"]["loss"] < 0.7 * metrics["before"]["loss"]
    again = command("evaluate", settings[-1:])
    assert {key: again[key] for key in metrics["after"]} == metrics["after"]

    batch, labels = make_batches()[0], ("bad", "good")
    adapter = tmp_path / "out" / "adapter"
    expected = evaluate(PeftModel.from_pretrained(four_bit(folder, "sequence-classification", labels), adapter), batch)
    base = dequantised(four_bit(folder, "sequence-classification", labels))
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    difference = (evaluate(merged, batch) - expected).abs().max() / expected.abs().max()
    assert difference < TOLERANCE["merged logits"]


def smollm2_batch_and_plan(folder: Path):
    text = ["The capital of France is Paris.", "Water boils at one hundred degrees, and freezes at zero."]
    batch = dict(load_tokenizer(folder)(text, return_tensors="pt", padding=True))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    numbers = measured_numbers(probe(four_bit(folder), [batch, batch], sketch_size=8))
    plan = build_plan("smollm2", numbers, PlanSettings(rank=4, alpha=8))
    return batch, plan


@pytest.mark.slow
@pytest.mark.parametrize("origin", ORIGINS)
def test_gradients_of_smollm2_in_4_bits_are_those_of_the_dequantised_model(origin):
    """The same on a trained model with 30 layers."""
    folder = local_folder("smollm2-135m-instruct")
    batch, plan = smollm2_batch_and_plan(folder)
    expected = gradients(apply_plan(dequantised(four_bit(folder)), plan), batch)
    model = apply_plan(prepared(folder, origin, batch), plan)
    assert cosine(gradients(model, batch), expected) > TOLERANCE["gradient cosine, 30 layers"]
    evaluate(model, batch)
    assert cosine(gradients(model, batch), expected) > TOLERANCE["gradient cosine, 30 layers"]


@pytest.mark.slow
def test_gradients_of_smollm2_in_4_bits_computed_in_float32_agree_to_three_nines():
    """Without bfloat16's rounding the 4-bit path agrees better: it adds no error, before and after an evaluation."""
    folder = local_folder("smollm2-135m-instruct")
    batch, plan = smollm2_batch_and_plan(folder)
    expected = gradients(apply_plan(dequantised(four_bit(folder, dtype="float32")), plan), batch)
    model = apply_plan(four_bit(folder, dtype="float32"), plan)
    assert cosine(gradients(model, batch), expected) > TOLERANCE["gradient cosine"]
    evaluate(model, batch)
    assert cosine(gradients(model, batch), expected) > TOLERANCE["gradient cosine"]
