"""What `sgm scan` does: read or measure, show, write, draw."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_text
from sgm_finetune.measure.scan import matrix_names, measured_spectra, scan
from sgm_finetune.measure.scan_formats import (
    axolotl_format,
    json_format,
    load_scan,
    selection_notes,
    spectrum_format,
)
from sgm_finetune.measure.scan_result import Scan
from sgm_finetune.method.snr import Estimator
from sgm_finetune.results.report.scan_table import (
    kinds_in_order,
    lowest_median_highest,
    scan_summary,
    scan_table,
)

Format = Literal["json", "spectrum", "axolotl"]


class ScanInterrupted(Exception):  # noqa: N818 - the user's wish, not an error
    """The scan was stopped; what it had finished is remembered."""


def scan_to(
    model: str,
    console: Console,
    *,
    output: Path | None = None,
    format: Format | None = None,
    estimator: Estimator | None = None,
    top_fraction: float | None = None,
    control: bool = False,
    plot: Path | None = None,
    matrices: Sequence[str] = (),
    fresh: bool = False,
) -> Scan:
    """Scans `model`, or reads a file of results, shows a table on `console`, and writes `output` or prints on stdout.

    Nothing is printed on stdout where neither `output` nor `format` is given. `plot` is a folder for pictures: the heat
    map, and the histogram of `matrices` (names, or patterns with * and ?), else of one matrix of each kind. Raises
    UserError before anything is read for what can be known then, and ScanInterrupted.
    """
    if output is not None and output.exists():
        raise UserError(f"{output} exists; name another --output")
    if plot is not None and plot.exists() and not (plot.is_dir() and not any(plot.iterdir())):
        raise UserError(f"{plot} is no empty folder; name another --plot")
    is_file = Path(model).expanduser().is_file() and Path(model).suffix == ".json"
    if is_file and (control or matrices or fresh):
        option = "--control" if control else "--matrix" if matrices else "--fresh"
        raise UserError(f"{model} holds results of a scan, and {option} needs the weights; give the model itself")
    drawn = _matching(model, matrix_names(model, estimator or "mp"), matrices) if matrices else []
    log = StepLog(console)
    scanned = load_scan(model, estimator) if is_file else _measured(model, estimator or "mp", control, fresh, log)
    text = _text(scanned, format, top_fraction)
    console.print(scan_table(scanned, console.width))
    log.line("scan", scan_summary(scanned))
    if top_fraction is not None:
        for note in selection_notes(scanned, top_fraction):
            log.line("", note)
    if plot is not None:
        for path in draw_scan(scanned, None if is_file else model, drawn, plot, log):
            log.line("drawn", str(path))
    if output is not None:
        write_text(output, text)
        log.line("saved", str(output))
    elif format is not None:
        print(text, end="", flush=True)
    return scanned


def draw_scan(scan: Scan, model: str | None, names: Sequence[str], folder: Path, log: StepLog) -> list[Path]:
    """Writes PNG files into `folder`: the heat map and, where the model's weights are at hand, histograms of the
    matrices called so (none: of the matrix of each kind that has the median SNR)."""
    from sgm_finetune.results.report.scan_figures import save_heat_map, save_histogram

    paths = [folder / "snr.png"]
    save_heat_map(scan, paths[0])
    if model is None:
        return paths
    chosen = names or [
        lowest_median_highest(m for m in scan.matrices if m.kind == kind)[1].name
        for kind in kinds_in_order(scan.matrices)
    ]
    with log.bar("draw") as progress:
        for found, matrix in measured_spectra(model, chosen, scan.estimator):
            paths.append(folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', matrix.name).strip('-')}.png")
            save_histogram(found, matrix, paths[-1])
            progress(len(paths) - 1, len(chosen))
    return paths


def _measured(model: str, estimator: Estimator, control: bool, fresh: bool, log: StepLog) -> Scan:
    told = [0, 0]
    with log.bar("scan") as progress:

        def tell(done: int, total: int, name: str) -> None:
            told[:] = done, total
            progress(done, total)

        try:
            told[1] = len(matrix_names(model, estimator))  # results come in order: many may be kept and none told yet
            return scan(model, estimator=estimator, control=control, fresh=fresh, progress=tell)
        except KeyboardInterrupt:
            so_far = f" after {told[0]} of {told[1]} matrices; the same command goes on there" if told[1] else ""
            raise ScanInterrupted(f"Interrupted{so_far}") from None


def _text(scan: Scan, format: Format | None, top_fraction: float | None) -> str:
    match format:
        case "axolotl":
            assert top_fraction is not None  # the command line asks for it before anything is read
            return axolotl_format(scan, top_fraction)
        case "spectrum":
            return spectrum_format(scan)
        case _:
            return json_format(scan)


def _matching(model: str, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that the patterns are, or match; UserError for a pattern of nothing."""
    wanted: set[str] = set()
    for pattern in patterns:
        expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
        found = [name for name in names if re.fullmatch(expression, name)]
        if not found:
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f"did you mean {near[0]}?" if near else "give a whole name, or a pattern such as '*v_proj'"
            raise UserError(f"{model} has no weight matrix {pattern}; {hint}")
        wanted.update(found)
    return [name for name in names if name in wanted]
