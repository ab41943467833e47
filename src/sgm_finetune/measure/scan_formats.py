"""A scan as files: our JSON, the published script's JSON, Axolotl's YAML."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sgm_finetune.errors import UserError
from sgm_finetune.files import write_text
from sgm_finetune.method.selection import top_fraction_per_kind
from sgm_finetune.method.spectrum import Scan


def save_scan(scan: Scan, path: str | Path) -> None:
    """Writes the scan as JSON; the file appears under its name only when complete."""
    write_text(Path(path), json_format(scan))


def load_scan(path: str | Path) -> Scan:
    """The scan in a file that `save_scan` wrote. UserError for a missing, broken or foreign file."""
    try:
        return Scan.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror}; make one with `sgm scan MODEL --output {path}`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no scan ({error}); make one with `sgm scan MODEL --output {path}`") from None


def json_format(scan: Scan) -> str:
    """The scan as strict JSON, one matrix a line; an infinite SNR (published formula only) is null."""
    head = scan.to_dict()
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in head.pop("matrices"))
    return f'{json.dumps(head, allow_nan=False)[:-1]}, "matrices": [\n{rows}\n]}}\n'


def spectrum_format(scan: Scan) -> str:
    """The published script's JSON: {module name: {"snr": number, "type": kind}}, matrices of one kind together.

    As in its own files an infinite SNR is the literal `Infinity`, which Python reads and strict JSON does not have; it
    comes from `estimator="spectrum"` only.
    """
    by_kind: dict[str, dict[str, dict[str, float | str]]] = {}
    for matrix in scan.matrices:
        by_kind.setdefault(matrix.kind, {})[matrix.name] = {"snr": matrix.snr, "type": matrix.kind}
    return json.dumps({name: row for rows in by_kind.values() for name, row in rows.items()}, indent=4) + "\n"


def axolotl_format(scan: Scan, top_fraction: float) -> str:
    """Axolotl's `unfrozen_parameters:` list, YAML: the `top_fraction` of each kind with the highest SNR.

    Counts are rounded up; each entry is a regular expression that matches one parameter's whole name.
    """
    if not 0 < top_fraction <= 1:
        raise UserError(f"The top fraction is {top_fraction}; it lies above 0 and is at most 1")
    snrs = {matrix.name: matrix.snr for matrix in scan.matrices}
    chosen = top_fraction_per_kind(snrs, {matrix.name: matrix.kind for matrix in scan.matrices}, top_fraction)
    return "".join(["unfrozen_parameters:\n", *(f"- ^{re.escape(name)}\\.weight$\n" for name in chosen)])
