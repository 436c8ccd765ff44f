"""Playing one run that was asked for: wait for the sites, go through its exchanges, write the release, say how it ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec.structs import replace

from fedseek.daemon.audit import AuditChain
from fedseek.daemon.process import following
from fedseek.daemon.reports import Event, EventLog, auditable, peak_rss_mb
from fedseek.errors import AuditBroken, CohortTooSmall, Expired, FedseekError, JournalUnusable, Stopped
from fedseek.identity.roster import Roster
from fedseek.plan import Plan
from fedseek_server.continuing import last_common
from fedseek_server.driver import Driver
from fedseek_server.exchange import Exchange
from fedseek_server.flower import FlowerLink
from fedseek_server.mail import Greeting, Mail, Posted
from fedseek_server.orders import RunFolder, Status
from fedseek_server.recorded import RecordedRun
from fedseek_server.releasing import audit_heads, write_release

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two greetings while sites are waited for
GREETING_SECONDS: Final = 60.0  # that a greeting waits for its slowest site
AUDITED: Final = {
    "reply": "reply",
    "rejected": "reply-refused",
    "declined": "declined",
    "dropout": "dropout",
    "unmasked": "round-ended",
    "round-failed": "round-failed",
    "absent": "absent",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Network:
    """How a run reaches its sites.

    Attributes:
        link: to the SuperLink.
        mail: what travels around messages.
        largest_update: bytes of the largest reply taken.
        settle_seconds: see ``Settled``.
        stop: set when the process is to end.
    """

    link: FlowerLink = field(repr=False)
    mail: Mail = field(repr=False)
    largest_update: int
    settle_seconds: float
    stop: threading.Event = field(repr=False)

    def driver(self, stop: threading.Event, seconds: float) -> Driver:
        """One that waits so long for the slowest site of an exchange."""
        return Driver(self.link, deadline=lambda exchange: seconds, stop=stop, limit=self.largest_update)


def play_run(network: Network, folder: RunFolder) -> None:
    """Play one run to its end, or until the process is to stop: then it stays open and is taken up at the next start.

    Raises:
        JournalUnusable, AuditBroken: nothing more can be written down. The run stays open, too; nothing of it is lost.
    """
    report = EventLog(folder.report)
    try:
        with following(network.stop, lambda: folder.is_to_stop) as stop:
            _play(network, folder, stop, report)
    except Stopped:
        if folder.is_to_stop:
            _end(network, folder, state="stopped")
    except (JournalUnusable, AuditBroken):
        if not folder.is_to_stop:  # the way out where it will never be writable again
            raise
        _end(network, folder, state="stopped")
    except FedseekError as error:
        _end(network, folder, state="failed", code=error.code, text=error.message[:4096], hint=error.hint[:4096])
    finally:
        report.close()


def _play(network: Network, folder: RunFolder, stop: threading.Event, report: EventLog) -> None:
    order, plan, mail = folder.order(), folder.plan(), network.mail
    progress = Progress(folder, plan, report, network.mail.audit, order.run)
    log_folder = folder.path / "log"
    if RecordedRun.exists(log_folder):
        recorded = RecordedRun.reopen(log_folder, observe=progress.see)
    else:
        progress.audit.record("run-asked-for", run=order.run, plan=plan.digest, rounds=plan.rounds)
        roster = wait_for_sites(network, folder, plan, stop)
        continues = last_common(mail.standings, order.continues, roster) if order.continues else None
        recorded = RecordedRun.begin(
            log_folder, plan=plan, roster=roster, run=order.run, continues=continues, observe=progress.see
        )
    try:
        if folder.is_to_ask_again:
            recorded.ask_again()
            progress.audit.record("release-asked-again", run=order.run)
            folder.asked_again()
        folder.write_status(Status(run=order.run, state="running", rounds=plan.rounds))
        conductor = Posted(order.run, Settled(recorded, network.settle_seconds, stop), mail)
        network.driver(stop, plan.spec.cohort.deadline_seconds).drive(conductor)
        if not folder.release.exists():  # written whole: by a process that was killed before it could say so
            heads = audit_heads(recorded.coordinator.roster, *mail.heads_seen())
            write_release(recorded.coordinator, folder.release, heads=heads)
    finally:
        recorded.close()
    report.write({"event": "finished", "coordinator_rss_mb": peak_rss_mb()})
    _end(network, folder, state="released")


def wait_for_sites(network: Network, folder: RunFolder, plan: Plan, stop: threading.Event) -> Roster:
    """Announce the plan until every site of the roster is ready, or until the order's time is over.

    Returns:
        The roster in force.

    Raises:
        CohortTooSmall: fewer sites are ready than the plan wants, or so many refuse that it can never be enough.
        Stopped: the process is to end, or the run.
    """
    order, mail = folder.order(), network.mail
    wanted, pause = plan.spec.cohort.min_sites, FIRST_PAUSE
    until = time.monotonic() + order.wait_seconds
    names = [member.entry.name for member in mail.roster.members]
    if expired := mail.roster.expired(time.time()):
        raise Expired(
            f"keys of {', '.join(expired)} have expired, so no site takes this roster",
            hint="admit them anew, or revoke them",
        )
    while True:
        network.driver(stop, GREETING_SECONDS).drive(Greeting(mail, order.run, plan.canonical()))
        words = {name: _word_of(mail, name) for name in names}
        folder.write_status(Status(run=order.run, state="waiting", sites=words))
        ready = [name for name in names if words[name] == "ready"]
        refused = [name for name in names if words[name].startswith("refused")]
        is_over = time.monotonic() > until
        if len(ready) == len(names) or (len(ready) >= wanted and (is_over or len(ready) + len(refused) == len(names))):
            return mail.roster.roster
        if is_over or len(names) - len(refused) < wanted:
            raise CohortTooSmall(
                f"{len(ready)} sites are ready for the plan, wanted at least {wanted}",
                hint="; ".join(f"{name}: {word}" for name, word in words.items()) or "the roster has no sites",
            )
        if stop.wait(pause):
            raise Stopped("stopped while waiting for sites")
        pause = min(2 * pause, LONGEST_PAUSE)


def _word_of(mail: Mail, site: str) -> str:
    verdict = mail.verdicts.get(site)
    if verdict is None:
        return "away"
    if verdict.status == "ready":
        return "ready" if mail.holds_roster(site) else "waiting: takes the new roster"
    return f"{verdict.status}: {verdict.rule}"


@dataclass(slots=True)
class Settled:
    """A run that does not take a site for gone that was connected a moment ago.

    After a restart of the SuperLink or of a courier, sites need seconds to be back.
    """

    inner: RecordedRun = field(repr=False)
    seconds: float
    stop: threading.Event = field(repr=False)
    expected: frozenset[int] = frozenset()

    def play(self, nodes: Callable[[], Sequence[int]]) -> Iterator[Exchange]:
        """The run's exchanges."""
        self.expected = frozenset(self.inner.last_nodes)
        yield from self.inner.play(lambda: self._settled(nodes))

    def receive(self, node: int, data: bytes) -> None:
        """Take one reply."""
        self.inner.receive(node, data)

    def reject(self, node: int, error: FedseekError) -> None:
        """Be told that a reply was refused."""
        self.inner.reject(node, error)

    def _settled(self, nodes: Callable[[], Sequence[int]]) -> list[int]:
        until = time.monotonic() + self.seconds
        while True:
            here = sorted(nodes())
            if self.expected <= set(here) or time.monotonic() > until:
                self.expected = frozenset(here)
                return here
            if self.stop.wait(0.2):
                raise Stopped("stopped while waiting for sites to come back")


@dataclass(frozen=True, slots=True)
class Progress:
    """Writes down what happens in a run: the report, the status, and what must hold before others."""

    folder: RunFolder
    plan: Plan = field(repr=False)
    report: EventLog = field(repr=False)
    audit: AuditChain = field(repr=False)
    run: str

    def see(self, event: Event) -> None:
        """One event of the coordinator."""
        self.report.write(event)
        kind = AUDITED.get(event["event"])
        if kind is not None:
            self.audit.record(kind, run=self.run, **auditable(event))
        if event["event"] not in ("phase", "approvals"):
            return
        rounds, before = self.plan.rounds, self.folder.status()
        told = Status(run=self.run, state="running", phase=event["phase"], round=event["round"], rounds=rounds)
        if event["event"] == "approvals":
            told = replace(told, sites=event["sites"], approvals_wanted=event["wanted"])
        elif before.approvals_wanted:  # the same sites are asked again: their words stand until there are others
            told = replace(told, sites=before.sites, approvals_wanted=before.approvals_wanted)
        self.folder.write_status(told)


def _end(network: Network, folder: RunFolder, **told: Any) -> None:
    before = folder.status()
    folder.write_status(
        Status(
            run=before.run,
            phase=before.phase,
            round=before.round,
            rounds=before.rounds,
            sites=before.sites,
            approvals_wanted=before.approvals_wanted,
            **told,
        )
    )
    network.mail.audit.record("run-over", run=before.run, **told)
    _log.info("run %s: %s %s", before.run, told["state"], told.get("text", ""))
