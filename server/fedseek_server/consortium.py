"""Who is in the consortium: sites are admitted, renewed and revoked here, and certificates issued.

The operator's command line and a running daemon may change a consortium at the same time: changes are made under a
lock, and each file is replaced whole. Reading needs no passphrase; what signs needs the authority's keys. The files are
described in ``consortium_files``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedseek.daemon.audit import AuditChain
from fedseek.daemon.audit_lines import COORDINATOR
from fedseek.errors import CustodyError, Expired, InvalidConfig, WrongKey
from fedseek.identity.authority import (
    CA_FILE,
    CERTIFICATE_DAYS,
    Authority,
    certificate_days_left,
    certificate_days_old,
    create_authority,
    issue_certificate,
    load_authority,
    read_private_key,
    write_private_key,
)
from fedseek.identity.enrolment import (
    Age,
    JoinFile,
    JoinRequest,
    check_renewal,
    check_request,
    make_join_file,
    parse_renewal,
    split_address,
)
from fedseek.identity.forms import DAY_SECONDS
from fedseek.identity.roster import DIGEST_BYTES, RosterEntry, check_name
from fedseek.identity.secret_files import exclusive, refusing, write_secret_file
from fedseek.identity.signed_roster import (
    Member,
    SignedRoster,
    make_signed_roster,
)
from fedseek.identity.signing import sign_with
from fedseek_server.consortium_files import (
    ABOUT_FILE,
    AUTHORITY,
    COORDINATOR_KEY_FILE,
    OWN_FILES,
    ROSTERS,
    SERVER_FILE,
    About,
    ConsortiumFiles,
    read_about,
)
from fedseek_server.node_list import NodeList

AUDIT = "audit"  # folder of the audit chain
_log = logging.getLogger(__name__)


def create_consortium(
    folder: Path,
    *,
    name: str,
    hosts: Sequence[str],
    address: str,
    now: float,
    passphrase: str | None = None,
    days: int = CERTIFICATE_DAYS,
) -> Consortium:
    """Make keys, certificates and an empty roster in ``folder``, which may exist but holds no consortium.

    Args:
        folder: its parent exists.
        name: any script, at most 64 characters.
        hosts: DNS names and IP addresses that sites reach the coordinator under.
        address: HOST:PORT that sites dial; the host is one of ``hosts``.
        now: Unix time in seconds.
        passphrase: of the authority's keys, at least 12 characters.
        days: that certificates and sites' keys are good for.

    Raises:
        InvalidConfig, Malformed: a name, host or address cannot be used.
        CustodyError: there is a consortium already, even a half-made one, or the disk refuses.
    """
    check_name("consortium name", name)
    if split_address(address)[0].lower() not in [host.lower() for host in hosts]:
        raise InvalidConfig([f"address {address!r} is under none of the hosts {', '.join(hosts)}"], source="consortium")
    with refusing(folder, "made"):
        folder.mkdir(mode=0o700, exist_ok=True)
    with exclusive(folder):
        for each in OWN_FILES:
            if (folder / each).exists():
                raise CustodyError(
                    f"{folder / each} exists; wanted a folder without a consortium",
                    hint="if an earlier attempt was cut short and no site has joined, delete the folder",
                )
        authority = create_authority(folder / AUTHORITY, name=name, now=now, passphrase=passphrase)
        key = Ed25519PrivateKey.generate()
        about = About(
            version=1,
            name=name,
            address=address,
            hosts=tuple(hosts),
            days=days,
            authority=authority.public_key,
            coordinator_key=key.public_key().public_bytes_raw(),
        )
        made = Consortium(folder, about, authority)
        made._issue(authority, now)
        write_private_key(folder / COORDINATOR_KEY_FILE, key)
        write_secret_file(folder / CA_FILE, authority.ca)
        with refusing(folder / ROSTERS, "made"):
            (folder / ROSTERS).mkdir(mode=0o700)
        made._files.put(made._roster(authority, (), now, after=None), NodeList(version=1, nodes=()))
        write_secret_file(folder / ABOUT_FILE, about.to_bytes())
    return made


def open_consortium(folder: Path, *, passphrase: str | None = None) -> Consortium:
    """The consortium in ``folder``; finishes what a crash left half done.

    Args:
        folder: made by ``create_consortium``.
        passphrase: of the authority's keys; None: they are read when something is to be signed, if they have none.

    Raises:
        CustodyError: no consortium, a file is missing or open to others, or the passphrase is wrong.
        Malformed, TooLarge, WrongKey: a file is not what it should be.
    """
    about = read_about(folder)
    authority = None if passphrase is None else load_authority(folder / AUTHORITY, passphrase=passphrase)
    opened = Consortium(folder, about, authority)
    with exclusive(folder):
        opened._files.latest()
    return opened


class Consortium:
    """An open consortium; make one with ``create_consortium`` or ``open_consortium``.

    What it tells is what is on the disk now, whoever wrote it. ``now`` is Unix time in seconds. Whatever signs raises
    :class:`CustodyError` where the authority's keys are away or under a passphrase that was not given.
    """

    def __init__(self, folder: Path, about: About, authority: Authority | None) -> None:
        self.folder = folder
        self.about = about
        self._authority = authority
        self._files = ConsortiumFiles(folder, about.name, about.authority)

    def __repr__(self) -> str:
        return f"<Consortium {self.name!r} in {self.folder}>"

    @property
    def name(self) -> str:
        """Of the consortium."""
        return self.about.name

    @property
    def certificate(self) -> Path:
        """PEM file of the server's certificate. Its key is in the same file, so that both are replaced at once."""
        return self.folder / SERVER_FILE

    @property
    def key(self) -> Path:
        """PEM file of the certificate's private key: the same file."""
        return self.folder / SERVER_FILE

    @property
    def signed_roster(self) -> SignedRoster:
        """The roster in force.

        Raises:
            CustodyError, Malformed, TooLarge, WrongKey: the file cannot be used, or the authority did not sign it.
        """
        return self._files.signed_roster()

    def node_keys(self) -> dict[str, bytes]:
        """By site on the roster, the public key (PEM) its courier authenticates with."""
        return self._files.node_list().current(self.signed_roster)

    def former_node_keys(self) -> dict[str, bytes]:
        """By site, the key before its last renewal. To be let in too: a site hears of its renewal under this one."""
        return self._files.node_list().former(self.signed_roster)

    def nodes(self) -> dict[bytes, str]:
        """By public key (PEM) that is to be let in, present or former, the site it is of."""
        both = (self.former_node_keys(), self.node_keys())
        return {key: site for keys in both for site, key in keys.items()}

    def audit_chain(self, *, retention_days: int) -> AuditChain:
        """The coordinator's record in ``audit/``, open for writing, signed with the key that join files name.

        Raises:
            CustodyError, WrongKey: the key cannot be read, or is another one; else as ``AuditChain`` says.
        """
        path = self.folder / COORDINATOR_KEY_FILE
        key = read_private_key(path)
        if not isinstance(key, Ed25519PrivateKey) or key.public_key().public_bytes_raw() != self.about.coordinator_key:
            raise WrongKey(f"{path} is not the key that {ABOUT_FILE} and the join files name")
        return AuditChain(
            self.folder / AUDIT,
            name=COORDINATOR,
            sign=partial(sign_with, key),
            public_key=self.about.coordinator_key,
            retention_days=retention_days,
        )

    def admit(self, request: JoinRequest, now: float) -> JoinFile:
        """Put a site on the roster. People have compared its fingerprint before. The same request twice changes nothing.

        Returns:
            The join file for the site; with the roster that it is on.

        Raises:
            WrongKey: the name has other keys and they have not expired, or keys in it are or were on a roster before.
            Malformed: its name and another's are the same to a reader.
        """
        check_request(request)
        signer = self._signer()
        with exclusive(self.folder):
            held, nodes = self._files.latest(), self._files.node_list()
            member = held.member(request.entry.name)
            if member is not None and now < member.expires_at:
                if (member.entry, nodes.current(held).get(member.entry.name)) != (request.entry, request.node_key):
                    raise WrongKey(
                        f"site {member.entry.name!r} is on the roster with other keys: {member.entry.fingerprint()}",
                        hint="a site renews its keys itself; if it lost them, revoke it first",
                    )
                return self._join_file(signer, held)
            self._refuse_used_keys(request.entry)
            roster = self._with_entry(signer, held, request.entry, now)
            self._files.put(roster, nodes.with_node(request, held, renewal=False))
        return self._join_file(signer, roster)

    def renew(self, renewal: bytes, now: float) -> SignedRoster:
        """Put new keys of a site on the roster, vouched for with its old ones. The same renewal twice changes nothing.

        Raises:
            TooLarge, Malformed, WrongKey: it is no renewal, of no site here, or not signed with the keys on the roster.
            Expired: those keys are no longer good.
        """
        parsed = parse_renewal(renewal)
        entry = parsed.request.entry
        with exclusive(self.folder):
            held = self._files.latest()
            member = held.member(entry.name)
            if member is None:
                raise WrongKey(f"got a renewal of site {entry.name!r}, which is not on the roster")
            if member.entry == entry:
                return held
            check_renewal(parsed, member.entry)
            if now >= member.expires_at:
                raise Expired(
                    f"keys of site {entry.name!r} expired {_days(now - member.expires_at)} days ago and vouch for none",
                    hint="have the site make new ones (fedseek-site init in a new folder), and admit it again",
                )
            self._refuse_used_keys(entry)
            roster = self._with_entry(self._signer(), held, entry, now)
            self._files.put(roster, self._files.node_list().with_node(parsed.request, held, renewal=True))
        return roster

    def revoke(self, name: str, now: float) -> SignedRoster:
        """Take a site off the roster. Its keys are not admitted again; under new ones it may come back.

        Raises:
            WrongKey: no such site.
        """
        signer = self._signer()
        with exclusive(self.folder):
            held, nodes = self._files.latest(), self._files.node_list()
            if held.member(name) is None:
                names = ", ".join(member.entry.name for member in held.members)
                raise WrongKey(f"site {name!r} is not on the roster", hint=f"on it are: {names or 'none'}")
            members = [member for member in held.members if member.entry.name != name]
            roster = self._roster(signer, members, now, after=held)
            self._files.put(roster, nodes)
            self._files.put_nodes(nodes.of(roster))
        return roster

    def forget_former(self, name: str) -> None:
        """Let the site in under its new node key alone: it was seen with it."""
        with exclusive(self.folder):
            held = self._files.latest()
            self._files.put_nodes(self._files.node_list().without_former(name, held))

    def join_file(self) -> JoinFile:
        """What a site needs to take part, with the roster in force; the same for every site."""
        return self._join_file(self._signer(), self.signed_roster)

    def renew_certificate(self, now: float, before_days: int = 30) -> bool:
        """Issue a new server certificate when the old one has this many days to live, or a third of its life.

        Returns:
            Whether it did.

        A certificate that is still good is kept where the authority's keys are not at hand; that is logged.

        Raises:
            CustodyError: it has expired, and no other can be signed.
        """
        with exclusive(self.folder):
            left = certificate_days_left(self._files.server_pem(), now)
            if left > min(before_days, self.about.days // 3):
                return False
            try:
                signer = self._signer()
            except CustodyError as error:
                if left < 0:
                    raise
                _log.warning("server certificate ends in %d days and cannot be renewed: %s", left, error)
                return False
            self._issue(signer, now)
        return True

    def ages(self, now: float) -> list[Age]:
        """How old keys and certificates are, and how long they are good for."""
        ca = self._files.ca()
        server = self._files.server_pem()
        since = certificate_days_old(ca, now)
        return [
            Age("CA certificate", since, certificate_days_left(ca, now)),
            Age("roster key of the authority", since, None),
            Age("audit key of the coordinator", since, None),
            Age("server certificate", certificate_days_old(server, now), certificate_days_left(server, now)),
            *(
                Age(f"keys of {each.entry.name}", _days(now - each.admitted_at), _days(each.expires_at - now))
                for each in self.signed_roster.members
            ),
        ]

    def _signer(self) -> Authority:
        signer = self._authority or load_authority(self.folder / AUTHORITY)
        if signer.public_key != self.about.authority:
            raise WrongKey(f"{self.folder / AUTHORITY} holds the keys of another authority than {ABOUT_FILE} names")
        return signer

    def _with_entry(self, signer: Authority, held: SignedRoster, entry: RosterEntry, now: float) -> SignedRoster:
        others = [member for member in held.members if member.entry.name != entry.name]
        member = Member(entry, int(now), int(now) + self.about.days * DAY_SECONDS)
        return self._roster(signer, [*others, member], now, after=held)

    def _roster(
        self, signer: Authority, members: Sequence[Member], now: float, *, after: SignedRoster | None
    ) -> SignedRoster:
        return make_signed_roster(
            signer.roster_key,
            consortium=self.name,
            number=0 if after is None else after.number + 1,
            members=members,
            issued_at=int(now),
            previous=bytes(DIGEST_BYTES) if after is None else after.digest(),
        )

    def _join_file(self, signer: Authority, roster: SignedRoster) -> JoinFile:
        return make_join_file(
            signer.roster_key,
            coordinator=self.about.address,
            ca=signer.ca,
            coordinator_key=self.about.coordinator_key,
            roster=roster,
        )

    def _issue(self, signer: Authority, now: float) -> None:
        certificate, key = issue_certificate(signer, self.about.hosts, now=now, days=self.about.days)
        write_secret_file(self.folder / SERVER_FILE, certificate + key)

    def _refuse_used_keys(self, entry: RosterEntry) -> None:
        """A key that was given up, or revoked, does not come back; nor does one get on the roster twice."""
        for roster in self._files.past():
            for member in roster.members:
                old = member.entry
                if old.signing_key == entry.signing_key or old.sealing_key == entry.sealing_key:
                    raise WrongKey(
                        f"keys of {entry.name!r} were on roster {roster.number} as those of {old.name!r}",
                        hint="a site that comes back makes new keys: fedseek-site init in a new folder",
                    )


def _days(seconds: float) -> int:
    return int(seconds // DAY_SECONDS)
