"""`sgm generate` and `sgm chat` say what the trained model says."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from architectures import save_pico
from conftest import GOOD, make_model, make_tokenizer
from processes import assert_ctrl_c_ends, environment, free_port, running_server
from rich.console import Console
from systems import needs_posix

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.commands import page as serving
from sgm_finetune.commands.chat import COMMANDS, chat
from sgm_finetune.commands.cli import main
from sgm_finetune.commands.finetune import finetune
from sgm_finetune.commands.generate import GenerateRequest, generate, read_prompts
from sgm_finetune.results.answers import Sampling, answer, prompt_ids
from sgm_finetune.results.generation import continue_prompts
from sgm_finetune.results.load import load_trained, read_result
from sgm_finetune.results.stops import Stops, model_stops

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
SHORT = ["model.dtype=float32", "adapter.rank=4", "probe.num_batches=2", "probe.sketch_size=12", "data.max_length=32"]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


def trained(folder: Path, *overrides: str) -> list[str]:
    """A run that is finished; what names it."""
    settings = [*SHORT, "training.max_steps=12", "training.batch_size=8", "evaluation.num_generated=2", *overrides]
    finetune(load_config(None, [*settings, f"output.dir={folder}"]), quiet())
    return [f"output.dir={folder}"]


def loaded(names: list[str]):
    log = StepLog(quiet())
    return load_trained(read_result(load_config(None, names), names, log), log)


@pytest.fixture(scope="module")
def reviewer(llama_folder, reviews, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs") / "reviews"
    return trained(folder, f"model.name={llama_folder}", f"data.train={reviews}", "training.learning_rate=0.1")


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> list[str]:
    """Learns to answer every question with "good film"."""
    folder = tmp_path_factory.mktemp("talker")
    make_model("causal-lm").save_pretrained(folder / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"the {word} " + "story " * n},
                {"role": "assistant", "content": "good film"},
            ]
        }
        for word in GOOD
        for n in range(8)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return trained(
        folder / "run", f"model.name={folder / 'model'}", "model.task=causal-lm",
        f"data.train={folder / 'chats.jsonl'}", "training.max_steps=40", "training.learning_rate=0.2",
    )  # fmt: skip


def test_a_class_comes_with_its_probabilities(reviewer):
    (good, bad) = answer(loaded(reviewer), ["good great fine film", "awful dull broken plot"], Sampling())
    assert (good["answer"], bad["answer"]) == ("good", "bad")
    assert sum(good["scores"].values()) == pytest.approx(1)
    assert good["scores"]["good"] > bad["scores"]["good"]


def test_the_answer_before_is_that_of_the_base_model(reviewer):
    """Without adapter and with the head as it was before the training: logits of the base that a run starts from."""
    from sgm_finetune.data.prepared import prepare_data
    from sgm_finetune.train.base_model import load_base

    result = loaded(reviewer)
    (before,) = answer(result, ["good great fine film"], Sampling(), "before")
    log = StepLog(quiet())
    base = load_base(result.config, prepare_data(result.config, log), log).model
    with torch.no_grad():
        logits = base(**result.tokenizer("good great fine film", return_tensors="pt")).logits[0]
    expected = dict(zip(result.labels, logits.softmax(-1).tolist(), strict=True))
    assert before["scores"] == pytest.approx(expected)
    (again,) = answer(result, ["good great fine film"], Sampling())
    assert again["answer"] == "good"


def test_a_chat_model_answers_by_its_template_and_ends_its_turn(talker):
    result = loaded(talker)
    assert result.roles == ("messages",)
    assert answer(result, ["the great story"], Sampling()) == [{"answer": "good film"}]
    assert prompt_ids(result, "the great story") != prompt_ids(result, "the great story", raw=True)
    assert model_stops(result.model, result.tokenizer) == Stops((result.tokenizer.eos_token_id,))


def test_an_answer_that_is_shown_in_pieces_is_the_same_answer(talker):
    pieces: list[str] = []
    (found,) = answer(loaded(talker), ["the fine story"], Sampling(), show=pieces.append)
    assert "".join(pieces).strip() == found["answer"] == "good film"


def test_the_output_layer_reads_one_piece_of_memory():
    """Else a CPU copies its weights for every prompt."""
    model, read = make_model("causal-lm"), []
    model.lm_head.register_forward_hook(lambda module, given, made: read.append(given[0]))
    prompts = [[5, 6, 7], [8, 9]]
    continue_prompts(model, prompts, make_tokenizer(), "causal-lm", Stops(), limit=2, batch_size=2)
    assert [tuple(hidden.shape[:2]) for hidden in read] == [(2, 1), (2, 1)]
    assert all(hidden.is_contiguous() for hidden in read)
    assert not model.lm_head._forward_pre_hooks


def test_one_seed_draws_one_answer(talker):
    result, sampling = loaded(talker), Sampling(max_new_tokens=12, temperature=5.0, seed=3)
    first, again = (answer(result, ["the"], sampling, "before") for _ in range(2))
    other = answer(result, ["the"], Sampling(max_new_tokens=12, temperature=5.0, seed=4), "before")
    assert first == again != other


def test_a_prompt_without_room_for_an_answer_says_so(talker):
    with pytest.raises(UserError, match=r"603 tokens, and the model has 512 positions"):
        answer(loaded(talker), ["story " * 600], Sampling(), raw=False)


@pytest.mark.parametrize(
    ("name", "task", "row", "prompt", "kind"),
    [
        ("bert", "sequence-classification", {"text": "good film", "label": ["a", "b"]}, "good film", list),
        ("bert", "sequence-classification", {"text": "good film", "label": 1.5}, "good film", float),
        ("bert", "token-classification", {"tokens": ["good", "film"], "tags": ["B-X", "O"]}, "good film", list),
        ("bart", "seq2seq-lm", {"source": "good film", "target": "bad"}, "good film", str),
    ],
)
def test_every_task_has_answers(name, task, row, prompt, kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    words = ["good", "bad", "fine", "film", "plot", "cast"]
    rows = [json.dumps(row).replace("film", words[n % 6] + "film "[: n % 2]) for n in range(36)]
    path.write_text("\n".join(rows))
    model = save_pico(name, tmp_path / "model")
    names = trained(
        tmp_path / "run", f"model.name={model}", f"model.task={task}", f"data.train={path}", "training.max_steps=2"
    )
    (found,) = answer(loaded(names), [prompt], Sampling(max_new_tokens=4))
    assert isinstance(found["answer"], kind)
    if task == "token-classification":
        assert [word for word, _ in found["answer"]] == ["good", "film"]


def test_prompts_of_a_file_are_read_as_the_run_was_trained(talker, tmp_path):
    config = loaded(talker).config
    rows = [{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "good"}]}]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]))
    assert read_prompts(tmp_path / "p.jsonl", config) == [[{"role": "user", "content": "the"}]]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "p.txt", config) == ["one", "two"]
    (tmp_path / "i.csv").write_text("instruction,input\nSay,this\n")
    assert read_prompts(tmp_path / "i.csv", config) == [[{"role": "user", "content": "Say\n\nthis"}]]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"none of the columns messages, .* text \(has: a, b\); rename"):
        read_prompts(tmp_path / "other.csv", config)


def test_generate_compares_and_prints(reviewer, capfd):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--config", "config.yaml", *reviewer, "-p", "a good film", "--compare", "--json"])
    written, said = capfd.readouterr()
    assert caught.value.code == 0
    (row,) = json.loads(written)["rows"]
    assert (row["prompt"], row["answer"]) == ("a good film", "good")
    assert set(row["before"]) == {"answer", "scores"}
    assert "before" in said
    assert "after" in said


def test_generate_streams_to_a_terminal(talker):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    (row,) = generate(load_config(None, talker), talker, GenerateRequest(["the great story"]), console)
    assert row["answer"] == "good film"
    assert "good film" in console.file.getvalue()


def test_a_chat_keeps_its_turns_until_it_is_cleared(talker, monkeypatch):
    asked: list[int] = []
    from sgm_finetune.commands import chat as chatting

    def watched(result, prompts, *arguments, **options):
        asked.append(len(prompts[0]))
        return answer(result, prompts, *arguments, **options)

    monkeypatch.setattr(chatting, "answer", watched)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("the great story\n\nthe fine story\n/clear\nthe story\n/exit\nmore\n")
    )
    turns = chat(load_config(None, talker), talker, quiet(), Sampling())
    assert [turn["question"] for turn in turns] == ["the great story", "the fine story", "the story"]
    assert turns[0]["answer"] == "good film"
    assert asked == [1, 3, 1]


def test_help_and_an_unknown_command_list_the_commands(talker, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\n/speak now\n/exit\n"))
    assert chat(load_config(None, talker), talker, Console(file=said, width=100), Sampling()) == []
    lines = said.getvalue().splitlines()
    listed = [f"{command:<8} {effect}" for command, effect in COMMANDS.items()]
    assert [line for line in lines if line.startswith(("/", "Ctrl"))] == [*listed, "/speak is no command", *listed]


def test_a_question_that_is_too_long_leaves_the_chat_as_it_was(talker, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'story ' * 600}\nthe great story\n"))
    console = quiet()
    turns = chat(load_config(None, talker), talker, console, Sampling(max_new_tokens=8), compare=True)
    assert [turn["question"] for turn in turns] == ["the great story"]
    assert set(turns[0]) == {"question", "answer", "before"}
    assert "512 positions" in " ".join(console.file.getvalue().split())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["chat"],
            "sgm chat is for causal-lm, and this run's model.task is sequence-classification; take sgm generate",
        ),
        pytest.param(
            *(["serve"], "this run's model.task is sequence-classification; take sgm generate or sgm report --serve"),
            marks=pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason=install_line("serve")),
        ),
        (["generate", "--input", "none.csv"], "--input"),
    ],
)
def test_what_a_run_cannot_do_is_one_line(reviewer, arguments, error, capfd):
    with pytest.raises(SystemExit) as caught:
        main([arguments[0], "--config", "config.yaml", *reviewer, *arguments[1:]])
    said = capfd.readouterr().err
    assert caught.value.code == 2
    assert error in said
    assert said.count("\n") == 1


def test_nothing_to_answer_is_one_line(reviewer, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--config", "config.yaml", *reviewer])
    assert caught.value.code == 2
    assert "give --prompt TEXT or --input FILE" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason=install_line("browser"))
def test_the_page_in_a_browser_shows_both_answers_to_this_machine_alone(reviewer, talker):
    folders = [names[0].partition("=")[2] for names in (reviewer, talker)]
    worker = Path(__file__).with_name("page_worker.py")
    done = subprocess.run([sys.executable, str(worker), *folders], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    result = loaded(reviewer)
    for when, scores in zip(("before", "after"), found["classes"], strict=True):
        expected = answer(result, ["good great fine film"], Sampling(), when)[0]["scores"]
        assert scores == pytest.approx(expected, abs=1e-6)
    assert found["together"], "questions at the same time were mixed"
    before, after = found["first"][:2]
    assert found["first"][2:] == [before, after, ""]
    assert [turn["content"] for turn in after] == ["the great story", "good film"]
    result = loaded(talker)
    assert before[1]["content"] == answer(result, ["the great story"], Sampling(8), "before")[0]["answer"]
    assert [turn["role"] for turn in found["second"][1]] == ["user", "assistant"] * 2
    assert "512 positions" in found["refused"]
    assert "100,001 characters" in found["too_long"]
    assert found["statuses"] == {
        "by another name": 403, "by localhost": 200, "by another page": 403, "upload": 403, "upload of its own": 200,
        "too much": 413,
    }  # fmt: skip
    assert "sandbox=" in found["page"]
    assert "Of &amp;" in found["page"] or "Of \\u0026amp;" in found["page"]
    assert "fonts.googleapis" not in found["page"]


def join_queue(port: int, session: str) -> None:
    """Asks for 400 tokens, as the page does. Waits until the server is there."""
    question = {"data": ["the story", None, None, 400, 2], "fn_index": 0, "session_hash": session}
    join = urllib.request.Request(
        f"http://{serving.HOST}:{port}/gradio_api/queue/join", json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    for _ in range(100):
        with suppress(urllib.error.URLError), urllib.request.urlopen(join):
            return
        time.sleep(0.2)
    raise TimeoutError("the page is not there")


@needs_posix
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason=install_line("browser"))
def test_ctrl_c_ends_the_page_while_the_model_answers(talker):
    port, folder = free_port(), talker[0].partition("=")[2]
    with running_server("report", folder, "--serve", "--port", str(port)) as running:
        for session in "abcdefgh":  # more than it can answer before the signal
            join_queue(port, session)
        stream = urllib.request.urlopen(f"http://{serving.HOST}:{port}/gradio_api/queue/data?session_hash=a")
        assert any(b"process_generating" in line for line in stream)
        assert_ctrl_c_ends(running)


@needs_posix
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason=install_line("serve"))
def test_ctrl_c_ends_the_server_while_the_model_answers(talker):
    port = free_port()
    body = {"model": "before", "prompt": "the", "max_tokens": 500, "temperature": 2, "stream": True}
    asked = urllib.request.Request(f"http://{serving.HOST}:{port}/v1/completions", json.dumps(body).encode())
    with running_server("serve", *talker, "--port", str(port)) as running:
        stream = None
        while stream is None:
            with suppress(urllib.error.URLError):
                stream = urllib.request.urlopen(asked)
        with stream:
            assert stream.readline().startswith(b"data: ")
            assert_ctrl_c_ends(running)


def test_a_port_that_is_taken_and_a_missing_package_are_found_first(reviewer, monkeypatch):
    config = load_config(None, reviewer)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "gradio" or find_spec(name, *rest))
    with socket.socket() as taken:
        taken.bind((serving.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} cannot be used"):
            serving.serve_page(config, [], quiet(), port)
        with pytest.raises(SystemExit) as caught:
            main(["report", config.output.dir, "--serve", "--port", str(port)])
        assert caught.value.code == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(f"--serve needs Gradio; {install_line('browser')}")):
        serving.serve_page(config, [], quiet())
