"""The notebook holds no output, installs nothing where SGM is installed, and its cells run in their order."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgm_finetune.data.embedded import EMBEDDED

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "first_run.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
SOURCES = {cell["id"]: "".join(cell["source"]) for cell in CELLS}
SMALL = "EXAMPLES = 512\nTESTS = 200\n"
"""Stands for the cell tagged `parameters`, so that the notebook takes minutes without a GPU."""


def test_the_notebook_holds_no_output():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) > 8
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


def test_the_notebook_says_before_anything_else_that_it_needs_an_address():
    assert SOURCES["repository"].startswith('REPOSITORY = ""')
    before_the_clone = SOURCES["installation"].partition("git clone")[0]
    assert "assert REPOSITORY" in before_the_clone


def test_the_notebook_installs_without_the_locked_versions_which_would_replace_the_torch_of_the_service():
    assert '%pip install "./sgm[demo]"' in SOURCES["installation"]
    assert not any("requirements" in source or "torch==" in source for source in SOURCES.values())


def write_reviews(path: Path) -> None:
    reviews = EMBEDDED["rotten-tomatoes"]().columns
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["review", "verdict"])
        rows.writerows([reviews["text"][n], "good" if reviews["label"][n] else "bad"] for n in range(0, 5400, 54))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
def test_the_cells_of_the_notebook_run_in_their_order(tmp_path, monkeypatch):
    """From an empty folder, in some minutes. A file mine.csv appears before the last cell, as if it was uploaded."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    kept = []
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = SMALL
        kept.append(cell)
        if cell.cell_type == "code" and "\n!" in f"\n{cell.source}":
            kept.append(nbformat.v4.new_code_cell(f"assert _exit_code == 0, {cell.id!r}"))
    book.cells = kept
    write_reviews(tmp_path / "mine.csv")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    client = nbclient.NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    said = {cell.id: "".join(o.get("text", "") for o in cell.outputs) for cell in kept if cell.cell_type == "code"}
    assert said["installation"] == ""  # SGM is installed
    assert (tmp_path / "plan.json").is_file()
    metrics = json.loads((tmp_path / "runs" / "first" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["after"]["num_examples"] == 200
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["after"]["accuracy"] > metrics["after"]["majority_accuracy"] + 0.1
    assert said["examples"].count("(true: ") == 8
    (shown,) = [cell.outputs for cell in kept if cell.get("id") == "report"]
    assert [output.output_type for output in shown] == ["execute_result"], shown  # no warning beside it
    assert shown[0].data["text/html"].startswith("<div><iframe srcdoc=")
    good, bad = (json.loads(line.partition("]")[0] + "]") for line in said["peft-load"].splitlines()[-2:])
    assert good[1] > bad[1]  # class 1 is a good review
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.network
def test_the_installation_keeps_a_torch_of_the_service_that_fits(tmp_path):
    """pip plans the notebook's install line in an environment that says it has a CUDA build of another version."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python3*/site-packages")
    torch = packages / "torch-2.12.0+cu126.dist-info"
    torch.mkdir()
    (torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0+cu126\n", encoding="utf-8")
    (torch / "INSTALLER").write_text("pip\n", encoding="utf-8")
    pip = [str(tmp_path / "env" / "bin" / "python"), "-m", "pip", "install"]
    subprocess.run([*pip, "--dry-run", "--report", "plan.json", f"{ROOT}[demo]"], cwd=tmp_path, check=True)
    planned = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["install"]
    names = {package["metadata"]["name"].lower() for package in planned}
    assert {"sgm-finetune", "peft", "transformers"} <= names
    assert not any(name == "torch" or name.startswith("nvidia-") for name in names)
