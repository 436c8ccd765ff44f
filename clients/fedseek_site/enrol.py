"""A site's folder: its identity, what it was told when it joined, the roster it trusts, and new keys under way.

    identity.sealed   private keys, sealed under the storage key    join.json     from the authority, compared once
    storage.key       that key, unless there is a passphrase        ca.pem        out of it: of the coordinator's TLS
    node.key          the courier's, for Flower's authentication    roster.json   the roster trusted now
    pending/          identity and node key of a renewal that is not on the roster yet

Which of two identities is the site's own is decided by ``roster.json`` alone: as soon as it lists the pending one, that
is it, and whoever opens the folder next moves its files into place. So a crash at any moment loses no key, and never
leaves the site with keys that the others do not know.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from fedseek.daemon.audit_lines import COORDINATOR
from fedseek.errors import CustodyError, Expired, Malformed, WrongKey
from fedseek.identity.authority import certificate_days_left, certificate_days_old
from fedseek.identity.enrolment import (
    MAX_JOIN_FILE_BYTES,
    Age,
    JoinFile,
    JoinRequest,
    make_renewal,
    make_request,
    parse_join_file,
)
from fedseek.identity.forms import DAY_SECONDS
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster, RosterEntry, check_name
from fedseek.identity.secret_files import (
    exclusive,
    read_file,
    read_secret_file,
    refusing,
    sync_folder,
    write_secret_file,
)
from fedseek.identity.signed_roster import (
    MAX_SIGNED_ROSTER_BYTES,
    Member,
    SignedRoster,
    check_successor,
    parse_signed_roster,
)
from fedseek.identity.vault import StorageKey, load_identity, new_salt, save_identity, unlock

IDENTITY_FILE, STORAGE_KEY_FILE, NODE_KEY_FILE = "identity.sealed", "storage.key", "node.key"
JOIN_FILE, CA_FILE, ROSTER_FILE, PENDING = "join.json", "ca.pem", "roster.json", "pending"
_MAX_NODE_KEY_FILE_BYTES: Final = 4 << 10


@dataclass(frozen=True, slots=True)
class JoinedFolder:
    """What a process may know of a site that has none of its secrets: the courier.

    Attributes:
        folder: the site's.
        join: what the authority told it.
    """

    folder: Path
    join: JoinFile = field(repr=False)

    @property
    def node_key(self) -> Path:
        """File of the node's private key, in OpenSSH form."""
        return self.folder / NODE_KEY_FILE

    @property
    def ca_path(self) -> Path:
        """PEM file of the authority that the coordinator's certificate must be from."""
        return self.folder / CA_FILE


@dataclass(frozen=True, slots=True)
class SiteFolder(JoinedFolder):
    """An open folder.

    Attributes:
        identity: the keys that are on the roster, or were.
        storage_key: seals the site's files.
        signed_roster: trusted now.
    """

    identity: SiteIdentity
    storage_key: StorageKey
    signed_roster: SignedRoster = field(repr=False)

    @property
    def member(self) -> Member | None:
        """This site on the roster, with its present keys; None once it was taken off."""
        return self.signed_roster.member(self.identity.name) if _lists(self.signed_roster, self.identity) else None

    @property
    def record_keys(self) -> dict[str, bytes]:
        """By name, the key that signs the audit record of each site and of the coordinator."""
        return {**self.signed_roster.signing_keys, COORDINATOR: self.join.coordinator_key}

    @property
    def trusted(self) -> Roster | None:
        """The roster for the service; None, and every plan is refused, once this site was taken off it."""
        return self.signed_roster.roster if self.member is not None else None


def create_site(folder: Path, *, name: str, kind: str, passphrase: str | None = None) -> RosterEntry:
    """Make the site's keys in ``folder``. None of them ever leaves it.

    Args:
        folder: its parent exists; it holds no site yet.
        name: of the site; any script, at most 64 characters.
        kind: what sort of institution, such as ``"bank"``.
        passphrase: seals the identity, at least 12 characters; None: a key file does.

    Returns:
        The public half.

    Raises:
        Malformed: the name or kind is not one a roster takes.
        CustodyError: there is a site already, the passphrase is too short, or the disk refuses.
    """
    check_name("site name", name)
    check_name("site kind", kind)
    with refusing(folder, "made"):
        folder.mkdir(mode=0o700, exist_ok=True)
    with exclusive(folder):
        if (folder / IDENTITY_FILE).exists():
            raise CustodyError(f"{folder} holds a site already", hint="use another folder, or go on with this site")
        key_file = folder / STORAGE_KEY_FILE
        if passphrase is not None:
            key = StorageKey.from_passphrase(passphrase, salt=new_salt())
        elif key_file.exists():  # of an attempt that was cut short
            key = StorageKey.from_key_file(key_file)
        else:
            key = StorageKey.create_key_file(key_file)
        identity = SiteIdentity.generate(name, kind)
        _make_node_key(folder / NODE_KEY_FILE)
        save_identity(identity, folder / IDENTITY_FILE, key)
    return identity.public()


def make_join_request(folder: Path, *, now: float, passphrase: str | None = None) -> JoinRequest:
    """Ask to be admitted with the keys in ``folder``.

    Raises:
        CustodyError, Malformed, WrongKey: the folder cannot be used, or does not open.
    """
    identity, _ = _unlock(folder, passphrase)
    return make_request(identity, _node_public_key(folder / NODE_KEY_FILE), int(now))


def join(folder: Path, data: bytes, *, now: float, passphrase: str | None = None) -> SiteFolder:
    """Take a join file. People have compared the fingerprint of the authority in it before.

    A second one of the same authority is taken too, as when the coordinator's address changes.

    Raises:
        TooLarge, Malformed, WrongKey: it is no join file, or this site is not on its roster with its keys.
        Expired: these keys are no longer good.
        CustodyError: the site has joined another authority, or a roster is not made from the one it holds.
    """
    identity, key = _unlock(folder, passphrase)
    offered = parse_join_file(data)
    roster = offered.signed_roster()
    pending = _pending(folder, key)
    if pending is None or not _lists(roster, pending):
        roster.roster.require(identity.public())
    if identity.name in roster.expired(now):
        raise Expired(f"keys of {identity.name!r} are no longer good, says the roster", hint="is the clock right?")
    with exclusive(folder):
        if (folder / JOIN_FILE).exists():
            _check_again(folder, offered, roster)
        write_secret_file(folder / ROSTER_FILE, roster.to_bytes())
        write_secret_file(folder / CA_FILE, offered.ca)
        write_secret_file(folder / JOIN_FILE, offered.to_bytes())
    return open_site(folder, passphrase=passphrase)


def open_public(folder: Path) -> JoinedFolder:
    """The part of the folder that has no secret in it; its files may be open to the courier's group.

    Raises:
        CustodyError, Malformed, TooLarge, WrongKey: the site has not joined, or a file cannot be used.
    """
    if not (folder / JOIN_FILE).exists():
        raise CustodyError(
            f"{folder}: this site has not joined a consortium",
            hint="send the file of fedseek-site request to its operator, then: fedseek-site join FILE",
        )
    return JoinedFolder(folder, parse_join_file(read_file(folder / JOIN_FILE, limit=MAX_JOIN_FILE_BYTES)))


def open_site(folder: Path, *, passphrase: str | None = None) -> SiteFolder:
    """Open a folder that has joined; finishes a renewal that a crash cut short.

    Raises:
        CustodyError: it has not joined, or a file is missing or open to others.
        WrongKey: wrong passphrase or key file, or something in it was not signed by the authority.
        Malformed, TooLarge: a file is not what it should be.
    """
    joined = open_public(folder)
    with exclusive(folder):
        identity, key = _unlock(folder, passphrase)
        roster = _read_roster(folder, joined.join)
        if _finish(folder, key, roster):
            identity = load_identity(folder / IDENTITY_FILE, key)
    return SiteFolder(folder, joined.join, identity, key, roster)


def take_roster(site: SiteFolder, data: bytes) -> SignedRoster:
    """Trust a newer roster of the authority from now on; the one held already is taken again.

    Returns:
        The roster in force here.

    Raises:
        TooLarge, Malformed, WrongKey: it is no roster of the authority, or it gives this site keys that it never made.
        WrongRound: it is older than the one held.
        CustodyError: of another consortium, or the authority signed two stories.
    """
    offered = parse_signed_roster(data, authority=site.join.authority)
    with exclusive(site.folder):
        held = _read_roster(site.folder, site.join)
        if offered.digest() == held.digest():
            return held
        check_successor(held, offered)
        _check_own(site, offered)
        write_secret_file(site.folder / ROSTER_FILE, offered.to_bytes())
    return offered


def begin_renewal(site: SiteFolder, *, now: float) -> bytes:
    """A renewal to send to the coordinator. The new keys are made once, and offered again until they are on the roster.

    Raises:
        CustodyError: the disk refuses.
    """
    folder = site.folder / PENDING
    with exclusive(site.folder):
        pending = _pending(site.folder, site.storage_key)
        if pending is None:
            with refusing(folder, "made"):
                folder.mkdir(mode=0o700, exist_ok=True)
            pending = SiteIdentity.generate(site.identity.name, site.identity.kind)
            _make_node_key(folder / NODE_KEY_FILE)
            save_identity(pending, folder / IDENTITY_FILE, site.storage_key)
        request = make_request(pending, _node_public_key(folder / NODE_KEY_FILE), int(now))
    return make_renewal(site.identity, request).to_bytes()


def finish_renewal(site: SiteFolder) -> bool:
    """Put pending keys in the place of the old ones if the roster taken last lists them.

    Returns:
        Whether the folder now holds other keys than ``site``, which is then to be opened anew; the old ones are gone.

    Raises:
        CustodyError, Malformed, WrongKey: a file cannot be used.
    """
    with exclusive(site.folder):
        _finish(site.folder, site.storage_key, _read_roster(site.folder, site.join))
        now_there = load_identity(site.folder / IDENTITY_FILE, site.storage_key)  # another process may have been first
    return now_there.public() != site.identity.public()


def site_ages(site: SiteFolder, now: float) -> list[Age]:
    """How old this site's keys and the CA are, and how long they are good for."""
    ca, member = site.join.ca, site.member
    since = 0 if member is None else int((now - member.admitted_at) // DAY_SECONDS)
    left = -1 if member is None else int((member.expires_at - now) // DAY_SECONDS)
    return [
        Age(f"keys of {site.identity.name}", since, left),
        Age("node key", since, left),
        Age("CA certificate", certificate_days_old(ca, now), certificate_days_left(ca, now)),
    ]


def _unlock(folder: Path, passphrase: str | None) -> tuple[SiteIdentity, StorageKey]:
    path = folder / IDENTITY_FILE
    if not path.exists():
        raise CustodyError(f"{folder} holds no site", hint="make one: fedseek-site init")
    if passphrase is not None:
        return unlock(path, passphrase=passphrase)
    if not (folder / STORAGE_KEY_FILE).exists():
        raise CustodyError(
            f"the keys in {folder} are under a passphrase, got none",
            hint="give --passphrase-file or FEDSEEK_PASSPHRASE",
        )
    return unlock(path, key_file=folder / STORAGE_KEY_FILE)


def _read_roster(folder: Path, join_file: JoinFile) -> SignedRoster:
    data = read_secret_file(folder / ROSTER_FILE, limit=MAX_SIGNED_ROSTER_BYTES)
    roster = parse_signed_roster(data, authority=join_file.authority)
    if roster.consortium != join_file.consortium:
        raise Malformed(f"{folder / ROSTER_FILE} is of {roster.consortium!r}, wanted {join_file.consortium!r}")
    return roster


def _check_again(folder: Path, offered: JoinFile, roster: SignedRoster) -> None:
    """Whether a second join file may take the place of the first."""
    before = open_public(folder).join
    if (before.authority, before.consortium) != (offered.authority, offered.consortium):
        raise CustodyError(
            f"{folder} has joined {before.consortium!r}; got a join file of {offered.consortium!r}, or another authority",
            hint="a site takes part in one consortium a folder: fedseek-site init in a new one",
        )
    held = _read_roster(folder, before)
    if roster.digest() != held.digest():
        check_successor(held, roster)


def _check_own(site: SiteFolder, offered: SignedRoster) -> None:
    """A roster may leave this site out, but not give it keys that are not its own."""
    member = offered.member(site.identity.name)
    if member is None or member.entry == site.identity.public():
        return
    pending = _pending(site.folder, site.storage_key)
    if pending is None or not _lists(offered, pending):
        raise WrongKey(
            f"roster {offered.number} gives this site keys that it never made: {member.entry.fingerprint()}",
            hint="somebody takes part in its name: call the operator of the consortium",
        )


def _lists(roster: SignedRoster, identity: SiteIdentity) -> bool:
    member = roster.member(identity.name)
    return member is not None and member.entry == identity.public()


def _pending(folder: Path, key: StorageKey) -> SiteIdentity | None:
    path = folder / PENDING / IDENTITY_FILE
    return load_identity(path, key) if path.exists() else None


def _finish(folder: Path, key: StorageKey, roster: SignedRoster) -> bool:
    """Move pending keys into place if they are on the roster; the identity last, so that a crash leaves it to do again."""
    pending = _pending(folder, key)
    if pending is None or not _lists(roster, pending):
        return False
    new = folder / PENDING
    with refusing(new, "moved into place"):
        if (new / NODE_KEY_FILE).exists():
            os.replace(new / NODE_KEY_FILE, folder / NODE_KEY_FILE)
        os.replace(new / IDENTITY_FILE, folder / IDENTITY_FILE)
        sync_folder(folder)
        with suppress(OSError):  # a scratch file of an earlier crash may be in it
            new.rmdir()
    return True


def _make_node_key(path: Path) -> None:
    """Write a P-256 key as Flower reads it. (P-384 would cost ten times the time a call.)"""
    key = ec.generate_private_key(ec.SECP256R1())
    write_secret_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def _node_public_key(path: Path) -> bytes:
    try:
        key = load_ssh_private_key(read_secret_file(path, limit=_MAX_NODE_KEY_FILE_BYTES), None)
    except ValueError:
        raise Malformed(f"{path} is not a private key in OpenSSH form") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Malformed(f"{path}: got a key of another kind, wanted an elliptic curve key")
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
