"""docs/results.md and its pictures, from benchmarks/results/quality.jsonl (`python benchmarks/quality.py --tables`)."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from quality_methods import THRESHOLDS, Method

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
"""Section -> the method whose loss is subtracted, where it is not `REFERENCE`."""

SPECTRAL_FORMS = (
    "SGM", "SGM, nothing shared", "SGM, random start", "LoRA, our step",
    "SGM, a third of the bytes", "LoRA, our step, a third of the bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A method's runs on a task with the learning rate that validation chose."""

    method: str
    rate: float
    at_edge: bool
    """The chosen rate is the smallest or largest of those tried."""
    runs: dict[int, dict]
    """By seed."""

    @property
    def one(self) -> dict:
        return next(iter(self.runs.values()))

    def numbers(self, name: str) -> list[float]:
        return [run["test"][name] for run in self.runs.values()]

    def paired(self, reference: Finished) -> list[float]:
        """Test loss minus the reference's, where both have a seed."""
        seeds = self.runs.keys() & reference.runs.keys()
        return [self.runs[s]["test"]["loss"] - reference.runs[s]["test"]["loss"] for s in sorted(seeds)]

    @property
    def state_bytes(self) -> int:
        """Of what is trained and its optimizer state."""
        return 4 * self.one["trained_parameters"] + self.one["optimizer_bytes"]


def standard_error(values: list[float]) -> float:
    """0 of a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def mean_error(values: list[float], form: str) -> str:
    """Mean ± standard error."""
    mean = format(statistics.fmean(values), form).replace("-", "−")
    return f"{mean} ± {format(standard_error(values), form.lstrip('+'))}" if len(values) > 1 else mean


def essentials(done: Finished | None, reference: Finished | None) -> list[str]:
    """MiB trained and kept by the optimizer, test loss, and its paired difference to the reference."""
    if done is None:
        return ["–", "–", "–"]
    paired = done.paired(reference) if reference and reference is not done else []
    return [
        f"{done.state_bytes / 2**20:.2f}" if done.one["steps"] else "–",
        mean_error(done.numbers("loss"), ".4f"),
        mean_error(paired, "+.4f") if paired else "–",
    ]


def row(done: Finished, reference: Finished | None) -> str:
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
    """None with fewer than two rows."""
    rows = [row(finished[m], reference) for m in methods if m in finished]
    header = HEADER.format(reference=reference.method if reference else REFERENCE)
    return "\n".join([header, *rows]) if len(rows) > 1 else None


MARK = "<!-- python benchmarks/quality.py --tables -->"
"""In README.md, before and after its table."""
HEADLINE_TASKS = "sentiment", "summaries"
HEADLINE = (
    "untouched", "LoRA", "rsLoRA", "LoRA+", "VeRA", "Lily", "MiSS", "LoRA, our step", "SGM",
    "LoRA, our step, a third of the bytes", "SGM, a third of the bytes",
)  # fmt: skip


def headline(finished: dict[str, dict[str, Finished]]) -> str:
    """The one table that README shows; `finished`: task -> method -> its runs."""
    titles = [f"{task}: MiB | test loss | minus LoRA" for task in finished]
    lines = [f"| method | {' | '.join(titles)} |", f"|---|{'---|' * (3 * len(titles))}"]
    for method in HEADLINE:
        if any(method in methods for methods in finished.values()):
            parts = [essentials(methods.get(method), methods.get(REFERENCE)) for methods in finished.values()]
            lines.append(f"| {' | '.join([method, *itertools.chain(*parts)])} |")
    return "\n".join(lines)


COST_HEADER = "| method | seconds per step | of LoRA's | measuring, s | peak resident, GiB |\n|---|---|---|---|---|"


def cost_table(finished: dict[str, Finished], speeds: dict[str, dict]) -> str | None:
    """What runs cost in time (`speeds`: rows of --speed) and memory. None with fewer than two methods."""
    wanted = [*SECTIONS["All methods"], "LoRA, our step"]
    rows = []
    for done in (finished[method] for method in wanted if method in finished and finished[method].one["steps"]):
        speed = speeds.get(done.method)
        seconds = [f"{speed['seconds_per_step']:.2f}", f"{speed['ratio_to_lora']:.2f}"] if speed else ["–", "–"]
        measuring = statistics.median(run["measuring_seconds"] for run in done.runs.values())
        peak = max(run["peak_resident_bytes"] for run in done.runs.values()) / 2**30
        rows.append(f"| {done.method} | {' | '.join(seconds)} | {measuring or '–'} | {peak:.2f} |")
    return "\n".join([COST_HEADER, *rows]) if len(rows) > 1 else None


def recorded_speeds(task: str) -> dict[str, dict]:
    """Method -> its row of the latest `--speed` run that has it."""
    path = RESULTS / "quality_speed.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {row["method"]: row for record in records for row in record["rows"] if row["task"] == task}


def best_rate(losses: dict[float, float]) -> float:
    """The learning rate (rate -> validation loss) of the lowest loss; one that is not finite is the highest."""
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def validation_losses(
    runs: list[dict], task: str, method: str, rates: tuple[float, ...], tuning_seed: int
) -> dict[float, float]:
    """Rate -> validation loss, of those rates that have been tried, in their order."""
    losses = {
        run["rate"]: run["validation"]["loss"]
        for run in runs
        if (run["task"], run["method"], run["seed"]) == (task, method, tuning_seed)
    }
    return {rate: losses[rate] for rate in rates if rate in losses}


def tests_at(runs: list[dict], task: str, method: str, rate: float, tuning_seed: int) -> dict[int, dict]:
    """Seed -> run on test data, of all seeds but that of tuning."""
    wanted = (task, method, rate)
    found = {r["seed"]: r for r in runs if (r["task"], r["method"], r["rate"]) == wanted and r["seed"] != tuning_seed}
    return dict(sorted(found.items()))


def finished_runs(
    runs: list[dict], task: str, rates: dict[str, tuple[float, ...]], tuning_seed: int
) -> dict[str, Finished]:
    """Every method with a rate that was chosen among all of its own, and a test run at it."""
    done = {}
    for method, tried in rates.items():
        losses = validation_losses(runs, task, method, tried, tuning_seed)
        if len(losses) < len(tried):
            continue
        rate = best_rate(losses)
        tests = tests_at(runs, task, method, rate, tuning_seed)
        if tests:
            edge = len(tried) > 1 and rate in (min(tried), max(tried))
            done[method] = Finished(method, rate, edge, tests)
    return done


def at_default_rates(runs: list[dict], task: str, methods: dict[str, Method], tuning_seed: int) -> dict[str, Finished]:
    """The methods that have a default learning rate, with their test runs at it."""
    rates = {name: method.default for name, method in methods.items() if method.default is not None}
    tested = {name: tests_at(runs, task, name, rate, tuning_seed) for name, rate in rates.items()}
    return {name: Finished(name, rates[name], False, tests) for name, tests in tested.items() if tests}


def tries(runs: list[dict], task: str, rates: dict[str, tuple[float, ...]], tuning_seed: int) -> str | None:
    """Validation loss of every learning rate tried, the chosen one in bold."""
    rows = []
    for method, tried in rates.items():
        losses = validation_losses(runs, task, method, tried, tuning_seed)
        if len(tried) > 1 and losses:
            best = best_rate(losses)
            cells = [f"{rate:g}: {loss:.4f}" for rate, loss in losses.items()]
            marked = [f"**{cell}**" if rate == best else cell for rate, cell in zip(losses, cells, strict=True)]
            rows.append(f"| {method} | {' · '.join(marked)} |")
    return "\n".join(["| method | learning rate: validation loss |", "|---|---|", *rows]) if rows else None


def picture(task: str, finished: dict[str, Finished], path: Path) -> None:
    """Test loss against trained and optimizer bytes, one point a method, with standard errors."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for done in finished.values():
        if done.method not in {*SECTIONS["All methods"], *SECTIONS["Bytes"]} - {"untouched", "all weights"}:
            continue
        losses = done.numbers("loss")
        place = done.state_bytes / 2**20, statistics.fmean(losses)
        ours = done.method.startswith("SGM") or "our step" in done.method
        axes.errorbar(*place, yerr=standard_error(losses), fmt="o", capsize=3, color="tab:blue" if ours else "tab:gray")
        label, below = done.method.replace("a third of the bytes", "⅓ of the bytes"), done.method.startswith("SGM")
        left = done.method in ("SGM, across layers", "MiSS", "Lily")  # where others are near
        axes.annotate(
            label, place, xytext=(-6 if left else 6, -11 if below else 4), textcoords="offset points", fontsize=8,
            ha="right" if left else "left", color="tab:blue" if ours else "black",
        )  # fmt: skip
    axes.margins(x=0.15)
    axes.set_xlabel("trained parameters and optimizer state, MiB")
    axes.set_ylabel("test loss")
    axes.set_title(task)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def threshold_picture(task: str, finished: dict[str, Finished], path: Path) -> bool:
    """Test loss against the held-out energy that merged bases keep, at one rank, a point a threshold; False where
    fewer than three were run."""
    studied = {float(m.split()[1]): done for m, done in finished.items() if m.startswith("threshold ")}
    if len(studied) < 3:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (threshold, done) in enumerate(sorted(studied.items())):
        losses = done.numbers("loss")
        place = 100 * statistics.fmean(run["energy_retained"] for run in done.runs.values()), statistics.fmean(losses)
        axes.errorbar(*place, yerr=standard_error(losses), fmt="o", capsize=3, color="tab:blue")
        label = f"{threshold:g}, {done.one['trained_parameters'] / 1e6:.2f} M"
        below = number % 2 == 1  # neighbours may be near
        end = place[1] + standard_error(losses) * (-1 if below else 1)
        offset = {"xytext": (0, -12 if below else 4), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(label, (place[0], end), **offset)  # type: ignore[arg-type]
    axes.margins(x=0.15, y=0.12)
    axes.set_xlabel("held-out gradient energy kept, % of what own bases keep")
    axes.set_ylabel("test loss")
    axes.set_title(f"{task}: merge.threshold between layers, and what is trained")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return True


INTRODUCTION = """# Results: adapters beside each other

Made by `python benchmarks/quality.py` from [benchmarks/results/quality.jsonl](../benchmarks/results/quality.jsonl);
do not edit.

Every method adapts all linear layers inside the blocks of the same base model (the controls of selection: half of
them), on the same batches, for as many steps. Three learning rates (MiSS, VeRA: four, to reach their best) are tried
with a seed of their own, the validation loss decides, and only then other seeds are trained and measured on test data.
Warm-up over 6 % of the steps, then a linear fall to zero; gradients clipped to norm 1; AdamW without weight decay where
nothing else is said. Rank: the largest whose trained adapter parameters stay within the task's budget, plain LoRA's;
VeRA's is 256, as its authors have it.

Columns: *trained*, adapter parameters without a new classification head; *trained + optimizer*, their bytes and those
of their optimizer's states; *file*, what `save_pretrained` writes of the adapter (shared factors are written once for
each layer, so that any PEFT loads them); *rate*, the learning rate chosen, with a star where it is the smallest or
largest of those tried; *minus LoRA* (or another), the mean of the differences at equal seeds; *right*, accuracy, or the
share of answers that greedy decoding gives to the letter. ± is the standard error over seeds.

*At the default learning rate*: what those get who tune nothing; LoRA, with which they are compared, is tuned. *Time and
memory*: seconds per step are medians of interleaved repeats, with the machine to themselves (`--speed`,
[benchmarks/results/quality_speed.json](../benchmarks/results/quality_speed.json)); *measuring*, scan, probe and plan of
a run; *peak resident*, the most of any run, data and evaluation included.
How fast a step is and what it holds beside PEFT's, on a CPU and, with the card's name, on a GPU, is in
[speed.md](speed.md); all tables here were made without one.
"""


def write_page(runs: list[dict], tasks: dict, methods: dict[str, Method], tuning_seed: int, root: Path = ROOT) -> None:
    """docs/results.md, its pictures, and the first table of README.md, in `root`."""
    folder = root / "docs"
    rates = {name: method.rates for name, method in methods.items()}
    every = {name: finished_runs(runs, name, rates, tuning_seed) for name in tasks}
    short = headline({name: every[name] for name in HEADLINE_TASKS})
    parts = [INTRODUCTION, f"## In short\n\n{short}\n"]
    for name, task in tasks.items():
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
        parts.append(f"## {name}\n\n{described(task, finished)}\n")
        if len(finished) > 3:
            path = folder / "figures" / f"quality-{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(name, finished, path)
            parts.append(f"![Test loss against bytes](figures/{path.name})\n")
            path = folder / "figures" / f"quality-{name}-threshold.png"
            if threshold_picture(name, finished, path):
                parts.append(f"![Test loss against merge.threshold](figures/{path.name})\n")
        parts += [f"### {name}: {title}\n\n{body}\n" for title, body in sections if body]
        if tried := tries(runs, name, rates, tuning_seed):
            parts.append(f"### {name}: Learning rates tried\n\n{tried}\n")
    (folder / "results.md").write_text("\n".join(parts), encoding="utf-8")
    readme = root / "README.md"
    before, first, rest = readme.read_text(encoding="utf-8").partition(f"{MARK}\n")
    readme.write_text(f"{before}{first}{short}\n{rest[rest.index(MARK) :]}", encoding="utf-8")


def described(task, finished: dict[str, Finished]) -> str:
    tests = [run for done in finished.values() for run in done.runs.values()]
    tiers = sorted({f"{run['tier']} ({run['device']})" for run in tests})
    versions = sorted({", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in tests})
    return (
        f"{task.about} Base model {task.model}, {task.num_steps} steps of {task.batch_size}; "
        f"{tests[0]['test']['num_examples']:,} test examples. Tier: {'; '.join(tiers)}. {'; '.join(versions)}."
    )
