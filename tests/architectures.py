"""Pico models of the common architectures, each saved as its authors publish it: weights and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from conftest import make_tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from sgm_finetune.base.config import ModelConfig, Task
from sgm_finetune.model.classes import Head
from sgm_finetune.model.load import load_model

_TOKENS = {"vocab_size": 32, "pad_token_id": 0}
_BOTH_ENDS = {"eos_token_id": 2, "bos_token_id": 2}
_BODY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA_LIKE = {**_BODY, **_TOKENS, **_BOTH_ENDS, "num_key_value_heads": 2, "max_position_embeddings": 256}
_BERT_LIKE = {**_BODY, **_TOKENS, "max_position_embeddings": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 8}

DECODERS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "gpt2": lambda: hf.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=256, **_TOKENS, **_BOTH_ENDS),
    "gpt_neox": lambda: hf.GPTNeoXConfig(max_position_embeddings=256, **_BODY, **_TOKENS, **_BOTH_ENDS),
    "llama": lambda: hf.LlamaConfig(**_LLAMA_LIKE),
    "mistral": lambda: hf.MistralConfig(**_LLAMA_LIKE),
    "qwen2": lambda: hf.Qwen2Config(**_LLAMA_LIKE),
    "qwen3": lambda: hf.Qwen3Config(head_dim=8, **_LLAMA_LIKE),
    "gemma2": lambda: hf.Gemma2Config(head_dim=8, **_LLAMA_LIKE),
    "gemma3": lambda: hf.Gemma3TextConfig(head_dim=8, **_LLAMA_LIKE),
    "phi": lambda: hf.PhiConfig(**{**_LLAMA_LIKE, "num_key_value_heads": 4}),
    "phi3": lambda: hf.Phi3Config(**_LLAMA_LIKE),
    "olmo2": lambda: hf.Olmo2Config(**_LLAMA_LIKE),
    "mixtral": lambda: hf.MixtralConfig(num_local_experts=4, **_LLAMA_LIKE),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(shared_expert_intermediate_size=64, **_EXPERTS, **_LLAMA_LIKE),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_EXPERTS, **_LLAMA_LIKE),
    "gpt_oss": lambda: hf.GptOssConfig(num_local_experts=4, num_experts_per_tok=2, head_dim=8, **_LLAMA_LIKE),
}
ENCODERS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "bert": lambda: hf.BertConfig(**_BERT_LIKE),
    "roberta": lambda: hf.RobertaConfig(**_BERT_LIKE),
    "distilbert": lambda: hf.DistilBertConfig(
        dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=256, **_TOKENS
    ),
    "deberta": lambda: hf.DebertaConfig(
        relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0, position_biased_input=False,
        **_BERT_LIKE,
    ),
    "deberta_v2": lambda: hf.DebertaV2Config(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=32, type_vocab_size=0,
        position_biased_input=False, share_att_key=True, norm_rel_ebd="layer_norm", **_BERT_LIKE,
    ),
    "modernbert": lambda: hf.ModernBertConfig(cls_token_id=2, sep_token_id=2, **_BERT_LIKE, **_BOTH_ENDS),
    "electra": lambda: hf.ElectraConfig(embedding_size=32, **_BERT_LIKE),
    "albert": lambda: hf.AlbertConfig(embedding_size=32, **_BERT_LIKE),
}  # fmt: skip
ENCODER_DECODERS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "t5": lambda: hf.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, eos_token_id=2, decoder_start_token_id=0, **_TOKENS
    ),
    "bart": lambda: hf.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=256, decoder_start_token_id=2,
        forced_eos_token_id=2, **_TOKENS, **_BOTH_ENDS,
    ),
}  # fmt: skip


def save_pico(name: str, folder: Path) -> Path:
    """Saves a pretrained model of that architecture, encoders without a head; returns `folder`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if name in DECODERS:
        model = hf.AutoModelForCausalLM.from_config(DECODERS[name]())
    elif name in ENCODERS:
        model = hf.AutoModel.from_config(ENCODERS[name]())
    else:
        model = hf.AutoModelForSeq2SeqLM.from_config(ENCODER_DECODERS[name]())
        ending = TemplateProcessing(single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 2)])
        tokenizer.backend_tokenizer.post_processor = ending
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def task_of(name: str) -> Task:
    return "causal-lm" if name in DECODERS else "seq2seq-lm" if name in ENCODER_DECODERS else "sequence-classification"


def load_pico(
    folder: Path, name: str, form: tuple[str, str], residence: str, said: list[str] | None = None
) -> hf.PreTrainedModel:
    """Loads what `save_pico` saved, in a type and a quantisation; `said` gets the lines that loading announces."""
    task = task_of(name)
    config = ModelConfig(name=str(folder), task=task, dtype=form[0], quantization=form[1], residence=residence)  # type: ignore
    torch.manual_seed(3)  # a new head is random
    head = Head(("a", "b"), "class", 0) if task == "sequence-classification" else Head(pad_token_id=0)
    return load_model(config, folder, head, announce=(said if said is not None else []).append)[0]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names, and the same numbers bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different
