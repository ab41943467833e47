"""A hook of mkdocs: a link out of docs/ becomes the name of the file, because the site does not hold the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Returns the page's Markdown without links out of docs/.

    Raises FileNotFoundError if such a link points to a file that is not in the repository.
    """
    docs = Path(config["docs_dir"])
    here = (docs / page.file.src_uri).parent

    def replace_link(found: re.Match[str]) -> str:
        target = (here / found[2]).resolve()
        if target.is_relative_to(docs):
            return found[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {found[2]}, which does not exist")
        if found[1] == target.name:
            return f"`{target.name}`"
        return f"{found[1]} (`{target.relative_to(docs.parent)}`)"

    return _LINK.sub(replace_link, markdown)
