"""Where parcels are opened: around each message of a run travels what both daemons tell each other between the lines.

    parcel in -> newer roster? -> heads of the others' audit chains -> a plan announced? -> message to the service
    parcel out <- answer, verdict on the plan, where this site stands, own head, signature over the heads, renewal

The service answers a message with the same bytes whenever it is asked again; the parcel around it says what is true now.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from fedseek.daemon.audit import AuditChain
from fedseek.daemon.parcels import ParcelDown, ParcelUp, Verdict, decode_parcel_down, encode_parcel
from fedseek.daemon.reports import Event, EventLog, auditable
from fedseek.errors import AuditBroken, FedseekError, MessageError, PlanRefused, WrongKey
from fedseek.identity.enrolment import parse_renewal
from fedseek.identity.roster import Roster
from fedseek.identity.signed_roster import changes
from fedseek.lora.compute import Compute
from fedseek.plan import Plan, plan_from_canonical
from fedseek_site.admission import SiteData
from fedseek_site.enrol import SiteFolder, begin_renewal, finish_renewal, take_roster
from fedseek_site.permission import Permission
from fedseek_site.service import SiteService

AUDITED = {  # what the service tells, and what it is called in the audit record
    "answered": "answered",
    "refused": "refused",
    "ledger": "ledger",
    "round": "spent",
    "applied": "applied",
    "given-up": "given-up",
    "released": "released",
    "head-stays-home": "head-stays-home",
}
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Desk:
    """One site's counter to the courier.

    Attributes:
        site: its folder: identity, join file, the signed roster it trusts.
        service: answers messages.
        audit: the site's own record.
        permission: its policy.
        changed: called when the site's own keys were renewed: the daemon starts over with them.
        clock: Unix time in seconds.
    """

    site: SiteFolder
    service: SiteService
    audit: AuditChain = field(repr=False)
    permission: Permission = field(repr=False)
    changed: Callable[[], None] = field(repr=False)
    clock: Callable[[], float] = time.time
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(
        cls,
        site: SiteFolder,
        permission: Permission,
        audit: AuditChain,
        changed: Callable[[], None],
        *,
        report: EventLog,
        data: SiteData,
        state: Path,
        release: Path,
        computes: Sequence[Compute] = (),
    ) -> Desk:
        """A desk with the service behind it.

        Args:
            site: its folder.
            permission: its policy.
            audit: its own record.
            changed: see the class.
            report: for people here; what must hold before others goes to ``audit`` as well.
            data: its records.
            state: folder of the journal.
            release: folder of released adapters.
            computes: what each process that trains computes on.

        Raises:
            FedseekError: the journal cannot be opened.
        """

        def observe(event: Event) -> None:
            report.write(event)
            if (kind := AUDITED.get(event["event"])) is not None:
                audit.record(kind, **auditable(event))

        service = SiteService(
            site.identity,
            data,
            roster=site.trusted,
            state_folder=state,
            storage_key=site.storage_key,
            ledger=permission.ledger,
            release_folder=release,
            observe=observe,
            permit=lambda *asked: desk.permit(*asked),
            permit_release=permission.releases.permit,
            computes=computes,
        )
        desk = cls(site, service, audit, permission, changed)
        return desk

    def handle(self, data: bytes) -> bytes:
        """Open a parcel and make up the one that goes back.

        Raises:
            Malformed, TooLarge: it is no parcel.
            AuditBroken, JournalUnusable: what happens here can no longer be written down, so nothing happens.
        """
        parcel = decode_parcel_down(data)
        with self._turn:
            if parcel.roster is not None:
                self._take_roster(parcel.roster)
            countersignature = self._take_heads(parcel)
            if parcel.message is None:
                self.audit.prune()  # a greeting: once a day, between runs
            verdict = None if parcel.notice is None else self._judge(parcel.notice, parcel.run or "")
        message = None if parcel.message is None else self.service.handle(parcel.message)
        with self._turn:
            return encode_parcel(
                ParcelUp(
                    site=self.site.identity.name,
                    message=message,
                    roster_digest=self.site.signed_roster.digest(),
                    verdict=verdict,
                    standing=self.service.standing(),
                    head=self.audit.head(),
                    countersignature=countersignature,
                    renewal=self._renewal(),
                )
            )

    def permit(self, run: str, phase: str, plan: Plan, roster: Roster) -> None:
        """The service's question before a run and before each round: are keys good, and does the policy allow it?

        Raises:
            PlanRefused: no; names the rule.
            NotNow: later.
        """
        if phase == "plan":
            self._check_keys()
        self.permission.permit(run, phase, plan, roster)

    def _take_roster(self, offered: bytes) -> None:
        """Trust a newer roster of the authority; a run that is on goes on only with the roster it began with."""
        before = self.site.signed_roster
        try:
            taken = take_roster(self.site, offered)
        except FedseekError as error:
            _log.warning("a roster was refused: %s", error)
            self.audit.record("roster-refused", code=error.code, text=error.message, sha256=sha256(offered).hexdigest())
            return
        if taken.digest() == before.digest():
            return
        changed = changes(before, taken)
        who = {"added": list(changed.added), "removed": list(changed.removed), "renewed": list(changed.renewed)}
        self.audit.record("roster-taken", number=taken.number, digest=taken.digest().hex(), **who)
        self.site = replace(self.site, signed_roster=taken)
        self.service.trust(self.site.trusted)
        if finish_renewal(self.site):
            self.changed()
        elif self.site.trusted is None:
            _log.error("this site was taken off the roster: it takes part in nothing until it joins again")
            self.changed()

    def _take_heads(self, parcel: ParcelDown) -> bytes | None:
        """Write down where the others' audit chains are; sign that this site has seen it."""
        keys = self.site.record_keys
        try:
            if parcel.countersignatures:
                self.audit.note_countersignatures(parcel.seen, parcel.countersignatures, keys)
        except ValueError:
            pass  # of an exchange that this site was not in
        except (WrongKey, MessageError) as error:
            _log.warning("countersignatures refused: %s", error)
        if not parcel.heads:
            return None
        try:
            self.audit.note_heads(parcel.heads, keys)
            return self.audit.countersign(parcel.heads)
        except (AuditBroken, WrongKey, MessageError) as error:  # a contradiction is in the record, with both heads
            _log.error("audit heads refused: %s", error)
            return None

    def _judge(self, notice: bytes, run: str) -> Verdict:
        """What this site will say to a plan, told before the run, so that people can be asked in time."""
        try:
            plan = plan_from_canonical(notice)
            self._check_keys()
            status, rule = self.permission.notice(plan, self.site.signed_roster.roster, run=run)
        except PlanRefused as error:
            status, rule = "refused", error.rule
        except FedseekError as error:
            status, rule = "refused", f"the plan cannot be used here ({error.code})"
        return Verdict(status=status, rule=rule[:200])

    def _check_keys(self) -> None:
        if expired := self.site.signed_roster.expired(self.clock()):
            raise PlanRefused(
                self.site.identity.name,
                f"roster: keys of {', '.join(expired)} have expired",
                hint="the operator admits them anew, or revokes them",
            )

    def _renewal(self) -> bytes | None:
        """New keys for this site, signed with the old ones, when those have a third of their life left."""
        mine = self.site.member
        if mine is None or not mine.due(self.clock()):
            return None
        renewal = begin_renewal(self.site, now=self.clock())
        self.audit.announce_key(parse_renewal(renewal).request.entry.signing_key)  # the record goes on under either
        return renewal
