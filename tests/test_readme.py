"""README.md is short, its links and numbers hold, and its Python runs as it stands."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
CLAIMS = README.partition("## Three claims")[2].partition("\n## ")[0]


def claim(number: int) -> str:
    return re.search(rf"^{number}\. (.*)$", CLAIMS, re.MULTILINE)[1]


def figures(text: str, form: str) -> list[float]:
    """The numbers that the groups of `form` match in `text`."""
    return [
        float(number) for found in re.findall(form, text) for number in ([found] if isinstance(found, str) else found)
    ]


def test_readme_is_read_to_its_end():
    assert len(README.splitlines()) <= 110


def test_every_link_and_picture_of_readme_is_there():
    targets = re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(r'(?:src|srcset|href)="([^"]+)"', README)
    local = [target.partition("#")[0] for target in targets if not target.startswith("http")]
    assert len(local) > 20
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_every_anchor_of_readme_is_a_heading():
    for page, anchor in re.findall(r"\]\(([^)\s#]+)#([^)\s]+)\)", README):
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_folder_of_the_tree_in_readme_is_there():
    tree = README.partition("## The repository")[2].partition("```text\n")[2].partition("```")[0]
    rooms = {line.split("/")[0].strip() for line in tree.splitlines() if line.startswith("  ")}
    package = ROOT / "src" / "sgm_finetune"
    assert rooms == {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    for line in tree.splitlines():
        assert (package if line.startswith("  ") else ROOT).joinpath(line.split()[0].rstrip(",")).exists(), line


def test_every_claim_of_readme_names_its_command_and_its_results():
    for number in (1, 2, 3):
        (script,) = re.findall(r"`python (benchmarks/\w+\.py)`", claim(number))
        (results,) = re.findall(r"\((benchmarks/results/[\w.]+)\)", claim(number))
        assert (ROOT / script).is_file()
        assert (ROOT / results).is_file()


def test_the_losses_in_readme_are_those_of_its_table():
    """Claim 1 against the generated table, which tests/test_quality.py compares with the results."""
    rows = {cells[1].strip(): cells for line in CLAIMS.splitlines() if len(cells := line.split("|")) > 7}
    gains = [part for cells in (rows["SGM"],) for part in (cells[4], cells[7])]
    assert figures(claim(1), r"by ([\d.]+) ± ([\d.]+).*? and ([\d.]+) ± ([\d.]+)") == [
        float(number) for gain in gains for number in gain.strip().lstrip("−").split(" ± ")
    ]
    assert figures(claim(1), r"our step gains ([\d.]+) and ([\d.]+)\.") == [
        float(rows["LoRA, our step"][column].split("±")[0].strip().lstrip("−")) for column in (4, 7)
    ]
    assert all(gain.strip().startswith("−") for gain in gains)


def test_the_memory_and_speed_in_readme_are_those_of_the_results():
    rows = json.loads((RESULTS / "step_gpu.json").read_text(encoding="utf-8"))[-1]["rows"]
    peft, ours = (
        {(r["batch"], r["checkpointing"]): r for r in rows if r["way"] == way} for way in ("PEFT QLoRA", "SGM")
    )
    both = peft.keys() & ours.keys()
    memory = [round(ours[key]["peak_gib"] / peft[key]["peak_gib"], 2) for key in both]
    speed = [round(ours[key]["tokens_per_second"] / peft[key]["tokens_per_second"], 2) for key in both]
    assert figures(claim(2), r"takes ([\d.]+) to ([\d.]+) of the memory") == [min(memory), max(memory)]
    assert figures(claim(2), r"at ([\d.]+) to ([\d.]+) times") == [min(speed), max(speed)]


def test_the_signal_in_noise_in_readme_is_that_of_the_results():
    noise = json.loads((RESULTS / "published_formula.json").read_text(encoding="utf-8"))[-1]["rows"]["noise"]
    published, ours = ([100 * row["signal_share"][which] for row in noise] for which in ("spectrum", "mp"))
    assert figures(claim(3), r"calls (\d+) to (\d+) % .* ours (\d+) %") == [
        round(min(published)), round(max(published)), max(ours),
    ]  # fmt: skip


def test_the_demo_in_readme_is_the_last_one_recorded():
    metrics = json.loads((RESULTS / "demo_runs.json").read_text(encoding="utf-8"))[-1]["metrics"]
    before, after = (
        f"{when:<8} accuracy {metrics[when]['accuracy']:.4f} (majority class {metrics[when]['majority_accuracy']:.4f}) "
        f"· macro-F1 {metrics[when]['macro_f1']:.4f} · loss {metrics[when]['loss']:.4f} "
        f"· {metrics[when]['num_examples']:,} test examples\n"
        for when in ("before", "after")
    )
    assert before in README
    assert after in README
    held, predicted = metrics["peak_memory_bytes"] / 2**30, metrics["predicted"]["peak_bytes"] / 2**30
    assert f"{held:.2f} GiB measured, {predicted:.2f} predicted" in README


def test_the_citation_names_this_version_and_licence():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_the_python_of_readme_runs_as_it_stands(tmp_path, monkeypatch):
    """It leaves an adapter in PEFT's format."""
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
