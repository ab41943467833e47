"""Follows blocks that are alike once: most of a large model's layers need what its first ones need.

Of the blocks of one kind, the first are computed. The others hand their input on, and the pieces of the footprint that
belong to a computed block, forward and backward, count again for each of them. A piece includes all that is allocated
and freed while it runs, so the result is the footprint of the whole model. If two computed blocks of a kind differ, or
if the model cannot do without one, all blocks are computed.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgm_finetune.model.names import block_of
from sgm_finetune.train.budget.footprint import Footprint, Piece, joined

_NUM_EXAMPLES = 2
"""Blocks of a kind that are computed. Two, so that a difference shows."""
_SMALLEST = 5
"""Number of blocks from which a list of them may have some that are not computed."""
_COLLECTED = ("output_attentions", "output_hidden_states", "output_router_logits")
"""Settings that make a model collect something from every block."""


class NotAlikeError(Exception):
    """Two blocks that look alike need different amounts."""


@dataclass(frozen=True)
class Block:
    """One of a model's numbered blocks."""

    name: str
    module: nn.Module
    kind: tuple
    """Equal for blocks that are alike."""
    is_end: bool
    """Whether it is the first or the last of its list. These are computed, and are no examples: the piece of the first
    ends before its input is freed, the last one's contains what follows the blocks."""


@dataclass(frozen=True)
class _Part:
    """A piece of the footprint. A key is equal for pieces that are alike; None for a piece that is like no other."""

    piece: Piece
    key: tuple | None = None
    repeats: bool = False
    """Whether it stands for an equal piece of a block that was computed."""


class Repeats:
    """Which blocks of a computation were computed, which stand for others, and what all of them need together."""

    def __init__(self, footprint: Footprint):
        self.footprint = footprint
        self.twins: dict[str, str] = {}
        """Name of a block that was not computed -> that of a computed one of its kind."""
        self._parts: list[_Part] = []
        self._open: tuple[tuple | None, bool] = (None, False)
        """Key of the current piece, and whether it stands for another."""
        self._examples: dict[tuple, list[tuple[str, Any]]] = defaultdict(list)
        """Key -> name, and the form of the output, of each computed block."""
        self._read: Callable[[], Tensor | None] = lambda: None
        """The input of the last block, as long as it lives."""
        self._readers: list[tuple[tuple | None, bool]] = []
        """What `_open` is for the backward pieces of the blocks that read that input."""

    def total(self) -> Piece:
        """What the whole computation needed until now. Raises NotAlikeError if blocks that look alike are not."""
        self._cut(None, False)
        examples: dict[tuple, set[Piece]] = defaultdict(set)
        for part in self._parts:
            if part.key is not None and not part.repeats:
                examples[part.key].add(part.piece)
        used = {part.key for part in self._parts if part.repeats}
        if any(len(examples[key]) != 1 for key in used if key is not None):
            raise NotAlikeError
        return joined(next(iter(examples[part.key])) if part.repeats else part.piece for part in self._parts)  # type: ignore

    def expand(self, names: Iterable[str]) -> list[str]:
        """`names` of modules in computed blocks or outside of blocks, and those in the blocks that stand for others."""
        inside: dict[str, list[str]] = defaultdict(list)
        for name in (names := list(names)):
            inside[block_of(name) or ""].append(name)
        twins = self.twins.items()
        return names + [block + name.removeprefix(twin) for block, twin in twins for name in inside[twin]]

    def group(self, groups: Sequence[Sequence[str]], names: Iterable[str]) -> list[list[str]]:
        """`groups` of `names` in computed blocks, extended by those in the blocks that stand for others.

        What is grouped within a block is so in its twins; a group that reaches beyond a block takes its twins' too.
        """
        number = {name: index for index, group in enumerate(groups) for name in group}
        beyond = [len({block_of(name) for name in group}) > 1 for group in groups]
        found: dict[tuple[int, str | None], list[str]] = {}
        for name in names:
            block = block_of(name) or ""
            index = number[self.twins[block] + name.removeprefix(block) if block in self.twins else name]
            found.setdefault((index, None if beyond[index] else block), []).append(name)
        return list(found.values())

    def run(self, block: Block, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of the block's `forward`, or its input in the form of its output."""
        given = {**dict(enumerate(args)), **kwargs}
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            return forward(*args, **kwargs)
        key = (*block.kind, _describe_call(args), _describe_call(kwargs), torch.is_grad_enabled())
        examples = self._examples[key]
        repeats = not block.is_end and len(examples) >= _NUM_EXAMPLES and all(form for _, form in examples)
        own = None if block.is_end else key
        self._cut(own and ("forward", own), repeats)
        self._watch(hidden, own, repeats)
        if repeats:
            self.twins[block.name] = examples[0][0]
            return _fill(examples[0][1], hidden, given)
        output = forward(*args, **kwargs)
        if not block.is_end:
            examples.append((block.name, _form(output, hidden, given)))
        return output

    def _cut(self, key: tuple | None, repeats: bool) -> None:
        """Ends the current piece and opens one with this key."""
        self._parts.append(_Part(self.footprint.cut(), *self._open))
        self._open = key, repeats

    def _watch(self, hidden: Tensor, key: tuple | None, repeats: bool) -> None:
        """Cuts the backward pass where it leaves the block that reads `hidden`.

        Blocks that hand their input on read the same tensor; its only hook cuts for all of them, the last one first.
        """
        if not hidden.requires_grad or not torch.is_grad_enabled():
            return
        reader: tuple[tuple | None, bool] = (key and ("backward", key), repeats)
        if self._read() is hidden:
            self._readers.append(reader)
            return
        readers = [reader]

        def leave(gradient: Tensor) -> None:
            del gradient
            for ended in reversed(readers):
                self._open = ended
                self._cut(None, False)

        hidden.register_hook(leave)
        self._read, self._readers = weakref.ref(hidden), readers


@contextmanager
def repeating(model: nn.Module, footprint: Footprint, lists: Sequence[Sequence[Block]]) -> Iterator[Repeats]:
    """Inside the context, `model` computes few of the blocks in `lists` that are alike, and `footprint` follows it."""
    repeats = Repeats(footprint)
    overridden: list[tuple[nn.Module, Any]] = []
    hooks = []
    try:
        for blocks in lists:
            visited: set[str] = set()
            parent = model.get_submodule(blocks[0].name.rpartition(".")[0].rpartition(".")[0])
            hooks.append(parent.register_forward_pre_hook(lambda *_, visited=visited: visited.clear()))
            for block in blocks:
                overridden.append((block.module, vars(block.module).get("forward")))
                block.module.forward = _override(block, repeats, visited)  # type: ignore[method-assign]
        yield repeats
    finally:
        for hook in hooks:
            hook.remove()
        for module, before in overridden:
            del module.forward
            if before is not None:
                module.forward = before


def _override(block: Block, repeats: Repeats, visited: set[str]) -> Callable:
    forward = block.module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if block.name in visited:  # computed again in the backward pass, as checkpointing does
            return forward(*args, **kwargs)
        visited.add(block.name)
        return repeats.run(block, forward, args, kwargs)

    return run


def block_lists(model: nn.Module) -> list[list[Block]]:
    """The lists of numbered blocks of `model`, some of which may be alike. A list inside a block belongs to the
    block."""
    if any(getattr(getattr(model, "config", None), name, False) for name in _COLLECTED):
        return []
    lists = {
        name: list(module.children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) >= _SMALLEST and block_of(name) is None
    }
    holders: dict[int, list[str]] = defaultdict(list)
    for name, blocks in lists.items():
        for i, block in enumerate(blocks):
            for parameter in {id(p) for p in block.parameters() if p.requires_grad}:
                holders[parameter].append(f"{name}.{i}")
    return [_kinds(name, blocks, holders) for name, blocks in lists.items()]


def _kinds(path: str, modules: Sequence[nn.Module], holders: Mapping[int, list[str]]) -> list[Block]:
    """The blocks of one list. Their kinds are what `_facts` says, without numbers that only count the blocks."""
    facts = [_facts(module, f"{path}.{i}", holders) for i, module in enumerate(modules)]
    steps: dict[tuple, set[int | None]] = defaultdict(set)
    for i, found in enumerate(facts):
        for key, value in found.items():
            steps[key].add(value - i if type(value) is int else None)
    counting = {key for key, values in steps.items() if len(values) == 1 and None not in values}
    kinds: dict[tuple, int] = {}
    blocks = []
    for i, (module, found) in enumerate(zip(modules, facts, strict=True)):
        described = tuple((key, value) for key, value in found.items() if key not in counting)
        kind = path, kinds.setdefault(described, len(kinds))
        blocks.append(Block(f"{path}.{i}", module, kind, is_end=i in (0, len(modules) - 1)))
    return blocks


def _facts(block: nn.Module, name: str, holders: Mapping[int, list[str]]) -> dict[tuple, Any]:
    """All that may decide what a block needs: its modules, their settings, and their tensors."""
    facts: dict[tuple, Any] = {}
    tied: dict[int, int] = {}
    own = ".".join(name.split(".")[-2:]) + "."  # such as `layers.3.`, in settings that name a module
    for path, module in block.named_modules():
        facts[path, "class"] = type(module)
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                facts[path, key] = _describe(value, own)
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            held = holders.get(id(tensor), [name])
            place = None if len(held) == 1 else (id(tensor), held[0] == name, held[-1] == name)
            first = tied.setdefault(id(tensor), len(tied))
            facts[path, key] = (tensor.shape, tensor.dtype, tensor.requires_grad, first, place)
    return facts


def _describe(value: Any, own: str = "") -> Any:
    """A setting as something that compares: containers by their entries, objects and functions by their names.

    `own` is the name by which the settings of one block call it.
    """
    match value:
        case str():
            return value.replace(own, "") if own else value
        case bool() | int() | float() | torch.dtype() | None:
            return value
        case dict():  # keys that are not text number hooks
            entries = value.items()
            return tuple((key if isinstance(key, str) else None, _describe(entry, own)) for key, entry in entries)
        case list() | tuple() | set() | frozenset():
            return tuple(_describe(entry, own) for entry in value)
        case _:
            return getattr(getattr(value, "func", value), "__qualname__", type(value).__qualname__)


def _describe_call(value: Any) -> Any:
    """What a block is called with, without numbers."""
    match value:
        case Tensor():
            return value.shape, value.dtype, value.requires_grad
        case dict():
            return tuple((key, _describe_call(entry)) for key, entry in value.items())
        case list() | tuple():
            return tuple(_describe_call(entry) for entry in value)
        case _:
            return _describe(value)


def _form(output: Any, hidden: Tensor, given: Mapping[Any, Any]) -> tuple | None:
    """The form of a block's output, which `_fill` fills: its input `hidden`, None, or other arguments that it returns
    (`given`). None if the output holds anything else."""
    form = []
    for at, entry in enumerate(output if isinstance(output, tuple) else (output,)):
        names = [name for name, value in given.items() if value is entry and entry is not None]
        if at == 0 and _is_like(entry, hidden):
            form.append(("input", None))
        elif entry is None or names:
            form.append(("given", names[0] if names else None))
        else:
            return None
    return (type(output) is tuple, tuple(form))


def _is_like(tensor: Any, hidden: Tensor) -> bool:
    def described(x: Tensor) -> tuple:
        return x.shape, x.dtype, x.requires_grad, x.stride()

    return isinstance(tensor, Tensor) and described(tensor) == described(hidden)


def _fill(form: tuple, hidden: Tensor, given: Mapping[Any, Any]) -> Any:
    is_tuple, entries = form
    filled = tuple(hidden if what == "input" else given.get(name) for what, name in entries)
    return filled if is_tuple else filled[0]
