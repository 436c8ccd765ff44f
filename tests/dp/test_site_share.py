import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.dp import site_share
from fedseek.dp.site_guards import SITE_LEVEL_GUARDS, check_site_noise_added, check_site_update_clipped
from fedseek.dp.site_level import site_level_params
from fedseek.dp.site_share import clip_and_round, noise_update
from fedseek.errors import GuardTripped, UnsupportedMechanism

PARAMS = site_level_params(
    8.0, 1e-5, l2_clip_norm=0.5, rounds=4, levels=2**15 - 1, max_sites=8, honest=(4, 2), tolerated=1
)
VARIANCES = {"adapter": PARAMS.adapter_variance, "head": PARAMS.head_variance}


def update(norm, sizes=(3000, 70), seed=0):
    rng = np.random.default_rng(seed)
    vectors = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    length = math.sqrt(sum(float(np.square(vector, dtype=np.float64).sum()) for vector in vectors))
    return {
        scope: (vector * (norm / length)).astype(np.float32)
        for scope, vector in zip(("adapter", "head"), vectors, strict=False)
    }


def norm_of(vectors):
    return math.sqrt(sum(int(number) ** 2 for vector in vectors.values() for number in vector))


def tripped(guard):
    return pytest.raises(GuardTripped, match=guard)


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    repeat=st.integers(1, 50),
    seed=st.integers(0, 3),
)
@settings(max_examples=200)
def test_no_update_is_longer_than_the_bound_whatever_it_is(values, repeat, seed):
    vector = np.random.default_rng(seed).permutation(np.array(values * repeat, dtype=np.float32))
    cut = vector.size // 3
    rounded = clip_and_round({"adapter": vector[cut:], "head": vector[:cut]}, PARAMS)
    assert norm_of(rounded) <= PARAMS.norm_bound


@pytest.mark.parametrize("norm", [0.4, 0.5, 5.0, 5e8])
def test_one_clip_is_for_all_scopes_together_and_keeps_the_direction(norm):
    vectors = update(norm)
    rounded = clip_and_round(vectors, PARAMS)
    got = np.concatenate([rounded["adapter"], rounded["head"]]) * PARAMS.grid
    wanted = np.concatenate([vectors["adapter"], vectors["head"]]).astype(np.float64)
    kept = min(1.0, PARAMS.largest_norm(3070) * PARAMS.grid / norm)
    assert np.abs(got - wanted * kept).max() < PARAMS.grid * (1 + 1e-6)
    assert kept == 1 or norm_of(rounded) == pytest.approx(PARAMS.norm_bound, rel=0.01)


def test_rounding_is_without_bias():
    value = np.full(40_000, 0.3 * PARAMS.grid / 1, dtype=np.float32)
    rounded = clip_and_round({"adapter": value}, PARAMS)["adapter"]
    assert set(np.unique(rounded)) == {0, 1}
    assert rounded.mean() == pytest.approx(0.3, abs=6 * math.sqrt(0.21 / 40_000))


def test_an_update_of_zeros_stays_zero_and_gets_noise():
    zeros = {"adapter": np.zeros(20_000, np.float32), "head": np.zeros(20_000, np.float32)}
    assert not any(vector.any() for vector in clip_and_round(zeros, PARAMS).values())
    noised = noise_update(zeros, PARAMS, variances=VARIANCES)
    for scope, numbers in noised.numbers.items():
        assert numbers.var() == pytest.approx(VARIANCES[scope], rel=0.06)
    assert noised.guards_passed == tuple(sorted(SITE_LEVEL_GUARDS))
    assert "numbers" not in repr(noised)


def test_the_sum_carries_the_shares_of_all_sites():
    sites = [noise_update(update(0.4, seed=site), PARAMS, variances=VARIANCES) for site in range(5)]
    exact = sum(update(0.4, seed=site)["adapter"].astype(np.float64) for site in range(5)) / PARAMS.grid
    left = sum(site.numbers["adapter"] for site in sites) - exact
    assert left.var() == pytest.approx(5 * PARAMS.adapter_variance, rel=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    vectors = update(0.4)
    vectors["head"][3] = bad
    with pytest.raises(ValueError, match="not finite"):
        clip_and_round(vectors, PARAMS)


def test_an_adapter_that_does_not_fit_the_grid_is_refused():
    with pytest.raises(UnsupportedMechanism, match="rounding"):
        clip_and_round({"adapter": np.zeros(100_000, np.float32)}, replace(PARAMS, norm_bound=150))


def test_a_rounding_that_came_out_too_long_is_done_again(monkeypatch):
    lengths = iter([PARAMS.norm_bound + 1, PARAMS.norm_bound + 1, 7])
    monkeypatch.setattr(site_share, "_round", lambda vector, _: np.array([next(lengths)], np.int64))
    assert clip_and_round({"adapter": np.zeros(1, np.float32)}, PARAMS)["adapter"].tolist() == [7]


# --- guards -------------------------------------------------------------------------------------------------------------


def test_without_the_clip_nothing_is_sent(monkeypatch):
    def only_rounded(vectors, params):
        return {scope: np.rint(vector / params.grid).astype(np.int64) for scope, vector in vectors.items()}

    monkeypatch.setattr(site_share, "clip_and_round", only_rounded)
    noise_update(update(0.49), PARAMS, variances=VARIANCES)
    with tripped("site_update_clipped"):
        noise_update(update(0.51), PARAMS, variances=VARIANCES)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.9], ids=["none", "half", "nine-tenths"])
def test_without_the_whole_share_of_noise_nothing_is_sent(monkeypatch, part):
    def less(size, variance, generator):
        return np.rint(part * np.random.default_rng(0).normal(0, math.sqrt(variance), size)).astype(np.int64)

    monkeypatch.setattr(site_share, "discrete_gaussian", less)
    with tripped("site_noise_added"):
        noise_update(update(0.4, sizes=(20_000, 70)), PARAMS, variances=VARIANCES)


def test_noise_in_one_scope_does_not_make_up_for_another(monkeypatch):
    real = site_share.discrete_gaussian
    monkeypatch.setattr(
        site_share,
        "discrete_gaussian",
        lambda size, *rest: 9 * real(size, *rest) if size > 100 else np.zeros(size, np.int64),
    )
    with tripped("site_noise_added"):
        noise_update(update(0.4), PARAMS, variances=VARIANCES)


def test_the_guards_at_their_edges():
    assert check_site_update_clipped(100, norm_bound=10) == "site_update_clipped"
    for wrong in (101, -1, 2**63):
        with tripped("site_update_clipped"):
            check_site_update_clipped(wrong, norm_bound=10)
    assert check_site_noise_added(1, 5, variance=16) == "site_noise_added"
    for wrong in (0, -5):
        with tripped("site_noise_added"):
            check_site_noise_added(wrong, 5, variance=16)


def test_true_noise_passes_in_scopes_of_any_size():
    for size in (34, 130, 1000):
        for _ in range(200):
            noise_update({"adapter": np.zeros(size, np.float32)}, PARAMS, variances=VARIANCES)
