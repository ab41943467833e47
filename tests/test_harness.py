"""lm-evaluation-harness evaluates a model that is being fine-tuned."""

from __future__ import annotations

import json
import random
import re
from io import StringIO

import pytest
from conftest import BAD, GOOD, OTHER
from rich.console import Console

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands.requests import ShipRequest
from sgm_finetune.commands.ship import ship
from sgm_finetune.results import harness

TASK = """
task: pico-verdict
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{film}}}}"
doc_to_choice: ["good", "bad"]
doc_to_target: verdict
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def film(number: int) -> str:
    """Returns a review, which is good if the number is even."""
    chooser = random.Random(number)
    words = chooser.choices((GOOD, BAD)[number % 2], k=3) + chooser.choices(OTHER, k=4)
    chooser.shuffle(words)
    return " ".join(words)


@pytest.fixture
def task(tmp_path):
    """Writes a task of our own in lm-eval's format: whether a review is good or bad."""
    rows = [{"film": film(n), "verdict": n % 2} for n in range(200, 220)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "pico.yaml"
    path.write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    return path


@pytest.mark.slow
def test_a_task_is_run_before_and_after(task, settings, tmp_path):
    rows = [{"prompt": film(n), "completion": (" good", " bad")[n % 2]} for n in range(180)]
    path = tmp_path / "verdicts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = StringIO()
    overrides = [*settings, "model.task=causal-lm", f"data.train={path}", f"evaluation.harness=[{task}]"]
    overrides += ["training.max_steps=80", "evaluation.num_generated=8"]
    metrics = pipeline.finetune(load_config(None, overrides), Console(file=said, width=200))
    assert metrics["before"]["harness"]["pico-verdict"]["acc"] < 0.8
    assert metrics["after"]["harness"]["pico-verdict"]["acc"] > 0.9
    assert metrics["after"]["exact_match"] > 0.7
    assert "pico-verdict · acc " in said.getvalue()
    assert "Pico-verdict: acc" in (tmp_path / "out" / "report.html").read_text()

    verdict = ship(
        load_config(None, [f"output.dir={tmp_path / 'out'}"]), [], ShipRequest(keep=(str(task),)), Console(file=said)
    )
    (kept,) = [check for check in verdict["checks"] if check["subject"] == "kept"]
    assert (kept["name"], kept["passed"], kept["number"]) == ("pico-verdict: acc", True, 20)
    assert kept["after"] == pytest.approx(metrics["after"]["harness"]["pico-verdict"]["acc"])


@pytest.mark.slow
def test_a_task_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no task `pico-nonsense`"):
        harness.check_harness(["pico-nonsense"], "causal-lm")


def test_what_cannot_be_run_is_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"does not go with model\.task=sequence-classification"):
        harness.check_harness(["arc_easy"], "sequence-classification")
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(f"needs lm-eval; leave it out, or {install_line('harness')}")):
        harness.check_harness(["arc_easy"], "causal-lm")
    harness.check_harness([], "sequence-classification")
