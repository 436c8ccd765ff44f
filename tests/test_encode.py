import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.encode import (
    METRIC_SCALE,
    SummedUpdate,
    UpdateLayout,
    decode_sum,
    encode_integers,
    encode_update,
    flatten,
    next_value_range,
    num_ciphertexts,
    num_slots,
    quantiser_bound,
    unflatten,
)
from fedseek.errors import Malformed
from fedseek.he.packing import choose_packing, unpack

PACKING = choose_packing(13, 8)
LAYOUT = UpdateLayout("全局", (("层.lora_B", (3, 4)), ("head.bias", (5,))), ("loss", "examples"))
METRICS = {"loss": 0.5, "examples": 100.0}


def encode(vector, *, layout=LAYOUT, packing=PACKING, value_range=1.0, weight=1, weight_cap=1, metrics=METRICS, seed=0):
    return encode_update(
        np.asarray(vector, dtype=np.float32),
        layout,
        packing=packing,
        value_range=value_range,
        weight=weight,
        weight_cap=weight_cap,
        metrics=metrics,
        rng=np.random.default_rng(seed),
    )


def decode(slots, *, layout=LAYOUT, packing=PACKING, value_range=1.0, weight_cap=1):
    return decode_sum(slots, layout, packing=packing, value_range=value_range, weight_cap=weight_cap)


def plain_layout(num_values):
    return UpdateLayout("global", (("x", (num_values,)),))


def test_layout_counts_and_sizes():
    assert LAYOUT.offsets == (0, 12, 17)
    assert (LAYOUT.num_values, LAYOUT.num_header_slots) == (17, 7)  # 2 tags, 3 counts, 2 metrics
    assert num_slots(LAYOUT, PACKING) == 7 + 6
    assert num_ciphertexts(LAYOUT, PACKING) == 1
    assert num_ciphertexts(plain_layout(3 * (4096 - 5)), PACKING) == 1
    assert num_ciphertexts(plain_layout(3 * (4096 - 5) + 1), PACKING) == 2


@pytest.mark.parametrize(("num_values", "ciphertexts"), [(1, 1), (3 * (4096 - 5), 1), (3 * (4096 - 5) + 1, 2)])
def test_slots_fill_whole_ciphertexts_with_zeros_where_tags_and_padding_go(num_values, ciphertexts):
    layout = plain_layout(num_values)
    slots = encode(np.full(num_values, 0.5), layout=layout, metrics={})
    assert (slots.dtype, slots.shape) == (np.uint64, (4096 * ciphertexts,))
    assert slots[:5].tolist() == [0, 0, 1, 1, 0]  # tags, one site, its weight, nothing saturated
    used = num_slots(layout, PACKING)
    assert slots[5:used].all()
    assert not slots[used:].any()


def test_what_stands_where_tags_and_padding_go_does_not_reach_the_mean():
    vector = np.linspace(-1, 1, 17, dtype=np.float32)
    slots = encode(vector)
    marked = slots.copy()
    marked[:2] = PACKING.params.plain_modulus - 1
    marked[num_slots(LAYOUT, PACKING) :] = 5
    assert (decode(marked).mean == decode(slots).mean).all()
    assert decode(marked).metrics == METRICS


@pytest.mark.parametrize(
    ("tensors", "metrics"),
    [((), ()), ((("a", (2, 0)),), ()), ((("a", (1,)), ("a", (2,))), ()), ((("a", (1,)),), ("m", "m"))],
)
def test_layouts_without_meaning_are_refused(tensors, metrics):
    with pytest.raises(ValueError, match="layout"):
        UpdateLayout("global", tensors, metrics)


def test_unflatten_undoes_flatten():
    rng = np.random.default_rng(1)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in LAYOUT.tensors}
    again = unflatten(flatten(dict(reversed(tensors.items())), LAYOUT), LAYOUT)
    assert list(again) == [name for name, _ in LAYOUT.tensors]
    assert all((again[name] == tensors[name]).all() for name in tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("head.bias"),
        lambda t: t.update(extra=np.zeros(1, np.float32)),
        lambda t: t.update({"head.bias": np.zeros(6, np.float32)}),
        lambda t: t.update({"head.bias": np.zeros(5, np.float64)}),
    ],
)
def test_flatten_refuses_other_tensors(change):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in LAYOUT.tensors}
    change(tensors)
    with pytest.raises(ValueError, match="tensor"):
        flatten(tensors, LAYOUT)


def test_unflatten_refuses_another_length():
    with pytest.raises(ValueError, match="wanted"):
        unflatten(np.zeros(16, np.float32), LAYOUT)


@given(
    value_bits=st.integers(2, 24),
    value_range=st.floats(2.0**-20, 2.0**20, width=32),
    parts=st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=40),
    sites=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_edges_and_zero_are_exact_at_every_site_count(value_bits, value_range, parts, sites, seed):
    packing, layout = choose_packing(value_bits, 8), plain_layout(len(parts))
    vector = np.array(parts, dtype=np.float32) * np.float32(value_range)
    slots = sum(
        encode(vector, layout=layout, packing=packing, value_range=value_range, metrics={}, seed=seed + site)
        for site in range(sites)
    )
    summed = decode(slots, layout=layout, packing=packing, value_range=value_range)
    assert summed.contributors == sites
    assert summed.saturated_fraction == 0
    np.testing.assert_allclose(summed.mean, vector, rtol=1e-14, atol=0)


@given(
    size=st.tuples(st.integers(2, 24), st.integers(1, 64)),
    num_values=st.integers(1, 60),
    value_range=st.sampled_from([1e-3, 0.37, 1.0, 250.0]),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=64),
    seed=st.integers(0, 2**32),
)
def test_decoded_mean_is_the_weighted_mean_within_the_stated_bound(size, num_values, value_range, weights, seed):
    packing, layout = choose_packing(*size), plain_layout(num_values)
    weights = weights[: size[1]]
    rng = np.random.default_rng(seed)
    vectors = rng.uniform(-value_range, value_range, (len(weights), num_values)).astype(np.float32)
    np.clip(vectors, -value_range, value_range, out=vectors)
    slots = sum(
        encode(
            v, layout=layout, packing=packing, value_range=value_range, weight=w, weight_cap=1000, metrics={}, seed=i
        )
        for i, (v, w) in enumerate(zip(vectors, weights, strict=True))
    )
    summed = decode(slots, layout=layout, packing=packing, value_range=value_range, weight_cap=1000)
    expected = np.average(vectors.astype(np.float64), axis=0, weights=weights)
    bound = quantiser_bound(
        packing, value_range=value_range, contributors=len(weights), weight=sum(weights), weight_cap=1000
    )
    assert np.abs(summed.mean - expected).max() <= bound * (1 + 1e-6)
    assert summed.weight == sum(weights)


def test_saturation_is_clipped_and_counted_over_all_sites():
    layout = plain_layout(4)
    slots = encode([2.0, -9.0, 1.0, 0.5], layout=layout, metrics={}) + encode([0.0] * 4, layout=layout, metrics={})
    summed = decode(slots, layout=layout)
    assert summed.saturated_fraction == 2 / 8
    np.testing.assert_allclose(summed.mean, [0.5, -0.5, 0.5, 0.25], atol=1 / 4095)


def test_clipping_applies_to_the_weighted_value():
    layout = plain_layout(1)
    slots = encode([3.0], layout=layout, weight=250, weight_cap=1000, metrics={})
    summed = decode(slots, layout=layout, weight_cap=1000)
    assert summed.saturated_fraction == 0
    assert summed.weight_fraction == 0.25
    assert summed.mean[0] == pytest.approx(3.0, abs=4 / 4095)


def test_all_sites_at_the_maximum_fill_the_digits_without_a_carry():
    packing, layout = choose_packing(8, 16), plain_layout(9)
    vector = np.full(9, 1e30, dtype=np.float32)
    slots = sum(encode(vector, layout=layout, packing=packing, metrics={}, seed=site) for site in range(16))
    summed = decode(slots, layout=layout, packing=packing)
    assert (summed.mean == 1.0).all()
    assert summed.saturated_fraction == 1.0


def test_rounding_is_unbiased_and_only_to_a_neighbour():
    levels = 2**12 - 1
    places = np.array([0.1, 0.25, 0.5, 0.9, -0.3], dtype=np.float64)  # parts of a step
    value = np.repeat((places + np.array([0, 7, -100, 4000, -4094])) / levels, 40_000)
    layout = plain_layout(value.size)
    summed = decode(encode(value, layout=layout, metrics={}, seed=5), layout=layout)
    steps = summed.mean * levels - value.astype(np.float32).astype(np.float64) * levels
    assert np.abs(steps).max() < 1
    deviation = 0.5 / math.sqrt(40_000)  # at most, of the mean of 40,000 roundings
    assert (np.abs(steps.reshape(5, -1).mean(axis=1)) < 5 * deviation).all()
    # Rounding to nearest would show: it moves every value of a group by the same 0.1 to 0.5 of a step.
    assert all(len(np.unique(group)) == 2 for group in np.round(summed.mean * levels).reshape(5, -1))


def test_rounding_draws_differ_between_calls_without_a_seed():
    layout = plain_layout(2000)
    vector = np.full(2000, 0.5 / 4095, dtype=np.float32)
    first, second = (
        encode_update(vector, layout, packing=PACKING, value_range=1.0, weight=1, weight_cap=1, metrics={})
        for _ in range(2)
    )
    assert (first != second).any()


def test_metrics_add_exactly_in_fixed_point():
    zeros = np.zeros(17, dtype=np.float32)
    slots = encode(zeros, metrics={"loss": 0.75, "examples": 3.0}) + encode(
        zeros, metrics={"examples": 4.0, "loss": 1.5}
    )
    assert decode(slots).metrics == {"loss": 2.25, "examples": 7.0}


@pytest.mark.parametrize(
    "metrics",
    [{}, {"loss": 1.0}, {**METRICS, "x": 1.0}, {**METRICS, "loss": -1.0}, {**METRICS, "loss": math.nan}]
    + [{**METRICS, "loss": value} for value in (math.inf, PACKING.header_bound / METRIC_SCALE + 1)],
)
def test_metrics_out_of_range_or_unknown_are_refused(metrics):
    with pytest.raises(ValueError, match="metric"):
        encode(np.zeros(17), metrics=metrics)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused(bad):
    vector = np.zeros(17)
    vector[3] = bad
    with pytest.raises(ValueError, match="1 values are not finite"):
        encode(vector)


@pytest.mark.parametrize(
    "changed",
    [
        {"value_range": 0.0},
        {"value_range": -1.0},
        {"value_range": math.nan},
        {"value_range": math.inf},
        {"weight": 0},
        {"weight": 2},
        {"weight_cap": PACKING.header_bound + 1},
    ],
)
def test_arguments_out_of_range_are_refused(changed):
    with pytest.raises(ValueError, match="wanted"):
        encode(np.zeros(17), **changed)


def test_vector_of_another_shape_or_type_is_refused():
    arguments = {"packing": PACKING, "value_range": 1.0, "weight": 1, "weight_cap": 1, "metrics": METRICS}
    with pytest.raises(ValueError, match="float32"):
        encode_update(np.zeros(16, np.float32), LAYOUT, **arguments)
    with pytest.raises(ValueError, match="float32"):
        encode_update(np.zeros(17, np.float64), LAYOUT, **arguments)


def changed_slot(position, value):
    slots = encode(np.zeros(17))
    slots[position] = value
    return slots


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (changed_slot(2, 0), "holds 0 sites"),
        (changed_slot(2, 9), "holds 9 sites"),
        (changed_slot(3, 0), "cannot weigh 0"),
        (changed_slot(3, 2), "cannot weigh 2"),
        (changed_slot(4, 18), "saturated"),
        (changed_slot(5, PACKING.header_bound + 1), "metric 'loss'"),
        (changed_slot(9, 2**48 - 1), "exceeds"),
        (np.zeros(12, dtype=np.uint64), "wanted at least 13"),
        (np.zeros((2, 13), dtype=np.uint64), "wanted at least 13"),
    ],
)
def test_sums_that_no_sites_can_produce_are_refused(slots, message):
    with pytest.raises(Malformed, match=message):
        decode(slots)


def summed(*, mean, saturated_fraction=0.0, contributors=4, weight_fraction=1.0):
    return SummedUpdate(
        contributors=contributors,
        weight=contributors,
        mean=np.asarray(mean, dtype=np.float64),
        metrics={},
        saturated_fraction=saturated_fraction,
        weight_fraction=weight_fraction,
    )


@pytest.mark.parametrize(
    ("arguments", "current", "expected"),
    [
        ({"mean": [0.25, -0.5]}, 1.0, 2.0),  # 1.5 * sqrt(4) * 0.5 = 1.5
        ({"mean": [0.25, -0.7]}, 1.0, 4.0),  # 2.1
        ({"mean": [0.5, -1.0], "contributors": 1}, 1.0, 2.0),
        ({"mean": [0.5], "weight_fraction": 0.25}, 1.0, 0.5),
        ({"mean": [0.0]}, 1.0, 0.25),
        ({"mean": [0.0]}, 2.0**-40, 2.0**-40),
        ({"mean": [0.1], "saturated_fraction": 0.01}, 1.0, 2.0),
        ({"mean": [0.1], "saturated_fraction": 0.00001}, 1.0, 0.5),
        ({"mean": [1e30]}, 1.0, 2.0**40),
    ],
)
def test_next_range_follows_its_rule(arguments, current, expected):
    assert next_value_range(summed(**arguments), current) == expected


def test_next_range_of_noise_dominated_updates_stops_the_saturation():
    rng = np.random.default_rng(9)
    layout, value_range, fractions = plain_layout(20_000), 2.0**-6, []
    for _ in range(6):
        slots = sum(
            encode(rng.standard_normal(20_000), layout=layout, value_range=value_range, metrics={}, seed=site)
            for site in range(8)
        )
        decoded = decode(slots, layout=layout, value_range=value_range)
        fractions.append(decoded.saturated_fraction)
        value_range = next_value_range(decoded, value_range)
    assert fractions[0] > 0.9
    assert fractions[-1] == 0
    assert value_range == 8.0  # the largest of 160,000 normal draws is about 4.5


# --- a scope without tensors


METRICS_ALONE = UpdateLayout("kind/bank", (), ("loss", "examples"))


def test_a_layout_may_have_metrics_alone():
    assert (METRICS_ALONE.offsets, METRICS_ALONE.num_values, METRICS_ALONE.num_header_slots) == ((0,), 0, 7)
    assert (num_slots(METRICS_ALONE, PACKING), num_ciphertexts(METRICS_ALONE, PACKING)) == (7, 1)
    vector = flatten({}, METRICS_ALONE)
    assert (vector.shape, vector.dtype, unflatten(vector, METRICS_ALONE)) == ((0,), np.float32, {})
    with pytest.raises(ValueError, match="at least one tensor or metric"):
        UpdateLayout("kind/bank", (), ())


def test_metrics_add_without_values():
    nothing = np.zeros(0, np.int64)
    one = encode([], layout=METRICS_ALONE, weight=3, weight_cap=10)
    two = encode_integers(nothing, METRICS_ALONE, packing=PACKING, metrics={"loss": 1.25, "examples": 7.0})
    assert one.shape == two.shape == (4096,)
    summed = decode(one + two, layout=METRICS_ALONE, weight_cap=10)
    assert (summed.contributors, summed.weight, summed.mean.shape) == (2, 4, (0,))
    assert summed.metrics == {"loss": 1.75, "examples": 107.0}
    assert summed.saturated_fraction == 0.0
    assert next_value_range(summed, 0.375) == 0.375, "nothing was quantised: there is nothing to follow"


def test_a_sum_without_values_can_have_saturated_none():
    slots = encode([], layout=METRICS_ALONE)
    slots[4] = 1
    with pytest.raises(Malformed, match="saturated"):
        decode(slots, layout=METRICS_ALONE)


def test_a_long_vector_is_rounded_by_draws_in_its_order_however_it_is_cut():
    """As by the formula over the whole vector at once: who fixes the draws fixes the slots."""
    rng = np.random.default_rng(3)
    vector = rng.uniform(-1.2, 1.2, 100_003).astype(np.float32)
    slots = encode(vector, layout=plain_layout(vector.size), weight=2, weight_cap=3, metrics={}, seed=8)
    scaled = np.clip(vector * np.float64(2 / 3), -1, 1) * PACKING.levels
    low = np.floor(scaled)
    digits = low + (np.random.default_rng(8).random(vector.size, dtype=np.float32) < scaled - low) + PACKING.levels
    used = num_slots(plain_layout(vector.size), PACKING)
    assert (unpack(slots[5:used], vector.size, PACKING) == digits.astype(np.uint64)).all()
    mean = decode(slots, layout=plain_layout(vector.size), weight_cap=3).mean
    assert (mean == (digits - PACKING.levels) * (1.0 / PACKING.levels * 3 / 2)).all()


def test_a_value_too_large_anywhere_in_a_long_sum_is_found():
    layout = plain_layout(100_003)
    slots = encode(np.zeros(100_003), layout=layout, metrics={})
    slots[num_slots(layout, PACKING) - 1] += np.uint64(2**15)
    with pytest.raises(Malformed, match="exceeds"):
        decode(slots, layout=layout)


def test_a_value_that_is_not_finite_is_found_at_the_end_of_a_long_vector():
    vector = np.zeros(100_003, np.float32)
    vector[-2:] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 values are not finite"):
        encode(vector, layout=plain_layout(vector.size), metrics={})
