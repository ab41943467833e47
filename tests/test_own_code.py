"""A model that nobody thought of: its code comes with it, its names are its own, and what reads what is measured."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from conftest import make_tokenizer
from rich.console import Console

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands.data import preview
from sgm_finetune.commands.evaluate import evaluate
from sgm_finetune.measure.plan_file import load_plan
from sgm_finetune.model.folder import own_code

CODE = '''
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MurmurConfig(PreTrainedConfig):
    model_type = "murmur"

    def __init__(self, hidden_size=32, num_storeys=2, vocab_size=32, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.num_storeys, self.vocab_size = hidden_size, num_storeys, vocab_size


class Storey(nn.Module):
    """Gated averages over the words so far."""

    def __init__(self, size):
        super().__init__()
        self.hear, self.heed, self.say = (nn.Linear(size, size, bias=False) for _ in range(3))

    def forward(self, x):
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[None, :, None]
        return x + self.say(torch.sigmoid(self.heed(x)) * self.hear(x).cumsum(1) / steps)


class MurmurForSequenceClassification(PreTrainedModel):
    config_class = MurmurConfig

    def __init__(self, config):
        super().__init__(config)
        self.glossary = nn.Embedding(config.vocab_size, config.hidden_size)
        self.storeys = nn.ModuleList([Storey(config.hidden_size) for _ in range(config.num_storeys)])
        self.verdict = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.glossary

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.glossary(input_ids)
        for storey in self.storeys:
            x = storey(x)
        mask = attention_mask[..., None].to(x.dtype)
        logits = self.verdict((x * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
'''


@pytest.fixture
def murmur(tmp_path: Path) -> Path:
    """The model's folder: as published, with a head for three classes that are not ours."""
    folder = tmp_path / "murmur"
    folder.mkdir()
    namespace: dict = {"__name__": "modeling_murmur"}
    exec(CODE, namespace)
    model = namespace["MurmurForSequenceClassification"](namespace["MurmurConfig"](num_labels=3))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "modeling_murmur.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "MurmurConfig", "AutoModelForSequenceClassification": "MurmurForSequenceClassification"}
    config["auto_map"] = {auto: f"modeling_murmur.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def own(murmur, reviews, tmp_path) -> list[str]:
    return [
        f"model.name={murmur}", "model.dtype=float32", f"data.train={reviews}", "data.max_length=24",
        "probe.num_batches=4", "probe.sketch_size=12", "adapter.rank=4", "merge.threshold=-1", "training.max_steps=20",
        "training.batch_size=16", "training.learning_rate=0.1", f"output.dir={tmp_path / 'out'}",
    ]  # fmt: skip


def test_a_models_own_code_is_not_run_unless_asked_for(own, murmur):
    (murmur / "modeling_murmur.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UserError, match=r"its own Python code, which does not run .* model\.trust_remote_code=true"):
        pipeline.finetune(load_config(None, own), Console(file=StringIO()))


TOKENIZER = """
from transformers import PreTrainedTokenizerFast
print("the tokenizer's code ran")
class Own(PreTrainedTokenizerFast):
    pass
"""


def test_the_code_of_a_tokenizer_alone_is_announced_before_it_runs(llama_folder, reviews, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    (folder / "own.py").write_text(TOKENIZER)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    given = [f"model.name={folder}", f"data.train={reviews}", "model.trust_remote_code=true"]
    preview(load_config(None, given), Console(width=400), 0)
    before, ran, _ = capsys.readouterr().out.partition("the tokenizer's code ran")
    assert f"runs the Python code in {folder}, as model.trust_remote_code=true allows" in before
    assert ran


@pytest.mark.parametrize(
    ("files", "places"),
    [
        ({"config.json": {}}, []),
        ({"config.json": {"auto_map": {"AutoConfig": "a.B", "AutoModel": "a.C"}}}, ["{folder}"]),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a.B", None]}}}, ["{folder}"]),
        ({"tokenizer_config.json": {"auto_map": ["a.B", None]}}, ["{folder}"]),
        (
            {"config.json": {"auto_map": {"AutoConfig": "who/where--a.B", "AutoModel": "a.C"}}},
            ["who/where", "{folder}"],
        ),
        ({"custom_generate/generate.py": {}}, ["{folder}"]),
    ],
    ids=str,
)
def test_code_is_found_wherever_transformers_looks_for_it(files, places, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    assert own_code(tmp_path) == [place.format(folder=tmp_path) for place in places]


def test_a_model_that_nobody_thought_of_goes_the_whole_way(own, tmp_path):
    overrides = [*own, "model.trust_remote_code=true"]
    metrics = pipeline.finetune(load_config(None, overrides), Console(file=StringIO(), width=200))
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert [group.members for group in plan.groups] == [(f"storeys.{n}.hear", f"storeys.{n}.heed") for n in range(2)]
    assert {matrix.name for matrix in plan.matrices if matrix.group is None} == {"storeys.0.say", "storeys.1.say"}
    assert metrics["trainable_parameters"] - 2 * 32 - 2 == 2 * (4 * 32 * 5)  # a new head for two classes
    again = evaluate(load_config(None, overrides), [f"output.dir={tmp_path / 'out'}"], Console(file=StringIO()))
    assert again["loss"] == metrics["after"]["loss"]
