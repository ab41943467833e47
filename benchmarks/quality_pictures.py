"""The pictures of docs/results.md and README.md, from benchmarks/results/quality.jsonl.

`python benchmarks/quality.py --tables` writes them all.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from quality_numbers import Finished, standard_error


def picture(task: str, finished: dict[str, Finished], path: Path) -> None:
    """Draws test loss against trained and optimizer bytes, one point a method, with standard errors."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for done in finished.values():
        losses = done.numbers("loss")
        place = done.state_bytes / 2**20, statistics.fmean(losses)
        ours = done.method.startswith("SGM") or "our step" in done.method
        axes.errorbar(*place, yerr=standard_error(losses), fmt="o", capsize=3, color="tab:blue" if ours else "tab:gray")
        label, below = done.method.replace("a third of the bytes", "⅓ of the bytes"), done.method.startswith("SGM")
        left = done.method in ("SGM, across layers", "MiSS", "Lily")  # other points are near on their right
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
    """Draws test loss against the held-out energy that merged bases keep, at one rank, one point a threshold.

    Draws nothing and returns False when fewer than three thresholds were run.
    """
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


@dataclass(frozen=True)
class Theme:
    """Colours of one version of README's picture."""

    suffix: str
    background: str
    text: str
    others: str
    step: str
    sgm: str


THEMES = (
    Theme("", background="#ffffff", text="#1f2328", others="#6e7781", step="#bc4c00", sgm="#0969da"),
    Theme("-dark", background="#0d1117", text="#e6edf3", others="#9198a1", step="#f0883e", sgm="#58a6ff"),
)
"""For GitHub's light and dark pages."""

RIGHT, LEFT = (7, 4), (-7, 4)
LABEL_OFFSETS = {
    ("sentiment", "Lily"): (7, -10),
    ("sentiment", "SGM"): (-7, -8),
    ("sentiment", "LoRA, our step"): (7, -6),
    ("sentiment", "LoRA, our step, a third of the bytes"): (-7, -11),
    ("summaries", "LoRA"): (7, -9),
    ("summaries", "Lily"): (7, -8),
    ("summaries", "MiSS"): LEFT,
    ("summaries", "SGM"): (-7, -10),
    ("summaries", "SGM, a third of the bytes"): (7, -11),
    ("summaries", "LoRA, our step, a third of the bytes"): LEFT,
}
"""(task, method) -> offset of its label in points, for labels that would meet another one at `RIGHT`."""


def readme_pictures(finished: dict[str, dict[str, Finished]], titles: dict[str, str], folder: Path) -> None:
    """Writes quality.png and quality-dark.png to `folder`: test loss against trained bytes, one panel a task.

    `finished`: task -> method -> its runs; `titles`: task -> title of its panel.
    """
    for theme in THEMES:
        colours = {
            "figure.facecolor": theme.background, "axes.facecolor": theme.background, "text.color": theme.text,
            "axes.labelcolor": theme.text, "axes.edgecolor": theme.others, "xtick.color": theme.text,
            "ytick.color": theme.text,
        }  # fmt: skip
        with plt.rc_context(colours):
            figure, panels = plt.subplots(1, len(finished), figsize=(10, 4), layout="constrained", squeeze=False)
            for axes, (task, methods) in zip(panels[0], finished.items(), strict=True):
                for done in methods.values():
                    _draw_method(axes, task, done, theme)
                axes.set_xlim(0, 1.22 * max(done.state_bytes for done in methods.values()) / 2**20)
                axes.set_title(titles[task], fontsize=11)
                axes.set_xlabel("trained parameters and optimizer state, MiB")
                axes.spines[["top", "right"]].set_visible(False)
            panels[0][0].set_ylabel("test loss (lower is better)")
            for name, colour in (
                ("other adapters, AdamW", theme.others),
                ("plain LoRA, our optimizer step", theme.step),
                ("SGM: shared factors, our step", theme.sgm),
            ):
                panels[0][0].plot([], [], "o", color=colour, label=name)
            panels[0][0].legend(loc="upper left", frameon=False, fontsize=9)
            figure.savefig(folder / f"quality{theme.suffix}.png", dpi=120, metadata={"Software": None})
            plt.close(figure)


def _draw_method(axes: Axes, task: str, done: Finished, theme: Theme) -> None:
    """A point at the method's mean test loss, with its standard error and its name."""
    colour, label = theme.others, done.method
    if done.method.startswith("SGM"):
        colour = theme.sgm
    elif "our step" in done.method:
        colour = theme.step
    if done.method.endswith("a third of the bytes"):
        label = "⅓ of the bytes"
    losses = done.numbers("loss")
    place = done.state_bytes / 2**20, statistics.fmean(losses)
    axes.errorbar(*place, yerr=standard_error(losses), fmt="o", capsize=3, color=colour)
    offset = LABEL_OFFSETS.get((task, done.method), RIGHT)
    side = "left" if offset[0] > 0 else "right"
    axes.annotate(label, place, xytext=offset, textcoords="offset points", fontsize=9, ha=side, color=colour)
