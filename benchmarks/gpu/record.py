"""The results file of one item: a JSON object that grows while the item runs, so that a time limit loses nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update(path: Path, **entries: Any) -> None:
    """Sets the entries in the file, which is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(read(path) | entries, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
