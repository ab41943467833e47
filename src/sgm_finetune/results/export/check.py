"""Whether an export computes what was trained: its logits beside those of the unquantised base with the adapter.

One model is in memory at a time: the reference's logits are kept, the model is not.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sgm_finetune.base.device import device_for
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.memory import memory_within_reach, release_memory
from sgm_finetune.model.architecture import auto_class
from sgm_finetune.results.load import Result, attach_adapter, load_unquantised

TOLERANCES = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2, "q8_0": 5e-2}
"""Largest ‖z' − z‖/‖z‖ of the logits that an export may have which stores its matrices in this type."""
ARRIVED = (0.5, 1.5)
"""Of the update's own effect on the logits, the share that has to be there; asked for where the effect is at least a
quarter of the tolerance, for rounding hides a smaller one."""
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
"""What a tokenizer is compared on, besides `_TEXTS`."""
_LENGTH = 24


@dataclass(frozen=True)
class Comparison:
    """Of an export's logits with the reference's."""

    difference: float
    """‖z' − z‖/‖z‖"""
    largest: float
    """Largest |z' − z| of one logit."""
    top_agreement: float
    """Share of the positions whose largest logit is the same one."""
    effect: float
    """‖z − z₀‖/‖z‖, z₀ the base's logits: how far the update moves them."""
    arrived: float | None
    """(z' − z₀)·(z − z₀)/‖z − z₀‖²: the share of the update that is in the export. None: it moves nothing."""
    tolerance: float
    num_positions: int
    computed_in: str
    by: str
    """What loaded the export."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def passed(self) -> bool:
        if not self.difference <= self.tolerance:  # also where it is no number
            return False
        visible = self.arrived is not None and self.effect >= self.tolerance / 4
        return not visible or ARRIVED[0] <= self.arrived <= ARRIVED[1]  # type: ignore[operator]


@dataclass(frozen=True)
class Reference:
    """What an export is compared with."""

    ids: Tensor
    """(sequences, length) token ids."""
    trained: Tensor
    """z: logits of the base with the adapter, float32."""
    base: Tensor
    """z₀: without it."""
    computed_in: str


def reference(result: Result, num_parameters: int) -> Reference:
    """Computed in float32 where that fits into memory, else in bfloat16. Raises UserError where neither does."""
    dtype = _computing_dtype(num_parameters)
    ids = check_ids(result)
    model = attach_adapter(load_unquantised(result, dtype), result.content, result.path)
    trained = logits(model, ids)
    with model.disable_adapter():
        base = logits(model, ids)
    del model
    free_models()
    return Reference(ids, trained, base, dtype)


def _computing_dtype(num_parameters: int) -> str:
    reach = memory_within_reach()
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        if num_parameters * size < 0.9 * reach:
            return dtype
    raise UserError(
        f"Comparing the export needs {num_parameters * 2 / 2**30:.1f} GiB for the model, and {reach / 2**30:.1f} GiB "
        "are within reach; export on a machine with more memory"
    )


def check_ids(result: Result) -> Tensor:
    """Two sequences of text, and one of tokens drawn from the whole vocabulary."""
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
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Float32 on the CPU: (sequences, length, vocabulary), of a classifier (sequences, classes)."""
    device = next(model.parameters()).device
    batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = batch["input_ids"]
    return model.eval()(**batch).logits.float().cpu()


def compare(found: Tensor, expected: Reference, stored_in: str, by: str) -> Comparison:
    """`stored_in`: the type of the export's matrices, a key of TOLERANCES."""
    z, z0 = expected.trained.double(), expected.base.double()
    found = found.double()
    size, moved = float(z.norm()), float((z - z0).norm())
    arrived = float(((found - z0) * (z - z0)).sum()) / moved**2 if moved else None
    return Comparison(
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


def check_adapter(result: Result, folder: Path, expected: Reference) -> Comparison:
    """The folder, loaded by PEFT on the base."""
    base = load_unquantised(result, expected.computed_in)
    model = PeftModel.from_pretrained(base, str(folder))
    found = logits(model, expected.ids)
    del base, model
    free_models()
    return compare(found, expected, "float32", "PEFT")


def check_merged(result: Result, folder: Path, expected: Reference, stored_in: str) -> Comparison:
    """The folder, loaded by Transformers alone; nothing may be missing from it."""
    model, outcome = auto_class(result.config.model.task).from_pretrained(
        folder,
        dtype=getattr(torch, expected.computed_in),
        device_map={"": device_for()},
        trust_remote_code=result.config.model.trust_remote_code,
        output_loading_info=True,
    )
    missing = [*outcome["missing_keys"], *(key for key, *_ in outcome["mismatched_keys"])]
    if missing:
        raise UserError(f"The merged model lacks `{missing[0]}`, so it was not kept; take --to adapter")
    found = logits(model, expected.ids)
    del model
    free_models()
    return compare(found, expected, stored_in, "Transformers")


def check_gguf(result: Result, file: Path, expected: Reference, stored_in: str) -> Comparison:
    """The file, loaded by llama.cpp, whose tokens have to be the tokenizer's too; without it by Transformers."""
    if importlib.util.find_spec("llama_cpp") is None:
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, device_map={"": device_for()}
        )
        found = logits(model, expected.ids)
        del model
        free_models()
        return compare(found, expected, stored_in, "Transformers")
    found = _llama_cpp_logits(result, file, expected.ids)
    return compare(found, expected, stored_in, "llama.cpp")


def _llama_cpp_logits(result: Result, file: Path, ids: Tensor) -> Tensor:
    """In a process of its own, after its tokens have been compared."""
    chat = chat_text(result)
    texts = [*_TEXTS, *_TOKENS, *([chat] if chat else [])]
    with tempfile.TemporaryDirectory() as folder:
        asked, results = Path(folder) / "asked.json", Path(folder) / "results.npz"
        asked.write_text(json.dumps({"model": str(file), "ids": ids.tolist(), "texts": texts}), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).with_name("llama_cpp_logits.py")), str(asked), str(results)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise UserError(f"llama.cpp could not be asked about the GGUF file, which was not kept: {reason}")
        with np.load(results) as found:
            for at, text in enumerate(texts):
                check_tokens(result, text, [found[f"{at}.0"].tolist(), found[f"{at}.1"].tolist()])
            return torch.from_numpy(found["logits"])


def check_tokens(result: Result, text: str, found: Sequence[list[int]]) -> None:
    """Raises UserError unless llama.cpp cuts the text into the tokens that the tokenizer does: without, and with those
    around it."""
    for around, tokens in enumerate(found):
        expected = list(result.tokenizer(text, add_special_tokens=bool(around))["input_ids"])  # type: ignore[arg-type]
        if tokens != expected:
            raise UserError(
                f"llama.cpp cuts {text!r} into the tokens {tokens[:8]}, the tokenizer into {expected[:8]}; this "
                "tokenizer cannot be brought to GGUF here, take --to merged"
            )


def chat_text(result: Result) -> str | None:
    """A conversation as the tokenizer's chat template writes it; None where there is no template."""
    if not result.tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "Where is 東京?"}, {"role": "assistant", "content": "In Japan."}]
    text = str(result.tokenizer.apply_chat_template(messages, tokenize=False))
    bos = str(result.tokenizer.bos_token or "")
    return text.removeprefix(bos) if _adds_bos(result) else text


def _adds_bos(result: Result) -> bool:
    ids: Sequence[int] = result.tokenizer("a")["input_ids"]  # type: ignore[assignment]
    return bool(ids) and ids[0] == result.tokenizer.bos_token_id


def free_models() -> None:
    """What a model that is no longer named still holds in cycles."""
    gc.collect()
    release_memory()
