"""First values of what is trained, the same at every site whatever its hardware: numpy's Philox, never torch's generator."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def first_values(shape: Sequence[int], *, seed: int, name: str) -> npt.NDArray[np.float32]:
    """Kaiming uniform with a = sqrt(5), as LoRA's reference initialises A: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Args:
        shape: of the tensor; its last dimension is fan_in.
        seed: public, from the plan.
        name: of the tensor in the model.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:16], "big")
    bound = 1.0 / math.sqrt(shape[-1])
    return np.random.Generator(np.random.Philox(key=key)).uniform(-bound, bound, size=tuple(shape)).astype(np.float32)
