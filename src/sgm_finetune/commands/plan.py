"""`sgm plan`: scan, probe and plan, without training."""

from __future__ import annotations

from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.commands.session import fit_to_memory, fit_to_parameters, prepare_session, step_log
from sgm_finetune.commands.steps import choose_plan, load_base, print_plan, probe_gradients, scan_weights
from sgm_finetune.method.plan import Plan


def make_plan_for(config: Config, console: Console) -> Plan:
    """Measures the model that `config` names; returns the plan that a run would follow."""
    s = prepare_session(config, step_log(console))
    fit_to_parameters(s)
    if config.memory.budget is not None:
        fit_to_memory(s)
    scanned = scan_weights(s)
    base = load_base(s)
    plan = choose_plan(s, base, scanned, probe_gradients(s, base))
    print_plan(s, plan)
    return plan
