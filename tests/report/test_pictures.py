"""pictures.json is small, reads back unchanged, and any other document is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_batches, make_model, measured_numbers
from peft import PeftModel

from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.plan_file import plan_document
from sgm_finetune.measure.probe import probe
from sgm_finetune.measure.scan import scan
from sgm_finetune.method.build_plan import build_plan
from sgm_finetune.method.plan import Plan, PlanSettings, Similarity
from sgm_finetune.results.report.measured_histograms import histograms_of
from sgm_finetune.results.report.measured_pools import pool_table, pool_tables
from sgm_finetune.results.report.pictures import (
    Pictures,
    PoolTable,
    parse_pictures,
    save_pictures,
    similarity_tables,
)
from sgm_finetune.train.adapters.apply import apply_plan, lora_layers


def made(tmp_path: Path, **settings) -> tuple[Plan, Path]:
    probed = probe(make_model(), make_batches(), sketch_size=12)
    plan = build_plan("pico", measured_numbers(probed), PlanSettings(rank=4, alpha=8, threshold=0.5, **settings))
    return plan, tmp_path / "pictures.json"


@pytest.mark.parametrize("scope", ["layers", "activation"])
def test_they_come_back_as_they_were(scope, llama_folder, tmp_path):
    plan, path = made(tmp_path, scope=scope)
    pictures = Pictures(histograms_of(scan(llama_folder), llama_folder), similarity_tables(plan.similarities))
    save_pictures(pictures, path)
    assert parse_pictures(json.loads(path.read_text()), "pictures.json") == pictures
    assert len(pictures.histograms) == 7
    assert all(sum(h.noise) + sum(h.signal) + h.num_beyond == min(h.shape) for h in pictures.histograms)
    assert path.stat().st_size < 20_000
    first = path.read_bytes()
    again = histograms_of(scan(llama_folder), llama_folder)
    save_pictures(Pictures(again, similarity_tables(made(tmp_path, scope=scope)[0].similarities)), path)
    assert path.read_bytes() == first


def test_every_pair_that_the_grouping_compared_is_there(tmp_path):
    plan, _ = made(tmp_path, scope="activation")
    tables = similarity_tables(plan.similarities)
    assert {table.side for table in tables} == {"input", "output"}
    readers = [table for table in tables if "+" in table.kind]
    assert len(readers) == 2 * 4
    for table, similarity in zip(tables, plan.similarities, strict=True):
        torch.testing.assert_close(torch.tensor(table.matrix()).double(), similarity.values, atol=5e-4, rtol=0)
    by_pair = {
        frozenset((one, two)): table.matrix()[i][j]
        for table in readers for i, one in enumerate(table.members) for j, two in enumerate(table.members) if i != j
    }  # fmt: skip
    for group in plan.groups:
        assert group.similarity == pytest.approx(
            min(by_pair[frozenset((a, b))] for a in group.members for b in group.members if a != b), abs=5e-4
        )


def test_cosines_are_there_where_they_decide(tmp_path):
    plan, _ = made(tmp_path, scope="layers", criterion="cosine")
    assert {s.side for s in plan.similarities} == {"input", "output", None}


def test_the_plan_file_knows_nothing_of_them(tmp_path):
    plan, _ = made(tmp_path, scope="layers")
    assert plan.similarities
    assert "similarities" not in plan_document(plan)


def test_large_tables_are_left_out():
    names = tuple(f"layers.{i}.q" for i in range(200))
    assert similarity_tables((Similarity("q", "input", names, torch.eye(200)),)) == ()


@pytest.fixture(scope="module")
def pooled() -> tuple[Plan, PeftModel]:
    """A plan of seven pools, and a model of it away from its start."""
    base = make_model()
    settings = PlanSettings(rank=4, alpha=8, scope="pool", threshold=-1.0)
    plan = build_plan("pico", measured_numbers(probe(base, make_batches(), sketch_size=12)), settings)
    model = apply_plan(base, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("original"):
                torch.nn.init.normal_(parameter)
    return plan, model


def test_a_pool_says_which_layer_uses_which_direction(pooled):
    """The norms of the layers' parts of ΔW, over the largest; the strongest directions come first."""
    plan, model = pooled
    tables = pool_tables(model, plan)
    assert [(table.pool, table.members, table.num_left_out) for table in tables] == [
        (group.name, group.members, 0) for group in plan.groups
    ]
    layers = lora_layers(model)
    for table in tables:
        parts = []
        for name in table.members:
            a, b = (getattr(layers[name], one)["default"].weight.detach() for one in ("lora_A", "lora_B"))
            parts.append([float(torch.linalg.matrix_norm(torch.outer(b[:, j], a[j]), 2)) for j in range(len(a))])
        whole = torch.tensor(parts)
        expected = whole[:, whole.sum(0).argsort(descending=True)] / whole.max()
        torch.testing.assert_close(torch.tensor(table.strengths), expected, atol=0.0051, rtol=0)
        assert max(max(row) for row in table.strengths) == 1
        assert 1 <= table.layers_per_direction <= 4


def test_pools_come_back_as_they_were(pooled, tmp_path):
    plan, model = pooled
    pictures, path = Pictures(pools=pool_tables(model, plan)), tmp_path / "pictures.json"
    save_pictures(pictures, path)
    assert parse_pictures(json.loads(path.read_text()), "pictures.json") == pictures


def test_a_file_that_was_written_before_there_were_pools_is_read():
    assert parse_pictures({"format": "sgm-pictures/1", "histograms": [], "similarities": []}, "") == Pictures()


def test_the_strongest_directions_of_a_large_pool_are_kept():
    strengths = torch.rand(3, 70, dtype=torch.float64)
    table = pool_table("q/both/0", ("a", "b", "c"), strengths)
    assert (table.num_left_out, {len(row) for row in table.strengths}) == (6, {64})
    strongest = strengths[:, strengths.sum(0).argmax()] / strengths.max()
    torch.testing.assert_close(
        torch.tensor([row[0] for row in table.strengths]).double(), strongest, atol=0.006, rtol=0
    )


def test_a_pool_that_has_not_learnt_uses_no_direction():
    assert pool_table("q/both/0", ("a", "b"), torch.zeros(2, 3)) == PoolTable(
        "q/both/0", ("a", "b"), 0, 0, ((0,) * 3,) * 2
    )


def test_there_are_at_most_eight_pools_of_at_most_128_members(pooled):
    plan, model = pooled
    one = plan.groups[0]
    large = replace(one, members=one.members * 33)
    assert [table.pool for table in pool_tables(model, replace(plan, groups=(large, *(one,) * 9)))] == [one.name] * 8


POOL = {"pool": "q", "members": ["a", "b"], "layers_per_direction": 1.5, "num_left_out": 0, "strengths": [[1.0], [0.5]]}


def test_a_valid_pool_is_accepted():
    assert len(parse_pictures({"pools": [POOL] * 8}, "pictures.json").pools) == 8


@pytest.mark.parametrize(
    "document",
    [
        [], {"format": "sgm-pictures/2"}, {"colour": 1}, {"histograms": [{"name": "a"}]},
        {"similarities": [{"kind": "q", "side": "input", "members": ["a", "b"], "values": []}]},
        {"similarities": [{"kind": "q", "side": "input", "members": ["a", "b"], "values": [float("nan")]}]},
        {"pools": [POOL] * 9},
        *({"pools": [POOL | change]} for change in (
            {"strengths": [[1.0]]}, {"strengths": [[1.0], [0.5, 0.5]]}, {"strengths": [[], []]},
            {"strengths": [[1.01], [0.5]]}, {"strengths": [[-0.5], [0.5]]}, {"strengths": [[float("nan")], [0.5]]},
            {"strengths": [[0.5] * 65] * 2}, {"members": [], "strengths": []},
            {"members": ["a"] * 129, "strengths": [[0.5]] * 129}, {"num_left_out": -1}, {"num_left_out": 0.5},
            {"layers_per_direction": -1}, {"layers_per_direction": float("inf")}, {"colour": 1},
        )),
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(document):
    with pytest.raises(UserError, match=r"pictures\.json") as caught:
        parse_pictures(document, "pictures.json")
    assert "\n" not in str(caught.value)
