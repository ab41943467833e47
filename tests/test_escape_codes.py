"""No text from outside commands the terminal, whichever command shows it: names, data, labels, errors, answers."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from conftest import WORDS, make_model
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from terminal import CONTROL, in_terminal, sgm_in_terminal
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import PrintableConsole, StepLog, print_line
from sgm_finetune.commands.chat import chat
from sgm_finetune.commands.cli import main
from sgm_finetune.commands.generate import generate
from sgm_finetune.commands.requests import GenerateRequest
from sgm_finetune.results.sampling import Sampling

TITLE = "\x1b]0;owned\x9b"
"""Renames the terminal's window, and begins another code of 8 bits."""
SHOWN = r"\x1b]0;owned\x9b"
MAY_BE_PRINTED = set("\n\t\r")
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
SHORT = [
    "model.dtype=float32", "adapter.rank=4", "probe.num_batches=2", "probe.sketch_size=12", "data.max_length=32",
    "training.max_steps=2", "training.batch_size=8", "evaluation.num_generated=2",
]  # fmt: skip


def evil(word: str) -> str:
    return f"{TITLE}{word}"


def commanding(text: str) -> set[str]:
    """The characters in `text` that a terminal obeys."""
    return {sign for sign in text if sign < " " or "\x7f" <= sign < "\xa0"} - MAY_BE_PRINTED


def assert_harmless(text: str) -> None:
    assert commanding(text) == set()
    assert SHOWN in text


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """A folder of somebody else, whose names, words and labels are all escape codes."""
    folder = tmp_path_factory.mktemp("outside") / evil("folder")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *map(evil, WORDS)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=512
    )
    tokenizer.chat_template = TEMPLATE
    make_model("causal-lm").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    films = [f"{evil('good')} {evil('film')} " * n for n in range(1, 41)]
    chats = [
        {"messages": [{"role": "user", "content": film}, {"role": "assistant", "content": evil("plot")}]}
        for film in films
    ]
    reviews = [{"text": film, "label": evil("yes" if n % 2 else "no")} for n, film in enumerate(films)]
    for name, rows in (("chats", chats), ("reviews", reviews)):
        (folder / evil(f"{name}.jsonl")).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "columns.csv").write_text(f"{evil('a')},{evil('b')}\n1,2\n3,4\n")
    matrix = {"snr": 2.0, "type": evil("q_proj")}
    (folder / "scan.json").write_text(json.dumps({f"layers.{n}.{evil('q_proj')}": matrix for n in range(4)}))
    (folder / "empty.yaml").write_text("")
    return folder


def settings(folder: Path, data: str, task: str) -> list[str]:
    return [
        *SHORT,
        f"model.name={folder / 'model'}",
        f"data.train={folder / evil(f'{data}.jsonl')}",
        f"model.task={task}",
    ]


def run(capfd, *arguments: object, status: int = 0) -> tuple[str, str]:
    """What the command prints on stdout, and on stdout and stderr together."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert caught.value.code == status, out + err
    return out, out + err


@pytest.fixture(scope="module")
def results(outside) -> dict[str, Path]:
    """Finished runs on the chats and on the reviews; what they printed is in `said.txt` of their folders."""
    found = {}
    for data, task in (("chats", "causal-lm"), ("reviews", "sequence-classification")):
        folder = outside / "runs" / evil(data)
        given = [*settings(outside, data, task), f"output.dir={folder}"]
        with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as caught:
            main(["finetune", "--config", str(outside / "empty.yaml"), *given])
        assert caught.value.code == 0
        (folder / "said.txt").write_text(said.getvalue())
        found[data] = folder
    return found


@pytest.mark.parametrize("data", ["chats", "reviews"])
def test_a_run_shows_names_and_labels_as_text(data, results):
    assert_harmless((results[data] / "said.txt").read_text())


LOOKS = [
    ("data", "chats", "causal-lm", "--examples=2"),
    ("data", "reviews", "sequence-classification", "--examples=2"),
    ("estimate", "reviews", "sequence-classification"),
    ("plan", "reviews", "sequence-classification"),
]


@pytest.mark.parametrize("look", LOOKS, ids=" ".join)
def test_a_command_that_looks_first_shows_data_as_text(look, outside, tmp_path, capfd):
    command, data, task, *options = look
    options += [f"--output={tmp_path / evil('plan.json')}"] if command == "plan" else []
    given = [command, "--config", outside / "empty.yaml", *options, *settings(outside, data, task)]
    assert_harmless(run(capfd, *given)[1])


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        ("reviews", ["evaluate"]),
        ("reviews", ["generate", "--prompt", evil("good"), "--prompt", evil("bad")]),
        ("reviews", ["generate", "--prompt", evil("good"), "--compare"]),
        ("chats", ["generate", "--prompt", evil("good"), "--max-new-tokens=4", "--compare"]),
        ("chats", ["export", "--to", "adapter"]),
    ],
    ids=str,
)
def test_a_command_that_uses_a_result_shows_labels_and_answers_as_text(data, arguments, results, capfd):
    assert_harmless(run(capfd, *arguments, f"output.dir={results[data]}")[1])


@pytest.mark.parametrize("compare", [False, True])
def test_answers_that_appear_word_by_word_are_text(compare, results, monkeypatch):
    named = [f"output.dir={results['chats']}"]
    config, sampling = load_config(None, named), Sampling(max_new_tokens=4)
    answered, talked = console(120), console(120)
    if not compare:
        (row,) = generate(config, named, GenerateRequest([evil("good")], sampling=sampling), answered)
        assert TITLE in row["answer"]
        assert_harmless(answered.file.getvalue())
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{evil('good')}\n/exit\n"))
    (turn,) = chat(config, named, talked, sampling, compare)
    assert TITLE in turn["answer"]
    assert_harmless(CONTROL.sub("", talked.file.getvalue()))


def test_runs_that_are_compared_show_names_and_settings_as_text(results, tmp_path, capfd):
    said = run(capfd, "compare", *results.values(), "--html", tmp_path / evil("page.html"))[1]
    assert_harmless(said)
    assert f"{SHOWN}reviews" in "".join(said.split())


def test_a_report_that_is_made_again_shows_its_path_as_text(results, capfd):
    assert_harmless(run(capfd, "report", results["reviews"])[1])


@pytest.mark.parametrize("options", [[], ["--format=axolotl", "--top-fraction=0.5"], ["--format=spectrum"]], ids=str)
def test_a_scan_shows_names_of_a_file_of_results_as_text(options, outside, capfd):
    said = run(capfd, "scan", outside / "scan.json", *options)[1]
    assert_harmless(said)


def test_a_scan_shows_the_name_of_its_model_as_text(outside, tmp_path, capfd):
    assert_harmless(run(capfd, "scan", outside / "model", "--output", tmp_path / evil("scan.json"))[1])


def test_init_shows_columns_and_its_mistakes_as_text(outside, tmp_path, llama_folder, capfd):
    given = ["--data", outside / "columns.csv", "--model", llama_folder, "--quantization", "none"]
    guessed = run(capfd, "init", tmp_path / evil("new.yaml"), *given, "--yes", "--task", "sequence-classification")[1]
    assert_harmless(guessed)
    refused = run(capfd, "init", tmp_path / "n.yaml", *given, "--yes", "--task", "token-classification", status=2)[1]
    assert_harmless(refused)


@pytest.mark.slow
def test_init_asks_for_columns_as_text(outside, tmp_path, llama_folder):
    given = ["--data", outside / "columns.csv", "--model", llama_folder, "--task", "causal-lm", "--quantization=none"]
    lines, status = sgm_in_terminal(["init", str(tmp_path / "new.yaml"), *map(str, given)], 200, typed="nothing\n\n\n")
    assert status == 0, lines
    asked = [line for line in lines if "Which is the" in line]
    assert asked
    assert all(SHOWN in line and not commanding(line) for line in asked)


@pytest.mark.parametrize(
    "arguments",
    [[evil("command")], ["data", f"--{evil('option')}"], ["scan", evil("model")], ["report", evil("run")]],
    ids=str,
)
def test_a_mistake_on_the_command_line_is_shown_as_text(arguments, capfd):
    assert_harmless(run(capfd, *arguments, status=2)[1])


def test_json_stays_json_and_holds_what_was_there(results, outside, capfd):
    given = ["--config", outside / "empty.yaml", "--json", *settings(outside, "reviews", "sequence-classification")]
    shown, _ = run(capfd, "data", *given)
    assert json.loads(shown)["examples"][0]["label"] in (evil("yes"), evil("no"))
    assert commanding(shown) == set()
    answered, _ = run(capfd, "generate", "--json", "--prompt", evil("good"), f"output.dir={results['reviews']}")
    assert json.loads(answered)["rows"][0]["answer"] in (evil("yes"), evil("no"))
    assert commanding(answered) == set()


def test_messages_of_libraries_and_tracebacks_are_text():
    program = (
        "import logging, sys\n"
        "from sgm_finetune.commands import exit_status, libraries\n"
        "libraries.configure_libraries(False)\n"
        f"logging.getLogger('library').error('\\x1b[1mit\\x1b[0m is %s', {TITLE!r})\n"
        f"def fail(): raise RuntimeError({TITLE!r})\n"
        "exit_status.run_and_exit(fail)\n"
    )
    lines, status = in_terminal([sys.executable, "-c", program], 200)
    assert status == 1
    first, *source, last = [line for line in lines if SHOWN in line]
    assert all(line.strip().startswith("def fail(): raise") for line in source)  # Python 3.13 shows the program's line
    assert (first, last) == (f"it is {SHOWN}", f"RuntimeError: {SHOWN}")
    assert commanding("\n".join(lines)) == set()


def console(width: int = 60) -> PrintableConsole:
    return PrintableConsole(file=io.StringIO(), width=width, force_terminal=True, color_system=None, _environ={})


@pytest.mark.parametrize(
    "shown",
    [
        evil("text"), Text(evil("text"), "bold"), Rule(evil("text")), Panel(Text(evil("text")), title=evil("title")),
        Group(evil("text"), Text(evil("text"))),
    ],
    ids=lambda shown: type(shown).__name__,
)  # fmt: skip
def test_whatever_is_printed_on_the_console_is_text(shown):
    to = console()
    to.print(shown, markup=False)
    assert_harmless(to.file.getvalue())


def test_live_text_is_text_and_rich_still_moves_the_cursor():
    to = console()
    with Live(console=to, auto_refresh=False) as live:
        live.update(Panel(Text(evil("one\ntwo"))), refresh=True)
        live.update(Panel(Text(evil("three\nfour"))), refresh=True)
    written = to.file.getvalue()
    assert SHOWN in written
    assert TITLE not in written
    assert "\x1b[1A" in written


def test_a_column_is_as_wide_as_its_escape_codes():
    to = console(30)
    table = Table(box=None, padding=0)
    table.add_column("name", overflow="fold")
    table.add_column("n", justify="right")
    table.add_row(Text(TITLE + "x" * 30), "1")
    to.print(table)
    lines = to.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 30
    assert "".join(lines[1:]).replace(" ", "").replace("1", "") == (SHOWN + "x" * 30).replace("1", "")


def test_styles_stay_where_they_were():
    to = PrintableConsole(
        file=io.StringIO(), width=60, force_terminal=True, color_system="standard", _environ={}, highlight=False
    )
    print_line(to, f"plain {TITLE}", Text.assemble(TITLE, ("bold", "bold")))
    assert to.file.getvalue() == f"{SHOWN}\x1b[1mbold\x1b[0mplain {SHOWN}\n"


def test_text_of_every_language_stays_as_it_is():
    """Joiners, marks and spaces that writing needs are not controls; overrides of its direction are."""
    kept = "می\u200cخواهم 👩\u200d🚀 a\u00a0b 日本\u3000語 \u200f"
    to = console(200)
    StepLog(to).line("data", kept)
    assert to.file.getvalue() == f"data     {kept}\n"
    to.print(Text("a\u202eb\u2066c\ud800"))
    assert r"a\u202eb\u2066c\ud800" in to.file.getvalue()
