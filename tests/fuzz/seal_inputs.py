"""SEAL's file format, as an attacker writes it.

The content of the zstd frame holds headers of its own: one before the coefficients and, in a fresh ciphertext, one
before the seed. SEAL trusts their sizes, and where its stream then ends too early it throws through a function that
must not throw: ``std::terminate``. So ``fedseek.he.sealfile.open_frame`` checks them first.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pyarrow

SEAL_HEADER = struct.Struct("<HBBBBHQ")
SIZES: Mapping[str, int] = {"fresh": 8 * 4096 + 97 + 81, "summed": 16 * 4096 + 97, "secret key": 8 * 4096 + 72}
# where the header of the coefficients begins
COEFFICIENTS: Mapping[str, int] = {"fresh": 73, "summed": 73, "secret key": 48}
# where the header of the seed begins
SEED = 73 + 24 + 8 * 4096


def framed(content: bytes, size: int, minor: int) -> bytes:
    """``content``, padded with zeros or cut to ``size``, as one uncompressed block of a SEAL object."""
    content = content[:size].ljust(size, b"\0")
    block = b"\x28\xb5\x2f\xfd\xa0" + size.to_bytes(4, "little") + (size << 3 | 1).to_bytes(3, "little") + content
    return SEAL_HEADER.pack(0xA15E, 16, 4, minor, 2, 0, 16 + len(block)) + block


def inflated(whole: bytes, size: int) -> bytes:
    """What is in a SEAL object's zstd frame: parameter id, sizes and coefficients."""
    return pyarrow.Codec("zstd").decompress(whole[16:], size).to_pybytes()
