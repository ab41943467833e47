"""Losses and metrics agree with the models' own and with what can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from architectures import DECODERS, save_pico
from conftest import make_tokenizer
from datasets import Dataset

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import collator
from sgm_finetune.data.encoding import IGNORED
from sgm_finetune.data.questions import Question, has_answers, questions
from sgm_finetune.model.load import Head, load_model
from sgm_finetune.results.evaluation import evaluate_model
from sgm_finetune.results.generation import answer_metrics, continue_prompts, generate_answers
from sgm_finetune.results.metric_names import describe_metrics
from sgm_finetune.results.metrics import (
    multilabel_metrics,
    regression_metrics,
    tagging_metrics,
)
from sgm_finetune.results.ship.task import class_counts, task_sums
from sgm_finetune.results.stops import Stops
from sgm_finetune.train.losses import TestSet, check_packing, summed_loss

CASES = [
    ("bert", "sequence-classification", "class", torch.tensor([0, 2, 1])),
    ("bert", "sequence-classification", "classes", torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])),
    ("bert", "sequence-classification", "number", torch.tensor([0.5, -1.0, 3.0])),
    ("bert", "token-classification", None, torch.tensor([[0, 1, 2, IGNORED]] * 3)),
    ("llama", "causal-lm", None, torch.tensor([[3, 4, 5, IGNORED]] * 3)),
    ("bart", "seq2seq-lm", None, torch.tensor([[3, 4, 2, IGNORED]] * 3)),
]


@pytest.mark.parametrize(("name", "task", "kind", "labels"), CASES)
def test_a_summed_loss_over_its_count_is_the_models_own_mean(name, task, kind, labels, tmp_path):
    config = ModelConfig(task=task, dtype="float32")
    names = () if kind == "number" or task.endswith("lm") else ("a", "b", "c")
    model, _ = load_model(config, save_pico(name, tmp_path / name), Head(names, kind, 0))
    ids = torch.tensor([[3, 4, 5, 2]] * 3)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    total, count = summed_loss(output.logits, labels, task)
    torch.testing.assert_close(total / count, output.loss)


@pytest.mark.parametrize(("name", "task", "kind", "labels"), CASES)
def test_an_evaluation_gives_the_same_whatever_the_batch(name, task, kind, labels, tmp_path):
    config = ModelConfig(task=task, dtype="float32")
    names = () if kind == "number" or task.endswith("lm") else ("a", "b", "c")
    model, _ = load_model(config, save_pico(name, tmp_path / name), Head(names, kind, 0))
    ids = [[3, 4, 5, 2][: 4 if task != "sequence-classification" else 2 + row] for row in range(3)]
    rows = {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": labels.tolist()}
    collate = collator(make_tokenizer(), task)
    sets = (TestSet(Dataset.from_dict(rows), collate, task, size, names) for size in (1, 3))
    one, all_ = (evaluate_model(model, test_set).metrics for test_set in sets)
    assert one.keys() == all_.keys()
    assert one["loss"] == pytest.approx(all_["loss"], rel=1e-5)
    assert describe_metrics(one).endswith(("3 test examples", f"{one.get('num_tokens')} test tokens"))


@pytest.mark.parametrize(("name", "task", "kind", "labels"), CASES)
def test_what_is_compared_before_shipping_is_what_an_evaluation_measures(name, task, kind, labels, tmp_path):
    config = ModelConfig(task=task, dtype="float32")
    names = () if kind == "number" or task.endswith("lm") else ("a", "b", "c")
    model, _ = load_model(config, save_pico(name, tmp_path / name), Head(names, kind, 0))
    rows = {"input_ids": [[3, 4, 5, 2]] * 3, "attention_mask": [[1] * 4] * 3, "labels": labels.tolist()}
    test_set = TestSet(Dataset.from_dict(rows), collator(make_tokenizer(), task), task, 2, names)
    metrics = evaluate_model(model, test_set).metrics
    sums, predictions = task_sums(model, test_set, lambda done, total: None)
    assert sums.number == 3
    for key, value in sums.values().items():
        assert value == pytest.approx(metrics[key], rel=1e-5, abs=1e-6), key
    counts = class_counts(test_set, predictions) if predictions else []
    assert [one[0] for one in counts] == list(names)
    assert bool(counts) == bool(names)
    expected = {"class": 3, "classes": 5, None: 9}[kind] if names else 0
    assert sum(true for _, true, _ in counts) == expected


def test_sets_of_classes_are_counted_by_class_and_as_a_whole():
    truth, named = [[1, 0], [1, 1], [1, 0]], [[1, 0], [1, 0], [0, 0]]
    found = multilabel_metrics(truth, named)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 2))  # 2 right, 2 missed, none too many
    assert found["macro_f1"] == pytest.approx((0.8 + 0) / 2)
    assert found["majority_accuracy"] == pytest.approx(2 / 3)


def test_the_mean_explains_nothing_of_numbers():
    found = regression_metrics([1.0, 2.0, 6.0], [3.0, 3.0, 3.0])
    assert found == {"r2": 0.0, "mae": 2.0, "pearson": 0.0, "spearman": 0.0}
    assert regression_metrics([1.0, 2.0, 6.0], [1.0, 3.0, 4.0])["spearman"] == pytest.approx(1.0)


def test_an_entity_is_right_when_all_of_it_is():
    names = ("B-X", "I-X", "O")
    found = tagging_metrics([[0, 1, 2, 0], [2, 0]], [[0, 1, 2, 2], [2, 0]], names)
    assert found["num_words"] == 6
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["entity_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert "entity_f1" not in tagging_metrics([[0, 1]], [[0, 1]], ("noun", "verb"))


def test_answers_are_compared_by_words():
    found = answer_metrics(["the cat sat down", "no"], ["the  cat sat down", "yes"])
    assert found["exact_match"] == 0.5
    assert found["rouge_l"] == 0.5
    assert 0 < found["bleu"] < 100


def test_what_answers_were_generated_to_is_said_beside_what_the_loss_was_measured_on():
    line = describe_metrics({"loss": 1.0, "rouge_l": 0.5, "num_tokens": 30, "num_examples": 9, "num_generated": 4})
    assert line == "ROUGE-L 0.500 · loss 1.0000 · 30 test tokens · 4 generated answers"


def test_a_question_is_all_before_the_last_answer():
    rows = {"input_ids": [[3, 4, 5, 6, 7, 2]], "labels": [[IGNORED, 4, IGNORED, IGNORED, 7, 2]]}
    encoded = Dataset.from_dict(rows)
    assert questions(encoded, [0], "causal-lm") == [Question([3, 4, 5, 6], [7, 2])]
    assert questions(encoded, [0], "seq2seq-lm") == [Question([3, 4, 5, 6, 7, 2], rows["labels"][0])]
    assert has_answers(encoded, "causal-lm")
    assert not has_answers(Dataset.from_dict({"input_ids": [[3]], "labels": [[3]]}), "causal-lm")
    assert not has_answers(encoded, "token-classification")


@pytest.mark.parametrize(("name", "task"), [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("bart", "seq2seq-lm")])
def test_an_answer_does_not_depend_on_the_questions_beside_it(name, task, tmp_path):
    model, _ = load_model(ModelConfig(task=task, dtype="float32"), save_pico(name, tmp_path / name))
    asked = [Question([3, 4, 5, 6, 7, 2], [8, 9, 2]), Question([10, 2], [11, 12, 2]), Question([4, 5, 2], [3, 2])]
    together = generate_answers(model, asked, make_tokenizer(), task, 3)
    limit = max(len(q.answer) for q in asked)
    alone = [
        generate_answers(model, [Question(q.prompt, [8] * (limit - 1) + [2])], make_tokenizer(), task, 1)[0]
        for q in asked
    ]
    assert together == alone
    assert not model.training


def test_prompts_are_padded_whatever_the_tokenizer_leaves_out(tmp_path):
    """An empty prompt is answered, and so are others by a tokenizer that gives no mask or has no padding token."""
    model, _ = load_model(ModelConfig(task="causal-lm", dtype="float32"), save_pico("llama", tmp_path / "llama"))
    prompts, plain = [[3, 4, 5], [6]], make_tokenizer()
    expected = continue_prompts(model, prompts, plain, "causal-lm", Stops((2,)), limit=4, batch_size=2)
    assert len(continue_prompts(model, [[]], plain, "causal-lm", Stops((2,)), limit=4)) == 1
    without_mask, without_padding = make_tokenizer(), make_tokenizer()
    without_mask.model_input_names = ["input_ids"]
    without_padding.pad_token = None
    assert continue_prompts(model, prompts, without_mask, "causal-lm", Stops((2,)), limit=4, batch_size=2) == expected
    assert (
        continue_prompts(model, prompts, without_padding, "causal-lm", Stops((2,)), limit=4, batch_size=1) == expected
    )


def packed(*examples: list[int]) -> Dataset:
    ids = [token for example in examples for token in example]
    positions = [position for example in examples for position in range(len(example))]
    return Dataset.from_dict({"input_ids": [ids], "labels": [ids], "position_ids": [positions]})


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "gpt_oss"])
def test_packed_examples_do_not_see_each_other(name, tmp_path):
    """The same loss as one by one, and the check says nothing."""
    model, _ = load_model(ModelConfig(task="causal-lm", dtype="float32"), save_pico(name, tmp_path / name))
    examples = [3, 4, 5, 6], [7, 8, 9], [10, 11]
    check_packing(model, packed(*examples))
    collate = collator(make_tokenizer(), "causal-lm", 8)
    alone = [{"input_ids": e, "labels": [IGNORED, *e[1:]], "attention_mask": [1] * len(e)} for e in examples]
    together = dict(packed(*examples)[0])
    together["labels"] = [label for row in alone for label in row["labels"]]
    losses = []
    for rows in (alone, [together]):
        batch = collate(rows)
        labels = batch.pop("labels")
        with torch.no_grad():
            total, count = summed_loss(model(**batch).logits, labels, "causal-lm")
        losses.append(float(total) / count)
        assert count == 3 + 2 + 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_model_in_which_packed_examples_see_each_other_is_refused(tmp_path):
    model, _ = load_model(ModelConfig(task="causal-lm", dtype="float32"), save_pico("llama", tmp_path / "llama"))
    inner = model.forward

    def forward(input_ids, position_ids=None):  # one that takes no heed of where an example begins
        return inner(input_ids=input_ids)

    model.forward = forward
    with pytest.raises(
        UserError, match=r"packed examples see each other in a LlamaForCausalLM; take data\.packing=false"
    ):
        check_packing(model, packed([3, 4, 5, 6], [7, 8, 9]))
