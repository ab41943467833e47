"""pictures.json is small, reads back unchanged, and any other document is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_batches, make_model, measured_numbers

from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.plan_file import plan_document
from sgm_finetune.measure.probe import probe
from sgm_finetune.measure.scan import scan
from sgm_finetune.method.build_plan import build_plan
from sgm_finetune.method.plan import Plan, PlanSettings, Similarity
from sgm_finetune.results.report.measured_histograms import histograms_of
from sgm_finetune.results.report.pictures import (
    Pictures,
    parse_pictures,
    save_pictures,
    similarity_tables,
)


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


@pytest.mark.parametrize(
    "document",
    [
        [], {"format": "sgm-pictures/2"}, {"colour": 1}, {"histograms": [{"name": "a"}]},
        {"similarities": [{"kind": "q", "side": "input", "members": ["a", "b"], "values": []}]},
        {"similarities": [{"kind": "q", "side": "input", "members": ["a", "b"], "values": [float("nan")]}]},
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(document):
    with pytest.raises(UserError, match=r"pictures\.json") as caught:
        parse_pictures(document, "pictures.json")
    assert "\n" not in str(caught.value)
