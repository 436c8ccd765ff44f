"""SEAL's file format: strict framing, and a way to use it without a disk.

A SEAL object is a 16-byte header and one zstd frame. SEAL itself is lenient where a stranger's bytes are concerned: it
ignores bytes after the frame, and inflates the whole frame before it looks at the size, so a few kilobytes could
claim gigabytes. ``check_frame`` closes both before SEAL sees the bytes: the frame must announce the exact content size
and be one zstd block, which the format caps at 128 KiB, that ends where the data ends.

``tenseal.sealapi`` reads and writes paths only. ``scratch_path`` gives a path to anonymous memory (Linux); elsewhere
to a file in a fresh private directory that is removed at once.

Sources: SEAL 4 ``native/src/seal/serialization.h`` (SEALHeader); RFC 8878 (zstd), sections 3.1.1.1 and 3.1.1.2.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedseek.errors import Malformed

_SEAL_HEADER = struct.Struct("<HBBBBHQ")  # magic, header size, version major, minor, compression, reserved, total size
_SEAL_MAGIC = 0xA15E
_SEAL_MAJOR = 4
_COMPRESSION_ZSTD = 2

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK_RAW, _ZSTD_BLOCK_COMPRESSED = 0, 2
# Frame descriptor, RFC 8878 3.1.1.1.1: single segment, no checksum, no dictionary; content size in 2 or 4 bytes.
_CONTENT_SIZE_BYTES = {0x60: 2, 0xA0: 4}
# Data that does not compress is stored, with the headers around it.
_MAX_OVERHEAD = 64


def check_frame(data: bytes, *, content_size: int) -> None:
    """Refuse bytes that are not exactly one SEAL object of ``content_size`` bytes.

    Guarantee: what passes inflates to at most 128 KiB, and no byte of ``data`` lies outside the object.

    Raises:
        Malformed: says which part differs.
    """
    if not _SEAL_HEADER.size + 12 <= len(data) <= content_size + _MAX_OVERHEAD:
        raise Malformed(f"SEAL object: got {len(data)} bytes; wanted at most {content_size + _MAX_OVERHEAD}")
    magic, header_size, major, _minor, compression, reserved, size = _SEAL_HEADER.unpack_from(data)
    if (magic, header_size, reserved) != (_SEAL_MAGIC, _SEAL_HEADER.size, 0):
        raise Malformed(f"SEAL object: header {data[: _SEAL_HEADER.size].hex()} is not SEAL's")
    if (major, compression) != (_SEAL_MAJOR, _COMPRESSION_ZSTD):
        raise Malformed(
            f"SEAL object: got version {major}, compression {compression}; "
            f"wanted {_SEAL_MAJOR}, {_COMPRESSION_ZSTD} (zstd)"
        )
    if size != len(data):
        raise Malformed(f"SEAL object: header announces {size} bytes, got {len(data)}")
    _check_zstd(data, content_size=content_size)


def _check_zstd(data: bytes, *, content_size: int) -> None:
    """One block, exact announced content size, nothing after it."""
    start = _SEAL_HEADER.size
    width = _CONTENT_SIZE_BYTES.get(data[start + 4], 0)
    if data[start : start + 4] != _ZSTD_MAGIC or not width:
        raise Malformed(f"SEAL object: zstd frame starts with {data[start : start + 5].hex()}, not as SEAL writes it")
    block = start + 5 + width
    announced = int.from_bytes(data[start + 5 : block], "little") + (256 if width == 2 else 0)
    if announced != content_size:
        raise Malformed(f"SEAL object: holds {announced} bytes of content; wanted {content_size}")
    block_header = int.from_bytes(data[block : block + 3], "little")
    last, kind, block_size = block_header & 1, block_header >> 1 & 3, block_header >> 3
    if not last or kind not in (_ZSTD_BLOCK_RAW, _ZSTD_BLOCK_COMPRESSED) or block + 3 + block_size != len(data):
        raise Malformed(f"SEAL object: zstd block of {block_size} bytes does not end with the {len(data)} bytes got")


@contextmanager
def scratch_path() -> Iterator[str]:
    """A path that C++ can open, to memory that only this process has; gone when the block ends."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").exists():
        descriptor = os.memfd_create("fedseek", os.MFD_CLOEXEC)
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.TemporaryDirectory(prefix="fedseek-") as directory:  # created with mode 0700
        yield str(Path(directory, "object.seal"))


def save_object(seal_object: Any) -> bytes:
    """The bytes of a SEAL object (ciphertext, serialisable ciphertext or key)."""
    with scratch_path() as path:
        seal_object.save(path)
        with open(path, "rb") as stream:
            return stream.read()


def load_object(seal_object: Any, data: bytes, *, context: Any) -> None:
    """Fill ``seal_object`` from bytes that ``check_frame`` has passed; SEAL validates them for ``context``.

    Raises:
        Malformed: SEAL refuses the content, for example because it belongs to other parameters.
    """
    with scratch_path() as path:
        with open(path, "wb") as stream:
            stream.write(data)
        try:
            seal_object.load(context, path)
        except (RuntimeError, ValueError) as error:
            raise Malformed(f"SEAL object: {error} (truncated, altered, or made for other parameters)") from error
