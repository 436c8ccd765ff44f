"""One line of an audit record, to the byte; and a head: the signed word on how far a record goes.

    {"number":17,"at":"2026-11-22T18:49:25.123Z","kind":"plan-refused","detail":{...},"previous":"..","signature":".."}

A line is canonical JSON in UTF-8: these fields in this order, the keys of ``detail`` sorted, no spaces; at most 64 KiB.
``previous`` is the SHA-256 of the line before, without its line end, in hexadecimal; of line 1 it is zeros. So anybody
can follow the chain with ``sha256sum``. The signature is Ed25519 over all of it and the name of whose record it is.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Protocol, TypeVar

import msgspec

from fedseek.errors import Malformed, TooLarge, WrongKey
from fedseek.identity.roster import check_name
from fedseek.identity.signing import CONTEXT_AUDIT_HEAD, join_fields, verify_with

COORDINATOR: Final = "coordinator"  # whose record the coordinator's is
AUDIT_VERSION: Final = 1
MAX_LINE_BYTES: Final = 64 << 10  # with the line end
MAX_HEADS: Final = 1025  # a roster of 1024 sites, and the coordinator
FIRST_PREVIOUS: Final = bytes(32)

# kinds that the record writes about itself
BEGUN: Final = "begun"
KEY_ANNOUNCED: Final = "key-announced"
KEY_TAKEN: Final = "key-taken"
PRUNED: Final = "pruned"
TORN: Final = "torn"
HEADS: Final = "heads"
COUNTERSIGNED: Final = "countersigned"
FORK: Final = "fork"
ACCEPTED: Final = "new-record-accepted"
OWN_KINDS: Final = frozenset({BEGUN, KEY_ANNOUNCED, KEY_TAKEN, PRUNED, TORN, HEADS, COUNTERSIGNED, FORK, ACCEPTED})

Detail = str | int | float | bool | list[Any] | dict[str, Any]
Sign = Callable[[bytes, bytes], bytes]  # context and message -> 64 bytes, such as ``partial(sign, identity)``
_S = TypeVar("_S")

_MAX_DEPTH: Final = 6
_MAX_INT: Final = 2**53 - 1  # what every JSON reader takes as an integer
_HEADS_DOMAIN: Final = b"fedseek/audit-heads/v1"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_MS: Final = 253_402_300_799_999  # the last of the year 9999

Number = Annotated[int, msgspec.Meta(ge=1, le=_MAX_INT)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=_MAX_MS)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Hex32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z", max_length=64)]
Hex64 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z", max_length=128)]
Kind = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,47}\Z", max_length=48)]
_KIND = re.compile(r"[a-z][a-z0-9-]{0,47}")


class AuditLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One entry. ``number`` counts from 1 and goes on from segment to segment."""

    number: Number
    at: Annotated[str, msgspec.Meta(min_length=24, max_length=24)]
    kind: Kind
    detail: dict[str, Any]
    previous: Hex32
    signature: Hex64


class Recorder(Protocol):
    """Writes a line of an audit chain, its kind and its facts; raises where it cannot."""

    def __call__(self, kind: str, /, **facts: Any) -> object:
        """Write it."""


class AuditHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the owner of a record says of its newest line; other parties keep it, so that the line cannot be undone.

    Attributes:
        name: whose record.
        number: of the line.
        digest: SHA-256 of the line, 32 bytes.
        at: when the line was written, in milliseconds since 1970 (UTC), by its owner's clock.
        signature: the owner's, over all of it.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    number: Number
    digest: Digest
    at: Milliseconds
    signature: Signature

    def __post_init__(self) -> None:
        check_name("name of an audit record", self.name)


class HeadDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An :class:`AuditHead` as JSON has it: bytes as hexadecimal digits."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    number: Number
    digest: Hex32
    at: Milliseconds
    signature: Hex64


class Anchor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What stands for the lines that were dropped when they were old enough.

    Attributes:
        segment: the newest segment dropped, such as ``"2025-10"``.
        head: of its last line, signed when it was dropped.
        public_key: what the line after that is signed with, in hexadecimal.
        announced: the key that may take over from it; "" if none was announced.
    """

    version: Annotated[int, msgspec.Meta(ge=AUDIT_VERSION, le=AUDIT_VERSION)]
    segment: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}\Z", max_length=7)]
    head: HeadDocument
    public_key: Hex32
    announced: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z", max_length=64)]


class ExportHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """First line of an exported record. Nobody signs it: what it says is checked against the lines.

    Attributes:
        public_key: what the last line is signed with, in hexadecimal; to be compared with the roster.
        lines: how many lines follow.
        last: digest of the last of them.
        anchor: where older lines were dropped.
    """

    fedseek_audit: Annotated[int, msgspec.Meta(ge=AUDIT_VERSION, le=AUDIT_VERSION)]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    public_key: Hex32
    lines: Number
    last: Hex32
    anchor: Anchor | None


_LINES: Final = msgspec.json.Decoder(AuditLine)
_ANCHORS: Final = msgspec.json.Decoder(Anchor)
_HEADERS: Final = msgspec.json.Decoder(ExportHeader)


def canonical(value: object) -> bytes:
    """The one JSON text of a line, an anchor or a header; no line end."""
    return msgspec.json.encode(value, order="deterministic")


def sign_line(sign: Callable[[bytes], bytes], name: str, line: AuditLine) -> bytes:
    """The text of ``line`` with its signature put in; what ``line`` has in its place is not looked at.

    Raises:
        TooLarge: longer than ``MAX_LINE_BYTES``.
    """
    signed = msgspec.structs.replace(line, signature=sign(line_message(name, line)).hex())
    raw = canonical(signed)
    if len(raw) >= MAX_LINE_BYTES:
        raise TooLarge(f"audit entry {line.kind!r}: got {len(raw)} bytes, wanted less than {MAX_LINE_BYTES}")
    return raw


def parse_line(raw: bytes) -> AuditLine:
    """Read one line, without its line end. Raises ``Malformed``: not a line of this form, or not canonical."""
    line = _parse(_LINES, raw, "line")
    milliseconds(line.at)
    return line


def parse_anchor(raw: bytes) -> Anchor:
    """Read an ``anchor.json``. Raises ``Malformed``."""
    return _parse(_ANCHORS, raw, "anchor")


def parse_export_header(raw: bytes) -> ExportHeader:
    """Read the first line of an exported record. Raises ``Malformed``."""
    return _parse(_HEADERS, raw, "header")


def _parse(decoder: msgspec.json.Decoder[_S], raw: bytes, what: str) -> _S:
    try:
        value = decoder.decode(raw)
        same = canonical(value) == raw
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Malformed(f"{what} of {len(raw)} bytes does not parse: {error}") from None
    if not same:
        raise Malformed(f"{what} of {len(raw)} bytes is not in the one form that such a {what} has")
    return value


def line_message(name: str, line: AuditLine) -> bytes:
    """What the owner of the record ``name`` signs, under ``CONTEXT_AUDIT``."""
    return join_fields(
        name.encode(),
        line.number.to_bytes(8, "big"),
        line.at.encode(),
        line.kind.encode(),
        canonical(line.detail),
        bytes.fromhex(line.previous),
    )


def line_digest(raw: bytes) -> bytes:
    """SHA-256 of a line without its line end, 32 bytes."""
    return hashlib.sha256(raw).digest()


def sign_head(sign: Sign, name: str, number: int, digest: bytes, at: int) -> AuditHead:
    """The head of a record at one of its lines."""
    unsigned = AuditHead(name=name, number=number, digest=digest, at=at, signature=bytes(64))
    return msgspec.structs.replace(unsigned, signature=sign(CONTEXT_AUDIT_HEAD, _head_message(unsigned)))


def verify_head(head: AuditHead, public_key: bytes) -> None:
    """Check that the holder of the key signed this head. Raises ``WrongKey``."""
    verify_with(public_key, CONTEXT_AUDIT_HEAD, _head_message(head), head.signature, who=repr(head.name))


def is_signed_by_one_of(head: AuditHead, public_keys: Iterable[bytes]) -> bool:
    """Whether the holder of any of these keys signed this head."""
    for key in public_keys:
        with suppress(WrongKey):
            verify_head(head, key)
            return True
    return False


def _head_message(head: AuditHead) -> bytes:
    return join_fields(head.name.encode(), head.number.to_bytes(8, "big"), head.digest, head.at.to_bytes(8, "big"))


def in_order(heads: Sequence[AuditHead]) -> tuple[AuditHead, ...]:
    """Heads of several records, by name. Raises ``Malformed``: none, too many, or two of one name."""
    if not 1 <= len(heads) <= MAX_HEADS:
        raise Malformed(f"list of audit heads has {len(heads)} of them, wanted 1 to {MAX_HEADS}")
    names = [head.name for head in heads]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Malformed(f"list of audit heads names {twice!r} more than once")
    return tuple(sorted(heads, key=lambda head: head.name))


def heads_digest(heads: Sequence[AuditHead]) -> bytes:
    """SHA-256 of a list of heads, 32 bytes, in whatever order they come: what is countersigned."""
    return hashlib.sha256(join_fields(_HEADS_DOMAIN, msgspec.msgpack.encode(in_order(heads)))).digest()


def head_document(head: AuditHead) -> dict[str, Any]:
    """A head for the detail of a line."""
    return {
        "name": head.name,
        "number": head.number,
        "digest": head.digest.hex(),
        "at": head.at,
        "signature": head.signature.hex(),
    }


def read_head(document: object) -> AuditHead:
    """The head in the detail of a line, or in an anchor. Raises ``Malformed``."""
    try:
        read = document if isinstance(document, HeadDocument) else msgspec.convert(document, HeadDocument)
    except msgspec.MsgspecError as error:
        raise Malformed(f"not an audit head: {error}") from None
    return AuditHead(
        name=read.name,
        number=read.number,
        digest=bytes.fromhex(read.digest),
        at=read.at,
        signature=bytes.fromhex(read.signature),
    )


def time_text(at: int) -> str:
    """Milliseconds since 1970 as UTC.

    >>> time_text(1795373365123)
    '2026-11-22T18:49:25.123Z'
    """
    moment = _EPOCH + timedelta(milliseconds=min(max(at, 0), _MAX_MS))
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def milliseconds(text: str) -> int:
    """The other way round. Raises ``Malformed`` for a text that :func:`time_text` does not make."""
    try:
        at = (datetime.fromisoformat(text) - _EPOCH) // timedelta(milliseconds=1)
    except (ValueError, TypeError):  # TypeError: a time without a zone
        at = -1
    if at < 0 or time_text(at) != text:
        raise Malformed(f"time of a line: got {text!r}, wanted a form as 2026-11-22T18:49:25.123Z")
    return at


def check_entry(kind: str, detail: dict[str, Detail]) -> None:
    """What may be recorded: a kind of small letters and hyphens; text, numbers, lists and tables of them.

    Bytes are refused outright: a key that went astray must not end up in a record that auditors are given.

    Raises:
        ValueError: the kind, a number that is not finite or too large, or tables in tables without end.
        TypeError: a value of another type.
        Malformed: a text that is not Unicode.
    """
    if not _KIND.fullmatch(kind):
        raise ValueError(f"audit kind {kind!r}, wanted lower-case letters, digits and hyphens")
    _check_value("detail", detail, _MAX_DEPTH)


def _check_value(where: str, value: object, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"{where}: more than {_MAX_DEPTH} tables or lists in one another")
    if type(value) is dict:
        for key, inner in value.items():
            _check_text(where, key)
            _check_value(f"{where}.{key}", inner, depth - 1)
    elif type(value) is list:
        for inner in value:
            _check_value(where, inner, depth - 1)
    elif type(value) is str:
        _check_text(where, value)
    elif type(value) is int or type(value) is float:
        if not math.isfinite(value) or (type(value) is int and abs(value) > _MAX_INT):
            raise ValueError(f"{where}: {value!r} does not fit a number of JSON")
    elif type(value) is not bool:  # the value itself is not told: it may be a key
        raise TypeError(f"{where}: got {type(value).__name__}, wanted text, a number, a bool, a list or a dict")


def _check_text(where: str, text: object) -> None:
    if type(text) is not str:
        raise TypeError(f"{where}: got {type(text).__name__} as a key, wanted text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed(f"{where}: text is not Unicode (a lone surrogate)") from None
