"""The pages in a real Chromium: no console message, no request, nothing wider than a phone, and buttons that copy."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from made_up_runs import (
    classification_metrics,
    plain_plan,
    pooled_plan,
    sample_examples,
    sample_history,
    sample_pictures,
    sample_plan,
)
from rich.console import Console

from sgm_finetune.base.config_file import load_config, parse_config
from sgm_finetune.base.files import write_json
from sgm_finetune.commands import finetune as pipeline
from sgm_finetune.commands.page import framed
from sgm_finetune.measure.plan_file import save_plan
from sgm_finetune.method.plan import Plan
from sgm_finetune.results.files import write_config
from sgm_finetune.results.report.comparison import compare_runs
from sgm_finetune.results.report.comparison_page import render_comparison
from sgm_finetune.results.report.page import remake_report
from sgm_finetune.results.report.pictures import save_pictures

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")

PHONE, DESK = 390, 1280
OVERFLOWING = """[...document.querySelectorAll("body *")]
    .filter(one => !one.closest(".scroll, svg, pre"))
    .filter(one => one.getBoundingClientRect().right > Math.min(WIDTH,
        ...[one.closest(".card, .example, figure")].filter(Boolean).map(box => box.getBoundingClientRect().right)) + 1)
    .map(one => one.outerHTML)"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as found:
        yield found


def leave_run(folder: Path, plan: Plan, labels: tuple[str, ...] = ("negative", "positive")) -> Path:
    """Writes a made-up run that fills every section of its page."""
    folder.mkdir()
    long = "/a/folder/whose/name/is/much/longer/than/a/phone/is/wide/" + "x" * 80
    metrics = classification_metrics(labels) | {"test_fingerprint": "a", "data": long}
    size = len(labels)
    metrics["before"] |= {"r2": -1234.5678, "micro_f1": 0.5}
    metrics["after"] |= {"r2": -2.25, "micro_f1": 0.6}
    metrics["after"]["confusion_matrix"] = [[9 * int(i == j) for j in range(size)] for i in range(size)]
    examples = sample_examples()
    examples["examples"][0] |= {"text": "x" * 400, "truth": "y" * 200}
    write_config(folder / "config.yaml", parse_config({"output": {"dir": long}}))
    for name, content in (("metrics", metrics), ("history", sample_history(60)), ("examples", examples)):
        write_json(folder / f"{name}.json", content)
    machine = {"machine": {"system": "Linux " + "y" * 90, "cores": 2}, "command": ["sgm", "finetune", long]}
    write_json(folder / "environment.json", machine)
    save_plan(plan, folder / "plan.json")
    save_pictures(sample_pictures(plan), folder / "pictures.json")
    return folder


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> dict[str, Path]:
    """Returns name -> page: the reports of a full, an ordinary, a pooled and a bare run, and a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    full = leave_run(folder / "full", sample_plan(), tuple(f"class number {i}" for i in range(20)))
    other = leave_run(folder / "other", replace(sample_plan(6, seed=1), starts={}))
    pooled = leave_run(folder / "pooled", pooled_plan(pools_of_a_kind=2))
    bare = leave_run(folder / "bare", plain_plan())
    for name in ("history", "examples", "pictures", "environment"):
        (bare / f"{name}.json").unlink()
    (folder / "compared.html").write_text(render_comparison(compare_runs([full, other, bare])))
    pages = {run.name: remake_report(run) for run in (full, other, pooled, bare)}
    return {**pages, "compared": folder / "compared.html"}


def assert_fine(page: Page, path: Path, width: int, dark: bool = False) -> None:
    page.open(path, width, dark)
    page.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run(OVERFLOWING.replace("WIDTH", str(width))) == []
    assert page.logged == []
    assert page.requested == []


def test_the_browser_notices_what_is_wrong_with_a_page(tmp_path):
    (tmp_path / "bad.html").write_text(
        "<meta name=viewport content='width=device-width'><div style='width: 700px'>wide</div>"
        "<img src='http://elsewhere.example/a.png'><script>console.error('loud'); oops()</script>"
    )
    with browser() as page:
        page.open(tmp_path / "bad.html", PHONE)
        assert page.run("document.documentElement.scrollWidth") > PHONE
        assert len(page.run(OVERFLOWING.replace("WIDTH", str(PHONE)))) == 1
        assert page.requested == ["http://elsewhere.example/a.png"]
        assert "loud" in page.logged
        assert any("Uncaught" in line for line in page.logged)


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["full", "pooled", "bare", "compared"])
def test_a_page_is_quiet_offline_and_fits(name, width, page, made_up):
    for dark in (False, True):
        assert_fine(page, made_up[name], width, dark)


def test_a_run_leaves_such_a_page(page, llama_folder, reviews, tmp_path):
    overrides = [
        f"model.name={llama_folder}", "model.dtype=float32", f"data.train={reviews}", "data.max_length=32",
        "probe.num_batches=4", "probe.sketch_size=12", "adapter.rank=4", "training.max_steps=4",
        f"output.dir={tmp_path / 'out'}",
    ]  # fmt: skip
    pipeline.finetune(load_config(None, overrides), Console(quiet=True))
    assert_fine(page, tmp_path / "out" / "report.html", PHONE)
    headings = page.run("[...document.querySelectorAll('h2')].map(one => one.textContent)")
    assert headings == [
        "Right and wrong predictions", "Examples", "Training", "Trained and shared matrices",
        "Measurements behind the plan", "Use the result", "How this run was made",
    ]  # fmt: skip


def test_every_figure_has_a_description_and_every_drawing_ink(page, made_up):
    page.open(made_up["full"], DESK)
    assert page.run("[...document.querySelectorAll('svg')].every(one => one.getAttribute('aria-label').length > 5)")
    assert page.run("[...document.querySelectorAll('svg')].every(one => one.querySelectorAll('path, image').length)")


def test_text_is_readable_in_light_and_dark(page, made_up):
    """The contrast of text and page is at least 4.5 (WCAG AA)."""
    for dark in (False, True):
        page.open(made_up["full"], DESK, dark)
        colours = page.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
        soft = page.run("getComputedStyle(document.querySelector('.soft')).color")
        for text in (colours[0], soft):
            assert contrast(text, colours[1]) > 4.5


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_examples_are_filtered_by_outcome_and_class(page, made_up):
    page.open(made_up["other"], PHONE)
    choose = """(at, value) => {
        const one = document.querySelectorAll(".filters select")[at];
        one.value = value;
        one.dispatchEvent(new Event("change"));
        const seen = [...document.querySelectorAll(".example")].filter(one => one.offsetParent);
        return seen.map(one => one.dataset.became);
    }"""
    assert page.run("document.querySelectorAll('.example').length") == 4
    assert page.run(f"({choose})(0, 'mended')") == ["mended", "mended"]
    assert page.run("document.querySelector('.num-shown').textContent") == "2 shown"
    assert page.run(f"({choose})(0, '')") == ["mended", "spoilt", "mended", "other"]
    assert page.run(f"({choose})(1, 'good')") == ["mended", "spoilt", "mended", "other"]
    assert page.logged == []


def test_the_contents_stay_in_sight_and_lead_to_their_sections(page, made_up):
    for width in (PHONE, DESK):
        page.open(made_up["full"], width)
        links = page.run("[...document.querySelectorAll('nav a')].map(one => one.hash.slice(1))")
        assert len(links) == 8
        for name in links[1:]:
            page.run(f"document.querySelector('nav a[href=\"#{name}\"]').click()")
            below = page.run(f"document.getElementById('{name}').getBoundingClientRect().top - NAV".replace(
                "NAV", "document.querySelector('nav').getBoundingClientRect().bottom"))  # fmt: skip
            assert below >= -1
            assert page.run("document.querySelector('nav').getBoundingClientRect().top") == pytest.approx(0, abs=1)


def test_inside_another_page_links_do_not_leave_the_report(page, made_up, tmp_path):
    """`sgm report --serve` shows the report in a frame, whose address is not that of the files."""
    inside = html.escape(made_up["full"].read_text())
    (tmp_path / "outer.html").write_text(f'<iframe srcdoc="{inside}" style="height: 300px"></iframe>')
    page.open(tmp_path / "outer.html", DESK)
    inner = "document.querySelector('iframe').contentDocument"
    page.run(
        f"new Promise(done => setTimeout(done, 300)).then(() => {inner}.querySelector('nav a:last-child').click())"
    )
    assert page.run(f"{inner}.getElementById('made').textContent") == "How this run was made"
    assert page.run(f"{inner}.scrollingElement.scrollTop") > 1000
    assert page.run(f"{inner}.querySelectorAll('.files a[href]').length") == 0
    assert page.run(f"{inner}.querySelectorAll('.files a').length") > 3


def test_the_frame_of_the_served_page_runs_the_reports_script_apart_from_the_page(page, made_up, tmp_path):
    """The report tells what it could do; a hostile one cannot read the page around it."""
    spy = """<script>
        const tried = {};
        try { tried.outer = parent.document.title } catch (error) { tried.outer = error.name }
        try { tried.own = localStorage.length } catch (error) { tried.own = error.name }
        tried.filters = document.querySelector(".filters").hidden;
        tried.links = document.querySelectorAll(".files a[href]").length;
        parent.postMessage(tried, "*");
    </script>"""
    report = made_up["other"].read_text()
    report = re.sub("<meta http-equiv=.Content-Security-Policy[^>]*>", "", report).replace("</body>", f"{spy}</body>")
    listen = "<script>addEventListener('message', event => { window.told = event.data })</script>"
    (tmp_path / "outer.html").write_text(f"<title>outer</title>{listen}{framed(report)}")
    page.open(tmp_path / "outer.html", DESK)
    told = page.run("new Promise(done => setTimeout(() => done(window.told), 1000))")
    assert told == {"outer": "SecurityError", "own": "SecurityError", "filters": False, "links": 0}


def test_buttons_copy_the_command_with_the_folder_where_it_lies_now(page, made_up, tmp_path):
    moved = tmp_path / "moved here"
    shutil.copytree(made_up["other"].parent, moved)
    page.allow("clipboardReadWrite", "clipboardSanitizedWrite")
    page.open(remake_report(moved), DESK)
    page.run("document.querySelector('.command button').click()")
    page.run("new Promise(done => setTimeout(done, 200))")
    assert page.run("document.querySelector('.command button').textContent") == "Copied"
    assert page.run("navigator.clipboard.readText()") == f"sgm evaluate 'output.dir={moved}'"


def test_a_script_in_the_data_does_not_run(page, made_up, tmp_path):
    shutil.copytree(made_up["other"].parent, tmp_path / "run")
    examples = sample_examples()
    examples["examples"][0]["text"] = "<img src=x onerror='document.title=1'><script>document.title = 1</script>"
    write_json(tmp_path / "run" / "examples.json", examples)
    assert_fine(page, remake_report(tmp_path / "run"), DESK)
    assert page.run("document.title") != "1"
