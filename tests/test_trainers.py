"""A merged model is an ordinary PEFT model: other trainers train it, and the factors of a group stay one parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import BAD, GOOD, OTHER, make_batches, make_model, make_tokenizer, measured_numbers, shared_factors
from datasets import Dataset

from sgm_finetune.measure.probe import probe
from sgm_finetune.method.build_plan import build_plan
from sgm_finetune.method.plan import Plan, PlanSettings
from sgm_finetune.train.adapters.apply import apply_plan
from sgm_finetune.train.adapters.optimizer import create_optimizer


def merged_model():
    """A merged pico language model and its plan, the same at every call."""
    model = make_model("causal-lm")
    probed = probe(model, make_batches(task="causal-lm"), sketch_size=10)
    plan = build_plan("pico", measured_numbers(probed), PlanSettings(rank=4, alpha=8, threshold=0.0))
    torch.manual_seed(3)
    return apply_plan(model, plan), plan


def sentences(num: int = 32) -> list[str]:
    return [
        f"the {OTHER[i % 13]} was {(GOOD if i % 2 else BAD)[i % 6]} and very {(GOOD if i % 2 else BAD)[i // 6 % 6]}"
        for i in range(num)
    ]


def arguments(output: Path) -> dict:
    return {
        "output_dir": str(output), "max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none",
        "disable_tqdm": True, "seed": 5,
    }  # fmt: skip


def plain_trainer(model, output: Path, optimizer=None):
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer = make_tokenizer()
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in sentences()]
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(output), dataloader_pin_memory=False),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizers=(optimizer, None),
    )


def spectral_trainer(model, output: Path):
    return plain_trainer(model, output, create_optimizer(model, lr=0.05))


def sft_trainer(model, output: Path):
    pytest.importorskip("trl")
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(output), max_length=32, dataloader_pin_memory=False),
        train_dataset=Dataset.from_dict({"text": sentences()}),
        processing_class=make_tokenizer(),
    )


def assert_tied(model, plan: Plan) -> None:
    """The members of each group hold one parameter."""
    assert plan.groups
    for factors in shared_factors(model, plan).values():
        assert len({id(factor) for factor in factors}) == 1


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


TRAINERS = [
    pytest.param(plain_trainer, id="transformers.Trainer"),
    pytest.param(spectral_trainer, id="transformers.Trainer with our step"),
    pytest.param(sft_trainer, id="trl.SFTTrainer", marks=pytest.mark.slow),
]


upstream = pytest.mark.filterwarnings(  # TRL 1.16 sets it by default, Transformers 5.23 renamed it
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)


@upstream
@pytest.mark.parametrize("make_trainer", TRAINERS)
def test_another_trainer_lowers_the_loss_and_keeps_groups_tied(make_trainer, tmp_path):
    model, plan = merged_model()
    before = trained(model)
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert_tied(trainer.model, plan)
    after = trained(model)
    for group in plan.groups:
        factor = "lora_A" if group.side == "input" else "lora_B"
        name = f"base_model.model.{group.members[0]}.{factor}.default.weight"
        assert not torch.equal(before[name], after[name])


@upstream
@pytest.mark.parametrize("make_trainer", TRAINERS)
def test_another_trainers_checkpoint_resumes_tied_and_ends_the_same(make_trainer, tmp_path):
    """8 steps at once equal 4 steps, a checkpoint, a new model and 4 more steps, bit for bit."""
    model, _ = merged_model()
    make_trainer(model, tmp_path).train()
    again, plan = merged_model()
    resumed = make_trainer(again, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 8
    assert_tied(resumed.model, plan)
    expected, found = trained(model), trained(again)
    assert expected.keys() == found.keys()
    assert [name for name in found if not torch.equal(expected[name], found[name])] == []


def test_sgm_trainer_ties_before_it_loads_a_checkpoint(tmp_path):
    """A model whose members hold separate parameters, as PEFT alone makes them, is tied when training resumes."""
    from sgm_finetune import SGMTrainer

    model, plan = merged_model()
    plain_trainer(model, tmp_path).train()
    apart, _ = merged_model()
    for factors in shared_factors(apart, plan).values():
        for name, module in apart.named_modules():
            if name.endswith("lora_A.default") and module.weight is factors[0]:
                module.weight = torch.nn.Parameter(module.weight.detach().clone())
    template = plain_trainer(apart, tmp_path)
    trainer = SGMTrainer(
        model=apart, args=template.args, train_dataset=template.train_dataset, data_collator=template.data_collator,
        plan=plan,
    )  # fmt: skip
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-8"))
    assert_tied(apart, plan)
    expected, found = trained(model), trained(apart)
    assert [name for name in found if not torch.equal(expected[name], found[name])] == []
