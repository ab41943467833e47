"""Renders a template as one offline HTML page: escaped, without requests, and with page.js as its only script."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sgm_finetune.results.report.formats import NOTHING, count, decimal, duration, memory


def render(template: str, **context: Any) -> str:
    """Returns the page. Everything in `context` is escaped except Markup."""
    environment = Environment(
        loader=PackageLoader("sgm_finetune.results.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"decimal": decimal, "count": count, "duration": duration, "memory": memory}
    script = _read_file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return environment.get_template(template).render(
        nothing=NOTHING, policy=Markup(policy), style=Markup(_read_file("style.css")), script=Markup(script), **context
    )


def _read_file(name: str) -> str:
    return (files("sgm_finetune.results.report") / "templates" / name).read_text(encoding="utf-8")
