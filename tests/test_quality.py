"""The quality benchmark: docs/results.md says what its results hold, and all its methods train."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
from conftest import WORDS, make_bert, make_model, make_tokenizer

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
    for name in [n for n in sys.modules if n.startswith(("quality", "full_"))]:
        monkeypatch.delitem(sys.modules, name)


def test_the_results_page_is_made_from_the_results(benchmark, tmp_path):
    quality, methods, tables, tasks = benchmark
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    tables.write_page(quality.recorded_runs(), tasks.TASKS, methods.METHODS, quality.TUNING_SEED, tmp_path)
    for name in ("docs/results.md", "README.md"):
        made, kept = ((root / name).read_text("utf-8") for root in (tmp_path, ROOT))
        assert made == kept, "python benchmarks/quality.py --tables"


def test_the_page_of_whole_matrices_is_made_from_the_results(benchmark, tmp_path):
    import full_weights

    (tmp_path / "docs").mkdir()
    made = full_weights.write_results(tmp_path)
    kept = ROOT / "docs" / made.name
    assert made.read_text("utf-8") == kept.read_text("utf-8"), "python benchmarks/full_weights.py --tables"


def test_a_method_is_in_a_table_only_with_all_of_its_tries(benchmark):
    """Two of three rates tried: no row; then the rate of the best validation loss counts, and a NaN never does."""
    _, _, tables, _ = benchmark

    def run(rate: float, seed: int, **losses: float) -> dict:
        return {"task": "t", "method": "m", "rate": rate, "seed": seed, **{k: {"loss": v} for k, v in losses.items()}}

    tried = [run(1.0, 100, validation=float("nan")), run(2.0, 100, validation=0.5), run(2.0, 0, test=0.6)]
    assert tables.finished_runs(tried, "t", {"m": (1.0, 2.0, 3.0)}, 100) == {}
    (done,) = tables.finished_runs([*tried, run(3.0, 100, validation=0.7)], "t", {"m": (1.0, 2.0, 3.0)}, 100).values()
    assert (done.rate, done.at_edge, done.numbers("loss")) == (2.0, False, [0.6])


@pytest.mark.parametrize(("default", "tested"), [(None, [2.0]), (2.0, [2.0]), (3.0, [2.0, 3.0])])
def test_the_best_rate_is_tested_and_the_default_one(benchmark, default, tested):
    quality, methods, _, _ = benchmark
    asked = []

    def submit(task, method, rate, seed):
        asked.append((rate, seed))
        done = Future()
        done.set_result({"validation": {"loss": abs(rate - 2.0)}, "rank": 4, "steps": 60})
        return done

    of_size = None if default is None else (lambda rank, steps: {(4, 60): default}[rank, steps])
    method = methods.Method("m", (1.0, 2.0, 3.0), lambda base: base, of_size)
    quality.run_method("t", method, 2, submit)
    assert asked == [(rate, 100) for rate in method.rates] + [(rate, seed) for rate in tested for seed in (0, 1)]


def test_differences_are_taken_at_equal_seeds(benchmark):
    _, _, tables, _ = benchmark

    def done(losses: dict[int, float]):
        return tables.Finished("m", 1.0, False, {seed: {"test": {"loss": loss}} for seed, loss in losses.items()})

    assert done({0: 0.5, 1: 0.25, 3: 9.0}).paired(done({1: 0.5, 0: 0.25, 2: 7.0})) == [0.25, -0.25]


@pytest.mark.parametrize(("falling", "expected"), [(False, 7), (True, 8)])
def test_the_fitted_rank_is_the_nearest_within_the_budget(benchmark, falling, expected):
    import quality_adapt

    count = (lambda rank: 3000 // rank) if falling else (lambda rank: 100 * rank)
    budget = 399 if falling else 799
    assert quality_adapt.fitted_rank(count, budget, falling) == expected
    assert count(expected) <= budget


def test_a_size_that_cannot_reach_the_budget_is_an_error(benchmark):
    import quality_adapt

    with pytest.raises(ValueError, match="no rank comes near the budget of 799"):
        quality_adapt.fitted_rank(lambda rank: min(rank, 700), 799)


def test_a_capped_size_below_the_budget_takes_its_largest_rank(benchmark):
    import quality_adapt

    count = lambda rank: min(100 * rank, 700)  # noqa: E731
    assert count(quality_adapt.fitted_rank(count, 799, capped=True)) == 700
    assert quality_adapt.fitted_rank(count, 399, capped=True) == 3


UNFITTED = ("untouched", "all weights", "VeRA", "IA3")
"""Methods whose size no budget sets; so are those whose names tell another size."""
OTHER_SIZES = ("threshold", "equal bytes", "four times the rank")


@pytest.fixture(scope="module")
def pico_tasks(tmp_path_factory, reviews):
    """A classification and a language modelling task on pico models wide enough for every method."""
    text = tmp_path_factory.mktemp("text") / "pairs.jsonl"
    starts = [f"{first} {second}" for first in WORDS[:8] for second in WORDS[12:20]]
    pairs = [{"prompt": start, "completion": " good plot" if i % 3 else " bad"} for i, start in enumerate(starts)]
    text.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    wide = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2}
    models = {
        "sequence-classification": (make_bert(**wide), reviews),
        "causal-lm": (make_model("causal-lm", num_key_value_heads=4, **wide), text),
    }
    made = {}
    for kind, (model, data) in models.items():
        folder = tmp_path_factory.mktemp("wide") / "pico"
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        overrides = (f"data.train={data}", "data.max_length=24", "model.dtype=float32", "probe.num_batches=4")
        made[kind] = {"model": str(folder), "kind": kind, "overrides": overrides}
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # PEFT's hooks for LoRA-GA
@pytest.mark.parametrize("kind", ["sequence-classification", "causal-lm"])
def test_every_method_trains_within_the_budget(benchmark, pico_tasks, kind, monkeypatch, tmp_path):
    """Two steps of each, measured on the test part; what is larger than plain LoRA says so in its name."""
    _, methods, _, tasks = benchmark
    import quality_run

    monkeypatch.setenv(methods.MEASUREMENTS, str(tmp_path))
    pico = tasks.Task(name="pico", about="", batch_size=4, num_steps=2, rank=16, **pico_tasks[kind])
    monkeypatch.setitem(tasks.TASKS, "pico", pico)
    for name, method in methods.METHODS.items():
        run = quality_run.train_once("pico", name, method.rates[0], 0, 2)
        assert math.isfinite(run["test"]["loss"]), name
        assert run["steps"] == (0 if name == "untouched" else 2), name
        if name not in UNFITTED and not any(size in name for size in OTHER_SIZES):
            assert 0 < run["trained_parameters"] <= run["budget"], name
            assert run["adapter_file_bytes"], name
