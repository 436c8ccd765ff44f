"""The people of a site and their word: a key of one's own, and what is signed with it.

An approval of a plan says: I, a privacy officer of this site, agree that this plan runs here among the sites of this
roster. One of a release says: I have read this privacy statement, and this site may sign it. Each is signed on the
officer's machine and verified against the key in the policy, so neither the daemon nor whoever administers it can agree
in an officer's name.
"""

from __future__ import annotations

import os
import unicodedata
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedseek.errors import CustodyError, NotNow, WrongKey
from fedseek.identity.roster import MAX_NAME_CHARS, check_name
from fedseek.identity.secret_files import read_secret_file, refusing, sync_folder, write_through
from fedseek.identity.signing import (
    CONTEXT_APPROVAL,
    CONTEXT_RELEASE_APPROVAL,
    SIGNATURE_BYTES,
    join_fields,
    sign_with,
    verify_with,
)
from fedseek.identity.vault import MIN_PASSPHRASE_CHARS
from fedseek_site.policy import OFFICER, Policy

MAX_KEY_FILE_BYTES: Final = 4096
MIN_PREFIX: Final = 12  # hexadecimal digits of a digest that a person has to type
MAX_CLOCK_SKEW: Final = 300  # seconds that an officer's clock may be ahead of the daemon's

_LAST_SECOND: Final = 253_402_300_799  # of the year 9999
_ENCRYPTED_HEAD: Final = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"

PlanDigest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
ReleaseDigest = PlanDigest
PersonName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
Second = Annotated[int, msgspec.Meta(ge=0, le=_LAST_SECOND)]
Signature = Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class PlanApproval(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One person's yes to one plan among the sites of one roster.

    Attributes:
        plan: digest of the plan, 64 hexadecimal digits.
        roster: digest of the roster, 64 hexadecimal digits.
        person: who agrees, by the name in the policy.
        at: when it was signed, whole Unix seconds: after a withdrawal only a later one counts.
        signature: Ed25519 over :func:`approval_message`.
    """

    plan: PlanDigest
    roster: PlanDigest
    person: PersonName
    at: Second
    signature: Signature


class ReleaseApproval(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One person's yes to one release of this site.

    Attributes:
        release: its digest, as :func:`fedseek_site.release_approvals.release_digest`: it names run, privacy statement
            and weights, and the statement names the plan.
        person: who agrees, by the name in the policy.
        at: when it was signed, whole Unix seconds: after a withdrawal only a later one counts.
        signature: Ed25519 over :func:`release_approval_message`, in a context of its own: no approval of a plan is one.
    """

    release: ReleaseDigest
    person: PersonName
    at: Second
    signature: Signature


def approval_message(plan: str, roster: str, *, site: str, person: str, at: int) -> bytes:
    """What is signed: the plan, the roster, the site it holds at, who says it and when."""
    return join_fields(plan.encode(), roster.encode(), site.encode(), person.encode(), at.to_bytes(8, "big"))


def sign_approval(key: Ed25519PrivateKey, plan: str, roster: str, *, site: str, person: str, at: int) -> PlanApproval:
    """Run by a privacy officer, on a machine of her own if she likes."""
    signature = sign_with(key, CONTEXT_APPROVAL, approval_message(plan, roster, site=site, person=person, at=at))
    return PlanApproval(plan=plan, roster=roster, person=person, at=at, signature=signature)


def release_approval_message(release: str, *, site: str, person: str, at: int) -> bytes:
    """What is signed: the release, the site that would sign it, who says it and when."""
    return join_fields(release.encode(), site.encode(), person.encode(), at.to_bytes(8, "big"))


def sign_release_approval(key: Ed25519PrivateKey, release: str, *, site: str, person: str, at: int) -> ReleaseApproval:
    """Run by a privacy officer who has read the statement."""
    message = release_approval_message(release, site=site, person=person, at=at)
    signature = sign_with(key, CONTEXT_RELEASE_APPROVAL, message)
    return ReleaseApproval(release=release, person=person, at=at, signature=signature)


def check_approval(approval: PlanApproval | ReleaseApproval, policy: Policy, *, site: str) -> None:
    """Does this count, by the policy as it is now?

    Raises:
        WrongKey: the person is not in the policy or is no privacy officer, or the signature is not theirs, or it is over
            another plan, roster, release, site or time; a plan's is none of a release, and the other way round.
    """
    person, at = approval.person, approval.at
    key = _officers_key(policy, person)
    if isinstance(approval, PlanApproval):
        message = approval_message(approval.plan, approval.roster, site=site, person=person, at=at)
        context = CONTEXT_APPROVAL
    else:
        message = release_approval_message(approval.release, site=site, person=person, at=at)
        context = CONTEXT_RELEASE_APPROVAL
    verify_with(key, context, message, approval.signature, who=repr(person))


def counts(approval: PlanApproval | ReleaseApproval, policy: Policy, *, site: str) -> bool:
    """Whether :func:`check_approval` has nothing against it."""
    try:
        check_approval(approval, policy, site=site)
    except WrongKey:
        return False
    return True


def _officers_key(policy: Policy, name: str) -> bytes:
    person = policy.approval.people.get(name)
    if person is None:
        raise WrongKey(f"{name!r} is not among the people of this site's policy")
    if person.role != OFFICER:
        raise WrongKey(f"{name!r} is a {person.role}; approvals are a {OFFICER}'s")
    return person.public_key


def check_clock(approval: PlanApproval | ReleaseApproval, *, site: str, now: float) -> None:
    """An approval from the future could outlive a withdrawal.

    Raises:
        NotNow: it is signed more than five minutes ahead of this machine's clock.
    """
    if approval.at > now + MAX_CLOCK_SKEW:
        raise NotNow(
            site, "approval: signed in the future", hint="compare the clocks of the two machines, then sign again"
        )


def make_person_key(path: Path, name: str, passphrase: str | None) -> bytes:
    """Write a fresh Ed25519 key to a new file: PKCS8 PEM of mode 0600, encrypted if there is a passphrase.

    Returns:
        The public key, 32 bytes.

    Raises:
        Malformed: the name is empty, too long, or has characters that a reader cannot see.
        CustodyError: the file exists (it is left as it is) or cannot be written, or the passphrase is too short.
    """
    check_name("name", name)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, _encryption(passphrase))
    with refusing(path, "written"), ExitStack() as undo:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        undo.callback(path.unlink, missing_ok=True)
        write_through(descriptor, pem)
        sync_folder(path.parent)
        undo.pop_all()
    return key.public_key().public_bytes_raw()


def is_encrypted(path: Path) -> bool:
    """Does this key file ask for a passphrase?

    Raises:
        CustodyError: it cannot be read, or group or others may.
    """
    return read_secret_file(path, limit=MAX_KEY_FILE_BYTES).startswith(_ENCRYPTED_HEAD)


def load_person_key(path: Path, passphrase: str | None) -> Ed25519PrivateKey:
    """Read a key that :func:`make_person_key` wrote.

    Raises:
        CustodyError: it cannot be read, or group or others may.
        WrongKey: wrong passphrase, or not such a key.
    """
    pem = read_secret_file(path, limit=MAX_KEY_FILE_BYTES)
    try:
        key = load_pem_private_key(pem, None if passphrase is None else _as_bytes(passphrase))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise WrongKey(f"{path} does not open", hint="is it a person's key file, and the passphrase right?") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise WrongKey(f"{path} holds a {type(key).__name__}, wanted an Ed25519 key")
    return key


def policy_line(name: str, role: str, public_key: bytes) -> str:
    """The lines of ``policy.toml`` that give this person a say; ``name`` as ``check_name`` takes it."""
    quoted = name.replace('"', '\\"')  # a name has no backslash
    return f'[approval.people."{quoted}"]\nrole = "{role}"\nkey = "{public_key.hex()}"'


def _check_passphrase(passphrase: str) -> None:
    """Refuse one that is soon guessed.

    Raises:
        CustodyError: it is too short.
    """
    if len(passphrase) < MIN_PASSPHRASE_CHARS:
        raise CustodyError(f"passphrase: got {len(passphrase)} characters, wanted at least {MIN_PASSPHRASE_CHARS}")


def _encryption(passphrase: str | None) -> KeySerializationEncryption:
    if passphrase is None:
        return NoEncryption()
    _check_passphrase(passphrase)
    return BestAvailableEncryption(_as_bytes(passphrase))


def _as_bytes(passphrase: str) -> bytes:
    return unicodedata.normalize("NFC", passphrase).encode()  # keyboards differ in how they compose a letter
