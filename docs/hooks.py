"""What the site does to pages: a link out of docs/ becomes the file's name, since the site does not hold it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Raises FileNotFoundError for a link to what is not in the repository."""
    docs = Path(config["docs_dir"])
    here = (docs / page.file.src_uri).parent

    def named(found: re.Match[str]) -> str:
        target = (here / found[2]).resolve()
        if target.is_relative_to(docs):
            return found[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {found[2]}, which is not there")
        return f"{found[1]} (`{target.relative_to(docs.parent)}`)" if found[1] != target.name else f"`{target.name}`"

    return _LINK.sub(named, markdown)
