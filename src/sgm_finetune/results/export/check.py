"""Checks that an export computes what was trained.

The check compares the export's logits, its answers to a few test prompts and its loss on validation data with those of
the unquantised base with the adapter. One model is in memory at a time: SGM keeps what the reference computed and frees
its model.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from sgm_finetune.base.device import device_for
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.memory import memory_within_reach, release_memory
from sgm_finetune.base.text import gib
from sgm_finetune.model.architecture import auto_class
from sgm_finetune.results.export.answer_check import (
    AnswerCheck,
    OwnAnswers,
    compare_answers,
    own_answers,
    plain_answers,
)
from sgm_finetune.results.export.validation import ScoreCheck, Scores, Validation, compare_scores, score
from sgm_finetune.results.load import Result, attach, load_unquantised, without_update
from sgm_finetune.train.losses import Progress

TOLERANCES = {
    "float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2, "q8_0": 5e-2, "q6_k": 0.1, "q5_k_m": 0.2, "q4_k_m": 0.35,
    "nf4": 0.35, "int4": 0.35,
}  # fmt: skip
"""Type of an export's matrices -> largest ‖z' − z‖/‖z‖ of its logits that passes."""
ARRIVED = (0.5, 1.5)
"""Smallest and largest share of the update's effect on the logits that passes. Applies where the effect is at least
`visible_effect`, because rounding hides a smaller one."""
TEXTS = (
    "The old mill by the river had been empty for 27 years when Anna first walked through its door.",
    "Water boils at a lower temperature on a mountain, because the air presses less on it there.",
)
_LENGTH = 24
"""Tokens of each sequence."""


@dataclass(frozen=True)
class LogitCheck:
    """How far the logits of an export, z', are from the reference's, z."""

    difference: float
    """‖z' − z‖/‖z‖"""
    largest: float
    """Largest |z' − z| of one logit."""
    top_agreement: float
    """Share of the positions at which both have the same largest logit."""
    effect: float
    """‖z − z₀‖/‖z‖, where z₀ are the base's logits: how far the update moves them."""
    arrived: float | None
    """(z' − z₀)·(z − z₀)/‖z − z₀‖²: the share of the update that the export holds. None: the update moves nothing."""
    tolerance: float
    num_positions: int
    computed_in: str
    """dtype of the reference's computation."""
    by: str
    """Program that loaded the export."""
    answers: AnswerCheck | None = None
    """None: the task has no answers, or the run kept no test prompts."""
    validation: ScoreCheck | None = None
    """None: the run's validation data could not be read."""

    @property
    def visible_effect(self) -> float:
        """The smallest effect of an update that rounding does not hide: a quarter of the tolerance, and all of it for
        types of fewer than 8 bits, whose errors add up in one direction."""
        return self.tolerance if self.tolerance > TOLERANCES["q8_0"] else self.tolerance / 4

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def passes(self) -> bool:
        """Returns whether the logits are those of what was trained (`TOLERANCES`, `ARRIVED`)."""
        if not self.difference <= self.tolerance:  # so written because NaN must fail, too
            return False
        visible = self.arrived is not None and self.effect >= self.visible_effect
        return not visible or ARRIVED[0] <= self.arrived <= ARRIVED[1]  # type: ignore[operator]


@dataclass(frozen=True)
class ReferenceLogits:
    """Logits that an export is compared with."""

    ids: Tensor
    """(sequences, length) token ids."""
    trained: Tensor
    """z: logits of the base with the adapter, float32."""
    base: Tensor
    """z₀: logits of the base alone, float32."""
    computed_in: str
    own: OwnAnswers | None = None
    """The answers of the base with the adapter."""
    validation: Validation | None = None
    """The examples on which exports are scored; None: the run's data could not be read."""
    scores: Scores | None = None
    """What the base with the adapter reaches on them."""


@dataclass(frozen=True)
class Computed:
    """What the program that an export is for computed from it."""

    logits: Tensor
    """Of `ReferenceLogits.ids`, in float32."""
    answers: Sequence[Sequence[int]] | None
    """To the prompts of `ReferenceLogits.own`, as token ids."""
    scores: Scores | None
    """On `ReferenceLogits.validation`."""
    by: str
    """The program."""


def silent(done: int, total: int) -> None:
    """Shows no progress."""


def compute_reference(
    result: Result,
    num_parameters: int,
    validation: Validation | None = None,
    progress: Progress = silent,
    scores: Scores | None = None,
) -> ReferenceLogits:
    """Returns the logits of the unquantised base with and without the adapter, and the answers and the scores on
    `validation` with it; `scores` are these if they are known.

    Computes in float32 if that fits into memory, else in bfloat16. Raises UserError if neither fits.
    """
    dtype = _computing_dtype(num_parameters)
    ids = sample_ids(result)
    model, former = attach(load_unquantised(result, dtype), result.content, result.path)
    trained = compute_logits(model, ids)
    own = own_answers(result, model)
    if validation is not None and scores is None:
        scores = score(model, validation, progress)
    with without_update(model, former):
        base = compute_logits(model, ids)
    del model, former
    free_models()
    return ReferenceLogits(ids, trained, base, dtype, own, validation, scores)


def reference_scores(
    result: Result, num_parameters: int, validation: Validation, progress: Progress = silent
) -> Scores:
    """Returns the scores of the unquantised base with the adapter on `validation`, as `compute_reference` does."""
    model = load_unquantised(result, _computing_dtype(num_parameters))
    model, _ = attach(model, result.content, result.path)
    scores = score(model, validation, progress)
    del model
    free_models()
    return scores


def _computing_dtype(num_parameters: int) -> str:
    reach = memory_within_reach()
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        if num_parameters * size < 0.9 * reach:
            return dtype
    raise UserError(
        f"Checking the export needs {gib(num_parameters * 2)} for the model, and {gib(reach)} are available; export on "
        "a machine with more memory"
    )


def sample_ids(result: Result) -> Tensor:
    """Returns (3, 24) token ids: two texts, and a row drawn from the whole vocabulary without its special tokens."""
    tokenizer = result.tokenizer
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(len(tokenizer)) if i not in special]
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] or plain[:1]
        rows.append((list(ids) * _LENGTH)[:_LENGTH])  # type: ignore[arg-type]
    drawn = torch.randint(len(plain), (_LENGTH,), generator=torch.Generator().manual_seed(0))
    rows.append([plain[i] for i in drawn])
    return torch.tensor(rows)


@torch.no_grad()
def compute_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns float32 logits on the CPU: (sequences, length, vocabulary), or (sequences, classes) for a classifier."""
    device = next(model.parameters()).device
    batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = batch["input_ids"]
    return model.eval()(**batch).logits.float().cpu()


def compare_logits(found: Tensor, expected: ReferenceLogits, stored_in: str, by: str) -> LogitCheck:
    """Compares logits in float64. `stored_in` is the type of the export's matrices, a key of TOLERANCES."""
    z, z0 = expected.trained.double(), expected.base.double()
    found = found.double()
    size, moved = float(z.norm()), float((z - z0).norm())
    arrived = float(((found - z0) * (z - z0)).sum()) / moved**2 if moved else None
    return LogitCheck(
        difference=float((found - z).norm()) / size,
        largest=float((found - z).abs().max()),
        top_agreement=float((found.argmax(-1) == z.argmax(-1)).double().mean()),
        effect=moved / size,
        arrived=arrived,
        tolerance=max(TOLERANCES[stored_in], TOLERANCES[expected.computed_in]),
        num_positions=z[..., 0].numel(),
        computed_in=expected.computed_in,
        by=by,
    )


def check_adapter(result: Result, folder: Path, expected: ReferenceLogits, progress: Progress = silent) -> LogitCheck:
    """Checks an adapter's folder, which PEFT loads on the base."""
    base = load_unquantised(result, expected.computed_in)
    model = PeftModel.from_pretrained(base, str(folder))
    settings = None if expected.own is None else GenerationConfig.from_pretrained(folder)
    found = computed_by(model, expected, "PEFT", settings, progress)
    del base, model
    free_models()
    return compare(result, found, expected, "float32")


def check_merged(
    result: Result, folder: Path, stored_in: str, expected: ReferenceLogits, progress: Progress = silent
) -> LogitCheck:
    """Checks a merged model's folder, which Transformers loads. Raises UserError when a parameter is missing."""
    model, outcome = auto_class(result.config.model.task).from_pretrained(
        folder,
        dtype=getattr(torch, expected.computed_in),
        device_map={"": device_for()},
        trust_remote_code=result.config.model.trust_remote_code,
        output_loading_info=True,
    )
    missing = [*outcome["missing_keys"], *(key for key, *_ in outcome["mismatched_keys"])]
    if missing:
        raise UserError(f"The merged model lacks `{missing[0]}`; nothing was kept. Take --to adapter")
    if stored_in == "nf4" and model.device.type == "cpu":
        dtype = getattr(torch, expected.computed_in)
        model.dequantize(dtype).to(dtype)  # once, not in each pass; Transformers loads the rest in its stored type
    found = computed_by(model, expected, "Transformers", None, progress)
    del model
    free_models()
    return compare(result, found, expected, stored_in)


def computed_by(
    model: PeftModel | PreTrainedModel,
    expected: ReferenceLogits,
    by: str,
    settings: GenerationConfig | None,
    progress: Progress,
) -> Computed:
    """Returns what a loaded export computes; it answers with the `settings`, or with the model's own."""
    return Computed(
        compute_logits(model, expected.ids),
        None if expected.own is None else plain_answers(model, expected.own, settings),
        None if expected.validation is None else score(model, expected.validation, progress),
        by,
    )


def compare(result: Result, found: Computed, expected: ReferenceLogits, stored_in: str) -> LogitCheck:
    """Compares an export with the reference. `stored_in` is the type of its matrices, a key of TOLERANCES."""
    check = compare_logits(found.logits, expected, stored_in, found.by)
    if found.answers is not None and expected.own is not None:
        check = replace(check, answers=compare_answers(found.answers, expected.own, result.tokenizer))
    if found.scores is not None and expected.scores is not None and expected.validation is not None:
        types, available = (stored_in, expected.computed_in), expected.validation.num_available
        check = replace(check, validation=compare_scores(found.scores, expected.scores, types, available))
    return check


def free_models() -> None:
    """Frees the memory of deleted models, which reference cycles still hold."""
    gc.collect()
    release_memory()
