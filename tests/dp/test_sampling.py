import numpy as np
import pytest
import torch

from fedseek.dp.randomness import secret_generator
from fedseek.dp.sampling import PoissonUnitSampler
from fedseek.errors import UnsupportedMechanism


def sampler_of(units, probability):
    return PoissonUnitSampler(np.asarray(units), probability, generator=secret_generator())


def test_a_customer_with_many_records_gives_at_most_one_a_step():
    units = np.array([7] * 50 + list(range(100, 130)))
    sampler = sampler_of(units, 0.6)
    seen = set()
    for step in range(400):
        drawn = sampler.draw(step).record_indices
        of_customer = drawn[units[drawn] == 7]
        assert len(of_customer) <= 1
        assert len(np.unique(units[drawn])) == len(drawn)
        seen.update(of_customer.tolist())
    assert len(seen) > 40  # any of its records may be the one


def test_a_customer_with_many_records_is_drawn_as_often_as_one_with_few():
    units = np.array([0] * 50 + [1])
    sampler = sampler_of(units, 0.3)
    counts = np.zeros(2)
    for step in range(4000):
        counts += np.bincount(units[sampler.draw(step).record_indices], minlength=2)
    assert counts / 4000 == pytest.approx([0.3, 0.3], abs=0.04)


def test_units_are_drawn_by_coins_of_their_own():
    sampler = sampler_of(np.arange(40), 0.25)
    drawn = np.zeros((5000, 40))
    for step in range(5000):
        drawn[step, sampler.draw(step).record_indices] = 1
    sizes = drawn.sum(1)
    assert sizes.mean() == pytest.approx(10, abs=0.25)
    assert sizes.var() == pytest.approx(40 * 0.25 * 0.75, rel=0.15)  # 0 for a loader of fixed batches
    correlation = np.corrcoef(drawn.T) - np.eye(40)
    assert np.abs(correlation).max() < 6 / 5000**0.5
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 6 / 5000**0.5


def test_unit_numbers_need_not_be_dense_or_sorted():
    units = np.array([900, -3, 900, 17, -3])
    draw = sampler_of(units, 1.0).draw(4)
    assert draw.step == 4
    assert sorted(units[draw.record_indices]) == [-3, 17, 900]


def test_expected_batch_size_counts_units_not_records():
    assert sampler_of([0] * 50 + [1] * 10 + [2], 0.5).expected_batch_size == 1.5


def test_a_step_may_be_empty():
    sampler = sampler_of([0, 1], 1e-9)
    draw = sampler.draw(0)
    assert draw.record_indices.shape == (0,)
    assert draw.record_indices.dtype == np.int64


def test_who_is_drawn_follows_no_seed():
    draws = []
    for _ in range(2):
        torch.manual_seed(3), np.random.seed(3)
        draws.append(sampler_of(np.arange(200), 0.5).draw(0).record_indices.tolist())
    assert draws[0] != draws[1]


def test_repr_of_a_draw_names_nobody():
    assert repr(sampler_of([0, 1, 2], 1.0).draw(0)) == "Draw(step=0)"


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.5, float("nan")])
def test_a_probability_outside_its_range_is_refused(probability):
    with pytest.raises(UnsupportedMechanism, match="sampling_probability"):
        sampler_of([0, 1], probability)


def test_a_site_without_records_is_refused():
    with pytest.raises(UnsupportedMechanism, match="no records"):
        sampler_of(np.array([], dtype=np.int64), 0.5)
