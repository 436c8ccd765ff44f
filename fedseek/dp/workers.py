"""Several processes that take one step together: what `PrivateStep` and `train_round` ask of them.

    the lead draws -> agree -> share -> each clips and adds up its records -> add -> the lead adds noise -> follow -> all move

Only the lead's coins and noise count, so a step is drawn once and noised once, however many processes there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedseek.dp.sampling import Draw


class Workers(Protocol):
    """The processes of one site, one a GPU. All call the same methods in the same order, on models of equal values."""

    @property
    def leads(self) -> bool:
        """Whether this process draws, adds the noise and keeps checkpoints; true of exactly one."""
        ...

    def agree(self, draw: Draw) -> Draw:
        """The lead's draw, at every process; what a follower drew is thrown away."""
        ...

    def share(self, record_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the agreed records that this process trains on; each record is one process's."""
        ...

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place, on its own device."""
        ...

    def follow(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by the lead's, in place, on its own device."""
        ...
