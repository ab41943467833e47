"""SGM fine-tuning: merged updates for matrices whose gradients agree, chosen by measuring (docs/method.md).

Three acts and any trainer::

    scanned = scan("path-or-id")                     # numbers about the weights
    probed = probe(model, batches)                   # numbers about the gradients
    plan = make_plan(scanned, probed, config)        # data: print it, edit it, save it
    model = apply_plan(model, plan)                  # a PeftModel; a group's factor is one parameter
    optimizer = create_optimizer(model, lr=0.0125)   # its step: Trainer(optimizers=(optimizer, None), ...)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgm_finetune.base.config import Config
    from sgm_finetune.base.config_file import load_config
    from sgm_finetune.base.errors import UserError
    from sgm_finetune.measure.make_plan import make_plan
    from sgm_finetune.measure.plan_file import load_plan, save_plan
    from sgm_finetune.measure.probe import probe
    from sgm_finetune.measure.scan import scan
    from sgm_finetune.train.adapters.apply import apply_plan, tie
    from sgm_finetune.train.adapters.optimizer import create_optimizer
    from sgm_finetune.train.fast.adapter_forward import use_fast_step
    from sgm_finetune.train.trainer import SGMTrainer

_HOMES = {
    "scan": "measure.scan",
    "probe": "measure.probe",
    "make_plan": "measure.make_plan",
    "apply_plan": "train.adapters.apply",
    "tie": "train.adapters.apply",
    "create_optimizer": "train.adapters.optimizer",
    "use_fast_step": "train.fast.adapter_forward",
    "load_plan": "measure.plan_file",
    "save_plan": "measure.plan_file",
    "Config": "base.config",
    "load_config": "base.config_file",
    "SGMTrainer": "train.trainer",
    "UserError": "base.errors",
}

__all__ = [
    "Config",
    "SGMTrainer",
    "UserError",
    "apply_plan",
    "create_optimizer",
    "load_config",
    "load_plan",
    "make_plan",
    "probe",
    "save_plan",
    "scan",
    "tie",
    "use_fast_step",
]


def __getattr__(name: str) -> Any:
    """Loaded when first used, so that `import sgm_finetune` and `sgm --help` take no second."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
