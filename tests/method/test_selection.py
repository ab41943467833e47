"""Truths about selecting matrices by SNR."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgm_finetune.method.selection import above_threshold, choose_per_kind, ties, top_fraction_per_kind

SNRS = st.dictionaries(
    st.text("abcdef", min_size=1), st.one_of(st.floats(0, 1e6), st.just(math.inf)), min_size=1, max_size=30
)


def kinds_of(snrs: dict[str, float]) -> dict[str, str]:
    return {name: name[0] for name in snrs}


@given(SNRS, st.floats(0.001, 1))
def test_every_kind_keeps_its_share_rounded_up_and_none_below_is_higher(snrs: dict[str, float], fraction: float):
    kinds = kinds_of(snrs)
    chosen = top_fraction_per_kind(snrs, kinds, fraction)
    assert chosen == [name for name in snrs if name in chosen]
    for kind in set(kinds.values()):
        members = [name for name in snrs if kinds[name] == kind]
        finite = [name for name in members if math.isfinite(snrs[name])]
        taken = [name for name in members if name in chosen]
        assert set(taken) <= set(finite)
        assert len(taken) == min(len(finite), max(1, math.ceil(fraction * len(members) - 1e-9)))
        rest = [snrs[name] for name in finite if name not in chosen]
        assert not rest or min(snrs[name] for name in taken) >= max(rest)


@given(SNRS)
def test_the_whole_fraction_is_everything_that_has_a_finite_ratio(snrs: dict[str, float]):
    finite = [name for name in snrs if math.isfinite(snrs[name])]
    assert top_fraction_per_kind(snrs, kinds_of(snrs), 1.0) == finite


@given(SNRS, st.floats(0.001, 1))
def test_chosen_left_out_and_unranked_are_a_partition_of_each_kind(snrs: dict[str, float], fraction: float):
    kinds = kinds_of(snrs)
    choices = choose_per_kind(snrs, kinds, fraction)
    assert [choice.kind for choice in choices] == list(dict.fromkeys(kinds.values()))
    for choice in choices:
        members = [*choice.chosen, *choice.left_out, *choice.unranked]
        assert sorted(members) == sorted(name for name in snrs if kinds[name] == choice.kind)
        assert choice.size == len(members)
        assert all(math.isinf(snrs[name]) for name in choice.unranked)


@given(SNRS, st.floats(0.001, 1))
def test_a_tie_is_told_exactly_where_it_reaches_over_the_cut(snrs: dict[str, float], fraction: float):
    choices = choose_per_kind(snrs, kinds_of(snrs), fraction)
    found = ties(snrs, choices)
    for choice in choices:
        shared = {snrs[name] for name in choice.chosen} & {snrs[name] for name in choice.left_out}
        assert (choice.kind in found) == bool(shared)
        if shared:
            (level,) = shared
            ranked = [*choice.chosen, *choice.left_out]
            assert found[choice.kind] == [name for name in ranked if snrs[name] == level]


def test_of_equal_ratios_the_earlier_wins():
    assert top_fraction_per_kind({"b": 1.0, "a": 1.0, "c": 1.0}, dict.fromkeys("abc", "k"), 0.5) == ["b", "a"]


def test_floating_point_does_not_round_a_whole_count_up():
    snrs = {str(i): float(i) for i in range(100)}
    assert len(top_fraction_per_kind(snrs, dict.fromkeys(snrs, "k"), 0.07)) == 7


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, math.nan])
def test_a_fraction_outside_its_range_is_refused(fraction: float):
    with pytest.raises(ValueError, match="fraction"):
        top_fraction_per_kind({"a": 1.0}, {"a": "k"}, fraction)


def test_a_ratio_that_is_no_number_is_refused_by_name():
    with pytest.raises(ValueError, match="layer9"):
        top_fraction_per_kind({"layer9": math.nan}, {"layer9": "k"}, 0.5)
    with pytest.raises(ValueError, match="layer9"):
        above_threshold({"layer9": math.nan}, 0.5)


@given(SNRS, st.floats(0, 1e6))
def test_a_threshold_parts_the_names_in_order(snrs: dict[str, float], threshold: float):
    assert above_threshold(snrs, threshold) == [name for name, snr in snrs.items() if snr >= threshold]
