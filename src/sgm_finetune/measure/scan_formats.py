"""File formats of a scan: SGM's JSON, the published Spectrum script's JSON, Axolotl's YAML."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.untrusted import read_json
from sgm_finetune.measure.scan_result import MatrixScan, Scan, by_parameter
from sgm_finetune.method.decibels import Estimator, ratio_decibels
from sgm_finetune.method.selection import KindChoice, choose_per_kind, ties
from sgm_finetune.model.names import layer_of

_REMEDY = (
    "MODEL is a model (a folder, a .safetensors, .bin or .gguf file, a hub id), the JSON that "
    "`sgm scan MODEL --output FILE` writes, or a result file of the published Spectrum script"
)


def load_scan(path: str | Path, estimator: Estimator | None = None) -> Scan:
    """The scan in a file: SGM's JSON, or a result file of the published script.

    A published file is `{module: {"snr": number, "type": kind}}` or, sorted, `{kind: {module: number}}`. It holds
    ratios only: the kinds are the file's, and shapes, σ, edges, ranks and energies are unknown (`MatrixScan`). An
    infinite ratio is `Infinity`, null or "inf" in it.

    Raises UserError for any other file, and when the numbers are of another estimator than `estimator` (None accepts
    both).
    """
    try:
        document = read_json(Path(path), infinite=True)
        scan = _published(str(path), document) if _is_published(document) else Scan.from_dict(document)
        _check(scan)
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror}; make one with `sgm scan MODEL --output {path}`"
        ) from None
    except KeyError as error:
        raise UserError(f"{path} is no scan (no {error}); {_REMEDY}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is no scan ({error}); {_REMEDY}") from None
    if estimator not in (None, scan.estimator):
        raise UserError(
            f"{path} holds numbers of the estimator {scan.estimator}, not {estimator}; "
            f"ask for {scan.estimator}, or scan the model itself"
        )
    return scan


def json_format(scan: Scan) -> str:
    """The scan as strict JSON, one matrix per line; an infinite SNR (only from the published formula) is null."""
    head = scan.to_dict()
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in head.pop("matrices"))
    return f'{json.dumps(head, allow_nan=False)[:-1]}, "matrices": [\n{rows}\n]}}\n'


def spectrum_format(scan: Scan) -> str:
    """The published script's JSON: {module name: {"snr": number, "type": kind}}, one entry per parameter, by kind.

    As in the script's own files an infinite SNR is the literal `Infinity`, which Python reads but strict JSON does not
    have. Only `estimator="spectrum"` gives it.
    """
    by_kind: dict[str, dict[str, dict[str, float | str]]] = {}
    for matrix in by_parameter(scan):
        by_kind.setdefault(matrix.kind, {})[matrix.name] = {"snr": matrix.snr, "type": matrix.kind}
    return json.dumps({name: row for rows in by_kind.values() for name, row in rows.items()}, indent=4) + "\n"


def axolotl_format(scan: Scan, top_fraction: float) -> str:
    """Axolotl's `unfrozen_parameters:` list in YAML: the `top_fraction` of each kind with the highest SNR.

    Each entry is a regular expression that matches one parameter's whole name. Axolotl turns every `.` of an entry into
    `\\.` before it matches, so a `\\.` in the file would match nothing; `[.]` means a dot both there and in plain `re`.
    Comments say how many of each kind are chosen, at which ratio, and what `selection_notes` returns. Raises UserError
    when no ratio is finite.
    """
    matrices, choices = _choose(scan, top_fraction)
    if not any(choice.chosen for choice in choices):
        raise UserError(
            f"No matrix of {scan.model} has a finite SNR, so none can be preferred; scan the model with --estimator mp"
        )
    lines = [f"# {_plain(scan.model)}: top {top_fraction:g} of each kind by SNR, estimator {scan.estimator}"]
    lines += ["unfrozen_parameters:"]
    for choice in choices:
        lines.append(f"# {_plain(choice.kind)}: {_cut(choice, matrices)}")
        lines += [f"#   {note}" for note in _notes(choice, matrices)]
        lines += [f"- {_entry(matrices[name].parameter)}" for name in choice.chosen]
    return "\n".join(lines) + "\n"


def selection_notes(scan: Scan, top_fraction: float) -> list[str]:
    """Notes on the choice that `axolotl_format` makes: ties at the cut and infinite ratios, with the kind of matrix.

    [] when the ratios alone decide.
    """
    matrices, choices = _choose(scan, top_fraction)
    return [f"{_plain(choice.kind)}: {note}" for choice in choices for note in _notes(choice, matrices)]


def _choose(scan: Scan, top_fraction: float) -> tuple[dict[str, MatrixScan], list[KindChoice]]:
    if not 0 < top_fraction <= 1:
        raise UserError(f"The top fraction is {top_fraction}; it must be above 0 and at most 1")
    matrices = {matrix.name: matrix for matrix in by_parameter(scan)}
    snrs = {name: matrix.snr for name, matrix in matrices.items()}
    return matrices, choose_per_kind(snrs, {name: matrix.kind for name, matrix in matrices.items()}, top_fraction)


def _cut(choice: KindChoice, matrices: Mapping[str, MatrixScan]) -> str:
    """Where the choice of one kind ends: `8 of 30, SNR down to 14.2 dB; the next has 13.9 dB`."""
    parts = f"{len(choice.chosen)} of {choice.size}"
    if choice.chosen:
        parts += f", SNR down to {_level(matrices[choice.chosen[-1]])}"
    if choice.left_out:
        parts += f"; the next has {_level(matrices[choice.left_out[0]])}"
    return parts


def _notes(choice: KindChoice, matrices: Mapping[str, MatrixScan]) -> list[str]:
    notes = []
    snrs = {name: matrices[name].snr for name in (*choice.chosen, *choice.left_out)}
    for names in ties(snrs, [choice]).values():
        num_chosen = sum(name in choice.chosen for name in names)
        notes.append(
            f"{len(names)} have the same SNR, {_level(matrices[names[0]])}; chosen are the {num_chosen} that come first"
        )
    if choice.unranked:
        count = len(choice.unranked)
        notes.append(f"{count} {'have' if count > 1 else 'has'} an infinite SNR, not ranked: not chosen")
    return notes


def _level(matrix: MatrixScan) -> str:
    return f"{matrix.snr_db:.1f} dB" if matrix.snr > 0 else "no signal"


def _entry(parameter: str) -> str:
    """A regular expression that matches the whole name, as a YAML scalar."""
    pattern = f"^{'[.]'.join(re.escape(part) for part in parameter.split('.'))}$"
    return pattern if re.fullmatch(r"\^[\w.\[\]]+\$", pattern, re.ASCII) else json.dumps(pattern)


def _plain(text: str) -> str:
    """`text` in printable ASCII, safe in a comment."""
    return json.dumps(text)[1:-1]


def _is_published(document: Any) -> bool:
    if not isinstance(document, dict) or "matrices" in document or not document:
        return False
    return all(isinstance(row, dict) and row for row in document.values())


def _published(path: str, document: Mapping[str, Mapping[str, Any]]) -> Scan:
    matrices = []
    for name, row in document.items():
        if "snr" in row and "type" in row:
            matrices.append(_from_ratio(name, str(row["type"]), row["snr"]))
        else:
            matrices += [_from_ratio(module, name, value) for module, value in row.items()]
    return Scan(path, "spectrum", tuple(matrices))


def _from_ratio(name: str, kind: str, value: Any) -> MatrixScan:
    if isinstance(value, bool | list | dict):
        raise TypeError(f"the SNR of {name} is {value!r}, not a number")
    snr = math.inf if value is None else float(value)
    return MatrixScan(
        name=name,
        kind=kind,
        layer=layer_of(name),
        shape=(0, 0),
        sigma=0.0,
        edge=0.0,
        signal_rank=0,
        snr=snr,
        snr_db=ratio_decibels(snr),
        parameter=f"{name}.weight",
        energy=0.0,
    )


def _check(scan: Scan) -> None:
    """Raises ValueError for values that no scan has."""
    if not scan.matrices:
        raise ValueError("it holds no matrix")
    seen = set()
    for matrix in scan.matrices:
        if matrix.name in seen:
            raise ValueError(f"{matrix.name} is in it twice")
        seen.add(matrix.name)
        if min(*matrix.shape, matrix.signal_rank) < 0:
            raise ValueError(f"{matrix.name} has negative sizes")
        if not all(math.isfinite(value) and value >= 0 for value in (matrix.sigma, matrix.edge, matrix.energy)):
            raise ValueError(f"{matrix.name} has a sigma, an edge or an energy that is negative or not finite")
        if math.isnan(matrix.snr) or matrix.snr < 0 or math.isnan(matrix.snr_db):
            raise ValueError(f"the SNR of {matrix.name} is {matrix.snr}, which is not a ratio")
