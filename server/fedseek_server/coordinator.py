"""The coordinator's side of a run, with no network in it: requests out, replies in.

:meth:`Coordinator.play` reads like the protocol: it yields one :class:`Exchange` after another; whoever drives it
delivers the requests, hands each reply to :meth:`Coordinator.receive` as it comes, and asks for the next exchange when
all have answered or will not any more.

    plan, shares            once: who runs it, and the shares for round 1
    round, unmask           each round: masked updates up, then the shares that open their sum
    close, unmask           the same once more, for the final metrics
    release                 once
    key                     when a group key is wanted

A site that does not answer is missing from that round and comes back two rounds later: *unmask* offers it the plan
again, the next *round* asks it for shares, and in the one after it takes part. Nobody else waits for it.

It holds no key and imports no type that could: what it adds, it cannot read. What it may learn is in the trust table
(docs/protocol.md): who takes part, when, how many bytes, and what sites publish in their statements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedseek.cohort import Federation
from fedseek.errors import CohortTooSmall, CustodyError, FedseekError, MessageError, WrongRound
from fedseek.identity.roster import Roster
from fedseek.messages import AggregateDown, KeyRequest, Refused, ReleaseApproved, Request, decode_reply, encode_message
from fedseek.plan import Plan
from fedseek_server.envelopes import NO_EPOCH
from fedseek_server.history import given_up
from fedseek_server.replies import largest_reply, refusal, take_reply
from fedseek_server.requests import plan_offers, release_requests, round_requests, share_requests, unmask_requests
from fedseek_server.rounds import finish_round
from fedseek_server.state import Observe, RunState

Nodes = Callable[[], Sequence[int]]
NOTHING_OPENED = "the run's record says of each round why"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message to each of some nodes; a reply from each is wanted, and none is waited for beyond reason.

    Attributes:
        phase: plan, shares, key, round, unmask, close or release. Within one, nodes may be asked different things.
        round: that it belongs to; the closing round is the one after the plan's last.
        requests: encoded, by node.
    """

    phase: str
    round: int
    requests: Mapping[int, bytes]


class Coordinator:
    """One run.

    Args:
        plan: the checked plan.
        roster: the sites that may take part.
        run: a name for the run, unique.
        observe: told of phases, bytes, seconds and who was missing, for progress and the run's record.
        clock: Unix time in seconds; tells the age of the group key.
    """

    def __init__(
        self, plan: Plan, roster: Roster, *, run: str, observe: Observe, clock: Callable[[], float] = time.time
    ) -> None:
        self.plan = plan
        self.roster = roster
        self.run = run
        self._state = RunState.of(Federation.of(run, plan, roster), observe)
        self._observe = observe
        self._clock = clock
        self._nodes: Nodes = tuple
        self._here: Sequence[int] = ()
        self._rotation_wanted = False
        self._open = Exchange("none", 0, {})
        self._asked: Mapping[int, Request] = {}
        self._answered: set[int] = set()

    @property
    def approvals(self) -> dict[str, ReleaseApproved]:
        """Sites that approved the release, and what they signed."""
        return self._state.approvals

    @property
    def contributors(self) -> tuple[str, ...]:
        """Sites whose update is in the adapter; each of them must approve a release. In roster order."""
        return self._state.history.contributors(self.plan.spec.training.rounds)

    def request_rotation(self) -> None:
        """Have a new group key made before the next round."""
        self._rotation_wanted = True

    def play(self, nodes: Nodes) -> Iterator[Exchange]:
        """The whole run, exchange by exchange.

        The same replies in the same exchanges, with the same nodes there, give the same requests.

        Args:
            nodes: tells which nodes are connected; asked anew for each exchange, so that late ones are found.

        Raises:
            CohortTooSmall: too few sites for the run, no round that could be opened, or no closing round.
        """
        self._nodes = nodes
        yield from self._admit()
        yield from self._deal()
        for number in range(1, self._state.closing):
            yield from self._play_round(number, "round")
        if not self.contributors:
            raise CohortTooSmall("no round of training could be opened", hint=NOTHING_OPENED)
        yield from self._play_round(self._state.closing, "close")
        if not self._state.history.ended[-1].survivors:
            raise CohortTooSmall("the closing round could not be opened", hint=NOTHING_OPENED)
        yield from self._ask("release", self._state.closing, release_requests(self._state, self._look()))

    def receive(self, node: int, data: bytes) -> None:
        """Take one reply. A reply that is refused changes nothing, and the node may still send a right one.

        Raises:
            MessageError, CustodyError: it does not parse, is too large, answers another request, or is not signed by
                whom it names. The driver tells ``reject`` and goes on.
            PlanRefused, SiteRefused: the site says no; the run is over. A site that finds too few others in a round
                only counts as missing from it.
            WrongModel, AdapterDiverged: sites hold different models or adapters; the run is over.
        """
        if node not in self._asked or node in self._answered:
            raise WrongRound(f"node {node} answered {self._open.phase!r} unasked or twice")
        asked = self._asked[node]
        reply = decode_reply(data, limit=largest_reply(self._state, asked))
        self._state.admissions.check_sender(node, reply.site)
        if isinstance(reply, Refused):
            self._take_refusal(reply)
            return
        if reply.run != self.run:
            raise WrongRound(f"site {reply.site!r} answered for run {reply.run!r}, this is {self.run!r}")
        take_reply(self._state, node, asked, reply, nodes=self._here, now=self._clock())
        self._answered.add(node)
        sizes = {"bytes_in": len(data), "bytes_out": len(self._open.requests[node])}
        self._tell("reply", site=reply.site, answer=type(reply).__name__, **sizes)

    def reject(self, node: int, error: FedseekError) -> None:
        """Record that a reply of this node was refused. Unless a right one follows, the site counts as missing."""
        site = self._state.admissions.sites.get(node)
        self._tell("rejected", node=node, site=site, code=error.code, text=error.message)

    def _take_refusal(self, reply: Refused) -> None:
        """A site that finds too few others gives up the round, as this side would; any other "no" ends the run."""
        if reply.code != CohortTooSmall.__name__:
            raise refusal(reply)
        self._tell("declined", site=reply.site, code=reply.code)

    def _admit(self) -> Iterator[Exchange]:
        self._look()
        key_maker = min(self._here, default=None)  # which site it is shows when it answers
        yield from self._ask("plan", 1, plan_offers(self._state, self._here, 1, key_maker=key_maker))
        connected, absent = self._look(), self._state.admissions.missing()
        if absent:
            self._tell("absent", sites=list(absent))
        wanted = self.plan.spec.cohort.min_sites
        if len(connected) < wanted:
            raise CohortTooSmall(
                f"{len(connected)} sites admitted the plan, wanted at least {wanted}",
                hint=f"not admitted: {', '.join(absent) or 'none'}; the rest are no longer connected",
            )
        if self._state.envelopes.epoch == NO_EPOCH:
            yield from self._make_key(0, 1, connected)
        if self._state.envelopes.epoch == NO_EPOCH:
            raise CohortTooSmall("no site made a group key", hint="each that admitted the plan was asked")

    def _deal(self) -> Iterator[Exchange]:
        connected = self._look()
        self._state.pipeline.fix_list(1, connected)
        yield from self._ask("shares", 1, share_requests(self._state, connected, 1))

    def _play_round(self, number: int, phase: str) -> Iterator[Exchange]:
        state = self._state
        yield from self._rotate(number)
        connected = self._look()
        if number < state.closing:
            state.pipeline.fix_list(number + 1, connected)
        state.open_round(number, state.pipeline.participants(number, connected))
        yield from self._ask(phase, number, round_requests(state, connected, number))
        self._look()
        yield from self._ask("unmask", number, unmask_requests(state, self._here, number))
        self._end_round(number, phase)

    def _end_round(self, number: int, phase: str) -> None:
        """Open the sum, or give the round up; either way the next one begins."""
        state = self._state
        try:
            ended = self._finish_round(number, phase)
        except (CohortTooSmall, MessageError, CustodyError) as error:
            self._observe({"event": "round-failed", "round": number, "code": error.code, "text": error.message})
            ended = given_up(number, state.envelopes.epoch)
        state.masked = None
        state.history.ended.append(ended)
        state.pipeline.forget(number)

    def _finish_round(self, number: int, phase: str) -> AggregateDown:
        masked, started = self._state.masked, time.perf_counter()
        if masked is None:
            raise CohortTooSmall(f"round {number}: too few sites could take part")
        ended = finish_round(masked)
        unmasking = time.perf_counter() - started
        self._observe({"event": "aggregated", "phase": phase, "round": number, "seconds": masked.adding_seconds})
        who = {"survivors": list(masked.survivors), "vanished": list(masked.vanished)}
        self._observe({"event": "unmasked", "round": number, "seconds": unmasking, **who})
        return ended

    def _rotate(self, number: int) -> Iterator[Exchange]:
        """Have the next group key made, if it is time. Should nobody make it, the old one stays: sites know its age."""
        envelopes = self._state.envelopes
        if not (self._rotation_wanted or envelopes.is_old(now=self._clock())):
            return
        connected, epoch = self._look(), envelopes.epoch + 1
        there = self._state.pipeline.participants(number, connected)
        able = {site: connected[site] for site in there if envelopes.can_make_next(site)}
        yield from self._make_key(epoch, number, able)
        if envelopes.epoch == epoch:
            self._rotation_wanted = False
        else:
            self._observe({"event": "rotation-postponed", "round": number, "epoch": epoch})

    def _make_key(self, epoch: int, number: int, sites: Mapping[str, int]) -> Iterator[Exchange]:
        """Ask one site after another until one has made the key."""
        for node in sites.values():
            yield from self._ask("key", number, {node: KeyRequest(run=self.run, epoch=epoch)})
            if self._state.envelopes.epoch == epoch:
                return

    def _ask(self, phase: str, number: int, requests: Mapping[int, Request]) -> Iterator[Exchange]:
        """One exchange; none if nobody is asked. Whoever has not answered when it is over is missing."""
        if not requests:
            return
        encoded = {node: encode_message(request) for node, request in requests.items()}
        self._open, self._asked, self._answered = Exchange(phase, number, encoded), requests, set()
        self._tell("phase", sites=len(requests))
        yield self._open
        for node in requests:
            if node not in self._answered:
                self._tell("dropout", node=node, site=self._state.admissions.sites.get(node))
        self._asked = {}

    def _tell(self, event: str, **details: object) -> None:
        self._observe({"event": event, "phase": self._open.phase, "round": self._open.round, **details})

    def _look(self) -> dict[str, int]:
        """See who is there now: the admitted sites and their nodes, in roster order."""
        self._here = sorted(self._nodes())
        return self._state.admissions.connected(self._here)
