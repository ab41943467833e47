"""What a person reads in a terminal of 80 or 120 columns: whole words, whatever the command prints."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from terminal import in_terminal, sgm_in_terminal

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands.cli import app, main
from sgm_finetune.results.verdict import shortfall
from sgm_finetune.train.callbacks import Pace

WIDTHS = (80, 120)
COMMANDS = [command.name for command in app.registered_commands]
FRAME = "╭╮╰╯─│"

HELP_PAGES = """
import sys
from sgm_finetune.commands.cli import app
sys.argv[0] = "sgm"
for name in sys.argv[1:]:
    app([name, "--help"], standalone_mode=False)
"""


def words_of(lines: list[str]) -> set[str]:
    return {word for line in lines for word in line.translate({ord(sign): " " for sign in FRAME}).split()}


def shown(line: str, columns: int) -> list[str]:
    """The lines on a terminal of this width of one line of a step."""
    written = StringIO()
    StepLog(Console(file=written, width=columns, force_terminal=True, color_system=None)).line("data", line)
    return written.getvalue().splitlines()


@pytest.mark.parametrize("columns", WIDTHS)
def test_help_pages_break_between_words(columns):
    """A narrow page has only words that a wide page has."""
    wide, status = in_terminal([sys.executable, "-c", HELP_PAGES, *COMMANDS], 400)
    narrow, _ = in_terminal([sys.executable, "-c", HELP_PAGES, *COMMANDS], columns)
    assert status == 0
    assert "--push-to-hub" in words_of(narrow)
    assert words_of(narrow) - words_of(wide) == set()
    assert max(map(len, narrow)) <= columns


def test_a_step_breaks_between_words_and_hangs_under_its_beginning():
    line = "reviews.csv: 2,048 train · 192 validation · 1,000 test · majority class positive 52.1 % · no duplicates"
    assert shown(line, 80) == [
        "data     reviews.csv: 2,048 train · 192 validation · 1,000 test · majority class",
        "         positive 52.1 % · no duplicates",
    ]


def test_a_path_longer_than_the_terminal_is_wide_stays_whole():
    path = "/home/somebody/" + "a/" * 60
    assert shown(f"saved in {path} now", 80) == ["data     saved in", f"         {path}", "         now"]


def test_brackets_and_colons_in_a_name_are_not_markup():
    assert shown("[bold]a[/bold] :smile:", 80) == ["data     [bold]a[/bold] :smile:"]


def test_without_a_terminal_a_step_is_one_line():
    written = StringIO()
    StepLog(Console(file=written, width=80)).line("data", "word " * 50 + "end")
    assert written.getvalue().count("\n") == 1


@pytest.mark.parametrize("columns", WIDTHS)
def test_an_error_breaks_between_words(columns, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("")
    wrong = ["training.batch_size=7", "training.micro_batch_size=3", "data.name=imdb"]
    lines, status = sgm_in_terminal(["finetune", "--config", str(file), *wrong], columns)
    assert status == 2
    assert " ".join(lines) == (
        f"{file}: training.batch_size=7 is not a multiple of training.micro_batch_size=3; change one of them"
    )
    assert all(len(line) <= columns or " " not in line for line in lines)


@pytest.mark.slow
def test_a_whole_run_keeps_its_words_whole(settings):
    """The lines of a run in a narrow terminal fit it, and a line that follows hangs under its step's beginning."""
    lines, status = sgm_in_terminal(["finetune", "--config", str(_empty(settings)), *settings], 80)
    assert status == 0, lines
    steps = [line for line in lines if line and not line.startswith(("train ━", "\r"))]
    assert [line for line in steps if len(line) > 80 and " " in line.strip()[9:]] == []
    joined = " ".join(" ".join(line.split()) for line in steps)
    assert "majority class" in joined
    assert "trainable adapter parameters" in joined


def test_a_run_that_gained_nothing_says_so_and_how_long_it_took(settings, monkeypatch):
    """The last lines of a run that learnt nothing, and the time that was left after its second step."""
    pace = Pace(tokens_per_step=100, validation=30, test=600, spent=10, predicted=60)
    monkeypatch.setattr(pipeline, "expected_pace", lambda s: pace)
    said = StringIO()
    changes = ["training.learning_rate=1e-6", "training.max_steps=4", "training.eval_steps=2"]
    metrics = pipeline.finetune(load_config(None, [*settings, *changes]), Console(file=said, width=80))
    assert metrics["improved"] is False
    lines = said.getvalue().splitlines()
    (left,) = [line for line in lines if "left:" in line]
    assert left.startswith("train    about 11 min left: 2 steps of ")
    assert left.endswith("2 validations, the test · in all 11 min, where 60 s were estimated")
    verdict = shortfall(metrics)
    assert verdict is not None
    assert lines[-1 - len(verdict.advice)] == f"result   {verdict.line}"
    assert lines[-1] == f"         {verdict.advice[-1]}"


def _empty(settings: list[str]) -> Path:
    file = Path(settings[-1].removeprefix("output.dir=")).parent / "empty.yaml"
    file.write_text("")
    return file


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_the_line_about_a_replaced_key_goes_where_the_other_lines_go(option, tmp_path, capfd):
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: {{name: imdb}}\noutput: {{dir: {tmp_path}/out}}")
    before, after = (["--quiet"], []) if option == "--quiet" else ([], ["--json"])
    with pytest.raises(SystemExit):
        main([*before, "finetune", "--config", str(file), *after, f"data.train={tmp_path / 'gone.csv'}"])
    out, err = capfd.readouterr()
    said = f"data.train={tmp_path / 'gone.csv'} replaces data.name=imdb of {file}"
    assert out == ""
    assert (said in err) is (option == "--json")
    assert "does not exist" in err
