"""The search space of a sweep: which `key=value` of a command line are ranges or choices, and the values in them.

Every value is written as the override `key=text`, so that it is read, checked and refused like any other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from sgm_finetune.base.config import Config, known_keys, sections
from sgm_finetune.base.config_file import FileValues, overridden
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import listed

Settings = Mapping[str, str]
"""Key -> the text of its value, for the keys that a sweep searches."""
DIGITS = 3
"""Digits of a number that is drawn from a range."""
_END = r"[+-]?\.?\d[^,]*"
_RANGE = re.compile(rf"(log:)?\s*({_END}?)\s*\.\.\s*({_END})")
_MOST_CORNERS = 2048
"""Combinations of ends and choices that are checked before a sweep begins."""
_COMPARABLE = ("data.num_train", "data.packing")
"""Keys of `data` that change no validation example."""
_OTHER_LOSS = ("data.", "preference.", "model.name", "model.revision", "model.task")
"""Keys, or their beginnings, that change what the validation loss is measured on, or what it means."""
_NO_LOSS = (
    "output.", "evaluation.", "memory.", "training.eval_batch_size", "training.report_to", "training.resume",
    "training.shard",
)  # fmt: skip
"""Keys, or their beginnings, that change no loss beyond rounding."""
_PLANS = ("adapter.", "merge.", "selection.", "snr.", "probe.")
"""Sections that say nothing where a plan is given."""


@dataclass(frozen=True)
class Choices:
    """The values between commas."""

    key: str
    values: tuple[str, ...]

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        return ",".join(self.values)

    @property
    def corners(self) -> tuple[str, ...]:
        """The values that stand for all: each of them."""
        return self.values

    @property
    def size(self) -> float:
        """The number of values."""
        return len(self.values)


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; whole ones where the key is a whole number."""

    key: str
    low: float
    high: float
    log: bool
    """Whether the logarithm is drawn evenly."""
    whole: bool

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        return f"{'log:' if self.log else ''}{_written(self.low)}..{_written(self.high)}"

    @property
    def corners(self) -> tuple[str, ...]:
        """Its two ends."""
        return _written(self.low), _written(self.high)

    @property
    def size(self) -> float:
        """The number of values; infinite for numbers that are not whole."""
        return self.high - self.low + 1 if self.whole else math.inf

    def write(self, number: float) -> str:
        """The text of a number that was drawn: three digits, or more in a narrow range, and never beyond the ends.

        >>> Range("training.learning_rate", 0.003, 0.03, log=True, whole=False).write(0.0123456)
        '0.0123'
        >>> Range("training.learning_rate", 0.012, 0.0121, log=False, whole=False).write(0.01203456)
        '0.012035'
        """
        narrow = max(1.0, abs(self.low) / (self.high - self.low), abs(self.high) / (self.high - self.low))
        rounded = number if self.whole else float(f"{number:.{DIGITS + math.floor(math.log10(narrow))}g}")
        return _written(min(max(rounded, self.low), self.high))


@dataclass(frozen=True)
class SearchSpace:
    """What a sweep varies, and the configuration around it."""

    file: FileValues
    plain: tuple[str, ...]
    """The overrides that hold for every try."""
    ranges: tuple[Choices | Range, ...]

    @property
    def size(self) -> float:
        """The number of different tries; infinite where a range has numbers that are not whole."""
        return math.prod(part.size for part in self.ranges)

    @property
    def texts(self) -> dict[str, str]:
        """Key -> its range, as it is written on the command line."""
        return {part.key: part.text for part in self.ranges}

    @property
    def first(self) -> dict[str, str]:
        """The settings of the first corner."""
        return {part.key: part.corners[0] for part in self.ranges}

    def config(self, settings: Settings) -> Config:
        """The configuration of a try. Raises UserError where the configuration refuses it."""
        return overridden(self.file, [*self.plain, *_overrides(settings)])

    def every(self) -> Iterator[dict[str, str]]:
        """All settings, where their number is finite."""
        values = [
            part.values if isinstance(part, Choices) else map(_written, range(int(part.low), int(part.high) + 1))
            for part in self.ranges
        ]
        keys = [part.key for part in self.ranges]
        return (dict(zip(keys, combination, strict=True)) for combination in itertools.product(*values))


def search_space(
    file: FileValues, overrides: Sequence[str], announce: Callable[[str], None] = lambda line: None
) -> SearchSpace:
    """Divides the overrides of a sweep: `A..B` and `log:A..B` are ranges, values between commas are choices, and the
    others hold for every try.

    Raises UserError for an unknown key, a key that no sweep can search, an end or choice that the configuration
    refuses, an empty or senseless range, a key that is given twice, and where there is no range at all.
    """
    searched = {override: found for override in overrides if (found := _values(override)) is not None}
    plain = tuple(override for override in overrides if override not in searched)
    if not searched:
        raise UserError(
            "sgm sweep has nothing to vary; give a range (training.learning_rate=log:3e-3..3e-2), or choices "
            "(adapter.rank=4,16)"
        )
    keys = [_key(override) for override in overrides]
    if twice := [_key(override) for override in searched if keys.count(_key(override)) > 1]:
        raise UserError(f"`{twice[0]}` is given twice; give one range, or one list of choices")
    space = SearchSpace(file, plain, ())
    for override in searched:
        _check_key(_key(override), override, space)
    starts = {_key(override): values[0] for override, values in searched.items()}
    ranges = tuple(_parse(override, values, space, starts) for override, values in searched.items())
    space = SearchSpace(file, plain, ranges)
    overridden(file, [*plain, *_overrides(space.first)], announce)
    _check_corners(space)
    _check_plan(space)
    return space


def _values(override: str) -> tuple[str, ...] | None:
    """The two ends of a range, or the choices; None for a plain override."""
    key, equals, text = override.partition("=")
    text = text.strip()
    if not equals or not key.strip():
        return None
    if found := _RANGE.fullmatch(text):
        return found[2].strip(), found[3].strip()
    choices = split_choices(text)
    return tuple(choices) if len(choices) > 1 else None


def split_choices(text: str) -> list[str]:
    """The parts of `text` between commas that stand outside of brackets and quotes.

    >>> split_choices("4, 16"), split_choices("[norms,head],[norms]"), split_choices('"a,b"')
    (['4', '16'], ['[norms,head]', '[norms]'], ['"a,b"'])
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not parts[-1].strip():
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def takes_numbers(key: str) -> bool:
    """Whether the values of a key are numbers.

    >>> [takes_numbers(key) for key in ("training.learning_rate", "adapter.rank", "merge.side", "data.packing")]
    [True, True, False, False]
    """
    section, _, leaf = key.rpartition(".")
    model = sections(Config).get(section, Config)
    types = [model.model_fields[leaf].annotation] if leaf in model.model_fields else []
    for found in types:  # which grows: the members of a union follow it
        types += get_args(found) if get_origin(found) in (Union, UnionType, Annotated) else ()
    return int in types or float in types


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _overrides(settings: Settings) -> list[str]:
    return [f"{key}={text}" for key, text in settings.items()]


def _check_key(key: str, override: str, space: SearchSpace) -> None:
    """Raises UserError for a key that no sweep can search. Unknown ones get the message that they get elsewhere."""
    if key not in known_keys() and not key.startswith("data.columns."):
        overridden(FileValues(space.file.where, {}), [override])
    if key.startswith(_OTHER_LOSS) and key not in _COMPARABLE:
        raise UserError(
            f"`{override}`: tries with another {key} have validation losses that cannot be compared; give one value "
            "(in quotes if it has a comma), and compare runs with sgm compare"
        )
    if key.startswith(_NO_LOSS):
        raise UserError(f"`{override}`: {key} changes no validation loss; give one value")


def _parse(override: str, values: Sequence[str], space: SearchSpace, starts: Settings) -> Choices | Range:
    """The range or the choices of one override, each value checked beside the first ones of the other keys."""
    key = _key(override)
    ends = _RANGE.fullmatch(override.partition("=")[2].strip())
    if ends is not None and not takes_numbers(key):
        raise UserError(f"`{override}`: {key} is no number, so it has no range; list choices between commas")
    found = [_value(override, text, space, {**starts, key: text}) for text in values]
    if ends is None:
        for index, value in enumerate(found):
            if value in found[:index]:
                raise UserError(f"`{override}` lists {values[index]} twice; write each choice once")
        return Choices(key, tuple(values))
    low, high = found
    if low >= high:
        raise UserError(
            f"`{override}`: a range goes from a smaller number to a larger one; {low:g} is not below {high:g}"
        )
    if ends[1] and low <= 0:
        raise UserError(f"`{override}`: log: needs numbers above 0, and {low:g} is not; leave out log:")
    return Range(key, low, high, bool(ends[1]), isinstance(low, int) and isinstance(high, int))


def _value(override: str, text: str, space: SearchSpace, settings: Settings) -> Any:
    """The value that the configuration makes of a text."""
    key = _key(override)
    if not text:
        raise UserError(f"`{override}` has an empty choice; write a value on each side of a comma")
    try:
        config = space.config(settings)
    except UserError as error:
        hint = "; a range is A..B or log:A..B" if "log:" in text or ".." in text else ""
        raise UserError(f"{error}{hint}") from None
    section, _, leaf = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, leaf)


def _check_corners(space: SearchSpace) -> None:
    """Raises UserError for the first combination of ends and choices that the configuration refuses."""
    keys = [part.key for part in space.ranges]
    corners = itertools.product(*(part.corners for part in space.ranges))
    for corner in itertools.islice(corners, _MOST_CORNERS):
        settings = dict(zip(keys, corner, strict=True))
        try:
            space.config(settings)
        except UserError as error:
            raise UserError(f"{error} (the try {' '.join(_overrides(settings))})") from None


def _check_plan(space: SearchSpace) -> None:
    """Raises UserError where a given plan has already decided what the sweep would vary."""
    plan = space.config(space.first).plan
    decided = [part.key for part in space.ranges if part.key.startswith(_PLANS)]
    if plan is not None and decided:
        raise UserError(
            f"plan={plan} has decided {listed(decided)}; leave out the plan, or vary keys of training alone"
        )


def _written(number: float) -> str:
    """A number as an override has it.

    >>> _written(16), _written(0.003), _written(1e-05)
    ('16', '0.003', '1e-05')
    """
    return str(number)
