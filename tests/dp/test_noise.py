import copy
import pickle
import random

import numpy as np
import pytest
import torch

from fedseek.dp.noise import SecretGaussian, draws_under_equal_seeds

SIZE = 200_000


def test_noise_has_the_standard_deviation_asked_for():
    noise = SecretGaussian().normal(torch.Size([SIZE]), 3.0)
    assert noise.dtype == torch.float64
    assert float(noise.std()) == pytest.approx(3.0, rel=0.01)
    assert abs(float(noise.mean())) < 5 * 3.0 / SIZE**0.5


def test_noise_is_gaussian():
    noise = SecretGaussian().normal(torch.Size([SIZE]), 1.0)
    for z, tail in [(0.0, 0.5), (1.0, 0.158655), (2.0, 0.022750), (3.0, 0.001350)]:
        slack = 6 * (tail * (1 - tail) / SIZE) ** 0.5
        assert abs(float((noise > z).double().mean()) - tail) < slack
        assert abs(float((noise < -z).double().mean()) - tail) < slack


def test_noise_has_the_shape_of_the_tensor():
    assert SecretGaussian().normal(torch.Size([3, 4, 5]), 1.0).shape == (3, 4, 5)
    assert SecretGaussian().normal(torch.Size([]), 1.0).shape == ()


def test_two_sources_are_independent_under_equal_seeds():
    sites = []
    for _ in range(2):
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        sites.append(SecretGaussian().normal(torch.Size([SIZE]), 1.0))
    assert abs(float(torch.corrcoef(torch.stack(sites))[0, 1])) < 6 / SIZE**0.5


def test_values_within_a_draw_are_independent():
    noise = SecretGaussian().normal(torch.Size([SIZE]), 1.0)
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 6 / SIZE**0.5


def test_there_is_no_way_to_seed_or_copy_a_source():
    with pytest.raises(TypeError):
        SecretGaussian(5)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="repeat the noise"):
            duplicate(SecretGaussian())


def test_repr_shows_no_key():
    assert repr(SecretGaussian()) == "SecretGaussian(<key withheld>)"


def test_the_seeding_check_leaves_the_global_generators_alone():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    draws_under_equal_seeds(SecretGaussian(), SecretGaussian(), size=10)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
