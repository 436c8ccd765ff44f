"""One digest for a set of named tensors, the same at every site whatever its hardware."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def tensors_digest(tensors: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """SHA-256 over name, shape and little-endian float32 values of each tensor in order of name; 32 bytes.

    >>> import numpy as np
    >>> a = tensors_digest({"b": np.zeros(2, np.float32), "a": np.ones((1, 2), np.float32)})
    >>> a == tensors_digest({"a": np.ones((1, 2), np.float32), "b": np.zeros(2, np.float32)})
    True
    """
    digest = hashlib.sha256(b"fedseek/tensors/v1\0")
    for name in sorted(tensors):
        value = tensors[name]
        header = f"{name}\0{','.join(map(str, value.shape))}\0".encode()
        digest.update(len(header).to_bytes(8, "big") + header)
        digest.update(np.ascontiguousarray(value, dtype="<f4").tobytes())
    return digest.digest()
