"""A reply as Flower stores it, read strictly: what a site uploads is never given to Flower's own reader.

Flower cuts a message into objects that name one another by the SHA-256 of their bytes:

    Message -> RecordDict {"fedseek": ...} -> ArrayRecord {"message": ...} -> Array {shape, ...} -> ArrayChunk ...

Flower's reader takes any of its classes at any place, and repeats a chunk as often as the array says, so that a few
megabytes become any number of gigabytes. This one takes the one shape that an honest site sends, and no more bytes than
are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from fedseek.errors import Malformed, TooLarge

RECORD, FIELD = "fedseek", "message"  # the names in app.py:to_record
LONGEST_HEAD: Final = 1 << 20  # bytes; 65 for each chunk
T = TypeVar("T")
_OBJECT_ID: Final = re.compile(r"[0-9a-f]{64}")


class ArrayBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What Flower writes into an ``Array`` object.

    Attributes:
        dtype: "uint8".
        shape: the number of bytes, alone.
        stype: "raw".
        arraychunk_ids: for each piece of the data its number among the object's chunks; equal pieces share one.
    """

    dtype: str
    shape: list[int]
    stype: str
    arraychunk_ids: list[int]


def read_reply(root: str, pull: Callable[[str], bytes | None], *, limit: int) -> bytes | None:
    """The bytes of a reply; None if one of its objects is not there yet.

    Guarantee: no more than ``limit`` bytes of data are pulled and held, whatever the objects say.

    Args:
        root: id of the message.
        pull: gives an object's content, or None if it is still on its way.
        limit: bytes of data wanted at most.

    Raises:
        TooLarge: the array says that it has more; no chunk was pulled.
        Malformed: an object is not what it has to be at its place.
    """
    object_id = root
    for kind, name in (("Message", ""), ("RecordDict", RECORD), ("ArrayRecord", FIELD)):
        content = pull(object_id)
        if content is None:
            return None
        children, body = parse_object(content, kind)
        if len(children) != 1:
            raise Malformed(f"Flower {kind}: got {len(children)} parts, wanted 1")
        if name and _decoded(body, dict[str, str], kind) != {name: children[0]}:
            raise Malformed(f"Flower {kind}: wanted one entry {name!r}")
        object_id = children[0]
    content = pull(object_id)
    if content is None:
        return None
    chunk_ids, body = parse_object(content, "Array")
    array = _decoded(body, ArrayBody, "Array")
    size = _check_array(array, len(chunk_ids), limit)
    return _read_chunks(chunk_ids, array.arraychunk_ids, size, pull)


def parse_object(content: bytes, kind: str) -> tuple[list[str], bytes]:
    """Ids of an object's children, and its body.

    >>> parse_object(b"ArrayChunk  3" + bytes(1) + b"abc", "ArrayChunk")
    ([], b'abc')

    Raises:
        Malformed: it is not an object of this kind.
    """
    head, divider, body = content.partition(b"\0")
    if len(head) > LONGEST_HEAD or not divider:
        raise Malformed(f"Flower {kind}: no head")
    fields = head.decode("ascii", "replace").split(" ")
    if len(fields) != 3 or fields[0] != kind or fields[2] != str(len(body)):
        raise Malformed(f"Flower {kind}: got another head")
    children = fields[1].split(",") if fields[1] else []
    if not all(_OBJECT_ID.fullmatch(child) for child in children):
        raise Malformed(f"Flower {kind}: a part's id is no SHA-256")
    return children, body


def _check_array(array: ArrayBody, chunks: int, limit: int) -> int:
    """Its size in bytes."""
    if (array.dtype, array.stype, len(array.shape)) != ("uint8", "raw", 1) or array.shape[0] < 0:
        raise Malformed("Flower Array: wanted raw uint8 bytes")
    if array.shape[0] > limit:
        raise TooLarge(f"a reply of {array.shape[0]} bytes, wanted at most {limit}")
    if set(array.arraychunk_ids) != set(range(chunks)):
        raise Malformed("Flower Array: its pieces are not its chunks")
    return array.shape[0]


def _read_chunks(
    chunk_ids: list[str], order: list[int], size: int, pull: Callable[[str], bytes | None]
) -> bytes | None:
    chunks: list[bytes] = []
    held = 0
    for object_id in chunk_ids:
        content = pull(object_id)
        if content is None:
            return None
        children, body = parse_object(content, "ArrayChunk")
        held += len(body)
        if children or held > size:  # each is used once at least, so they cannot be more than the whole
            raise Malformed("Flower ArrayChunk: more than the array's bytes")
        chunks.append(body)
    if sum(len(chunks[number]) for number in order) != size:
        raise Malformed("Flower Array: its chunks do not make its size")
    return b"".join([chunks[number] for number in order])


def _decoded(body: bytes, kind: type[T], name: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Malformed(f"Flower {name}: its body is not what Flower writes") from error
