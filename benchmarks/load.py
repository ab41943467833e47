"""Measures what grows with the size of an input: each row in a process of its own.

    python benchmarks/load.py before            # all rows, appended to benchmarks/results/load.json
    python benchmarks/load.py after estimate    # one row

PYTHONPATH names the source to measure. Processor time is the number to read: on a machine that does other work too, the
wall time says more about that work.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recording import append_run, processor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def estimate(folder: Path, num_layers: int = 160) -> dict:
    """`sgm estimate` of a model of 160 layers."""
    from conftest import llama_config, make_tokenizer

    from sgm_finetune.commands.cli import main

    llama_config(num_hidden_layers=num_layers).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    lines = [f"good film {i},{'ab'[i % 2]}" for i in range(300)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]))
    (folder / "empty.yaml").write_text("")
    settings = [f"model.name={folder / 'model'}", f"data.train={folder / 'rows.csv'}", "data.max_length=64"]
    measured = timed(lambda: run_command(main, ["estimate", str(folder / "empty.yaml"), *settings]))
    return {"layers": num_layers, **measured}


def report(folder: Path, num_classes: int = 1000) -> dict:
    """report.html and metrics.json of a run with 1,000 classes."""
    import numpy as np
    from made_up_runs import classification_metrics as sample
    from made_up_runs import leave_run

    from sgm_finetune.commands.cli import main
    from sgm_finetune.results.metrics import classification_metrics

    generator = np.random.default_rng(0)
    truth = generator.integers(num_classes, size=20_000)
    found = {}
    for when, share in (("before", 0.1), ("after", 0.7)):
        guessed = np.where(
            generator.random(len(truth)) < share, truth, generator.integers(num_classes, size=len(truth))
        )
        found[when] = classification_metrics(truth.tolist(), guessed.tolist(), num_classes)
    metrics = sample(tuple(f"class {i}" for i in range(num_classes)))
    for when, values in found.items():
        metrics[when] = {**metrics[when], **values}
        if "confusion_matrix" not in values:
            metrics[when].pop("confusion_matrix", None)
    leave_run(folder / "run", 0.8, metrics=metrics)
    measured = timed(lambda: run_command(main, ["report", str(folder / "run")]))
    sizes = {name: (folder / "run" / name).stat().st_size for name in ("report.html", "metrics.json")}
    return {"classes": num_classes, **measured, **{f"{name} bytes": size for name, size in sizes.items()}}


ROWS = {"estimate": estimate, "report": report}


def run_command(main, arguments: list[str]) -> None:
    try:
        main(arguments)
    except SystemExit as ended:
        if ended.code:
            raise


def timed(run) -> dict:
    """Wall and processor seconds of `run`, and the peak memory of the process."""
    wall, computed = time.perf_counter(), time.process_time()
    run()
    seconds = {"wall": round(time.perf_counter() - wall, 1), "processor": round(time.process_time() - computed, 1)}
    return {**seconds, "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def main() -> None:
    if sys.argv[1] == "--row":
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"row": sys.argv[2], **ROWS[sys.argv[2]](Path(folder))}))
        return
    started, rows = time.perf_counter(), []
    for name in sys.argv[2:] or ROWS:
        ran = subprocess.run([sys.executable, __file__, "--row", name], capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"{name}: {ran.stderr}")
        rows.append(json.loads(ran.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    command = f"python benchmarks/load.py {' '.join(sys.argv[1:])}"
    append_run("load", command, started, rows, ("torch", "transformers", "peft"), source=sys.argv[1], **processor())


if __name__ == "__main__":
    main()
