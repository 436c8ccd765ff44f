import copy
import os
import pickle
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats

from fedseek.dp.noise import SecretGaussian, draws_under_equal_seeds
from fedseek.dp.private_step import SecretNoiseOptimizer

SIZE = 200_000
RARE = 1e-6  # chance of a false alarm


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


@pytest.mark.parametrize("std", [1e-4, 1.0, 37.5])
def test_noise_passes_the_kolmogorov_smirnov_test(std):
    noise = SecretGaussian().normal(torch.Size([SIZE // 100, 100]), std).numpy()
    assert stats.kstest(noise.flatten(), stats.norm(scale=std).cdf).pvalue > RARE
    for line in (noise[0], noise[:, 0], noise[-1]):  # no row or column is another distribution
        assert stats.kstest(line, stats.norm(scale=std).cdf).pvalue > RARE


def test_the_kolmogorov_smirnov_test_would_see_noise_five_percent_too_small():
    noise = SecretGaussian().normal(torch.Size([SIZE]), 0.95).numpy()
    assert stats.kstest(noise, stats.norm.cdf).pvalue < RARE


def test_noise_has_the_shape_of_the_tensor():
    assert SecretGaussian().normal(torch.Size([3, 4, 5]), 1.0).shape == (3, 4, 5)
    assert SecretGaussian().normal(torch.Size([]), 1.0).shape == ()


def test_several_tensors_get_noise_of_their_own_shapes_each():
    shapes = [torch.Size([300, 4]), torch.Size([]), torch.Size([700])]
    noises = SecretGaussian().normals(shapes, 2.0)
    assert [noise.shape for noise in noises] == shapes
    values = torch.cat([noise.flatten() for noise in noises]).numpy()
    assert len(np.unique(values)) == 1901
    assert stats.kstest(values, stats.norm(scale=2.0).cdf).pvalue > RARE


def test_two_sources_are_independent_under_equal_seeds():
    sites = []
    for _ in range(2):
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        sites.append(SecretGaussian().normal(torch.Size([SIZE]), 1.0))
    assert abs(float(torch.corrcoef(torch.stack(sites))[0, 1])) < 6 / SIZE**0.5


def noise_of_a_site(std: float) -> np.ndarray:
    """What a site's step adds, at a site that shares every seed of the plan with all others."""
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    tensors = [torch.nn.Parameter(torch.zeros(size)) for size in (SIZE // 2, SIZE // 4, SIZE // 4)]
    optimizer = SecretNoiseOptimizer(
        torch.optim.SGD(tensors, lr=1.0), noise_multiplier=std / 0.5, l2_clip_norm=0.5, expected_batch_size=1.0
    )
    optimizer.add_noise()  # nobody was drawn: noise alone
    return torch.cat([tensor.grad for tensor in tensors]).double().numpy()


def test_the_steps_of_two_sites_that_share_every_seed_are_independent():
    """Of independent Gaussians sum and difference are Gaussian with twice the variance; of equal ones, one is zero."""
    one, other = noise_of_a_site(2.0), noise_of_a_site(2.0)
    for noise, std in ((one, 2.0), (other, 2.0), (one - other, 8**0.5), (one + other, 8**0.5)):
        assert stats.kstest(noise, stats.norm(scale=std).cdf).pvalue > RARE
    assert stats.pearsonr(one, other).pvalue > RARE
    assert stats.pearsonr(one**2, other**2).pvalue > RARE  # not of equal size either


def test_one_site_is_not_another_a_few_values_later():
    one, other = noise_of_a_site(1.0), noise_of_a_site(1.0)
    for shift in range(1, 65):
        assert stats.pearsonr(one[shift:], other[:-shift]).pvalue > RARE / 64


def test_a_forked_child_does_not_repeat_the_noise_of_its_parent():
    source = SecretGaussian()
    near, far = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(far, source.normal(torch.Size([4000]), 1.0).numpy().tobytes())
        os._exit(0)
    os.close(far)
    with open(near, "rb") as pipe:
        of_child = np.frombuffer(pipe.read())
    os.waitpid(child, 0)
    of_parent = source.normal(torch.Size([4000]), 1.0).numpy()
    assert stats.pearsonr(of_child, of_parent).pvalue > RARE
    assert not np.intersect1d(of_child, of_parent).size


def test_values_within_a_draw_are_independent():
    noise = SecretGaussian().normal(torch.Size([SIZE]), 1.0)
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 6 / SIZE**0.5


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_noise_that_several_threads_drew_is_gaussian_in_every_part_and_no_part_repeats_another():
    source = SecretGaussian()
    assert source.is_secret
    first, second = (source.normal(torch.Size([3, 70_000]), 2.0).numpy() for _ in range(2))
    for part in (*first, *second):
        assert stats.kstest(part, stats.norm(scale=2.0).cdf).pvalue > RARE
    for number, part in enumerate((*first, *second)):
        for other in (*first, *second)[:number]:
            assert stats.pearsonr(part, other).pvalue > RARE
    assert len(np.unique(np.stack([first, second]))) == 6 * 70_000, "no value is left as it was, or written twice"


@pytest.mark.usefixtures("three_threads")
def test_one_statistical_stream_among_the_secret_ones_is_seen():
    source = SecretGaussian()
    source._generators = (*source._generators[:2], np.random.default_rng())
    assert not source.is_secret


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
