from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.apply import ScopeState, apply_mean, apply_sums, enter_stage
from fedseek.encode import SummedUpdate, UpdateLayout, next_value_range, unflatten
from fedseek.lora.digest import tensors_digest

LAYOUTS = {
    "global": UpdateLayout("global", (("lora_B", (3, 4)), ("lora_B.二", (5,)))),
    "kind/bank": UpdateLayout("kind/bank", (("head", (7,)),)),
}


def naive_step(weights, mean, momentum, *, learning_rate, momentum_factor):
    """The same step one value at a time, in Python floats (IEEE doubles)."""
    new_momentum = [momentum_factor * v + m for v, m in zip(momentum.tolist(), mean.tolist(), strict=True)]
    new_weights = [w + learning_rate * v for w, v in zip(weights.tolist(), new_momentum, strict=True)]
    return np.array(new_weights, dtype=np.float32), np.array(new_momentum)


@given(
    seed=st.integers(0, 2**32),
    learning_rate=st.floats(1e-3, 10.0),
    momentum_factor=st.floats(0.0, 0.99),
    size=st.integers(1, 70),
)
@settings(max_examples=50)
def test_step_equals_the_naive_reference_bit_for_bit(seed, learning_rate, momentum_factor, size):
    rng = np.random.default_rng(seed)
    weights, momentum = rng.standard_normal(size).astype(np.float32), np.zeros(size)
    expected = (weights, momentum)
    for _ in range(3):
        mean = rng.standard_normal(size)
        factors = {"learning_rate": learning_rate, "momentum_factor": momentum_factor}
        weights, momentum = apply_mean(weights, mean, momentum, **factors)
        expected = naive_step(expected[0], mean, expected[1], **factors)
    assert weights.dtype == np.float32
    assert (weights == expected[0]).all()
    assert (momentum == expected[1]).all()


def test_plain_fedavg_adds_the_mean_and_keeps_its_arguments():
    weights, mean, momentum = np.ones(3, np.float32), np.array([0.5, -1.0, 0.0]), np.zeros(3)
    stepped, _ = apply_mean(weights, mean, momentum, learning_rate=1.0, momentum_factor=0.0)
    assert stepped.tolist() == [1.5, 0.0, 1.0]
    assert weights.tolist() == [1.0, 1.0, 1.0]
    assert momentum.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("mean", "momentum", "factors", "message"),
    [
        (np.zeros(2), np.zeros(3), (1.0, 0.0), "shapes"),
        (np.zeros((3, 1)), np.zeros(3), (1.0, 0.0), "shapes"),
        (np.zeros(3, np.float32), np.zeros(3), (1.0, 0.0), "wanted float32"),
        (np.zeros(3), np.zeros(3), (0.0, 0.0), "learning_rate"),
        (np.zeros(3), np.zeros(3), (np.nan, 0.0), "learning_rate"),
        (np.zeros(3), np.zeros(3), (np.inf, 0.0), "learning_rate"),
        (np.zeros(3), np.zeros(3), (1.0, 1.0), "momentum_factor"),
        (np.zeros(3), np.zeros(3), (1.0, -0.1), "momentum_factor"),
        (np.full(3, 1e39), np.zeros(3), (1.0, 0.0), "not finite"),
    ],
)
def test_steps_out_of_range_are_refused(mean, momentum, factors, message):
    with pytest.raises(ValueError, match=message):
        apply_mean(np.zeros(3, np.float32), mean, momentum, learning_rate=factors[0], momentum_factor=factors[1])


# --- all scopes of a site


@pytest.fixture(scope="module")
def plan(tiny_plan):
    return tiny_plan(training={"server_learning_rate": 0.5, "server_momentum": 0.9})


def states():
    rng = np.random.default_rng(1)
    return {
        scope: ScopeState(
            layout,
            rng.standard_normal(layout.num_values).astype(np.float32),
            rng.standard_normal(layout.num_values),
            0.25,
        )
        for scope, layout in LAYOUTS.items()
    }


def summed(scope, *, scale=1.0):
    mean = scale * np.random.default_rng(2).standard_normal(LAYOUTS[scope].num_values)
    return SummedUpdate(contributors=4, weight=4, mean=mean, metrics={}, saturated_fraction=0.0, weight_fraction=1.0)


def test_every_scope_with_a_sum_takes_the_plans_step_and_the_next_range(plan):
    before = states()
    after = apply_sums(before, {scope: summed(scope) for scope in LAYOUTS}, plan)
    for scope, held in before.items():
        update = summed(scope)
        weights, momentum = apply_mean(held.weights, update.mean, held.momentum, learning_rate=0.5, momentum_factor=0.9)
        assert (after[scope].weights == weights).all()
        assert (after[scope].momentum == momentum).all()
        assert after[scope].value_range == next_value_range(update, 0.25) != 0.25
        assert after[scope].layout == held.layout


def test_a_scope_without_a_sum_stays_as_it_is_and_nothing_is_changed_in_place(plan):
    before = states()
    kept = {scope: (state.weights.copy(), state.momentum.copy()) for scope, state in before.items()}
    after = apply_sums(before, {"global": summed("global")}, plan)
    assert list(after) == list(before)
    assert after["kind/bank"] is before["kind/bank"]
    assert (after["global"].weights != before["global"].weights).any()
    for scope, (weights, momentum) in kept.items():
        assert (before[scope].weights == weights).all()
        assert (before[scope].momentum == momentum).all()
    assert apply_sums(before, {}, plan) == before


def test_range_and_momentum_start_over_with_the_first_round_of_a_later_stage(tiny_plan):
    domain = {"rounds": 2, "steps_per_round": 3, "sampling_probability": 0.5, "learning_rate": 0.004}
    plan = tiny_plan(domain=domain, model={"family": "qwen2"}, training={"rounds": 2})
    for number in (1, 2, 4, 5):
        assert enter_stage(states(), plan, number).keys() == states().keys()
        assert all(each.value_range == 0.25 for each in enter_stage(states(), plan, number).values()), number
    before, after = states(), enter_stage(states(), plan, 3)
    for scope, held in after.items():
        assert held.value_range == plan.initial_range(scope, 3) != plan.initial_range(scope, 1)
        assert not held.momentum.any()
        assert held.digest() == before[scope].digest()


def test_a_sum_that_would_overflow_is_not_applied(plan):
    with pytest.raises(ValueError, match="not finite"):
        apply_sums(states(), {"global": summed("global", scale=1e39)}, plan)


def test_a_sum_of_a_scope_that_is_not_held_is_a_mistake_of_the_caller(plan):
    with pytest.raises(KeyError):
        apply_sums({"global": states()["global"]}, {"kind/bank": summed("kind/bank")}, plan)


def test_the_digest_is_of_the_named_tensors_and_of_nothing_else():
    state = states()["global"]
    assert state.digest() == tensors_digest(unflatten(state.weights, state.layout))
    assert len(state.digest()) == 32
    nudged = state.weights.copy()
    nudged[-1] = np.nextafter(nudged[-1], np.float32(np.inf))
    renamed = UpdateLayout("global", (("lora_B", (3, 4)), ("lora_B.三", (5,))))
    reshaped = UpdateLayout("global", (("lora_B", (4, 3)), ("lora_B.二", (5,))))
    others = [replace(state, weights=nudged), replace(state, layout=renamed), replace(state, layout=reshaped)]
    assert len({state.digest(), *(other.digest() for other in others)}) == 4
    assert replace(state, momentum=state.momentum + 1, value_range=1.0).digest() == state.digest()


def test_weights_are_not_printed():
    assert "weights" not in repr(states()["global"])
    assert "momentum" not in repr(states()["global"])


def test_a_long_vector_takes_the_same_step_as_a_short_one():
    rng = np.random.default_rng(4)
    weights, mean, momentum = rng.standard_normal(200_001).astype(np.float32), *rng.standard_normal((2, 200_001))
    for factor in (0.0, 0.9):
        factors = {"learning_rate": 0.7, "momentum_factor": factor}
        stepped = apply_mean(weights, mean, momentum, **factors)
        for got, wanted in zip(stepped, naive_step(weights, mean, momentum, **factors), strict=True):
            assert (got == wanted).all()
    mean[-1] = 1e39
    with pytest.raises(ValueError, match="not finite"):
        apply_mean(weights, mean, momentum, learning_rate=1.0, momentum_factor=0.0)
