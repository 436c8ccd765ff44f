"""The files of a consortium's folder: read strictly, replaced whole, and put right after a crash.

    consortium.json   name, address, hosts, public keys          authority/   keys that sign; may be kept elsewhere
    roster.json       the signed roster in force                 coordinator.key   signs the audit chain
    rosters/          every roster there was, by number          server.pem   TLS certificate and its key
    nodes.json        node keys                                  ca.pem       of that certificate; public

A roster is in force once its file in ``rosters/`` is written. Node keys are written before it, its copy in
``roster.json`` after it; :meth:`ConsortiumFiles.latest` makes up for a crash in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from fedseek.errors import CustodyError, Malformed
from fedseek.identity.authority import CA_FILE
from fedseek.identity.enrolment import split_address
from fedseek.identity.forms import Form, FormT, PublicKey, parse_form
from fedseek.identity.roster import check_name
from fedseek.identity.secret_files import read_secret_file, refusing, write_secret_file
from fedseek.identity.signed_roster import (
    MAX_SIGNED_ROSTER_BYTES,
    SignedRoster,
    check_successor,
    parse_signed_roster,
)
from fedseek_server.node_list import MAX_NODE_LIST_BYTES, NodeList

ABOUT_FILE, ROSTER_FILE, ROSTERS, NODES_FILE = "consortium.json", "roster.json", "rosters", "nodes.json"
AUTHORITY, COORDINATOR_KEY_FILE, SERVER_FILE = "authority", "coordinator.key", "server.pem"
OWN_FILES: Final = (ABOUT_FILE, ROSTER_FILE, ROSTERS, NODES_FILE, AUTHORITY, COORDINATOR_KEY_FILE, SERVER_FILE)
_MAX_ABOUT_BYTES: Final = 64 << 10
_MAX_PEM_BYTES: Final = 16 << 10


class About(Form, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``consortium.json``: what does not change, and is not secret.

    Attributes:
        version: of this form.
        name: of the consortium.
        address: HOST:PORT that sites dial.
        hosts: names and addresses in the server's certificate.
        days: that certificates and sites' keys are good for.
        authority: public key that rosters are signed with.
        coordinator_key: public key that the coordinator's audit chain is signed with.
    """

    version: Literal[1]
    name: str
    address: Annotated[str, msgspec.Meta(max_length=300)]
    hosts: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=64)]
    days: Annotated[int, msgspec.Meta(ge=1, le=825)]
    authority: PublicKey
    coordinator_key: PublicKey


def read_about(folder: Path) -> About:
    """What ``consortium.json`` says.

    Raises:
        CustodyError: there is none, or others may open it.
        Malformed, TooLarge: it is not in this form.
    """
    if not (folder / ABOUT_FILE).exists():
        raise CustodyError(f"{folder} holds no consortium", hint="make one: fedseek-server init")
    about = _read(folder / ABOUT_FILE, About, _MAX_ABOUT_BYTES)
    check_name("consortium name", about.name)
    split_address(about.address)
    return about


class ConsortiumFiles:
    """Rosters and node keys of one folder. What is told is what is on the disk now, whoever wrote it.

    Args:
        folder: of the consortium.
        name: of the consortium.
        authority: public key that its rosters are signed with.
    """

    def __init__(self, folder: Path, name: str, authority: bytes) -> None:
        self._folder = folder
        self._name = name
        self._authority = authority
        self._roster: tuple[object, SignedRoster] | None = None  # the file's stamp, and what was in it
        self._nodes: tuple[object, NodeList] | None = None

    def signed_roster(self) -> SignedRoster:
        """The roster in force.

        Raises:
            CustodyError, Malformed, TooLarge, WrongKey: the file cannot be used, or the authority did not sign it.
        """
        path = self._folder / ROSTER_FILE
        stamp = _stamp(path)
        if self._roster is None or self._roster[0] != stamp:
            self._roster = stamp, self._read_roster(path)
        return self._roster[1]

    def node_list(self) -> NodeList:
        """The node keys.

        Raises:
            CustodyError, Malformed, TooLarge: the file cannot be used.
        """
        path = self._folder / NODES_FILE
        stamp = _stamp(path)
        if self._nodes is None or self._nodes[0] != stamp:
            self._nodes = stamp, _read(path, NodeList, MAX_NODE_LIST_BYTES)
        return self._nodes[1]

    def past(self) -> Iterator[SignedRoster]:
        """Every roster there was, the last first."""
        for path in sorted((self._folder / ROSTERS).glob("[0-9]*.json"), reverse=True):
            yield self._read_roster(path)

    def latest(self) -> SignedRoster:
        """The roster in force, to base a change on; called under the lock.

        If a crash or a restored backup left an older one in ``roster.json``, that is put right: otherwise the authority
        would sign a second roster of the same number, and every site would refuse it.

        Raises:
            CustodyError: none is there, or two of one number are; else as ``signed_roster``.
        """
        self._roster = self._nodes = None
        path = self._folder / ROSTER_FILE
        last = next(self.past(), None)
        if last is None:
            return self.signed_roster()
        held = self.signed_roster() if path.exists() else None
        if held is None or held.number < last.number:
            write_secret_file(path, last.to_bytes())
            return last
        if held.digest() != last.digest():
            check_successor(last, held)
        return held

    def put(self, roster: SignedRoster, nodes: NodeList) -> None:
        """Put a roster in force, with its node keys; called under the lock."""
        self.put_nodes(nodes)
        path = self._folder / ROSTERS / f"{roster.number:010d}.json"
        if path.exists():
            raise CustodyError(f"{path} exists; a number is signed once")
        write_secret_file(path, roster.to_bytes())
        write_secret_file(self._folder / ROSTER_FILE, roster.to_bytes())
        self._roster = None

    def put_nodes(self, nodes: NodeList) -> None:
        """Replace the node keys; called under the lock."""
        write_secret_file(self._folder / NODES_FILE, nodes.to_bytes())
        self._nodes = None

    def ca(self) -> bytes:
        """The CA's certificate, PEM."""
        return read_secret_file(self._folder / CA_FILE, limit=_MAX_PEM_BYTES)

    def server_pem(self) -> bytes:
        """The server's certificate and its private key, PEM: secret."""
        return read_secret_file(self._folder / SERVER_FILE, limit=_MAX_PEM_BYTES)

    def _read_roster(self, path: Path) -> SignedRoster:
        data = read_secret_file(path, limit=MAX_SIGNED_ROSTER_BYTES)
        roster = parse_signed_roster(data, authority=self._authority)
        if roster.consortium != self._name:
            raise Malformed(f"{path}: got a roster of {roster.consortium!r}, wanted one of {self._name!r}")
        return roster


def _read(path: Path, kind: type[FormT], limit: int) -> FormT:
    return parse_form(read_secret_file(path, limit=limit), kind, limit=limit)


def _stamp(path: Path) -> object:
    """Differs when the file is another one: every change replaces it."""
    with refusing(path, "read"):
        status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size
