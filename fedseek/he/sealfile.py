"""SEAL's file format: strict framing, and a way to use it without a disk.

A SEAL object is a 16-byte header and one zstd frame, and has more headers inside. SEAL is lenient where a stranger's
bytes are concerned: it ignores bytes after the frame, inflates the whole frame before it looks at the size, so a few
kilobytes could claim gigabytes, and trusts the sizes in inner headers, over which it can end the process
(``std::terminate``). ``open_frame`` closes all three before SEAL sees the bytes: the frame must announce the exact content
size and be one zstd block, which the format caps at 128 KiB, that ends where the data ends; it is inflated here, and the
inner headers must be those that SEAL writes for this size.

``tenseal.sealapi`` reads and writes paths only. ``scratch_path`` gives a path to anonymous memory (Linux); elsewhere
to a file in a fresh private directory that is removed at once.

Sources: SEAL 4 ``native/src/seal/serialization.h`` (SEALHeader); RFC 8878 (zstd), sections 3.1.1.1 and 3.1.1.2.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from fedseek.errors import Malformed

_SEAL_HEADER = struct.Struct("<HBBBBHQ")  # magic, header size, version major, minor, compression, reserved, total size
_SEAL_MAGIC = 0xA15E
_SEAL_MAJOR = 4
_MINOR_AT = 4
_COMPRESSION_NONE, _COMPRESSION_ZSTD = 0, 2

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK_RAW, _ZSTD_BLOCK_COMPRESSED = 0, 2
# Frame descriptor, RFC 8878 3.1.1.1.1: single segment, no checksum, no dictionary; content size in 2 or 4 bytes.
_CONTENT_SIZE_BYTES = {0x60: 2, 0xA0: 4}
# Data that does not compress is stored, with the headers around it.
_MAX_OVERHEAD = 64


def open_frame(data: bytes | memoryview, *, content_size: int, inner: Mapping[int, int]) -> tuple[bytes, bytes]:
    """The same SEAL object without compression, if ``data`` is exactly one of ``content_size`` bytes.

    Guarantee: nothing inflates to more than 128 KiB, no byte of ``data`` lies outside the object, and every header in the
    content is one that SEAL writes.

    Args:
        data: from another party.
        content_size: bytes of content.
        inner: where headers stand in the content, and the size that each announces, itself included.

    Returns:
        Header and content, for ``load_object``.

    Raises:
        Malformed: says which part differs.
    """
    if not _SEAL_HEADER.size + 12 <= len(data) <= content_size + _MAX_OVERHEAD:
        raise Malformed(f"SEAL object: got {len(data)} bytes; wanted at most {content_size + _MAX_OVERHEAD}")
    _check_header(data, 0, size=len(data), compression=_COMPRESSION_ZSTD)
    _check_zstd(data, content_size=content_size)
    try:
        content = zstandard.ZstdDecompressor().decompress(data[_SEAL_HEADER.size :], max_output_size=content_size)
    except zstandard.ZstdError as error:
        raise Malformed(f"SEAL object: its zstd block does not inflate: {error}") from None
    if len(content) != content_size:
        raise Malformed(f"SEAL object: inflates to {len(content)} bytes; wanted {content_size}")
    for start, size in inner.items():
        _check_header(content, start, size=size, compression=_COMPRESSION_NONE)
    size = _SEAL_HEADER.size + content_size
    minor = data[_MINOR_AT]
    return _SEAL_HEADER.pack(_SEAL_MAGIC, _SEAL_HEADER.size, _SEAL_MAJOR, minor, _COMPRESSION_NONE, 0, size), content


def _check_header(data: bytes | memoryview, start: int, *, size: int, compression: int) -> None:
    magic, header_size, major, _minor, got, reserved, announced = _SEAL_HEADER.unpack_from(data, start)
    if (magic, header_size, reserved) != (_SEAL_MAGIC, _SEAL_HEADER.size, 0):
        header = data[start : start + _SEAL_HEADER.size].hex()
        raise Malformed(f"SEAL object: header {header} at byte {start} is not SEAL's")
    if (major, got) != (_SEAL_MAJOR, compression):
        raise Malformed(
            f"SEAL object: got version {major}, compression {got} at byte {start}; wanted {_SEAL_MAJOR}, {compression}"
        )
    if announced != size:
        raise Malformed(f"SEAL object: header at byte {start} announces {announced} bytes, wanted {size}")


def _check_zstd(data: bytes | memoryview, *, content_size: int) -> None:
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


class Scratch(NamedTuple):
    """Paths of ``scratch_path`` to read and to write many objects through, one after the other.

    Getting memory anew for each takes longer than what SEAL does with it. What was there last stays until the block
    ends: for ciphertexts, never for keys.
    """

    reading: str
    writing: str


@contextmanager
def scratch() -> Iterator[Scratch]:
    """Paths for the objects that the block reads and writes."""
    with scratch_path() as reading, scratch_path() as writing:
        yield Scratch(reading, writing)


def save_object(seal_object: Any, through: Scratch | None = None) -> bytes:
    """The bytes of a SEAL object (ciphertext, serialisable ciphertext or key)."""
    with scratch_path() if through is None else nullcontext(through.writing) as path:
        seal_object.save(path)
        with open(path, "rb") as stream:
            return stream.read()


def load_object(seal_object: Any, opened: Iterable[bytes], *, context: Any, through: Scratch | None = None) -> None:
    """Fill ``seal_object`` from the parts that ``open_frame`` has passed; SEAL validates its numbers for ``context``.

    Raises:
        Malformed: SEAL refuses the content, for example because it belongs to other parameters.
    """
    with scratch_path() if through is None else nullcontext(through.reading) as path:
        with open(path, "wb", opener=_open_as_it_is) as stream:
            stream.writelines(opened)
        try:
            seal_object.load(context, path)
        except (RuntimeError, ValueError, IndexError) as error:  # IndexError: a ciphertext of no polynomials
            raise Malformed(f"SEAL object: {error} (truncated, altered, or made for other parameters)") from error


def _open_as_it_is(path: str, flags: int) -> int:
    """Without truncation: of a longer object before, SEAL does not look at what is left behind this one."""
    return os.open(path, flags & ~os.O_TRUNC, 0o600)
