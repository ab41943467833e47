"""The keys of the configuration: each typed, bounded and documented. base/config_file.py reads them from a file."""

from __future__ import annotations

import math
import os
import re
import typing
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from sgm_finetune.base.untrusted import Written

Task = Literal["causal-lm", "sequence-classification", "token-classification", "seq2seq-lm", "preference", "reward"]
DECODER_TASKS: tuple[Task, ...] = ("causal-lm", "preference")
"""Tasks of a decoder: a model that goes on from a prompt."""
HEAD_TASKS: tuple[Task, ...] = ("sequence-classification", "token-classification", "reward")
"""Tasks of a model with a head of its own, which may be new."""
PAIR_TASKS: tuple[Task, ...] = ("preference", "reward")
"""Tasks whose examples are two token sequences: a chosen and a rejected answer."""
Role = Literal[
    "text", "text_pair", "label", "prompt", "completion", "messages", "instruction", "input", "output", "source",
    "target", "tokens", "tags", "system", "tools", "history", "chosen", "rejected",
]  # fmt: skip
LabelKind = Literal["class", "classes", "number"]
PreferenceKind = Literal["dpo", "ipo", "orpo", "simpo", "kto", "apo_zero", "apo_down"]
Quantization = Literal["none", "nf4", "int8"]
Criterion = Literal["subspace", "cosine", "snr"]
Scope = Literal["activation", "layers", "pool"]
Side = Literal["input", "output"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
AdapterKind = Literal["lora", "full"]
Also = Literal["norms", "embeddings", "head"]
SelectBy = Literal["snr", "depth", "random", "gradient"]
Optimizer = Literal["spectral", "adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"]
Schedule = Literal["linear", "cosine", "constant", "wsd"]
DEFAULT_RATES: dict[Optimizer, float] = {"spectral": 0.0125, **dict.fromkeys(typing.get_args(Optimizer)[1:], 1e-3)}
FULL_RATE = 2e-5
"""The default learning rate of whole matrices, for every optimizer that trains them."""
OF_WHOLE_MATRICES: tuple[Optimizer, ...] = ("adafactor", "muon")
"""Optimizers for `adapter.kind: full` alone."""
_SPECTRAL_RANK, _SPECTRAL_STEPS = 8, 120
"""The rank from which on, and the steps up to which, `DEFAULT_RATES` holds for spectral descent."""


def default_rate(optimizer: Optimizer, rank: int, steps: int) -> float:
    """The learning rate of who gives none, for a training of `steps` steps.

    A spectral step moves all `rank` directions by its length. Below rank 8, the default keeps the step's Frobenius norm
    instead of its length; beyond 120 steps it falls with the square root of their number (docs/method.md section 6).

    >>> [default_rate("spectral", rank, 60) for rank in (1, 2, 4, 8, 64)], default_rate("adamw", 1, 60)
    ([0.0354, 0.025, 0.0177, 0.0125, 0.0125], 0.001)
    >>> [default_rate("spectral", 16, steps) for steps in (120, 480, 12_000)]
    [0.0125, 0.00625, 0.00125]
    """
    if optimizer != "spectral":
        return DEFAULT_RATES[optimizer]
    share = _SPECTRAL_RANK / min(rank, _SPECTRAL_RANK) * _SPECTRAL_STEPS / max(steps, _SPECTRAL_STEPS)
    return float(f"{DEFAULT_RATES[optimizer] * math.sqrt(share):.3g}")


_UNSIGNED = r"(?=\.?[0-9])(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)?(\.[0-9]*)?([eE][+-]?[0-9]+)?"
"""A plain number without its sign, for Python and for the JSON Schema. Groups 3 and 4: its fraction, its exponent."""
_NUMBER = re.compile(rf"[+-]?{_UNSIGNED}")


def _parse_number(value: Any) -> Any:
    """Returns a number that is written as text. Every value that is no text comes back as it is.

    Raises ValueError for true and false, and for a text that can be read in two ways (010, 1:30) or is not finite.

    >>> _parse_number("2e-5"), _parse_number("1_000"), _parse_number(".5"), _parse_number(3)
    (2e-05, 1000, 0.5, 3)
    """
    if isinstance(value, bool):
        raise ValueError("true/false is not a number")
    if not isinstance(value, str):
        return value
    found = _NUMBER.fullmatch(value.strip())
    if len(value) > 60 or found is None:
        raise ValueError("write a plain number, such as 90, 0.5 or 1e-3")
    number = float(value) if any(found.group(3, 4)) else int(value)
    if math.isinf(number):
        raise ValueError("it is too large a number")
    return number


def _parse_whole(value: Any) -> Any:
    """`_parse_number`, for a whole number. Raises ValueError for 1.000, which is one or a thousand.

    >>> _parse_whole("2e3"), _parse_whole("200.0")
    (2000.0, 200.0)
    """
    if isinstance(value, str) and re.fullmatch(r"[+-]?[1-9]\d{0,2}(\.\d{3})+", value.strip()):
        raise ValueError("it can be read in two ways; write a whole number without a point, such as 1000")
    return _parse_number(value)


_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}


def _parse_size(value: Any) -> Any:
    """Returns a size, with or without a unit, as a number of bytes. Raises ValueError for a text that is none.

    pydantic.ByteSize is not used: it ignores what follows the unit ("16GB/2" would mean 16 GB).

    >>> _parse_size("8GiB"), _parse_size("1.5 gb"), _parse_size("2e9")
    (8589934592, 1500000000, 2000000000.0)
    """
    found = re.fullmatch(r"\s*(\S+?)\s*([kmgt]i?b)\s*", value.lower()) if isinstance(value, str) else None
    try:
        return int(_parse_number(found[1]) * _UNITS[found[2]]) if found else _parse_number(value)
    except (ValueError, OverflowError):
        raise ValueError("write a number of bytes, or a size such as 8GiB or 512MB") from None


_MOST_PARAMETERS = 10**12
_LARGEST_RATE = 10
LARGEST_RANK = 4096
"""The largest `adapter.rank`."""


def _parse_count(value: Any) -> Any:
    """Returns a number of parameters, which may end in k (thousand) or M (million), as a whole number.

    Raises ValueError for everything that is not a whole number from 1 to 10^12.

    >>> _parse_count("300k"), _parse_count("1.5M"), _parse_count("2e5"), _parse_count(300000)
    (300000, 1500000, 200000, 300000)
    """
    found = re.fullmatch(r"\s*(\S+?)\s*([km])\s*", value, re.IGNORECASE) if isinstance(value, str) else None
    try:
        number = _parse_number(found[1]) * {"k": 10**3, "m": 10**6}[found[2].lower()] if found else _parse_whole(value)
        count = round(number)
    except (ValueError, TypeError, OverflowError):
        number = count = 0
    if not 1 <= count <= _MOST_PARAMETERS or not math.isclose(number, count, rel_tol=1e-12):
        raise ValueError("write a whole number from 1 to 1e12, such as 300k, 1.5M or 300000")
    return count


def _parse_rate(value: Any) -> Any:
    """Returns a learning rate as a number, and `auto` as it is. Raises ValueError for everything else.

    >>> _parse_rate("2e-5"), _parse_rate("auto")
    (2e-05, 'auto')
    """
    if isinstance(value, str) and value == "auto":
        return "auto"
    try:
        rate = float(_parse_number(value))
    except (ValueError, TypeError, OverflowError):
        rate = math.nan
    if not 0 < rate <= _LARGEST_RATE:
        raise ValueError(f"write a number above 0 and up to {_LARGEST_RATE}, such as 0.0125, or auto")
    return rate


def _parse_list(value: Any) -> Any:
    """Returns a single name as a list of one, and null as an empty list.

    >>> _parse_list("tensorboard"), _parse_list(None)
    (['tensorboard'], [])
    """
    if value is None or (isinstance(value, Written) and value.is_null):
        return []
    return [value] if isinstance(value, str) else value


def _parse_flag(value: Any) -> Any:
    """Returns true and false, written as text, as a truth value. Raises ValueError for another text, such as yes."""
    if not isinstance(value, str):
        return value
    if value not in _FLAGS:
        raise ValueError("write true or false")
    return _FLAGS[value]


def _parse_switch(value: Any) -> Any:
    """Returns true and false, written as text, as a truth value. Every other value comes back as it is."""
    return _FLAGS.get(value, value) if isinstance(value, str) else value


_FLAGS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def _parse_text(value: Any) -> Any:
    """Returns a text as it was written. Raises ValueError for an empty one, and for null without quotes."""
    if value == "":
        raise ValueError("it is empty; leave it out, or write a text")
    if isinstance(value, Written) and value.is_null:
        raise ValueError(f'it takes a text; leave it out, or put the text into quotes: "{value}"')
    return str(value) if isinstance(value, str) else value


def _parse_path(value: Any) -> Any:
    """Returns a path with the home folder for its `~` or `~user`.

    Raises ValueError for a user that does not exist, and for a drive with a tab or the like behind it: "C:\\new" has a
    line feed in double quotes.
    """
    if isinstance(value, str) and re.match(r"[A-Za-z]:[^/]*[\x00-\x1f]", value):
        raise ValueError("a backslash in double quotes begins a control character; use single quotes or none")
    if not isinstance(value, str) or not value.startswith("~"):
        return _parse_text(value)
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise ValueError(f"there is no home folder {value.partition('/')[0]}; write ./{value} for a file of that name")
    return expanded


def _with_unit(unit: str, **bounds: int) -> WithJsonSchema:
    """The JSON Schema of a whole number within `bounds`, or a text: a number and perhaps a `unit`."""
    text = {"type": "string", "pattern": rf"^\s*\+?{_UNSIGNED}\s*({unit})?\s*$"}
    return WithJsonSchema({"anyOf": [{"type": "integer", **bounds}, text]})


Size = Annotated[int, BeforeValidator(_parse_size), _with_unit("[kKmMgGtT][iI]?[bB]")]
Count = Annotated[int, BeforeValidator(_parse_count), _with_unit("[kKmM]", minimum=1, maximum=_MOST_PARAMETERS)]
Rate = Annotated[
    float | Literal["auto"],
    BeforeValidator(_parse_rate),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": _LARGEST_RATE}, {"const": "auto"}]}),
]
_TRACKER = {"type": "string", "enum": list(typing.get_args(Tracker))}
Trackers = Annotated[
    list[Tracker],
    BeforeValidator(_parse_list),
    WithJsonSchema({"anyOf": [{"type": "array", "items": _TRACKER}, _TRACKER, {"type": "null"}]}),
]
Text = Annotated[str, BeforeValidator(_parse_text)]
PathText = Annotated[str, BeforeValidator(_parse_path)]
Flag = Annotated[bool, BeforeValidator(_parse_flag)]
Real = Annotated[float, BeforeValidator(_parse_number), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_parse_whole)]  # `2e3` and `200.0` are whole numbers too


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


_DESCRIPTION = ("data.columns", "data.format")
ALTERNATIVES: tuple[dict[str, tuple[str, ...]], ...] = (
    {
        "data.name": _DESCRIPTION,
        "data.train": (*_DESCRIPTION, "data.validation", "data.test", "data.file_type"),
        "data.mixture": (),
    },
    {"selection.top_fraction": ("selection.by",), "selection.snr_threshold": ()},
    {"plan": (), "adapter.parameters": ()},
    {"training.eval_steps": (), "training.eval_seconds": ()},
)
"""Keys of which a configuration gives one at most, each with the keys that describe it and go when it goes. A key on
the command line replaces its alternative in a file (base/config_file.py)."""


def _refuse_both(section: str, values: BaseModel) -> None:
    """Raises ValueError where the section has two keys that exclude each other."""
    for keys in ALTERNATIVES:
        given = [key for key in keys if getattr(values, key.removeprefix(f"{section}."), None) is not None]
        if len(given) > 1:
            raise ValueError(f"give {' or '.join(given)}, not both")


class ModelConfig(_Section):
    name: PathText = "smollm2-135m-instruct"
    """Hub id, local folder, or an embedded demo model: `smollm2-135m-instruct`, `all-minilm-l6-v2`."""
    task: Task = "sequence-classification"
    """Task that the model learns. preference: to prefer the chosen answers of pairs. reward: to score answers, the
    chosen one of a pair higher than the rejected one."""
    quantization: Quantization = "none"
    """Format of the frozen base in memory. none: as `dtype` says. nf4: 4 bits. int8: 8 bits. bitsandbytes does both."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Floating-point type of the base. auto: the type of the stored weights; for a quantised base bfloat16, or float32
    on a processor without bfloat16 instructions."""
    residence: Literal["device", "host", "disk"] | None = None
    """Place of the frozen base, for models that are larger than the memory; the results are the same. device: in
    memory, the GPU's if there is one. host: in the host's memory, from which each block is copied to the GPU before it
    computes; it implies `training.checkpointing`. disk: in files, of which one block at a time is in memory, on
    machines without a GPU. host and disk take quantization none or nf4. null: device, or host or disk if
    `memory.budget` is too small for that."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model (null: the main branch)."""
    trust_remote_code: Flag = False
    """Run the Python code that comes with the model. Read that code first."""


class SourceConfig(_Section):
    """What names one source of data, and says how to read it."""

    name: PathText | None = None
    """Embedded data set (`rotten-tomatoes`, `imdb`, `xsum`, `conll-sample`, `jane-austen`), hub id or local data set
    folder. `owner/name:subset` selects a subset on the hub. For your own files, set `train` instead."""
    train: PathText | None = None
    """Training file: .csv, .tsv, .json, .jsonl, .parquet, .txt or .conll, packed (.gz, .bz2, .xz, .zst) or not."""
    validation: PathText | None = None
    """Validation file (null: `validation_fraction` of the training data)."""
    test: PathText | None = None
    """Test file (null: the test data of `name`, or `test_fraction` of the training data)."""
    file_type: Literal["auto", "csv", "tsv", "json", "jsonl", "parquet", "text", "conll"] = "auto"
    """Type of the files. auto: inferred from the file name extension."""
    format: Literal["auto", "text", "completion", "chat", "sharegpt", "alpaca"] = "auto"
    """Format of the rows for causal-lm. text: running text. completion: prompt and completion, as texts or as lists of
    messages. chat: messages with role and content. sharegpt: messages with from and value. alpaca: instruction, input,
    output. auto: inferred from the column names and printed."""
    columns: dict[Role, Text] = {}
    """Column of each role, for example {text: review, label: stars}. By default, a role's column has the role's
    name."""

    @model_validator(mode="after")
    def _validation_goes_with_train(self) -> Self:
        if self.name is not None and self.validation is not None:
            raise ValueError("data.validation needs data.train; it cannot be used with data.name")
        return self


class MixtureEntry(SourceConfig):
    """One source of a mixture."""

    weight: Real | None = Field(default=None, gt=0)
    """Share of the source in the examples of every epoch, in proportion to the other weights. All entries have one, or
    none has: then every example comes once an epoch."""

    @model_validator(mode="before")
    @classmethod
    def _read_nulls(cls, given: Any) -> Any:
        """What is null is left out, as in the rest of a file."""
        if not isinstance(given, dict):
            return given
        return {
            key: value
            for key, value in given.items()
            if value is not None and not (isinstance(value, Written) and value.is_null)
        }

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.train is None):
            raise ValueError("give each entry either train, a file, or name")
        return self


class DataConfig(SourceConfig):
    mixture: list[MixtureEntry] | None = None
    """Several sources in one run, instead of `name` or `train`: a list of entries such as {train: chats.jsonl, weight:
    0.7}. An entry has the keys above, which say of its source what they say here of the only one, and a `weight`: the
    share of the source in the examples of every epoch. An epoch has as many examples as all sources together; a source
    with a larger share repeats its examples, one with a smaller share leaves some out, other ones in each epoch. With
    no weights, every example comes once an epoch. Each source is split and tested on its own too."""
    label_kind: Literal["auto", "class", "classes", "number"] = "auto"
    """Kind of label in sequence classification. class: one class. classes: any number of classes (a list of names, a
    list with a 0 or 1 for every class or, in CSV, names separated by commas or semicolons). number: a number to
    predict. auto: a list means classes, a fractional number means number, everything else means class."""
    max_length: Whole = Field(default=256, ge=8, le=1_048_576)
    """Maximum length of a sequence in tokens. Longer sequences are truncated."""
    packing: Flag = False
    """Pack several training examples into each sequence of `max_length`. For completion and chat data; running text is
    always packed. An example attends only to itself, and SGM checks this on the model. `training.batch_size` then
    counts packed sequences."""
    num_train: Whole | None = Field(default=None, ge=1)
    """Maximum number of training examples (null: all)."""
    num_validation: Whole | None = Field(default=None, ge=1)
    """Maximum number of validation examples (null: all)."""
    num_test: Whole | None = Field(default=None, ge=1)
    """Maximum number of test examples (null: all)."""
    validation_fraction: Real = Field(default=0.1, gt=0, lt=0.5)
    """Fraction of the data to use for validation when there is no validation data."""
    test_fraction: Real = Field(default=0.15, gt=0, lt=0.5)
    """Fraction of the data to use for testing when there is no test data."""
    streaming: Flag = False
    """Read only `num_train`, `num_validation` and `num_test` rows from a shuffled stream, seeded by `seed`. For files,
    folders and hub data sets that do not fit in memory or on disk."""
    seed: Whole = Field(default=0, ge=0, lt=2**32)
    """Seed of the splits and of the choice of examples. It is separate from `training.seed`, so that runs with
    different training seeds share one test set."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _refuse_both("data", self)
        if self.streaming and self.mixture is not None:
            raise ValueError("data.streaming=true does not go with data.mixture; set it to false")
        if self.name is not None and self.test is not None and self.streaming:
            raise ValueError("data.test needs data.train where data.streaming=true; leave one of them out")
        counts = {f"data.num_{split}": getattr(self, f"num_{split}") for split in ("train", "validation", "test")}
        if self.streaming and (uncounted := [key for key, count in counts.items() if count is None]):
            raise ValueError(f"data.streaming=true needs {' and '.join(uncounted)}; give the number of rows to read")
        return self

    @model_validator(mode="after")
    def _mixture_fits(self) -> Self:
        if self.mixture is None:
            return self
        if not self.mixture:
            raise ValueError("data.mixture is empty; give it entries, such as {train: chats.jsonl, weight: 0.7}")
        for key in SourceConfig.model_fields:
            if getattr(self, key) != SourceConfig.model_fields[key].default:
                raise ValueError(f"data.{key} does not go with data.mixture; write it into the entries")
        unweighted = [number for number, entry in enumerate(self.mixture, start=1) if entry.weight is None]
        if 0 < len(unweighted) < len(self.mixture):
            raise ValueError(
                f"data.mixture: entry {unweighted[0]} has no weight and others have one; give every entry a weight, or "
                "none"
            )
        return self

    @property
    def sources(self) -> list[DataConfig]:
        """The configuration of each source: those of the mixture, or this one."""
        if self.mixture is None:
            return [self]
        return [
            self.model_copy(update={"mixture": None, **{key: getattr(entry, key) for key in SourceConfig.model_fields}})
            for entry in self.mixture
        ]

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weight of each source of a mixture; None where every example counts alike."""
        weights = [entry.weight for entry in self.mixture or () if entry.weight is not None]
        return tuple(weights) or None


class SnrConfig(_Section):
    estimator: Literal["mp", "spectrum"] = "mp"
    """Estimator of the noise in a matrix. mp: Marchenko-Pastur bulk, deflated (docs/method.md 1). spectrum: the formula
    of the published Spectrum script."""
    scan: PathText | None = None
    """Scan file to use instead of a new scan: the output of `sgm scan --output`, or a result file of the published
    Spectrum script (with estimator: spectrum). null: scan the model."""


def with_present_keys(selection: Any) -> Any:
    """The values of section `selection`, with `by` for `prefer_depth`, which earlier versions wrote.

    >>> with_present_keys({"top_fraction": 0.5, "prefer_depth": "true"}), with_present_keys({"prefer_depth": False})
    ({'top_fraction': 0.5, 'by': 'depth'}, {})
    """
    if not isinstance(selection, dict) or "prefer_depth" not in selection:
        return selection
    kept = {key: value for key, value in selection.items() if key != "prefer_depth"}
    return {**kept, "by": "depth"} if _parse_flag(selection["prefer_depth"]) is True else kept


class SelectionConfig(_Section):
    top_fraction: Real | None = Field(default=None, gt=0, le=1)
    """Fraction of the matrices of each kind to train, the first ones of the order in `by` (null: all matrices)."""
    snr_threshold: Real | None = Field(default=None, ge=0)
    """Minimum SNR of the matrices to train, as an energy ratio, not in dB (null: no minimum). It cannot be combined
    with `top_fraction`."""
    by: SelectBy = "snr"
    """What `top_fraction` ranks the matrices of a kind by. snr: signal-to-noise ratio, by the formula that
    `snr.estimator` names. depth: nearness to the output; the backward pass stops at the lowest trained matrix and keeps
    no activations below it (on MiniLM, training the upper half with equal parameters costs 0.012 ± 0.009 in loss,
    docs/results.md). random: chance, from `training.seed`. gradient: energy of the gradient that the probe measures."""

    @model_validator(mode="before")
    @classmethod
    def _read_prefer_depth(cls, values: Any) -> Any:
        return with_present_keys(values)

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        _refuse_both("selection", self)
        if self.by != "snr" and self.top_fraction is None:
            raise ValueError(f"selection.by={self.by} needs selection.top_fraction; give both")
        return self


class ProbeConfig(_Section):
    num_batches: Whole = Field(default=8, ge=2, le=10_000)
    """Number of probe batches, measured in two disjoint halves. More batches give less noise."""
    batch_size: Whole = Field(default=8, ge=1)
    """Examples per probe batch. A forward pass computes at most half a training micro-batch at a time."""
    sketch_size: Whole = Field(default=48, ge=4, le=4096)
    """Test vectors of each range finder, at least adapter.rank. Bytes per matrix: 8 × sketch_size × (rows +
    columns)."""
    seed: Whole = Field(default=0, ge=0, lt=2**32)
    """Seed of the test vectors."""


class MergeConfig(_Section):
    scope: Scope = "activation"
    """Matrices that may share a factor. activation: matrices that read the same activations (q, k, v; gate, up) share
    lora_A. layers: matrices of one kind in different layers share the factor that `side` names. pool: they share both
    factors, and each weights the `adapter.rank` directions by codes of its own: many layers for the size of one."""
    criterion: Criterion = "subspace"
    """Measure of similarity. subspace: the held-out gradient energy that a shared basis keeps. cosine: cosine
    similarity of the full gradients (scope layers only). snr: similar SNR alone."""
    side: Literal["auto", "input", "output", "none"] = "auto"
    """Factor that a group of layers shares. input: lora_A. output: lora_B. auto: the probe chooses for each kind.
    none: nothing is merged, in either scope."""
    threshold: Real | None = Field(default=None, ge=-1, le=1)
    """Minimum similarity within a group: energy kept relative to the matrices' own bases (subspace), or cosine (null:
    0.85; with scope pool -1, which makes one pool of each kind)."""
    snr_tolerance_db: Real | None = Field(default=None, ge=0)
    """Maximum difference of SNR within a group, in decibels (null: no limit; 3 with criterion snr)."""
    max_group_size: Whole | None = Field(default=None, ge=2)
    """Maximum number of matrices in a group (null: no limit)."""

    @model_validator(mode="after")
    def _scope_can(self) -> Self:
        for key, value in (("criterion", "cosine"), ("side", "output")):
            if self.scope == "activation" and getattr(self, key) == value:
                raise ValueError(f"merge.{key}={value} compares layers; give merge.scope=layers too")
        if self.scope == "pool" and self.side in ("input", "output"):
            raise ValueError(f"merge.scope=pool shares both sides; leave out merge.side={self.side}")
        return self


class AdapterConfig(_Section):
    kind: AdapterKind = "lora"
    """What is trained of a selected matrix. lora: a low-rank update beside it. full: the matrix itself (docs/full.md).
    With full the keys of `merge` and all other keys of `adapter` but `also` mean nothing, and stay at their
    defaults."""
    also: Annotated[list[Also], BeforeValidator(_parse_list)] = []
    """With `kind: full`, what is trained beside the selected matrices. norms: norms from the lowest selected block on.
    embeddings: all embeddings. head: the linear layers outside blocks, such as the output layer. A classification head
    is always trained."""
    rank: Whole = Field(default=16, ge=1, le=LARGEST_RANK)
    """Rank of every LoRA update."""
    alpha: Real = Field(default=32, gt=0)
    """Scale of the update: it is multiplied by alpha / rank."""
    dropout: Real = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the adapter's input."""
    parameters: Count | None = None
    """Maximum number of trained adapter parameters, for example 300k, 1.5M or 300000, instead of a rank: SGM takes the
    largest rank that stays within it, whatever the probe then lets matrices share, and alpha keeps its ratio to `rank`
    (null: `rank` holds). A new classification head does not count. A `plan` has its own rank and excludes this key."""
    from_run: PathText | None = None
    """Folder of an earlier run on the same base model, from whose adapter this run goes on (null: a new adapter). The
    earlier plan and rank hold, training begins with the earlier factors, the test before is of the earlier model, and
    losses of preferences compare with it."""


class TrainingConfig(_Section):
    epochs: Real = Field(default=1, gt=0, le=10_000)
    """Passes over the training data."""
    max_steps: Whole | None = Field(default=None, ge=1)
    """Number of optimizer steps; overrides `epochs` (null: as `epochs` says)."""
    batch_size: Whole = Field(default=32, ge=1)
    """Examples per optimizer step, summed over all processes."""
    micro_batch_size: Whole | None = Field(default=None, ge=1)
    """Examples per forward pass of one process. Gradients accumulate over micro-batches (null: batch_size /
    processes)."""
    shard: Flag = False
    """Shard the frozen base over all processes (FSDP2) instead of keeping a copy in each."""
    step: Literal["fast", "peft"] = "fast"
    """Implementation of the training step. fast: adds a layer's update to its output in place, in the base's type;
    computes x Aᵀ once for all matrices that share A; computes the loss of a language model without the logits of the
    whole batch (docs/method.md 8). peft: the code of PEFT and Transformers. Where fast does not apply, SGM uses PEFT's
    code and prints a line."""
    checkpointing: Annotated[Literal[False, True, "offload"], BeforeValidator(_parse_switch)] = False
    """Gradient checkpointing. true: keep only the input of each block and recompute the block in the backward pass, for
    less memory and more time. offload: as true, with the inputs in host memory instead of GPU memory, which takes a
    little more time."""
    eval_batch_size: Whole = Field(default=32, ge=1)
    """Examples per forward pass during evaluation."""
    optimizer: Optimizer | None = None
    """Optimizer (null: spectral, and adamw with `adapter.kind: full`). spectral: descent in the spectral norm of the
    weight change (docs/method.md 6), for factors, with about half of AdamW's state; AdamW at 1e-3 then trains a new
    classification head. adamw: AdamW for every parameter. adamw_8bit: AdamW with a quarter of the state, by
    bitsandbytes. paged_adamw_8bit: the same, and the state moves to host memory when it does not fit in GPU memory. For
    whole matrices alone: adafactor, whose state is a row and a column of each matrix, and muon, with half of AdamW's
    state; AdamW then trains what is no matrix."""
    learning_rate: Rate | None = None
    """Peak learning rate. spectral: the RMS-to-RMS norm of the change that one step makes to a weight matrix, for every
    model (null: 0.0125 for up to 120 steps from rank 8 on; more below rank 8, less for more steps). adamw: AdamW's
    learning rate (null: 1e-3). auto: short trials choose it before the training, by their loss on training examples
    that they leave out (docs/method.md 6.1). Whole matrices (`adapter.kind: full`): null is 2e-5; a
    classification head then learns at 1e-3, or at this rate if it is larger."""
    schedule: Schedule = "linear"
    """Course of the learning rate after the warm-up. linear: it falls in a straight line to zero. cosine: it falls
    along half a cosine to zero. constant: it stays at its peak. wsd: it stays there (warm-up, stable, decay) and falls
    in the last fifth of the steps along a cosine to zero."""
    warmup_fraction: Real = Field(default=0.06, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises linearly to its peak."""
    weight_decay: Real = Field(default=0.0, ge=0, lt=1)
    """Decoupled weight decay, as in AdamW."""
    max_grad_norm: Real = Field(default=1.0, gt=0)
    """Maximum norm of the gradients; larger gradients are clipped to it."""
    eval_steps: Whole | None = Field(default=None, ge=1)
    """Steps between validations. Each validation saves a checkpoint (null: four validations a run)."""
    eval_seconds: Real | None = Field(default=None, gt=0)
    """Seconds of training between validations, in the place of `eval_steps`; one more follows the last step. Two runs
    of one seed then validate at other steps, and may keep another checkpoint as the best."""
    save_total_limit: Whole = Field(default=2, ge=1)
    """Number of checkpoints that stay: the newest one and the best one always, then the newest of the others."""
    early_stopping_patience: Whole = Field(default=3, ge=0)
    """Number of validations without a lower loss after which training stops (0: never)."""
    seed: Whole = Field(default=0, ge=0, lt=2**32)
    """Seed of initialisation, data order and dropout."""
    report_to: Trackers = []
    """Trackers that also receive the loss, learning rate and memory of every step, through Transformers. tensorboard:
    files in output.dir/checkpoints/runs (`pip install -e ".[tracking]"`). wandb, mlflow, trackio: as that
    package's own settings say (pip install the package)."""
    resume: Flag = False
    """Resume from the last complete checkpoint in output.dir."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        _refuse_both("training", self)
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"training.batch_size={self.batch_size} is not a multiple of "
                f"training.micro_batch_size={self.micro_batch_size}; change one of them"
            )
        return self


class PreferenceConfig(_Section):
    loss: PreferenceKind = "dpo"
    """Loss of model.task=preference. dpo, ipo, apo_zero and apo_down compare the model with its base on pairs of a
    chosen and a rejected answer. orpo and simpo take pairs and no base. kto takes single answers with a label
    (docs/method.md 10)."""
    beta: Real | None = Field(default=None, gt=0)
    """Strength of the comparison: how far the model may move from its base. orpo: the weight of the odds ratio (null:
    0.1; 2 for simpo)."""
    gamma: Real = Field(default=1.0, ge=0)
    """Margin of simpo, in the units of its rewards."""
    desirable_weight: Real = Field(default=1.0, gt=0)
    """Weight of good answers in kto. With few of them, raise it until good and bad answers weigh about the same."""
    undesirable_weight: Real = Field(default=1.0, gt=0)
    """Weight of bad answers in kto."""

    @property
    def strength(self) -> float:
        """`beta`, or its default."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1

    @property
    def has_pairs(self) -> bool:
        """Whether the loss compares a chosen and a rejected answer; else an answer has a label."""
        return self.loss != "kto"

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with its base."""
        return self.loss not in ("orpo", "simpo")

    @model_validator(mode="after")
    def _loss_reads(self) -> Self:
        owners: dict[str, PreferenceKind] = {"gamma": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto"}
        for key, owner in owners.items():
            if self.loss != owner and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"preference.{key} is for preference.loss={owner}, not {self.loss}; leave it out")
        return self


class EvaluationConfig(_Section):
    num_generated: Whole = Field(default=32, ge=0)
    """Number of test examples for which the model generates an answer before and after training, to measure exact
    match, ROUGE-L and BLEU. It applies to data with answers (completion, chat, pairs). 0: none."""
    harness: list[PathText] = []
    """Tasks of lm-evaluation-harness to run before and after training, as names or .yaml files
    (`pip install -e ".[harness]"`)."""
    harness_limit: Whole | None = Field(default=None, ge=1)
    """Maximum number of examples of each harness task (null: all)."""


class MemoryConfig(_Section):
    budget: Size | None = Field(default=None, ge=2**20)
    """Maximum memory of one process, for example 8GiB: GPU memory, or resident memory without a GPU. SGM chooses batch
    sizes, checkpointing, `model.residence`, rank and layers to fit and prints each change (null: keep the configured
    values)."""


class OutputConfig(_Section):
    dir: PathText = "output"
    """Folder for the results."""
    overwrite: Flag = False
    """Replace the results of an earlier run in `dir`."""


class Config(_Section):
    """Configuration of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    snr: SnrConfig = SnrConfig()
    selection: SelectionConfig = SelectionConfig()
    probe: ProbeConfig = ProbeConfig()
    merge: MergeConfig = MergeConfig()
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    preference: PreferenceConfig = PreferenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    memory: MemoryConfig = MemoryConfig()
    output: OutputConfig = OutputConfig()
    plan: PathText | None = None
    """Plan file (plan.json of an earlier run) to use instead of measuring again (null: measure)."""

    @property
    def is_full(self) -> bool:
        """Whether whole matrices are trained."""
        return self.adapter.kind == "full"

    @property
    def optimizer(self) -> Optimizer:
        """`training.optimizer`, or its default."""
        return self.training.optimizer or ("adamw" if self.is_full else "spectral")

    def to_compare(self) -> dict[str, Any]:
        """All values by section, as JSON has them, with the optimizer by its name: an earlier version wrote its default
        into its files."""
        values = self.model_dump(mode="json")
        values["training"]["optimizer"] = self.optimizer
        return values

    def peak_learning_rate(self, steps: int) -> float:
        """The learning rate of a training of `steps` steps: `training.learning_rate`, or the default when it is null or
        still to be chosen."""
        given = self.training.learning_rate
        if given is not None and given != "auto":
            return given
        if self.is_full:
            return FULL_RATE
        return default_rate(self.optimizer, 1 if self.merge.scope == "pool" else self.adapter.rank, steps)

    @model_validator(mode="before")
    @classmethod
    def _recomputes(cls, given: Any) -> Any:
        """`residence: host` implies checkpointing: a block's weights are gone when its backward pass begins."""
        model = given.get("model") if isinstance(given, dict) else None
        if isinstance(model, dict) and model.get("residence") == "host":
            training = given.get("training") or {}
            if isinstance(training, dict) and "checkpointing" not in training:
                return {**given, "training": {**training, "checkpointing": True}}
            if isinstance(training, dict) and _parse_switch(training["checkpointing"]) is False:
                raise ValueError(
                    "model.residence=host computes each block again in its backward pass; give "
                    "training.checkpointing=true, or leave it out"
                )
        return given

    @model_validator(mode="after")
    def _kind_can(self) -> Self:
        if not self.is_full:
            if self.adapter.also:
                raise ValueError("adapter.also is for adapter.kind=full; give that too, or leave it out")
            if self.optimizer in OF_WHOLE_MATRICES:
                raise ValueError(f"training.optimizer={self.optimizer} is for adapter.kind=full; give that, or adamw")
            return self
        for section in ("adapter", "merge"):
            given, default = getattr(self, section), type(getattr(self, section))()
            for key in type(given).model_fields:
                if key not in ("kind", "also") and getattr(given, key) != getattr(default, key):
                    raise ValueError(f"{section}.{key} means nothing with adapter.kind=full; leave it out")
        refused: list[tuple[str, Any, bool, str]] = [
            ("training.optimizer", self.optimizer, self.optimizer == "spectral", "training.optimizer=adamw"),
            ("model.quantization", self.model.quantization, self.model.quantization != "none",
             "model.quantization=none"),
            ("model.dtype", self.model.dtype, self.model.dtype == "float16", "model.dtype=bfloat16"),
            ("model.residence", self.model.residence, self.model.residence in ("host", "disk"),
             "model.residence=device"),
            ("training.shard", "true", self.training.shard, "training.shard=false"),
        ]  # fmt: skip
        for key, value, wrong, remedy in refused:
            if wrong:
                raise ValueError(f"{key}={value} is not possible with adapter.kind=full; give {remedy}")
        return self

    @model_validator(mode="after")
    def _preference_fits(self) -> Self:
        if self.model.task in PAIR_TASKS and self.data.packing:
            raise ValueError(f"data.packing=true does not go with model.task={self.model.task}; set it to false")
        if self.model.task != "preference" and self.preference != PreferenceConfig():
            key = next(k for k, value in PreferenceConfig() if getattr(self.preference, k) != value)
            raise ValueError(f"preference.{key} needs model.task=preference, not {self.model.task}; leave it out")
        return self

    @model_validator(mode="after")
    def _one_rank(self) -> Self:
        if self.plan is not None and self.adapter.parameters is not None:
            raise ValueError("give plan or adapter.parameters, not both: the plan has its rank")
        for key, other in (("plan", self.plan), ("adapter.parameters", self.adapter.parameters)):
            if self.adapter.from_run is not None and other is not None:
                raise ValueError(f"give adapter.from_run or {key}, not both: the earlier run has its plan and rank")
        return self

    @model_validator(mode="after")
    def _sketch_holds_rank(self) -> Self:
        elsewhere = (self.plan, self.adapter.parameters, self.adapter.from_run)  # where the rank is from, and checked
        is_final = all(value is None for value in elsewhere)
        if is_final and not self.is_full and self.merge.side != "none" and self.probe.sketch_size < self.adapter.rank:
            raise ValueError(
                f"probe.sketch_size={self.probe.sketch_size} is smaller than adapter.rank={self.adapter.rank}; "
                "raise probe.sketch_size"
            )
        return self


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections of a configuration model, by name: its fields that hold keys of their own."""
    return {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def known_keys() -> list[str]:
    """The dotted names of all keys, in the order of the documentation."""
    keys = []
    for name in Config.model_fields:
        section = sections(Config).get(name)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else [name]
    return keys
