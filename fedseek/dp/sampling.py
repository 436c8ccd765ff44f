"""Which records a step sees: a Poisson sample of privacy units.

A privacy unit is a record, or all records of one customer or patient. Every unit is in a step with the plan's
``sampling_probability``, independently of all others and of other steps (the sampling that the accountant assumes), and
a sampled unit gives one of its records, drawn uniformly. So a unit moves a step by at most one clipped gradient,
however many records it has, and the guarantee is for the unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedseek.dp.randomness import is_secret
from fedseek.errors import UnsupportedMechanism

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Draw:
    """What one step is to be trained on. Who was drawn is secret: amplification by sampling rests on it.

    Attributes:
        step: number of the step, from 0.
        record_indices: shape (num_drawn,), one record for each sampled unit; may be empty.
        unit_indices: shape (num_drawn,), the sampled units, in the same order.
    """

    step: int
    record_indices: Indices = field(repr=False)
    unit_indices: Indices = field(repr=False)


class PoissonUnitSampler:
    """Draws steps from the units of a site.

    Args:
        units: shape (num_records,), the unit of each record; any integers.
        sampling_probability: from the plan.
        generator: where the draws come from. `fedseek.dp.randomness.secret_generator` when the run is private.

    Raises:
        UnsupportedMechanism: no records, or a probability outside (0, 1].
    """

    def __init__(self, units: Indices, sampling_probability: float, *, generator: np.random.Generator) -> None:
        if not 0 < sampling_probability <= 1:
            raise UnsupportedMechanism(f"sampling_probability is {sampling_probability}, wanted in (0, 1]")
        if len(units) == 0:
            raise UnsupportedMechanism("there are no records to sample from", hint="a site needs at least one unit")
        self.sampling_probability = sampling_probability
        self._generator = generator
        self._by_unit: Indices = np.argsort(units, kind="stable").astype(np.int64)
        _, starts, counts = np.unique(units[self._by_unit], return_index=True, return_counts=True)
        self._starts: Indices = starts.astype(np.int64)
        self._counts: Indices = counts.astype(np.int64)

    @property
    def generator(self) -> np.random.Generator:
        """Where the draws come from. Whoever has it knows who is drawn."""
        return self._generator

    @property
    def is_secret(self) -> bool:
        """Whether the draws come from a cryptographic generator under a key of the operating system."""
        return is_secret(self._generator)

    @property
    def num_units(self) -> int:
        """Number of privacy units of the site."""
        return len(self._starts)

    @property
    def expected_batch_size(self) -> float:
        """Mean number of records in a step, ``sampling_probability * num_units``.

        Updates are divided by this, never by the size that was drawn. It makes the number of units public: the
        guarantee is for who is in the data, given how many there are (as in every DP-SGD library).
        """
        return self.sampling_probability * self.num_units

    def draw(self, step: int) -> Draw:
        """The records of one step."""
        chosen = np.flatnonzero(self._generator.random(self.num_units) < self.sampling_probability).astype(np.int64)
        within = self._generator.integers(0, self._counts[chosen])
        return Draw(step, self._by_unit[self._starts[chosen] + within], chosen)
