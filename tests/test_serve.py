"""`sgm serve` answers OpenAI's own client as `sgm generate` answers a person."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from architectures import save_pico
from conftest import adapted, make_model, make_tokenizer
from processes import free_port
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.commands.cli import main
from sgm_finetune.commands.requests import HOST, ServeRequest
from sgm_finetune.commands.server import ENDS, MAX_REQUEST, make_server
from sgm_finetune.results.answer_stream import AnswerStream, Piece
from sgm_finetune.results.answers import answer, prompt_ids
from sgm_finetune.results.load import LoadedResult
from sgm_finetune.results.sampling import Sampling
from sgm_finetune.results.stops import Stops

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from sgm_finetune.commands.serve import application  # noqa: E402 - needs the packages

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
QUESTION = [{"role": "user", "content": "the great story"}]
SAMPLED = {"temperature": 2.0, "seed": 7, "max_tokens": 12}


@contextmanager
def served(result: LoadedResult, **options: str):
    """The port at which `result` is served."""
    request = ServeRequest(port=free_port(), **options)
    ENDS.clear()
    server = make_server(application(result, request), request.port, HOST, lambda number: None)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield request.port
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> LoadedResult:
    """A chat model with an adapter that changes what it says."""
    from sgm_finetune.model.files import ModelFiles

    folder = tmp_path_factory.mktemp("talker")
    model = make_model("causal-lm")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = load_config(None, ["model.task=causal-lm", f"model.name={folder}"])
    files = ModelFiles(folder, tokenizer, model.config, 32)
    torch.manual_seed(3)
    model = adapted(model).eval()
    return LoadedResult(folder / "x.pth", {}, config, base=files, roles=("messages",), model=model)


@pytest.fixture(scope="module")
def port(result):
    with served(result) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    with client_of(port) as client:
        yield client


def client_of(port: int, key: str = "none"):
    return openai.OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key=key, max_retries=0)


def chat(client, model: str = "after", **options):
    return client.chat.completions.create(model=model, messages=QUESTION, **{"max_tokens": 12, **options})


def test_the_models_are_before_and_after(client):
    assert [model.id for model in client.models.list()] == ["before", "after"]
    assert client.models.retrieve("after").id == "after"
    with pytest.raises(openai.NotFoundError, match="no model 'x'"):
        client.models.retrieve("x")


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_answer_is_that_of_sgm_generate(client, result, when):
    own = answer(result, [QUESTION], Sampling(12), when)[0]["answer"]
    said = chat(client, when)
    assert said.choices[0].message.content.strip() == own
    assert said.model == when
    assert said.usage.prompt_tokens == len(prompt_ids(result, QUESTION))
    own = answer(result, ["the story"], Sampling(8, 1.5, 0.9, 3), when, raw=True)[0]["answer"]
    said = client.completions.create(model=when, prompt="the story", max_tokens=8, temperature=1.5, top_p=0.9, seed=3)
    assert said.choices[0].text.strip() == own


def test_before_and_after_answer_differently(client):
    before, after = (chat(client, model).choices[0].message.content for model in ("before", "after"))
    assert before != after


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = chat(client, logprobs=True, top_logprobs=2, **SAMPLED)
    chunks = list(
        chat(client, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}, **SAMPLED)
    )
    *said, last, usage = chunks
    assert said[0].choices[0].delta.role == "assistant"
    assert len(said) > 3
    assert "".join(chunk.choices[0].delta.content for chunk in said) == whole.choices[0].message.content
    tokens = [token for chunk in said if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert tokens == whole.choices[0].logprobs.content
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.usage == whole.usage
    text = client.completions.create(model="after", prompt="the", **SAMPLED).choices[0].text
    chunks = client.completions.create(model="after", prompt="the", stream=True, **SAMPLED)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_an_answer_ends_before_a_stop_and_says_why(client):
    whole = chat(client).choices[0]
    words = whole.message.content.split()
    assert (whole.finish_reason, len(words)) == ("length", 12)
    stop = f" {words[4]} {words[5]}"
    for stops in (stop, ["nothing", stop]):
        cut = chat(client, stop=stops)
        assert cut.choices[0].message.content == whole.message.content[: whole.message.content.index(stop)]
        assert cut.choices[0].finish_reason == "stop"
        assert cut.usage.completion_tokens < 12
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, stop=stop, stream=True)]
    assert "".join(pieces) == cut.choices[0].message.content


def test_log_probabilities_are_the_models(client, result):
    said = chat(client, logprobs=True, top_logprobs=3, **SAMPLED).choices[0]
    ids = prompt_ids(result, QUESTION)
    words = [entry.token.strip() for entry in said.logprobs.content]
    assert "".join(entry.token for entry in said.logprobs.content) == said.message.content
    chosen = result.tokenizer.convert_tokens_to_ids(words)
    with torch.no_grad():
        logits = result.model(torch.tensor([[*ids, *chosen]])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    for entry, row, token in zip(said.logprobs.content, expected, chosen, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, indices = row.topk(3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert [top.token.strip() for top in entry.top_logprobs] == result.tokenizer.convert_ids_to_tokens(indices)
    text = client.completions.create(model="after", prompt="the", logprobs=2, max_tokens=4).choices[0]
    assert [len(top) for top in text.logprobs.top_logprobs] == [2] * 4
    assert [text.text[at:][: len(token)] for at, token in zip(*_columns(text), strict=True)] == text.logprobs.tokens


def _columns(choice):
    return choice.logprobs.text_offset, choice.logprobs.tokens


def test_one_seed_draws_one_answer_and_none_draws_others(client):
    asked = {"temperature": 2.0, "max_tokens": 12}
    first, again = (chat(client, seed=3, **asked).choices[0].message.content for _ in range(2))
    others = {chat(client, **asked).choices[0].message.content for _ in range(3)}
    assert first == again
    assert len(others) > 1


def test_the_coldest_and_the_narrowest_sampling_take_the_likeliest_token(client):
    greedy = chat(client).choices[0].message.content
    for options in ({"temperature": 1e-40}, {"temperature": 2, "top_p": 0}):
        assert chat(client, **options).choices[0].message.content == greedy


def test_a_translator_completes_and_does_not_chat(tmp_path):
    from sgm_finetune.model.files import ModelFiles

    model = AutoModelForSeq2SeqLM.from_pretrained(save_pico("t5", tmp_path)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = load_config(None, ["model.task=seq2seq-lm", f"model.name={tmp_path}"])
    files = ModelFiles(tmp_path, tokenizer, model.config, None)
    result = LoadedResult(tmp_path / "x.pth", {}, config, base=files, roles=("source",), model=model)
    with served(result) as port, client_of(port) as client:
        said = client.completions.create(model="after", prompt="the story", max_tokens=5, logprobs=1)
        assert said.choices[0].text.strip() == answer(result, ["the story"], Sampling(5))[0]["answer"]
        assert len(said.choices[0].logprobs.tokens) in (said.usage.completion_tokens, said.usage.completion_tokens - 1)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            chat(client)


@pytest.mark.slow
def test_twenty_clients_get_the_answers_of_one_after_another(client):
    asked = [("before", "after")[n % 2] for n in range(20)]

    def ask(n: int) -> str:
        return chat(client, asked[n], temperature=1.0, seed=n, stop=["zzz"], max_tokens=3).choices[0].message.content

    alone = [ask(n) for n in range(20)]
    with ThreadPoolExecutor(20) as together:
        assert list(together.map(ask, range(20))) == alone


@pytest.mark.parametrize(
    ("options", "status", "param", "said"),
    [
        ({"model": "gpt"}, 404, "model", "no model 'gpt'; take one of before, after"),
        ({"messages": [{"role": "user", "content": "story " * 600}]}, 400, None, "603 tokens, .* 512 positions"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content", "valid"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, 400, "temperature", "valid number"),
        ({"top_p": 0.5}, 400, "top_p", "needs `temperature`"),
        ({"max_tokens": 10**30}, 400, "max_tokens", "less than or equal to"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, 400, "max_tokens", "give one"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs `logprobs`"),
        ({"n": 2}, 400, "n", "not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most four"),
        ({"stop": ""}, 400, "stop", "none of them is empty"),
        ({"extra_body": {"top_k": 3}}, 400, "top_k", "not known"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_an_error_of_openais_form(client, options, status, param, said):
    stream = status == 404 or param is None  # an error comes before the stream begins
    with pytest.raises(openai.APIStatusError, match=said) as caught:
        client.chat.completions.create(**{"model": "after", "messages": QUESTION, "stream": stream, **options})
    body = caught.value.body
    assert (caught.value.status_code, body["param"], body["type"]) == (status, param, "invalid_request_error")
    assert body["code"] == {404: "model_not_found"}.get(status, body["code"])


def test_parameters_without_effect_and_nulls_are_taken(client):
    options = {"user": "a", "metadata": {"a": "b"}, "n": 1, "presence_penalty": 0.0, "logit_bias": None, "stop": None}
    said = chat(client, **options, response_format={"type": "text"})
    turns = [
        *QUESTION,
        said.choices[0].message.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ]
    again = client.chat.completions.create(model="after", messages=turns, max_completion_tokens=3)
    assert again.usage.completion_tokens == 3


def asked(port: int, body: bytes | None = None, path: str = "/v1/models", headers: dict[str, str] | None = None):
    """The status and the error of an answer."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    connection.request("GET" if body is None else "POST", path, body, headers or {})
    answered = connection.getresponse()
    content = json.loads(answered.read())
    connection.close()
    return answered.status, content.get("error", {}).get("message")


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ({"headers": {"Host": "evil.example"}}, 403, "127.0.0.1 and localhost only"),
        ({"headers": {"Host": "localhost:99"}}, 200, None),
        ({"headers": {"Origin": "http://evil.example"}}, 403, "no other page"),
        ({"body": b"", "headers": {"Content-Length": str(MAX_REQUEST + 1)}}, 413, "at most"),
        ({"path": "/v1/chat/completions", "body": b"{"}, 400, "not JSON"),
        ({"path": "/v1/chat/completions", "body": b"[" * 100_000}, 400, "not JSON"),
        ({"path": "/v1/chat/completions", "body": b"[]"}, 400, "a JSON object"),
        ({"path": "/v1/completions", "body": b'{"model": "after", "prompt": "\\ud800"}'}, 400, "not JSON"),
        ({"path": "/v1/chat/completions"}, 405, "GET /v1/chat/completions"),
        ({"path": "/v1/embeddings", "body": b"{}"}, 404, "Not Found"),
    ],
)
def test_strangers_and_other_paths_are_refused_in_json(port, given, status, said):
    found = asked(port, **given)
    assert found[0] == status
    assert (said or "") in (found[1] or "")


def test_a_token_lets_in_by_any_name(result):
    with served(result, host="0.0.0.0", token="secret") as port:
        with client_of(port, "secret") as client:
            assert chat(client, max_tokens=1).usage.completion_tokens == 1
        with client_of(port, "other") as client, pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            client.models.list()
        assert asked(port)[0] == 401
        right = {"Authorization": "Bearer secret", "Host": "my.machine:8000"}
        assert asked(port, headers=right)[0] == 200


def test_an_answer_that_nobody_waits_for_ends(client, result):
    stream = chat(client, stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    begin = time.monotonic()
    chat(client, max_tokens=1)
    assert time.monotonic() - begin < 1  # 400 tokens take several


def test_a_fault_is_said_in_one_line_and_the_next_request_is_answered(client, result, monkeypatch, capfd):
    def fail(*arguments, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(result.model, "generate", fail)
    with pytest.raises(openai.InternalServerError, match=r"The server failed \(RuntimeError\)"):
        chat(client)
    assert "broken" in capfd.readouterr().err
    monkeypatch.undo()
    assert chat(client, max_tokens=1).usage.completion_tokens == 1


def test_characters_of_several_tokens_come_whole():
    """A byte-level tokenizer needs three tokens for 東, and a text to stop at may begin in any piece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(alphabet, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    text = "a 東京 b</turn> c"
    pieces: list[Piece] = []
    stream = AnswerStream(tokenizer, Stops(texts=("</turn>",)), pieces.append)
    ids = tokenizer(text)["input_ids"]
    for end in range(1, len(ids) + 1):
        if bool(stream(torch.tensor([ids[:end]]), ())[0]):
            break
    stream.end()
    assert end == len(ids) - 2
    assert [piece.text for piece in pieces] == ["a", " ", "東", "京", " ", "b"]


@pytest.mark.parametrize(
    ("request_of", "said"),
    [
        (ServeRequest(host="0.0.0.0"), "--host 0.0.0.0 may let other machines in, which needs a token; set SGM_TOKEN"),
        (ServeRequest(host="::1"), "--host ::1 may let other machines in"),
        (ServeRequest(token="a b"), "cannot hold"),
        (ServeRequest(host="203.0.113.1", token="a"), "--host 203.0.113.1 is no address of this machine"),
        (ServeRequest(host="no host", token="a"), "--host no host is not known here"),
    ],
    ids=str,
)
def test_what_would_let_strangers_in_or_cannot_be_bound_is_one_line(request_of, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        request_of.check(load_config(None, [f"output.dir={tmp_path}"]))
    assert "\n" not in str(caught.value)


def test_a_missing_package_a_taken_port_and_a_missing_result_are_found_first(tmp_path, monkeypatch, capfd):
    def ended(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["serve", *arguments, f"output.dir={tmp_path}"])
        assert caught.value.code == 2
        return capfd.readouterr().err

    assert "sgm_finetuned.pth" in ended("--port", str(free_port()))
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port} cannot be used" in ended("--port", port)
    monkeypatch.setenv("SGM_TOKEN", "")
    assert "needs a token" in ended("--host", "0.0.0.0")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find_spec(name))
    assert f"sgm serve needs Starlette and uvicorn; {install_line('serve')}" in ended()
