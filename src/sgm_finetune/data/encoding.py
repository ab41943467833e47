"""Encodes splits as token sequences with labels."""

from __future__ import annotations

import bisect
import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets.table import InMemoryTable

from sgm_finetune.base.config import PAIR_TASKS, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import num_common
from sgm_finetune.data.arrow import column_parts
from sgm_finetune.data.chat import CHECKED_ELSEWHERE, UnreadFields, asked_text, needs_template, written_answers
from sgm_finetune.data.conversations import Message
from sgm_finetune.data.mixture import SOURCE
from sgm_finetune.data.rows import Origin
from sgm_finetune.data.token_lists import TokenLists
from sgm_finetune.data.tokens import doubled_tokens, learnt_tokens, single_ends

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position that the loss ignores."""
REFERENCES = ("reference", "other_reference")
"""Columns for what the base model says of an example (train/preference.py)."""
TEXTS_PER_CALL = 1000
MAX_CHARACTERS = 10_000_000
"""Maximum characters of a text that is cut at `data.max_length`. A tokenizer takes seconds for so many."""

FEATURES = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "attention_mask": datasets.List(datasets.Value("int8")),
}
TOKEN_FEATURES = datasets.Features({**FEATURES, "labels": datasets.List(datasets.Value("int32"))})


@dataclass(frozen=True)
class Encoded:
    """Token sequences with `input_ids`, `attention_mask` and `labels`, and counts of what the encoding changed."""

    dataset: datasets.Dataset
    num_truncated: int
    """Examples that lost tokens at `max_length`."""
    num_dropped: int
    """Examples without any answer token (or tagged word) within `max_length`. The data set leaves them out."""
    num_divided: int = 0
    """Conversations that became one example for each answer, because the chat template changes earlier turns when later
    ones follow."""
    num_packed: int = 0
    """Examples that `pack` put into the sequences."""
    unread: tuple[str, ...] = ()
    """Fields of messages that the chat template does not write."""
    written: tuple[str, ...] = ()
    """Those that it writes."""
    doubled: Mapping[str, int] = field(default_factory=dict)
    """Special token -> the number of sequences in which it stands twice in a row."""
    is_recalled: bool = False
    """Whether it comes from the cache."""


COUNTS = tuple(one.name for one in fields(Encoded) if one.name not in ("dataset", "is_recalled"))
"""What `Encoded` has beside the data set, wherever that came from."""


def encode(
    split: datasets.Dataset, tokenizer: Any, task: Task, max_length: int, origins: Sequence[Origin] | None = None
) -> Encoded:
    """`split` as token sequences of at most `max_length` tokens, in memory. The result is deterministic.

    - Sequence classification: one sequence for each text or pair of texts.
    - Token classification: the first token of a word has the word's tag.
    - Sequence to sequence: source and target.
    - Language modelling on `text`: an end-of-sequence token follows every document; they are joined and cut into
      blocks of `max_length`. Only a last token that would stand alone is lost.
    - Language modelling on `prompt` and `completion`: the loss counts the completion and the end-of-sequence token.
    - Language modelling on `messages`: the chat template writes them; the loss counts the answers of the assistant and
      the end of its turns.
    - Preferences and rewards: two sequences with the same prompt (data/pair_encoding.py).

    Longer classification inputs and sources are truncated by the tokenizer's own rule; longer completion and chat
    examples are truncated at the end. A sequence begins with one beginning-of-sequence token and ends with one
    end-of-sequence token, also where the text has its own. Raises UserError when no example has anything to learn
    within `max_length`, and for a conversation that the chat template refuses; `origins` names its row.
    """
    match task:
        case "sequence-classification":
            encoded = _encode_classification(split, tokenizer, max_length)
        case "token-classification":
            encoded = _encode_tagged(split, tokenizer, max_length)
        case "seq2seq-lm":
            encoded = _encode_sequence_pairs(split, tokenizer, max_length)
        case "causal-lm" if "completion" in split.column_names:
            encoded = _encode_completions(split["prompt"], split["completion"], tokenizer, max_length)
        case "causal-lm" if "messages" in split.column_names:
            encoded = _encode_conversations(split, tokenizer, max_length, origins)
        case "causal-lm":
            encoded = _encode_running_text(split, tokenizer, max_length)
        case "preference" | "reward":
            from sgm_finetune.data.pair_encoding import encode_preferences  # here: it builds on this file

            encoded = encode_preferences(split, tokenizer, max_length, origins, is_scored=task == "reward")
    if task in ("causal-lm", "seq2seq-lm", *PAIR_TASKS):
        encoded = replace(encoded, doubled=doubled_tokens(encoded.dataset, tokenizer))
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", encoding_summary(encoded))
    return encoded


def pack(encoded: Encoded, max_length: int) -> Encoded:
    """Language-modelling examples, packed into sequences of at most `max_length` tokens.

    Best-fit decreasing: the longest example comes first, each into the sequence where it leaves the least room.
    `position_ids` restart with every example. There is no `attention_mask`: by its absence Transformers knows that
    examples must not attend to each other.
    """
    rows = list(zip(encoded.dataset["input_ids"][:], encoded.dataset["labels"][:], strict=True))
    rooms: list[tuple[int, int]] = []  # (room left, index of the sequence), ascending
    sequences: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: -len(rows[i][0])):
        length = len(rows[index][0])
        place = bisect.bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = max_length, len(sequences)
            sequences.append([])
        sequences[number].append(index)
        bisect.insort(rooms, (room - length, number))
    columns: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": []}
    for members in sequences:
        columns["input_ids"].append([token for i in members for token in rows[i][0]])
        # else the previous example would predict the first token of this one
        columns["labels"].append([label for i in members for label in (IGNORED, *rows[i][1][1:])])
        columns["position_ids"].append([position for i in members for position in range(len(rows[i][0]))])
    features = datasets.Features(dict.fromkeys(columns, TOKEN_FEATURES["labels"]))
    dataset = datasets.Dataset.from_dict(columns, features=features)
    return replace(encoded, dataset=dataset, num_packed=len(rows))


def join_sources(parts: Mapping[int, Encoded]) -> Encoded:
    """The encoded sources of a mixture one after another, by their index, which a column SOURCE holds."""
    numbered = [
        one.dataset.add_column(SOURCE, [source] * len(one.dataset), feature=datasets.Value("int32"))  # type: ignore[call-arg]
        for source, one in parts.items()
    ]
    return join_encoded(numbered, list(parts.values()))


def join_encoded(parts: Sequence[datasets.Dataset], encoded: Sequence[Encoded]) -> Encoded:
    """The data sets `parts` one after another, with the counts of the `encoded` data that they are made of."""
    doubled: Counter[str] = Counter()
    for one in encoded:
        doubled.update(one.doubled)
    return Encoded(
        datasets.concatenate_datasets(parts),  # type: ignore[arg-type]
        num_truncated=sum(one.num_truncated for one in encoded),
        num_dropped=sum(one.num_dropped for one in encoded),
        num_divided=sum(one.num_divided for one in encoded),
        num_packed=sum(one.num_packed for one in encoded),
        unread=tuple(dict.fromkeys(name for one in encoded for name in one.unread)),
        written=tuple(dict.fromkeys(name for one in encoded for name in one.written)),
        doubled=doubled,
        is_recalled=any(one.is_recalled for one in encoded),
    )


def fingerprint(dataset: datasets.Dataset) -> str:
    """XXH3-128 hash of the values of an encoded data set, in order. Equal examples have equal hashes in any file."""
    digest = xxhash.xxh3_128()
    for name in sorted(name for name in dataset.column_names if name not in REFERENCES):
        digest.update(name.encode())
        for values in column_parts(dataset, name):
            if pa.types.is_list(values.type):
                digest.update(values.value_lengths().to_numpy(zero_copy_only=False).astype("int64").tobytes())
                values = values.flatten()
            digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def largest_id(dataset: datasets.Dataset, column: str) -> int:
    """The largest token id in a column of an encoded data set; -1 in an empty one."""
    parts = (part.flatten().to_numpy(zero_copy_only=False) for part in column_parts(dataset, column))
    return max((int(ids.max(initial=-1)) for ids in parts), default=-1)


def encoding_summary(encoded: Encoded) -> str:
    """One line with the numbers of sequences, tokens, truncated and dropped examples."""
    return (
        f"{len(encoded.dataset):,} sequences, {num_tokens(encoded.dataset):,} tokens, "
        f"{encoded.num_truncated:,} examples truncated, {encoded.num_dropped:,} dropped"
    )


def in_parts(column: Sequence[Any]) -> Iterator[Any]:
    """The values of a column, which are loaded a part at a time."""
    for start in range(0, len(column), TEXTS_PER_CALL):
        yield from column[start : start + TEXTS_PER_CALL]


def sequence_lengths(encoded: datasets.Dataset) -> list[int]:
    """The number of tokens of each sequence of an encoded data set; of the longer one where an example has two. Its
    tokens are not loaded."""
    return [max(lengths) for lengths in zip(*_lengths(encoded), strict=True)]


def num_tokens(encoded: datasets.Dataset) -> int:
    """The number of tokens of all sequences of an encoded data set."""
    return sum(map(sum, _lengths(encoded)))


def _lengths(encoded: datasets.Dataset) -> list[list[int]]:
    """The lengths of the sequences in each column that holds some."""
    return [
        [length for part in column_parts(encoded, name) for length in part.value_lengths().to_pylist()]
        for name in ("input_ids", "other_ids")
        if name in encoded.column_names
    ]


def _encode_classification(split: datasets.Dataset, tokenizer: Any, max_length: int) -> Encoded:
    pairs = split["text_pair"] if "text_pair" in split.column_names else None
    columns, num_long = _truncate(tokenizer, split["text"], max_length, pairs)
    features = {**FEATURES, "labels": split.features["label"]}
    if pairs is not None and "token_type_ids" in columns:
        features["token_type_ids"] = datasets.List(datasets.Value("int8"))
    kept = {name: columns[name] for name in columns if name in features}
    return Encoded(token_dataset(kept, split["label"][:], features), num_truncated=num_long, num_dropped=0)


def _encode_tagged(split: datasets.Dataset, tokenizer: Any, max_length: int) -> Encoded:
    if not tokenizer.is_fast:
        raise UserError("model.task=token-classification needs a tokenizer with tokenizer.json (a fast one)")
    sequences, labels, num_truncated = TokenLists(), TokenLists(), 0
    for words, tags in zip(in_parts(split["tokens"]), in_parts(split["tags"]), strict=True):
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, verbose=False)
        owners = encoded.word_ids()
        first = [word is not None and word != before for word, before in zip(owners, [None, *owners], strict=False)]
        row = [tags[word] if begins else IGNORED for word, begins in zip(owners, first, strict=True)]
        num_truncated += sum(first) < len(words)
        if any(first):
            sequences.append(encoded["input_ids"])
            labels.append(row)
    if not sequences:
        raise UserError(
            f"None of {len(split)} examples has a word within data.max_length={max_length}; raise data.max_length"
        )
    dropped = len(split) - len(sequences)
    return Encoded(token_dataset({"input_ids": sequences}, labels, TOKEN_FEATURES), num_truncated - dropped, dropped)


def _encode_sequence_pairs(split: datasets.Dataset, tokenizer: Any, max_length: int) -> Encoded:
    """Source and target, each with the tokenizer's special tokens; a target ends with the end-of-sequence token."""
    eos = _end_of_sequence(tokenizer)
    sources, num_long = _truncate(tokenizer, split["source"], max_length)
    targets = TokenLists()
    for ids in _token_ids(tokenizer, split["target"], as_target=True):
        ids = _with_end(ids, eos)
        num_long += len(ids) > max_length
        targets.append(ids if len(ids) <= max_length else [*ids[: max_length - 1], eos])
    columns = {"input_ids": sources["input_ids"]}
    return Encoded(token_dataset(columns, targets, TOKEN_FEATURES), num_truncated=num_long, num_dropped=0)


def _encode_conversations(
    split: datasets.Dataset, tokenizer: Any, max_length: int, origins: Sequence[Origin] | None
) -> Encoded:
    conversations = split["messages"][:]
    tools = split["tools"][:] if "tools" in split.column_names else [None] * len(conversations)
    if tokenizer.chat_template is None:
        return _encode_without_template(conversations, tools, tokenizer, max_length, origins)
    sequences, labels, num_truncated, num_dropped, num_divided, longest = TokenLists(), TokenLists(), 0, 0, 0, 0
    fields = UnreadFields(tokenizer)
    for number, (conversation, offered) in enumerate(zip(conversations, tools, strict=True)):
        try:
            written = written_answers(conversation, tokenizer, offered)
            fields.look_at(conversation, offered)
        except UserError as error:
            raise in_row(error, origins, number) from None
        num_divided += len(written) > 1
        for text, spans in written:
            check_lengths([text], max_length)
            ids, learnt = learnt_tokens(text, spans, tokenizer)
            row = [token if counts else IGNORED for token, counts in zip(ids, learnt, strict=True)]
            answer = next((at for at, label in enumerate(row) if label != IGNORED), len(row))
            longest = max(longest, answer)
            if max(answer, 1) >= max_length:  # the first token of a sequence is never predicted
                num_dropped += 1
                continue
            num_truncated += len(ids) > max_length
            sequences.append(ids[:max_length])
            labels.append(row[:max_length])
    if not sequences:
        raise all_lost(num_dropped, max_length, longest)
    dataset = token_dataset({"input_ids": sequences}, labels, TOKEN_FEATURES)
    return Encoded(dataset, num_truncated, num_dropped, num_divided, unread=fields.unread(), written=fields.written())


def in_row(error: UserError, origins: Sequence[Origin] | None, index: int) -> UserError:
    """The error with the name of the example's row before it."""
    table, number = origins[index] if origins is not None else ("example", index + 1)
    place = f"{table}, row {number}" if origins is not None else f"Example {number}"
    text = str(error)
    return UserError(f"{place}: {text[:1].lower()}{text[1:]}")


def _encode_without_template(
    conversations: Sequence[list[Message]],
    tools: Sequence[list[dict] | None],
    tokenizer: Any,
    max_length: int,
    origins: Sequence[Origin] | None,
) -> Encoded:
    """Single questions as Alpaca instructions. Raises UserError for a longer conversation, which needs a template."""
    encoded = _encode_completions(*plain_questions(conversations, tools, tokenizer, origins), tokenizer, max_length)
    others = dict.fromkeys(key for turns in conversations for said in turns for key in said)
    return replace(encoded, unread=tuple(key for key in others if key not in CHECKED_ELSEWHERE))


def plain_questions(
    conversations: Sequence[list[Message]],
    tools: Sequence[list[dict] | None],
    tokenizer: Any,
    origins: Sequence[Origin] | None,
) -> tuple[list[str], list[str]]:
    """Questions and their answers as texts, for a tokenizer without a chat template. Raises UserError for a longer
    conversation, which needs one."""
    found = []
    for number, (turns, offered) in enumerate(zip(conversations, tools, strict=True)):
        try:
            found.append(plain_question(turns, offered, tokenizer))
        except UserError as error:
            raise in_row(error, origins, number) from None
    return [prompt for prompt, _ in found], [answer for _, answer in found]


def plain_question(turns: list[Message], tools: list[dict] | None, tokenizer: Any) -> tuple[str, str]:
    """As `plain_questions`, of one conversation."""
    is_plain = [(message["role"], "tool_calls" in message) for message in turns] == [
        ("user", False),
        ("assistant", False),
    ]
    if tools or not is_plain:
        raise UserError(needs_template(len(turns)))
    return asked_text(turns[:1], tokenizer), turns[1]["content"]


def _encode_running_text(split: datasets.Dataset, tokenizer: Any, max_length: int) -> Encoded:
    eos = _end_of_sequence(tokenizer)
    stream = array("i")
    for ids in _token_ids(tokenizer, split["text"]):
        stream.extend(_with_end(ids, eos))
    blocks = TokenLists()
    for start in range(0, len(stream), max_length):
        block = stream[start : start + max_length]
        if len(block) > 1:  # a single token predicts nothing
            blocks.append(block)
    if not len(blocks):
        raise UserError(f"{len(split)} text(s) have {len(stream)} token(s); language modelling needs at least two")
    return Encoded(token_dataset({"input_ids": blocks}, blocks, TOKEN_FEATURES), num_truncated=0, num_dropped=0)


def _encode_completions(prompts: Sequence[str], completions: Sequence[str], tokenizer: Any, max_length: int) -> Encoded:
    """Prompt and completion in one sequence, of which the loss counts the completion."""
    sequences, labels, longest_prompt, num_truncated = TokenLists(), TokenLists(), 0, 0
    for ids, num_prompt in completed_prompts(prompts, completions, tokenizer, max_length):
        longest_prompt = max(longest_prompt, num_prompt)
        if max(num_prompt, 1) >= max_length:  # the first token of a sequence is never predicted
            continue
        num_truncated += len(ids) > max_length
        sequences.append(ids[:max_length])
        labels.append([IGNORED] * num_prompt + ids[num_prompt:max_length])
    if not sequences:
        raise all_lost(len(prompts), max_length, longest_prompt)
    dataset = token_dataset({"input_ids": sequences}, labels, TOKEN_FEATURES)
    return Encoded(dataset, num_truncated, len(prompts) - len(sequences))


def completed_prompts(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Any, max_length: int, is_generated: bool = True
) -> Iterator[tuple[list[int], int]]:
    """The tokens of each prompt with its completion, tokenised as one text, as the model will read them, and the number
    of them that are the prompt's.

    The prompt ends where the tokens differ from those of the prompt alone. A token across the border therefore belongs
    to the answer. An end-of-sequence token ends them; with is_generated=False only where the tokenizer has one.
    """
    eos = _end_of_sequence(tokenizer) if is_generated else tokenizer.eos_token_id
    for column in (prompts, completions):
        check_lengths(in_parts(column), max_length)
    whole = _token_ids(tokenizer, [prompt + answer for prompt, answer in zip(prompts[:], completions[:], strict=True)])
    for prompt, ids in zip(_token_ids(tokenizer, prompts), whole, strict=True):
        ids = ids if eos is None else _with_end(ids, eos)
        yield ids, num_common(prompt, ids)


class NothingToLearnError(UserError):
    """No example has anything to learn within data.max_length."""

    num_examples: int
    longest_prompt: int


def all_lost(num_examples: int, max_length: int, longest_prompt: int) -> NothingToLearnError:
    error = NothingToLearnError(
        f"100 % of {num_examples} examples lose every answer token at data.max_length={max_length}; "
        f"the longest prompt has {longest_prompt} tokens. Raise data.max_length"
    )
    error.num_examples, error.longest_prompt = num_examples, longest_prompt
    return error


def _truncate(
    tokenizer: Any, texts: Sequence[str], max_length: int, pairs: Sequence[str] | None = None
) -> tuple[dict[str, TokenLists], int]:
    """The tokens of each text or pair, truncated by the tokenizer's own rule; and the number of truncated ones.

    `token_type_ids` are there when the tokenizer distinguishes the two texts.
    """
    columns: dict[str, TokenLists] = {"input_ids": TokenLists()}
    num_long = 0
    for start in range(0, len(texts), TEXTS_PER_CALL):
        here = list(texts[start : start + TEXTS_PER_CALL])
        beside = None if pairs is None else list(pairs[start : start + TEXTS_PER_CALL])
        for texts_here in (here, beside or []):
            check_lengths(texts_here, max_length)
        part = _tokenise_part(tokenizer, here, beside)
        long = [index for index, ids in enumerate(part["input_ids"]) if len(ids) > max_length]
        if long:
            again = None if beside is None else [beside[index] for index in long]
            texts_again = [here[index] for index in long]
            truncated = _tokenise_part(tokenizer, texts_again, again, truncation=True, max_length=max_length)
            for name, lists in truncated.items():
                for index, ids in zip(long, lists, strict=True):
                    part[name][index] = ids
        num_long += len(long)
        if pairs is None:
            part = {"input_ids": [single_ends(ids, tokenizer) for ids in part["input_ids"]]}
        for name, lists in part.items():
            columns.setdefault(name, TokenLists()).extend(lists)
    return columns, num_long


def check_lengths(texts: Iterable[str], max_length: int) -> None:
    """Raises UserError for a text of which hardly anything would be left at `max_length` tokens.

    A text is tokenised before it is cut: where to cut it first depends on the tokenizer.
    """
    longest = max(map(len, texts), default=0)
    if longest > MAX_CHARACTERS:
        raise UserError(
            f"A text has {longest:,} characters, of which data.max_length={max_length} keeps the first {max_length:,} "
            f"tokens; SGM reads texts of up to {MAX_CHARACTERS:,}, so cut it"
        )


def _token_ids(tokenizer: Any, texts: Sequence[str], as_target: bool = False) -> Iterator[list[int]]:
    """The token ids of each text, with the special tokens that the tokenizer adds: each once, also if a text has it."""
    for start in range(0, len(texts), TEXTS_PER_CALL):
        part = list(texts[start : start + TEXTS_PER_CALL])
        for ids in _tokenise_part(tokenizer, part, as_target=as_target)["input_ids"]:
            yield single_ends(ids, tokenizer)


def _tokenise_part(
    tokenizer: Any, texts: list[str], pairs: list[str] | None = None, as_target: bool = False, **options: Any
) -> dict[str, list[list[int]]]:
    """`input_ids` of each text or pair, and `token_type_ids` when the tokenizer distinguishes the two texts."""
    given: dict[str, Any] = {"text_target" if as_target else "text": texts}
    if pairs is not None:
        given["text_pair"] = pairs
    return dict(tokenizer(**given, return_attention_mask=False, verbose=False, **options))


def _end_of_sequence(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("This tokenizer has no end-of-sequence token, which a language model needs; set eos_token")
    return tokenizer.eos_token_id


def _with_end(ids: list[int], eos: int) -> list[int]:
    """`ids`, ending with the end-of-sequence token."""
    return ids if ids and ids[-1] == eos else [*ids, eos]


def token_dataset(
    columns: Mapping[str, TokenLists], labels: Sequence[Any] | TokenLists, features: Mapping[str, Any]
) -> datasets.Dataset:
    """The data set of token sequences, with a mask of ones. No number becomes a Python object on the way."""
    found: dict[str, Any] = {name: lists.arrow() for name, lists in columns.items()}
    found |= {"attention_mask": columns["input_ids"].mask()}
    found |= {"labels": labels.arrow() if isinstance(labels, TokenLists) else labels}
    schema = datasets.Features({name: features[name] for name in found}).arrow_schema
    arrays = [
        values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)
        for values, kind in zip(found.values(), schema.types, strict=True)
    ]
    return datasets.Dataset(InMemoryTable(pa.table(arrays, schema=schema)))
