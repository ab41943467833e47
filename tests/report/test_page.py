"""The report is one escaped, offline page that shows the run's numbers."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_runs import (
    classification_metrics,
    language_metrics,
    plain_plan,
    read,
    sample_examples,
    sample_history,
    sample_pictures,
    sample_plan,
)

from sgm_finetune.base.config_file import parse_config
from sgm_finetune.method.plan import Group, Plan, PlannedMatrix, PlanSettings
from sgm_finetune.results.report import grid_figures
from sgm_finetune.results.report.page import render_report
from sgm_finetune.results.report.pictures import Pictures, SimilarityTable
from sgm_finetune.results.report.run_files import Run
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
    assert list(grid_figures.group_numbers(plan).values()) == [0, 0, 1, 1]
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


def test_examples_that_became_right_and_wrong_take_turns():
    text = read(render(examples=sample_examples())).text
    assert (
        "The prediction changed for 8 of the first 200 test examples: 7 became right, 1 became wrong, 0 stayed wrong. "
        "Some of them:" in text
    )
    assert text.index("text 0") < text.index("text 1 true: good · before: good · after: bad ✗") < text.index("text 2")


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
