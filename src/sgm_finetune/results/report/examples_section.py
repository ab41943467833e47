"""The section "Examples": a sample of what changed or stayed wrong, and the counts of all compared examples."""

from __future__ import annotations

from typing import Any

from sgm_finetune.base.config import DECODER_TASKS
from sgm_finetune.results.outcomes import SHOWN_SORTS, SORTS
from sgm_finetune.results.report.formats import count
from sgm_finetune.results.report.run_files import Run

MANY_EXAMPLES = 6
"""More examples than these are folded."""
MANY_CLASSES = 6
"""With more classes than these, the counts of each class are left out."""

_WORDS = {
    "class": ("became right", "became wrong", "stayed wrong", "stayed right"),
    "number": ("came closer", "moved further away", "stayed equally far", ""),
    "answer": ("became equal to the reference", "became different from it", "stayed different", "stayed equal"),
}


def examples_section(run: Run) -> dict[str, Any]:
    """Returns the section's values for the template; `examples` is [] where nothing was compared."""
    found = run.examples.get("examples", [])
    kind = "class"
    if "r2" in run.metrics["after"]:
        kind = "number"
    elif run.config.model.task in (*DECODER_TASKS, "seq2seq-lm"):
        kind = "answer"
    words: dict[str, str] = dict(zip(SORTS, _WORDS[kind], strict=True))
    by_class = run.examples.get("by_class") or {}
    has_long_text = any(len(one[key]) > 40 for one in found for key in ("truth", "before", "after"))
    return {
        "examples": [{**one, "words": words.get(one["became"], one["became"])} for one in found],
        "example_rows": _rows(run.examples, words),
        "example_columns": list(by_class) if len(by_class) <= MANY_CLASSES else [],
        "example_classes": sorted({one["class"] for one in found if one.get("class")}),
        "example_sorts": [(sort, words[sort]) for sort in SORTS if any(one["became"] == sort for one in found)],
        "examples_summary": _summary(run.examples, run.metrics["after"].get("num_examples"), kind),
        "examples_first": MANY_EXAMPLES,
        "between": "\n" if has_long_text else " · ",
        "truth_name": "reference" if kind == "answer" else "true",
    }


def _summary(examples: dict[str, Any], tested: int | None, kind: str) -> str:
    """Returns a sentence that says what the shown examples are."""
    shown, compared = len(examples.get("examples", [])), examples.get("num_compared", 0)
    if "counts" not in examples:
        total = sum(examples.get("num_changed", {}).values())
        return (
            f"The {'answer' if kind == 'answer' else 'prediction'} changed for {count(total)} of the first "
            f"{count(compared)} test examples. Shown are the first {count(shown)} in the order of the file: an older "
            "version of sgm chose them, so they are not a sample of all."
        )
    eligible = sum(examples["counts"][sort] for sort in SHOWN_SORTS)
    of = f"{count(compared)} test examples"
    if kind == "answer":
        of = f"the first {count(compared)} answers"
    elif tested is not None and tested > compared:
        of = f"{count(compared)} test examples, drawn at random from {count(tested)}"
    which = "not stay equally far" if kind == "number" else "not stay equal" if kind == "answer" else "not stay right"
    if shown == eligible:
        return f"All {count(eligible)} of {of} that did {which}."
    each = " and every class" if examples.get("by_class") else ""
    return (
        f"These {count(shown)} are a random sample of the {count(eligible)} examples that did {which}, of {of}. Each "
        f"sort{each} has its share, but a rare sort at least three. The table counts all of them."
    )


def _rows(examples: dict[str, Any], words: dict[str, str]) -> list[tuple[str, str, int, list[int], int]]:
    """Returns (sort, words, number, number in each class, number shown) of each sort."""
    counts, by_class = examples.get("counts") or examples.get("num_changed") or {}, examples.get("by_class") or {}
    shown = [one["became"] for one in examples.get("examples", [])]
    classes = by_class if len(by_class) <= MANY_CLASSES else {}
    return [
        (sort, words[sort], counts[sort], [numbers[sort] for numbers in classes.values()], shown.count(sort))
        for sort in SORTS
        if sort in counts and words[sort]
    ]
