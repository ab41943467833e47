"""Truths about the result of a scan: parts of one parameter, and the plain data it becomes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgm_finetune.measure.scan_result import Control, MatrixScan, Scan, by_parameter
from sgm_finetune.method.decibels import NO_SIGNAL_DB, ratio_decibels

POSITIVE = st.floats(1e-6, 1e6)


def matrix(name: str, shape=(4, 6), snr: float = 1.0, energy: float = 1.0, **changes) -> MatrixScan:
    found = MatrixScan(
        name=name, kind=name, layer=0, shape=shape, sigma=0.1, edge=1.0, signal_rank=2, snr=snr,
        snr_db=ratio_decibels(snr), parameter=f"{name.split('[')[0]}.weight", energy=energy,
    )  # fmt: skip
    return replace(found, **changes)


def scan_of(*matrices: MatrixScan, estimator="mp") -> Scan:
    return Scan("m", estimator, matrices)


def test_what_has_no_parts_comes_back_unchanged():
    found = scan_of(matrix("a"), matrix("b", snr=3.0))
    assert by_parameter(found) == found.matrices


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=8))
def test_the_ratio_of_a_whole_is_summed_signal_over_summed_noise(parts: list[tuple[float, float]]):
    energies = [(signal + noise, signal / noise) for signal, noise in parts]
    (whole,) = by_parameter(scan_of(*(matrix(f"x[{i}]", energy=e, snr=r) for i, (e, r) in enumerate(energies))))
    assert (whole.name, whole.parameter, whole.kind) == ("x", "x.weight", "x")
    assert whole.snr == pytest.approx(sum(s for s, _ in parts) / sum(n for _, n in parts), rel=1e-6)
    assert whole.energy == pytest.approx(sum(e for e, _ in energies))
    assert whole.signal_rank == 2 * len(parts)


def test_parts_are_stacked_where_they_fit():
    def shape(*shapes: tuple[int, int]) -> tuple[int, int]:
        return by_parameter(scan_of(*(matrix(f"x[{i}]", shape=s) for i, s in enumerate(shapes))))[0].shape

    assert shape((4, 6), (2, 6), (2, 6)) == (8, 6)
    assert shape((6, 4), (6, 2)) == (6, 6)
    assert shape((6, 4), (5, 3)) == (6, 4)


def test_the_published_ratio_of_a_whole_is_the_mean_and_infinite_if_one_is():
    parts = (matrix("x[0]", snr=1.0), matrix("x[1]", snr=3.0))
    assert by_parameter(scan_of(*parts, estimator="spectrum"))[0].snr == 2.0
    endless = (*parts, matrix("x[2]", snr=math.inf))
    assert by_parameter(scan_of(*endless, estimator="spectrum"))[0].snr == math.inf


def test_controls_of_the_parts_are_united_too():
    silent, loud = Control(0, NO_SIGNAL_DB), Control(1, 10.0)
    (whole,) = by_parameter(scan_of(matrix("x[0]", control=silent), matrix("x[1]", control=silent)))
    assert whole.control == silent
    (whole,) = by_parameter(scan_of(matrix("x[0]", control=silent), matrix("x[1]", control=loud)))
    assert whole.control is not None
    assert whole.control.signal_rank == 1
    assert whole.control.snr_db == pytest.approx(ratio_decibels((10 / 11) / (1 + 1 / 11)))
    (whole,) = by_parameter(scan_of(matrix("x[0]", control=silent), matrix("x[1]")))
    assert whole.control is None


def test_nothing_but_zeros_has_no_signal():
    (whole,) = by_parameter(scan_of(matrix("x[0]", energy=0.0, snr=0.0), matrix("x[1]", energy=0.0, snr=0.0)))
    assert (whole.snr, whole.snr_db) == (0.0, NO_SIGNAL_DB)
