"""The report is one escaped, offline page that shows the run's numbers."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from sgm_finetune.config import Config, parse_config
from sgm_finetune.method.plan import Energy, Group, KindNumbers, Plan, PlannedMatrix, PlanSettings
from sgm_finetune.report import figures
from sgm_finetune.report.page import render_report

READERS, WRITERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOID = {"meta", "link", "br", "hr", "img", "input"}


def sample_plan(num_layers: int = 30, seed: int = 0) -> Plan:
    """A plan with made-up numbers: neighbours are merged, a quarter of o_proj is not trained, some layers are alone."""
    chance = random.Random(seed)
    matrices, groups, kinds = [], [], []
    for kind in KINDS:
        side = "input" if kind in READERS else "output"
        members: list[list[int]] = []
        start = 0
        while start < num_layers:
            size = chance.choice((1, 2, 4, 5, 8))
            members.append(list(range(start, min(start + size, num_layers))))
            start += size
        skipped = set(range(0, num_layers, 4)) if kind == "o_proj" else set()
        group_of = {}
        merged = [kept for run in members if len(kept := [layer for layer in run if layer not in skipped]) > 1]
        for index, layers in enumerate(merged):
            name = f"{kind}/{side}/{index}"
            group_of |= dict.fromkeys(layers, name)
            groups.append(
                Group(
                    name=name,
                    kind=kind,
                    side=side,
                    members=tuple(f"model.layers.{layer}.{kind}" for layer in layers),
                    similarity=chance.uniform(0.86, 0.99),
                    joint_retention=chance.uniform(0.85, 0.98),
                    snr_spread_db=chance.uniform(0, 6),
                )
            )
        for layer in range(num_layers):
            level = 4 * math.sin(layer / 5) + 3 * KINDS.index(kind) - 8 + chance.gauss(0, 1)
            matrices.append(
                PlannedMatrix(
                    name=f"model.layers.{layer}.{kind}",
                    kind=kind,
                    layer=layer,
                    shape=(576, 576),
                    selected=layer not in skipped,
                    group=group_of.get(layer),
                    snr=10 ** (level / 10),
                    snr_db=level,
                    signal_rank=40,
                    gradient_energy=0.3,
                    cosine_other_half=0.6,
                    kept_own=Energy(0.8, 0.5),
                    kept_shared=0.75 if layer in group_of else None,
                )
            )
        kinds.append(
            KindNumbers(kind, num_layers - len(skipped), side, 0.95, 0.44, 0.004, 0.11, chance.uniform(0.4, 0.8))
        )
    matrices.sort(key=lambda matrix: (matrix.layer, KINDS.index(matrix.kind)))
    return Plan(
        "smollm2-135m-instruct", PlanSettings(rank=16, alpha=32, scope="layers"), tuple(matrices), tuple(groups),
        tuple(kinds), "mp",
    )  # fmt: skip


def plain_plan() -> Plan:
    """What a run without scan numbers, probe and merging leaves: every optional number is None."""
    matrices = tuple(
        PlannedMatrix(f"h.{layer}.c_attn", "c_attn", layer, (2304, 768), selected=layer > 0) for layer in range(3)
    )
    return Plan("gpt2", PlanSettings(rank=8, alpha=16, side="none"), matrices, (), (KindNumbers("c_attn", 2, None),))


def sample_history(steps: int = 240) -> list[dict]:
    """Transformers' log history: a loss a step, a validation loss every quarter, the closing summary."""
    chance = random.Random(1)
    history: list[dict] = []
    for step in range(1, steps + 1):
        loss = 0.35 + 0.4 * math.exp(-step / 50) + chance.gauss(0, 0.06)
        history.append({"step": step, "epoch": step / steps, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0})
        if step % max(1, steps // 4) == 0:
            history.append({"step": step, "eval_loss": 0.34 + 0.35 * math.exp(-step / 60), "eval_runtime": 4.2})
    return [*history, {"step": steps, "train_loss": 0.41, "train_runtime": 311.0}]


def classification_metrics(labels: tuple[str, ...] = ("negative", "positive")) -> dict:
    return {
        "model": "smollm2-135m-instruct",
        "task": "sequence-classification",
        "data": "rotten-tomatoes: 7,676 train · 853 validation · 1,066 test",
        "labels": list(labels),
        "before": {"loss": 0.7213, "accuracy": 0.4981, "macro_f1": 0.3326, "majority_accuracy": 0.5,
                   "confusion_matrix": [[531, 2], [533, 0]], "num_examples": 1066},
        "after": {"loss": 0.3127, "accuracy": 0.8734, "macro_f1": 0.8729, "majority_accuracy": 0.5,
                  "confusion_matrix": [[451, 82], [53, 480]], "num_examples": 1066},
        "trainable_parameters": 3_009_152,
        "plain_lora_parameters": 4_884_480,
        "seconds": {"scan": 3.91, "probe": 41.2, "train": 312.7, "evaluate": 38.1, "total": 402.4},
        "peak_memory_bytes": 2_913_400_000,
        "predicted": {"peak_bytes": 2_700_000_000},
        "steps": 240,
        "best_step": 180,
        "tokens_per_second": 1873.4,
        "optimizer": "spectral",
        "learning_rate": 0.0125,
        "probe": {"loss": 0.72, "num_batches": 8, "num_tokens": 1893, "sketch_bytes": 92_000_000,
                  "activation_bytes": 31_000_000},
        "environment": {"python": "3.11.2", "sgm-finetune": "0.1.0", "torch": "2.13.0", "device": "CPU, 8 threads"},
    }  # fmt: skip


def language_metrics() -> dict:
    return classification_metrics() | {
        "task": "causal-lm",
        "labels": [],
        "before": {"loss": 3.534, "perplexity": 34.261, "num_tokens": 20_480, "num_examples": 40},
        "after": {"loss": 2.617, "perplexity": 13.694, "num_tokens": 20_480, "num_examples": 40},
    }


class Reader(HTMLParser):
    """Collects tags, attributes and text, and notes every tag that does not close where it should."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.problems: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.problems == []
    assert reader.open == []
    return reader


def render(metrics: dict | None = None, plan: Plan | None = None, history: list[dict] | None = None, **sections) -> str:
    metrics = metrics or classification_metrics()
    sections.setdefault("model", {"task": metrics["task"]})
    return render_report(
        config=parse_config(sections) if sections else Config(),
        plan=plan or sample_plan(),
        metrics=metrics,
        history=sample_history() if history is None else history,
    )


def test_the_page_asks_for_nothing_from_outside():
    page = render()
    reader = read(page)
    assert "script" not in reader.tags
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(reader.tags)
    targets = [value for _, name, value in reader.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert all(target.startswith("#") for target in targets)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_every_id_is_used_once_and_every_reference_finds_its_id():
    page = render()
    ids = [value for _, name, value in read(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_before_and_after_stand_first():
    text = read(render()).text
    assert "Accuracy 0.498 → 0.873 +0.375 always naming the most frequent class: 0.500" in text
    assert "Macro-F1 0.333 → 0.873 +0.540" in text
    assert "Loss 0.721 → 0.313 −0.408" in text
    assert text.index("0.873") < text.index("true ↓ predicted →") < text.index("Training") < text.index("3,009,152")


def test_the_confusion_matrix_is_shown_with_its_classes():
    text = read(render()).text
    assert "negative 451 85 % 82 15 % 533 positive 53 10 % 480 90 % 533" in text
    assert "A row holds the examples of one true class" in text
    metrics = classification_metrics()
    metrics["after"] |= {"num_words": 1066}
    assert "A row holds the words of one true class" in read(render(metrics)).text


def test_the_numbers_of_plan_and_training_are_shown():
    text = read(render()).text
    for words in (
        "3,009,152", "4,884,480 (38 % fewer)", "Time: train 5 min 13 s", "Peak memory 2.7 GiB (predicted: 2.5 GiB)",
        "Training tokens per second 1,873", "q_proj 30 input 0.95 0.44 0.00 0.11", "python src/evaluate.py",
        "PeftModel.from_pretrained", '"output/adapter"', "Optimizer, peak learning rate spectral, 0.0125",
        "torch 2.13.0",
    ):  # fmt: skip
        assert words in text


def test_text_of_a_person_cannot_become_markup():
    evil = "<script>alert('&\"1')</script>"
    metrics = classification_metrics((evil, "<b>positive"))
    metrics |= {"data": evil, "model": evil, "environment": {"device": evil}}
    plan = sample_plan(4)
    renamed = tuple(replace(m, kind=evil if m.kind == "q_proj" else m.kind) for m in plan.matrices)
    kinds = tuple(replace(k, kind=evil) for k in plan.kinds)
    groups = tuple(replace(g, name=f"{evil}{i}") for i, g in enumerate(plan.groups))
    names = {old.name: new.name for old, new in zip(plan.groups, groups, strict=True)}
    renamed = tuple(replace(m, group=names.get(m.group or "")) for m in renamed)
    page = render(metrics, replace(plan, matrices=renamed, kinds=kinds, groups=groups), output={"dir": evil})
    reader = read(page)
    assert "script" not in reader.tags
    assert "<script" not in page
    assert "<b>positive" not in page
    assert evil in reader.text


def test_a_language_model_shows_perplexity_and_no_confusion_matrix():
    text = read(render(language_metrics())).text
    assert "Perplexity 34.26 → 13.69 −20.57" in text
    assert "Loss 3.534 → 2.617" in text
    assert "20,480 predicted tokens" in text
    assert "AutoModelForCausalLM" in text
    assert "predicted →" not in text
    assert "Accuracy" not in text


def test_a_run_without_probe_groups_or_history_has_dashes_where_nothing_was_measured():
    metrics = classification_metrics()
    metrics |= {"probe": None, "best_step": None, "tokens_per_second": None}
    metrics["seconds"] = {"scan": None, "probe": None, "train": 1.0, "evaluate": 0.5, "total": 1.5}
    text = read(render(metrics, plain_plan(), [])).text
    assert "c_attn 2 – – – – – – – – 0" in text
    assert "plain LoRA" in text
    assert "Time: probe –" in text
    assert "Training tokens per second –" in text
    assert "No loss was logged" in text
    assert "None" not in text


def test_groups_within_a_layer_are_numbered_by_row():
    plan = sample_plan(2)
    groups = tuple(
        Group(f"{'+'.join(kinds)}/input/{layer}", "+".join(kinds), "input",
              tuple(f"model.layers.{layer}.{kind}" for kind in kinds))
        for kinds in (("q_proj", "k_proj"), ("gate_proj", "up_proj")) for layer in range(2)
    )  # fmt: skip
    owner = {name: group.name for group in groups for name in group.members}
    matrices = tuple(replace(matrix, group=owner.get(matrix.name)) for matrix in plan.matrices)
    settings = PlanSettings(rank=16, alpha=32, scope="activation")
    plan = replace(plan, settings=settings, groups=groups, matrices=matrices)
    assert list(figures.group_numbers(plan).values()) == [0, 0, 1, 1]
    assert "same colour and number in a row: one group" in read(render(plan=plan)).text


def test_a_criterion_that_finds_nothing_is_named():
    plan = replace(sample_plan(4), groups=())
    plan = replace(plan, matrices=tuple(replace(m, group=None) for m in plan.matrices))
    assert "No two matrices passed the criterion “subspace” at threshold 0.85" in read(render(plan=plan)).text


@pytest.mark.parametrize("steps", [1, 19, 5000])
def test_short_and_long_histories_are_drawn(steps):
    page = render(history=[*sample_history(steps), {"step": steps, "loss": math.nan, "eval_loss": math.inf}])
    assert 'aria-label="Loss by step"' in page
    assert len(page) < 400_000


def test_many_classes_are_folded():
    labels = tuple(f"class {i}" for i in range(77))
    metrics = classification_metrics(labels)
    metrics["after"]["confusion_matrix"] = [[int(i == j) for j in range(77)] for i in range(77)]
    assert "Confusion matrix of 77 classes" in read(render(metrics)).text


def test_matrices_that_share_a_cell_or_have_no_layer_are_all_drawn():
    experts = [PlannedMatrix(f"experts.{i}.w1", "w1", 0, (8, 8), selected=True, snr_db=3.0) for i in range(4)]
    pooler = PlannedMatrix("pooler.dense", "dense", None, (8, 8), selected=True, snr_db=3.0)
    page = render(plan=Plan("moe", PlanSettings(rank=4, alpha=8), (*experts, pooler)))
    assert page.count("var(--alone); stroke: none") + page.count('fill: var(--alone)"') >= 5
    assert "other" in read(page).text


def test_the_commands_name_the_output_folder():
    text = read(render(output={"dir": "runs/my run"})).text
    assert "python src/evaluate.py 'output.dir=runs/my run'" in text
    assert 'PeftModel.from_pretrained(base, "runs/my run/adapter")' in text


def test_the_same_run_gives_the_same_bytes_whatever_the_persons_settings():
    import matplotlib

    first = render()
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        assert render() == first
    assert render() == first
