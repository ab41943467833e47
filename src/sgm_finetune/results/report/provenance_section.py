"""The head of the report and the section "How this run was made": name, date, command, machine, files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import yaml

from sgm_finetune.base.config import Config
from sgm_finetune.results.report.run_files import Run

FILES = {
    "metrics.json": "every number of the results",
    "plan.json": "what is trained and shared, and the measurements behind it",
    "adapter": "the adapter, for PEFT",
    "sgm_finetuned.pth": "what was trained, with its plan and labels, for sgm",
    "config.yaml": "every key of the configuration",
    "history.json": "the numbers of every step",
    "examples.json": "predictions before and after",
    "pictures.json": "the numbers behind the pictures",
    "prompts.json": "test prompts that an export answers",
    "ship.json": "the checks before shipping",
    "environment.json": "machine, versions, command, seeds",
    "checkpoints": "checkpoints of the training",
    "export": "exported models",
}


def head(run: Run) -> dict[str, Any]:
    """Returns name and date of the run."""
    return {"run_name": os.path.basename(os.path.abspath(run.folder)), "run_date": _date(run)}


def _date(run: Run) -> str:
    """Returns when the run began; of an older run, when metrics.json was written."""
    try:
        began = datetime.fromisoformat(run.environment.get("began", ""))
    except (TypeError, ValueError):
        try:
            written = (run.folder / "metrics.json").stat().st_mtime
        except OSError:
            return ""
        return f"metrics.json is of {datetime.fromtimestamp(written, UTC):%d %B %Y, %H:%M} UTC"
    return f"began on {began.astimezone(UTC):%d %B %Y, %H:%M} UTC"


def given_command(run: Run) -> tuple[str, str]:
    """Returns the command that started the run, and a remark on it."""
    given = [str(word) for word in run.environment.get("command") or []]
    if given:
        return shlex.join(given), "The command that was given, beside the configuration below:"
    changed = [f"{key}={_flow(value)}" for key, value in _changed(run.config.model_dump(mode="json"), _DEFAULTS)]
    return shlex.join(["sgm", "finetune", *changed]), "The command was not kept; this one has the same configuration:"


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()


_DEFAULTS = Config().model_dump(mode="json")


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns the keys whose values are not the defaults."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict) and defaults[key]:
            found += _changed(value, defaults[key], f"{prefix}{key}.")
        elif value != defaults.get(key):
            found.append((prefix + key, value))
    return found


def provenance_section(run: Run) -> dict[str, Any]:
    """Returns the section's values for the template."""
    environment, config = run.environment, run.config
    machine, seeds = environment.get("machine") or {}, environment.get("seeds")
    if not seeds:
        seeds = {"training": config.training.seed, "data": config.data.seed, "probe": config.probe.seed}
    cores = f"{machine['cores']} cores, {machine.get('threads')} threads" if machine.get("cores") else ""
    facts = {
        "Seeds": ", ".join(f"{name} {seed}" for name, seed in seeds.items()),
        "Fingerprint of the test data": run.metrics.get("test_fingerprint"),
        "System": machine.get("system"),
        "Processor": ", ".join(part for part in (machine.get("processor"), cores) if part),
        "GPU": ", ".join(machine.get("gpus", [])),
    }
    command, remark = given_command(run)
    return {
        "facts": [(name, value) for name, value in facts.items() if value],
        "given_command": command,
        "given_remark": remark,
        "versions": list((environment.get("versions") or run.metrics.get("environment") or {}).items()),
        "resolved": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip(),
        "files": [
            (name + "/" * (run.folder / name).is_dir(), what)
            for name, what in FILES.items()
            if (run.folder / name).exists()
        ],
    }
