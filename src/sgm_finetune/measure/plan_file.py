"""Reads and writes plan.json, and plan.safetensors beside it, which holds the spectral starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pydantic
from safetensors import SafetensorError

from sgm_finetune.base.config import with_present_keys
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import whole_file, write_json
from sgm_finetune.base.text import first_mistake
from sgm_finetune.base.untrusted import read_json_object, refuse
from sgm_finetune.method.plan import Plan
from sgm_finetune.method.plan_rules import inconsistency

_PLAN = pydantic.TypeAdapter(Plan)
_TENSORS = ("starts", "similarities")
_OF_FULL = ("kind", "also", "top_fraction", "snr_threshold", "by", "seed")
"""The settings of a plan that trains whole matrices; the others mean nothing there and are not written."""
_OF_LORA = ("group", "start", "cosine_other_half", "kept_own", "kept_shared")
"""What a plan says of a matrix only if the matrix gets a low-rank update."""


def plan_document(plan: Plan) -> dict:
    """The plan as plain JSON values, without its tensors."""
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in _TENSORS}
    document = json.loads(json.dumps(fields, default=dataclasses.asdict))
    if plan.settings.kind == "full":
        document["settings"] = {key: document["settings"][key] for key in _OF_FULL}
        for matrix in document["matrices"]:
            for key in _OF_LORA:
                del matrix[key]
    return document


def parse_plan(document: dict, where: str) -> Plan:
    """The plan in the plain data `document`, without its tensors.

    Raises UserError with the first wrong entry; `where` names the file in it.
    """
    if foreign := next((name for name in _TENSORS if name in document), None):
        refuse(where, "plan", ValueError(f"`{foreign}`: no part of the file"))
    if "settings" in document:
        document = {**document, "settings": with_present_keys(document["settings"])}
    try:
        plan = _PLAN.validate_python(document)
    except pydantic.ValidationError as error:
        refuse(where, "plan", ValueError(first_mistake(error)))
    if (wrong := inconsistency(plan)) is not None:
        refuse(where, "plan", ValueError(wrong))
    return plan


def save_plan(plan: Plan, path: Path | str) -> None:
    """Writes `path`, and beside it the tensors if the plan has spectral starts; a file appears only when complete."""
    path = Path(path)
    tensors = path.with_suffix(".safetensors")
    if plan.starts:
        from safetensors.torch import save_file

        with whole_file(tensors) as scratch:
            save_file({name: start.contiguous() for name, start in plan.starts.items()}, scratch)
    else:
        tensors.unlink(missing_ok=True)
    write_json(path, plan_document(plan))


def read_plan(path: Path | str) -> Plan:
    """The plan in the file `path` alone. It can be shown without torch; to apply it, its starts are needed.

    Raises UserError when the file is missing, damaged or not a plan.
    """
    path = Path(path)
    try:
        document = read_json_object(path)
    except FileNotFoundError:
        raise UserError(f"No plan file {path}; make one with `sgm plan --output {path}`") from None
    except (OSError, ValueError) as error:
        refuse(path, "plan", error)
    return parse_plan(document, str(path))


def load_plan(path: Path | str) -> Plan:
    """As `read_plan`, with the starts in the file beside it. Raises UserError also when that is damaged."""
    plan = read_plan(path)
    tensors = Path(path).with_suffix(".safetensors")
    if not tensors.is_file():
        return plan
    from safetensors.torch import load_file

    try:
        return dataclasses.replace(plan, starts=load_file(tensors))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{tensors} cannot be read: {error}; copy it again or make the plan again") from None
