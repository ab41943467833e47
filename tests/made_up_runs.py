"""Made-up runs for reports and comparisons, and an HTML reader."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import torch
import yaml

from sgm_finetune.base.config_file import parse_config
from sgm_finetune.measure.plan_file import save_plan
from sgm_finetune.measure.scan_result import MatrixScan
from sgm_finetune.method.plan import Energy, Group, KindNumbers, Plan, PlannedMatrix, PlanSettings
from sgm_finetune.method.singular_values import SingularValues
from sgm_finetune.method.snr import signal_to_noise
from sgm_finetune.results.report.measured_histograms import histogram_of
from sgm_finetune.results.report.pictures import Pictures, PoolTable, SimilarityTable

READERS, WRITERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOID = {"meta", "link", "br", "hr", "img", "input"}


def sample_plan(num_layers: int = 30, seed: int = 0) -> Plan:
    """Returns a made-up plan: neighbours are merged, a quarter of o_proj is not trained, some layers are alone."""
    chance = random.Random(seed)
    matrices, groups, kinds = [], [], []
    for kind in KINDS:
        side = "input" if kind in READERS else "output"
        members: list[list[int]] = []
        start = 0
        while start < num_layers:
            size = chance.choice((1, 2, 4, 5, 8))
            members.append(list(range(start, min(start + size, num_layers))))
            start += size
        skipped = set(range(0, num_layers, 4)) if kind == "o_proj" else set()
        group_of = {}
        merged = [kept for run in members if len(kept := [layer for layer in run if layer not in skipped]) > 1]
        for index, layers in enumerate(merged):
            name = f"{kind}/{side}/{index}"
            group_of |= dict.fromkeys(layers, name)
            groups.append(
                Group(
                    name=name,
                    kind=kind,
                    side=side,
                    members=tuple(f"model.layers.{layer}.{kind}" for layer in layers),
                    similarity=chance.uniform(0.86, 0.99),
                    joint_retention=chance.uniform(0.85, 0.98),
                    snr_spread_db=chance.uniform(0, 6),
                )
            )
        for layer in range(num_layers):
            level = 4 * math.sin(layer / 5) + 3 * KINDS.index(kind) - 8 + chance.gauss(0, 1)
            matrices.append(
                PlannedMatrix(
                    name=f"model.layers.{layer}.{kind}",
                    kind=kind,
                    layer=layer,
                    shape=(576, 576),
                    selected=layer not in skipped,
                    group=group_of.get(layer),
                    snr=10 ** (level / 10),
                    snr_db=level,
                    signal_rank=40,
                    gradient_energy=0.3,
                    cosine_other_half=0.6,
                    kept_own=Energy(0.8, 0.5),
                    kept_shared=0.75 if layer in group_of else None,
                )
            )
        kinds.append(
            KindNumbers(kind, num_layers - len(skipped), side, 0.95, 0.44, 0.004, 0.11, chance.uniform(0.4, 0.8))
        )
    matrices.sort(key=lambda matrix: (matrix.layer, KINDS.index(matrix.kind)))
    return Plan(
        "smollm2-135m-instruct", PlanSettings(rank=16, alpha=32, scope="layers"), tuple(matrices), tuple(groups),
        tuple(kinds), "mp",
    )  # fmt: skip


def plain_plan() -> Plan:
    """Returns the plan of a run without scan, probe and merging: every optional number is None."""
    matrices = tuple(
        PlannedMatrix(f"h.{layer}.c_attn", "c_attn", layer, (2304, 768), selected=layer > 0) for layer in range(3)
    )
    return Plan("gpt2", PlanSettings(rank=8, alpha=16, side="none"), matrices, (), (KindNumbers("c_attn", 2, None),))


def pooled_plan(num_layers: int = 6, pools_of_a_kind: int = 1) -> Plan:
    """Returns a made-up plan with rank pools of equal size, in which every matrix is."""
    plan = sample_plan(num_layers)
    groups, owner = [], {}
    for kind in KINDS:
        size = num_layers // pools_of_a_kind
        for index in range(pools_of_a_kind):
            members = tuple(f"model.layers.{layer}.{kind}" for layer in range(index * size, (index + 1) * size))
            groups.append(Group(f"{kind}/both/{index}", kind, "both", members, "spectral", 0.7, 0.6, 2.0))
            owner |= dict.fromkeys(members, groups[-1].name)
    return replace(
        plan,
        settings=PlanSettings(rank=24, alpha=32, scope="pool", threshold=-1.0),
        matrices=tuple(replace(matrix, selected=True, group=owner[matrix.name]) for matrix in plan.matrices),
        groups=tuple(groups),
        kinds=tuple(replace(kind, num_layers=num_layers, side="both") for kind in plan.kinds),
    )


def sample_history(steps: int = 240) -> list[dict]:
    """Returns Transformers' log history: a loss per step, a validation loss every quarter, the closing summary."""
    chance = random.Random(1)
    history: list[dict] = []
    for step in range(1, steps + 1):
        loss = 0.35 + 0.4 * math.exp(-step / 50) + chance.gauss(0, 0.06)
        history.append({"step": step, "epoch": step / steps, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0,
                        "train_tokens_per_second": 900 + step % 7, "train_peak_memory_bytes": 2.6e9})  # fmt: skip
        if step % max(1, steps // 4) == 0:
            history.append({"step": step, "eval_loss": 0.34 + 0.35 * math.exp(-step / 60), "eval_runtime": 4.2})
    return [*history, {"step": steps, "train_loss": 0.41, "train_runtime": 311.0}]


def classification_metrics(labels: tuple[str, ...] = ("negative", "positive")) -> dict:
    return {
        "model": "smollm2-135m-instruct",
        "task": "sequence-classification",
        "data": "rotten-tomatoes: 7,676 train · 853 validation · 1,066 test",
        "labels": list(labels),
        "before": {"loss": 0.7213, "accuracy": 0.4981, "macro_f1": 0.3326, "majority_accuracy": 0.5,
                   "confusion_matrix": [[531, 2], [533, 0]], "num_examples": 1066},
        "after": {"loss": 0.3127, "accuracy": 0.8734, "macro_f1": 0.8729, "majority_accuracy": 0.5,
                  "confusion_matrix": [[451, 82], [53, 480]], "num_examples": 1066},
        "trainable_parameters": 3_009_152,
        "plain_lora_parameters": 4_884_480,
        "seconds": {"scan": 3.91, "probe": 41.2, "train": 312.7, "evaluate": 38.1, "total": 402.4},
        "peak_memory_bytes": 2_913_400_000,
        "predicted": {"peak_bytes": 2_700_000_000},
        "steps": 240,
        "best_step": 180,
        "tokens_per_second": 1873.4,
        "optimizer": "spectral",
        "learning_rate": 0.0125,
        "probe": {"loss": 0.72, "num_batches": 8, "num_tokens": 1893, "sketch_bytes": 92_000_000,
                  "activation_bytes": 31_000_000},
        "environment": {"python": "3.11.2", "sgm-finetune": "0.1.0", "torch": "2.13.0", "device": "CPU, 8 threads"},
    }  # fmt: skip


def language_metrics() -> dict:
    return classification_metrics() | {
        "task": "causal-lm",
        "labels": [],
        "before": {"loss": 3.534, "perplexity": 34.261, "num_tokens": 20_480, "num_examples": 40},
        "after": {"loss": 2.617, "perplexity": 13.694, "num_tokens": 20_480, "num_examples": 40},
    }


class Reader(HTMLParser):
    """Collects tags, attributes and text, and every tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.problems: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.problems == []
    assert reader.open == []
    return reader


def sample_examples() -> dict:
    """Returns what `changed_examples` writes: 7 became right, 1 became wrong, 4 stayed wrong, of 200."""
    changed = [("mended", "bad", "good"), ("spoilt", "good", "bad"), ("mended", "bad", "good"), ("other", "bad", "bad")]
    classes = {"good": {"mended": 5, "spoilt": 1, "other": 4, "right": 90},
               "bad": {"mended": 2, "spoilt": 0, "other": 0, "right": 98}}  # fmt: skip
    return {
        "format": "sgm-examples/1", "num_compared": 200, "num_changed": {"mended": 7, "spoilt": 1, "other": 0},
        "counts": {"mended": 7, "spoilt": 1, "other": 4, "right": 188}, "by_class": classes,
        "examples": [
            {"index": at, "text": f"text {at}", "truth": "good", "before": before, "after": after, "became": became,
             "class": "good"}
            for at, (became, before, after) in enumerate(changed)
        ],
    }  # fmt: skip


def older_examples() -> dict:
    """Returns what an older version wrote, which had no counts."""
    changed = [("mended", "bad", "good"), ("spoilt", "good", "bad"), ("mended", "bad", "good")]
    return {
        "format": "sgm-examples/1", "num_compared": 200, "num_changed": {"mended": 7, "spoilt": 1, "other": 0},
        "examples": [
            {"index": at, "text": f"text {at}", "truth": "good", "before": before, "after": after, "became": became}
            for at, (became, before, after) in enumerate(changed)
        ],
    }  # fmt: skip


def sample_pictures(plan: Plan) -> Pictures:
    """Returns two histograms, the similarities of the layers of every kind on both sides, and who uses which direction
    of the plan's pools."""
    spectra = []
    for at, weights in enumerate((torch.randn(60, 40), torch.zeros(6, 5))):
        values = torch.linalg.svdvals(weights.double())
        found = signal_to_noise(values, *weights.shape)
        scanned = MatrixScan(f"layers.{at}.fc", "layers.*.fc", at, tuple(weights.shape), found.sigma, found.edge,
                             found.signal_rank, found.snr, found.snr_db, "", 1.0)  # fmt: skip
        spectra.append(histogram_of(SingularValues(values, (weights.shape[0], weights.shape[1])), scanned))
    tables = []
    for kind in dict.fromkeys(matrix.kind for matrix in plan.matrices):
        names = tuple(matrix.name for matrix in plan.matrices if matrix.kind == kind)
        values = tuple(0.5 + (at % 50) / 100 for at in range(len(names) * (len(names) - 1) // 2))
        tables += [SimilarityTable(kind, side, names, values) for side in ("input", "output")]
    pools = [group for group in plan.groups if group.side == "both"][:8]
    used = [
        PoolTable(pool.name, pool.members, 2.5, 6, tuple(tuple((7 * at + one) % 101 / 100 for at in range(64))
                                                         for one in range(len(pool.members))))
        for pool in pools
    ]  # fmt: skip
    return Pictures(tuple(spectra), tuple(tables), tuple(used))


def leave_run(folder: Path, accuracy: float, fingerprint: str | None = "a", metrics: dict | None = None, **training):
    """Writes the files of a finished run that a comparison reads."""
    folder.mkdir()
    metrics = metrics or classification_metrics()
    metrics["after"] |= {} if "perplexity" in metrics["after"] else {"accuracy": accuracy}
    metrics |= {} if fingerprint is None else {"test_fingerprint": fingerprint}
    metrics["learning_rate"] = training.get("learning_rate", 0.0125)
    config = parse_config({"training": training, "model": {"task": metrics["task"]}, "output": {"dir": str(folder)}})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "history.json").write_text(json.dumps(sample_history(40)))
    save_plan(replace(sample_plan(2), starts={}), folder / "plan.json")
    return folder
