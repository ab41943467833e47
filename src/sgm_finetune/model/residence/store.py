"""The store: a base model's blocks on disk, in the type or the 4 bits that compute, made once while the model loads.

`loading_from_disk` puts views of files in the place of the tensors that Transformers loads: of the store's, or of the
model's own files where they hold what the kernels read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import set_param_for_module

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import checksum, disk_free, write_text, writing
from sgm_finetune.base.text import gib
from sgm_finetune.model.folder import cache_dir
from sgm_finetune.model.names import block_of, stored_to_model_names
from sgm_finetune.model.residence.part_file import map_part, write_part
from sgm_finetune.model.residence.parts import Convert, add_account, divide, loaded, loading_by_parts
from sgm_finetune.model.residence.sizes import num_bytes
from sgm_finetune.model.residence.window import are_mapped, slide_over
from sgm_finetune.model.weights.stored import weight_files

_VERSION = 1
"""Raise it when the same model would get other files."""
_REMEDY = "; free some space, choose another place with SGM_CACHE, or set model.residence=device"


@dataclass
class Store:
    """The files of one model in one type, and what has been mapped of them."""

    folder: Path
    key: str
    """The fingerprint of all that the files depend on."""
    announce: Callable[[str], None]
    """Called with a line before the first file is written."""
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    """Part -> its mapped tensors. A part is a block, an embedding or the output layer, and has the module's name."""
    has_announced: bool = False

    def path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


def open_store(folder: Path, described: str, announce: Callable[[str], None]) -> Store:
    """The store of the model in `folder`, in SGM's cache. `described` is how it computes: its class, type and bits."""
    files = [*sorted(weight_files(folder)), folder / "config.json"]
    versions = [f"{library} {version(library)}" for library in ("transformers", "bitsandbytes")]
    parts = [str(_VERSION), described, *versions, *(f"{file.name} {_fingerprint(file)}" for file in files)]
    key = xxhash.xxh3_128("\n".join(parts).encode()).hexdigest()
    return Store(cache_dir() / "bases" / key, key, announce)


def _fingerprint(file: Path) -> str:
    """The checksum of a file's content. It is kept, and computed again when the file's size or times change."""
    real = file.resolve()
    found = real.stat()
    state = [str(real), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    kept = cache_dir() / "checksums" / xxhash.xxh3_128(json.dumps(state).encode()).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="ascii")
    fresh = checksum(real)
    with suppress(UserError):  # a cache that cannot be written is said where the store is
        write_text(kept, fresh)
    return fresh


@contextmanager
def loading_from_disk(store: Store) -> Iterator[None]:
    """Makes Transformers' `from_pretrained` leave blocks, embeddings and output layer on disk, inside the context.

    Writes what the store lacks. Raises UserError when it cannot be written, or is damaged.
    """
    with loading_by_parts(partial(_load, store)):
        yield


def keep_on_disk(model: PreTrainedModel, store: Store) -> None:
    """Keeps one block of a model that was loaded inside `loading_from_disk` in memory at a time."""
    blocks = {part: tensors for part, tensors in store.parts.items() if block_of(part) is not None}
    slide_over(model, blocks, [t for part, tensors in store.parts.items() if part not in blocks for t in tensors])


def _load(
    store: Store, convert: Convert, model: PreTrainedModel, state_dict: Mapping[str, Any], load_config: Any
) -> tuple[Any, Any]:
    """Loads part by part what `convert` loads at once."""
    parts, rest = divide(model, state_dict)
    name_of = stored_to_model_names(model)
    info, index = convert(model=model, state_dict=rest, load_config=load_config, disk_offload_index=None)
    for part, tensors in parts.items():
        if not store.path(part).is_file():
            modules = model.get_submodule(part).modules()
            before = [(module, dict(module.named_parameters(recurse=False))) for module in modules]
            found, _ = convert(model=model, state_dict=tensors, load_config=load_config)
            add_account(info, found)
            made = loaded(model, part)
            if found.mismatched_keys or found.conversion_errors:  # the caller says what is wrong
                continue
            if are_mapped(made.values()):  # the model's own files hold what the kernels read
                store.parts[part] = list(made.values())
                continue
            _empty(before)
            _announce(store, {left: num_bytes(model, {*map(name_of, parts[left])}) for left in parts})
            _write(store, part, made)
            del made
        store.parts[part] = _put(model, map_part(store.path(part), store.key), info, load_config.hf_quantizer)
    return info, index


def _empty(before: list[tuple[nn.Module, dict[str, nn.Parameter]]]) -> None:
    """Gives modules back the parameters without numbers that they had before a part was converted."""
    for module, parameters in before:
        for name, parameter in parameters.items():
            setattr(module, name, parameter)
        if hasattr(module, "quant_state"):
            module.quant_state = None  # type: ignore[assignment]


def _put(model: PreTrainedModel, mapped: dict[str, Tensor], info: Any, quantizer: Any) -> list[Tensor]:
    """Makes mapped tensors the parameters of `model`; returns them."""
    scales: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in mapped if ".weight." in name]:
        weight, _, what = name.partition(".weight.")
        scales.setdefault(f"{weight}.weight", {})[what] = mapped.pop(name)
    for name, tensor in mapped.items():
        value = _four_bit(model, name, tensor, scales[name]) if name in scales else tensor
        set_param_for_module(model, name, value, info, quantizer)
    return [*mapped.values(), *(tensor for those in scales.values() for tensor in those.values())]


def _four_bit(model: nn.Module, name: str, packed: Tensor, scales: dict[str, Tensor]) -> nn.Parameter:
    from bitsandbytes.nn.modules import Params4bit

    module: Any = model.get_submodule(name.rpartition(".")[0])
    return Params4bit.from_prequantized(packed, dict(scales), device="cpu", module=module)


def _announce(store: Store, sizes: Mapping[str, int]) -> None:
    """Says once what is written and where: `sizes` are the bytes of all parts. Raises UserError if the disk has no room
    for those that are to come."""
    if store.has_announced:
        return
    store.has_announced = True
    missing = sum(size for part, size in sizes.items() if part not in store.parts and not store.path(part).is_file())
    free = disk_free(store.folder)
    if missing > free:
        raise UserError(f"The base's blocks take {gib(missing)} in {store.folder}, which has {gib(free)} free{_REMEDY}")
    store.announce(
        f"writes the base's blocks as they compute, {gib(missing)}, to {store.folder} (once; delete the folder to "
        "free the space)"
    )


def _write(store: Store, part: str, made: Mapping[str, Tensor]) -> None:
    """Writes a part, unless another process has done so meanwhile. Raises UserError when that is impossible."""
    try:
        with writing(store.folder):
            store.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(store.folder / ".lock"):
                if not store.path(part).is_file():
                    write_part(store.path(part), made, store.key)
    except UserError as error:
        raise UserError(f"{error}{_REMEDY}") from None
