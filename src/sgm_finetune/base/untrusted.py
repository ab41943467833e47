"""Files that come from others, read within bounds (docs/untrusted.md). A leaf.

`ValueError`s here are one line that says what is wrong with the content; who reads a file knows what it should have
been and makes a UserError of it.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn

import yaml

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line

MAX_JSON = 64 * 2**20
"""Bytes of a JSON document of ours or of a model's: a plan of a thousand matrices has one."""
MAX_YAML = 2**20
MAX_DEPTH = 60
MAX_VALUES = 10_000_000
"""Of a document, each counted as often as it is referred to."""
MAX_LAYERS = 10_000


def read_json(path: Path, infinite: bool = False, limit: int = MAX_JSON) -> Any:
    """The document in a file. Raises OSError, and ValueError as `parse_json`, and for more than `limit` bytes."""
    return parse_json(_bounded_text(path, limit), infinite)


def read_json_object(path: Path) -> dict[str, Any]:
    """As `read_json`; ValueError for anything but an object, too."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


def require_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model or a run. Raises UserError."""
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        refuse(path, "JSON", error)


def parse_json(text: str, infinite: bool = False) -> Any:
    """JSON as its standard has it: a key once, no NaN, integers of 64 bits, at most 60 levels. infinite: Python's
    `Infinity`, which published scans have, is a number. Raises ValueError."""

    def constant(name: str) -> float:
        if infinite and name != "NaN":
            return float(name)
        raise ValueError(f"{name} is no number")

    def real(digits: str) -> float:
        value = float(digits)
        if not infinite and math.isinf(value):
            raise ValueError(f"{digits[:40]} is too large a number")
        return value

    try:
        found = json.loads(
            text, parse_constant=constant, parse_float=real, parse_int=_integer, object_pairs_hook=_once_each
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_bounded(found)
    return found


def parse_yaml(text: str) -> Any:
    """Plain YAML values, no other types, aliases within bounds. Raises ValueError."""
    if len(text) > MAX_YAML:
        raise ValueError(f"it is longer than {MAX_YAML:,} characters")
    try:
        found = yaml.load(text, Loader=_OnceEach)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # the last three: a date that is none
        raise ValueError(" ".join(str(error).split())) from None
    check_bounded(found, limit=10_000)
    return found


class _OnceEach(yaml.SafeLoader):
    """A key that stands twice is a mistake: the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[:80]!r} is in it twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Raises OSError, and ValueError as `parse_yaml`."""
    return parse_yaml(_bounded_text(path, MAX_YAML))


def read_torch(path: Path, mmap: bool = False) -> Any:
    """What torch.save wrote: tensors and plain data, no code. Nothing is allocated that the file does not hold: members
    of its archive are stored and no larger than it, its pickle is gone through once with nothing behind its names, and
    no tensor is larger than its memory. Raises OSError, and ValueError for everything else."""
    import torch  # not before: a configuration is read without it

    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    try:
        if is_archive:
            _check_archive(path)
        else:
            with path.open("rb") as file:  # magic number, protocol, system, then the content
                for _ in range(4):
                    _Rehearsal(file, path.stat().st_size).load()
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive)
    except OSError:
        raise
    except MemoryError:
        raise ValueError("it asks for more memory than there is") from None
    except Exception as error:  # pickle and torch raise many types here, all meaning: not such a file
        raise ValueError(first_line(error)) from None
    check_bounded(content, leaf=_check_tensor)
    return content


def check_bounded(value: Any, limit: int = MAX_VALUES, leaf: Callable[[Any], None] = lambda value: None) -> None:
    """Raises ValueError unless nested plain data are within MAX_DEPTH levels and `limit` values, an alias counting as
    often as it is used. `leaf` is called with what is no container."""
    counted: dict[int, tuple[int, int]] = {}  # id -> (values, levels)

    def count(value: Any, depth: int) -> tuple[int, int]:
        if not isinstance(value, dict | list | tuple | set | frozenset):
            leaf(value)
            return 1, 0
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply, or holds itself")
        if id(value) not in counted:
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
            found = [count(part, depth + 1) for part in inner]
            counted[id(value)] = 1 + sum(size for size, _ in found), 1 + max((level for _, level in found), default=0)
        size, levels = counted[id(value)]
        if depth + levels > MAX_DEPTH:
            raise ValueError("it is nested too deeply, or holds itself")
        if size > limit:
            raise ValueError(f"it holds more than {limit:,} values")
        return size, levels

    count(value, 0)


def check_inside(name: Any) -> str:
    """`name`, where it names a file in the folder that it is looked for in. Raises ValueError."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0") or len(name) > 255:
        raise ValueError(f"{str(name)[:80]!r} is not the name of a file beside it")
    return name


def check_shards(folder: Path) -> None:
    """Raises UserError where an index of a model's weights names a file outside of `folder`. Links are followed, as the
    hub's cache is made of them."""
    for index in sorted(folder.glob("*.index.json")):
        shard_names(index)


def shard_names(index: Path) -> dict[str, str]:
    """Tensor -> file, of an index of a model's weights. Raises UserError."""
    try:
        document = read_json(index)
        if not isinstance(document, dict) or not isinstance(document.get("weight_map"), dict):
            raise ValueError("it has no weight_map")
        return {name: check_inside(shard) for name, shard in document["weight_map"].items()}
    except (OSError, ValueError) as error:
        raise UserError(f"{index} is damaged or cut short ({error}); copy or download it again") from None


def _bounded_text(path: Path, limit: int) -> str:
    with path.open("rb") as file:
        held = file.read(limit + 1)
    if len(held) > limit:
        raise ValueError(f"it is larger than {limit / 2**20:g} MiB")
    return held.decode("utf-8")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**64:
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is in it twice")
    return found


def _check_archive(path: Path) -> None:
    held = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its archive is compressed, which torch does not write")
        if sum(member.file_size for member in members) > held:
            raise ValueError("its archive claims more bytes than the file has")
        for member in members:
            if member.filename.endswith("/data.pkl"):
                with archive.open(member) as file:
                    _Rehearsal(file, held).load()


class _Rehearsal(pickle._Unpickler):  # the one in C makes room for what a file's numbers claim
    """Goes through a pickle of torch's with stand-ins for all that it names: nothing is imported, called or allocated.
    (`weights_only` does call some: a `bytearray` of ten billion bytes is made.) Raises whatever pickle does, and
    UnpicklingError for what is neither tensors nor plain data, or more bytes of tensors than the file has."""

    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: IO[bytes], held: int):
        super().__init__(file, encoding="utf-8")
        self.held = held
        self.storages: dict[str, int] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return _Mapping
        if module_name == "torch._utils" and global_name in _REBUILD:
            return _nothing
        if (module_name, global_name) == ("torch", "Size"):
            return tuple
        if module_name in ("torch", "torch.storage") and global_name.endswith("Storage"):
            return _Kind(_WIDTHS.get(global_name, 8))
        if module_name == "torch" and re.fullmatch(r"bool|b?float\w+|u?int\d+|complex\d+", global_name):
            return _Kind(8)
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}"[:100])

    def persistent_load(self, pid: Any) -> None:
        what, kind, key, _, count = pid[:5]
        if what != "storage" or not isinstance(kind, _Kind) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError("it holds something that is no tensor")
        self.storages[str(key)] = count * kind.width
        if sum(self.storages.values()) > self.held:
            raise pickle.UnpicklingError("its tensors claim more bytes than the file has")


class _Mapping(dict):
    """Takes the state that a model's OrderedDict has."""


@dataclass(frozen=True)
class _Kind:
    """Of numbers; bytes each."""

    width: int


def _nothing(*given: Any) -> None:
    return None


_REBUILD = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
_WIDTHS = {
    "UntypedStorage": 1, "ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "HalfStorage": 2, "BFloat16Storage": 2,
    "ShortStorage": 2, "IntStorage": 4, "FloatStorage": 4, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16,
}  # fmt: skip


def _check_tensor(tensor: Any) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        return
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"it holds a tensor that is {tensor.layout} on {tensor.device}, not plain numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of {tuple(tensor.shape)} claims more numbers than the file holds")


def refuse(path: Path | str, what: str, error: Exception) -> NoReturn:
    """Raises UserError: `path` is no usable `what`, and why."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    raise UserError(f"{path} is no usable {what}: {' '.join(str(reason).split())[:200]}") from None
