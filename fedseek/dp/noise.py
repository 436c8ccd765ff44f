"""Gaussian noise for gradients, from a generator that nobody can reseed.

Noise that follows the plan's seed is the same at two sites, and they can subtract it; noise of a statistical generator
can be continued by who has seen enough of it. Opacus' own ``secure_mode`` needs a package that no longer installs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Never

import numpy as np
import torch
from numpy.typing import NDArray

from fedseek.dp.randomness import is_secret, secret_generator

# A sum of four draws: which floats a single draw can return depends on its value, and the gaps tell the value before
# the noise (Mironov 2012). Sums of 2n draws close them; n = 2 (Holohan and Braghin 2021, arXiv:2107.10138, section 5).
_TERMS = 4


class SecretGaussian:
    """A source of Gaussian noise keyed by the operating system; takes no seed, cannot be copied or stored.

    Guarantees:
        Two sources never share a stream, whatever seeds torch, numpy or Python were given; nor do the two halves of a
        process that forks.
    """

    __slots__ = ("_generator",)

    def __init__(self) -> None:
        self._generator = secret_generator()

    @property
    def is_secret(self) -> bool:
        """Whether the noise comes from a cryptographic generator under a key of the operating system."""
        return is_secret(self._generator)

    def normal(self, shape: torch.Size, std: float) -> torch.Tensor:
        """Independent draws of N(0, std**2).

        Returns:
            float64 on the CPU, of the given shape.
        """
        total = self._generator.standard_normal(tuple(shape))
        for _ in range(_TERMS - 1):
            total += self._generator.standard_normal(tuple(shape))
        # The sum of k unit Gaussians has standard deviation sqrt(k).
        total *= std / _TERMS**0.5
        return torch.from_numpy(total)

    def __repr__(self) -> str:
        return "SecretGaussian(<key withheld>)"

    def __reduce__(self) -> Never:
        raise TypeError("SecretGaussian is not copied or pickled: the copy would repeat the noise")


def draws_under_equal_seeds(source: SecretGaussian, twin: SecretGaussian, *, size: int) -> list[NDArray[np.float64]]:
    """What two sources give when torch, numpy and Python are seeded alike before each draw.

    Args:
        source: the source under test.
        twin: another one made the same way, as a second site or the next round would.
        size: number of values in each draw.

    Returns:
        Three draws: source, source again, twin. The global generators are left as they were found.
    """
    draws = []
    for drawer in (source, source, twin):
        with _seeded_alike():
            draws.append(drawer.normal(torch.Size([size]), 1.0).numpy())
    return draws


@contextmanager
def _seeded_alike() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
