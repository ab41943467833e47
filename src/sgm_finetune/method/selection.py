"""Which matrices are trained: a selection by signal-to-noise ratio, or by what it is compared with (docs/method.md
section 1.6)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sgm_finetune.method.plan import MatrixNumbers, PlanSettings


@dataclass(frozen=True)
class KindChoice:
    """What a top fraction chooses from one kind: a partition of its members."""

    kind: str
    chosen: tuple[str, ...]
    """Highest SNR first; among equal SNRs, the earlier name first."""
    left_out: tuple[str, ...]
    """Highest SNR first."""
    unranked: tuple[str, ...]
    """Names whose SNR is infinite (published formula only). An infinite ratio says that the formula found no noise, not
    how much signal there is, so these are neither chosen nor compared."""

    @property
    def size(self) -> int:
        return len(self.chosen) + len(self.left_out) + len(self.unranked)


def choose_per_kind(snrs: Mapping[str, float], kinds: Mapping[str, str], fraction: float) -> list[KindChoice]:
    """Returns the `fraction` of each kind with the highest finite SNRs, kinds in the order of their first names.

    The number to choose is the fraction of *all* members, rounded up, so every kind keeps at least one. It is at most
    the number of members with a finite SNR. Raises ValueError if `fraction` is not in (0, 1], and for an SNR that is
    NaN or -inf.

    >>> choose_per_kind({"a": 3.0, "b": 9.0, "c": 5.0, "d": math.inf}, dict.fromkeys("abcd", "q"), 0.5)
    [KindChoice(kind='q', chosen=('b', 'c'), left_out=('a',), unranked=('d',))]
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction to select is {fraction}; it must be above 0 and at most 1")
    _check_ratios(snrs)
    members: dict[str, list[str]] = {}
    for name in snrs:
        members.setdefault(kinds[name], []).append(name)
    choices = []
    for kind, names in members.items():
        count = max(1, math.ceil(fraction * len(names) - 1e-9))  # 0.07 · 100 gives 7.000000000000001 and means 7
        ranked = sorted((name for name in names if math.isfinite(snrs[name])), key=lambda name: -snrs[name])
        infinite = tuple(name for name in names if math.isinf(snrs[name]))
        choices.append(KindChoice(kind, tuple(ranked[:count]), tuple(ranked[count:]), infinite))
    return choices


def top_fraction_per_kind(snrs: Mapping[str, float], kinds: Mapping[str, str], fraction: float) -> list[str]:
    """Returns the names that `choose_per_kind` chooses, in input order.

    >>> top_fraction_per_kind({"q0": 3.0, "q1": 9.0, "q2": 5.0, "v0": 1.0}, dict(q0="q", q1="q", q2="q", v0="v"), 0.5)
    ['q1', 'q2', 'v0']
    """
    chosen = {name for choice in choose_per_kind(snrs, kinds, fraction) for name in choice.chosen}
    return [name for name in snrs if name in chosen]


def ties(snrs: Mapping[str, float], choices: Iterable[KindChoice]) -> dict[str, list[str]]:
    """Returns, for each kind with a tie at the cut, the names that have the SNR of the cut, chosen names first.

    The last chosen and the first left out have the same SNR there, so the order of the names decided, not the ratio.

    >>> same = {"a": 1.0, "b": 1.0, "c": 0.5}
    >>> ties(same, choose_per_kind(same, dict.fromkeys("abc", "k"), 0.3))
    {'k': ['a', 'b']}
    """
    found = {}
    for choice in choices:
        if choice.chosen and choice.left_out and snrs[choice.chosen[-1]] == snrs[choice.left_out[0]]:
            level = snrs[choice.chosen[-1]]
            found[choice.kind] = [name for name in (*choice.chosen, *choice.left_out) if snrs[name] == level]
    return found


def above_threshold(snrs: Mapping[str, float], threshold: float) -> list[str]:
    """Returns the names whose SNR is at least `threshold`, in input order, infinite SNRs included.

    SNR and threshold are ratios of energies, not decibels. Raises ValueError for an SNR that is NaN or -inf.

    >>> above_threshold({"a": 0.5, "b": 2.0, "c": 1.0}, 1.0)
    ['b', 'c']
    """
    _check_ratios(snrs)
    return [name for name, snr in snrs.items() if snr >= threshold]


def _check_ratios(snrs: Mapping[str, float]) -> None:
    for name, snr in snrs.items():
        if math.isnan(snr) or snr == -math.inf:
            raise ValueError(f"the SNR of {name} is {snr}, which is not a ratio")


def select_matrices(matrices: Sequence[MatrixNumbers], settings: PlanSettings) -> list[str]:
    """Returns the names of the matrices that are trained, in input order.

    These are the top fraction of each kind in the order of `settings.by`, the matrices above an SNR threshold, or
    without either setting all matrices. Raises ValueError for a selection by gradient without a probe.
    """
    if settings.top_fraction is not None:
        kinds = {matrix.name: matrix.kind for matrix in matrices}
        return top_fraction_per_kind(ranking(matrices, settings), kinds, settings.top_fraction)
    if settings.snr_threshold is not None:
        return above_threshold(ranking(matrices, settings), settings.snr_threshold)
    return [matrix.name for matrix in matrices]


def ranking(matrices: Sequence[MatrixNumbers], settings: PlanSettings) -> dict[str, float]:
    """Returns name -> the number by which a fraction is selected, larger first: SNR, depth, a random number, or the
    energy of the gradient for each entry of the matrix. Raises ValueError for a gradient that was not probed."""
    match settings.by:
        case "snr":
            return {matrix.name: math.inf if matrix.snr is None else matrix.snr for matrix in matrices}
        case "depth":
            return {matrix.name: float(-1 if matrix.layer is None else matrix.layer) for matrix in matrices}
        case "random":
            chance = random.Random(settings.seed)
            return {matrix.name: chance.random() for matrix in matrices}
        case "gradient":
            energies = {}
            for matrix in matrices:
                if matrix.gradient_energy is None:
                    raise ValueError(f"the gradient of {matrix.name} was not probed")
                energies[matrix.name] = matrix.gradient_energy / matrix.num_entries
            return energies
