"""The rank that `adapter.parameters` allows: the largest whose adapter stays within it (docs/estimate.md)."""

from __future__ import annotations

from collections.abc import Mapping

from sgm_finetune.base.config import LARGEST_RANK, Config
from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.make_plan import makes_whole_pools
from sgm_finetune.method.parameter_count import most_per_direction
from sgm_finetune.model.matrices import Matrix
from sgm_finetune.train.budget.assumed_plan import assumed_settings, unmeasured
from sgm_finetune.train.budget.reuse import with_rank


def fit_parameters(config: Config, matrices: Mapping[str, Matrix]) -> tuple[Config, str]:
    """`config` with the largest rank whose adapter on `matrices` stays within `adapter.parameters`, and a line on it.

    What the probe and the scan decide later only makes the adapter smaller. Where matrices may share a factor, the rank
    is at most the smallest matrix's (`check_rank`). Raises UserError when not even rank 1 stays within, and when the
    probe's sketches hold fewer directions.
    """
    allowed = config.adapter.parameters
    assert allowed is not None
    each = most_per_direction(unmeasured(matrices), assumed_settings(config), makes_whole_pools(config.merge))
    if each > allowed:
        raise UserError(
            f"adapter.parameters={allowed} is too small: rank 1 takes up to {each}; give adapter.parameters={each} or "
            "more, or train fewer matrices with selection.top_fraction"
        )
    merges = config.merge.side != "none"
    largest = min([LARGEST_RANK, *(min(matrix.shape) for matrix in matrices.values() if merges)])
    rank = min(allowed // each, largest)
    if merges and rank > config.probe.sketch_size:
        raise UserError(
            f"adapter.parameters={allowed} allows rank {rank}, and probe.sketch_size={config.probe.sketch_size} is "
            f"smaller; give probe.sketch_size={rank} or more"
        )
    config = with_rank(config, rank)
    line = f"rank {rank} (alpha {config.adapter.alpha:g}) takes at most {rank * each:,} of {allowed:,} parameters"
    return config, line if rank == allowed // each else f"{line}, and no larger rank is possible"
