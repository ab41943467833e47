"""A prediction is the same whether blocks that are alike are followed once or all of them are."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from architectures import DECODERS, ENCODER_DECODERS, ENCODERS
from conftest import WORDS, llama_config, make_tokenizer
from rich.console import Console
from torch import Tensor, nn

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.data.prepared import prepare_data
from sgm_finetune.method.plan import Group
from sgm_finetune.model.load import skeleton
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.budget import phases
from sgm_finetune.train.budget.assumed_plan import assume_plan
from sgm_finetune.train.budget.estimate import estimate
from sgm_finetune.train.budget.footprint import Footprint
from sgm_finetune.train.budget.needs import Estimate
from sgm_finetune.train.budget.repeats import NotAlikeError, block_lists, repeating

QUIET = StepLog(Console(quiet=True))
_SIZES = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
_DERIVED = ("layer_types", "model_type", "architectures", "transformers_version")


def deep(name: str, folder: Path, num_layers: int = 9) -> Path:
    """A pico model of that architecture with `num_layers` layers, as far as a prediction reads it."""
    made = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}[name]()
    settings = {key: value for key, value in made.to_dict().items() if key not in _DERIVED}
    described = type(made)(**{key: num_layers if key in _SIZES else value for key, value in settings.items()})
    described.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def rows(path: Path, task: str) -> str:
    generator = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(least, most)))

    with path.open("w") as file:
        for i in range(60):
            text = f"{words(4, 20)} {i}"
            match task:
                case "causal-lm":
                    row = {"prompt": text, "completion": words(2, 5)}
                case "seq2seq-lm":
                    row = {"source": text, "target": words(2, 5)}
                case _:
                    row = {"text": text, "label": "ab"[i % 2]}
            file.write(json.dumps(row) + "\n")
    return str(path)


def settings(folder: Path, task: str, *more: str) -> list[str]:
    return [
        f"model.name={folder}", f"model.task={task}", f"data.train={rows(folder / 'rows.jsonl', task)}",
        "data.max_length=32", "adapter.rank=4", "probe.sketch_size=8", "training.batch_size=4", *more,
    ]  # fmt: skip


def numbers(needed: Estimate) -> dict:
    return {key: value for key, value in needed.to_dict().items() if "seconds" not in key}


@pytest.mark.parametrize(
    ("name", "task", "more"),
    [
        ("llama", "causal-lm", ()),
        pytest.param(
            *("llama", "causal-lm", ("training.checkpointing=true", "training.micro_batch_size=2")),
            marks=pytest.mark.slow,
        ),
        ("llama", "causal-lm", ("selection.top_fraction=0.5", "selection.by=depth")),
        pytest.param(
            *("llama", "causal-lm", ("model.quantization=nf4", "model.dtype=float32", "training.step=peft")),
            marks=pytest.mark.slow,
        ),
        pytest.param(*("gpt2", "causal-lm", ("selection.top_fraction=0.34",)), marks=pytest.mark.slow),
        pytest.param(  # windows in five of six layers
            *("gemma3", "causal-lm", ("merge.side=none", "training.optimizer=adamw")), marks=pytest.mark.slow
        ),
        ("modernbert", "sequence-classification", ()),  # windows in two of three, and no norm in the first
        pytest.param(*("deberta_v2", "sequence-classification", ()), marks=pytest.mark.slow),
        pytest.param(  # one block, used by all layers
            *("albert", "sequence-classification", ()), marks=pytest.mark.slow
        ),
        pytest.param(*("t5", "seq2seq-lm", ()), marks=pytest.mark.slow),
        pytest.param(*("bart", "seq2seq-lm", ("training.checkpointing=true",)), marks=pytest.mark.slow),
    ],
)
def test_following_few_blocks_predicts_what_following_all_does(name, task, more, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sgm_finetune.train.budget.estimate.held_memory", lambda: 0)  # differs at every call
    config = load_config(None, settings(deep(name, tmp_path / name), task, *more))
    prepared = prepare_data(config, QUIET)
    few = numbers(estimate(config, prepared))
    monkeypatch.setattr(phases, "block_lists", lambda model: [])
    assert few == numbers(estimate(config, prepared))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["input", pytest.param("output", marks=pytest.mark.slow)])
def test_a_factor_of_many_layers_counts_once(side, tmp_path, monkeypatch) -> None:
    """Its gradient appears in the uppermost of them and stays until the lowest."""
    monkeypatch.setattr("sgm_finetune.train.budget.estimate.held_memory", lambda: 0)
    config = load_config(None, settings(deep("llama", tmp_path / "llama", 12), "causal-lm"))
    prepared = prepare_data(config, QUIET)
    plan = assume_plan(config, adaptable(skeleton(config.model, prepared.folder)), list)
    groups = []
    for kind, chosen in (("q_proj", range(1, 9)), ("down_proj", (0, 3, 4, 5, 6, 11)), ("o_proj", range(12))):
        members = tuple(m.name for m in plan.matrices if m.name.endswith(kind) and m.layer in chosen)
        groups.append(Group(members[0], kind, side, members, "random"))
    of = {name: group.name for group in groups for name in group.members}
    planned = tuple(replace(matrix, group=of.get(matrix.name)) for matrix in plan.matrices)
    plan = replace(plan, matrices=planned, groups=tuple(groups))
    few = numbers(estimate(config, prepared, plan))
    monkeypatch.setattr(phases, "block_lists", lambda model: [])
    assert few == numbers(estimate(config, prepared, plan))


def test_the_operations_followed_do_not_grow_with_the_layers(tmp_path, monkeypatch) -> None:
    counts = []
    dispatch = Footprint.__torch_dispatch__

    def counted(self, *args, **kwargs):
        counts[-1] += 1
        return dispatch(self, *args, **kwargs)

    monkeypatch.setattr(Footprint, "__torch_dispatch__", counted)
    for num_layers in (6, 24):
        config = load_config(None, settings(deep("llama", tmp_path / str(num_layers), num_layers), "causal-lm"))
        prepared = prepare_data(config, QUIET)
        counts.append(0)
        estimate(config, prepared)
    assert counts[1] == pytest.approx(counts[0], rel=0.05)  # a few for every layer's gradients


class Block(nn.Module):
    def __init__(self, width: int, number: int):
        super().__init__()
        self.number, self.linear = number, nn.Linear(8, width)
        self.back = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.linear(x).relu())


class Stack(nn.Module):
    def __init__(self, widths: list[int]):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, i) for i, width in enumerate(widths)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def followed(model: nn.Module, once: bool = True):
    x = torch.zeros(4, 8, device="meta", requires_grad=True)
    lists = block_lists(model) if once else []
    with Footprint([x, *model.parameters()]) as footprint, repeating(model, footprint, lists) as repeats:
        model(x).sum().backward()
        total = repeats.total()
    for parameter in model.parameters():
        parameter.grad = None
    return total, repeats.twins


def test_blocks_of_several_widths_are_followed_twice_each() -> None:
    with torch.device("meta"):
        model = Stack([16, 32, 32, 16, 16, 16, 32, 32, 16, 16])
    total, twins = followed(model)
    assert (total, {}) == followed(model, once=False)
    assert twins == {"blocks.5": "blocks.3", "blocks.6": "blocks.1", "blocks.7": "blocks.1", "blocks.8": "blocks.3"}


def test_blocks_that_only_look_alike_are_found() -> None:
    class Odd(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.back(self.linear(x.repeat(2 if self.number % 2 else 1, 1))[: len(x)])

    with torch.device("meta"):
        model = Stack([16] * 8)
    for block in model.blocks:
        block.__class__ = Odd
    with pytest.raises(NotAlikeError):
        followed(model)
    assert "forward" not in vars(model.blocks[0])  # the model is as it was


def test_settings_that_collect_from_every_block_keep_all_blocks() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(llama_config(num_hidden_layers=6))
    assert [len(blocks) for blocks in block_lists(model)] == [6]
    model.config.output_hidden_states = True
    assert block_lists(model) == []
