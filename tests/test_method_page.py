"""docs/method.md, the docstrings that cite it and the table of contents in method/__init__ agree with each other."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import sgm_finetune.method

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sgm_finetune"
PAGES = [ROOT / "docs" / "method.md", *sorted((ROOT / "docs" / "evidence").glob("*.md"))]
PAGE = PAGES[0].read_text(encoding="utf-8")
KATEX = ROOT / "docs" / "assets" / "katex"

NOT_OURS = {
    "lora_A", "lora_B", "forward", "save_pretrained",  # PEFT, torch, Transformers
    "Linear4bit", "support_avx512bf16_for_cpu = False",  # bitsandbytes
    "apply_liger_kernel", "liger-kernel", "AttentionInterface",  # Transformers, Liger
    "null", "Infinity",  # JSON
    "down", "output.dense", "summaries", "sentiment",  # names of matrices and of tasks
    "--format spectrum",
    "sgm_finetuned.pth",
}  # fmt: skip
"""What the pages put in backticks and the source does not define."""


def parsed_files() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def defined_names(tree: ast.AST) -> set[str]:
    """Functions, classes, methods, fields and constants of a file or a class."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def citable_names() -> set[str]:
    """`name`, `file.name`, `Class.name` and `file.Class.name` for everything that the source defines."""
    names = set()
    for path, tree in parsed_files():
        for name in defined_names(tree):
            names |= {name, f"{path.stem}.{name}"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for name in defined_names(node):
                    names |= {f"{node.name}.{name}", f"{path.stem}.{node.name}.{name}"}
    return names


def setting_exists(key: str) -> bool:
    """Whether `key`, such as `merge.side`, is a key of the configuration."""
    schema = json.loads((ROOT / "docs" / "reference" / "config.schema.json").read_text(encoding="utf-8"))
    node = schema
    for part in key.split("."):
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        if part not in node.get("properties", {}):
            return False
        node = node["properties"][part]
    return True


def exists(cited: str, names: set[str]) -> bool:
    if cited in NOT_OURS or cited in names:
        return True
    key = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(?:[:=] ?\S+)?", cited)
    if key and setting_exists(key[1]):
        return True
    if cited.startswith(("python ", "sgm ")):
        script = re.search(r"\S+\.py", cited)
        return script is None or (ROOT / script[0]).is_file()
    return "/" in cited and any((folder / cited).exists() for folder in (SOURCE, ROOT))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_name_that_the_page_cites_exists(page):
    text = re.sub(r"^\$\$.*?^\$\$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    cited = {re.sub(r"\s+", " ", name) for name in re.findall(r"`([^`]+)`", text)}
    names = citable_names()
    assert cited
    assert sorted(name for name in cited if not exists(name, names)) == []


def test_a_name_that_does_not_exist_is_found():
    names = citable_names()
    for gone in ("descent_direction", "partner_root", "snr.noise_edges", "descent.noise_edge", "method/spectrum.py"):
        assert not exists(gone, names)
    assert not exists("merge.sides", names)
    assert not exists("python benchmarks/accuracy.py", names)


def docstrings() -> Iterator[str]:
    """Of everything in the source; strings below a field are docstrings too."""
    for _, tree in parsed_files():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield node.value.value


def cited_equations(text: str) -> set[str]:
    """Numbers of equations, as in "eq. 5", "eq. 11b, 12" and "eq. 3 to 5".

    >>> sorted(cited_equations("as eq. 3 to 5 (eq. 11b, 12) say"))
    ['11b', '12', '3', '4', '5']
    """
    found: set[str] = set()
    for first, last in re.findall(r"\beq\.\s+(\d+) to (\d+)", text):
        found |= {str(number) for number in range(int(first), int(last) + 1)}
    for listed in re.findall(r"\beq\.\s+(\d+[a-z]?(?:(?:, | and | or )\d+[a-z]?\b)*)", text):
        found |= set(re.findall(r"\d+[a-z]?", listed))
    return found


NUMBERED = re.findall(r"\\tag\{(\w+)\}", PAGE)


def test_every_equation_has_one_number():
    assert [number for number, times in Counter(NUMBERED).items() if times > 1] == []
    assert {str(number) for number in range(1, 19)} <= set(NUMBERED)


def test_every_equation_that_is_cited_is_on_the_page():
    files = [*PAGES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in files if path != Path(__file__)]
    assert set().union(*map(cited_equations, [*docstrings(), *texts])) - set(NUMBERED) == set()


def test_every_equation_of_the_page_is_cited_by_the_function_that_computes_it():
    assert set(NUMBERED) - set().union(*map(cited_equations, docstrings())) == set()


def headings() -> dict[str, str]:
    """Number of a section -> its title."""
    return dict(re.findall(r"^###? (\d+\.(?:\d+)?) (.+)$", PAGE, re.MULTILINE))


def test_every_section_that_is_cited_is_on_the_page():
    sections = {number.rstrip(".") for number in headings()}
    files = [ROOT / "README.md", ROOT / "config.yaml", *(ROOT / "docs").glob("*.md"), *SOURCE.rglob("*.py")]
    cited = set()
    for path in files:
        text = path.read_text(encoding="utf-8") if path.name != "LOG.md" else ""
        for listed in re.findall(r"method\.md\)?,? (?:sections? )?(\d[\d.]*(?:(?:, | and | to )\d[\d.]*)*)", text):
            cited |= {number.rstrip(".") for number in re.findall(r"\d[\d.]*", listed)}
    assert {"1.7", "1.9", "3", "6", "8"} <= cited
    assert cited - sections == set()


def table_of_contents() -> list[tuple[str, str, list[tuple[str, list[str]]]]]:
    """(number, title, [(file, functions)]) of every section in the docstring of method/__init__."""
    sections: list[tuple[str, str, list[tuple[str, list[str]]]]] = []
    for line in (sgm_finetune.method.__doc__ or "").splitlines():
        if section := re.fullmatch(r"    (\d+\.\d*) (.+)", line):
            sections.append((section[1], section[2], []))
        elif entry := re.fullmatch(r"        (\w+): (.+)", line):
            sections[-1][2].append((entry[1], entry[2].split(", ")))
    return sections


def test_the_table_of_contents_names_sections_of_the_page():
    titles = headings()
    assert [(number, titles.get(number)) for number, _, _ in table_of_contents()] == [
        (number, title) for number, title, _ in table_of_contents()
    ]


def test_the_table_of_contents_names_every_public_function_once_and_no_other():
    listed = [f"{file}.{name}" for _, _, entries in table_of_contents() for file, names in entries for name in names]
    defined = [
        f"{path.stem}.{node.name}"
        for path, tree in parsed_files()
        if path.parent == SOURCE / "method"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert sorted(listed) == sorted(defined)


def test_a_function_that_cites_an_equation_is_listed_under_the_section_of_that_equation():
    """An equation may be cited elsewhere too; at least one listed function of its section cites it."""
    section, equations = "", {}
    for line in PAGE.splitlines():
        if heading := re.match(r"###? (\d+\.\d*) ", line):
            section = heading[1]
        for number in re.findall(r"\\tag\{(\w+)\}", line):
            equations[number] = section
    functions = {
        (path.stem, node.name): ast.get_docstring(node) or ""
        for path, tree in parsed_files()
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    cited: dict[str, set[str]] = {}
    for number, _, entries in table_of_contents():
        for file, names in entries:
            for name in names:
                cited.setdefault(number, set()).update(cited_equations(functions[file, name]))
    elsewhere = {"15", "15b", "17b"}  # train/adapters: they change models
    assert [n for n, section in equations.items() if n not in cited.get(section, set()) | elsewhere] == []


def test_the_site_brings_its_own_katex():
    """Whole, with its licence, small, and without an address of somebody else's machine."""
    style = (KATEX / "katex.min.css").read_text(encoding="utf-8")
    fonts = set(re.findall(r"url\(([^)]+)\)", style))
    assert fonts == {f"fonts/{path.name}" for path in (KATEX / "fonts").iterdir()}
    assert "MIT License" in (KATEX / "LICENSE").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in KATEX.rglob("*") if path.is_file()) < 2**20
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for loaded in re.findall(r"assets/[\w./]+\.(?:js|css)", settings):
        assert (ROOT / "docs" / loaded).is_file(), loaded
    assert not re.search(r"https?://", settings)
