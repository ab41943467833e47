"""`sgm scan`: reads or computes a scan, shows it, writes it, draws it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import Interrupted, Terminated, UserError
from sgm_finetune.base.files import write_text
from sgm_finetune.commands.requests import ScanFormat, ScanRequest
from sgm_finetune.measure.scan import matrix_names, measured_singular_values, scan
from sgm_finetune.measure.scan_formats import (
    axolotl_format,
    json_format,
    load_scan,
    selection_notes,
    spectrum_format,
)
from sgm_finetune.measure.scan_result import Scan
from sgm_finetune.method.decibels import Estimator
from sgm_finetune.results.report.scan_table import (
    kinds_in_order,
    lowest_median_highest,
    scan_summary,
    scan_table,
)


def run_scan(request: ScanRequest, console: Console) -> Scan:
    """Scans the model or reads its results, shows a table on `console`, and writes the output or prints it on stdout.

    Without `output` and `format` it prints nothing on stdout. Raises UserError, and
    Interrupted when a signal stopped the scan: the cache keeps the matrices that it finished.
    """
    request.check()
    model, estimator, from_file = request.model, request.estimator or "mp", request.is_result_file
    drawn = _match_patterns(model, matrix_names(model, estimator), request.matrices) if request.matrices else []
    log = StepLog(console)
    scanned = load_scan(model, request.estimator) if from_file else _scan_with_bar(request, estimator, log)
    text = _format_scan(scanned, request.format, request.top_fraction)
    console.print(scan_table(scanned, console.width))
    log.line("scan", scan_summary(scanned))
    if request.top_fraction is not None:
        for note in selection_notes(scanned, request.top_fraction):
            log.line("", note)
    if request.plot is not None:
        for path in draw_scan(scanned, None if from_file else model, drawn, request.plot, log):
            log.line("drawn", str(path))
    if request.output is not None:
        write_text(request.output, text)
        log.line("saved", str(request.output))
    elif request.format is not None:
        print(text, end="", flush=True)
    return scanned


def draw_scan(scan: Scan, model: str | None, names: Sequence[str], folder: Path, log: StepLog) -> list[Path]:
    """Writes PNG files into `folder` and returns their paths: the heat map, and histograms of the matrices `names`.

    Without `names` there is a histogram for each kind: of its matrix with the median SNR. Without `model` there are no
    histograms, since they need the weights.
    """
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
        for found, matrix in measured_singular_values(model, chosen, scan.estimator):
            paths.append(folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', matrix.name).strip('-')}.png")
            save_histogram(found, matrix, paths[-1])
            progress(len(paths) - 1, len(chosen))
    return paths


def _scan_with_bar(request: ScanRequest, estimator: Estimator, log: StepLog) -> Scan:
    num_done, num_matrices = 0, 0
    with log.bar("scan") as progress:

        def show(done: int, total: int, name: str) -> None:
            nonlocal num_done
            num_done = done
            progress(done, total)

        try:
            # results come in order, so the cache may hold many before the first call of `show`
            num_matrices = len(matrix_names(request.model, estimator))
            return scan(request.model, estimator=estimator, control=request.control, fresh=request.fresh, progress=show)
        except (KeyboardInterrupt, Terminated) as stop:
            so_far = ""
            if num_matrices:
                so_far = f" after {num_done} of {num_matrices} matrices; the same command resumes there"
            if isinstance(stop, Terminated):
                raise Interrupted(f"Ended by {stop.signal.name}{so_far}", stop.signal) from None
            raise Interrupted(f"Interrupted{so_far}") from None


def _format_scan(scan: Scan, format: ScanFormat | None, top_fraction: float | None) -> str:
    match format:
        case "axolotl":
            assert top_fraction is not None  # the command line requires it
            return axolotl_format(scan, top_fraction)
        case "spectrum":
            return spectrum_format(scan)
        case _:
            return json_format(scan)


def _match_patterns(model: str, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that equal or match one of the patterns. Raises UserError for a pattern without a match."""
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
