"""The coordinator's side of a run, with no network in it: requests out, replies in.

:meth:`Coordinator.play` reads like the protocol: it yields one :class:`Exchange` after another; whoever drives it
delivers the requests, hands each reply to :meth:`Coordinator.receive` as it comes, and asks for the next exchange when
all have answered or will not any more.

    plan, shares            once: who runs it, and the shares for round 1
    round, unmask           each round: masked updates up, then the shares that open their sum
    close, unmask           the same once more, for the final metrics
    release                 until enough sites have approved (approving.py), with pauses between
    key                     when a group key is wanted

A site that does not answer is missing from that round and comes back two rounds later: *unmask* offers it the plan
again, the next *round* asks it for shares, and in the one after it takes part. Nobody else waits for it.

Everything that it learns from outside comes as a look at the nodes and the clock, as a reply, or as a wish for a new
group key; the same of these give the same requests, to the byte. So a record of them is enough to go on after a crash
(``recorded.py``). Between two rounds no sum is open, and the state is small (``snapshot.py``).

It holds no key and imports no type that could: what it adds, it cannot read. What it may learn is in the trust table
(docs/protocol.md): who takes part, when, how many bytes, and what sites publish in their statements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from fedseek.cohort import Federation
from fedseek.errors import (
    CohortTooSmall,
    CustodyError,
    FedseekError,
    InvalidPlan,
    MessageError,
    NotNow,
    PlanRefused,
    TooLarge,
    WrongRound,
)
from fedseek.identity.roster import Roster
from fedseek.messages import (
    AggregateDown,
    Continuation,
    KeyRequest,
    PlanOffer,
    Refused,
    ReleaseApproved,
    ReleaseRequest,
    Request,
    decode_reply,
)
from fedseek.plan import Plan
from fedseek_server import approving
from fedseek_server.envelopes import NO_EPOCH
from fedseek_server.exchange import Exchange, Requests
from fedseek_server.history import EndedRounds, RoundsInMemory, given_up
from fedseek_server.replies import largest_reply, refusal, take_reply
from fedseek_server.requests import plan_offers, release_requests, round_requests, share_requests, unmask_requests
from fedseek_server.rounds import finish_round
from fedseek_server.snapshot import Snapshot, put_back, take_snapshot
from fedseek_server.state import Observe, RunState

Nodes = Callable[[], Sequence[int]]
NOTHING_OPENED = "the run's record says of each round why"
MISSING_ONLY = frozenset(
    {CohortTooSmall.__name__, NotNow.__name__}
)  # a "no" that costs a site the round, nobody the run


class Coordinator:
    """One run.

    Args:
        plan: the checked plan.
        roster: the sites that may take part.
        run: a name for the run, unique.
        observe: told of phases, bytes, seconds and who was missing, for progress and the run's record.
        clock: Unix time in seconds, read as often as the nodes are looked at; tells the age of the group key.
        continues: the adapter of another run that this one goes on from.
        ended: where the ends of rounds lie.
        checkpoint: called between two rounds, when ``snapshot`` may be taken.
        all_needed: a site that refuses the plan ends the run; else it is only not in it.
        wait_seconds: for approvals of the release; None: as the plan says. In a simulation there is nobody to wait for.

    Raises:
        InvalidPlan: there is no round of the plan left after the one it goes on from.
    """

    def __init__(
        self,
        plan: Plan,
        roster: Roster,
        *,
        run: str,
        observe: Observe,
        clock: Callable[[], float] = time.time,
        continues: Continuation | None = None,
        ended: EndedRounds | None = None,
        checkpoint: Callable[[], None] = lambda: None,
        all_needed: bool = True,
        wait_seconds: float | None = None,
    ) -> None:
        self.plan = plan
        self.roster = roster
        self.run = run
        places = RoundsInMemory() if ended is None else ended
        self._state = RunState.of(Federation.of(run, plan, roster), observe, places, continues)
        if self._state.history.first > self._state.closing:
            raise InvalidPlan([f"goes on from round {self._state.history.first - 1}, has {self._state.closing - 1}"])
        self._observe = observe
        self._clock = clock
        self._checkpoint = checkpoint
        self._all_needed = all_needed
        self._refused: dict[str, str] = {}  # sites that are not in the run, and their rule
        self._wait_seconds = plan.spec.release.wait_hours * 3600.0 if wait_seconds is None else wait_seconds
        self._nodes: Nodes = tuple
        self._here: Sequence[int] = ()
        self._open, self._requests = ("none", 0), Requests({})  # phase and round of the exchange under way
        self._asked: Mapping[int, Request] = {}
        self._answered: set[int] = set()

    @property
    def approvals(self) -> dict[str, ReleaseApproved]:
        """Sites that approved the release, and what they signed."""
        return self._state.approvals

    @property
    def contributors(self) -> tuple[str, ...]:
        """Sites whose update is in the adapter, in roster order; as many as the plan says must approve a release."""
        return approving.contributors(self._state)

    def request_rotation(self) -> None:
        """Have a new group key made before the next round."""
        self._state.rotation_wanted = True

    def ask_again(self, now: float) -> None:
        """Wait for approvals of the release once more, from ``now`` on, as long as before; before ``play`` goes on."""
        self._state.asked_since, self._state.asked_until = now, now + self._wait_seconds

    def snapshot(self) -> Snapshot:
        """What ``resume`` goes on from; to be taken when ``checkpoint`` is called."""
        return take_snapshot(self._state)

    def resume(self, snapshot: Snapshot) -> None:
        """Go to where the snapshot was taken; before ``play``. What ended before it is to be found in ``ended``."""
        put_back(self._state, snapshot)

    def play(self, nodes: Nodes) -> Iterator[Exchange]:
        """The whole run, exchange by exchange; once.

        The same replies in the same exchanges, with the same nodes there at the same times, give the same requests.

        Args:
            nodes: tells which nodes are connected; asked anew for each exchange, so that late ones are found.

        Raises:
            CohortTooSmall: too few sites for the run, no round that could be opened, or no closing round.
            ReleaseRefused: too few sites approved the release in the time that the plan gives them.
        """
        self._nodes = nodes
        state, first = self._state, self._state.history.first
        if state.next_round < first:
            yield from self._admit(first)
            yield from self._deal(first)
            self._begin_next(first)
        for number in range(state.next_round, state.closing):
            yield from self._play_round(number, "round")
        if not self.contributors:
            raise CohortTooSmall("no round of training could be opened", hint=NOTHING_OPENED)
        if state.next_round == state.closing:
            yield from self._play_round(state.closing, "close")
        if not state.history.read(state.closing).survivors:
            raise CohortTooSmall("the closing round could not be opened", hint=NOTHING_OPENED)
        yield from self._release()

    def unanswered(self) -> Exchange:
        """The exchange under way, with the requests that have not been answered."""
        waiting = {node: asked for node, asked in self._asked.items() if node not in self._answered}
        return Exchange(*self._open, Requests(waiting))

    def check_asked(self, node: int, size: int) -> None:
        """Check that a reply of this many bytes is wanted of this node.

        Raises:
            WrongRound: the node was not asked, or has answered.
            TooLarge: it has no reason to send so much.
        """
        if node not in self._asked or node in self._answered:
            raise WrongRound(f"node {node} answered {self._open[0]!r} unasked or twice")
        limit = largest_reply(self._state, self._asked[node])
        if size > limit:
            raise TooLarge(f"reply of node {node}: got {size} bytes, wanted at most {limit}")

    def receive(self, node: int, data: bytes) -> None:
        """Take one reply. A reply that is refused changes nothing, and the node may still send a right one.

        Raises:
            MessageError, CustodyError: it does not parse, is too large, answers another request, or is not signed by
                whom it names. The driver tells ``reject`` and goes on.
            PlanRefused, SiteRefused: the site says no; the run is over. A site that finds too few others in a round
                only counts as missing from it, and one that is not in the adapter cannot refuse its release.
            WrongModel, AdapterDiverged: sites hold different models or adapters; the run is over.
        """
        self.check_asked(node, len(data))
        asked = self._asked[node]
        reply = decode_reply(data)
        self._state.admissions.check_sender(node, reply.site)
        if isinstance(reply, Refused):
            self._take_refusal(asked, reply)
            return
        if reply.run != self.run:
            raise WrongRound(f"site {reply.site!r} answered for run {reply.run!r}, this is {self.run!r}")
        take_reply(self._state, node, asked, reply, nodes=self._here, now=self._state.now)
        self._answered.add(node)
        sizes = {"bytes_in": len(data), "bytes_out": self._requests.size(node)}
        self._tell("reply", site=reply.site, answer=type(reply).__name__, **sizes)

    def reject(self, node: int, error: FedseekError) -> None:
        """Record that a reply of this node was refused. Unless a right one follows, the site counts as missing."""
        site = self._state.admissions.sites.get(node)
        self._tell("rejected", node=node, site=site, code=error.code, text=error.message)

    def _take_refusal(self, asked: Request, reply: Refused) -> None:
        """A "no" that only counts as missing, or one that ends the run.

        A site that cannot go on from the other run is not in this one, nor is one that refuses the plan where not all are
        needed; whether that leaves too few is known when all have answered.
        """
        if isinstance(asked, ReleaseRequest):
            self._put_off(reply)
            return
        stays_out = isinstance(asked, PlanOffer) and reply.code == PlanRefused.__name__
        is_missed = self._all_needed and not (isinstance(asked, PlanOffer) and asked.continues)
        if reply.code not in MISSING_ONLY and (is_missed or not stays_out):
            raise refusal(reply)
        self._refused[reply.site] = reply.rule
        self._tell("declined", site=reply.site, code=reply.code, rule=reply.rule)

    def _put_off(self, reply: Refused) -> None:
        """A site does not approve the release: not yet, or never. The same word again is not told again."""
        if reply.code not in MISSING_ONLY and reply.site in self.contributors:
            raise refusal(reply)
        if self._state.put_off.get(reply.site) != reply.rule:
            self._state.put_off[reply.site] = reply.rule
            self._tell("declined", site=reply.site, code=reply.code, rule=reply.rule)

    def _admit(self, first: int) -> Iterator[Exchange]:
        self._look()
        key_maker = min(self._here, default=None)  # which site it is shows when it answers
        yield from self._ask("plan", first, plan_offers(self._state, self._here, first, key_maker=key_maker))
        connected, absent = self._look(), self._state.admissions.missing()
        if absent:
            self._tell("absent", sites=list(absent))
        wanted = self.plan.spec.cohort.min_sites
        if len(connected) < wanted:
            raise CohortTooSmall(
                f"{len(connected)} sites admitted the plan, wanted at least {wanted}",
                hint="; ".join(f"{site}: {self._refused.get(site, 'not admitted')}" for site in absent)
                or "all admitted it, and some are no longer connected",
            )
        lost = [site for site in self.contributors if site in absent]  # of the run that this one goes on from
        if lost:
            raise CohortTooSmall(
                f"updates of {', '.join(lost)} are in the adapter that this run goes on from, and they are not in it",
                hint="without their approval there is no release; begin once more when they are there",
            )
        if self._state.envelopes.epoch == NO_EPOCH:
            yield from self._make_key(0, first, connected)
        if self._state.envelopes.epoch == NO_EPOCH:
            raise CohortTooSmall("no site made a group key", hint="each that admitted the plan was asked")

    def _deal(self, first: int) -> Iterator[Exchange]:
        connected = self._look()
        self._state.pipeline.fix_list(first, connected)
        yield from self._ask("shares", first, share_requests(self._state, connected, first))

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

    def _release(self) -> Iterator[Exchange]:
        """Ask for approvals until there are enough (``approving``)."""
        state, number, asks = self._state, self._state.closing, 0
        sending = approving.senders(state)
        while True:
            had_enough, connected = approving.has_enough(state), self._look()
            if not state.asked_since:
                self.ask_again(state.now)
            yield from self._ask("release", number, release_requests(state, connected, sending))
            self._observe({"event": "approvals", "phase": "release", "round": number, **approving.how_far(state)})
            if had_enough or not approving.missing(state):
                return
            # whether the wait is over is asked after an exchange is over: there ``ask_again`` can come between
            yield Exchange("release", number, {}, pause_seconds=approving.pause(state))
            if state.now >= state.asked_until and not approving.has_enough(state):
                raise approving.refused(state)
            asks += 1
            if asks % approving.ASKS_A_SNAPSHOT == 0:
                self._checkpoint()

    def _end_round(self, number: int, phase: str) -> None:
        """Open the sum, or give the round up; either way the next one begins."""
        state = self._state
        try:
            ended = self._finish_round(number, phase)
        except (CohortTooSmall, MessageError, CustodyError) as error:
            self._observe({"event": "round-failed", "round": number, "code": error.code, "text": error.message})
            ended = given_up(number, state.envelopes.epoch)
        state.masked = None
        state.history.end(ended)
        state.pipeline.forget(number)
        self._begin_next(number + 1)

    def _begin_next(self, number: int) -> None:
        """Between two rounds: no sum is open, nobody is asked anything."""
        self._state.next_round = number
        self._checkpoint()

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
        envelopes, connected = self._state.envelopes, self._look()
        if not (self._state.rotation_wanted or envelopes.is_old(now=self._state.now)):
            return
        epoch = envelopes.epoch + 1
        there = self._state.pipeline.participants(number, connected)
        able = {site: connected[site] for site in there if envelopes.can_make_next(site)}
        yield from self._make_key(epoch, number, able)
        if envelopes.epoch == epoch:
            self._state.rotation_wanted = False
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
        self._open, self._requests = (phase, number), Requests(requests)
        self._asked, self._answered = requests, set()
        self._tell("phase", sites=len(requests))
        yield Exchange(phase, number, self._requests)
        for node in requests:
            if node not in self._answered and self._state.admissions.sites.get(node) not in self._state.put_off:
                self._tell("dropout", node=node, site=self._state.admissions.sites.get(node))
        self._asked = {}

    def _tell(self, event: str, **details: object) -> None:
        phase, number = self._open
        self._observe({"event": event, "phase": phase, "round": number, **details})

    def _look(self) -> dict[str, int]:
        """See who is there now, and what time it is: the admitted sites and their nodes, in roster order."""
        self._here = sorted(self._nodes())
        self._state.now = self._clock()
        return self._state.admissions.connected(self._here)
