"""A comparison ranks only runs that were tested on the same data, and states the lead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up_runs import classification_metrics, language_metrics, leave_run, read
from rich.console import Console

from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.cli import main
from sgm_finetune.results.report.comparison import compare_runs
from sgm_finetune.results.report.comparison_page import print_comparison, render_comparison


def test_the_better_run_is_named_with_its_lead(tmp_path):
    found = compare_runs([leave_run(tmp_path / "a", 0.7), leave_run(tmp_path / "b", 0.9, optimizer="adamw")])
    assert found.verdict == f"{tmp_path / 'b'} is better: accuracy 0.9000, 0.2000 more than {tmp_path / 'a'}."
    assert found.rows[0].best == 1
    assert found.differing == {"training.optimizer": ("spectral", "adamw")}
    assert found.remarks == (
        "Only training.optimizer differs between the two (adamw and spectral): the difference comes from it, or from "
        "chance.",
    )


def test_no_cause_is_named_where_several_keys_differ(tmp_path):
    changed = leave_run(tmp_path / "b", 0.9, epochs=2, learning_rate=0.1, weight_decay=0.01, seed=1)
    (remark,) = compare_runs([leave_run(tmp_path / "a", 0.7), changed]).remarks
    assert remark == (
        "4 keys differ between the two (training.epochs, training.learning_rate, training.weight_decay, "
        "training.seed), so the difference cannot be attributed to one of them; compare runs that differ in one key."
    )


def test_two_seeds_of_one_configuration_differ_by_chance(tmp_path):
    (remark,) = compare_runs([leave_run(tmp_path / "a", 0.7), leave_run(tmp_path / "b", 0.9, seed=1)]).remarks
    assert remark == "Only training.seed differs between the two (1 and 0), so the difference is chance."


def test_a_default_is_shown_as_its_value(tmp_path, capfd):
    runs = [leave_run(tmp_path / "a", 0.7), leave_run(tmp_path / "b", 0.9, learning_rate=0.1, eval_steps=5)]
    assert compare_runs(runs).differing["training.learning_rate"] == (0.0125, 0.1)
    print_comparison(compare_runs(runs), Console(width=200))
    shown = capfd.readouterr().out
    assert "0.0125 (default)" in shown
    assert "four validations a run (default)" in shown


def test_a_default_that_is_written_out_is_no_difference(tmp_path):
    found = compare_runs([leave_run(tmp_path / "a", 0.7), leave_run(tmp_path / "b", 0.9, learning_rate=0.0125)])
    assert found.differing == {}


def test_a_lead_that_chance_can_cause_has_a_remark(tmp_path):
    found = compare_runs([leave_run(tmp_path / "a", 0.870), leave_run(tmp_path / "b", 0.875)])
    assert "0.0050 more" in found.verdict
    (remark,) = found.remarks
    assert "Chance alone can cause such a difference on 1,066 test examples (two standard errors: 0.0289)" in remark


def test_runs_that_were_tested_on_other_data_are_not_ranked(tmp_path):
    runs = [leave_run(tmp_path / name, share, mark) for name, share, mark in
            (("a", 0.7, "x"), ("b", 0.8, "x"), ("c", 0.99, "y"))]  # fmt: skip
    found = compare_runs(runs)
    assert found.tested_alike == (True, True, False)
    assert found.rows[0].best == 1
    assert found.verdict.startswith(f"{tmp_path / 'b'} is better")
    assert f"{tmp_path / 'c'} was tested on other data than {tmp_path / 'a'}" in found.remarks[0]
    assert "none is called better" in compare_runs([runs[0], runs[2]]).verdict


def test_what_an_older_run_was_tested_on_is_not_known(tmp_path):
    runs = [leave_run(tmp_path / name, 0.9, None) for name in "ab"]
    found = compare_runs(runs)
    assert "none is called better" in found.verdict
    assert "is unknown" in found.remarks[0]


def test_losses_over_different_tokens_are_not_compared(tmp_path):
    other = language_metrics()
    other["after"] |= {"num_tokens": 30_000, "loss": 1.0, "perplexity": 2.718}
    runs = [leave_run(tmp_path / "a", 0, metrics=language_metrics()), leave_run(tmp_path / "b", 0, metrics=other)]
    found = compare_runs(runs)
    assert "no metric in common" in found.verdict
    assert not any("perplexity" in row.name for row in found.rows)


def test_tasks_of_the_harness_are_rows_of_their_own(tmp_path):
    runs = [leave_run(tmp_path / name, 0.7, metrics=classification_metrics()) for name in "ab"]
    metrics = classification_metrics()
    metrics["after"]["harness"] = {"arc_easy": {"acc": 0.25}}
    runs.append(leave_run(tmp_path / "c", 0.7, metrics=metrics))
    row = next(row for row in compare_runs(runs).rows if row.name == "arc_easy: acc")
    assert (row.values, row.texts, row.best) == ((None, None, 0.25), ("–", "–", "0.2500"), None)


def test_the_page_shows_every_run_and_their_curves(tmp_path):
    runs = [leave_run(tmp_path / f"<run {at}>", 0.5 + at / 10, batch_size=8 * (at + 1)) for at in range(3)]
    page = render_comparison(compare_runs(runs))
    reader = read(page)
    assert f"{runs[2]} is better" in reader.text
    assert "training.batch_size 8 16 24" in reader.text
    assert 'aria-label="Training loss by step"' in page
    assert reader.tags.count("script") == 1
    assert "<run" not in page


@pytest.mark.parametrize(
    ("made", "asked", "words"),
    [
        (("a",), ("a",), "two runs or more"), (("a",), ("a", "a"), "named twice"),
        (("a",), ("a", "none"), "No folder"), ((), (".", "a"), "no finished run"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(made, asked, words, tmp_path):
    for name in made:
        leave_run(tmp_path / name, 0.5)
    with pytest.raises(UserError, match=words):
        compare_runs([tmp_path / name for name in asked])


def run_command(arguments: list[str], capfd) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return (caught.value.code, *capfd.readouterr())  # type: ignore[return-value]


def test_the_command_prints_a_table_writes_a_page_and_gives_json(tmp_path, capfd):
    runs = [str(leave_run(tmp_path / name, share)) for name, share in (("a", 0.7), ("b", 0.9))]
    page = str(tmp_path / "page.html")
    status, out, said = run_command(["compare", *runs, "--html", page, "--json"], capfd)
    assert status == 0, said
    assert json.loads(out)["measures"]["accuracy"] == {"values": [0.7, 0.9], "better": "higher", "best": 1}
    assert "0.9000 *" in said
    assert Path(page).is_file()
    status, _, said = run_command(["compare", *runs, "--html", page], capfd)
    assert (status, said) == (2, f"{page} exists; name another --html\n")


def test_a_report_is_made_again_where_the_folder_lies_now(tmp_path, capfd):
    folder = leave_run(tmp_path / "a", 0.7).rename(tmp_path / "moved")
    status, out, said = run_command(["report", str(folder), "--json"], capfd)
    assert (status, json.loads(out)) == (0, {"report": str(folder / "report.html")}), said
    assert f"sgm evaluate output.dir={folder}" in read((folder / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metrics.json", "{", "cannot be read"), ("metrics.json", "[]", "holds a list, not an object"),
        ("metrics.json", "{}", "was not written by `sgm finetune`"), ("history.json", "[1]", "is not a history"),
        ("history.json", '[{"loss": "low"}]', "is not a history"), ("pictures.json", '{"a": 1}', "holds no pictures"),
        ("examples.json", '{"examples": [{}]}', "holds no examples"), ("plan.json", "{}", "is not a usable plan"),
        ("config.yaml", "a: 1", "unknown key"), ("environment.json", '{"machine": 3}', "differ from what"),
    ],
)  # fmt: skip
def test_a_file_with_other_content_is_refused_in_one_line(name, text, words, tmp_path, capfd):
    folder = leave_run(tmp_path / "a", 0.7)
    (folder / name).write_text(text)
    status, _, said = run_command(["report", str(folder)], capfd)
    assert status == 2, said
    assert words in said
    assert said.count("\n") == 1
