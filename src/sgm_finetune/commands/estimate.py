"""`sgm estimate`: the memory, disk and time that a run will need."""

from __future__ import annotations

from rich.console import Console

from sgm_finetune.base.config import Config
from sgm_finetune.base.memory import memory_within_reach
from sgm_finetune.commands.session import (
    fit_to_parameters,
    fitted_estimate,
    given_plan_of,
    prepare_session,
    step_log,
    with_plans_kind,
)
from sgm_finetune.results.earlier_run import read_earlier
from sgm_finetune.train.arguments import check_machine
from sgm_finetune.train.budget.needs import Estimate
from sgm_finetune.train.budget.table import estimate_table


def estimate_for(config: Config, console: Console) -> Estimate:
    """Predicts what the run that `config` describes needs, and prints it as a table. No weights are loaded."""
    check_machine(config)
    s = prepare_session(config, step_log(console))
    s.given_plan = given_plan_of(config, read_earlier(config))
    if s.given_plan is not None:
        s.config = with_plans_kind(s.config, s.given_plan)
    fit_to_parameters(s)
    _, needed = fitted_estimate(s, memory_within_reach())
    console.print(estimate_table(needed, memory_within_reach()))
    return needed
