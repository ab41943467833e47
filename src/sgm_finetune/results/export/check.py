"""Checks that an export computes what was trained.

The check compares the export's logits, and its answers to a few test prompts, with those of the unquantised base with
the adapter. One model is in memory at a time: SGM keeps what the reference computed and frees its model.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from sgm_finetune.base.device import device_for
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.memory import memory_within_reach, release_memory
from sgm_finetune.base.text import gib
from sgm_finetune.data.template_trial import try_template
from sgm_finetune.model.architecture import auto_class
from sgm_finetune.results.evaluation import evaluate_model
from sgm_finetune.results.export.answer_check import (
    AnswerCheck,
    OwnAnswers,
    compare_answers,
    own_answers,
    plain_answers,
)
from sgm_finetune.results.export.llama_process import run_apart
from sgm_finetune.results.load import Result, attach, load_unquantised, without_update
from sgm_finetune.train.fast.head_loss import find_head_loss
from sgm_finetune.train.losses import Progress, TestSet

TOLERANCES = {
    "float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2, "q8_0": 5e-2, "q6_k": 0.1, "q5_k_m": 0.2, "q4_k_m": 0.35,
}  # fmt: skip
"""Type of an export's matrices -> largest ‖z' − z‖/‖z‖ of its logits that passes."""
ARRIVED = (0.5, 1.5)
"""Smallest and largest share of the update's effect on the logits that passes. Applies where the effect is at least
`visible_effect`, because rounding hides a smaller one."""
_TEXTS = (
    "The old mill by the river had been empty for 27 years when Anna first walked through its door.",
    "Water boils at a lower temperature on a mountain, because the air presses less on it there.",
)
_TOKENS = (
    "It's 1,234.5 km",
    "  two  spaces\n\n\tand a tab",
    "Où est l'œuvre? 東京 🙂",
    "def f(x):\n    return x**2",
    "HTTP2023",
)
"""Texts on which tokenizers are compared, besides `_TEXTS`."""
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

    @property
    def visible_effect(self) -> float:
        """The smallest effect of an update that rounding does not hide: a quarter of the tolerance, and all of it for
        types of fewer than 8 bits, whose errors add up in one direction."""
        return self.tolerance if self.tolerance > TOLERANCES["q8_0"] else self.tolerance / 4

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def passes(self) -> bool:
        """Returns whether the export computes what was trained (`TOLERANCES`, `ARRIVED`)."""
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
    validation_loss: float | None = None
    """The loss of the base with the adapter; None: it was not asked for."""


def compute_reference(
    result: Result,
    num_parameters: int,
    validation: TestSet | None = None,
    progress: Progress = lambda done, total: None,
) -> ReferenceLogits:
    """Returns the logits of the unquantised base with and without the adapter, and the answers and the loss on
    `validation` with it.

    Computes in float32 if that fits into memory, else in bfloat16. Raises UserError if neither fits.
    """
    dtype = _computing_dtype(num_parameters)
    ids = sample_ids(result)
    model, former = attach(load_unquantised(result, dtype), result.content, result.path)
    trained = compute_logits(model, ids)
    own = own_answers(result, model)
    loss = None if validation is None else _mean_loss(model, validation, progress)
    with without_update(model, former):
        base = compute_logits(model, ids)
    del model, former
    free_models()
    return ReferenceLogits(ids, trained, base, dtype, own, loss)


def reference_loss(
    result: Result, num_parameters: int, validation: TestSet, progress: Progress = lambda done, total: None
) -> float:
    """Returns the loss of the unquantised base with the adapter on `validation`, as `compute_reference` does."""
    model = load_unquantised(result, _computing_dtype(num_parameters))
    model, _ = attach(model, result.content, result.path)
    loss = _mean_loss(model, validation, progress)
    del model
    free_models()
    return loss


def _mean_loss(model: PeftModel | PreTrainedModel, examples: TestSet, progress: Progress) -> float:
    """The mean loss in nats. A language model's comes in parts where that is possible, without all of its logits."""
    head_loss = None
    if examples.task == "causal-lm":
        ids = torch.tensor([examples.encoded[0]["input_ids"]], device=model.device)
        head_loss = find_head_loss(model, {"input_ids": ids})
    return evaluate_model(model, replace(examples, head_loss=head_loss), progress).metrics["loss"]


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
    for text in _TEXTS:
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


def check_adapter(result: Result, folder: Path, expected: ReferenceLogits) -> LogitCheck:
    """Checks an adapter's folder, which PEFT loads on the base."""
    base = load_unquantised(result, expected.computed_in)
    model = PeftModel.from_pretrained(base, str(folder))
    found = compute_logits(model, expected.ids)
    answers = None
    if expected.own is not None:
        answers = plain_answers(model, expected.own, GenerationConfig.from_pretrained(folder))
    del base, model
    free_models()
    return _with_answers(result, compare_logits(found, expected, "float32", "PEFT"), answers, expected)


def check_merged(result: Result, folder: Path, expected: ReferenceLogits, stored_in: str) -> LogitCheck:
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
    found = compute_logits(model, expected.ids)
    answers = None if expected.own is None else plain_answers(model, expected.own)
    del model
    free_models()
    return _with_answers(result, compare_logits(found, expected, stored_in, "Transformers"), answers, expected)


def check_gguf(result: Result, file: Path, expected: ReferenceLogits, stored_in: str) -> LogitCheck:
    """Checks a GGUF file, which llama.cpp loads, or Transformers where llama-cpp-python is not installed.

    llama.cpp must also split texts into the tokens that the tokenizer does; else this raises UserError.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, device_map={"": device_for()}
        )
        found = compute_logits(model, expected.ids)
        # Transformers reads the first of the file's ends alone, and llama.cpp all of them
        held = GenerationConfig(eos_token_id=_ends_in(file), pad_token_id=result.tokenizer.pad_token_id)
        answers = None if expected.own is None else plain_answers(model, expected.own, held)
        del model
        free_models()
        return _with_answers(result, compare_logits(found, expected, stored_in, "Transformers"), answers, expected)
    found, answers = _ask_llama_cpp(result, file, expected)
    return _with_answers(result, compare_logits(found, expected, stored_in, "llama.cpp"), answers, expected)


def _ends_in(file: Path) -> list[int]:
    """The ids of the tokens at which llama.cpp stops, as the GGUF file names them."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = (reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return [int(field.contents()) for field in fields if field is not None]


def _with_answers(
    result: Result, check: LogitCheck, answers: Sequence[Sequence[int]] | None, expected: ReferenceLogits
) -> LogitCheck:
    if answers is None or expected.own is None:
        return check
    return replace(check, answers=compare_answers(answers, expected.own, result.tokenizer))


def _ask_llama_cpp(result: Result, file: Path, expected: ReferenceLogits) -> tuple[Tensor, list[list[int]] | None]:
    """Runs llama.cpp in a process of its own, compares its tokens with the tokenizer's, and returns its logits and
    answers."""
    own = expected.own
    asked = {} if own is None else {"prompts": own.prompts, "max_new_tokens": own.limit}
    chat = chat_text(result)
    texts = [*_TEXTS, *_TOKENS, *([chat] if chat else [])]
    with tempfile.TemporaryDirectory() as folder:
        request, results = Path(folder) / "request.json", Path(folder) / "results.npz"
        content = {"model": str(file), "ids": expected.ids.tolist(), "texts": texts, **asked}
        request.write_text(json.dumps(content), encoding="utf-8")
        program = str(Path(__file__).with_name("ask_llama_cpp.py"))
        if (reason := run_apart(program, str(request), str(results))) is not None:
            raise UserError(f"llama.cpp failed on the GGUF file: {reason}; nothing was kept. Take --to merged")
        with np.load(results) as found:
            for number, text in enumerate(texts):
                check_tokens(result, text, [found[f"{number}.0"].tolist(), found[f"{number}.1"].tolist()])
            answers = None if own is None else [found[f"answer.{n}"].tolist() for n in range(len(own.prompts))]
            return torch.from_numpy(found["logits"]), answers


def check_tokens(result: Result, text: str, found: Sequence[list[int]]) -> None:
    """Raises UserError unless llama.cpp splits the text into the same tokens as the tokenizer does.

    `found` holds llama.cpp's tokens without and with special tokens around the text, in this order.
    """
    for add_special, tokens in zip((False, True), found, strict=True):
        expected = list(result.tokenizer(text, add_special_tokens=add_special)["input_ids"])  # type: ignore[arg-type]
        if tokens != expected:
            raise UserError(
                f"llama.cpp splits {text!r} into the tokens {tokens[:8]}, and the tokenizer into {expected[:8]}, so "
                "SGM cannot write this tokenizer as GGUF; take --to merged"
            )


def chat_text(result: Result) -> str | None:
    """Returns a conversation as the tokenizer's chat template writes it; None if there is no template."""
    if not result.tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "Where is 東京?"}, {"role": "assistant", "content": "In Japan."}]
    try_template(result.tokenizer)
    text = str(result.tokenizer.apply_chat_template(messages, tokenize=False))
    bos = str(result.tokenizer.bos_token or "")
    return text.removeprefix(bos) if _adds_bos(result) else text


def _adds_bos(result: Result) -> bool:
    ids: Sequence[int] = result.tokenizer("a")["input_ids"]  # type: ignore[assignment]
    return bool(ids) and ids[0] == result.tokenizer.bos_token_id


def free_models() -> None:
    """Frees the memory of deleted models, which reference cycles still hold."""
    gc.collect()
    release_memory()
