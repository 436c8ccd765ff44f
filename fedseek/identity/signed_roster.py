"""The roster with a number, signed by the roster authority.

People compare the authority's fingerprint once, when their site joins; from then on a site takes every newer roster
that this key signed, and nobody touches the other sites when one comes, goes or renews its keys. So whoever holds that
key can put keys of its own on a roster. It is to be kept by whom the sites trust with that, and off the coordinator's
machine where they can. What changed from one roster to the next is told by :func:`changes`, for the audit chain.

What this does not do: a coordinator may keep back a newer roster, and a site cannot tell. It then works with keys that
others gave up, until they expire.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

from fedseek.errors import CustodyError, Malformed, WrongRound
from fedseek.identity.forms import Digest, Form, Moment, Signature, parse_form, sign_form
from fedseek.identity.roster import MAX_ROSTER_ENTRIES, Roster, RosterEntry, check_name
from fedseek.identity.signing import CONTEXT_ROSTER, verify_with

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_SIGNED_ROSTER_BYTES: Final = 4 << 20  # 1024 sites of at most 3 KiB

_DIGEST_DOMAIN: Final = b"fedseek/signed-roster-digest/v1"
_AUTHORITY_DOMAIN: Final = b"fedseek/roster-authority/v1"


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A site on the roster, and how long its keys are good for; Unix time in seconds.

    Raises:
        Malformed: the keys end before they begin.
    """

    entry: RosterEntry
    admitted_at: Moment
    expires_at: Moment

    def __post_init__(self) -> None:
        if self.expires_at <= self.admitted_at:
            raise Malformed(f"keys of {self.entry.name!r} are good until {self.expires_at}, from {self.admitted_at} on")

    def due(self, now: float) -> bool:
        """Whether it is time to renew: a third of the keys' life or less is left (30 days of 90)."""
        return self.expires_at - now <= (self.expires_at - self.admitted_at) / 3


class SignedRoster(Form, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The roster with a number, signed by the authority.

    Attributes:
        version: of this form.
        consortium: its name.
        number: 0 for the first, one more each time.
        members: in ascending order of name; none before the first site is admitted.
        issued_at: Unix time in seconds.
        previous: ``digest()`` of the roster before; zeros for the first.
        signature: of the roster authority over all of the above.

    Raises:
        Malformed, WrongKey: what :class:`fedseek.identity.roster.Roster` refuses.
    """

    version: Literal[1]
    consortium: str
    number: Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
    members: Annotated[tuple[Member, ...], msgspec.Meta(max_length=MAX_ROSTER_ENTRIES)]
    issued_at: Moment
    previous: Digest
    signature: Signature

    def __post_init__(self) -> None:
        check_name("consortium name", self.consortium)
        if self.members:
            self._entries()

    @property
    def roster(self) -> Roster:
        """The sites, as the protocol knows them; expired ones too.

        Raises:
            CustodyError: nobody is on it yet.
        """
        if not self.members:
            raise CustodyError(
                f"roster {self.number} of {self.consortium!r} has no sites", hint="admit one: fedseek-server admit"
            )
        return self._entries()

    def _entries(self) -> Roster:
        return Roster(entries=tuple(member.entry for member in self.members))

    def member(self, name: str) -> Member | None:
        """The member of this name, if it is on the roster."""
        return next((member for member in self.members if member.entry.name == name), None)

    @property
    def signing_keys(self) -> dict[str, bytes]:
        """By name, the Ed25519 public key of each member, expired ones too."""
        return {member.entry.name: member.entry.signing_key for member in self.members}

    def expired(self, now: float) -> tuple[str, ...]:
        """Names of the members whose keys are no longer good."""
        return tuple(member.entry.name for member in self.members if member.expires_at <= now)

    def digest(self) -> bytes:
        """SHA-256 of all but the signature, 32 bytes."""
        return hashlib.sha256(_DIGEST_DOMAIN + self.signed_content()).digest()


@dataclass(frozen=True, slots=True)
class Changes:
    """Names of the sites that came, went, or have other keys than before."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    renewed: tuple[str, ...]


def make_signed_roster(
    key: Ed25519PrivateKey, *, consortium: str, number: int, members: Iterable[Member], issued_at: int, previous: bytes
) -> SignedRoster:
    """Sort and sign; run by the authority."""
    unsigned = SignedRoster(
        version=1,
        consortium=consortium,
        number=number,
        members=tuple(sorted(members, key=lambda member: member.entry.name)),
        issued_at=issued_at,
        previous=previous,
        signature=b"",
    )
    return sign_form(unsigned, key, CONTEXT_ROSTER)


def parse_signed_roster(data: bytes, *, authority: bytes) -> SignedRoster:
    """A roster that the authority of this public key signed.

    Raises:
        TooLarge, Malformed: it is no roster in this form.
        WrongKey: another key signed it, it was altered, or two sites show the same key.
    """
    roster = parse_form(data, SignedRoster, limit=MAX_SIGNED_ROSTER_BYTES)
    verify_with(authority, CONTEXT_ROSTER, roster.signed_content(), roster.signature, who="the roster authority")
    return roster


def check_successor(held: SignedRoster, offered: SignedRoster) -> None:
    """Whether a verified roster may take the place of the one that is held. Numbers may be left out.

    Raises:
        WrongRound: it is older, or the very same.
        CustodyError: of another consortium, or not made from the held one: the authority signed two stories.
    """
    if offered.consortium != held.consortium:
        raise CustodyError(f"got a roster of {offered.consortium!r}, wanted one of {held.consortium!r}")
    if offered.number == held.number and offered.digest() != held.digest():
        raise _forked(held.number, held.digest(), offered.digest())
    if offered.number <= held.number:
        raise WrongRound(f"got roster {offered.number}, held is {held.number}; wanted a later one")
    if offered.number == held.number + 1 and offered.previous != held.digest():
        raise _forked(held.number, held.digest(), offered.previous)


def changes(held: SignedRoster, offered: SignedRoster) -> Changes:
    """Who came, who went, and whose keys are others."""
    before, after = ({member.entry.name: member.entry for member in roster.members} for roster in (held, offered))
    return Changes(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        renewed=tuple(name for name in after if name in before and after[name] != before[name]),
    )


def authority_digest(public_key: bytes) -> bytes:
    """What people compare of a roster authority, 32 bytes; see ``words`` for how to say it."""
    return hashlib.sha256(_AUTHORITY_DOMAIN + public_key).digest()


def _forked(number: int, held: bytes, other: bytes) -> CustodyError:
    return CustodyError(
        f"the authority signed two rosters of number {number}: held is {held.hex()}, another is {other.hex()}",
        hint="believe neither of them: ask the operator of the consortium, over another channel, which is true and why",
    )
