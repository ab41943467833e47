"""The update in the backward pass against the plain optimizer, the rounding, and the running norm."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import make_batches, make_model

from sgm_finetune.base.errors import NotFiniteError
from sgm_finetune.method.plan import Plan, PlannedMatrix, PlanSettings
from sgm_finetune.method.rounding import rounding_seed, stochastic_round
from sgm_finetune.method.running_norm import clip_factor, running_norm
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.names import kind_of, layer_of
from sgm_finetune.train.fast.attention import recompute_attention
from sgm_finetune.train.fast.gated_mlp import recompute_mlps
from sgm_finetune.train.full.apply import train_whole, trained_names
from sgm_finetune.train.full.changed import exchange, exchanged, trained_parameters
from sgm_finetune.train.full.optimizers import make_optimizers, update_bytes, whole_state_bytes
from sgm_finetune.train.full.update import BackwardUpdates

OPTIMIZERS = ("adamw", "adafactor", "muon", "adamw_8bit")


def whole_plan(model, layers=(0, 1, 2, 3), also=()):
    matrices = tuple(
        PlannedMatrix(name, kind_of(name), layer_of(name), found.shape, layer_of(name) in layers)
        for name, found in adaptable(model).items()
    )
    return Plan("pico", PlanSettings(kind="full", also=also, side="none"), matrices)


def whole_model(dtype=torch.float32, layers=(2, 3), also=(), **changes):
    model = make_model(**changes).to(dtype)
    return train_whole(model, whole_plan(model, layers, also))


def updates_of(model, optimizer="adamw", lr=1e-2, **options):
    named = trained_parameters(model)
    matrices = {name for name in named if name.endswith("proj.weight")}
    return BackwardUpdates(named, lambda s: make_optimizers(optimizer, s, matrices, lr, 0.0), lr, **options)


def train_steps(model, updates, batches):
    with updates.attached():
        for batch in batches:
            model(**batch).loss.backward()
            updates.step()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_clipping_every_step_is_the_plain_optimizers_bit_for_bit(optimizer):
    model, batches = whole_model(also=("norms", "embeddings")), make_batches(4)
    plain = copy.deepcopy(model)
    train_steps(model, updates_of(model, optimizer), batches)
    named = trained_parameters(plain)
    matrices = {name for name in named if name.endswith("proj.weight")}
    steppers = make_optimizers(optimizer, named, matrices, 1e-2, 0.0)
    for batch in batches:
        plain(**batch).loss.backward()
        for stepper in steppers:
            stepper.step()
        plain.zero_grad()
    expected, start = weights(plain), weights(make_model())
    assert [name for name, value in weights(model).items() if not torch.equal(value, expected[name])] == []
    assert {name for name, value in expected.items() if not torch.equal(value, start[name])} == set(named)


@pytest.mark.parametrize("kept", ["less", "inputs of blocks"])
def test_what_is_computed_again_is_computed_with_the_weights_of_the_forward_pass(kept):
    """The fast step drops products and probabilities, checkpointing whole blocks; the matrices change meanwhile."""
    model, batches = whole_model(), make_batches(2)
    plain = copy.deepcopy(model)
    if kept == "less":
        assert recompute_mlps(model, batches[0])
        assert recompute_attention(model, batches[0])
    else:
        model.activation_checkpointing_enable({"use_reentrant": False})
    train_steps(model.train(), updates_of(model), batches)
    train_steps(plain.train(), updates_of(plain), batches)
    expected = weights(plain)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=5e-4)  # a step is 1e-2


def test_no_gradient_outlives_the_backward_pass_and_nothing_is_kept_below_the_lowest_matrix():
    model = whole_model(layers=(3,))
    updates, seen = updates_of(model), []
    handle = model.model.layers[2].register_forward_hook(lambda m, a, output: seen.append(output))
    train_steps(model, updates, make_batches(1))
    handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert not output.requires_grad


def test_a_gradient_is_averaged_once_and_whole_before_it_is_measured_and_clipped():
    """As in two processes, one of which has no gradient of its own."""
    model, batches, averaged = whole_model(), make_batches(2), []
    plain, last = copy.deepcopy(model), [False]
    updates = updates_of(
        model, is_last=lambda: last[0], max_norm=0.1, average=lambda g: averaged.append(g.div_(2).shape)
    )
    with updates.attached():
        for number, batch in enumerate(batches):
            last[0] = number == 1
            model(**batch).loss.backward()
        updates.step()
    halved = updates_of(plain, max_norm=0.1)
    with halved.attached():
        (sum(plain(**batch).loss for batch in batches) / 2).backward()
        halved.step()
    assert len(averaged) == len(updates.named)
    torch.testing.assert_close(updates.norm, halved.norm)
    expected = weights(plain)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


def test_accumulated_gradients_are_applied_once_with_the_last_micro_batch():
    model, batches = whole_model(), make_batches(4)
    plain, last = copy.deepcopy(model), [False]
    updates = updates_of(model, is_last=lambda: last[0])
    with updates.attached():
        for number, batch in enumerate(batches):
            last[0] = number == 3
            model(**batch).loss.backward()
    stepper = torch.optim.AdamW(trained_parameters(plain).values(), lr=1e-2, weight_decay=0.0, fused=True)
    for batch in batches:
        plain(**batch).loss.backward()
    stepper.step()
    expected = weights(plain)
    assert [name for name, value in weights(model).items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [(torch.float32, "muon"), *((torch.bfloat16, name) for name in OPTIMIZERS if name != "muon")],
)
def test_a_resumed_training_takes_the_same_steps(dtype, optimizer, tmp_path):
    batches = make_batches(4)
    model = whole_model(dtype)
    updates = updates_of(model, optimizer, max_norm=0.1, seed=3)
    train_steps(model, updates, batches[:2])
    torch.save(updates.state_dict(), tmp_path / "optimizer.pt")
    resumed = copy.deepcopy(model)
    train_steps(model, updates, batches[2:])
    again = updates_of(resumed, optimizer, lr=0.5, max_norm=0.1, seed=3)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train_steps(resumed, again, batches[2:])
    expected = weights(model)
    assert [name for name, value in weights(resumed).items() if not torch.equal(value, expected[name])] == []


def test_bfloat16_weights_take_changes_that_rounding_to_nearest_loses():
    model = whole_model(torch.bfloat16)
    start, batches = weights(model), make_batches(1, size=1) * 8
    train_steps(model, updates_of(model, lr=3e-6), batches)
    name = "model.layers.3.mlp.up_proj.weight"
    changed = (weights(model)[name] != start[name]).float().mean()
    assert 0.01 < changed < 0.9  # a step moves a weight by 3e-6, a twentieth of its distance to the next


def test_rounding_is_unbiased_and_keeps_what_bfloat16_has():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator)
    mean = sum(stochastic_round(values, generator).double() for _ in range(2000)) / 2000
    unit = 2.0 ** (torch.floor(torch.log2(values.abs())).double() - 7)
    assert float(((mean - values) / unit).abs().max()) < 5 * 0.5 / math.sqrt(2000)
    exact = values.bfloat16()
    assert torch.equal(stochastic_round(exact.float(), generator), exact)
    down, up = stochastic_round(torch.tensor([-1.001, 1.001]).repeat(10_000), generator).float().aminmax()
    assert (float(down), float(up)) == (-1 - 2**-7, 1 + 2**-7)


def test_rounding_draws_other_bits_for_each_seed_step_and_parameter():
    seeds = {rounding_seed(seed, step, name) for seed in (0, 1) for step in (1, 2) for name in "ab"}
    assert len(seeds) == 8


def test_the_running_norm_is_the_norm_when_gradients_stay_the_same():
    squares = torch.tensor([4.0, 9.0, 12.0])
    assert running_norm(squares, 1, False) == running_norm(squares, 3, True) == 5.0
    assert running_norm(torch.tensor([1e6, 9.0, 12.0]), 1, False) >= 1e3  # a burst counts at once
    assert clip_factor(torch.tensor(0.0), 1.0) == 1.0


def test_clipping_follows_the_running_norm():
    limit = 1e-3
    model = whole_model()
    updates = BackwardUpdates(
        trained_parameters(model), lambda s: [torch.optim.SGD([p], lr=1.0) for p in s.values()], 1.0, max_norm=limit
    )
    before = weights(model)
    for _ in range(3):
        previous = weights(model)
        with updates.attached():
            model(**make_batches(1)[0]).loss.backward()
        norm, sizes = updates.norm, [(weights(model)[n] - previous[n]).norm() for n in trained_parameters(model)]
        moved = float(torch.stack(sizes).norm())
        updates.step()
    assert norm > 100 * limit
    assert moved == pytest.approx(limit, rel=0.05)  # the gradient hardly changes, so the step has the limit's length
    assert any(not torch.equal(before[n], w) for n, w in weights(model).items())


def test_a_gradient_that_is_not_finite_stops_before_its_matrix_is_written():
    model = whole_model()
    name = "model.layers.2.self_attn.q_proj.weight"
    updates, before = updates_of(model), weights(model)
    model.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)
    with updates.attached(), pytest.raises(NotFiniteError, match=rf"`{name}` is not finite at step 1; .*smaller"):
        model(**make_batches(1)[0]).loss.backward()
    assert torch.equal(before[name], model.get_parameter(name))


def test_hooks_are_gone_after_the_training():
    model = whole_model()
    train_steps(model, updates_of(model), make_batches(1))
    before = weights(model)
    model(**make_batches(1)[0]).loss.backward()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_what_is_trained_beside_the_matrices_is_what_also_names():
    model = make_model("causal-lm", tie_word_embeddings=False)
    names = {also: set(trained_names(model, whole_plan(model, (2, 3), also))) for also in
             ((), ("norms",), ("embeddings",), ("head",))}  # fmt: skip
    assert len(names[()]) == 14
    assert names["norms",] - names[()] == {
        "model.norm.weight",
        *(f"model.layers.{n}.{kind}_layernorm.weight" for n in (2, 3) for kind in ("input", "post_attention")),
    }
    assert names["embeddings",] - names[()] == {"model.embed_tokens.weight"}
    assert names["head",] - names[()] == {"lm_head.weight"}
    classifier = make_model()
    assert "score.weight" in set(trained_names(classifier, whole_plan(classifier, (3,))))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_predicted_state_is_the_state(optimizer):
    model = whole_model(also=("norms",), hidden_size=128)
    updates = updates_of(model, optimizer)
    train_steps(model, updates, make_batches(1))
    held = [v for one in updates.optimizers for state in one.state.values() for v in state.values()]
    shared = {id(v): v for v in held if isinstance(v, torch.Tensor) and v.numel() > 1 and "qmap" not in str(v.shape)}
    found = sum(v.nbytes for v in shared.values() if v.numel() != 256 or optimizer != "adamw_8bit")
    named = trained_parameters(model)
    matrices = {name for name in named if name.endswith("proj.weight")}
    assert whole_state_bytes(optimizer, named, matrices) == pytest.approx(found, rel=0.02)
    assert all(update_bytes(optimizer, p) <= 12 * p.numel() for p in named.values())


def test_a_model_is_its_base_for_a_moment_and_then_itself_again():
    base, trained = make_model(), make_model()
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight.mul_(2)
    former = exchange(base, {"model.layers.1.mlp.up_proj.weight": trained.model.layers[1].mlp.up_proj.weight.detach()})
    model, start = weights(base), weights(make_model())
    assert [name for name, value in model.items() if not torch.equal(value, weights(trained)[name])] == []
    with exchanged(base, former):
        assert [name for name, value in weights(base).items() if not torch.equal(value, start[name])] == []
    assert [name for name, value in weights(base).items() if not torch.equal(value, model[name])] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "paged_adamw_8bit"])
def test_on_a_gpu_bfloat16_matrices_step_and_resume_bit_for_bit(optimizer, tmp_path):
    batches = [{name: x.cuda() for name, x in batch.items()} for batch in make_batches(4)]
    model = whole_model(torch.bfloat16).cuda()
    start, updates = weights(model), updates_of(model, optimizer, seed=3)
    train_steps(model, updates, batches[:2])
    torch.save(updates.state_dict(), tmp_path / "optimizer.pt")
    resumed = copy.deepcopy(model)
    train_steps(model, updates, batches[2:])
    again = updates_of(resumed, optimizer, seed=3)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train_steps(resumed, again, batches[2:])
    expected = weights(model)
    assert [name for name, value in weights(resumed).items() if not torch.equal(value, expected[name])] == []
    assert all(not torch.equal(start[name], expected[name]) for name in trained_parameters(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_parameter_may_have_a_rate_of_its_own_which_a_scheduler_scales():
    model, name = whole_model(), "score.weight"
    updates = BackwardUpdates(
        trained_parameters(model), lambda s: [torch.optim.SGD([p]) for p in s.values()], 1e-3, rates={name: 1.0}
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(updates, lambda step: 0.5)
    before = weights(model)
    with updates.attached():
        model(**make_batches(1)[0]).loss.backward()
    plain = whole_model()
    plain(**make_batches(1)[0]).loss.backward()
    for other, parameter in trained_parameters(plain).items():
        rate = 0.5 if other == name else 0.5e-3
        torch.testing.assert_close(model.get_parameter(other), before[other] - rate * parameter.grad)
    assert schedule.get_last_lr()[0] == 0.5e-3
