"""Gaussian noise for gradients, from a generator that nobody can reseed.

Noise that follows the plan's seed is the same at two sites, and they can subtract it; noise of a statistical generator
can be continued by who has seen enough of it. Opacus' own ``secure_mode`` needs a package that no longer installs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Never

import numpy as np
import torch
from numpy.typing import NDArray

from fedseek.dp.randomness import is_secret, secret_generator

# A sum of four draws: which floats a single draw can return depends on its value, and the gaps tell the value before
# the noise (Mironov 2012). Sums of 2n draws close them; n = 2 (Holohan and Braghin 2021, arXiv:2107.10138, section 5).
_TERMS = 4
# Values drawn at a time: both buffers stay in a core's cache. A second stream is worth its thread from here on.
_CHUNK = 1 << 16


class SecretGaussian:
    """A source of Gaussian noise keyed by the operating system; takes no seed, cannot be copied or stored.

    Guarantees:
        Two sources never share a stream, whatever seeds torch, numpy or Python were given; nor do the two halves of a
        process that forks.
    """

    __slots__ = ("_generators",)

    def __init__(self) -> None:
        # One stream for each CPU thread of training, each under a key of its own: an adapter of 40 million values takes
        # 160 million draws a step, seconds on one core while a GPU waits. numpy lets go of the GIL while it draws.
        self._generators = tuple(secret_generator() for _ in range(torch.get_num_threads()))

    @property
    def is_secret(self) -> bool:
        """Whether all the noise comes from cryptographic generators under keys of the operating system."""
        return all(is_secret(generator) for generator in self._generators)

    def normal(self, shape: torch.Size, std: float) -> torch.Tensor:
        """Independent draws of N(0, std**2); of many values at once each CPU thread draws a part.

        Returns:
            float64 on the CPU, of the given shape.
        """
        values = np.empty(shape.numel())
        num_parts = max(1, min(len(self._generators), len(values) // _CHUNK))
        parts = np.array_split(values, num_parts)  # views: each thread writes where no other does
        if num_parts == 1:
            _fill(self._generators[0], values, std)
        else:
            with ThreadPoolExecutor(num_parts) as threads:
                list(threads.map(_fill, self._generators[:num_parts], parts, [std] * num_parts))
        return torch.from_numpy(values.reshape(tuple(shape)))

    def normals(self, shapes: Sequence[torch.Size], std: float) -> list[torch.Tensor]:
        """`normal` for several tensors at once, so that many small ones keep as many threads busy as a large one."""
        values = self.normal(torch.Size([sum(shape.numel() for shape in shapes)]), std)
        parts = torch.split(values, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def __repr__(self) -> str:
        return "SecretGaussian(<key withheld>)"

    def __reduce__(self) -> Never:
        raise TypeError("SecretGaussian is not copied or pickled: the copy would repeat the noise")


def _fill(generator: np.random.Generator, values: NDArray[np.float64], std: float) -> None:
    """Write independent draws of N(0, std**2) over ``values``, shape (n,)."""
    term = np.empty(min(_CHUNK, len(values)))
    for first in range(0, len(values), _CHUNK):
        total = values[first : first + _CHUNK]
        generator.standard_normal(out=total)
        for _ in range(_TERMS - 1):
            total += generator.standard_normal(out=term[: len(total)])
        # The sum of k unit Gaussians has standard deviation sqrt(k).
        total *= std / _TERMS**0.5


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
