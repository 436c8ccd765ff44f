"""Targets of enrolment: requests, join files, rosters, renewals; as they come, and signed again after they were altered."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from altering import Target
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from message_targets import SITES, fixed, fixed_site
from msgspec.structs import replace

from fedseek.identity.authority import create_authority
from fedseek.identity.enrolment import (
    MAX_JOIN_FILE_BYTES,
    MAX_RENEWAL_BYTES,
    MAX_REQUEST_BYTES,
    JoinRequest,
    Renewal,
    check_renewal,
    make_join_file,
    make_renewal,
    make_request,
    parse_join_file,
    parse_renewal,
    parse_request,
)
from fedseek.identity.forms import Form, parse_form, sign_form
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signed_roster import (
    MAX_SIGNED_ROSTER_BYTES,
    Member,
    SignedRoster,
    check_successor,
    make_signed_roster,
    parse_signed_roster,
)
from fedseek.identity.signing import CONTEXT_JOIN_FILE, CONTEXT_JOIN_REQUEST, CONTEXT_RENEWAL, CONTEXT_ROSTER, sign

NOW = 1_800_000_000
FormT = TypeVar("FormT", bound=Form)


def authority() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(fixed("authority", 32))


def node_key(number: int) -> bytes:
    key = ec.derive_private_key(number, ec.SECP256R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fixed_roster(*sites: tuple[str, str], number: int = 2) -> SignedRoster:
    members = [Member(fixed_site(*site).public(), NOW, NOW + 90 * 86_400) for site in sites]
    return make_signed_roster(
        authority(), consortium="华东联合", number=number, members=members, issued_at=NOW, previous=bytes(32)
    )


def enrolment_targets() -> dict[str, Target]:
    """What sites and the authority hand each other as files."""
    key, roster = authority(), fixed_roster(*SITES)
    old, new = fixed_site("北岸银行", "bank"), fixed_site("北岸银行", "bank", keys="new")
    request = make_request(old, node_key(7), NOW)
    renewal = make_renewal(old, make_request(new, node_key(8), NOW))
    public = key.public_key().public_bytes_raw()
    join = make_join_file(key, coordinator="[::1]:9443", ca=ca(), coordinator_key=bytes(32), roster=roster)

    def read_roster(data: bytes) -> object:
        taken = parse_signed_roster(data, authority=public)
        check_successor(fixed_roster(number=0), taken)
        return taken.roster if taken.members else None

    def read_join(data: bytes) -> object:
        return parse_join_file(data).signed_roster()

    def read_renewal(data: bytes) -> None:
        check_renewal(parse_renewal(data), old.public())

    def sign_request(form: JoinRequest, who: SiteIdentity) -> JoinRequest:
        return replace(form, signature=sign(who, CONTEXT_JOIN_REQUEST, form.signed_content()))

    def sign_renewal(form: Renewal) -> Renewal:
        inner = replace(form, request=sign_request(form.request, new))
        return replace(inner, signature=sign(old, CONTEXT_RENEWAL, inner.signed_content()))

    rosters = [roster.to_bytes(), fixed_roster(SITES[0]).to_bytes(), fixed_roster().to_bytes()]
    return {
        "join_request": Target(parse_request, [request.to_bytes()], document=True),
        "join_request_signed": signed(parse_request, request, MAX_REQUEST_BYTES, lambda form: sign_request(form, old)),
        "signed_roster": Target(read_roster, rosters, document=True),
        "signed_roster_signed": signed(
            read_roster, roster, MAX_SIGNED_ROSTER_BYTES, lambda form: sign_form(form, key, CONTEXT_ROSTER)
        ),
        "join_file": Target(read_join, [join.to_bytes()], document=True),
        "join_file_signed": signed(
            read_join, join, MAX_JOIN_FILE_BYTES, lambda form: sign_form(form, key, CONTEXT_JOIN_FILE)
        ),
        "renewal": Target(read_renewal, [renewal.to_bytes()], document=True),
        "renewal_signed": signed(read_renewal, renewal, MAX_RENEWAL_BYTES, sign_renewal),
    }


def signed(read: Callable[[bytes], object], form: FormT, limit: int, sign_again: Callable[[FormT], FormT]) -> Target:
    """What whoever holds the key may have signed: the altered form, with a signature that is right."""

    def read_signed(data: bytes) -> object:
        return read(sign_again(parse_form(data, type(form), limit=limit)).to_bytes())

    return Target(read_signed, [form.to_bytes()], document=True)


def ca() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return create_authority(Path(folder) / "authority", name="华东联合", now=NOW).ca
