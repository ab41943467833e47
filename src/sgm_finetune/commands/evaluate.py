"""`sgm evaluate`: the metrics of a result on the test data, from its .pth file and the base model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.session import prepare_trained, step_log
from sgm_finetune.commands.steps import attach_trained, load_base, prepare_fast_adapters, refer, test
from sgm_finetune.results.earlier_run import EarlierRun, read_earlier
from sgm_finetune.results.load import StoredResult, attach_adapter, read_stored, set_factors


def evaluate(config: Config, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Returns the test metrics of output.dir/sgm_finetuned.pth.

    The configuration that trained it is in the file; `overrides` (key=value) change it. Raises UserError for test data
    with other labels, and for a harness file that the .pth file alone names, since such a file can run code.
    """
    log = step_log(console)
    stored = read_stored(config, overrides, log)
    _check_harness_files(stored, config.evaluation.harness)
    s = prepare_trained(stored, log)
    earlier = _earlier_reference(s.config)
    base = load_base(s)
    if earlier is not None:
        model = attach_adapter(base.model, earlier.content, earlier.path)
        prepare_fast_adapters(s, model)
        refer(s, base, model, ("test",))
        set_factors(model, stored.content, stored.path)
    else:
        refer(s, base, base.model, ("test",))
        model, _ = attach_trained(s, base, stored)
    found = test(s, base, model, "test")
    return {"model": s.config.model.name, "data": s.prepared.splits.description, **found.metrics}


def _earlier_reference(config: Config) -> EarlierRun | None:
    """The earlier run with which the loss of preferences compares; None where that is the base or nothing."""
    if config.model.task != "preference" or not config.preference.has_reference:
        return None
    return read_earlier(config)


def _check_harness_files(stored: StoredResult, own: Sequence[str]) -> None:
    """Raises UserError for a task file of the harness that the person did not name."""
    strange = [name for name in stored.config.evaluation.harness if name.endswith((".yaml", ".yml"))]
    strange = [name for name in strange if name not in own]
    if strange:
        raise UserError(
            f"{stored.path} was trained with evaluation.harness={strange[0]}, a file that can run code; say "
            "evaluation.harness=... yourself, or evaluation.harness=[]"
        )
