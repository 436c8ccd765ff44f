"""A network that is a dictionary, with played sites behind it, for tests of whole runs; and the run that is played."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enrolled import public_bytes, signed_roster
from played_sites import FOUR, PlayedSite, played_plan

from fedseek.daemon.audit import AuditChain
from fedseek.daemon.audit_check import checked_lines
from fedseek.daemon.audit_lines import COORDINATOR
from fedseek.daemon.parcels import ParcelUp, Verdict, decode_parcel_down, encode_parcel
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signing import sign_with
from fedseek.messages import decode_request
from fedseek_server.driver import Arrival
from fedseek_server.mail import Mail
from fedseek_server.orders import Status, submit
from fedseek_server.playing import Network, play_run

FIRST_NODE = 0xF000_0000_0000_0001  # as large as Flower's: no number of JSON
RUN = "run-1"
READY = Verdict(status="ready")
AUTHORITY = Ed25519PrivateKey.generate()
OWN = Ed25519PrivateKey.generate()


@dataclass
class Link:
    """Carries parcels to played sites and back at once. ``say`` is what a site answers to a notice, the nth time."""

    mail: Mail
    sites: dict[int, PlayedSite]
    say: Callable[[str, int], Verdict] = lambda site, nth: READY
    takes_roster: Callable[[str, int], bool] = lambda site, nth: True
    message: Callable[[str, Any, bytes], bytes | None] = lambda site, request, answer: answer
    here: set[int] = field(default_factory=set)
    greetings: int = 0
    asked: list[tuple[str, int, str]] = field(default_factory=list)
    mailbox: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.here = set(self.sites)

    def open(self) -> None:
        self.mailbox.clear()

    def close(self) -> None:
        pass

    def nodes(self) -> dict[int, str]:
        return dict.fromkeys(self.here, "stamp")

    def push(self, node: int, data: bytes, phase: str, number: int, *, lifetime: float) -> str:
        name, message_id = self.sites[node].name, f"{node}/{phase}/{number}/{len(self.asked)}"
        self.asked.append((phase, number, name))
        answer = self._answer(name, self.sites[node], decode_parcel_down(data))
        if answer is not None:
            self.mailbox[message_id] = answer
        return message_id

    def _answer(self, name: str, site: PlayedSite, down: Any) -> bytes | None:
        verdict, message = None, None
        nth = sum(phase == "greet" and site == name for phase, _, site in self.asked)
        if down.notice is not None:
            verdict = self.say(name, nth)
        if down.message is not None:
            message = self.message(name, decode_request(down.message), site.handle(down.message))
            if message is None:
                return None
        digest = self.mail.roster.digest() if self.takes_roster(name, nth) else bytes(32)
        return encode_parcel(ParcelUp(site=name, message=message, roster_digest=digest, verdict=verdict))

    def poll(self, message_ids: Any) -> list[Arrival]:
        return [Arrival(each, None, False, each) for each in message_ids if each in self.mailbox]

    def fetch(self, arrival: Arrival, *, limit: int) -> bytes | None:
        return self.mailbox.pop(str(arrival.handle))

    def discard(self, arrival: Arrival) -> None:
        self.mailbox.pop(str(arrival.handle), None)


@dataclass
class World:
    folder: Any
    link: Link
    network: Network
    order: Any

    def ask(self, wait: float = 60.0, **changes: Any) -> Any:
        self.order = submit(self.folder, played_plan(**changes.pop("plan", {})), wait_seconds=wait, run=RUN, **changes)
        return self.order

    def play(self) -> Status:
        play_run(self.network, self.order)
        return self.order.status()

    @contextmanager
    def playing(self):
        """In a thread, as the stop comes from another one."""
        thread = threading.Thread(target=play_run, args=(self.network, self.order))
        thread.start()
        try:
            yield
        finally:
            thread.join(timeout=10)
            assert not thread.is_alive()

    def lines(self, kind: str) -> list[dict[str, Any]]:
        lines = checked_lines(self.folder / COORDINATOR, public_key=public_bytes(OWN), name=COORDINATOR)
        return [line.detail for line in lines if line.kind == kind]


def until(what: Callable[[], Any], seconds: float = 10.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < limit, "still not"
        time.sleep(0.005)
    return found


def stand_in_release(coordinator: Any, folder: Any, *, heads: bytes | None = None) -> None:
    folder.mkdir()
    (folder / "signed by").write_text(json.dumps(sorted(coordinator.approvals)), "utf-8")


def make_world(tmp_path: Path) -> World:
    identities = [SiteIdentity.generate(*site) for site in FOUR]
    sites = {FIRST_NODE + place: PlayedSite(identity) for place, identity in enumerate(identities)}
    names = {node: site.name for node, site in sites.items()}
    audit = AuditChain(
        tmp_path / COORDINATOR, name=COORDINATOR, sign=partial(sign_with, OWN), public_key=public_bytes(OWN)
    )
    roster = signed_roster(AUTHORITY, *sorted(identities, key=lambda each: each.name), at=int(time.time()))
    mail = Mail(roster, names.get, audit)
    link = Link(mail, sites)
    network = Network(link, mail, 1 << 20, 0.0, threading.Event())
    return World(tmp_path, link, network, None)


def words(world) -> dict[str, str]:
    return world.order.status().sites
