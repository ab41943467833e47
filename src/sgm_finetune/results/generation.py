"""Answers that a model generates, and how near they come to those in the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sgm_finetune.base.config import DECODER_TASKS, Task
from sgm_finetune.data.batches import longest_first
from sgm_finetune.data.questions import Question, answer_limit
from sgm_finetune.results.sampling import GREEDY
from sgm_finetune.results.stops import Stops, model_stops


def generate_answers(
    model: Any,
    asked: Sequence[Question],
    tokenizer: Any,
    task: Task,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The model's greedy answer to each question, as long as the longest answer in the data and half as long again.

    An answer ends where the model's own end (`results/stops.py`).
    """
    prompts, limit = [question.prompt for question in asked], answer_limit(asked)
    stops = model_stops(model, tokenizer)
    return continue_prompts(model, prompts, tokenizer, task, stops, limit, batch_size, progress)


def continue_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    task: Task,
    stops: Stops,
    limit: int,
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> list[str]:
    """The text that follows each prompt (`continue_ids`), without what ends it, special tokens and white space around
    it."""
    found = continue_ids(model, prompts, tokenizer, task, stops, limit, batch_size, progress, **options)
    return [stops.text(ids, tokenizer) for ids in found]


def continue_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    task: Task,
    stops: Stops,
    limit: int,
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> list[list[int]]:
    """Generates the token ids that follow each prompt of token ids, up to what ends an answer or `limit` tokens.

    Decoding is greedy unless `options` of Transformers' `generate` say otherwise, and follows everything else in the
    model's `generation_config`. The longest prompts come first, `batch_size` at a time. The model's mode is restored.
    """
    device, is_decoder = next(model.parameters()).device, task in DECODER_TASKS
    order = longest_first([len(prompt) for prompt in prompts])
    answers: dict[int, list[int]] = {}
    if stops.texts:
        options |= {"stop_strings": list(stops.texts), "tokenizer": tokenizer}
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            ids, mask = _pad([prompts[i] for i in chosen], tokenizer.pad_token_id, left=is_decoder)
            with torch.no_grad(), _contiguous_reads(model.get_output_embeddings()):
                generated = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    **{**GREEDY, "use_cache": True, "max_new_tokens": limit, **options},
                    return_dict_in_generate=False,
                    eos_token_id=list(stops.tokens),
                    pad_token_id=tokenizer.pad_token_id,
                )
            start = ids.shape[1] if is_decoder else 1  # the prompt, or the token that starts a decoder
            for index, row in zip(chosen, generated[:, start:].tolist(), strict=True):
                answers[index] = stops.kept(row)
            progress(len(answers), len(order))
    finally:
        model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def _pad(rows: Sequence[Sequence[int]], pad_id: int | None, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of equal length, at least 1: an empty prompt becomes one masked token.

    The tokenizer's own `pad` makes no row of an empty prompt alone, no mask where the tokenizer's settings leave it
    out, and nothing at all without a padding token, even where no row needs one.
    """
    width = max(1, *(len(row) for row in rows))
    ids, mask = [], []
    for row in rows:
        padding, hidden, shown = [pad_id] * (width - len(row)), [0] * (width - len(row)), [1] * len(row)
        ids.append([*padding, *row] if left else [*row, *padding])
        mask.append([*hidden, *shown] if left else [*shown, *hidden])
    return torch.tensor(ids), torch.tensor(mask)


@contextmanager
def _contiguous_reads(head: nn.Module | None) -> Iterator[None]:
    """Makes what the output layer reads contiguous.

    Transformers gives it the last position of every prompt as a slice. Its product with the weights is then a batched
    one, for which a CPU copies the weights for every prompt: 57 MB each with SmolLM2.
    """
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, read: (read[0].contiguous(), *read[1:]))
    try:
        yield
    finally:
        hook.remove()


def answer_metrics(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns exact match (up to white space), ROUGE-L (F-measure, Lin 2004), BLEU (0 to 100, sacrebleu's corpus BLEU).

    >>> answer_metrics(["a b c d"], ["a  b c d"])
    {'exact_match': 1.0, 'rouge_l': 1.0, 'bleu': 100.0}
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = list(zip(answers, references, strict=True))
    rouge = [scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
    return {
        "exact_match": sum(a.split() == r.split() for a, r in pairs) / len(pairs),
        "rouge_l": sum(rouge) / len(pairs),
        "bleu": round(sacrebleu.corpus_bleu(list(answers), [list(references)]).score, 6),
    }
