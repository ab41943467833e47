from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgm_finetune.base.errors import UserError
from sgm_finetune.data.batches import collator
from sgm_finetune.data.encoding import IGNORED, encode, encoding_summary, fingerprint, pack

EOS = 1


def texts(*lengths: int) -> list[str]:
    return [" ".join(f"w{n % 60}" for n in range(length)) for length in lengths]


def pairs(*rows: tuple[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [p for p, _ in rows], "completion": [c for _, c in rows]})


def test_classification_is_truncated_to_max_length_and_keeps_its_closing_token(encoder_tokenizer) -> None:
    split = datasets.Dataset.from_dict({"text": texts(3, 40, 6), "label": [1, 0, 2]})
    encoded = encode(split, encoder_tokenizer, "sequence-classification", max_length=8)
    assert [len(ids) for ids in encoded.dataset["input_ids"]] == [5, 8, 8]
    assert all((ids[0], ids[-1]) == (2, 3) for ids in encoded.dataset["input_ids"])
    assert encoded.dataset["labels"][:] == [1, 0, 2]
    assert (encoded.num_truncated, encoded.num_dropped) == (1, 0)
    assert encoding_summary(encoded) == "3 sequences, 21 tokens, 1 examples truncated, 0 dropped"


def test_a_classification_batch_is_padded_to_its_longest_sequence(encoder_tokenizer) -> None:
    split = datasets.Dataset.from_dict({"text": texts(1, 4), "label": [1, 0]})
    rows = list(encode(split, encoder_tokenizer, "sequence-classification", max_length=16).dataset)
    batch = collator(encoder_tokenizer, "sequence-classification")(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch["input_ids"][0, 3:].tolist() == [encoder_tokenizer.pad_token_id] * 3
    assert batch["labels"].tolist() == [1, 0]
    wide = collator(encoder_tokenizer, "sequence-classification", pad_to_multiple_of=8)(rows)
    assert wide["input_ids"].shape == (2, 8)
    assert all(values.dtype == torch.long for values in wide.values())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8), max_length=st.integers(8, 40))
def test_packing_keeps_every_token_in_order(causal_tokenizer, lengths: list[int], max_length: int) -> None:
    split = datasets.Dataset.from_dict({"text": texts(*lengths)})
    blocks = encode(split, causal_tokenizer, "causal-lm", max_length).dataset["input_ids"][:]
    stream = [token for text in split["text"] for token in [*causal_tokenizer(text)["input_ids"], EOS]]
    if len(stream) % max_length == 1:
        stream.pop()
    assert [token for block in blocks for token in block] == stream
    assert all(len(block) == max_length for block in blocks[:-1])


def test_a_packed_batch_counts_every_token_and_no_padding(causal_tokenizer) -> None:
    encoded = encode(datasets.Dataset.from_dict({"text": texts(12)}), causal_tokenizer, "causal-lm", max_length=8)
    batch = collator(causal_tokenizer, "causal-lm")(list(encoded.dataset))
    assert batch["input_ids"][1, 5:].tolist() == [EOS] * 3  # without a padding token, any token pads
    assert batch["labels"].tolist()[0] == batch["input_ids"].tolist()[0]
    assert batch["labels"].tolist()[1] == [*batch["input_ids"].tolist()[1][:5], *[IGNORED] * 3]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]


def test_only_the_completion_and_the_end_count_in_the_loss(causal_tokenizer) -> None:
    encoded = encode(pairs(("w1 w2 w3", " w4 w5")), causal_tokenizer, "causal-lm", max_length=16)
    ids = causal_tokenizer("w1 w2 w3 w4 w5")["input_ids"]
    assert encoded.dataset[0]["input_ids"] == [*ids, EOS]
    assert encoded.dataset[0]["labels"] == [*[IGNORED] * 3, *ids[3:], EOS]


def test_a_token_that_straddles_the_border_belongs_to_the_answer(causal_tokenizer) -> None:
    encoded = encode(pairs(("w1 w", "2 w3")), causal_tokenizer, "causal-lm", max_length=16)
    assert encoded.dataset[0]["input_ids"] == [*causal_tokenizer("w1 w2 w3")["input_ids"], EOS]
    assert [label == IGNORED for label in encoded.dataset[0]["labels"]] == [True, False, False, False]


def test_long_examples_lose_their_end_and_hopeless_ones_are_dropped(causal_tokenizer) -> None:
    prompt = texts(7)[0]
    split = pairs(("w1", " w2"), (prompt, " w8 w9 w10"), (prompt + " w7", " w8"), ("", "w1 w2"))
    encoded = encode(split, causal_tokenizer, "causal-lm", max_length=8)
    assert (len(encoded.dataset), encoded.num_truncated, encoded.num_dropped) == (3, 1, 1)
    whole = causal_tokenizer(prompt + " w8")["input_ids"]
    assert encoded.dataset[1]["input_ids"] == whole
    assert encoded.dataset[1]["labels"] == [*[IGNORED] * 7, whole[-1]]


def test_losing_every_answer_is_an_error(causal_tokenizer) -> None:
    split = pairs(*((prompt, " w1") for prompt in texts(8, 20, 34)))
    with pytest.raises(UserError) as caught:
        encode(split, causal_tokenizer, "causal-lm", max_length=8)
    assert str(caught.value) == (
        "100 % of 3 examples lose every answer token at data.max_length=8; the longest prompt has 34 tokens. "
        "Raise data.max_length"
    )


def test_special_tokens_of_the_tokenizer_are_kept_and_the_end_is_not_doubled(encoder_tokenizer) -> None:
    encoder_tokenizer.eos_token = "[SEP]"
    encoded = encode(pairs(("w1", " w2")), encoder_tokenizer, "causal-lm", max_length=16)
    assert encoded.dataset[0]["input_ids"] == encoder_tokenizer("w1 w2")["input_ids"]
    assert encoded.dataset[0]["labels"][:2] == [IGNORED] * 2
    packed = encode(datasets.Dataset.from_dict({"text": ["w1", "w2"]}), encoder_tokenizer, "causal-lm", max_length=16)
    assert packed.dataset["input_ids"][:] == [[2, 6, 3, 2, 7, 3]]


def test_language_modelling_needs_an_end_of_sequence_token_and_two_tokens(encoder_tokenizer, causal_tokenizer) -> None:
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode(datasets.Dataset.from_dict({"text": ["w1"]}), encoder_tokenizer, "causal-lm", max_length=8)
    with pytest.raises(UserError, match=r"1 text\(s\) have 1 token\(s\)"):
        encode(datasets.Dataset.from_dict({"text": [""]}), causal_tokenizer, "causal-lm", max_length=8)


def test_encoding_is_deterministic_and_leaves_no_files(causal_tokenizer, in_tmp: Path) -> None:
    split = datasets.Dataset.from_dict({"text": texts(30, 50)})
    first = encode(split, causal_tokenizer, "causal-lm", max_length=16)
    again = encode(split, causal_tokenizer, "causal-lm", max_length=16)
    assert first.dataset.to_dict() == again.dataset.to_dict()
    assert first.dataset.cache_files == []
    assert list(in_tmp.iterdir()) == []


def test_a_collator_can_be_sent_to_another_process(causal_tokenizer) -> None:
    collate = pickle.loads(pickle.dumps(collator(causal_tokenizer, "causal-lm")))
    rows = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6]}]
    assert collate(rows)["labels"].tolist() == [[5, 6]]


CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} : {{ m['content'] }} <|im_end|> \n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant :{% endif %}"
)
FORGETFUL = (  # writes everything before the last question in short form
    "{% set last = messages | map(attribute='role') | list %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' and not loop.last %}assistant : ... <|im_end|> \n"
    "{% else %}{{ m['role'] }} : {{ m['content'] }} <|im_end|> \n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
UNLIKE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}? {% endif %}"
)


def said(*turns: str) -> list[dict]:
    """Alternating turns, the user's first."""
    return [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]


def conversations(*rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"messages": list(rows)})


@pytest.fixture
def chat_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", ":", "...", "?", "secret"]
    words += [f"w{number}" for number in range(20)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def learnt(tokenizer, row: dict) -> str:
    """What the loss counts; every label is the token of its position."""
    kept = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert kept == [label for label in row["labels"] if label != IGNORED]
    return tokenizer.decode(kept)


def test_the_loss_counts_the_answers_of_a_conversation_and_the_ends_of_their_turns(chat_tokenizer) -> None:
    split = conversations(said("w1", "w2 w3", "w4", "w5"), [{"role": "system", "content": "w9"}, *said("w1", "w6")])
    encoded = encode(split, chat_tokenizer, "causal-lm", max_length=64)
    first, second = encoded.dataset
    assert chat_tokenizer.decode(first["input_ids"]) == (
        "<|im_start|> user : w1 <|im_end|> <|im_start|> assistant : w2 w3 <|im_end|> "
        "<|im_start|> user : w4 <|im_end|> <|im_start|> assistant : w5 <|im_end|>"
    )
    assert learnt(chat_tokenizer, first) == "w2 w3 <|im_end|> w5 <|im_end|>"
    assert learnt(chat_tokenizer, second) == "w6 <|im_end|>"
    assert encoded.num_divided == 0


def test_what_the_user_says_last_is_not_part_of_an_example(chat_tokenizer) -> None:
    (row,) = encode(conversations(said("w1", "w2", "w3")), chat_tokenizer, "causal-lm", max_length=64).dataset
    assert chat_tokenizer.decode(row["input_ids"]).endswith("w2 <|im_end|>")


def test_a_template_that_forgets_gives_an_example_for_each_answer(chat_tokenizer) -> None:
    chat_tokenizer.chat_template = FORGETFUL
    split = conversations(said("w1", "secret w2", "w3", "w4"), said("w1", "w2"))
    encoded = encode(split, chat_tokenizer, "causal-lm", max_length=64)
    assert [learnt(chat_tokenizer, row) for row in encoded.dataset] == [
        "secret w2 <|im_end|>", "w4 <|im_end|>", "w2 <|im_end|>",
    ]  # fmt: skip
    assert encoded.num_divided == 1
    assert "secret" not in chat_tokenizer.decode(encoded.dataset[1]["input_ids"])


def test_a_template_in_which_answers_cannot_be_found_is_refused(chat_tokenizer) -> None:
    chat_tokenizer.chat_template = UNLIKE
    with pytest.raises(UserError, match=r"with and without its answer.*data\.format=completion"):
        encode(conversations(said("w1", "w2")), chat_tokenizer, "causal-lm", max_length=64)


def test_a_template_that_refuses_is_quoted(chat_tokenizer) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(
        UserError, match=r"^Example 1: the model's chat template refuses this conversation: no system role here"
    ):
        encode(conversations(said("w1", "w2")), chat_tokenizer, "causal-lm", max_length=64)


def test_long_conversations_lose_their_end_and_hopeless_ones_are_dropped(chat_tokenizer) -> None:
    long = " ".join(["w1"] * 20)
    split = conversations(said(long, "w2"), said("w1", long), said("w1", "w2"))
    encoded = encode(split, chat_tokenizer, "causal-lm", max_length=16)
    assert (len(encoded.dataset), encoded.num_truncated, encoded.num_dropped) == (2, 1, 1)
    assert [len(row["input_ids"]) for row in encoded.dataset] == [16, 10]
    with pytest.raises(UserError, match=r"100 % of 1 examples lose every answer token at data\.max_length=16"):
        encode(conversations(said(long, "w2")), chat_tokenizer, "causal-lm", max_length=16)


def test_without_a_template_an_instruction_is_alpacas_and_more_is_refused(chat_tokenizer) -> None:
    chat_tokenizer.chat_template = None
    (row,) = encode(conversations(said("w1", "w2")), chat_tokenizer, "causal-lm", max_length=64).dataset
    assert learnt(chat_tokenizer, row) == "w2 <|im_end|>"
    with pytest.raises(UserError, match="no chat template, which a conversation of 3 messages"):
        encode(conversations(said("w1", "w2", "w3")), chat_tokenizer, "causal-lm", max_length=64)


def test_the_first_token_of_a_word_has_its_tag(encoder_tokenizer) -> None:
    from tokenizers import pre_tokenizers

    encoder_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("-", "removed")
    split = datasets.Dataset.from_dict({"tokens": [["w1-w2", "w3"], ["w4"] * 9], "tags": [[5, 6], [7] * 9]})
    encoded = encode(split, encoder_tokenizer, "token-classification", max_length=8)
    assert encoded.dataset["labels"][:] == [
        [IGNORED, 5, IGNORED, 6, IGNORED],
        [IGNORED, *[7] * 6, IGNORED],
    ]
    assert (encoded.num_truncated, encoded.num_dropped) == (1, 0)
    batch = collator(encoder_tokenizer, "token-classification")(list(encoded.dataset))
    assert batch["labels"][0].tolist() == [IGNORED, 5, IGNORED, 6, IGNORED, IGNORED, IGNORED, IGNORED]


def test_a_source_is_cut_and_a_target_keeps_its_end(encoder_tokenizer) -> None:
    encoder_tokenizer.eos_token = "[SEP]"
    split = datasets.Dataset.from_dict({"source": texts(3, 30), "target": texts(2, 30)})
    encoded = encode(split, encoder_tokenizer, "seq2seq-lm", max_length=8)
    assert [len(ids) for ids in encoded.dataset["input_ids"]] == [5, 8]
    assert [(len(ids), ids[-1]) for ids in encoded.dataset["labels"]] == [(4, 3), (8, 3)]
    assert encoded.num_truncated == 2
    batch = collator(encoder_tokenizer, "seq2seq-lm")(list(encoded.dataset))
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 8)
    assert batch["labels"][0, 4:].tolist() == [IGNORED] * 4


def test_token_types_distinguish_two_texts(encoder_tokenizer) -> None:
    from tokenizers import processors

    encoder_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    encoder_tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    split = datasets.Dataset.from_dict({"text": ["w1 w2", "w1"], "text_pair": ["w3", "w4"], "label": [0, 1]})
    encoded = encode(split, encoder_tokenizer, "sequence-classification", max_length=8)
    batch = collator(encoder_tokenizer, "sequence-classification")(list(encoded.dataset))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]


def test_labels_of_a_batch_are_ids_vectors_or_numbers(encoder_tokenizer) -> None:
    for labels, dtype, shape in (
        ([1, 0], torch.long, (2,)),
        ([[1.0, 0.0]] * 2, torch.float, (2, 2)),
        ([0.5, 2.0], torch.float, (2,)),
    ):
        split = datasets.Dataset.from_dict({"text": texts(1, 2), "label": labels})
        encoded = encode(split, encoder_tokenizer, "sequence-classification", max_length=8)
        batch = collator(encoder_tokenizer, "sequence-classification")(list(encoded.dataset))
        assert (batch["labels"].dtype, batch["labels"].shape) == (dtype, shape)
        assert batch["labels"].tolist() == labels


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_packed_examples_are_whole_and_few_sequences_hold_them(causal_tokenizer, lengths: list[int]) -> None:
    rows = [(f"w{n % 60}", " " + text) for n, text in enumerate(texts(*lengths))]
    encoded = encode(pairs(*rows), causal_tokenizer, "causal-lm", max_length=16)
    packed = pack(encoded, 16)
    assert packed.num_packed == len(encoded.dataset)
    assert all(len(row["input_ids"]) <= 16 for row in packed.dataset)
    found = []
    for row in packed.dataset:
        begins = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        for begin, end in zip(begins, [*begins[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][begin:end] == list(range(end - begin))
            found.append((row["input_ids"][begin:end], row["labels"][begin:end]))
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in encoded.dataset)
    total = sum(len(row["input_ids"]) for row in encoded.dataset)
    assert len(packed.dataset) <= 2 * -(-total // 16)


def test_an_example_is_not_predicted_from_the_one_before(causal_tokenizer) -> None:
    encoded = encode(pairs(("", "w1 w2"), ("", "w3 w4")), causal_tokenizer, "causal-lm", max_length=8)
    (row,) = pack(encoded, 8).dataset
    assert [label == IGNORED for label in row["labels"]] == [True, False, False] * 2
    batch = collator(causal_tokenizer, "causal-lm", pad_to_multiple_of=8)([row])
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 0]]


def test_equal_examples_have_the_same_fingerprint_in_any_file():
    rows = {"input_ids": [[1, 2, 3], [4]], "labels": [0, 1]}
    one = datasets.Dataset.from_dict(rows)
    joined = datasets.concatenate_datasets([one.select([0]), one.select([1])])
    assert fingerprint(one) == fingerprint(joined) == fingerprint(one.select([1, 0]).select([1, 0]))
    others = [
        {**rows, "input_ids": [[1, 2], [3, 4]]},
        {**rows, "labels": [1, 0]},
        {**rows, "input_ids": [[1, 2, 3], [5]]},
    ]
    assert len({fingerprint(one), *(fingerprint(datasets.Dataset.from_dict(other)) for other in others)}) == 4
