"""A table of user errors. Each ends with exit status 2 and one line (what is wrong, the value, the remedy), without a
traceback, and writes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_pico
from safetensors.torch import load_file, save_file
from test_exporting import TEXT, train

from sgm_finetune.commands.cli import main


@dataclass(frozen=True)
class Place:
    """The folders in which a row of the table makes its files."""

    folder: Path
    llama: Path
    bert: Path
    finished: Path
    """Output folder of a finished run, for a row to copy."""

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def file(self, name: str, *lines: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
        return path

    def model(self, *, source: Path | None = None) -> Path:
        """A copy of the pico LLaMA, or of `source`, for a row to damage."""
        return shutil.copytree(source or self.llama, self.folder / "model")

    def earlier_run(self) -> Path:
        return shutil.copytree(self.finished, self.output)

    def plan(self, change: Callable[[dict[str, Any]], None]) -> Path:
        """A changed copy of the finished run's plan."""
        document = json.loads((self.finished / "plan.json").read_text(encoding="utf-8"))
        change(document)
        shutil.copy(self.finished / "plan.safetensors", self.folder / "plan.safetensors")
        return self.file("plan.json", json.dumps(document))


class Code:
    """The content of a hostile .pth: loading this object would run a program."""

    def __reduce__(self):
        return (print, ("this must never run",))


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))
    return folder


def other_architecture(folder: Path, name: str) -> Path:
    from transformers import T5Config, ViTConfig

    {"t5": T5Config, "vit": ViTConfig}[name](num_hidden_layers=1).save_pretrained(folder)
    return folder


def own_code(folder: Path) -> Path:
    return with_config(folder, model_type="abacus", auto_map={"AutoConfig": "abacus.AbacusConfig"})


def with_nan(folder: Path) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    return folder


def pickled(path: Path) -> Path:
    path.parent.mkdir()
    torch.save({"format": "sgm-finetuned/1", "adapter": Code()}, path)
    return path


def unfinished(folder: Path) -> Path:
    """The output folder of a run that was stopped after a checkpoint."""
    (folder / "sgm_finetuned.pth").unlink()
    return folder


def published(place: Place) -> str:
    """A result file of the published script."""
    return str(
        place.file("snr_results.json", '{"model.layers.0.mlp.up_proj": {"snr": Infinity, "type": "mlp.up_proj"}}')
    )


def plotted(place: Place, matrix: str) -> list[str]:
    return [str(place.llama), "--plot", str(place.output), "--matrix", matrix]


REVIEWS = "".join(f"{'good' if i % 2 else 'bad'} film {'very ' * i},{'good' if i % 2 else 'bad'}\n" for i in range(40))
LATIN_1 = "text,label\nun été,b".encode("latin-1")
PAIRS = "".join(
    json.dumps({"prompt": "the film was " * 4 + "very " * i, "completion": "good"}) + "\n" for i in range(30)
)

Row = tuple[str, Callable[[Place], list[str]], list[str]]

CONFIGURATION: list[Row] = [
    ("an unknown key", lambda p: ["training.learning_rte=1"], ["`training.learning_rte`", "did you mean"]),
    ("an unknown section", lambda p: ["trainin.epochs=1"], ["`trainin`", "did you mean `training`"]),
    ("a key of another section", lambda p: ["training.rank=1"], ["training.rank", "`adapter.rank`"]),
    ("text for a number", lambda p: ["training.learning_rate=fast"], ["'fast'", "write a number above 0"]),
    ("text for a whole number", lambda p: ["training.max_steps=many"], ["'many'", "write a plain number"]),
    ("a fraction for a whole number", lambda p: ["training.max_steps=2.5"], ["2.5", "integer"]),
    ("true for a number", lambda p: ["training.batch_size=true"], ["'true'", "write a plain number"]),
    ("a choice that there is not", lambda p: ["merge.side=left"], ["'left'", "'auto', 'input', 'output' or 'none'"]),
    ("a task that there is not", lambda p: ["model.task=poetry"], ["'poetry'", "'causal-lm'"]),
    ("a fraction above one", lambda p: ["selection.top_fraction=1.5"], ["1.5", "less than or equal to 1"]),
    (
        "a similarity above one",
        lambda p: ["merge.threshold=2"],
        ["`merge.threshold` is '2'", "less than or equal to 1"],
    ),
    ("cosines of unequal shapes", lambda p: ["merge.criterion=cosine"], ["criterion=cosine", "merge.scope=layers"]),
    ("readers' output sides", lambda p: ["merge.side=output"], ["merge.side=output", "give merge.scope=layers"]),
    ("two rules of selection", lambda p: ["selection.top_fraction=0.5", "selection.snr_threshold=1"], ["not both"]),
    ("a sketch smaller than the rank", lambda p: ["adapter.rank=16"], ["sketch_size=12", "raise probe.sketch_size"]),
    ("micro-batches that do not divide", lambda p: ["training.micro_batch_size=5"], ["micro_batch_size=5"]),
    ("depth without a fraction", lambda p: ["selection.by=depth"], ["selection.by=depth", "selection.top_fraction"]),
    ("a budget that is no size", lambda p: ["memory.budget=much"], ["memory.budget", "'much'"]),
    ("a budget of nothing", lambda p: ["memory.budget=1KiB"], ["`memory.budget`", "1048576"]),
    ("a budget below the weights", lambda p: ["memory.budget=20MiB"], ["is not enough", "model.quantization=nf4"]),
    ("pages without a GPU", lambda p: ["training.optimizer=paged_adamw_8bit"], ["GPU", "set it to adamw_8bit"]),
    ("a GPU's host without one", lambda p: ["training.checkpointing=offload"], ["GPU", "set it to true"]),
    ("a kind of checkpointing", lambda p: ["training.checkpointing=offlod"], ["offlod", "'offload'"]),
    ("a rank beyond the width", lambda p: ["adapter.rank=40", "probe.sketch_size=40"], ["40", "32 directions of"]),
    ("no key=value", lambda p: ["training.epochs"], ["`training.epochs`", "write for example training.epochs=1"]),
    ("no configuration file", lambda p: ["--config", str(p.folder / "x.yaml")], ["x.yaml", "--config"]),
    ("a file that is no YAML", lambda p: ["--config", str(p.file("b.yaml", "a: [1"))], ["b.yaml", "not YAML"]),
    ("a file with an unknown key", lambda p: ["--config", str(p.file("b.yaml", "modle: {}"))], ["b.yaml", "`model`"]),
    ("a list for a configuration", lambda p: ["--config", str(p.file("b.yaml", "- a"))], ["['a']", "key: value"]),
    ("an unknown option", lambda p: ["--fast"], ["--fast", "--help"]),
]

DATA: list[Row] = [
    ("no data", lambda p: ["data.train="], ["No data", "data.train=FILE"]),
    ("no such file", lambda p: [f"data.train={p.folder / 'x.csv'}"], ["x.csv", "does not exist"]),
    ("a folder for a file", lambda p: [f"data.train={p.folder}"], ["is a folder", "data.name"]),
    ("an unknown ending", lambda p: [f"data.train={p.file('x.doc', 'a')}"], ["`.doc`", "data.file_type"]),
    ("an empty file", lambda p: [f"data.train={p.file('x.csv', '')}"], ["x.csv", "no rows"]),
    ("a header and no rows", lambda p: [f"data.train={p.file('x.csv', 'text,label')}"], ["x.csv", "no rows"]),
    ("an empty test file", lambda p: [f"data.test={p.file('x.csv', 'text,label')}"], ["x.csv", "no rows"]),
    ("a file that is not UTF-8", lambda p: [f"data.train={p.file('x.csv', LATIN_1)}"], ["x.csv", "UTF-8"]),
    ("a broken row", lambda p: [f"data.train={p.file('x.csv', 'text,label', 'a,b,c')}"], ["line 2", "3 fields"]),
    ("a broken JSON line", lambda p: [f"data.train={p.file('x.jsonl', '{a}')}"], ["line 1", "not JSON"]),
    (
        "a file that is no Parquet",
        lambda p: [f"data.train={p.file('x.parquet', 'PAR')}"],
        ["x.parquet", "not a Parquet"],
    ),
    ("an unknown column", lambda p: ["data.columns={text: txt}"], ["`txt`", "(has: text, label)", "`text`"]),
    (
        "columns of other names",
        lambda p: [f"data.train={p.file('x.csv', 'review,stars', REVIEWS)}"],
        ["no column `text`", "(has: review, stars)", "data.columns="],
    ),
    ("one class only", lambda p: [f"data.train={p.file('x.csv', 'text,label', 'a,b', 'c,b')}"], ["'b'", "two classes"]),
    ("a label missing", lambda p: [f"data.train={p.file('x.csv', 'text,label', 'a,b', 'c,')}"], ["row 2", "no label"]),
    (
        "a label that training lacks",
        lambda p: [f"data.test={p.file('x.csv', 'text,label', 'a film,mixed')}"],
        ["'mixed'", "known: bad, good"],
    ),
    ("text without labels", lambda p: [f"data.train={p.file('x.txt', REVIEWS)}"], ["x.txt", "model.task=causal-lm"]),
    (
        "answers cut away to the last token",
        lambda p: ["model.task=causal-lm", f"data.train={p.file('x.jsonl', PAIRS)}", "data.max_length=8"],
        ["100 % of", "data.max_length=8", "Raise data.max_length"],
    ),
    ("more tokens than positions", lambda p: [f"model.name={p.bert}", "data.max_length=65"], ["65", "64 positions"]),
]

LM, TAGS, SEQ2SEQ = "model.task=causal-lm", "model.task=token-classification", "model.task=seq2seq-lm"


def lines(place: Place, *objects: dict[str, Any], name: str = "x.jsonl") -> str:
    return f"data.train={place.file(name, *map(json.dumps, objects))}"


def says(role: Any, content: Any = "hello") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


TASKS: list[Row] = [
    (
        "a conversation without an answer",
        lambda p: [LM, lines(p, says("user"))],
        ["row 1", "no answer by the assistant"],
    ),
    (
        "an unknown speaker",
        lambda p: [LM, lines(p, says("robot"))],
        ["message 1 has the role 'robot'", "known roles: system, user"],
    ),
    (
        "a message that is a number",
        lambda p: [LM, lines(p, says("assistant", 7))],
        ["message 1", "content 7, which is not a text"],
    ),
    ("a conversation that is text", lambda p: [LM, lines(p, {"messages": "hi"})], ["'hi', not a list of messages"]),
    ("an empty conversation", lambda p: [LM, lines(p, {"messages": []})], ["[], not a list of messages"]),
    (
        "a format without its columns",
        lambda p: [LM, "data.format=alpaca", lines(p, {"prompt": "a", "completion": "b"})],
        ["no column `instruction`", "(has: prompt, completion)", "data.columns="],
    ),
    ("a format for classes", lambda p: ["data.format=chat"], ["data.format=chat", "model.task=causal-lm"]),
    (
        "columns of two formats",
        lambda p: [LM, "data.columns={prompt: text, output: label}"],
        ["belong to different formats"],
    ),
    (
        "a role that the task lacks",
        lambda p: ["data.columns={source: text}"],
        ["role `source`", "its roles are text, label"],
    ),
    (
        "an instruction without an output",
        lambda p: [LM, lines(p, {"instruction": "a", "output": ""})],
        ["`output` is empty"],
    ),
    (
        "chat without a template",
        lambda p: [LM, lines(p, *(says("assistant", f"{i}") for i in range(30)))],
        ["chat template"],
    ),
    (
        "as many words as tags",
        lambda p: [TAGS, lines(p, {"tokens": ["a", "b"], "tags": ["O"]})],
        ["2 words", "1 tags in `tags`"],
    ),
    (
        "words that are text",
        lambda p: [TAGS, lines(p, {"tokens": "a b", "tags": ["O"]})],
        ["`tokens` is 'a b'", "list of"],
    ),
    ("a blank word", lambda p: [TAGS, lines(p, {"tokens": [" "], "tags": ["O"]})], ["row 1: `tokens`", "write words"]),
    (
        "a word without its tag in a CoNLL file",
        lambda p: [TAGS, f"data.train={p.file('x.conll', 'U.N. B-ORG', 'official')}"],
        ["line 2 has 1 field(s), the first word 2", "its tag last"],
    ),
    (
        "a decoder for pairs",
        lambda p: [SEQ2SEQ, "data.columns={source: text, target: label}"],
        ["model.task=seq2seq-lm", "llama", "choose another task"],
    ),
    (
        "pairs of other names",
        lambda p: [LM, "data.columns={prompt: text}"],
        ["no column `completion`", "say with data.columns which of them are prompt, completion"],
    ),
    (
        "numbers that are words",
        lambda p: ["data.label_kind=number", f"data.train={p.file('x.csv', 'text,label', 'a,1.5', 'b,many')}"],
        ["row 2", "'many' in `label`, which is not a number"],
    ),
    (
        "numbers that may be classes",
        lambda p: [f"data.train={p.file('x.csv', 'text,label', 'a,1.0', 'b,2.0')}"],
        ["a class or a number", "data.label_kind=class or data.label_kind=number"],
    ),
    (
        "sets of classes that are numbers",
        lambda p: ["data.label_kind=classes", lines(p, {"text": "a", "label": 3})],
        ["`label` is 3, not a list", "[] for none"],
    ),
    ("packed reviews", lambda p: ["data.packing=true"], ["data.packing=true", "completion and chat"]),
    (
        "a stream of unknown length",
        lambda p: ["data.streaming=true"],
        ["data.num_train", "the number of rows to read"],
    ),
    (
        "a stream of text",
        lambda p: [LM, f"data.train={p.file('x.txt', REVIEWS)}", *STREAM],
        ["x.txt cannot be streamed", "set data.file_type to one of csv"],
    ),
    ("a stream of what is small", lambda p: ["data.name=imdb", "data.train=", *STREAM], ["embedded data.name=imdb"]),
    ("a harness for classes", lambda p: ["evaluation.harness=[arc_easy]"], ["evaluation.harness", "leave it out"]),
    ("the same column twice", lambda p: ["data.columns={text: label}"], ["the same column `label`"]),
]
STREAM = ["data.streaming=true", "data.num_train=8", "data.num_validation=2", "data.num_test=2"]

SCALE: list[Row] = [
    ("pieces for one process", lambda p: ["training.shard=true"], ["training.shard=true", "torchrun"]),
    (
        "a model's own code",
        lambda p: [f"model.name={own_code(p.model())}"],
        ["model.trust_remote_code=true", "read the code"],
    ),
]

MODEL: list[Row] = [
    ("no such folder", lambda p: [f"model.name={p.folder / 'x'}"], ["No model folder", "hub id"]),
    ("no such name", lambda p: ["model.name=smollm2"], ["smollm2", "smollm2-135m-instruct"]),
    ("a hub that cannot be reached", lambda p: ["model.name=nobody/nothing"], ["nobody/nothing", "hub"]),
    (
        "no config.json",
        lambda p: [f"model.name={without(p.model(), 'config.json')}"],
        ["config.json", "save_pretrained"],
    ),
    (
        "a config.json that is no JSON",
        lambda p: [f"model.name={(p.model() / 'config.json').write_text('{') and p.folder / 'model'}"],
        ["config.json", "JSON"],
    ),
    ("no weights", lambda p: [f"model.name={without(p.model(), 'model.safetensors')}"], ["model", "safetensors"]),
    (
        "weights cut short",
        lambda p: [f"model.name={truncated(p.model() / 'model.safetensors').parent}"],
        ["model.safetensors"],
    ),
    ("a weight that is no number", lambda p: [f"model.name={with_nan(p.model())}"], ["layers.2.mlp.up_proj", "finite"]),
    (
        "no tokenizer",
        lambda p: [f"model.name={without(p.model(), 'tokenizer.json', 'tokenizer_config.json')}"],
        ["no usable tokenizer", "tokenizer.json"],
    ),
    (
        "an architecture that nobody knows",
        lambda p: [f"model.name={with_config(p.model(), model_type='abacus', architectures=['Abacus'])}"],
        ["abacus"],
    ),
    (
        "an encoder-decoder for language modelling",
        lambda p: [f"model.name={other_architecture(p.model(), 't5')}", "model.task=causal-lm"],
        ["model.task=causal-lm", "t5", "another task or model"],
    ),
    (
        "a vision model",
        lambda p: [f"model.name={other_architecture(p.model(), 'vit')}"],
        ["model.task=sequence-classification", "vit", "another task or model"],
    ),
    (
        "a model that is already quantised",
        lambda p: [
            f"model.name={with_config(p.model(), quantization_config={'quant_method': 'gptq', 'bits': 4})}",
            "model.quantization=nf4",
        ],
        ["already quantised", "model.quantization=none"],
    ),
]

PLAN: list[Row] = [
    ("no such plan", lambda p: [f"plan={p.folder / 'x.json'}"], ["x.json", "sgm plan"]),
    ("a plan that is no JSON", lambda p: [f"plan={p.file('plan.json', 'a: b')}"], ["plan.json", "not a usable plan"]),
    ("a plan that is a list", lambda p: [f"plan={p.file('plan.json', '[]')}"], ["plan.json", "a list"]),
    (
        "a plan with an unknown entry",
        lambda p: [f"plan={p.plan(lambda document: document.update(colour='red'))}"],
        ["plan.json", "colour"],
    ),
    (
        "a plan of another version",
        lambda p: [f"plan={p.plan(lambda document: document.update(format='sgm-plan/9'))}"],
        ["plan.json", "sgm-plan/1"],
    ),
    (
        "a plan of another model",
        lambda p: [f"plan={p.plan(lambda document: None)}", f"model.name={p.bert}"],
        ["another model", "sgm plan"],
    ),
    (
        "a plan without its tensors",
        lambda p: [f"plan={without(p.plan(lambda document: None).parent, 'plan.safetensors') / 'plan.json'}"],
        ["no spectral start", "random"],
    ),
    (
        "a plan with broken tensors",
        lambda p: [f"plan={truncated(p.plan(lambda d: None).with_suffix('.safetensors')).with_suffix('.json')}"],
        ["plan.safetensors", "cannot be read"],
    ),
    ("nothing above the threshold", lambda p: ["selection.snr_threshold=1e9"], ["no matrix", "snr_threshold"]),
]

OUTPUT: list[Row] = [
    (
        "results that are there already",
        lambda p: [f"output.dir={p.earlier_run()}"],
        ["earlier run", "output.overwrite=true"],
    ),
    (
        "an unfinished run that is there already",
        lambda p: [f"output.dir={unfinished(p.earlier_run())}"],
        ["earlier run", "training.resume=true"],
    ),
    ("a file for a folder", lambda p: [f"output.dir={p.file('out', 'mine')}"], ["is a file", "name a folder"]),
    ("nothing to resume", lambda p: ["training.resume=true"], ["no checkpoint", "start without it"]),
    (
        "a resumed run with another learning rate",
        lambda p: [f"output.dir={p.earlier_run()}", "training.resume=true", "training.learning_rate=1e-4"],
        ["`training.learning_rate` is 0.0001 now and was 0.005", "start a new run"],
    ),
    (
        "a resumed run on other data",
        lambda p: [
            f"output.dir={p.earlier_run()}",
            "training.resume=true",
            f"data.train={p.file('x.csv', 'text,label', REVIEWS)}",
        ],
        ["`data.train`", "start a new run"],
    ),
]

EVALUATE: list[Row] = [
    ("nothing trained", lambda p: [], ["sgm_finetuned.pth", "sgm finetune"]),
    (
        "code in the file",
        lambda p: [f"output.dir={pickled(p.output / 'sgm_finetuned.pth').parent}"],
        ["could be code", "sgm finetune"],
    ),
    (
        "a file cut short",
        lambda p: [f"output.dir={truncated(p.earlier_run() / 'sgm_finetuned.pth').parent}"],
        ["sgm_finetuned.pth", "cut short", "sgm finetune"],
    ),
    (
        "a file of something else",
        lambda p: [f"output.dir={torch.save({'a': 1}, p.earlier_run() / 'sgm_finetuned.pth') or p.output}"],
        ["sgm_finetuned.pth", "not written by"],
    ),
    (
        "test data with other labels",
        lambda p: [
            f"output.dir={p.earlier_run()}",
            f"data.train={p.file('x.csv', 'text,label', REVIEWS.replace('bad', 'sad'))}",
        ],
        ["['good', 'sad']", "['bad', 'good']"],
    ),
    (
        "another base model",
        lambda p: [f"output.dir={p.earlier_run()}", f"model.name={p.bert}"],
        ["sgm_finetuned.pth", "base model"],
    ),
    ("an unknown key", lambda p: [f"output.dir={p.earlier_run()}", "model.nane=x"], ["`model.nane`", "`name`"]),
    (
        "more tokens than positions",
        lambda p: [f"output.dir={p.earlier_run()}", "data.max_length=513"],
        ["513", "512 positions"],
    ),
    (
        "a harness that does not go with the task, before the base model is looked for",
        lambda p: [f"output.dir={p.earlier_run()}", "evaluation.harness=[arc_easy]", f"model.name={p.folder / 'gone'}"],
        ["evaluation.harness", "model.task=sequence-classification"],
    ),
]

SCAN: list[Row] = [
    ("no such model", lambda p: [str(p.folder / "x")], ["No model folder", "hub id"]),
    ("no model", lambda p: [], ["'model'", "--help"]),
    ("a share above one", lambda p: [str(p.llama), "--top-fraction", "2"], ["2.0", "at most 1"]),
    ("a share of nothing", lambda p: [str(p.llama), "--top-fraction", "0.5"], ["--format axolotl"]),
    ("a share that is text", lambda p: [str(p.llama), "--top-fraction", "half"], ["--top-fraction", "--help"]),
    ("no share where one is needed", lambda p: [str(p.llama), "--format", "axolotl"], ["--top-fraction 0.5"]),
    ("an unknown option", lambda p: [str(p.llama), "--estimate", "mp"], ["--estimate", "--help"]),
    ("an unknown estimator", lambda p: [str(p.llama), "--estimator", "iqr"], ["'iqr'", "'mp'"]),
    ("a file that exists", lambda p: [str(p.llama), "-o", str(p.file("s.json", "mine"))], ["s.json", "--output"]),
    ("a folder without weights", lambda p: [str(without(p.model(), "model.safetensors"))], ["safetensors"]),
    ("weights cut short", lambda p: [str(truncated(p.model() / "model.safetensors"))], ["model.safetensors"]),
    ("histograms of nothing", lambda p: [str(p.llama), "--matrix", "*q_proj"], ["--plot FOLDER"]),
    ("a matrix that there is not", lambda p: plotted(p, "model.layers.0.mlp.up_prj"), ["did you mean", ".up_proj?"]),
    ("a pattern of nothing", lambda p: plotted(p, "*query"), ["*query", "pattern"]),
    (
        "pictures over others",
        lambda p: [str(p.llama), "--plot", str(p.file("x", "mine").parent)],
        ["not an empty folder"],
    ),
    ("a file for pictures", lambda p: [str(p.llama), "--plot", str(p.file("x", "mine"))], ["not an empty folder"]),
    ("two things on stdout", lambda p: [str(p.llama), "--json", "--format", "spectrum"], ["--json", "leave one"]),
    ("a file that holds no scan", lambda p: [str(p.file("s.json", '{"a": 1}'))], ["s.json", "is no scan"]),
    ("results of the other estimator", lambda p: [published(p), "--estimator", "mp"], ["spectrum, not mp"]),
    ("a control of results", lambda p: [published(p), "--control"], ["--control", "give the model itself"]),
    ("histograms of results", lambda p: [published(p), "--plot", str(p.output), "--matrix", "*"], ["--matrix"]),
    (
        "nothing but infinities",
        lambda p: [published(p), "--format", "axolotl", "--top-fraction", "0.5"],
        ["finite SNR"],
    ),
    ("a weight that is no number", lambda p: [str(with_nan(p.model()))], ["layers.2.mlp.up_proj", "finite"]),
]


def with_result(place: Place, to: str, *more: str) -> list[str]:
    """Arguments of `sgm export` for a copy of a finished run."""
    return ["--to", to, f"output.dir={place.earlier_run()}", *more]


def foreign(place: Place) -> Path:
    """A folder that belongs to the user."""
    (place.folder / "mine").mkdir()
    return place.file("mine/a.txt", "mine").parent


def earlier(place: Place) -> Path:
    """A folder that `sgm export` has written."""
    (place.folder / "mine").mkdir()
    return place.file("mine/export.json", "{}").parent


def unweighted_decoder(place: Place, name: str, **changes: str) -> str:
    """The override that names the result of a language model, whose base has lost its weights since."""
    (place.folder / "words.txt").write_text(TEXT)
    model, output = save_pico(name, place.folder / "decoder"), place.folder / "out"
    train(with_config(model, **changes), "causal-lm", place.folder / "words.txt", output)
    (model / "model.safetensors").write_bytes(b"")
    return f"output.dir={output}"


EXPORT: list[Row] = [
    ("nothing trained", lambda p: ["--to", "merged"], ["sgm_finetuned.pth", "sgm finetune"]),
    ("no format", lambda p: [], ["--to", "--help"]),
    ("an unknown format", lambda p: ["--to", "onnx"], ["'onnx'", "'gguf'"]),
    ("a type of another format", lambda p: ["--to", "merged", "--gguf-type", "f16"], ["--gguf-type f16", "--to gguf"]),
    ("an unknown type", lambda p: ["--to", "gguf", "--gguf-type", "q4"], ["'q4'", "'q8_0'"]),
    ("a type of whole models", lambda p: ["--to", "gguf-adapter", "--gguf-type", "q8_0"], ["q8_0", "--gguf-type f16"]),
    ("weights for an adapter", lambda p: ["--to", "adapter", "--base", "original"], ["--base original", "--to merged"]),
    (
        "a calibration of another format",
        lambda p: ["--to", "bnb-4bit", "--calibration", "64"],
        ["--calibration 64", "--to compressed-tensors"],
    ),
    ("a calibration on nothing", lambda p: ["--to", "compressed-tensors", "--calibration", "0"], ["--calibration"]),
    (
        "a quantised base for bitsandbytes",
        lambda p: with_result(p, "bnb-4bit", f"model.name={with_config(p.model(), quantization_config=GPTQ)}"),
        ["gptq", "--to adapter"],
    ),
    (
        "trained weights of a plain base",
        lambda p: with_result(p, "merged", "--base", "trained"),
        ["model.quantization=none", "--base"],
    ),
    ("data that are not there", lambda p: with_result(p, "merged", "data.train=none.csv"), ["none.csv"]),
    (
        "an architecture that llama.cpp gets otherwise, before the base model is loaded",
        lambda p: ["--to", "gguf", unweighted_decoder(p, "olmo2")],
        ["olmo2", "gemma2, gemma3_text, gpt2, llama, mistral, mixtral, phi3, qwen2", "--to merged"],
    ),
    (
        "a model that llama.cpp computes otherwise, before it is loaded",
        lambda p: ["--to", "gguf", unweighted_decoder(p, "mistral", hidden_act="gelu")],
        ["mistral", "activation gelu there, but silu", "--to merged"],
    ),
    ("a classifier for llama.cpp", lambda p: with_result(p, "gguf"), ["model.task=causal-lm", "--to merged"]),
    ("an unknown key", lambda p: with_result(p, "merged", "output.overwite=true"), ["`output.overwite`", "overwrite"]),
    (
        "a folder with something else in it",
        lambda p: with_result(p, "merged", "--output", str(foreign(p))),
        ["not an earlier export", "--output"],
    ),
    (
        "an earlier export",
        lambda p: with_result(p, "merged", "--output", str(earlier(p))),
        ["exists", "output.overwrite=true"],
    ),
    (
        "a folder inside a file",
        lambda p: with_result(p, "merged", "--output", str(p.file("a", "mine") / "b")),
        ["cannot be written", "--output"],
    ),
    (
        "another base model",
        lambda p: with_result(p, "merged", f"model.name={p.bert}"),
        ["sgm_finetuned.pth", "base model"],
    ),
    (
        "a base model that is gone",
        lambda p: with_result(p, "merged", f"model.name={p.folder / 'gone'}"),
        ["No model folder"],
    ),
    (
        "a base model that is quantised in its files",
        lambda p: with_result(p, "merged", f"model.name={with_config(p.model(), quantization_config=GPTQ)}"),
        ["gptq", "--to adapter"],
    ),
    (
        "a base model cut short",
        lambda p: with_result(p, "merged", f"model.name={truncated(p.model() / 'model.safetensors').parent}"),
        ["model.safetensors", "cut short"],
    ),
    ("no token of the hub", lambda p: with_result(p, "merged", "--push-to-hub", "me/mine"), ["token", "hf auth login"]),
    ("no name of a repository", lambda p: with_result(p, "merged", "--push-to-hub", "a/b/c"), ["a/b/c", "owner/name"]),
    ("a repository of nobody", lambda p: with_result(p, "merged", "--push-to-hub", "mine"), ["owner/mine"]),
]
GPTQ = {"quant_method": "gptq", "bits": 4}

OTHER: list[Row] = [
    (
        "nothing to answer, before the base model is looked for",
        lambda p: ["generate", f"output.dir={p.earlier_run()}", "-i", "none.csv", f"model.name={p.folder / 'gone'}"],
        ["none.csv"],
    ),
    (
        "no conversation, before the base model is looked for",
        lambda p: ["chat", f"output.dir={p.earlier_run()}", f"model.name={p.folder / 'gone'}"],
        ["sgm chat is for causal-lm"],
    ),
    ("plan: a file that exists", lambda p: ["plan", "-o", str(p.file("p.json", "mine"))], ["p.json", "overwrite=true"]),
    ("plan: an unknown key", lambda p: ["plan", "merge.thresh=1"], ["`merge.thresh`", "`threshold`"]),
    ("no such command", lambda p: ["finetun"], ["finetun", "--help"]),
]


SHIP: list[Row] = [
    ("a missing test file", lambda p: [str(p.earlier_run()), "--task-test", "none.csv"], ["--task-test", "none.csv"]),
    (
        "a test file with other labels",
        lambda p: [str(p.earlier_run()), "--task-test", str(p.file("x.csv", "text,label", "a film,mixed"))],
        ["'mixed'", "known: bad, good"],
    ),
    (
        "a harness task for a classifier",
        lambda p: [str(p.earlier_run()), "--keep", "arc_easy"],
        ["--keep", "model.task=sequence-classification"],
    ),
    (
        "the harness tasks of a run",
        lambda p: [str(p.earlier_run()), "evaluation.harness=[arc_easy]"],
        ["evaluation.harness", "--keep"],
    ),
    (
        "a base model that is gone",
        lambda p: [str(p.earlier_run()), f"model.name={p.folder / 'gone'}"],
        ["No model folder"],
    ),
    ("an unknown key", lambda p: [str(p.earlier_run()), "data.tets=a.csv"], ["`data.tets`", "`test`"]),
]


@pytest.fixture(scope="module")
def finished(llama_folder, reviews, tmp_path_factory) -> Path:
    """The output folder of a finished pico run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "empty.yaml").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--config", str(folder / "empty.yaml"), *pico(llama_folder, reviews, folder / "out")])
    assert caught.value.code == 0
    return folder / "out"


def pico(model: Path, data: Path, output: Path) -> list[str]:
    return [
        f"model.name={model}", "model.dtype=float32", f"data.train={data}", "data.max_length=32",
        "probe.num_batches=2", "probe.sketch_size=12", "adapter.rank=4", "training.max_steps=2",
        "training.batch_size=16", "training.learning_rate=5e-3", f"output.dir={output}",
    ]  # fmt: skip


@pytest.fixture
def place(tmp_path, llama_folder, bert_folder, finished) -> Place:
    return Place(tmp_path, llama_folder, bert_folder, finished)


@pytest.fixture(autouse=True)
def _as_a_fresh_process(monkeypatch):
    """Sets what Transformers reads at its import, because an earlier test may have imported it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity_warning()


def tree(folder: Path) -> dict[str, bytes | None]:
    """The bytes of every file below `folder`, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def rows(table: list[Row]):
    return pytest.mark.parametrize(("build", "parts"), [row[1:] for row in table], ids=[row[0] for row in table])


def refused(arguments: list[str], parts: list[str], place: Place, capfd) -> None:
    before = tree(place.folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capfd.readouterr().err
    assert caught.value.code == 2, error
    assert error.count("\n") == 1, error
    assert error.strip(), "no message"
    assert "Traceback" not in error
    for part in parts:
        assert part in error
    assert tree(place.folder) == before


@rows(CONFIGURATION + DATA + TASKS + SCALE + MODEL + PLAN + OUTPUT)
def test_finetune_refuses_in_one_line_and_writes_nothing(build, parts, place, reviews, capfd):
    empty = place.file("empty.yaml", "")
    defaults = pico(place.llama, reviews, place.output)
    refused(["finetune", "--config", str(empty), *defaults, *build(place)], parts, place, capfd)


@rows(EVALUATE)
def test_evaluate_refuses_in_one_line_and_writes_nothing(build, parts, place, capfd):
    empty = place.file("empty.yaml", "")
    arguments = build(place)
    default = [] if any(a.startswith("output.dir=") for a in arguments) else [f"output.dir={place.output}"]
    refused(["evaluate", "--config", str(empty), *default, *arguments], parts, place, capfd)


@rows(SCAN)
def test_scan_refuses_in_one_line_and_writes_nothing(build, parts, place, capfd):
    refused(["scan", *build(place)], parts, place, capfd)


@rows(EXPORT)
def test_export_refuses_in_one_line_and_writes_nothing(build, parts, place, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    empty = place.file("empty.yaml", "")
    arguments = build(place)
    default = [] if any(a.startswith("output.dir=") for a in arguments) else [f"output.dir={place.output}"]
    refused(["export", "--config", str(empty), *arguments, *default], parts, place, capfd)


@rows(SHIP)
def test_ship_refuses_in_one_line_and_writes_nothing(build, parts, place, capfd):
    refused(["ship", *build(place)], parts, place, capfd)


@rows(OTHER)
def test_other_commands_refuse_in_one_line_and_write_nothing(build, parts, place, capfd, monkeypatch):
    place.file("config.yaml", "")
    monkeypatch.chdir(place.folder)
    refused(build(place), parts, place, capfd)


def test_a_refusal_also_stands_in_the_exit_status_of_a_dry_run(place, capfd):
    empty = place.file("empty.yaml", "")
    command = ["finetune", "--dry-run", "--config", str(empty), f"output.dir={place.output}"]
    refused(command, ["No data", "data.train=FILE"], place, capfd)
