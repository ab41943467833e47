"""The report is one escaped, offline page that shows the run's numbers."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_runs import (
    classification_metrics,
    language_metrics,
    leave_run,
    older_examples,
    plain_plan,
    pooled_plan,
    read,
    sample_examples,
    sample_history,
    sample_pictures,
    sample_plan,
)
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from sgm_finetune.base.config_file import load_config, parse_config
from sgm_finetune.commands.cli import main
from sgm_finetune.method.plan import Group, Plan, PlannedMatrix, PlanSettings
from sgm_finetune.results.metrics import classification_metrics as metrics_of_classes
from sgm_finetune.results.report import grid_figures
from sgm_finetune.results.report.classes_section import class_scores, table_counts
from sgm_finetune.results.report.page import remake_report, render_report
from sgm_finetune.results.report.pictures import Pictures, SimilarityTable
from sgm_finetune.results.report.provenance_section import given_command
from sgm_finetune.results.report.run_files import Run, load_run
from sgm_finetune.results.report.similarity_figures import layers_figure
from sgm_finetune.results.report.usage import commands


def render(
    metrics: dict | None = None,
    plan: Plan | None = None,
    history: list[dict] | None = None,
    folder: str = "/runs/one",
    **more,
) -> str:
    metrics = metrics or classification_metrics()
    return render_report(
        Run(
            folder=Path(folder),
            config=parse_config({"model": {"task": metrics["task"]}}),
            plan=plan or sample_plan(),
            metrics=metrics,
            history=sample_history() if history is None else history,
            **more,
        )
    )


def test_the_page_asks_for_nothing_from_outside():
    plan = sample_plan()
    page = render(plan=plan, pictures=sample_pictures(plan))
    reader = read(page)
    assert reader.tags.count("script") == 1
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(reader.tags)
    targets = [value for _, name, value in reader.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_every_id_is_used_once_and_every_reference_finds_its_id():
    plan = sample_plan()
    page = render(plan=plan, pictures=sample_pictures(plan))
    ids = [value for _, name, value in read(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_before_and_after_stand_first():
    text = read(render()).text
    assert (
        "Accuracy 0.498 → 0.873 +0.375 95 % interval 0.852 to 0.892; always naming the most frequent class: 0.500"
        in text
    )
    assert "Macro-F1 0.333 → 0.873 +0.540" in text
    assert "Loss 0.721 → 0.313 −0.408" in text
    assert text.index("0.873") < text.index("true ↓ predicted →") < text.index("Optimizer") < text.index("3,009,152")


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
        "Training tokens per second 1,873", "q_proj 30 input 0.95 0.44 0.00 0.11", "sgm evaluate output.dir=/runs/one",
        "PeftModel.from_pretrained", '"/runs/one/adapter"', "Optimizer, peak learning rate spectral, 0.0125",
        "torch 2.13.0",
    ):  # fmt: skip
        assert words in text


def test_text_of_a_person_cannot_become_markup():
    evil = "<script>alert('&\"1')</script>"
    metrics = classification_metrics((evil, "<b>positive"))
    metrics |= {"data": evil, "model": evil, "environment": {"device": evil}}
    examples = sample_examples()
    examples["examples"][0] |= {"text": evil, "truth": evil, "before": evil, "after": evil}
    plan = sample_plan(4)
    renamed = tuple(replace(m, kind=evil if m.kind == "q_proj" else m.kind) for m in plan.matrices)
    kinds = tuple(replace(k, kind=evil) for k in plan.kinds)
    groups = tuple(replace(g, name=f"{evil}{i}") for i, g in enumerate(plan.groups))
    names = {old.name: new.name for old, new in zip(plan.groups, groups, strict=True)}
    renamed = tuple(replace(m, group=names.get(m.group or "")) for m in renamed)
    page = render(metrics, replace(plan, matrices=renamed, kinds=kinds, groups=groups), folder=f"/{evil}",
                  examples=examples)  # fmt: skip
    reader = read(page)
    assert reader.tags.count("script") == 1
    assert page.count("<script") == 1
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


def test_groups_within_a_layer_have_brackets():
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
    assert list(grid_figures.group_numbers(plan).values()) == [0, 0, 1, 1]
    page = render(plan=plan)
    assert "under one bracket: one group" in read(page).text
    assert grid_figures.shown_numbers(plan) == {}
    assert digits_of_the_grid(page) == ["0", "1"]  # the layers, and no numbers of groups


def test_pools_are_called_pools_and_shown_layer_by_direction():
    plan = pooled_plan(6)
    page = render(plan=plan, pictures=sample_pictures(plan))
    reader = read(page)
    for words in (
        "Pools 7 with 42 matrices scope pool, criterion subspace, threshold -1 Pools",
        "share the directions of their update. Each layer only weights them by numbers of its own.",
        "each multiplies the 24 columns of lora_B by weights of its own",
        "same colour in a column: one pool",
        "Each row is a layer, each column one of the directions that the layers share; bright: the layer uses it much.",
        "q_proj: 2.5 of 6 layers use a direction; 6 weaker directions left out",
        "q_proj 6 both 0.95 0.44", "q_proj/both/0 6 0–5 both 0.70 0.60",
        "for the worst member on its worse side", "Bright on both sides",
    ):  # fmt: skip
        assert words in reader.text
    assert re.findall(r"(?i).{20}\bgroups?\b|half of their update|of 7 pools", reader.text) == []
    labels = [value for _, name, value in reader.attributes if name == "aria-label"]
    assert labels.count("Use of the directions of a pool by layer: q_proj") == 1
    assert len(page) < 400_000


def test_several_pools_of_a_kind_have_numbers_of_their_own_and_only_the_first_are_drawn():
    plan = pooled_plan(6, pools_of_a_kind=2)
    assert list(grid_figures.group_numbers(plan).values()) == [0, 1] * 7
    text = read(render(plan=plan, pictures=sample_pictures(plan))).text
    for words in ("8 of 14 pools", "q_proj, pool 0: 2.5 of 3 layers", "q_proj, pool 1: 2.5 of 3 layers"):
        assert words in text


def digits_of_the_grid(page: str) -> list[str]:
    """Returns the numbers of its rows and cells."""
    drawn = re.search(r'aria-label="Which matrices share a factor".*?</svg>', page, re.DOTALL)
    assert drawn is not None
    return [text for text in re.findall(r">([^<]+)</text>", drawn[0]) if text.isdigit()]


def without(plan: Plan, kind: str, number: int) -> Plan:
    """Returns `plan` without a pool."""
    gone = f"{kind}/both/{number}"
    matrices = tuple(replace(matrix, group=None) if matrix.group == gone else matrix for matrix in plan.matrices)
    return replace(plan, matrices=matrices, groups=tuple(group for group in plan.groups if group.name != gone))


@pytest.mark.parametrize(
    ("plan", "same", "numbered"),
    [
        (pooled_plan(4), "same colour in a column: one pool", 0),
        (pooled_plan(4, pools_of_a_kind=2), "same colour, and number if any, in a column: one pool", 14),
        (without(pooled_plan(4, 2), "q_proj", 1), "same colour, and number if any, in a column: one pool", 12),
        (sample_plan(30), "same colour, and number if any, in a column: one group", 43),
    ],
    ids=["one of each kind", "several", "one of a kind", "groups"],
)
def test_numbers_stand_where_a_kind_has_several_groups_and_the_words_say_so(plan, same, numbered):
    page = render(plan=plan)
    layers = {matrix.layer for matrix in plan.matrices}
    shown = [group for group in plan.groups if group.name in grid_figures.shown_numbers(plan)]
    assert len(shown) == numbered
    assert same in read(page).text
    assert len(digits_of_the_grid(page)) == len(layers) + sum(len(group.members) for group in shown)
    beside = re.findall(r'<span class="number"[^>]*>([^<]*)</span>', page)
    assert [text.isdigit() for text in beside] == [group in shown for group in plan.groups]


def test_the_legend_names_what_the_grid_shows():
    pooled = pooled_plan(4)
    left = replace(pooled, matrices=(replace(pooled.matrices[0], selected=False, group=None), *pooled.matrices[1:]))
    shown = [
        [words in read(render(plan=plan)).text for words in ("trained alone", "not trained")]
        for plan in (pooled, without(pooled_plan(4, 2), "q_proj", 1), left)
    ]
    assert shown == [[False, False], [True, False], [False, True]]


def test_a_pool_is_outlined_on_both_sides():
    plan = pooled_plan(4)
    for table in sample_pictures(plan).similarities[:2]:
        assert "#d1201f" in layers_figure(table, plan, 0)
        assert "#d1201f" not in layers_figure(table, replace(plan, groups=()), 0)


def test_pools_that_were_not_found_say_that_both_sides_count():
    plan = pooled_plan(4)
    plan = replace(
        plan,
        settings=replace(plan.settings, threshold=0.9),
        groups=(),
        matrices=tuple(replace(matrix, group=None) for matrix in plan.matrices),
    )
    assert "criterion “subspace” at threshold 0.9 on both sides, so every matrix" in read(render(plan=plan)).text
    below = replace(plan, settings=replace(plan.settings, threshold=-0.5))
    assert "at threshold −0.5 on both sides" in read(render(plan=below)).text


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
    labels = tuple(f"class {i}" for i in range(20))
    metrics = classification_metrics(labels)
    metrics["after"]["confusion_matrix"] = [[int(i == j) for j in range(20)] for i in range(20)]
    assert "Confusion matrix of 20 classes" in read(render(metrics)).text


@pytest.mark.parametrize("number", [31, 300, 1000])
def test_of_very_many_classes_the_worst_are_shown_on_a_small_page(number):
    chance = random.Random(0)
    labels = tuple(f"a class with a long name, number {i}" for i in range(number))
    metrics = classification_metrics(labels)
    tables = [[[chance.randrange(5) for _ in labels] for _ in labels] for _ in range(2)]
    tables[1][3][7] = 99
    metrics["before"]["confusion_matrix"], metrics["after"]["confusion_matrix"] = tables
    page = render(metrics, examples=sample_examples())
    assert len(page) < 600_000
    text = read(page).text
    share = round(100 * 99 / sum(tables[1][3]))
    assert (
        "true class was taken for examples of the class a class with a long name, number 3 a class with a long name, "
        f"number 7 99 {share} %" in text
    )
    assert f"The 20 classes that are found worst, of {number:,}, before → after" in text


def test_metrics_of_very_many_classes_are_small_and_their_page_is_the_same():
    """A confusion matrix of 1,000 classes has a million numbers; older results hold it."""
    chance = np.random.default_rng(0)
    truth, number = chance.integers(120, size=4000), 120
    named = np.where(chance.random(4000) < 0.7, truth, chance.integers(number, size=4000))
    named[truth == 3] = 7
    found = metrics_of_classes(truth.tolist(), named.tolist(), number)
    assert "confusion_matrix" not in found
    assert found["confusions"][0] == [3, 7, int((truth == 3).sum())]
    assert len(json.dumps(found)) < 10_000
    few = metrics_of_classes([0, 1, 1], [0, 1, 0], 2)
    assert few["confusion_matrix"] == [[1, 0], [1, 1]]
    older = {**classification_metrics(tuple(f"class {i}" for i in range(number)))}
    table = confusion_matrix(truth, named, labels=range(number)).tolist()
    older["before"], older["after"] = ({**older[when], "confusion_matrix": table} for when in ("before", "after"))
    newer = {**older}
    for when in ("before", "after"):
        kept = {key: value for key, value in older[when].items() if key != "confusion_matrix"}
        newer[when] = {**kept, "confusions": found["confusions"], "class_counts": found["class_counts"]}
    pages = [read(render(metrics)).text for metrics in (older, newer)]
    assert "class 3 class 7" in pages[1]
    assert pages[0].split("The whole table")[0] == pages[1].split("More of them are in")[0]


def test_a_run_with_5000_classes_can_be_read_again(tmp_path):
    """Its metrics once held 25 million numbers, more than the reader of JSON accepts."""
    chance, number = np.random.default_rng(0), 5000
    labels = tuple(f"a class with a long name, number {i}" for i in range(number))
    truth = chance.integers(number, size=20_000)
    named = {"before": chance.integers(number, size=20_000)}
    named["after"] = np.where(chance.random(20_000) < 0.7, truth, named["before"])
    metrics, begun = classification_metrics(labels), time.process_time()
    for when, predicted in named.items():
        metrics[when] = {"loss": 1.0, **metrics_of_classes(truth.tolist(), predicted.tolist(), number)}
    folders = [leave_run(tmp_path / name, metrics["after"]["accuracy"], metrics=dict(metrics)) for name in "ab"]
    for folder in folders:
        assert (folder / "metrics.json").stat().st_size < 2**20
        assert load_run(folder).metrics["labels"] == list(labels)
        assert remake_report(folder).stat().st_size < 2**20
    with pytest.raises(SystemExit, match="0"):
        main(["compare", *map(str, folders)])
    assert time.process_time() - begun < 30


def test_metrics_of_many_classes_are_those_of_the_confusion_matrix():
    chance, number = np.random.default_rng(0), 150
    truth = chance.integers(number - 20, size=2000)
    for named in (chance.integers(number, size=2000), truth):
        found = metrics_of_classes(truth.tolist(), named.tolist(), number)
        table = confusion_matrix(truth, named, labels=range(number))
        assert found["class_counts"] == {
            "true": table.sum(1).tolist(),
            "predicted": table.sum(0).tolist(),
            "right": table.diagonal().tolist(),
        }
        wrong = [(-table[i, j], i, j) for i in range(number) for j in range(number) if i != j and table[i, j]]
        assert found["confusions"] == [[i, j, -count] for count, i, j in sorted(wrong)[:100]]
        assert found["majority_accuracy"] == table.sum(1).max() / 2000


def test_each_class_has_its_scores_before_and_after():
    text = read(render()).text
    assert "negative 533 0.499 → 0.895 0.996 → 0.846 0.665 → 0.870" in text
    assert "positive 533 0.000 → 0.854 0.000 → 0.901 0.000 → 0.877" in text


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_the_scores_of_a_class_are_those_of_scikit_learn(pairs):
    truth, predicted = zip(*pairs, strict=True)
    table = confusion_matrix(truth, predicted, labels=range(4)).tolist()
    found = np.array([[score or 0.0 for score in scores] for scores in class_scores(table_counts(table))])
    expected = precision_recall_fscore_support(truth, predicted, labels=range(4), zero_division=0.0)[:3]
    assert found == pytest.approx(np.array(expected).T)


def test_a_run_that_is_no_better_says_so_first():
    metrics = classification_metrics()
    metrics["after"] |= {"accuracy": 0.49}
    text = read(render(metrics)).text
    assert text.index("This run ended no better than it began: accuracy 0.498 → 0.490") < text.index("Accuracy 0.498")
    assert "Try another learning rate: this run's was 0.0125" in text
    assert "ended no better" not in read(render()).text


def test_the_contents_lead_to_every_section():
    plan = sample_plan(4)
    reader = read(render(plan=plan, pictures=sample_pictures(plan), examples=sample_examples()))
    links = [value for tag, name, value in reader.attributes if (tag, name) == ("a", "href")]
    headings = [value for tag, name, value in reader.attributes if (tag, name) == ("h2", "id")]
    assert links == ["#results", *(f"#{name}" for name in headings)]


def test_name_and_date_of_the_run_and_its_command_are_shown():
    text = read(
        render(environment={"began": "2026-03-04T05:06:07+01:00", "command": ["sgm", "finetune", "a=b c"]})
    ).text
    assert "Run one , began on 04 March 2026, 04:06 UTC" in text
    assert "The command that was given, beside the configuration below: sgm finetune 'a=b c'" in text


def test_a_command_that_was_not_kept_is_built_again_from_the_configuration():
    config = parse_config({
        "model": {"task": "causal-lm"}, "data": {"columns": {"text": "a b"}, "max_length": 77},
        "training": {"report_to": ["tensorboard"], "learning_rate": 1e-05}, "output": {"dir": "true"},
    })  # fmt: skip
    command, _ = given_command(Run(Path("x"), config, plain_plan(), classification_metrics()))
    first, second, *overrides = shlex.split(command)
    assert (first, second) == ("sgm", "finetune")
    assert load_config(None, overrides) == config


def test_the_files_of_the_run_are_linked_as_they_lie(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "metrics.json").write_text("{}")
    reader = read(render(folder=str(tmp_path)))
    links = [value for tag, name, value in reader.attributes if (tag, name) == ("a", "href") and value[0] != "#"]
    assert links == ["metrics.json", "adapter/"]


def test_matrices_without_signal_are_named_and_have_no_decibels():
    plan = sample_plan(4)
    silent = next(group for group in plan.groups if group.kind == "v_proj")
    matrices = tuple(
        replace(m, snr=0.0, snr_db=None, signal_rank=0) if m.name in silent.members else m for m in plan.matrices
    )
    groups = tuple(replace(g, snr_spread_db=132.5) if g is silent else g for g in plan.groups)
    text = read(render(plan=replace(plan, matrices=matrices, groups=groups))).text
    assert "No signal was found in v_proj" in text
    assert "no signal in v_proj" in text
    assert "132.5" not in text


def test_values_above_one_are_explained():
    plan = sample_plan(4)
    above = replace(plan, kinds=(replace(plan.kinds[0], retention_input=1.02), *plan.kinds[1:]))
    assert "Above 1, the common basis keeps even more" not in read(render(plan=plan)).text
    assert "Above 1, the common basis keeps even more" in read(render(plan=above)).text


def test_the_gradient_norm_is_drawn_where_it_was_logged():
    history = [{"step": step, "loss": 1.0, "grad_norm": 2.0} for step in range(1, 9)]
    assert 'aria-label="Gradient norm by step"' in render(history=history)
    assert "Gradient norm" not in render(history=[{"step": 1, "loss": 1.0}])


def test_a_dense_curve_can_be_seen_larger():
    assert 'aria-label="Loss by step, larger"' in render(history=sample_history(200))
    assert 'aria-label="Loss by step, larger"' not in render(history=sample_history(100))


def test_matrices_that_share_a_cell_or_have_no_layer_are_all_drawn():
    experts = [PlannedMatrix(f"experts.{i}.w1", "w1", 0, (8, 8), selected=True, snr_db=3.0) for i in range(4)]
    pooler = PlannedMatrix("pooler.dense", "dense", None, (8, 8), selected=True, snr_db=3.0)
    page = render(plan=Plan("moe", PlanSettings(rank=4, alpha=8), (*experts, pooler)))
    assert page.count("var(--alone); stroke: none") + page.count('fill: var(--alone)"') >= 5
    assert "other" in read(page).text


def test_examples_are_called_a_sample_and_stand_beside_the_counts_of_all():
    text = read(render(examples=sample_examples())).text
    assert (
        "These 4 are a random sample of the 12 examples that did not stay right, of 200 test examples, drawn at random "
        "from 1,066." in text
    )
    assert "prediction all good bad shown here became right 7 5 2 2 became wrong 1 1 0 1 stayed wrong 4 4 0 1" in text
    assert "stayed right 188 90 98 –" in text
    assert "text 1 true: good · before: good · after: bad ✗ became wrong" in text


def test_examples_of_an_older_run_are_not_called_a_sample():
    text = read(render(examples=older_examples())).text
    assert "The prediction changed for 8 of the first 200 test examples" in text
    assert "they are not a sample of all" in text
    assert "became right 7 2 became wrong 1 1 stayed wrong 0 0" in text
    assert "text 2 true: good" in text


def test_what_was_measured_is_drawn_with_words_for_those_who_do_not_see_it():
    plan = sample_plan(6)
    reader = read(render(plan=plan, pictures=sample_pictures(plan)))
    labels = [value for _, name, value in reader.attributes if name == "aria-label"]
    assert "Singular values of layers.0.fc" in labels
    assert "Similarity of layers: q_proj, input gradients" in labels
    assert "6 × 5: signal rank 0, no signal" in reader.text


def test_readers_of_the_same_activations_are_drawn_by_layer():
    plan = sample_plan(5)
    tables = tuple(
        SimilarityTable("q_proj+k_proj+v_proj", "input",
              tuple(f"model.layers.{layer}.{kind}" for kind in ("q_proj", "k_proj", "v_proj")), (0.9, 0.8, 0.99))
        for layer in range(5)
    )  # fmt: skip
    page = render(plan=plan, pictures=Pictures((), tables))
    assert 'aria-label="Similarity of readers by layer: q_proj+k_proj+v_proj"' in page
    assert "q_proj · k_proj" in read(page).text


def test_the_commands_name_the_output_folder():
    text = read(render(folder="/my runs/one")).text
    assert "sgm evaluate 'output.dir=/my runs/one'" in text
    assert 'PeftModel.from_pretrained(base, "/my runs/one/adapter")' in text
    assert f"sgm evaluate output.dir={Path.cwd()}/output" in read(render(folder="a/../output")).text


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_every_command_on_the_page_is_one_of_sgm(task):
    import typer
    from typer.testing import CliRunner

    from sgm_finetune.commands.cli import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command in commands(parse_config({"model": {"task": task}}), Path("/a b")):
        name, *arguments = shlex.split(command.line)[1:]
        assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= {
            option for parameter in known[name].params for option in parameter.opts
        }
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_the_same_run_gives_the_same_bytes_whatever_the_persons_settings():
    import matplotlib

    first = render()
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        assert render() == first
    assert render() == first
