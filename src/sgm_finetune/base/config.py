"""The keys of the configuration: each typed, bounded and documented. base/config_file.py reads them from a file."""

from __future__ import annotations

import re
import typing
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Task = Literal["causal-lm", "sequence-classification", "token-classification", "seq2seq-lm"]
Role = Literal[
    "text", "text_pair", "label", "prompt", "completion", "messages", "instruction", "input", "output", "source",
    "target", "tokens", "tags",
]  # fmt: skip
LabelKind = Literal["class", "classes", "number"]
Quantization = Literal["none", "nf4", "int8"]
Criterion = Literal["subspace", "cosine", "snr"]
Scope = Literal["activation", "layers"]
Side = Literal["input", "output"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Optimizer = Literal["spectral", "adamw", "adamw_8bit", "paged_adamw_8bit"]
DEFAULT_RATES: dict[Optimizer, float] = {"spectral": 0.0125, **dict.fromkeys(typing.get_args(Optimizer)[1:], 1e-3)}


def _number(value: Any) -> Any:
    """A number for text that is one: YAML 1.1 reads `2e-5` as text, and people mean the number. `true` is none."""
    if isinstance(value, bool):
        raise ValueError("true/false is not a number")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}


def _bytes(value: Any) -> Any:
    """A number of bytes for a size with its unit.

    >>> _bytes("8GiB"), _bytes("1.5 gb"), _bytes("much")
    (8589934592, 1500000000, 'much')
    """
    if isinstance(value, str) and (found := re.fullmatch(r"\s*([\d.]+)\s*([kmgt]i?b)\s*", value.lower())):
        try:
            return int(float(found[1]) * _UNITS[found[2]])
        except ValueError:
            return value
    return value


def _listed(value: Any) -> Any:
    """A list of one for a single name; none for null.

    >>> _listed("tensorboard"), _listed(None)
    (['tensorboard'], [])
    """
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(_bytes)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_number)]  # `2e3` and `200.0` are whole numbers too


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(_Section):
    name: str = "smollm2-135m-instruct"
    """Hub id, local folder, or one of the embedded demo models `smollm2-135m-instruct`, `all-minilm-l6-v2`."""
    task: Task = "sequence-classification"
    """What the model is trained to do."""
    quantization: Quantization = "none"
    """How the frozen base is held: none, nf4 (4 bit) or int8, both by bitsandbytes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Floating-point type of the base. auto: the type the weights are stored in; under
    quantisation bfloat16, or float32 on a processor without instructions for it."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Read it first."""


class DataConfig(_Section):
    name: str | None = None
    """`rotten-tomatoes`, `imdb`, `xsum`, `conll-sample`, `jane-austen`, or a hub data set id. Or give files below."""
    train: str | None = None
    """Training file: .csv .tsv .json .jsonl .parquet .txt .conll."""
    validation: str | None = None
    """Validation file; without one, `validation_fraction` of the training data is split off."""
    test: str | None = None
    """Test file; without one, `test_fraction` of the training data is split off."""
    file_type: Literal["auto", "csv", "tsv", "json", "jsonl", "parquet", "text", "conll"] = "auto"
    """auto: by the file's ending."""
    format: Literal["auto", "text", "completion", "chat", "sharegpt", "alpaca"] = "auto"
    """How a row of language-modelling data is written. text: running text. completion: prompt and completion.
    chat: messages with role and content. sharegpt: the same with from and value. alpaca: instruction, input, output.
    auto: by the columns that are there, and said."""
    columns: dict[Role, str] = {}
    """Which column plays which role, e.g. {text: review, label: stars}. A role's own name is the default."""
    label_kind: Literal["auto", "class", "classes", "number"] = "auto"
    """What a label of sequence classification is: one class, any number of classes (a list, or in CSV names divided by
    commas), or a number to predict. auto: lists are classes, fractional numbers numbers, all else is one class."""
    max_length: Whole = Field(default=256, ge=8, le=1_048_576)
    """Longest sequence in tokens; longer ones are cut."""
    packing: bool = False
    """Fill sequences of `max_length` with several training examples each (completion and chat; running text always is).
    Every example sees itself alone, which is checked on the model. `training.batch_size` then counts full sequences."""
    num_train: Whole | None = Field(default=None, ge=1)
    """Use at most this many training examples (null: all)."""
    num_validation: Whole | None = Field(default=None, ge=1)
    """Use at most this many validation examples (null: all)."""
    num_test: Whole | None = Field(default=None, ge=1)
    """Use at most this many test examples (null: all)."""
    validation_fraction: Real = Field(default=0.1, gt=0, lt=0.5)
    """Share split off for validation where no validation data is given."""
    test_fraction: Real = Field(default=0.15, gt=0, lt=0.5)
    """Share split off for testing where no test data is given."""
    streaming: bool = False
    """Read no more rows than `num_train`, `num_validation` and `num_test` say, from a seeded shuffle of the stream: for
    files, folders and hub data sets that do not fit."""
    seed: Whole = Field(default=0, ge=0, lt=2**32)
    """Seed of the split and of the choice of examples. Separate from `training.seed`, so seeds share one test set."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.name is not None and self.train is not None:
            raise ValueError("give data.name or data.train, not both")
        if self.name is not None and self.validation is not None:
            raise ValueError("data.validation goes with data.train, not with data.name")
        counts = {f"data.num_{split}": getattr(self, f"num_{split}") for split in ("train", "validation", "test")}
        if self.streaming and (uncounted := [key for key, count in counts.items() if count is None]):
            raise ValueError(f"data.streaming=true needs {' and '.join(uncounted)}: how many rows to take")
        return self


class SnrConfig(_Section):
    estimator: Literal["mp", "spectrum"] = "mp"
    """mp: Marchenko-Pastur bulk, deflated (docs/method.md 1). spectrum: the published script's formula."""
    scan: str | None = None
    """A scan to select by instead of a new one: what `sgm scan --output` wrote, or a result file of the published
    Spectrum script (with estimator: spectrum)."""


class SelectionConfig(_Section):
    top_fraction: Real | None = Field(default=None, gt=0, le=1)
    """Train this share of each kind of matrix, highest SNR first (null: all of them)."""
    snr_threshold: Real | None = Field(default=None, ge=0)
    """Train the matrices whose SNR (energy ratio, not dB) is at least this. Excludes `top_fraction`."""
    prefer_depth: bool = False
    """With `top_fraction`: the matrices nearest to the output, not those of the highest SNR. The backward pass ends at
    the lowest that is trained, and keeps nothing below it. The upper half of MiniLM, at equal parameters, costs 0.012 ±
    0.009 in loss (docs/results.md)."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.top_fraction is not None and self.snr_threshold is not None:
            raise ValueError("give selection.top_fraction or selection.snr_threshold, not both")
        if self.prefer_depth and self.top_fraction is None:
            raise ValueError("selection.prefer_depth says which selection.top_fraction to train; give both")
        return self


class ProbeConfig(_Section):
    num_batches: Whole = Field(default=8, ge=2, le=10_000)
    """Batches measured, in two disjoint halves; more of them, less noise."""
    batch_size: Whole = Field(default=8, ge=1)
    """Examples per probe batch; computed in pieces of half of a micro-batch of the training at most."""
    sketch_size: Whole = Field(default=48, ge=4, le=4096)
    """Test vectors of each range finder; at least adapter.rank. Bytes held: 8 x this x (rows + columns), a matrix."""
    seed: Whole = Field(default=0, ge=0, lt=2**32)
    """Seed of the test vectors."""


class MergeConfig(_Section):
    scope: Scope = "activation"
    """Who may share a factor. activation: the matrices that read the same activations (q, k, v; gate, up) share lora_A.
    layers: the layers of one kind share the factor of `side`."""
    criterion: Criterion = "subspace"
    """What makes them similar. subspace: held-out gradient energy that a shared basis keeps.
    cosine: cosine of the whole gradients (scope layers). snr: similar SNR alone."""
    side: Literal["auto", "input", "output", "none"] = "auto"
    """Which factor a group of layers shares: input (lora_A), output (lora_B), auto (per kind, by the probe).
    none: nothing is merged, in either scope."""
    threshold: Real = Field(default=0.85, ge=-1, le=1)
    """Smallest similarity in a group: energy kept relative to own bases (subspace), or cosine."""
    snr_tolerance_db: Real | None = Field(default=None, ge=0)
    """Largest difference of SNR within a group, in decibels. null: not asked for (criterion snr: 3)."""
    max_group_size: Whole | None = Field(default=None, ge=2)
    """Most matrices in a group (null: any number)."""

    @model_validator(mode="after")
    def _scope_can(self) -> Self:
        for key, value in (("criterion", "cosine"), ("side", "output")):
            if self.scope == "activation" and getattr(self, key) == value:
                raise ValueError(f"merge.{key}={value} compares layers; give merge.scope=layers with it")
        return self


class AdapterConfig(_Section):
    rank: Whole = Field(default=16, ge=1, le=4096)
    """Rank of every update."""
    alpha: Real = Field(default=32, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: Real = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class TrainingConfig(_Section):
    epochs: Real = Field(default=1, gt=0, le=10_000)
    """Passes over the training data."""
    max_steps: Whole | None = Field(default=None, ge=1)
    """Optimizer steps; overrides `epochs`."""
    batch_size: Whole = Field(default=32, ge=1)
    """Examples per optimizer step, over all processes together."""
    micro_batch_size: Whole | None = Field(default=None, ge=1)
    """Examples per forward pass of one process; gradients are accumulated (null: batch_size / processes)."""
    shard: bool = False
    """Shard the frozen base over the processes of the run (FSDP2) instead of holding it in each."""
    step: Literal["fast", "peft"] = "fast"
    """How a step is computed. fast: a layer's update is added to its output in place, in the base's type, x Aᵀ once for
    all that share A, and a language model's loss needs no logits of a whole batch (docs/method.md 8). peft: PEFT's and
    Transformers' own code. fast takes PEFT's code for what it cannot do, and says so."""
    checkpointing: Literal[False, True, "offload"] = False
    """Keep what a block reads, and compute the block again in the backward pass: less memory, more time. offload: keep
    it in the host's memory instead of a GPU's, which takes a little more."""
    eval_batch_size: Whole = Field(default=32, ge=1)
    """Examples per forward pass in evaluation."""
    optimizer: Optimizer = "spectral"
    """The step for the factors. spectral: descent in the spectral norm of the weights' change (docs/method.md 6), with
    about half of AdamW's state; a new classification head then learns by AdamW at 1e-3. adamw: AdamW for everything.
    adamw_8bit: the same with a state of a quarter, by bitsandbytes; paged_adamw_8bit: that state in the host's memory
    where a GPU's does not hold it."""
    learning_rate: Real | None = Field(default=None, gt=0, le=10)
    """Peak learning rate. spectral: the norm of a step's change of a weight matrix, from RMS to RMS, whatever the rank
    and the model (null: 0.0125); adamw: AdamW's (null: 1e-3)."""
    warmup_fraction: Real = Field(default=0.06, ge=0, lt=1)
    """Share of the steps with a rising learning rate; then it falls linearly to zero."""
    weight_decay: Real = Field(default=0.0, ge=0, lt=1)
    """Decoupled weight decay."""
    max_grad_norm: Real = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    eval_steps: Whole | None = Field(default=None, ge=1)
    """Validate and save a checkpoint every so many steps (null: four times a run)."""
    early_stopping_patience: Whole = Field(default=3, ge=0)
    """Stop after so many validations without a better loss (0: never)."""
    seed: Whole = Field(default=0, ge=0, lt=2**32)
    """Seed of initialisation, order of data and dropout."""
    report_to: Annotated[list[Tracker], BeforeValidator(_listed)] = []
    """Where losses, rates and memory of every step also go, through Transformers: tensorboard (files in
    output.dir/checkpoints/runs), wandb, mlflow, trackio (each as its own settings say; pip install
    'sgm-finetune[tracking]' or the package)."""
    resume: bool = False
    """Continue from the last whole checkpoint in output.dir."""

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the optimizer's own default."""
        return DEFAULT_RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"training.batch_size={self.batch_size} is no multiple of "
                f"training.micro_batch_size={self.micro_batch_size}"
            )
        return self


class EvaluationConfig(_Section):
    num_generated: Whole = Field(default=32, ge=0)
    """Test examples to which answers are generated, before and after, where the data has answers (completion, chat,
    pairs): for exact match, ROUGE-L and BLEU. 0: none."""
    harness: list[str] = []
    """Tasks of lm-evaluation-harness to run before and after, by name or as .yaml files (an extra: pip install
    'sgm-finetune[harness]')."""
    harness_limit: Whole | None = Field(default=None, ge=1)
    """Examples of each of them (null: all)."""


class MemoryConfig(_Section):
    budget: Size | None = Field(default=None, ge=2**20)
    """Most memory of one process, e.g. 8GiB: of the GPU where there is one, else resident. Batches, checkpointing, rank
    and layers are then chosen to fit, and what was given up is said (null: as configured)."""


class OutputConfig(_Section):
    dir: str = "output"
    """Folder of the results."""
    overwrite: bool = False
    """Replace the results of an earlier run in that folder."""


class Config(_Section):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    snr: SnrConfig = SnrConfig()
    selection: SelectionConfig = SelectionConfig()
    probe: ProbeConfig = ProbeConfig()
    merge: MergeConfig = MergeConfig()
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    memory: MemoryConfig = MemoryConfig()
    output: OutputConfig = OutputConfig()
    plan: str | None = None
    """A plan.json of an earlier run to use instead of measuring again."""

    @model_validator(mode="after")
    def _sketch_holds_rank(self) -> Self:
        if self.merge.side != "none" and self.probe.sketch_size < self.adapter.rank:
            raise ValueError(
                f"probe.sketch_size={self.probe.sketch_size} is smaller than adapter.rank={self.adapter.rank}; "
                "raise probe.sketch_size"
            )
        return self


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def known_keys() -> list[str]:
    """Every key of the configuration, dotted, in the order of the documentation."""
    keys = []
    for name, field in Config.model_fields.items():
        section = sections(Config).get(name)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else [name]
        del field
    return keys
