"""The public half of every site, in one list that has one digest.

A roster is what sites compare before anything else: two sites that hold the same digest hold the same keys for the
same names. It travels through the coordinator, so it proves nothing by itself; what makes it true is that people
compare ``fingerprint()`` over another channel, once, when a site joins.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

import msgspec

from fedseek.errors import Malformed, WrongKey

MAX_NAME_CHARS = 64
MAX_ROSTER_ENTRIES = 1024
SIGNING_PUBLIC_KEY_BYTES = 32  # Ed25519, RFC 8032
SEALING_PUBLIC_KEY_BYTES = 1184 + 32  # ML-KEM-768 encapsulation key (FIPS 203), then X25519 (RFC 7748)
DIGEST_BYTES = 32  # SHA-256

_ENTRY_DOMAIN = b"fedseek/roster-entry/v1"
_ROSTER_DOMAIN = b"fedseek/roster/v1"


class RosterEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What everybody may know about one site.

    Attributes:
        name: the site's name, unique on a roster; any script, at most 64 characters.
        kind: what sort of institution it is, such as ``"bank"``.
        signing_key: Ed25519 public key, 32 bytes.
        sealing_key: HPKE public key for MLKEM768-X25519, 1216 bytes: ML-KEM-768 key, then X25519 key.

    Raises:
        Malformed: a name or key that is not of this form, whether built here or decoded from a message.
    """

    name: str
    kind: str
    signing_key: bytes
    sealing_key: bytes

    def __post_init__(self) -> None:
        check_name("site name", self.name)
        check_name("site kind", self.kind)
        _check_length(f"signing key of {self.name!r}", self.signing_key, SIGNING_PUBLIC_KEY_BYTES)
        _check_length(f"sealing key of {self.name!r}", self.sealing_key, SEALING_PUBLIC_KEY_BYTES)

    def fingerprint(self) -> str:
        """The entry as eight groups of eight hexadecimal digits, for people to compare over another channel.

        Covers the name, the kind and both keys, in all 256 bits: a shorter one would let a site prepare two entries
        that look alike.
        """
        digits = self.digest().hex()
        return "-".join(digits[start : start + 8] for start in range(0, len(digits), 8))

    def digest(self) -> bytes:
        """What the fingerprint says, 32 bytes: SHA-256 of the whole entry under a domain of its own."""
        return hashlib.sha256(_ENTRY_DOMAIN + msgspec.msgpack.encode(self)).digest()


class Roster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sites of a federation, in ascending order of name (by code point), each once.

    Build it with ``Roster.of``, which sorts: a set of sites has one roster, and so one digest.

    Raises:
        Malformed: entries out of order, too many, none, or two names that a reader could not tell apart.
        WrongKey: two sites that show the same key.
    """

    entries: tuple[RosterEntry, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.entries) <= MAX_ROSTER_ENTRIES:
            raise Malformed(f"roster has {len(self.entries)} sites, wanted 1 to {MAX_ROSTER_ENTRIES}")
        names = [entry.name for entry in self.entries]
        if names != sorted(names):
            raise Malformed("roster is not in ascending order of site name", hint="build it with Roster.of(entries)")
        _refuse_lookalikes(names)
        _refuse_shared_keys(self.entries)

    @classmethod
    def of(cls, entries: Iterable[RosterEntry]) -> Roster:
        """The roster of these sites, in whatever order they are given."""
        return cls(entries=tuple(sorted(entries, key=lambda entry: entry.name)))

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names, in roster order."""
        return tuple(entry.name for entry in self.entries)

    def entry(self, name: str) -> RosterEntry:
        """The entry of the site of this name.

        Raises:
            WrongKey: no such site on the roster.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise WrongKey(f"site {name!r} is not on the roster", hint=f"on it are: {', '.join(self.names)}")

    def require(self, entry: RosterEntry) -> None:
        """Check that this very entry, keys included, is on the roster.

        Raises:
            WrongKey: no such site, or its keys or kind are not those of the roster.
        """
        listed = self.entry(entry.name)
        if listed != entry:
            raise WrongKey(
                f"site {entry.name!r} shows keys with fingerprint {entry.fingerprint()}, "
                f"the roster says {listed.fingerprint()}",
                hint="somebody may be standing in between: compare fingerprints over another channel",
            )

    def canonical_bytes(self) -> bytes:
        """The one byte string of this roster (MessagePack: fields and entries in a fixed order, shortest forms)."""
        return msgspec.msgpack.encode(self)

    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes under a domain of its own, 32 bytes."""
        return hashlib.sha256(_ROSTER_DOMAIN + self.canonical_bytes()).digest()


def parse_roster(data: bytes) -> Roster:
    """The roster of these canonical bytes, as received from another party.

    Raises:
        Malformed: it does not parse, breaks a rule of rosters, or is not in canonical form.
        WrongKey: two sites show the same key.
    """
    try:
        roster = msgspec.msgpack.decode(data, type=Roster)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # msgspec lets the second one through
        raise Malformed(f"roster of {len(data)} bytes does not parse: {error}") from None
    if roster.canonical_bytes() != data:
        raise Malformed("roster is not in canonical form, so its digest is ambiguous")
    return roster


def check_name(what: str, name: str) -> None:
    """Refuse a name that is empty, too long, padded, or that holds characters a reader cannot see.

    Control and zero-width characters are out, and so are forms other than NFC: two byte strings that print alike
    must not be two sites.

    Raises:
        Malformed: the name is refused.
    """
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        raise Malformed(f"{what} has {len(name)} characters, wanted 1 to {MAX_NAME_CHARS}")
    if not name.isprintable() or name != name.strip():
        raise Malformed(f"{what} {name!r} has invisible characters or spaces at an end")
    if name.startswith(".") or "/" in name or "\\" in name:  # a name becomes part of file names
        raise Malformed(f"{what} {name!r} starts with a dot or holds a slash")
    if not unicodedata.is_normalized("NFC", name):
        raise Malformed(f"{what} {name!r} is not in Unicode form NFC")


def _check_length(what: str, value: bytes, wanted: int) -> None:
    if len(value) != wanted:
        raise Malformed(f"{what} has {len(value)} bytes, wanted {wanted}")


def _refuse_lookalikes(names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        # NFKC + casefold: "Bank A", "bank a" and the same in full-width letters read as one
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded in seen:
            raise Malformed(f"roster names {seen[folded]!r} and {name!r} are the same to a reader")
        seen[folded] = name


def _refuse_shared_keys(entries: tuple[RosterEntry, ...]) -> None:
    owners: dict[bytes, str] = {}
    for entry in entries:
        for key in (entry.signing_key, entry.sealing_key):
            if key in owners:
                raise WrongKey(f"sites {owners[key]!r} and {entry.name!r} show the same key")
            owners[key] = entry.name
