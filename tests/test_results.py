"""What docs/results.md says is what benchmarks/results/quality.jsonl holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    """The modules of the quality benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality
    import quality_methods
    import quality_tables
    import quality_tasks

    yield quality, quality_methods, quality_tables, quality_tasks
    for name in [n for n in sys.modules if n.startswith("quality")]:
        monkeypatch.delitem(sys.modules, name)


def test_the_results_page_is_made_from_the_results(benchmark, tmp_path):
    quality, methods, tables, tasks = benchmark
    rates = {name: method.rates for name, method in methods.METHODS.items()}
    tables.write_page(quality.recorded(), tasks.TASKS, rates, quality.TUNING_SEED, tmp_path)
    remedy = "python benchmarks/quality.py --tables"
    assert (tmp_path / "results.md").read_text("utf-8") == (ROOT / "docs" / "results.md").read_text("utf-8"), remedy


def test_a_method_is_in_a_table_only_with_all_of_its_tries(benchmark):
    """Two of three rates tried: no row; then the rate of the best validation loss counts, and a NaN never does."""
    _, _, tables, _ = benchmark

    def run(rate: float, seed: int, **losses: float) -> dict:
        return {"task": "t", "method": "m", "rate": rate, "seed": seed, **{k: {"loss": v} for k, v in losses.items()}}

    tried = [run(1.0, 100, validation=float("nan")), run(2.0, 100, validation=0.5), run(2.0, 0, test=0.6)]
    assert tables.finished_runs(tried, "t", {"m": (1.0, 2.0, 3.0)}, 100) == {}
    (done,) = tables.finished_runs([*tried, run(3.0, 100, validation=0.7)], "t", {"m": (1.0, 2.0, 3.0)}, 100).values()
    assert (done.rate, done.at_edge, done.numbers("loss")) == (2.0, False, [0.6])


def test_differences_are_taken_at_equal_seeds(benchmark):
    _, _, tables, _ = benchmark

    def done(losses: dict[int, float]):
        return tables.Finished("m", 1.0, False, {seed: {"test": {"loss": loss}} for seed, loss in losses.items()})

    assert done({0: 0.5, 1: 0.25, 3: 9.0}).paired(done({1: 0.5, 0: 0.25, 2: 7.0})) == [0.25, -0.25]


@pytest.mark.parametrize(("falling", "expected"), [(False, 7), (True, 8)])
def test_the_fitted_rank_is_the_nearest_within_the_budget(benchmark, falling, expected):
    _, methods, _, _ = benchmark
    count = (lambda rank: 3000 // rank) if falling else (lambda rank: 100 * rank)
    budget = 399 if falling else 799
    assert methods.fitted_rank(count, budget, falling) == expected
    assert count(expected) <= budget
