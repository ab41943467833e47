"""`sgm doctor` finds what is wrong with a machine and says what to do."""

from __future__ import annotations

import io
import json
from importlib.metadata import PackageNotFoundError

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from sgm_finetune.commands import doctor, doctor_machine
from sgm_finetune.commands.cli import main


def named(findings, area):
    return [finding for finding in findings if finding.area == area]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_machine_that_runs_these_tests_is_ready(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert caught.value.code == 0
    assert found["ready"]
    areas = [finding["area"] for finding in found["findings"]]
    assert {"python", "packages", "processor", "memory", "disk", "4 bits (NF4)", "8 bits", "hub"} <= set(areas)


def test_a_package_that_is_absent_or_too_old_makes_it_not_ready(monkeypatch, capfd):
    real = doctor.version

    def version(name):
        if name == "peft":
            raise PackageNotFoundError(name)
        return "1.0" if name == "scipy" else real(name)

    monkeypatch.setattr(doctor, "version", version)
    wrong = named(doctor.examine(), "packages")[0]
    assert wrong.verdict == "broken"
    peft = next(line for line in map(Requirement, doctor.requires(doctor.DISTRIBUTION)) if line.name == "peft")
    assert f"{peft} is not installed" in wrong.text
    scipy = next(line for line in map(Requirement, doctor.requires(doctor.DISTRIBUTION)) if line.name == "scipy")
    assert f"scipy 1.0 is not {scipy.specifier}" in wrong.text
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    assert caught.value.code == 2
    assert "Not ready: packages" in capfd.readouterr().out


def test_a_quantised_layer_that_computes_wrongly_is_found(monkeypatch):
    monkeypatch.setattr(doctor_machine, "_layer_error", lambda *arguments: float("inf"))
    found = named(doctor.examine(), "4 bits (NF4)")[0]
    assert found.verdict == "missing"
    assert found.remedy == "use model.quantization=none"


def test_an_unreachable_hub_is_reported_with_the_alternatives(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (found,) = named(doctor.examine(hub_timeout=1.0), "hub")
    assert found.verdict == "missing"
    assert found.text.startswith("http://127.0.0.1:9 does not answer")
    assert "local folders" in found.remedy


def test_every_finding_is_printed_with_its_remedy():
    console = Console(file=io.StringIO(), width=60)
    doctor.report(
        [doctor.Finding("disk", "slow", "2 GiB free", "make room"), doctor.Finding("x", "works", "[y]")], console
    )
    assert console.file.getvalue().splitlines() == [
        "~ disk         2 GiB free",
        "               → make room",
        "✓ x            [y]",
        "",
        "Ready: sgm finetune runs here.",
    ]
