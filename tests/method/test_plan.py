"""The plan follows from the numbers: its sides, groups, selection and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from sgm_finetune.method.agreement import side_agreement
from sgm_finetune.method.build_plan import build_plan, merge_readers
from sgm_finetune.method.parameter_count import adapter_parameters, most_per_direction
from sgm_finetune.method.plan import Group, MatrixNumbers, Plan, PlannedMatrix, PlanSettings
from sgm_finetune.method.subspace import Sketch, test_matrix

RANK = 3


def layer(index: int, shared: str, snr_db: float = 10.0, kind: str = "blocks.*.proj") -> MatrixNumbers:
    """A layer that shares the input or the output directions of its gradients with other layers, or neither."""
    generator = torch.Generator().manual_seed(100 + index)
    common = torch.Generator().manual_seed(0)
    rows, cols = 24, 32

    def directions(dim: int, source: torch.Generator) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(dim, RANK, generator=source)).Q

    left = directions(rows, common if shared == "output" else generator)
    right = directions(cols, common if shared == "input" else generator)
    halves = []
    for seed in (0, 1):
        gradient = left @ torch.randn(RANK, RANK, generator=generator) @ right.T
        gradient = gradient + 0.01 * torch.randn(rows, cols, generator=generator)
        omega_out, omega_in = test_matrix(rows, 10, seed), test_matrix(cols, 10, seed)
        halves.append(Sketch(omega_out.T @ gradient, (gradient @ omega_in).T, seed))
    name = kind.replace("*", str(index))
    return MatrixNumbers(name, kind, index, (rows, cols), 10 ** (snr_db / 10), snr_db, 3, (halves[0], halves[1]))


SETTINGS = PlanSettings(rank=RANK, alpha=6, scope="layers", threshold=0.9)


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_probe_finds_the_side_that_layers_share(side):
    plan = build_plan("m", [layer(i, side) for i in range(4)], SETTINGS)
    assert [(group.side, len(group.members)) for group in plan.groups] == [(side, 4)]
    assert plan.starts[plan.groups[0].name].shape == ((32 if side == "input" else 24), RANK)
    assert min(m.kept_shared for m in plan.matrices) > 0.9


def test_layers_that_share_nothing_stay_alone():
    plan = build_plan("m", [layer(i, "nothing") for i in range(4)], SETTINGS)
    assert plan.groups == ()
    assert all(matrix.group is None for matrix in plan.matrices)


def test_whole_gradients_that_share_one_side_only_have_cosine_near_zero():
    """The cosine criterion finds nothing in made-up layers either (docs/method.md section 2.3)."""
    matrices = [layer(i, "input") for i in range(6)]
    plan = build_plan("m", matrices, replace(SETTINGS, criterion="cosine"))
    assert plan.groups == ()
    assert abs(plan.kinds[0].cosine_mean) < 0.3
    assert plan.kinds[0].retention_input > 0.95


def test_the_cosine_criterion_merges_layers_with_one_gradient():
    same = [replace(layer(0, "input"), name=f"blocks.{i}.proj", layer=i) for i in range(3)]
    plan = build_plan("m", same, replace(SETTINGS, criterion="cosine"))
    assert [len(group.members) for group in plan.groups] == [3]
    assert plan.groups[0].similarity > 0.9


def test_the_snr_criterion_looks_at_snr_alone():
    levels = [0.0, 1.0, 2.0, 20.0, 21.0]
    plan = build_plan("m", [layer(i, "nothing", s) for i, s in enumerate(levels)], replace(SETTINGS, criterion="snr"))
    assert [group.members for group in plan.groups] == [
        ("blocks.0.proj", "blocks.1.proj", "blocks.2.proj"),
        ("blocks.3.proj", "blocks.4.proj"),
    ]
    assert plan.groups[0].snr_spread_db == pytest.approx(2.0)


def test_a_side_that_was_asked_for_is_taken():
    plan = build_plan("m", [layer(i, "input") for i in range(4)], replace(SETTINGS, side="output", threshold=0.0))
    assert {group.side for group in plan.groups} == {"output"}


def reader(name: str, of: str, like: int, snr_db: float = 10.0, rows: int = 24) -> MatrixNumbers:
    """A matrix that reads what `of` reads. Matrices of equal `like` share the input directions of their gradients."""
    matrix = layer(100 + like, "input", snr_db)
    assert matrix.halves is not None
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(like))).Q
    halves = tuple(Sketch(half.input @ turn, half.output[:, :rows], half.seed) for half in matrix.halves)
    kind = name.split(".")[-1]
    return replace(matrix, name=name, kind=kind, shape=(rows, 32), halves=halves, activation=of)  # type: ignore[arg-type]


READERS = [
    reader(f"blocks.{i}.{kind}", f"blocks.{i}.q", like=i, rows=rows)
    for i in range(3)
    for kind, rows in (("q", 24), ("k", 12), ("v", 12))
]
ACTIVATION = replace(SETTINGS, scope="activation")


def test_readers_of_the_same_activations_share_their_input_side_whatever_their_outputs():
    plan = build_plan("m", READERS, ACTIVATION)
    assert [(group.name, group.members) for group in plan.groups] == [
        (f"q+k+v/input/{i}", (f"blocks.{i}.q", f"blocks.{i}.k", f"blocks.{i}.v")) for i in range(3)
    ]
    assert {group.side for group in plan.groups} == {"input"}
    assert adapter_parameters(plan) == (3 * RANK * (24 + 12 + 12 + 32), 3 * RANK * (24 + 12 + 12 + 3 * 32))
    joined = plan.kinds[-1]
    assert (joined.kind, joined.num_layers, joined.side) == ("q+k+v", 3, "input")
    assert joined.retention_input == pytest.approx(1.0, abs=0.05)
    assert [kind.side for kind in plan.kinds[:-1]] == [None] * 3


def test_what_readers_keep_together_is_the_mean_over_all_of_them_at_once():
    """To the last digit: a mean of the means of each set of readers is rounded in another way."""
    for seed in range(8):
        sets = [[reader(name, "q", like=10 * seed + 3 * i + n) for n, name in enumerate("qkv")] for i in range(3)]
        merged = merge_readers("q+k+v", sets, ACTIVATION)
        kept = [side_agreement(members, "input", RANK).retention_of_all() for members in sets]
        assert merged.numbers.retention_all_input == float(np.mean(kept))


def test_a_reader_whose_gradient_has_other_directions_stays_alone():
    odd = reader("blocks.0.k", "blocks.0.q", like=9, rows=12)
    plan = build_plan("m", [odd if m.name == odd.name else m for m in READERS[:3]], ACTIVATION)
    assert [group.members for group in plan.groups] == [("blocks.0.q", "blocks.0.v")]


def test_readers_of_different_activations_never_share():
    apart = [replace(matrix, activation=matrix.name) for matrix in READERS]
    plan = build_plan("m", apart, replace(ACTIVATION, threshold=-1.0))
    assert plan.groups == ()


def test_only_what_is_trained_is_grouped_by_activation():
    loud = [replace(m, snr=100.0) if m.kind != "k" else m for m in READERS]
    plan = build_plan("m", loud, replace(ACTIVATION, snr_threshold=50.0))
    assert {group.kind for group in plan.groups} == {"q+v"}


def test_side_none_and_a_missing_probe_give_plain_lora():
    matrices = [layer(i, "input") for i in range(4)]
    for plan in (
        build_plan("m", matrices, replace(SETTINGS, side="none")),
        build_plan("m", [replace(m, halves=None) for m in matrices], SETTINGS),
    ):
        assert plan.groups == ()
        assert adapter_parameters(plan) == (4 * RANK * 56, 4 * RANK * 56)


def test_sharing_saves_the_shared_side_of_all_members_but_one():
    plan = build_plan("m", [layer(i, "input") for i in range(4)], SETTINGS)
    assert adapter_parameters(plan) == (4 * RANK * 56 - 3 * RANK * 32, 4 * RANK * 56)


def test_groups_hold_selected_layers_only():
    matrices = [layer(i, "input", snr_db=float(i)) for i in range(4)]
    plan = build_plan("m", matrices, replace(SETTINGS, top_fraction=0.5))
    assert [m.name for m in plan.selected] == ["blocks.2.proj", "blocks.3.proj"]
    assert plan.groups[0].members == ("blocks.2.proj", "blocks.3.proj")
    threshold = build_plan("m", matrices, replace(SETTINGS, snr_threshold=10**0.25))
    assert [m.name for m in threshold.selected] == ["blocks.3.proj"]


def test_one_kind_with_two_shapes_is_never_mixed():
    narrow = layer(4, "input")
    halves = tuple(Sketch(h.input, h.output[:, :12], h.seed) for h in narrow.halves)
    plan = build_plan(
        "m", [*(layer(i, "input") for i in range(2)), replace(narrow, shape=(12, 32), halves=halves)], SETTINGS
    )
    assert [len(group.members) for group in plan.groups] == [2]


def test_a_matrix_without_signal_has_no_decibels():
    silent = replace(layer(0, "input"), snr=0.0, snr_db=-126.4)
    plan = build_plan("m", [silent, layer(1, "input")], SETTINGS)
    assert (plan.matrices[0].snr, plan.matrices[0].snr_db) == (0.0, None)
    assert plan.matrices[1].snr_db == 10.0


def plan_of(names: Sequence[str], shapes: dict[str, tuple[int, int]], in_pools: bool) -> Plan:
    """A plan of rank 1 that trains `names` alone, one pool for each shape if `in_pools`."""
    matrices = tuple(PlannedMatrix(name, "kind", None, shapes[name], True) for name in names)
    members = {shape: tuple(name for name in names if shapes[name] == shape) for shape in set(shapes.values())}
    pools = [Group(str(shape), "kind", "both", found) for shape, found in members.items() if len(found) > 1]
    return Plan("m", PlanSettings(1, 2.0), matrices, tuple(pools) if in_pools else ())


@pytest.mark.parametrize("in_pools", [True, False])
@pytest.mark.parametrize("shapes", ["aaaa", "aaab", "aabb", "abc", "aabbc"])
def test_the_most_parameters_are_those_of_the_largest_choice(shapes, in_pools):
    """Whichever matrices a fraction chooses: exactly so where all have one shape, or all are chosen."""
    sizes = {"a": (8, 6), "b": (5, 4), "c": (9, 9)}
    of = {f"{i}": sizes[letter] for i, letter in enumerate(shapes)}
    numbers = [MatrixNumbers(name, "kind", None, shape, 1.0, 0.0, None) for name, shape in of.items()]
    for num in range(1, len(of) + 1):
        settings = PlanSettings(1, 2.0, top_fraction=num / len(of))
        most = most_per_direction(numbers, settings, in_pools)
        largest = max(adapter_parameters(plan_of(chosen, of, in_pools))[0] for chosen in combinations(of, num))
        assert largest <= most <= largest + num
        if len(set(shapes)) == 1 or num == len(of) or not in_pools:
            assert most == largest


def test_every_expert_counts_and_is_in_no_pool():
    stacks = [MatrixNumbers(f"{i}", "kind", i, (8, 6), 1.0, 0.0, None, num_experts=5) for i in range(3)]
    assert most_per_direction(stacks, PlanSettings(1, 2.0), makes_pools=True) == 3 * 5 * 14
