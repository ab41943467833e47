"""`make gpu`: the list of what waits for a GPU keeps its promises where there is none."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from systems import needs_linux

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch):
    """The modules of benchmarks/gpu."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    before = set(sys.modules)
    import items
    import pack
    import publish
    import recorded_step
    import run
    import unpack

    yield argparse.Namespace(
        items=items, pack=pack, publish=publish, recorded_step=recorded_step, run=run, unpack=unpack
    )
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in (getattr(sys.modules[name], "__file__", None) or ""):
            monkeypatch.delitem(sys.modules, name)


def item(gpu, folder: Path, name: str, code: str, seconds: int = 60):
    """An item that runs `code`, in which `out` is its results file."""
    script = folder / f"{name}.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\nfrom record import update\nout = Path(sys.argv[1])\n{code}"
    )
    return gpu.items.Item(name, "?", str(script), ("{out}",), ("{out}",), seconds, 1)


def run_list(gpu, items, results: Path, seconds: float = 60.0) -> int:
    options = argparse.Namespace(results=results, seconds=seconds, pico=False)
    return gpu.run.run_all(items, options, None)


def test_an_item_that_fails_does_not_stop_the_list(gpu, tmp_path):
    items = [
        item(gpu, tmp_path, "broken", "update(out, rows=[1])\nprint('about to fail')\n1 / 0"),
        item(gpu, tmp_path, "whole", "update(out, rows=[2])"),
    ]
    assert run_list(gpu, items, tmp_path / "results") == 1
    broken, whole = (json.loads((tmp_path / "results" / f"{i.name}.json").read_text()) for i in items)
    assert (broken["status"], broken["rows"]) == ("failed", [1])
    assert "about to fail" in broken["output"]
    assert "ZeroDivisionError" in broken["output"]
    assert (whole["status"], whole["rows"]) == ("done", [2])


def test_an_item_that_resumes_keeps_its_results_and_any_other_begins_anew(gpu, tmp_path):
    code = "from record import read\nupdate(out, rows=[*read(out).get('rows', []), 1])"
    anew = item(gpu, tmp_path, "anew", code)
    resumed = dataclasses.replace(item(gpu, tmp_path, "resumed", code), resumes=True)
    for _ in range(2):
        assert run_list(gpu, [anew, resumed], tmp_path / "results") == 0
    found = {one.name: json.loads((tmp_path / "results" / f"{one.name}.json").read_text()) for one in (anew, resumed)}
    assert {name: kept["rows"] for name, kept in found.items()} == {"anew": [1], "resumed": [1, 1]}


def test_a_time_limit_ends_what_the_item_started_and_keeps_what_it_measured(gpu, tmp_path):
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "update(out, rows=[1], child=child.pid)\ntime.sleep(300)"
    )
    began = time.monotonic()
    assert run_list(gpu, [item(gpu, tmp_path, "slow", code, seconds=4)], tmp_path) == 0
    assert time.monotonic() - began < 60
    kept = json.loads((tmp_path / "slow.json").read_text())
    assert (kept["status"], kept["rows"]) == ("time limit", [1])
    deadline = time.monotonic() + 20
    while _runs(kept["child"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(kept["child"])


@needs_linux
def test_ending_the_list_ends_the_item(gpu, tmp_path):
    slow = item(gpu, tmp_path, "slow", "import os, time\nupdate(out, rows=[os.getpid()])\ntime.sleep(300)")
    script = tmp_path / "runner.py"
    script.write_text(
        f"import argparse, sys\nsys.path.insert(0, {str(ROOT / 'benchmarks' / 'gpu')!r})\nimport items, run\n"
        f"from pathlib import Path\none = items.Item('slow', '?', {slow.script!r}, "
        "('{out}',), ('{out}',), 60, 1)\nrun.leave_in_order()\n"
        f"run.run_all([one], argparse.Namespace(results=Path({str(tmp_path)!r}), seconds=60.0, pico=False), None)\n"
    )
    runner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 50
    rows: list[int] = []
    while not rows and time.monotonic() < deadline:
        time.sleep(0.1)
        kept = tmp_path / "slow.json"
        rows = json.loads(kept.read_text()).get("rows", []) if kept.exists() else []
    assert _runs(rows[0])
    runner.terminate()
    assert runner.wait(30) == 128 + signal.SIGTERM
    assert not _runs(rows[0])


def _runs(pid: int) -> bool:
    """Whether the process computes; one that ended may wait for its parent to notice."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except FileNotFoundError:
        return False


def test_items_that_the_time_does_not_reach_are_not_begun(gpu, tmp_path, capsys):
    assert run_list(gpu, [item(gpu, tmp_path, "late", "update(out, rows=[1])")], tmp_path / "r", seconds=0.5) == 0
    assert "late: not begun" in capsys.readouterr().out
    assert not (tmp_path / "r" / "late.json").exists()


def test_the_list_names_each_item_with_its_time_and_bytes(gpu, tmp_path):
    for name in ("tools", "unsloth", "model-1", "model-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(2_000_000))
    shown = subprocess.run(
        [sys.executable, "benchmarks/gpu/run.py", "--list", "--pack", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for one in gpu.items.ITEMS:
        assert f"{one.name}: up to {one.seconds} s, {one.gib} GiB of the GPU; carries tools 2.0 MB" in shown
        assert one.settles in shown
    assert "tools 2.0 MB, model-1 2.0 MB, model-2 2.0 MB" in shown


def test_every_item_is_explained(gpu):
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for one in gpu.items.ITEMS:
        assert f"\n**{one.name}**" in page
        assert (ROOT / one.script).is_file()


def test_without_a_gpu_the_list_says_so(gpu, tmp_path):
    blind = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/gpu/run.py", "--results", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=blind)
    assert ended.returncode == 2
    assert ended.stderr == "PyTorch finds no GPU here; --pico tries every item on the CPU, --list shows them\n"


@pytest.mark.slow
def test_every_item_runs_in_small_on_a_cpu(gpu, tmp_path):
    command = ["make", "gpu", f"GPU_PYTHON={sys.executable}", f"ARGS=--pico --results {tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    results = {one.name: json.loads((tmp_path / f"{one.name}.json").read_text()) for one in gpu.items.ITEMS}
    assert {name: found["status"] for name, found in results.items()} == dict.fromkeys(results, "done"), ended.stdout
    for name, found in results.items():
        rows = found["runs"] if name == "quality" else found["rows"]
        assert rows, name
        assert not [row for row in rows if "failed" in row], name
    assert results["quality"]["failed"] == []
    assert {row["way"] for row in results["graphs"]["rows"]} == {"SGM", "SGM, recorded", "SGM, reduced overhead"}


def test_a_recorded_step_has_the_gradients_of_the_step(gpu):
    import torch
    from conftest import adapted, make_model

    model = adapted(make_model("causal-lm"))
    base = model.get_base_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    ids, other = (torch.randint(3, 20, (2, 12)) for _ in range(2))
    step = gpu.recorded_step.RecordedStep(
        lambda batch: gpu.recorded_step.packed_loss(base.base_model, base.lm_head, batch), trained, ids
    )
    for batch in (ids, other, ids):
        loss = step(batch)
        found = [p.grad.clone() for p in trained]
        model.zero_grad()
        expected = model(input_ids=batch, labels=batch).loss
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        for parameter, gradient in zip(trained, found, strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
    with pytest.raises(ValueError, match=r"recorded for batches of \(2, 12\), not \(1, 12\)"):
        step(ids[:1])


def make_wheel(folder: Path, name: str, files: dict[str, str], requires: tuple[str, ...] = ()) -> Path:
    stem = f"{name}-1.0"
    metadata = "".join(f"Requires-Dist: {one}\n" for one in requires)
    every = files | {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, text in every.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        rows.append(f"{path},sha256={digest},{len(text)}")
    every[f"{stem}.dist-info/RECORD"] = "\n".join([*rows, f"{stem}.dist-info/RECORD,,"]) + "\n"
    wheel = folder / f"{stem}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as made:
        for path, text in every.items():
            made.writestr(path, text)
    return wheel


def test_a_wheel_of_which_files_are_left_out_is_still_installable(gpu, tmp_path, monkeypatch):
    """pip installs it, without a network; and the tasks' data lie beside it."""
    wheel = make_wheel(
        tmp_path / "pack" / "tools", "kernels_of_ours",
        {"kernels_of_ours/__init__.py": "here = 1\n", "kernels_of_ours/a.so": "a", "kernels_of_ours/b.so": "b"},
    )  # fmt: skip
    gpu.pack.trim(wheel, lambda name: not name.endswith("a.so"))
    assert gpu.pack.unrecorded(wheel) == []
    data = tmp_path / "pack" / "tools" / "data" / "texts" / "rows.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("{}")
    monkeypatch.setattr(gpu.unpack, "scratch", lambda: tmp_path / "scratch")
    found = gpu.unpack.unpack(tmp_path / "pack", ("tools",))
    site = Path(found["PYTHONPATH"])
    assert sorted(path.name for path in (site / "kernels_of_ours").iterdir()) == ["__init__.py", "b.so"]
    assert (site / "texts" / "rows.jsonl").read_text() == "{}"


def test_the_halves_of_a_model_are_joined_whenever_they_come(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.unpack, "scratch", lambda: tmp_path / "scratch")
    whole = tmp_path / "small.gguf"
    whole.write_bytes(os.urandom(1001))
    pack = tmp_path / "pack"
    gpu.pack.halve(whole, [pack / "model-1", pack / "model-2"])
    shutil.move(pack / "model-2", tmp_path / "later")
    gpu.unpack.unpack(pack, ("model-1", "model-2"))
    shutil.rmtree(pack / "model-1")
    shutil.move(tmp_path / "later", pack / "model-2")
    found = gpu.unpack.unpack(pack, ("model-1", "model-2"))
    assert (Path(found["SGM_CACHE"]) / "models" / "small.gguf").read_bytes() == whole.read_bytes()


def test_a_requirement_that_nothing_meets_is_named(gpu, tmp_path):
    make_wheel(
        tmp_path, "one", {}, ("two>=2", "torch", "three; extra == 'more'", "four; python_version < '3.10'", "five")
    )
    make_wheel(tmp_path, "two", {})
    assert gpu.pack.missing([tmp_path]) == [
        "one-1.0-py3-none-any.whl needs two>=2, the pack has 1.0",
        "one-1.0-py3-none-any.whl needs five",
    ]


@pytest.fixture
def pages(tmp_path):
    """A copy of what publishing changes."""
    for folder in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("assets", "figures"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def forget(pages: Path, *items: str) -> None:
    """Removes what is recorded of some items."""
    path = pages / "benchmarks" / "results" / "gpu.json"
    path.write_text(json.dumps([one for one in json.loads(path.read_text()) if one.get("item") not in items]))


def test_the_pages_hold_what_is_recorded(gpu, pages):
    assert gpu.publish.publish(pages / "none", pages) == [], "make gpu-publish"


def a_step(way: str, batch: int, checkpointing: str, speed: float, gib: float) -> dict:
    floor = {"tera_operations": 100.0, "weights_gib": 5.0, "activations_gib": 1.0}
    return {"way": way, "batch": batch, "length": 2048, "checkpointing": checkpointing, "floor": floor,
            "tokens_per_second": speed, "peak_gib": gib, "seconds": [1.0], "losses": [2.0]}  # fmt: skip


def write_results(folder: Path) -> None:
    card = {"device": "A made-up card", "bfloat16_tflops": 800.0, "date": "2027-01-02", "status": "done"}
    peft, ours = a_step("PEFT QLoRA", 1, "on", 5000.0, 12.0), a_step("SGM", 1, "on", 7500.0, 6.0)
    adapter = {
        "task": "long-arithmetic", "tier": "GPU", "rank": 4, "steps": 300, "batch_size": 8, "layers": 210,
        "trained_parameters": 10**6, "budget": 10**6, "optimizer_bytes": 8 * 10**6, "adapter_file_bytes": 4 * 10**6,
        "measuring_seconds": 0.0, "energy_retained": None, "seconds_per_step": 0.05, "train_loss": 1.0, "threads": 1,
        "peak_gpu_bytes": 2**30, "peak_resident_bytes": 2**30, "device": "A made-up card", "versions": {"torch": "2"},
    }  # fmt: skip
    runs = []
    for method, rates in (("LoRA", (5e-4, 1.5e-3, 4e-3)), ("SGM", (0.006, 0.0125, 0.025))):
        for rate in rates:
            runs.append(adapter | {"method": method, "rate": rate, "seed": 100, "validation": {"loss": 1 + rate}})
        tested = {"loss": 1.25 if method == "SGM" else 1.5, "right": 0.5, "num_examples": 200}
        runs += [adapter | {"method": method, "rate": rates[0], "seed": seed, "test": tested} for seed in (0, 1)]
    files = {
        "tests": {"rows": [{"test": "tests/test_gpu.py::test_a", "outcome": "passed", "seconds": 1.0},
                           {"test": "tests/test_gpu.py::test_b[x]", "outcome": "failed", "seconds": 1.0}]},
        "step": {"rows": [ours, peft, a_step("SGM", 1, "off", 9000.0, 14.0)]},
        "unsloth": {"rows": [a_step("Unsloth", 1, "on", 6000.0, 7.0)]},
        "graphs": {"rows": [peft, a_step("SGM, recorded", 1, "on", 8000.0, 8.0)]},
        "scan": {"rows": [{"seconds": 44.6, "matrices": 226}, {"seconds": 40.2, "matrices": 226}]},
        "planner": {"rows": [{"way": "SGM", "batch": 1, "length": 2048, "checkpointing": "on", "peak_gib": 6.0,
                              "predicted_gib": 6.3}]},
        "quality": {"runs": runs},
    }  # fmt: skip
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(card | {"item": name, "pico": False} | content))


def test_the_numbers_of_a_run_go_into_the_pages_once(gpu, pages):
    forget(pages, "stream", "full")
    write_results(pages / "new")
    assert gpu.publish.publish(pages / "new", pages) == ["docs/speed.md", "docs/estimate.md", "docs/results.md"]
    speed, estimate, results = (
        (pages / "docs" / name).read_text(encoding="utf-8") for name in ("speed.md", "estimate.md", "results.md")
    )
    rows = [line for line in speed.splitlines() if line.startswith("| 1 × 2,048 | on |")]
    assert rows == [
        "| 1 × 2,048 | on | SGM | 7,500 | 1.50 | 46 % | 6.00 | 0.50 | 1.00 |",
        "| 1 × 2,048 | on | PEFT QLoRA | 5,000 | 1.00 | 31 % | 12.00 | 1.00 | 2.00 |",
        "| 1 × 2,048 | on | Unsloth | 6,000 | 1.20 | 37 % | 7.00 | 0.58 | 1.17 |",
        "| 1 × 2,048 | on | PEFT QLoRA | 5,000 | 1.00 | 31 % | 12.00 | 1.00 | 2.00 |",
        "| 1 × 2,048 | on | SGM, recorded | 8,000 | 1.60 | 49 % | 8.00 | 0.67 | 1.33 |",
    ]
    assert "- `pytest -m gpu`: 1 of 2 tests passed. Failed: `test_b[x]`." in speed
    assert "- The scan of an 8B model (226 matrices) took 45 and 40 s on one A made-up card." in speed
    assert "- Not measured yet ([gpu.md](gpu.md)): stream, full." in speed
    assert "| SGM | 1 × 2,048 | on | 6.30 | 6.00 | +5.0 % |" in estimate
    assert "The tables of long-arithmetic were made on a GPU, all others without one." in results
    assert "| SGM | 1.000 M | 11.44 | 3.81 | 4 | 0.006* | 1.2500 ± 0.0000 | −0.2500 ± 0.0000 |" in results
    after = {path: path.read_bytes() for path in pages.rglob("*") if path.is_file() and path.suffix != ".png"}
    assert gpu.publish.publish(pages / "new", pages) == []
    assert after == {path: path.read_bytes() for path in after}


def test_what_pico_computed_is_never_published(gpu, pages):
    (pages / "pico").mkdir()
    (pages / "pico" / "step.json").write_text(json.dumps({"pico": True, "rows": [1]}))
    with pytest.raises(SystemExit, match=r"step\.json is from --pico: it holds no measurement"):
        gpu.publish.publish(pages / "pico", pages)
