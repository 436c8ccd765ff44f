"""The unit is what the guarantee is for: how often it is in a step, and how far it moves one, whatever it owns."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from scipy import stats
from torch import nn

from fedseek.dp.private_step import SecretNoiseOptimizer
from fedseek.dp.randomness import secret_generator
from fedseek.dp.sampling import PoissonUnitSampler

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

RARE = 1e-6  # chance of a false alarm
CLIP = 0.5


def drawn_by_unit(units: np.ndarray, probability: float, steps: int) -> np.ndarray:
    """Whether each unit was in each step, shape (steps, num_units)."""
    sampler = PoissonUnitSampler(units, probability, generator=secret_generator())
    seen = np.zeros((steps, sampler.num_units), bool)
    for step in range(steps):
        drawn = sampler.draw(step)
        seen[step, units[drawn.record_indices]] = True
        assert (units[drawn.record_indices] == drawn.unit_indices).all()
    return seen


@pytest.mark.parametrize("probability", [0.02, 0.3, 0.9])
def test_a_unit_of_100_records_is_in_a_step_exactly_as_often_as_one_of_one(probability):
    seen = drawn_by_unit(np.array([0] * 100 + [1]), probability, steps=6000)
    for count in seen.sum(0):
        assert stats.binomtest(int(count), len(seen), probability).pvalue > RARE
    # the same chance for both, told from each other: Fisher's exact test
    table = [[int(count), len(seen) - int(count)] for count in seen.sum(0)]
    assert stats.fisher_exact(table).pvalue > RARE


def test_whether_the_large_unit_is_drawn_says_nothing_of_the_small_one():
    seen = drawn_by_unit(np.array([0] * 100 + [1]), 0.3, steps=6000)
    table = [[int((seen[:, 0] == a).astype(int) @ (seen[:, 1] == b)) for b in (True, False)] for a in (True, False)]
    assert stats.chi2_contingency(table).pvalue > RARE


def test_each_record_of_a_drawn_unit_is_as_likely_as_the_others():
    sampler = PoissonUnitSampler(np.zeros(100, np.int64), 1.0, generator=secret_generator())
    counts = np.bincount(np.concatenate([sampler.draw(step).record_indices for step in range(20_000)]), minlength=100)
    assert stats.chisquare(counts).pvalue > RARE


def clipped_sum(model: GradSampleModule, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What a step would be moved by, before the noise."""
    tensors = [p for p in model.parameters() if p.requires_grad]
    optimizer = SecretNoiseOptimizer(
        torch.optim.SGD(tensors, lr=1.0), noise_multiplier=0.0, l2_clip_norm=CLIP, expected_batch_size=1.0
    )
    if len(features):
        nn.functional.cross_entropy(model(features), labels, reduction="none").sum().backward()
        optimizer.clip_and_accumulate()
    optimizer.add_noise()
    total = torch.cat([p.grad.flatten() for p in tensors])
    optimizer.zero_grad(set_to_none=True)
    return total


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    loudness=st.floats(0.01, 1e4),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_unit_moves_a_step_by_one_clip_norm_at_most_however_many_records_it_has(sizes, loudness, seed):
    rng = np.random.default_rng(seed)
    units = np.repeat(np.arange(len(sizes)), sizes)
    features = torch.from_numpy(rng.normal(0, loudness, (len(units), 3))).float()
    labels = torch.from_numpy(rng.integers(0, 2, len(units)))
    model = GradSampleModule(nn.Linear(3, 2), loss_reduction="sum")
    drawn = PoissonUnitSampler(units, 0.8, generator=rng).draw(0).record_indices
    whole = clipped_sum(model, features[drawn], labels[drawn])
    for unit in range(len(sizes)):
        others = drawn[units[drawn] != unit]
        without = clipped_sum(model, features[others], labels[others])
        assert float((whole - without).norm()) <= CLIP * (1 + 1e-4)


def test_that_bound_is_reached_so_the_test_above_means_something():
    model = GradSampleModule(nn.Linear(3, 2), loss_reduction="sum")
    moved = clipped_sum(model, torch.full((1, 3), 1e3), torch.tensor([0]))
    other = clipped_sum(model, torch.full((1, 3), 1e3), torch.tensor([1]))
    assert math.isclose(max(float(moved.norm()), float(other.norm())), CLIP, rel_tol=1e-3)
