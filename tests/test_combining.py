"""`sgm export --add` writes what PEFT's `add_weighted_adapter` computes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from architectures import save_pico
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_exporting import TEXT, exported, quiet, read, train
from transformers import AutoModelForCausalLM

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.cli import run
from sgm_finetune.results.export.combination import Combination
from sgm_finetune.results.export.combine import combine
from sgm_finetune.results.load import attach, load_unquantised

IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, llama_folder) -> Path:
    """Three runs on one base, `a`, `b` and `wide` of twice the rank, and `a`'s and `b`'s adapters as PEFT's folders."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    for number, (name, *more) in enumerate((("a",), ("b", "selection.top_fraction=0.5"), ("wide", "adapter.rank=8"))):
        torch.manual_seed(number)
        train(llama_folder, "causal-lm", folder / "text.txt", folder / name, *more)
    for name in "ab":
        exported([f"output.dir={folder / name}"], "adapter", output=folder / f"{name}-adapter")
    return folder


def combined(runs: Path, others: list[str], *asked, name: str = "a"):
    where = [f"output.dir={runs / name}"]
    combination = Combination(tuple(runs / other for other in others), *asked)
    combination.check()
    return combine(read(where), combination, load_config(None, where), where, _log())


def _log():
    from sgm_finetune.base.console import StepLog

    return StepLog(quiet())


@torch.no_grad()
def logits_of(result) -> torch.Tensor:
    return attach(load_unquantised(result, "float32"), result.content, result.path)[0](IDS).logits


@torch.no_grad()
def pefts(runs: Path, base: Path, weights, method, density=None) -> torch.Tensor:
    """The logits of PEFT's own combination of the two folders, on the whole base."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(runs / "a-adapter"), "a")
    model.load_adapter(str(runs / "b-adapter"), "b")
    model.add_weighted_adapter(["a", "b"], list(weights), "ab", method, density=density)
    model.set_adapter("ab")
    return model(IDS).logits


@pytest.mark.parametrize(
    ("other", "method", "density"),
    [
        ("b", "linear", None),
        ("b-adapter", "ties_svd", 0.5),
        pytest.param("b", "svd", None, marks=pytest.mark.slow),
        pytest.param("b-adapter", "cat", None, marks=pytest.mark.slow),
        pytest.param("b-adapter", "ties", 0.5, marks=pytest.mark.slow),
        pytest.param("b-adapter", "magnitude_prune", 0.5, marks=pytest.mark.slow),
    ],
)
def test_the_combination_is_pefts(runs, llama_folder, method, density, other):
    weights = (0.7, -0.3)
    found = logits_of(combined(runs, [other], weights, method, density))
    torch.testing.assert_close(found, pefts(runs, llama_folder, weights, method, density), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_what_dare_drops_is_drawn_by_the_runs_seed(runs):
    first, again = (logits_of(combined(runs, ["b"], (0.7, 0.3), "dare_linear", 0.5)) for _ in range(2))
    whole = logits_of(combined(runs, ["b"], (0.7, 0.3), "linear"))
    assert torch.equal(first, again)
    assert not torch.equal(first, whole)


def test_cat_is_the_weighted_sum_of_the_updates(runs):
    result = combined(runs, ["b", "wide"], (0.5, 0.25, -1.0))
    sums = {}
    for name, weight in (("a", 0.5), ("b", 0.25), ("wide", -1.0), (None, 1.0)):
        content = result.content if name is None else read([f"output.dir={runs / name}"]).content
        settings = content["peft_config"]
        for key, A in content["adapter"].items():
            if ".lora_A." in key:
                B = content["adapter"][key.replace("lora_A", "lora_B")]
                update = weight * settings["lora_alpha"] / settings["r"] * (B.double() @ A.double())
                sums.setdefault(key, {}).setdefault(name is None, []).append(update)
    assert result.content["peft_config"]["r"] == 16
    for found in sums.values():
        torch.testing.assert_close(sum(found[True]), sum(found[False]), atol=1e-6, rtol=1e-5)


def test_the_written_folder_computes_the_combination(runs, llama_folder, tmp_path):
    """A whole export: written, loaded again by PEFT and compared, and merged too, by the command line."""
    arguments = ["--add", str(runs / "b"), "--weights", "0.7,0.3", "--method", "linear", f"output.dir={runs / 'a'}"]
    for to in ("adapter", "merged"):
        run(["export", "--to", to, "--output", str(tmp_path / to), *arguments])
        report = json.loads((tmp_path / to / "export.json").read_text())
        assert report["combined"] == {
            "others": [str(runs / "b")], "weights": [0.7, 0.3], "method": "linear", "density": None,
        }  # fmt: skip
        assert report["difference"] < 1e-5
    expected = logits_of(combined(runs, ["b"], (0.7, 0.3), "linear"))
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        written = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(written, expected)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "combined with `b` by PEFT's method `linear`, with the weights 0.7, 0.3" in card


@pytest.mark.slow
def test_a_combination_can_be_cut(runs, tmp_path):
    where = [f"output.dir={runs / 'a'}"]
    asked = Combination((runs / "b",), (0.5, 0.5))
    report = exported(where, "adapter", output=tmp_path / "cut", combination=asked, rank=3)
    assert (report["cut"]["rank"], report["cut"]["rank_before"]) == (3, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weights", "1"], "--weights goes with --add"),
        (["--density", "0.5"], "--density goes with --add"),
        (["--add", "b"], "--add needs --weights"),
        (["--add", "b", "--weights", "1,x"], "--weights 1,x are no numbers"),
        (["--add", "b", "--weights", "1"], "--weights has 1, and there are 2 adapters"),
        (["--add", "b", "--weights", "1,nan"], "--weights are finite numbers"),
        (["--add", "b", "--weights", "0,0"], "not all of them are 0"),
        (["--add", "b", "--weights", "1,1", "--method", "ties"], "--method ties needs --density"),
        (["--add", "b", "--weights", "1,1", "--density", "0.5"], "--method cat keeps everything"),
        (["--add", "none", "--weights", "1,1"], "holds neither sgm_finetuned.pth nor adapter_config.json"),
        (["--add", "wide", "--weights", "1,1", "--method", "linear"], "adapters of one rank, and they have 4, 8"),
        (["--add", "gone", "--weights", "1,1"], "adapter_model.safetensors cannot be read"),
        (["--add", "other-base", "--weights", "1,1"], "only adapters of one base can be combined"),
        (["--add", "other-name", "--weights", "1,1"], "names the base elsewhere/model"),
        (["--add", "dora", "--weights", "1,1"], "`use_dora` is 'True', and only plain LoRA"),
        (["--add", "pissa", "--weights", "1,1"], "`init_lora_weights` is 'pissa'"),
        (["--add", "loha", "--weights", "1,1"], "`peft_type` is 'LOHA'"),
        (["--add", "half", "--weights", "1,1"], "is not a whole adapter"),
        (["--add", "narrow", "--weights", "1,1"], "does not fit the base model"),
        (["--add", "unknown", "--weights", "1,1"], "No linear layer is called `model.layers.99.mlp.up_proj`"),
        (["--add", "embedding", "--weights", "1,1"], "is no factor of a linear layer"),
        (["--add", "classifier", "--weights", "1,1"], "is for SEQ_CLS, and output.dir for CAUSAL_LM"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_combined_is_one_line(runs, options, said, tmp_path):
    at = ["", *options[:-1]]
    made = [
        str(_broken(runs, runs / word)) if left == "--add" else word for left, word in zip(at, options, strict=True)
    ]
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        run(["export", "--to", "adapter", f"output.dir={runs / 'a'}", "--output", str(tmp_path / "x"), *made])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def _broken(runs: Path, folder: Path) -> Path:
    """`folder`, which becomes a copy of b's adapter with the fault of that name."""
    faults: dict[str, dict] = {
        "gone": {},
        "half": {},
        "narrow": {},
        "unknown": {},
        "embedding": {},
        "other-name": {"base_model_name_or_path": "elsewhere/model"},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "loha": {"peft_type": "LOHA"},
        "classifier": {"task_type": "SEQ_CLS"},
    }
    if folder.name == "other-base" and not folder.exists():
        model = save_pico("llama", runs / "other-model")
        train(model, "causal-lm", runs / "text.txt", folder)
    if folder.name not in faults or folder.exists():
        return folder
    shutil.copytree(runs / "b-adapter", folder)
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | faults[folder.name]))
    weights = folder / "adapter_model.safetensors"
    factors = load_file(weights)
    name = next(iter(factors))
    match folder.name:
        case "gone":
            weights.unlink()
            return folder
        case "half":
            del factors[name]
        case "narrow":
            factors[name] = factors[name][:, :-1].contiguous()
        case "unknown":
            for side in "AB":
                factors[f"base_model.model.model.layers.99.mlp.up_proj.lora_{side}.weight"] = torch.zeros(4, 4)
        case "embedding":
            factors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 32)
    save_file(factors, weights)
    return folder


def test_a_combination_has_a_folder_of_its_own(runs):
    with pytest.raises(UserError, match="name its folder with --output"):
        run(["export", "--to", "adapter", f"output.dir={runs / 'a'}", "--add", str(runs / "b"), "--weights", "1,1"])
