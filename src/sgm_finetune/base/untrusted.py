"""Reads files from untrusted sources within bounds (docs/untrusted.md).

A `ValueError` from here is one line about the content. The caller knows what the file should be and raises a UserError.
The steps: `parse_json` checks a text, `read_json` a file, `read_json_object` also that the document is an object;
`require_json_object` raises UserError instead.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn

import yaml

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line, mib, one_line

MAX_JSON = 64 * 2**20
"""Maximum bytes of a JSON document. The plan of a thousand matrices has 1 MiB."""
MAX_YAML = 2**17
"""Maximum characters of a YAML text. YAML takes ten times as long as JSON; a configuration has 5 KiB."""
MAX_MERGED = 1_000
"""Maximum number of keys that one mapping of a YAML text takes from others (`<<`)."""
MAX_DEPTH = 60
MAX_VALUES = 10_000_000
"""Maximum number of values in a document. A value counts as often as the document refers to it."""
MAX_LAYERS = 10_000


def read_json(path: Path, infinite: bool = False, limit: int = MAX_JSON) -> Any:
    """The JSON document in a file. Raises OSError, and ValueError as `parse_json` or when it exceeds `limit` bytes."""
    return parse_json(_bounded_text(path, limit), infinite)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises as `read_json`, and ValueError when the document is not an object."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


def require_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model or a run. Raises UserError when there is none."""
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        refuse(path, "JSON file", error)


def parse_json(text: str, infinite: bool = False) -> Any:
    """The document in a text of standard JSON: unique keys, no NaN, 64-bit integers, at most MAX_DEPTH levels.

    infinite=True accepts Python's `Infinity`, which published scans contain. Raises ValueError for anything else.
    """

    def constant(name: str) -> float:
        if infinite and name != "NaN":
            return float(name)
        raise ValueError(f"{name} is not a number in JSON")

    def real(digits: str) -> float:
        value = float(digits)
        if not infinite and math.isinf(value):
            raise ValueError(f"{digits[:40]} is too large a number")
        return value

    try:
        found = json.loads(
            text, parse_constant=constant, parse_float=real, parse_int=_integer, object_pairs_hook=_unique_keys
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_bounded(found)
    return found


class Written(str):
    """A YAML scalar without quotes, as it was written: the type of its key says what it means.

    YAML 1.1 would read 1:30 as 90, 010 as 8, no as false and 2024-01-01 as a date.
    """

    @property
    def is_null(self) -> bool:
        return self in ("", "~", "null", "Null", "NULL")


def parse_yaml(text: str) -> Any:
    """The values in a YAML text: mappings, lists, and scalars as text (`Written` where they have no quotes).

    Raises ValueError for other types, repeated keys and too many aliased values.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"it is longer than {MAX_YAML:,} characters")
    try:
        found = yaml.load(text, Loader=_UniqueKeys)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # the last three: an invalid date
        raise ValueError(" ".join(str(error).split())) from None
    check_bounded(found, limit=10_000)
    return found


class _UniqueKeys(yaml.SafeLoader):
    """Reads scalars as text, and refuses a repeated key, because its first value would be lost."""

    yaml_implicit_resolvers: ClassVar = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return Written(value) if is_plain else value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if (twice := _repeated(keys)) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[:80]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Writes the keys of the mappings behind `<<` into `node`. With ten of them, each line holds ten times more."""
        for key, merged in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "<<" and isinstance(merged.value, list):
                taken = merged.value if isinstance(merged, yaml.SequenceNode) else [merged]
                for one in taken:
                    if isinstance(one, yaml.MappingNode):
                        self.flatten_mapping(one)
                if len(taken) * max((len(one.value) for one in taken), default=0) > MAX_MERGED:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"a mapping takes more than {MAX_MERGED:,} keys from others", node.start_mark
                    )
        super().flatten_mapping(node)


def read_yaml(path: Path) -> Any:
    """The plain values in a YAML file. Raises OSError, and ValueError as `parse_yaml`."""
    return parse_yaml(_bounded_text(path, MAX_YAML))


def read_torch(path: Path, mmap: bool = False) -> Any:
    """The tensors and plain data in a file of `torch.save`; no code of the file runs.

    Nothing allocates more memory than the file has bytes: its archive must be uncompressed and no larger than the file,
    a rehearsal with stand-ins goes through its pickle first, and no tensor may be larger than its storage.
    Raises OSError, and ValueError for any other problem.
    """
    import torch  # here, so that reading a configuration does not load torch

    try:
        is_archive = rehearse_torch(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive)
    except OSError:
        raise
    except MemoryError:
        raise ValueError("it asks for more memory than this machine has") from None
    except Exception as error:  # pickle and torch raise many types for a file of another kind
        raise ValueError(first_line(error)) from None
    check_bounded(content, leaf=_check_tensor)
    return content


def rehearse_torch(path: Path) -> bool:
    """Whether a file of `torch.save` is an archive, as files are that torch writes today.

    Goes through its pickle with stand-ins for every name. Raises an exception of pickle, zipfile or Python's own for a
    file that is not one, or that would take more memory than it has bytes.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_archive(path)
            return True
        file.seek(0)
        for _ in range(4):  # magic number, protocol, system, content
            Rehearsal(file, path.stat().st_size).load()
    return False


def check_bounded(value: Any, limit: int = MAX_VALUES, leaf: Callable[[Any], None] = lambda value: None) -> None:
    """Raises ValueError when nested plain data has more than MAX_DEPTH levels or `limit` values.

    A value counts as often as the data refers to it. `leaf` is called with each value that is not a container.
    """
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
    """Returns `name` when it is a plain file name, without a path. Raises ValueError otherwise."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0") or len(name) > 255:
        raise ValueError(f"{str(name)[:80]!r} is not the name of a file beside it")
    return name


def check_shards(folder: Path) -> None:
    """Raises UserError when an index of a model's weights names a file outside `folder`.

    It follows links, because the hub's cache consists of links.
    """
    for index in sorted(folder.glob("*.index.json")):
        shard_names(index)


def shard_names(index: Path) -> dict[str, str]:
    """The file of each tensor, from the index of a model's weights. Raises UserError when the index is invalid."""
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
        raise ValueError(f"it is larger than {mib(limit) if limit >= 2**20 else f'{limit // 2**10} KiB'}")
    return held.decode("utf-8")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**64:
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {(_repeated(name for name, _ in pairs) or '')[:80]!r} occurs twice")
    return found


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before; None when all are different."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _check_archive(path: Path) -> None:
    held = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its archive is compressed, which torch.save never writes")
        if sum(member.file_size for member in members) > held:
            raise ValueError("its archive claims more bytes than the file has")
        for member in members:
            if member.filename.endswith("/data.pkl"):
                with archive.open(member) as file:
                    Rehearsal(file, held).load()


class Rehearsal(pickle._Unpickler):  # the C unpickler allocates whatever size a file claims
    """Goes through a pickle of torch with stand-ins for every name in it: it imports, calls and allocates nothing.

    (`weights_only` calls some names: it makes a `bytearray` of ten billion bytes.) Raises what pickle raises, and
    UnpicklingError for anything but tensors and plain data, or when the tensors claim more bytes than the file has.
    """

    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: IO[bytes], held: int):
        super().__init__(file, encoding="utf-8")
        self.held = held
        self.storages: dict[str, int] = {}
        self.claimed = 0

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return _Mapping
        if module_name == "torch._utils" and global_name in _REBUILD:
            return _nothing
        if (module_name, global_name) == ("torch", "Size"):
            return tuple
        if module_name in ("torch", "torch.storage") and global_name.endswith("Storage"):
            return _NumberType(_WIDTHS.get(global_name, 8))
        if module_name == "torch" and re.fullmatch(r"bool|b?float\w+|u?int\d+|complex\d+", global_name):
            return _NumberType(8)
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}"[:100])

    def persistent_load(self, pid: Any) -> None:
        what, kind, key, _, count = pid[:5]
        if what != "storage" or not isinstance(kind, _NumberType) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError("it holds an object that is not a tensor")
        size = count * kind.width
        self.claimed += size - self.storages.get(str(key), 0)
        self.storages[str(key)] = size
        if self.claimed > self.held:
            raise pickle.UnpicklingError("its tensors claim more bytes than the file has")


class _Mapping(dict):
    """Stand-in for OrderedDict that accepts the state of a model's OrderedDict."""


@dataclass(frozen=True)
class _NumberType:
    """Stand-in for a storage or number type."""

    width: int
    """Bytes of one number."""


def _nothing(*given: Any) -> None:
    """Stand-in for the functions that rebuild tensors."""


_REBUILD = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
_WIDTHS = {
    "UntypedStorage": 1, "ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "HalfStorage": 2, "BFloat16Storage": 2,
    "ShortStorage": 2, "IntStorage": 4, "FloatStorage": 4, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16,
}  # fmt: skip


def _check_tensor(tensor: Any) -> None:
    """Raises ValueError for a tensor that is not dense, not on the CPU, or larger than its storage."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        return
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"it holds a tensor that is {tensor.layout} on {tensor.device}, not a plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of {tuple(tensor.shape)} claims more numbers than the file holds")


def refuse(path: Path | str, what: str, error: Exception) -> NoReturn:
    """Raises UserError: `path` is not a usable `what`, with the reason from `error`."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    raise UserError(f"{path} is not a usable {what}: {reason}") from None
