"""Generation stops where the answers that were learnt end, in `sgm` and in the exports."""

from __future__ import annotations

import importlib.util
import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.commands.export import ExportRequest, export_result
from sgm_finetune.commands.finetune import finetune
from sgm_finetune.results.answers import answer
from sgm_finetune.results.export.answer_check import OwnAnswers, compare_answers
from sgm_finetune.results.export.gguf_vocabulary import read_vocabulary
from sgm_finetune.results.generation import continue_ids, continue_prompts
from sgm_finetune.results.kept_prompts import KeptPrompts, load_prompts
from sgm_finetune.results.sampling import Sampling
from sgm_finetune.results.stops import (
    Stops,
    find_stops,
    model_stops,
    save_tokenizer,
    stopping_at,
    stopping_tokenizer,
    stored_generation,
    turn_end,
    turn_remark,
)

CORPUS = "hello world what is the answer user assistant the film was good and bad"
END, START, TURN, SAID = "<|endoftext|>", "<|start|>", "<|turn|>", "<said>"


def chat_template(ending: str, last: str = "") -> str:
    """A template that writes `ending` after every message, and `last` after a conversation that asks for nothing."""
    return (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '" + ending + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% else %}{{ '" + last + "' }}{% endif %}"
    )


def make_tokenizer(template: str | None):
    """Byte-level BPE whose end of sequence is END. TURN is special and SAID is added as an ordinary token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END, START, TURN], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator([CORPUS] * 9, trainer)
    raw.add_tokens([AddedToken(SAID, special=False, normalized=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END)
    made.chat_template = template
    return made


def ids_of(tokenizer, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


# the rule

ENDINGS = {
    "a special token that the tokenizer does not name": (chat_template("<|turn|>\\n"), TURN, ""),
    "an ordinary added token": (chat_template("<said>\\n"), SAID, ""),
    "the end of the sequence, after a space": (chat_template(" <|endoftext|>"), END, ""),
    "a token, and the end of the sequence behind the last turn": (chat_template("<|turn|>\\n", END), TURN, ""),
    "a text": (chat_template("\\n###\\n"), None, "###"),
    "a text before a token": (chat_template("</answer><|turn|>"), TURN, "</answer>"),
    "white space alone": (chat_template("\\n"), None, ""),
    "thoughts before the answer": (
        chat_template("<|turn|>").replace("m['content']", "'<think>\n\n</think>\n\n' + m['content']"), TURN, "",
    ),
    "a template that refuses answers": ("{{ raise_exception('no') }}", None, ""),
    "no template": (None, None, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ENDINGS))
def test_a_turn_ends_with_what_the_template_writes_behind_the_answer(name):
    template, token, text = ENDINGS[name]
    tokenizer = make_tokenizer(template)
    assert turn_end(tokenizer) == (None if token is None else ids_of(tokenizer, token)[0], text)


def test_an_added_token_that_begins_like_another_is_the_longer_one():
    tokenizer = make_tokenizer(chat_template("<said>!\\n"))
    tokenizer.add_tokens(["<said>!"])
    assert turn_end(tokenizer) == (*ids_of(tokenizer, "<said>!"), "")


def test_stops_are_those_of_template_tokenizer_and_model_together():
    tokenizer = make_tokenizer(chat_template("<|turn|>"))
    turn, end = ids_of(tokenizer, TURN, END)
    generation = {"eos_token_id": [end, 77], "stop_strings": "###"}
    assert find_stops(tokenizer, generation) == Stops((turn, end, 77), ("###",))
    assert find_stops(tokenizer, generation, is_chat=False).tokens == (end, turn, 77)
    assert find_stops(tokenizer, {"eos_token_id": None}) == Stops((turn, end))
    assert find_stops(tokenizer, {"eos_token_id": -1, "stop_strings": ["a", "b"]}) == Stops((turn, end), ("a", "b"))
    assert find_stops(make_tokenizer(None), {"eos_token_id": 5}).tokens == (end, 5)


def test_what_a_model_says_is_read_from_either_file(tmp_path):
    config = SimpleNamespace()
    from transformers import LlamaConfig

    config = LlamaConfig(eos_token_id=[4, 5], pad_token_id=0)
    assert stored_generation(tmp_path, config)["eos_token_id"] == [4, 5]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "repetition_penalty": 1.5}')
    assert stored_generation(tmp_path, config) == {"eos_token_id": 7, "repetition_penalty": 1.5}


def test_a_template_without_a_token_of_its_own_is_spoken_of():
    assert turn_remark(make_tokenizer(chat_template("<said>"))) is None
    assert turn_remark(make_tokenizer(None)) is None
    assert "with the text '###'" in str(turn_remark(make_tokenizer(chat_template("\\n###\\n"))))
    assert "writes nothing after an answer" in str(turn_remark(make_tokenizer(chat_template("\\n"))))


# our own generation


class Scripted(LlamaForCausalLM):
    """Writes one sequence of tokens after every prompt, whatever it reads."""

    script: list[int]
    at = 0

    def generate(self, *arguments, **options):
        self.at = -1
        return super().generate(*arguments, **options)

    def forward(self, input_ids=None, past_key_values=None, **other):
        self.at = at = self.at + 1
        likeliest = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        likeliest[..., self.script[at % len(self.script)]] = 2.0
        likeliest[..., self.script[(at + 1) % len(self.script)]] += 1.0
        return CausalLMOutputWithPast(logits=likeliest, past_key_values=past_key_values)


def scripted(tokenizer, script: list[int], **generation) -> Scripted:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = Scripted(config)
    model.script = script
    model.generation_config = GenerationConfig(**generation)
    return model


def words(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("ending", "written"),
    [
        ("<|turn|>\\n", "world<|turn|>\nuser more"),
        ("<said>\\n", "world<said>\nuser more"),
        ("<|turn|>\\n", "world<|endoftext|>more"),
        ("\\n###\\n", "world\n###\nuser more"),
        ("</answer><|turn|>", "world</answer><|turn|>more"),
    ],
)
def test_an_answer_ends_with_its_turn_and_does_not_show_the_end(ending, written):
    tokenizer = make_tokenizer(chat_template(ending))
    prompts = [words(tokenizer, "hello"), words(tokenizer, "what is the answer")]
    model = scripted(tokenizer, words(tokenizer, written))
    stops = model_stops(model, tokenizer)
    assert continue_prompts(model, prompts, tokenizer, "causal-lm", stops, 40, batch_size=2) == ["world", "world"]

    shown: list[str] = []
    config = load_config(None, ["model.task=causal-lm"])
    base = SimpleNamespace(check_ids=lambda largest, what: None)
    result = SimpleNamespace(config=config, tokenizer=tokenizer, model=model, roles=("prompt",), base=base)
    (found,) = answer(result, ["hello"], Sampling(40), show=shown.append)  # type: ignore[arg-type]
    assert "".join(shown).strip() == found["answer"] == "world"


def test_the_models_own_settings_of_generation_are_followed():
    """Where to stop, tokens that it must not write, repetition; but the likeliest token is taken, whatever it says."""
    tokenizer = make_tokenizer(None)
    a, b, c, d = script = words(tokenizer, "xyzw")
    prompt = words(tokenizer, "hello")
    model = scripted(tokenizer, script, eos_token_id=[c], do_sample=True, temperature=9.0, num_beams=3)
    assert continue_ids(model, [prompt], tokenizer, "causal-lm", model_stops(model, tokenizer), 8) == [[a, b, c]]
    model.generation_config = GenerationConfig(eos_token_id=d, suppress_tokens=[b])
    assert continue_ids(model, [prompt], tokenizer, "causal-lm", model_stops(model, tokenizer), 8) == [[a, c, c, d]]


def test_another_librarys_generation_stops_there_too_and_the_model_is_as_it_was():
    tokenizer = make_tokenizer(chat_template("<|turn|>"))
    script, prompt = words(tokenizer, "world<|turn|>more"), words(tokenizer, "hello")
    model = scripted(tokenizer, script, eos_token_id=0)
    with stopping_at(model, model_stops(model, tokenizer)):
        written = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(written[0, len(prompt) :]) == "world<|turn|>"
    assert model.generation_config.eos_token_id == 0


# what other programs read


def test_the_files_for_other_programs_say_where_an_answer_ends(tmp_path):
    tokenizer = make_tokenizer(chat_template("<said>\\n"))
    said, end = ids_of(tokenizer, SAID, END)
    generation = {"_from_model_config": True, "eos_token_id": end, "top_k": 20, "do_sample": True}
    save_tokenizer(tokenizer, tmp_path, generation, is_chat=True)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert stored == {"eos_token_id": [said, end], "top_k": 20, "do_sample": True}
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == SAID
    assert loaded("hello<said>").input_ids == tokenizer("hello<said>").input_ids
    assert tokenizer.eos_token == END

    save_tokenizer(tokenizer, tmp_path / "text", generation, is_chat=False)  # learnt from prompts and completions
    assert AutoTokenizer.from_pretrained(tmp_path / "text").eos_token == END
    save_tokenizer(tokenizer, tmp_path / "class", None, is_chat=False)
    assert not (tmp_path / "class/generation_config.json").exists()


def test_the_end_of_a_sequence_that_the_template_writes_stays():
    tokenizer = make_tokenizer(chat_template("<|turn|>\\n").replace("{% else %}{{ '' }}", "{% else %}{{ eos_token }}"))
    assert stopping_tokenizer(tokenizer, find_stops(tokenizer, {})) is tokenizer


def test_a_gguf_file_holds_every_end():
    pytest.importorskip("gguf")
    tokenizer = make_tokenizer(chat_template("<|turn|>\\n"))
    turn, end = ids_of(tokenizer, TURN, END)
    stops = find_stops(tokenizer, {"eos_token_id": [end, 77]})
    found = read_vocabulary(tokenizer, 320, stops)
    assert {name: found.ids[name] for name in ("eos", "eot", "eom")} == {"eos": turn, "eot": end, "eom": 77}
    assert found.ends == [turn, end, 77]
    tokenizer = make_tokenizer(chat_template("<|turn|>\\n").replace("{% else %}{{ '' }}", "{% else %}{{ eos_token }}"))
    found = read_vocabulary(tokenizer, 320, find_stops(tokenizer, {}))
    assert (found.ids["eos"], found.ids["eot"]) == (end, turn)


# the check of an export


def test_answers_are_compared_with_their_ends():
    tokenizer = make_tokenizer(chat_template("<|turn|>"))
    turn, a, b = *ids_of(tokenizer, TURN), *words(tokenizer, "xy")
    own = OwnAnswers([[5], [6]], [[a, turn], [b, b, b]], Stops((turn,)), limit=3)
    same = compare_answers([[a, turn], [b, b, b]], own, tokenizer)
    assert (same.num_equal, same.num_compared, same.first_different, same.runs_on) == (2, 2, None, None)
    assert same.describe() == "answers equal 2 of 2"
    other = compare_answers([[a, turn], [b, a, b]], own, tokenizer)
    assert other.describe() == (
        "answers equal 1 of 2; the first that differs, to test prompt 2: 'yxy' instead of 'yyy'"
    )
    assert compare_answers([[a, turn, b], [b, b, b]], own, tokenizer).runs_on == TURN
    by_text = OwnAnswers([[5]], [[a, b]], Stops((turn,), ("y",)), limit=9)
    assert compare_answers([[a, b, a, a]], by_text, tokenizer).num_equal == 1  # no file can hold a text


def test_kept_prompts_are_checked_before_a_model_reads_them(tmp_path):
    assert load_prompts(tmp_path, 100, 9) is None
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"format": "sgm-prompts/1", "prompts": [[1, 99]], "max_new_tokens": 3}))
    assert load_prompts(tmp_path, 100, 2) == KeptPrompts([[1, 99]], 3)
    with pytest.raises(UserError, match="it has the token 99, and the model has 99"):
        load_prompts(tmp_path, 99, 2)
    with pytest.raises(UserError, match=r"a prompt has 2 tokens, and data\.max_length is 1"):
        load_prompts(tmp_path, 100, 1)
    path.write_text('{"format": "sgm-prompts/1", "prompts": "abc", "max_new_tokens": 3}')
    with pytest.raises(UserError, match="`prompts`"):
        load_prompts(tmp_path, 99, 9)


# whole runs


def trained(folder: Path, template: str, answer: str, steps: int) -> list[str]:
    """A run that learns to say `answer` to everything. Returns the override that names it."""
    tokenizer = make_tokenizer(template)
    model = _untied_llama(len(tokenizer), tokenizer.eos_token_id)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": answer}]}
        for i in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"model.name={folder / 'model'}", "model.task=causal-lm", "model.dtype=float32", "data.max_length=64",
        f"data.train={folder / 'chats.jsonl'}", "probe.num_batches=2", f"training.max_steps={steps}",
        "training.batch_size=8", "training.learning_rate=0.2", "adapter.rank=8", f"output.dir={folder / 'out'}",
    ]  # fmt: skip
    metrics = finetune(load_config(None, settings), Console(file=StringIO()))
    if steps > 100:
        assert metrics["after"]["exact_match"] == 1.0
    return settings[-1:]


def _untied_llama(size: int, eos: int) -> LlamaForCausalLM:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, eos_token_id=eos, pad_token_id=eos,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def exported(where: list[str], to: str) -> dict:
    return export_result(load_config(None, where), where, ExportRequest(to), Console(file=StringIO()))


@pytest.mark.slow
def test_an_export_that_runs_on_after_the_end_is_not_kept(tmp_path, monkeypatch):
    """The base model's own file names a token that the model writes: exports stop there, by their files alone."""
    from sgm_finetune.results import stops

    where = trained(tmp_path, chat_template("<|turn|>\\n"), "world", 2)
    base = tmp_path / "model/generation_config.json"
    base.write_text(json.dumps({"eos_token_id": _first_token(where)}))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "llama_cpp" else find(name))
    for to in ("merged", "gguf"):
        answers = exported(where, to)["answers"]
        assert answers["num_equal"] == answers["num_compared"] == 8
    monkeypatch.setattr(stops, "_write_generation_config", lambda folder, *rest: (folder / base.name).write_text("{}"))
    with pytest.raises(UserError, match=r"does not stop where an answer ends: Transformers goes on after .*; nothing"):
        exported([*where, "output.overwrite=true"], "merged")


def _first_token(where: list[str]) -> int:
    """The first token of the run's first answer."""
    from sgm_finetune.base.console import StepLog
    from sgm_finetune.results.export.answer_check import own_answers
    from sgm_finetune.results.load import attach_adapter, load_unquantised, read_result

    result = read_result(load_config(None, where), [], StepLog(Console(file=StringIO())))
    own = own_answers(result, attach_adapter(load_unquantised(result, "float32"), result.content, result.path))
    assert own is not None
    return own.answers[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["<|turn|>\\n", "<said>\\n"])
def test_a_run_and_its_exports_stop_where_the_turn_ends(ending, tmp_path):
    where = trained(tmp_path, chat_template(ending), "world", 150)
    for to in ("adapter", "merged"):
        answers = exported(where, to)["answers"]
        assert answers["num_equal"] == answers["num_compared"] == 8
    folder = tmp_path / "out/export/merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "hello 3"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    written = model.generate(prompt, max_new_tokens=20)[0, prompt.shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True) == "world"
    assert written[-1] == tokenizer.eos_token_id


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason=install_line("llama-cpp"))
@pytest.mark.parametrize("ending", ["<|turn|>\\n", "<said>\\n"])
def test_llama_cpp_stops_where_the_turn_ends(ending, tmp_path):
    import llama_cpp  # pyright: ignore[reportMissingImports]

    where = trained(tmp_path, chat_template(ending), "world", 150)
    report = exported(where, "gguf")
    assert report["by"] == "llama.cpp"
    assert report["answers"]["num_equal"] == report["answers"]["num_compared"] == 8
    folder = tmp_path / "out/export/gguf"
    assert f'PARAMETER stop "{ending[:-2]}"' in (folder / "Modelfile").read_text()
    model = llama_cpp.Llama(str(folder / "model-f16.gguf"), n_ctx=256, verbose=False)
    said = model.create_chat_completion([{"role": "user", "content": "hello 3"}], max_tokens=20, temperature=0)
    assert said["choices"][0]["message"]["content"] == "world"
    assert said["choices"][0]["finish_reason"] == "stop"
