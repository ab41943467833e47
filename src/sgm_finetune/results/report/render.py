"""Templates of this folder -> one offline HTML page: everything escaped, no request, no script but the one below."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sgm_finetune.results.report.formats import NOTHING, count, decimal, duration, memory


def render(template: str, **context: Any) -> str:
    """The page; `context` is text that is escaped, but for Markup."""
    environment = Environment(
        loader=PackageLoader("sgm_finetune.results.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"decimal": decimal, "count": count, "duration": duration, "memory": memory}
    script = _file("copy.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return environment.get_template(template).render(
        nothing=NOTHING, policy=Markup(policy), style=Markup(_file("style.css")), script=Markup(script), **context
    )


def _file(name: str) -> str:
    return (files("sgm_finetune.results.report") / "templates" / name).read_text(encoding="utf-8")
