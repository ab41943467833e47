"""The documentation builds without a warning, describes this version, and its commands run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from systems import needs_posix

from sgm_finetune.base.install import install_line

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CLI = "sgm_finetune.commands.cli"
PAGES = ["index.md", *sorted(str(path.relative_to(DOCS)) for path in DOCS.glob("tutorials/*.md"))]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    options = ["--strict", "-q", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", *options],
        capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:)?//', home)
    assert not loaded, "a page loads something from elsewhere"


def test_the_page_of_the_command_line_is_that_of_this_version(tmp_path):
    """`make docs` writes it."""
    target = tmp_path / "cli.md"
    subprocess.run(
        [sys.executable, "-m", "typer", CLI, "utils", "docs", "--name", "sgm", "--output", str(target)],
        check=True, capture_output=True,
    )  # fmt: skip
    assert (DOCS / "reference" / "cli.md").read_text(encoding="utf-8") == target.read_text(encoding="utf-8")


def test_the_words_of_every_error_explained_are_those_of_the_source():
    headings = re.findall(r"^### `([^`]+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    assert len(headings) > 15
    assert [words for words in headings if words not in joined] == []


def test_the_layout_names_every_file_as_the_file_describes_itself():
    spec = importlib.util.spec_from_file_location("layout", DOCS / "layout.py")
    layout = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layout)
    text = (DOCS / "layout.md").read_text(encoding="utf-8")
    assert layout.page(text) == text, "python docs/layout.py"


def test_every_file_that_the_layout_sends_a_reader_to_is_there():
    text = (DOCS / "layout.md").read_text(encoding="utf-8").partition("## Every file")[0]
    for name in re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text):
        assert (ROOT / "src" / "sgm_finetune" / name).exists() or (ROOT / name).exists(), name


def test_every_line_that_installs_sgm_is_the_one_that_works_in_a_clone():
    """There is no release, so a package index has nothing of that name. The extras are those of pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    files = [path for folder in ("src", "docs", "configs") for path in (ROOT / folder).rglob("*")]
    named = []
    for path in [*files, *ROOT.glob("*.md")]:
        if path.suffix not in (".py", ".md", ".yaml", ".json") or path.name in ("LOG.md", "CHANGELOG.md"):
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"install\b[^\n]*sgm-finetune", text), path
        named += re.findall(r"install_line\(['\"]([\w-]+)['\"]\)", text)
        for line in re.findall(r"pip install -e .*", text):
            found = re.match(r"""pip install -e \\?["']\.\[([\w,-]+)\]""", line)
            assert found or "{extra}" in line, (path, line)
            named += found[1].split(",") if found else []
    assert len(named) > 15
    assert set(named) <= set(extras)


def test_the_lock_fits_every_bound_and_names_no_host_and_no_cuda():
    """A pinned CUDA keeps every build of torch for another CUDA out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")
    assert "//" not in text
    assert not re.search(r"^(cuda|nvidia)-", text, re.MULTILINE)
    locked = {found[1]: found[2] for found in re.finditer(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)}
    needed = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(locked[requirement.name]), requirement


def test_the_oldest_environment_has_the_lowest_version_of_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = {name: Version(version) for name, _, version in (line.partition("==") for line in lines) if version}
    for requirement in map(Requirement, project["dependencies"]):
        (lowest,) = [Version(bound.version) for bound in requirement.specifier if bound.operator == ">="]
        found = oldest[requirement.name]
        if requirement.name != "torch":  # the lowest torch is that of a GPU's image; on an index it is gigabytes
            assert found.release[: len(lowest.release)] == lowest.release, (requirement, found)


def blocks(page: str, kind: str = "bash") -> str:
    """The lines of a page's blocks of one kind, as the first line of a block names it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def missing_lines(shown: str, said: str) -> list[str]:
    """The lines of `shown` that `said` does not hold in this order; `…` stands for anything.

    >>> missing_lines("read … rows\\nsaved", "read 12 rows\\nfound 2\\nsaved\\n"), missing_lines("b\\na", "a\\nb")
    ([], ['a'])
    """
    lines, missing = iter([line.rstrip() for line in said.splitlines()]), []
    for wanted in shown.splitlines():
        form = re.compile(".*".join(re.escape(part) for part in wanted.rstrip().split("…")))
        if wanted.strip() and not any(form.fullmatch(line) for line in lines):
            missing.append(wanted)
    return missing


@pytest.mark.parametrize("page", PAGES)
def test_a_page_needs_no_file_but_those_that_it_makes(page):
    """Its commands name no path of the repository, so they run wherever SGM is installed."""
    tracked = {path.name for path in ROOT.iterdir()} - {"output", "runs"}
    words = re.split(r"[\s='\"]+", blocks(page))
    assert [word for word in words if "/" in word and word.partition("/")[0] in tracked] == []


@needs_posix
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_their_order(page, tmp_path):
    """A page takes some minutes. Its commands are one script in an empty folder; it stops at the first error. It prints
    what the page shows in blocks titled `prints`, and leaves no file that the page does not name."""
    if "llama_cpp" in blocks(page) and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip(install_line("llama-cpp"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    folder = tmp_path / "empty"
    folder.mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", blocks(page)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200, stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": path, "COLUMNS": "120"},
    )  # fmt: skip
    (tmp_path / "said.txt").write_text(done.stdout, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-3000:]
    assert missing_lines(blocks(page, 'text title="prints"'), done.stdout) == []
    text = (DOCS / page).read_text(encoding="utf-8")
    assert [left.name for left in folder.iterdir() if left.name not in text] == []
