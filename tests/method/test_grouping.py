"""Groups are a partition, and every rule that made them holds inside them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sgm_finetune.method.grouping import group_layers


@st.composite
def similarities(draw):
    size = draw(st.integers(1, 9))
    values = draw(st.lists(st.floats(-1, 1.2), min_size=size * size, max_size=size * size))
    square = np.array(values).reshape(size, size)
    square = np.minimum(square, square.T)
    np.fill_diagonal(square, 1.0)
    return square


@given(
    similarities(),
    st.floats(-1, 1),
    st.lists(st.floats(-20, 60), min_size=9, max_size=9),
    st.one_of(st.none(), st.floats(0, 30)),
    st.one_of(st.none(), st.integers(2, 5)),
)
def test_groups_are_a_partition_that_keeps_every_rule(similarity, threshold, snr_db, tolerance, largest):
    size = len(similarity)
    groups = group_layers(similarity, threshold, snr_db[:size], tolerance, largest)
    assert sorted(i for group in groups for i in group) == list(range(size))
    assert groups == sorted(groups)
    for group in groups:
        assert largest is None or len(group) <= largest
        for i, j in combinations(group, 2):
            assert similarity[i, j] >= threshold - 1e-9
            assert tolerance is None or abs(snr_db[i] - snr_db[j]) <= tolerance


def test_equal_layers_make_one_group():
    assert group_layers(np.ones((5, 5)), 0.9, [0] * 5, None, None) == [[0, 1, 2, 3, 4]]


def test_what_the_joint_test_refuses_is_split():
    assert all(len(g) <= 2 for g in group_layers(np.ones((5, 5)), 0.9, [0] * 5, None, None, lambda m: len(m) <= 2))


def test_different_snr_separates_equal_gradients():
    assert group_layers(np.ones((4, 4)), 0.9, [0, 1, 30, 31], 3.0, None) == [[0, 1], [2, 3]]
