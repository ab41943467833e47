"""A token without an embedding is named before a model is loaded."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
import torch
from architectures import save_pico
from conftest import make_model, make_tokenizer
from rich.console import Console
from safetensors.torch import load_file, save_file

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.data import preview
from sgm_finetune.commands.estimate import estimate_for
from sgm_finetune.commands.finetune import finetune
from sgm_finetune.commands.generate import GenerateRequest, generate
from sgm_finetune.model.files import find_model_files
from sgm_finetune.model.weights.stored import embedding_rows

ROWS: dict[str, dict] = {
    "sequence-classification": {"text": "the film zzyzx", "label": "a"},
    "token-classification": {"tokens": ["zzyzx", "film"], "tags": ["A", "O"]},
    "causal-lm": {"prompt": "the film", "completion": "zzyzx"},
    "seq2seq-lm": {"source": "the film", "target": "zzyzx"},
}


def quiet() -> Console:
    return Console(file=StringIO(), width=200)


def with_more_tokens(folder: Path, **more) -> Path:
    """The model of the folder with a tokenizer that knows a word more."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"fill{n}" for n in range(32 - len(tokenizer))] + ["zzyzx"])
    if more:
        tokenizer.add_special_tokens(more)
    tokenizer.save_pretrained(folder)
    return folder


def save_data(path: Path, task: str) -> Path:
    row, rows = ROWS[task], []
    for number in range(16):
        rows.append({**row, **({"label": "ab"[number % 2]} if "label" in row else {})})
        first = next(iter(row))
        rows[-1][first] = row[first] + ([" good"] * number if isinstance(row[first], list) else " good" * number)
        if "tags" in row:
            rows[-1]["tags"] = row["tags"] + ["O"] * number
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("command", [preview, estimate_for, finetune])
@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("causal-lm", "llama"),
        ("sequence-classification", "bert"),
        ("token-classification", "bert"),
        ("seq2seq-lm", "bart"),
    ],
)
def test_a_token_beyond_the_embeddings_is_named_first(command, task, name, tmp_path):
    model = with_more_tokens(save_pico(name, tmp_path / "m"))
    data = save_data(tmp_path / "r.jsonl", task)
    settings = [f"model.name={model}", f"model.task={task}", f"data.train={data}", "data.max_length=32"]
    for file in model.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[: 2 * file.stat().st_size // 3])  # nobody reads the numbers
    with pytest.raises(
        UserError, match=r"The data has token ids up to 32 \('zzyzx'\), but the model has 32 embeddings"
    ):
        command(load_config(None, [*settings, f"output.dir={tmp_path / 'o'}"]), quiet())


def test_the_rows_of_the_weights_count_where_config_json_has_more(tmp_path):
    model = with_more_tokens(save_pico("llama", tmp_path / "m"))
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**described, "vocab_size": 33}))
    data = save_data(tmp_path / "r.jsonl", "causal-lm")
    settings = [f"model.name={model}", "model.task=causal-lm", f"data.train={data}", "data.max_length=32"]
    with pytest.raises(UserError, match=r"token ids up to 32 .* the model has 32 embeddings"):
        preview(load_config(None, settings), quiet())


def test_a_model_with_a_row_for_every_token_is_fine(tmp_path):
    make_model("causal-lm", vocab_size=33).save_pretrained(tmp_path / "m")
    with_more_tokens(tmp_path / "m")
    data = save_data(tmp_path / "r.jsonl", "causal-lm")
    settings = [f"model.name={tmp_path / 'm'}", "model.task=causal-lm", f"data.train={data}", "data.max_length=32"]
    assert "zzyzx" in str(preview(load_config(None, settings), quiet())["examples"])


def test_a_prompt_with_a_token_beyond_the_embeddings_is_refused(tmp_path):
    model = save_pico("llama", tmp_path / "m")
    path = tmp_path / "r.jsonl"
    rows = [{"prompt": f"the film {'good ' * n}", "completion": "bad"} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = [f"output.dir={tmp_path / 'o'}"]
    short = ["data.max_length=32", "probe.num_batches=2", "probe.sketch_size=12", "adapter.rank=4"]
    settings = [f"model.name={model}", "model.task=causal-lm", f"data.train={path}", "training.max_steps=1", *short]
    finetune(load_config(None, [*settings, "model.dtype=float32", *where]), quiet())
    with_more_tokens(model)
    with pytest.raises(UserError, match=r"The prompt has token ids up to 32 \('zzyzx'\)"):
        generate(load_config(None, where), where, GenerateRequest(["the zzyzx"]), quiet())


def test_a_padding_token_without_an_embedding_is_replaced(tmp_path):
    model = with_more_tokens(save_pico("llama", tmp_path / "m"), pad_token="[PAD]")
    words = StringIO()
    config = load_config(None, [f"model.name={model}", "model.task=causal-lm"]).model
    files = find_model_files(config, StepLog(Console(file=words, width=200)))
    assert files.tokenizer.pad_token == "<eos>"
    assert "no embedding for the padding token '[PAD]', so '<eos>' pads" in words.getvalue()


def test_the_rows_of_the_input_embedding_are_read_from_the_header(tmp_path):
    names = {"model.embed_tokens.weight": (5, 4), "model.layers.0.self_attn.q_proj.weight": (4, 4)}
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "model.safetensors")
    assert embedding_rows(tmp_path) == 5
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "decoder.embed_tokens.weight": torch.zeros(7, 4)}, tmp_path / "model.safetensors")
    assert embedding_rows(tmp_path) is None  # an encoder and a decoder with vocabularies of their own
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert embedding_rows(tmp_path) is None
    assert embedding_rows(tmp_path / "gone") is None


def test_the_line_names_the_number_of_rows_to_make(tmp_path):
    model = with_more_tokens(save_pico("llama", tmp_path / "m"))
    files = find_model_files(load_config(None, [f"model.name={model}", "model.task=causal-lm"]).model, StepLog(quiet()))
    with pytest.raises(UserError, match=re.escape("model.resize_token_embeddings(33)")) as caught:
        files.check_ids(32, "The data")
    assert "\n" not in str(caught.value)
    files.check_ids(31, "The data")
