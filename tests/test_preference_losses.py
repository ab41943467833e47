"""The losses of preferences are those of their papers: TRL's own trainers compute the same, with the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import OTHER, make_model, make_tokenizer
from datasets import Dataset
from torch import Tensor, nn

from sgm_finetune.base.config import PreferenceConfig
from sgm_finetune.data.batches import collator
from sgm_finetune.method import preference
from sgm_finetune.train.fast.head_loss import find_head_loss
from sgm_finetune.train.losses import TestSet
from sgm_finetune.train.preference import PreferenceLoss, add_reference, reference_columns, score

IGNORED = -100


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict:
    ids, other = [*prompt, *chosen], [*prompt, *rejected]
    return {
        "input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + chosen,
        "other_ids": other, "other_labels": [IGNORED] * len(prompt) + rejected,
    }  # fmt: skip


PAIRS = [
    pair([9, 10, 11], [4, 5, 2], [12, 13, 14, 2]),
    pair([9], [6, 7, 8, 4, 2], [12, 2]),
    pair([15, 16], [3, 3, 2], [13, 12, 2]),
    pair([17, 18, 19, 20], [5, 2], [14, 9, 9, 9, 2]),
]
SHORT = [pair([9], [4, 5, 2], [12, 13, 14, 2]), pair([10], [6, 7, 2], [12, 2])]
"""Prompts of one token, which is never predicted, and chosen answers of one length."""
ANSWERS = [{**one, "desirable": at % 2} for at, one in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def base():
    return make_model("causal-lm", num_hidden_layers=2)


@pytest.fixture(scope="module")
def moved(base):
    """The base after a little training, so that no ratio is 0."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def with_reference(base: nn.Module, rows: list[dict]) -> tuple[Dataset, TestSet]:
    collate = collator(make_tokenizer(), "preference")
    dataset = Dataset.from_list(rows)
    test_set = TestSet(dataset, collate, "preference", 2)
    dataset = add_reference(dataset, reference_columns(base, test_set))
    return dataset, TestSet(dataset, collate, "preference", 2)


def ours(model: nn.Module, base: nn.Module, rows: list[dict], settings: PreferenceConfig) -> tuple[Tensor, dict]:
    """The loss of a batch, and the gradients of all parameters."""
    model = copy.deepcopy(model)
    dataset, test_set = with_reference(base, rows)
    batch = test_set.collate(list(dataset))  # type: ignore[arg-type]
    loss = PreferenceLoss(settings, None)
    if not settings.has_pairs:
        batch["moved"] = preference.divergence(loss.moved(model, batch))
    value = loss.mean(model, batch)
    value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters()}


def require_equal(found: tuple[Tensor, dict], expected: tuple[Tensor, dict]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def trl_batch(rows: list[dict]) -> Dataset:
    """The pairs as TRL has them: token ids of prompts and answers."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": row["input_ids"][: row["labels"].count(IGNORED)],
                "chosen_ids": [token for token in row["labels"] if token != IGNORED],
                "rejected_ids": [token for token in row["other_labels"] if token != IGNORED],
            }
            for row in rows
        ]
    )


def texts(rows: int = 4) -> Dataset:
    """Rows for the constructors of TRL's trainers; the tests hand them other batches."""
    return Dataset.from_list([{"prompt": OTHER[0], "chosen": OTHER[1], "rejected": OTHER[2]}] * rows)


def gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, dict]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


SETTINGS = {
    "output_dir": "unused", "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "per_device_train_batch_size": 4, "disable_tqdm": True, "beta": 0.3,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "name"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("apo_zero", "apo_zero"), ("apo_down", "apo_down")]
)
@pytest.mark.filterwarnings("ignore")
def test_losses_of_pairs_are_those_of_trl(loss, name, base, moved, tmp_path, monkeypatch):
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    monkeypatch.chdir(tmp_path)
    model = copy.deepcopy(moved)
    trainer = DPOTrainer(
        model=model, ref_model=copy.deepcopy(base), args=DPOConfig(**SETTINGS, loss_type=[name]),
        train_dataset=texts(), processing_class=make_tokenizer(),
    )  # fmt: skip
    batch = DataCollatorForPreference(pad_token_id=0)(list(trl_batch(PAIRS)))
    expected = gradients(model, trainer.compute_loss(model.train(), batch))
    require_equal(ours(moved, base, PAIRS, PreferenceConfig(loss=loss, beta=0.3)), expected)


def halves(rows: list[dict]) -> dict[str, Tensor]:
    """A batch in the form of TRL's experimental trainers."""
    whole = collator(make_tokenizer(), "preference")(rows)
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "labels": "labels"}
    return {
        f"{side}_{name}": half
        for name in names
        for side, half in zip(("chosen", "rejected"), whole[name].chunk(2), strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["orpo", "simpo"])
@pytest.mark.filterwarnings("ignore")
def test_losses_without_a_base_are_those_of_trl(loss, base, moved, tmp_path, monkeypatch):
    """TRL's ORPO counts prompts and averages over tokens: here prompts have one token and chosen answers one length."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    model = copy.deepcopy(moved)
    given = {"model": model, "train_dataset": texts(), "processing_class": make_tokenizer()}
    if loss == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        trainer = ORPOTrainer(args=ORPOConfig(**SETTINGS), **given)
        rows, settings = SHORT, PreferenceConfig(loss="orpo", beta=0.3)
    else:
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        made = CPOConfig(**SETTINGS, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.7)
        trainer = CPOTrainer(args=made, **given)
        rows, settings = PAIRS, PreferenceConfig(loss="simpo", beta=0.3, gamma=0.7)
    found, _ = trainer.get_batch_loss_metrics(model.train(), halves(rows))
    require_equal(ours(moved, base, rows, settings), gradients(model, found))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_kto_is_that_of_trl(base, moved, tmp_path, monkeypatch):
    from trl import KTOConfig, KTOTrainer

    monkeypatch.chdir(tmp_path)
    model = copy.deepcopy(moved)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    rows = (
        texts().rename_column("chosen", "completion").remove_columns("rejected").add_column("label", [True, False] * 2)
    )
    trainer = KTOTrainer(
        model=model, ref_model=copy.deepcopy(base), args=KTOConfig(**SETTINGS, **weights), train_dataset=rows,
        processing_class=make_tokenizer(),
    )  # fmt: skip
    half = halves(ANSWERS)
    batch = {
        f"{side}{name}": half[f"{whose}_{name}"]
        for side, whose in (("", "chosen"), ("KL_", "rejected"))
        for name in ("input_ids", "attention_mask")
    }
    batch |= {"completion_mask": (half["chosen_labels"] != IGNORED).long(), "label": torch.tensor([0, 1, 0, 1]).bool()}
    batch |= {"KL_completion_mask": (half["rejected_labels"] != IGNORED).long()}
    expected = gradients(model, trainer.compute_loss(model.train(), batch))
    require_equal(ours(moved, base, ANSWERS, PreferenceConfig(loss="kto", beta=0.3, **weights)), expected)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo", "kto", "apo_zero", "apo_down"])
def test_losses_computed_in_parts_are_those_of_all_logits(loss, base, moved, monkeypatch):
    monkeypatch.setattr("sgm_finetune.train.fast.head_loss.NUM_LOGITS", {"cpu": 100})  # three tokens at a time
    rows, settings = (ANSWERS if loss == "kto" else PAIRS), PreferenceConfig(loss=loss, beta=0.3)
    dataset, test_set = with_reference(base, rows)
    batch = test_set.collate(list(dataset))  # type: ignore[arg-type]
    model = copy.deepcopy(moved)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)  # else it is tied
    head_loss = find_head_loss(model, {"input_ids": batch["input_ids"]})
    assert head_loss is not None
    whole, in_parts = (
        gradients(made, PreferenceLoss(settings, how).mean(made, batch))
        for made, how in ((copy.deepcopy(model), None), (model, head_loss))
    )
    learnt = {name: gradient for name, gradient in whole[1].items() if gradient is not None}
    require_equal(in_parts, (whole[0], learnt))


def test_log_probabilities_do_not_depend_on_the_batch(base):
    """Neither padding nor neighbours change what a model says of an answer."""
    _, test_set = with_reference(base, PAIRS)
    alone = [score(base, test_set, [at]).log_probabilities for at in range(len(PAIRS))]
    together = score(base, test_set, range(len(PAIRS)))
    torch.testing.assert_close(torch.cat(alone, dim=1), together.log_probabilities, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.reference, together.log_probabilities, rtol=1e-5, atol=1e-5)


def test_every_loss_but_simpo_and_orpo_begins_where_it_does_not_depend_on_the_answers(base):
    """The base compared with itself: all ratios are 0."""
    expected = {"dpo": 0.693147, "ipo": 25.0, "kto": 0.5, "apo_zero": 1.0, "apo_down": 1.0}
    for loss, value in expected.items():
        rows = ANSWERS if loss == "kto" else PAIRS
        found, grads = ours(base, base, rows, PreferenceConfig(loss=loss))
        torch.testing.assert_close(found, torch.tensor(value), rtol=1e-4, atol=1e-4)
        assert max(float(g.abs().max()) for g in grads.values()) > 1e-4, f"{loss} has no gradient at its start"


def test_odds_of_a_certain_answer_are_finite():
    certain = torch.tensor([0.0, -1e-12], requires_grad=True)
    loss = preference.orpo(certain, torch.tensor([-1.0, 0.0]), beta=0.1).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()
