"""Our methods and their controls in benchmarks/quality.py, and METHODS, all that it knows (quality_rivals.py)."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from quality_adapt import ADAMW, LORA, Adapted, Base, Method, OverBudgetError, Rates, adamw, lora, peft_method
from quality_rivals import RIVALS, layers_by_kind
from torch import nn

from sgm_finetune.base.config import default_rate
from sgm_finetune.base.console import Clock
from sgm_finetune.base.device import has_gpu
from sgm_finetune.measure.make_plan import make_plan
from sgm_finetune.measure.probe import Probe, probe
from sgm_finetune.measure.probe_batches import probe_batches
from sgm_finetune.measure.scan import scan
from sgm_finetune.measure.scan_result import Scan
from sgm_finetune.method.agreement import side_agreement
from sgm_finetune.method.parameter_count import adapter_parameters
from sgm_finetune.method.plan import Group, MatrixNumbers, Plan, PlannedMatrix
from sgm_finetune.method.sides import SIDES
from sgm_finetune.method.subspace import (
    energy_kept,
    equalise_channels,
    leading_basis,
    leading_rows,
    shared_basis,
    spectral_basis,
)
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.train.adapters.apply import apply_plan, lora_layers
from sgm_finetune.train.adapters.optimizer import FactorDescent, factor_pairs
from sgm_finetune.train.adapters.pool import ADAPTER, codes_of
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.attention import recompute_attention
from sgm_finetune.train.fast.head_loss import find_head_loss

MEASUREMENTS = "SGM_QUALITY_MEASUREMENTS"
"""Environment variable: the folder in which the runs of one benchmark share their measurements."""

# Our methods


def spectral_default(rank: int, steps: int) -> float:
    return default_rate("spectral", rank, steps)


def descending(
    method: Method, name: str, rates: Rates, default: Callable[[int, int], float] = spectral_default
) -> Method:
    """The same adapter, trained by spectral descent on its factors."""

    def adapt(base: Base) -> Adapted:
        made = method.adapt(base)
        pairs = factor_pairs(made.model)  # type: ignore[arg-type]
        return replace(made, optimizers=lambda rate: [FactorDescent(pairs, lr=rate)])

    return Method(name, rates, adapt, default)


def fast(method: Method, name: str) -> Method:
    """The same method, with steps computed as by training.step=fast."""

    def adapt(base: Base) -> Adapted:
        if not has_gpu():
            recompute_attention(base.model, first_batch(base))  # type: ignore[arg-type]
        made = method.adapt(base)
        if slow := use_fast_step(made.model):  # type: ignore[arg-type]
            raise ValueError(f"{name}: PEFT's forward in {slow}")
        language = base.config.model.task == "causal-lm"
        return replace(made, head_loss=find_head_loss(made.model, first_batch(base)) if language else None)

    return Method(name, method.rates, adapt, method.default)


def first_batch(base: Base) -> dict[str, torch.Tensor]:
    return base.prepared.collate([base.prepared.train.dataset[i] for i in range(2)])


POOL = "merge.scope=pool"
Change = Callable[[Plan, Probe, int], Plan]
T = TypeVar("T")


def as_planned(plan: Plan, probed: Probe, seed: int) -> Plan:
    return plan


def sgm_method(
    name: str,
    rates: Rates,
    *overrides: str,
    change: Change = as_planned,
    share: float | None = 1.0,
) -> Method:
    """SGM: scan, probe, plan, apply.

    `change` turns the plan into a control's, by the run's seed; it must not move the rank with the seed. The rank is
    the largest one that trains at most `share` of the budget (None: plain LoRA's rank).
    """

    def adapt(base: Base) -> Adapted:
        widest = min(min(matrix.shape) for matrix in adaptable(base.model).values())
        size = sketch_size(base)
        if POOL in overrides:  # which buys about one direction for each layer and rank of plain LoRA; controls buy more
            members = max(map(len, layers_by_kind(base.model).values()))
            directions = members * (base.config.adapter.rank + 1)
            size = max(size, min(widest, directions if change is as_planned and share == 1.0 else 3 * directions))
        (scanned, probed), seconds = scan_and_probe(base, size)

        def planned(rank: int) -> Plan:
            config = base.with_overrides(
                f"adapter.rank={rank}", f"adapter.alpha={2 * rank}", f"probe.sketch_size={size}", *overrides
            )
            return change(make_plan(scanned, probed, config), probed, base.seed)

        rank = base.config.adapter.rank
        if share is not None:
            key = f"rank-{share}-{change.__name__}-{'-'.join(overrides)}"
            rank = share_between_runs(base, key, lambda: largest_within(planned, share * base.budget, rank, widest))
        clock = Clock()
        with clock.time("plan"):
            plan = planned(rank)
        model = apply_plan(base.model, plan)  # type: ignore[arg-type]
        retained = energy_retained(plan, probed)
        return Adapted(model, adamw(model), plan.settings.rank, seconds + clock.seconds["plan"], retained)

    return Method(name, rates, adapt)


def sketch_size(base: Base) -> int:
    return max(48, 3 * base.config.adapter.rank)


def share_between_runs(base: Base, what: str, make: Callable[[], T]) -> T:
    """The result of `make`, computed once for all runs of a benchmark that need the same of the same base."""
    shared = os.environ.get(MEASUREMENTS)
    if not shared:
        return make()
    head = base.seed if base.config.model.task == "sequence-classification" else "any"  # a new head depends on the seed
    path = Path(shared) / f"{base.name}-{head}-{what}.pt"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(make(), unfinished)
        unfinished.replace(path)
    return torch.load(path, weights_only=False)


def scan_and_probe(base: Base, size: int) -> tuple[tuple[Scan, Probe], float]:
    """The scan and the probe of the base, with sketches of `size` vectors, and the seconds that they took."""

    def measure() -> tuple[tuple[Scan, Probe], float]:
        clock = Clock()
        with clock.time("measure"):
            scanned = scan(base.prepared.folder, estimator=base.config.snr.estimator)
            batches = probe_batches(base.config, base.prepared)
            probed = probe(base.model, batches, sketch_size=size, seed=base.config.probe.seed)
        return (scanned, probed), clock.seconds["measure"]

    return share_between_runs(base, f"measured-{size}", measure)


def energy_retained(plan: Plan, probed: Probe) -> float:
    """Held-out gradient energy that the groups' bases keep, as a fraction of what own bases keep (eq. 14b).

    It is the mean over all adapted matrices; a matrix without a group counts as 1.
    """
    rank, shares = plan.settings.rank, dict.fromkeys((matrix.name for matrix in plan.selected), 1.0)
    for group in plan.groups:
        loud = equalise_channels([half.side(group.side) for name in group.members for half in probed.halves[name]])
        halves = loud[::2], loud[1::2]
        together, own = torch.zeros(len(group.members)), torch.zeros(len(group.members))
        for fit, held_out in (halves, halves[::-1]):
            shared = shared_basis([leading_rows(sketch, rank) for sketch in fit], rank)
            together += torch.tensor([energy_kept(shared, sketch) for sketch in held_out])
            own += torch.tensor([energy_kept(leading_basis(a, rank), b) for a, b in zip(fit, held_out, strict=True)])
        shares |= zip(group.members, (together / own).tolist(), strict=True)
    return sum(shares.values()) / len(shares)


def at_threshold(threshold: float) -> Method:
    """SGM across layers at plain LoRA's rank and one learning rate; lower thresholds merge more."""
    method = sgm_method("", (), ACROSS, f"merge.threshold={threshold}", share=None)
    return descending(method, f"threshold {threshold:g}", (0.0125,))


def largest_within(planned: Callable[[int], Plan], budget: float, rank: int, most: int) -> int:
    """The largest rank within the budget, `most` at most, searched from an estimate that assumes the groups of `rank`.

    Raises OverBudgetError where rank 1 is too large.
    """
    rank = min(most, max(1, int(rank * budget / adapter_parameters(planned(rank))[0])))
    while (count := adapter_parameters(planned(rank))[0]) > budget:
        if rank == 1:
            raise OverBudgetError(f"{count:,} trained parameters at least, for a budget of {budget:,.0f}")
        rank -= 1
    while rank < most and adapter_parameters(planned(rank + 1))[0] <= budget:
        rank += 1
    return rank


def at_shares(share: float, name: str) -> list[Method]:
    """Our methods, merged or not, at another share of the budget.

    An update of rank r takes 8 + 4/r bytes a parameter with its momentum and channels; under AdamW it takes 12.
    """
    plain = peft_method("", (), lora, share=share)
    return [
        descending(sgm_method("", (), share=share), f"SGM, {name}", SPECTRAL),
        descending(sgm_method("", (), ACROSS, share=share), f"SGM, across layers, {name}", SPECTRAL),
        descending(plain, f"LoRA, our step, {name}", SPECTRAL),
    ]


def at_rank_share(share: float, name: str) -> list[Method]:
    """Methods that show whether the best learning rate changes with the rank."""
    plain = peft_method(f"LoRA, {name}", ADAMW, lora, share=share)
    return [plain, descending(plain, f"LoRA, our step, {name}", SPECTRAL)]


def other_side(plan: Plan, probed: Probe, seed: int) -> Plan:
    """Control: the same groups share their other side."""
    flipped = [replace(group, side=SIDES[1 - SIDES.index(group.side)]) for group in plan.groups]
    return with_groups(plan, flipped, probed)


def random_members(plan: Plan, probed: Probe, seed: int) -> Plan:
    """Control: replaces every member of a group by a random matrix of its kind among those that share at all.

    Sizes, sides and kinds stay.
    """
    kind_of = {matrix.name: (matrix.kind, matrix.shape) for matrix in plan.matrices}
    members = exchanged(plan, kind_of.__getitem__, seed)
    drawn = [replace(group, members=names) for group, names in zip(plan.groups, members, strict=True)]
    return with_groups(plan, drawn, probed)


def exchanged(plan: Plan, alike: Callable[[str], tuple], seed: int) -> list[tuple[str, ...]]:
    """The members of each group, each replaced by one drawn among those of all groups for which `alike` is equal."""
    shuffle = random.Random(seed).shuffle
    waiting: dict[tuple, list[str]] = {}
    for name in (name for group in plan.groups for name in group.members):
        waiting.setdefault(alike(name), []).append(name)
    for names in waiting.values():
        shuffle(names)
    order = {matrix.name: at for at, matrix in enumerate(plan.matrices)}
    return [
        tuple(sorted((waiting[alike(name)].pop() for name in group.members), key=order.__getitem__))
        for group in plan.groups
    ]


def with_groups(plan: Plan, groups: Iterable[Group], probed: Probe) -> Plan:
    """The plan with other groups; each starts at its own spectral basis."""
    groups = tuple(groups)
    rank = plan.settings.rank
    starts = {name: start for name, start in plan.starts.items() if name in probed.shapes}  # of matrices
    for group in groups:
        halves = [half.side(group.side) for name in group.members for half in probed.halves[name]]
        starts[group.name] = spectral_basis(halves, rank)
    return replace(plan, groups=groups, starts=starts)


def apart(plan: Plan, probed: Probe, seed: int) -> Plan:
    """Control: nothing is shared, and every lora_A starts at its own spectral basis."""
    matrices = tuple(replace(m, group=None, kept_shared=None, start="spectral") for m in plan.matrices)
    starts = {
        m.name: spectral_basis([half.input for half in probed.halves[m.name]], plan.settings.rank) for m in matrices
    }
    return replace(plan, groups=(), matrices=matrices, starts=starts)


def random_start(plan: Plan, probed: Probe, seed: int) -> Plan:
    groups = tuple(replace(group, start="random") for group in plan.groups)
    return replace(plan, groups=groups, matrices=tuple(replace(matrix, start="random") for matrix in plan.matrices))


# Rank pools


def with_codes(codes: Callable[[int, int], torch.Tensor]) -> Callable[[Adapted], None]:
    """Control: the pools begin with other codes, `codes(members, rank)`."""

    def change(made: Adapted) -> None:
        pools: dict[int, list[nn.Module]] = {}
        for layer in lora_layers(made.model).values():  # type: ignore[arg-type]
            pools.setdefault(id(layer.lora_A[ADAPTER].weight), []).append(layer)  # type: ignore[index]
        with torch.no_grad():
            for members in pools.values():
                rank = members[0].r[ADAPTER]  # type: ignore[index]
                for layer, own in zip(members, codes(len(members), rank).split(1), strict=True):
                    codes_of(layer.lora_B[ADAPTER]).copy_(own)  # type: ignore[index, union-attr]

    return change


def random_codes(members: int, rank: int) -> torch.Tensor:
    """Every layer begins with all directions, in its own random mixture."""
    return torch.randn(members, rank, generator=torch.Generator().manual_seed(1_000_003 * members + rank))


def equal_codes(members: int, rank: int) -> torch.Tensor:
    """Every layer begins with the same update."""
    return torch.ones(members, rank)


def repooled(plan: Plan, probed: Probe, pools: Iterable[Sequence[str]]) -> Plan:
    """The plan with other pools, each of some layers of one shape, which start as the plan's own do."""
    rank, groups, starts = plan.settings.rank, [], {}
    for number, members in enumerate(pools):
        name = f"pool/{number}"
        groups.append(Group(name, name, "both", tuple(members)))
        numbers = [MatrixNumbers(m, name, None, plan.shape_of(m), None, None, None, probed.halves[m]) for m in members]
        starts[name] = side_agreement(numbers, "input", rank).pool_start(range(len(members)))
    of = {member: group.name for group in groups for member in group.members}
    matrices = tuple(replace(matrix, group=of.get(matrix.name)) for matrix in plan.matrices)
    return replace(plan, groups=tuple(groups), matrices=matrices, starts=starts)


def one_pool_a_shape(plan: Plan, probed: Probe, seed: int) -> Plan:
    """Kinds of one shape draw on one pool if all of them read the residual stream: q, k and v; gate and up."""
    pools: dict[tuple, list[str]] = {}
    for group in plan.groups:
        writes = feeds_the_residual_stream(group.members[0])
        pools.setdefault((plan.shape_of(group.members[0]), writes), []).extend(group.members)
    return repooled(plan, probed, pools.values())


def mixed_kinds(plan: Plan, probed: Probe, seed: int) -> Plan:
    """Control: as many pools of the same sizes, whose members are drawn at random from all kinds of their shape."""
    return repooled(plan, probed, exchanged(plan, plan.shape_of, seed))


def feeds_the_residual_stream(name: str) -> bool:
    return name.endswith(("output.dense", "o_proj", "down_proj"))


def freeze_a(made: Adapted) -> None:
    """Every lora_A stays at its spectral start."""
    for layer in lora_layers(made.model).values():  # type: ignore[arg-type]
        layer.lora_A[ADAPTER].weight.requires_grad_(False)  # type: ignore[index, union-attr]


def pool_method(
    name: str,
    share: float = 1.0,
    change: Change = as_planned,
    codes: Callable[[int, int], torch.Tensor] | None = None,
) -> list[Method]:
    """A rank pool of each kind (`merge.scope=pool`), trained by AdamW and by spectral descent."""
    plain = sgm_method(f"{name}, AdamW", POOL_ADAMW, POOL, share=share, change=change)
    if codes is not None:
        plain = changed(plain, with_codes(codes))
    return [plain, descending(plain, name, POOL_SPECTRAL, lambda rank, steps: spectral_default(1, steps))]


def changed(method: Method, change: Callable[[Adapted], None]) -> Method:
    """The same method, with `change` after it has adapted the model."""

    def adapt(base: Base) -> Adapted:
        made = method.adapt(base)
        change(made)
        return made

    return replace(method, adapt=adapt)


# Controls of selection


Order = Callable[[list[PlannedMatrix], int], list[PlannedMatrix]]


def some_layers(order: Order, fraction: float, *overrides: str) -> Callable[[Base], list[str]]:
    """Chooses a fraction of the layers of every kind: those that `order(matrices of the kind, seed)` puts first."""

    def choose(base: Base) -> list[str]:
        config = base.with_overrides("merge.side=none", *overrides)
        plan = make_plan(scan(base.prepared.folder, estimator=config.snr.estimator), None, config, base.model)
        chosen = set()
        for kind in dict.fromkeys(matrix.kind for matrix in plan.matrices):
            ordered = order([matrix for matrix in plan.matrices if matrix.kind == kind], base.seed)
            chosen.update(matrix.name for matrix in ordered[: math.ceil(fraction * len(ordered))])
        return [matrix.name for matrix in plan.matrices if matrix.name in chosen]

    return choose


def ratio(matrix: PlannedMatrix) -> float:
    """The SNR of a matrix; infinite when the plan has none (the published estimator's infinite ratios)."""
    return float("inf") if matrix.snr is None else matrix.snr


def highest_snr(matrices: list[PlannedMatrix], seed: int) -> list[PlannedMatrix]:
    return sorted(matrices, key=lambda matrix: -ratio(matrix))


def lowest_snr(matrices: list[PlannedMatrix], seed: int) -> list[PlannedMatrix]:
    return sorted(matrices, key=ratio)


def nearest_to_the_output(matrices: list[PlannedMatrix], seed: int) -> list[PlannedMatrix]:
    return sorted(matrices, key=lambda matrix: -(matrix.layer or 0))


def evenly_spaced(matrices: list[PlannedMatrix], seed: int) -> list[PlannedMatrix]:
    """The first few are spread over all layers as evenly as halving the gaps allows: at 0, 1/2, 1/4, 3/4, 1/8 ..."""
    bits = max(1, (len(matrices) - 1).bit_length())
    order = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return [matrices[place] for place in order if place < len(matrices)]


def at_random(matrices: list[PlannedMatrix], seed: int) -> list[PlannedMatrix]:
    kind = matrices[0].kind
    return random.Random(f"{seed} {kind}").sample(matrices, len(matrices))


SPECTRAL: Rates = (6e-3, 1.25e-2, 2.5e-2)
POOL_ADAMW: Rates = (5e-3, 1e-2, 2e-2)
POOL_SPECTRAL: Rates = (2.5e-2, 5e-2, 0.1)

ACROSS = "merge.scope=layers"
THRESHOLDS = (-1.0, 0.8, 0.85, 0.9, 0.95, 1.0)

SGM = sgm_method("SGM, AdamW", ADAMW)
ACROSS_LAYERS = sgm_method("SGM, across layers, AdamW", ADAMW, ACROSS)
METHODS = {
    method.name: method
    for method in (
        *RIVALS,
        SGM,
        descending(SGM, "SGM", SPECTRAL),
        fast(descending(SGM, "", SPECTRAL), "SGM, fast step"),
        descending(LORA, "LoRA, our step", SPECTRAL),
        descending(sgm_method("", (), change=apart), "SGM, nothing shared", SPECTRAL),
        descending(sgm_method("", (), change=random_members), "SGM, random groups", SPECTRAL),
        descending(sgm_method("", (), change=random_start), "SGM, random start", SPECTRAL),
        ACROSS_LAYERS,
        descending(ACROSS_LAYERS, "SGM, across layers", SPECTRAL),
        descending(sgm_method("", (), ACROSS, change=other_side), "SGM, across layers, wrong side", SPECTRAL),
        descending(sgm_method("", (), ACROSS, change=random_members), "SGM, across layers, random groups", SPECTRAL),
        descending(sgm_method("", (), ACROSS, "merge.threshold=-1"), "SGM, one group a kind", SPECTRAL),
        *at_shares(1.4, "equal bytes"),
        *at_shares(0.47, "a third of the bytes"),
        *at_shares(0.125, "an eighth of the parameters"),
        *at_rank_share(0.25, "a quarter of the rank"),
        *at_rank_share(4.0, "four times the rank"),
        *pool_method("pool"),
        *pool_method("pool, a third of the parameters", share=1 / 3),
        *pool_method("pool, random codes", codes=random_codes),
        *pool_method("pool, equal codes", codes=equal_codes),
        *pool_method("pool, random start", change=random_start),
        *pool_method("pool, one a shape", change=one_pool_a_shape),
        *pool_method("pool, kinds mixed", change=mixed_kinds),
        changed(sgm_method("pool, A frozen, AdamW", POOL_ADAMW, POOL, share=1.85), freeze_a),
        peft_method("LoRA, highest SNR", ADAMW, lora, choose=some_layers(highest_snr, 0.5)),
        peft_method("LoRA, upper half", ADAMW, lora, choose=some_layers(nearest_to_the_output, 0.5)),
        peft_method("LoRA, random half", ADAMW, lora, choose=some_layers(at_random, 0.5)),
        peft_method("LoRA, lowest SNR", ADAMW, lora, choose=some_layers(lowest_snr, 0.5)),
        peft_method(
            "LoRA, published SNR", ADAMW, lora, choose=some_layers(highest_snr, 0.5, "snr.estimator=spectrum")
        ),
        *map(at_threshold, THRESHOLDS),
    )
}  # fmt: skip
