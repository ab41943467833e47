"""Pico models and data: whole folders as a user would have them, small enough for a second of training."""

from __future__ import annotations

import csv
import gc
import json
import os
import random
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: tests run beside each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("PYTHONPATH"):  # tests start processes in other folders, where PYTHONPATH=src names nothing
    folders = os.environ["PYTHONPATH"].split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, folders))
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="sgm-tests-")  # of models that bring their code

import hypothesis
import pytest
import torch
from peft import PeftModel

from sgm_finetune.measure.probe import Probe
from sgm_finetune.method.plan import MatrixNumbers, Plan
from sgm_finetune.train.adapters.apply import lora_layers

hypothesis.settings.register_profile("repeatable", derandomize=True)  # the long fuzzing test looks for new cases
hypothesis.settings.load_profile("repeatable")

GOOD = ["good", "great", "fine", "lovely", "superb", "bright"]
BAD = ["bad", "awful", "poor", "dull", "broken", "weak"]
OTHER = ["the", "a", "film", "plot", "cast", "it", "was", "and", "with", "very", "story", "scene", "music"]
WORDS = [*GOOD, *BAD, *OTHER]


def pair_rows() -> list[dict[str, str]]:
    """120 pairs of answers: a chosen one has good words, a rejected one has bad words."""
    chooser = random.Random(0)

    def answer(words: list[str]) -> str:
        return " ".join(chooser.choice([*words, *OTHER]) for _ in range(chooser.randint(2, 6))) + f" {words[0]}"

    return [
        {"prompt": " ".join(chooser.choices(OTHER, k=3)), "chosen": f" {answer(GOOD)}", "rejected": f" {answer(BAD)}"}
        for _ in range(120)
    ]


@pytest.fixture(autouse=True, scope="session")
def _collect_less():
    """A run collects garbage several times, and would look at every imported module each time."""
    import sgm_finetune.commands.finetune  # noqa: F401  # with all that it imports

    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """What the tests remember is forgotten with them."""
    os.environ["SGM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def make_tokenizer():
    """A word-level tokenizer over the pico vocabulary: real enough to pad, cut and decode."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=512
    )


def llama_config(**changes):
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def make_model(task: str = "sequence-classification", **changes):
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(1)
    if task == "causal-lm":
        return LlamaForCausalLM(llama_config(**changes))
    return LlamaForSequenceClassification(llama_config(num_labels=2, **changes))


def make_batches(num: int = 4, size: int = 4, length: int = 7, task: str = "sequence-classification"):
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(num):
        ids = torch.randint(3, 28, (size, length), generator=generator)
        labels = ids if task == "causal-lm" else torch.randint(0, 2, (size,), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def shared_factors(model: PeftModel, plan: Plan) -> dict[str, list[torch.nn.Parameter]]:
    """Group name -> the shared factor as each member holds it; equal objects when tied."""
    layers = lora_layers(model)
    return {
        group.name: [
            (layers[name].lora_A if group.side == "input" else layers[name].lora_B)["default"].weight
            for name in group.members
        ]
        for group in plan.groups
    }


READERS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def adapted(model: torch.nn.Module, share: bool = False, **config: object):
    """LoRA on every linear layer, away from its start; the readers of the same activations hold one A."""
    from peft import LoraConfig, get_peft_model

    from sgm_finetune.model.matrices import adaptable

    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(adaptable(model)), **config))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    layers = lora_layers(made)
    for number in range(4 if share else 0):
        for kinds in READERS:
            first, *others = (layers[f"model.layers.{number}.{kind}"] for kind in kinds)
            for other in others:
                other.lora_A["default"].weight = first.lora_A["default"].weight
    return made


def measured_numbers(probed: Probe) -> list[MatrixNumbers]:
    """What a plan is made of, without a scan: every matrix has the SNR 1."""
    numbers = []
    for name, halves in probed.halves.items():
        layer = next(int(part) for part in name.split(".") if part.isdigit())
        kind = name.replace(f".{layer}.", ".*.")
        shape, activation = probed.shapes[name], probed.activations[name]
        numbers.append(MatrixNumbers(name, kind, layer, shape, 1.0, 0.0, 1, halves, activation))
    return numbers


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.cuda() for name, x in batch.items()}


def short_run(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """Overrides of a run of 20 steps in bfloat16, in which a pico model learns to tell reviews apart."""
    return [
        f"model.name={model}", "model.dtype=bfloat16", f"data.train={data}", "data.max_length=32",
        "probe.num_batches=4", "probe.sketch_size=12", "adapter.rank=4", "training.max_steps=20",
        "training.batch_size=16", *more, f"output.dir={output}",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A pico LLaMA, saved as its makers would: a causal language model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "pico-llama"
    make_model("causal-lm").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_bert(**changes):
    from transformers import BertConfig, BertModel

    torch.manual_seed(2)
    settings = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return BertModel(BertConfig(**{**settings, **changes}))


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """A pico BERT encoder without a head, as sentence encoders are published."""
    folder = tmp_path_factory.mktemp("models") / "pico-bert"
    make_bert().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    """240 pico film reviews whose label is told by their words."""
    chooser = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(240):
            words = chooser.choices(GOOD if i % 2 else BAD, k=3) + chooser.choices(OTHER, k=chooser.randint(3, 8))
            chooser.shuffle(words)
            writer.writerow([" ".join(words) + f" {chooser.choice(OTHER)}" * (i % 3), "good" if i % 2 else "bad"])
    return path


@pytest.fixture
def settings(llama_folder, reviews, tmp_path) -> list[str]:
    """Overrides that make the whole run a pico run."""
    return [
        f"model.name={llama_folder}",
        "model.dtype=float32",
        f"data.train={reviews}",
        "data.max_length=32",
        "probe.num_batches=4",
        "probe.batch_size=8",
        "probe.sketch_size=12",
        "adapter.rank=4",
        "training.max_steps=20",
        "training.batch_size=16",
        "training.learning_rate=0.1",
        f"output.dir={tmp_path / 'out'}",
    ]


@pytest.fixture
def command(tmp_path, capfd):
    """The command, run in this process with an empty config file; returns its JSON, and keeps what it said."""

    from sgm_finetune.commands.cli import main

    class Command:
        said = ""

        def __call__(self, name: str, overrides: list[str], *options: str) -> dict:
            (tmp_path / "empty.yaml").write_text("")
            capfd.readouterr()
            with pytest.raises(SystemExit) as caught:
                main([name, "--config", str(tmp_path / "empty.yaml"), "--json", *options, *overrides])
            written, self.said = capfd.readouterr()
            assert caught.value.code == 0, self.said
            return json.loads(written)

    return Command()
