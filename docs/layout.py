"""Writes the tables of docs/layout.md from the first lines of the package's docstrings: `python docs/layout.py`."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "sgm_finetune"
MARK = "<!-- python docs/layout.py -->"
"""docs/layout.md has this line before and after the tables."""


def rooms() -> list[str]:
    """The rooms from top to bottom, as import-linter's contract in pyproject.toml orders them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (
        contract["layers"] for contract in settings["tool"]["importlinter"]["contracts"] if "layers" in contract
    )
    return layers


def first_line(file: Path) -> str:
    """The first line of the file's docstring."""
    documented = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not documented:
        raise SystemExit(f"{file.relative_to(ROOT)} has no docstring; write one")
    return documented.splitlines()[0].replace("|", "\\|")


def table(room: str) -> str:
    """The room's files with their first lines; those of its subfolders come last."""
    folder = PACKAGE / room
    files = [file for file in folder.rglob("*.py") if file.name != "__init__.py"]
    files.sort(key=lambda file: (len(file.relative_to(folder).parts), file.relative_to(folder)))
    rows = [f"| `{file.relative_to(folder)}` | {first_line(file)} |" for file in files]
    return "\n".join(
        [f"### {room}", "", first_line(folder / "__init__.py"), "", "| file | content |", "|---|---|", *rows]
    )


def page(text: str) -> str:
    """docs/layout.md with new tables."""
    before, _, rest = text.partition(f"{MARK}\n")
    after = rest.partition(f"{MARK}\n")[2]
    tables = "\n\n".join(table(room) for room in rooms())
    return f"{before}{MARK}\n{tables}\n\n{MARK}\n{after}"


if __name__ == "__main__":
    layout = ROOT / "docs" / "layout.md"
    layout.write_text(page(layout.read_text(encoding="utf-8")), encoding="utf-8")
