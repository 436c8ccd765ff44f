"""The coordinator's side of a run, with no network in it: requests out, replies in.

:meth:`Coordinator.play` reads like the protocol: it yields one :class:`Exchange` after another; whoever drives it
delivers the requests, hands each reply to :meth:`Coordinator.receive` as it comes, and asks for the next.

It holds no key and imports no type that could: what it adds, it cannot read. What it may learn is in the trust table
(docs/protocol.md): who takes part, when, how many bytes, and what sites publish in their statements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fedseek.aggregate import Aggregate, agg_finish, agg_init, agg_update
from fedseek.errors import (
    AdapterDiverged,
    CohortTooSmall,
    FedseekError,
    Malformed,
    PlanRefused,
    SiteRefused,
    WrongModel,
    WrongRound,
)
from fedseek.he.ciphertext import ScopedSum
from fedseek.identity.roster import Roster
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PLAN, CONTEXT_RELEASE, join_fields, verify
from fedseek.messages import (
    AggregateDown,
    CloseRequest,
    KeyRequest,
    KeysSealed,
    PlanAdmitted,
    PlanOffer,
    Refused,
    ReleaseApproved,
    ReleaseRequest,
    Reply,
    RoundRequest,
    UpdateReply,
    decode_reply,
    digest_message,
    encode_message,
    release_message,
    reply_limit,
)
from fedseek.plan import GLOBAL_SCOPE, Plan

EPOCH = 0
MIN_SITES_IN_SUM = 2  # of any scope; how many sites a run needs is the plan's cohort.min_sites, checked by each site
SETUP_REPLY_BYTES = 64 << 20  # admissions and sealed keys: 1024 sites x 35 KB envelopes
Observe = Callable[[dict[str, Any]], None]
R = TypeVar("R", bound=Reply)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message to each of some nodes, and one reply from each is wanted."""

    phase: str
    round: int
    requests: Mapping[int, bytes]


class Coordinator:
    """One run.

    Args:
        plan: the checked plan.
        roster: the sites that take part; all of them must answer.
        run: a name for the run, unique.
        observe: told of phases, bytes and seconds, for progress and the run's record.
    """

    def __init__(self, plan: Plan, roster: Roster, *, run: str, observe: Observe) -> None:
        self.plan = plan
        self.roster = roster
        self.run = run
        self.approvals: dict[str, ReleaseApproved] = {}
        self._observe = observe
        self._sites: dict[int, str] = {}
        self._admitted: dict[str, PlanAdmitted] = {}
        self._envelopes: dict[str, bytes] = {}
        self._aggregate: Aggregate | None = None
        self._digests: dict[str, tuple[str, bytes]] = {}
        self._expected = Exchange("none", 0, {})
        self._answered: set[int] = set()
        self._aggregate_seconds = 0.0

    def play(self, nodes: list[int]) -> Iterator[Exchange]:
        """The whole run, exchange by exchange.

        Raises:
            FedseekError: a site refused, answered wrongly, or did not answer; or adapters differ.
        """
        offer = PlanOffer(run=self.run, plan=self.plan.canonical(), roster=self.roster.canonical_bytes())
        yield self._open("plan", 0, dict.fromkeys(nodes, encode_message(offer)))
        self._check_cohort()

        key_maker = min(self._sites, key=lambda node: self._sites[node])  # first on the roster: names are sorted
        yield self._open("key", 0, {key_maker: encode_message(KeyRequest(run=self.run, epoch=EPOCH))})
        self._all_answered()

        rounds = self.plan.spec.training.rounds
        sums: tuple[ScopedSum, ...] = ()
        for number in range(1, rounds + 1):
            self._start_sum(self._ciphertexts())
            yield self._open("round", number, self._round_requests(number, sums))
            sums = self._finish_sum()

        self._start_sum({scope: n for scope, n in self._ciphertexts().items() if scope != GLOBAL_SCOPE})
        yield self._open("close", rounds, self._close_requests(rounds, sums))
        metrics = self._finish_sum()

        yield self._open("release", rounds, self._release_requests(rounds, metrics))
        self._all_answered()

    def receive(self, node: int, data: bytes) -> None:
        """Take one reply. A reply that is refused changes nothing.

        Raises:
            MessageError: it does not parse, is too large, or answers another request.
            PlanRefused, SiteRefused: the site says no.
        """
        if node not in self._expected.requests or node in self._answered:
            raise WrongRound(f"node {node} answered {self._expected.phase!r} unasked or twice")
        reply = decode_reply(data, limit=self._limit())
        if isinstance(reply, Refused):
            raise refusal(reply)
        if reply.run != self.run:
            raise WrongRound(f"site {reply.site!r} answered for run {reply.run!r}, this is {self.run!r}")
        self._take(node, reply)
        self._answered.add(node)
        self._observe(
            {
                "event": "reply",
                "phase": self._expected.phase,
                "round": self._expected.round,
                "site": reply.site,
                "bytes_in": len(data),
                "bytes_out": len(self._expected.requests[node]),
            }
        )

    def _take(self, node: int, reply: Reply) -> None:
        match self._expected.phase:
            case "plan":
                self._take_admission(node, self._wanted(reply, PlanAdmitted))
            case "key":
                self._take_envelopes(node, self._wanted(reply, KeysSealed))
            case "round" | "close":
                self._take_update(node, self._wanted(reply, UpdateReply))
            case "release":
                self._take_approval(node, self._wanted(reply, ReleaseApproved))

    def _wanted(self, reply: Reply, kind: type[R]) -> R:
        if not isinstance(reply, kind):
            raise WrongRound(f"site {reply.site!r}: got {type(reply).__name__}, wanted {kind.__name__}")
        return reply

    def _open(self, phase: str, number: int, requests: Mapping[int, bytes]) -> Exchange:
        self._expected = Exchange(phase, number, requests)
        self._answered = set()
        self._digests = {}
        self._observe({"event": "phase", "phase": phase, "round": number, "sites": len(requests)})
        return self._expected

    def _limit(self) -> int:
        if self._expected.phase in ("plan", "key"):
            return SETUP_REPLY_BYTES
        values = max(sum(admitted.num_values.values()) for admitted in self._admitted.values())
        # a released adapter travels as float32, lora_A beside lora_B; an update as ciphertexts of 8 bytes a slot
        return reply_limit(sum(self._ciphertexts().values()), 16 * self.plan.packing.params.slot_count) + 16 * values

    def _take_admission(self, node: int, reply: PlanAdmitted) -> None:
        entry = self.roster.entry(reply.site)
        if reply.site in self._sites.values():
            raise WrongRound(f"site {reply.site!r} was admitted twice")
        signed = join_fields(self.run.encode(), self.plan.digest.encode(), self.roster.digest())
        verify(entry, CONTEXT_PLAN, signed, reply.signature)
        if reply.model_sha256 != self.plan.spec.model.sha256:
            raise WrongModel(f"site {reply.site!r} holds base model {reply.model_sha256}, the plan names another")
        scopes = set(self.plan.scopes(entry.kind))
        if set(reply.ciphertexts) != scopes or set(reply.num_values) != scopes:
            raise Malformed(
                f"site {reply.site!r} announced scopes {sorted(reply.ciphertexts)}, wanted {sorted(scopes)}"
            )
        for scope in scopes:
            self._check_same_size(scope, reply)
        self._sites[node] = reply.site
        self._admitted[reply.site] = reply

    def _check_same_size(self, scope: str, reply: PlanAdmitted) -> None:
        for other in self._admitted.values():
            if scope not in other.num_values:
                continue
            if (other.num_values[scope], other.ciphertexts[scope]) != (
                reply.num_values[scope],
                reply.ciphertexts[scope],
            ):
                raise WrongModel(
                    f"site {reply.site!r} trains {reply.num_values[scope]} values of {scope!r}, "
                    f"site {other.site!r} {other.num_values[scope]}",
                    hint="the base models differ in shape, or one site runs another version of FedSeek",
                )

    def _check_cohort(self) -> None:
        self._all_answered()
        missing = sorted(set(self.roster.names) - set(self._sites.values()))
        if missing:
            raise CohortTooSmall(f"no answer from {', '.join(missing)}", hint="every site of the roster must be there")

    def _all_answered(self) -> None:
        missing = sorted(self._sites.get(node, str(node)) for node in set(self._expected.requests) - self._answered)
        if missing:
            raise CohortTooSmall(f"{self._expected.phase}: no answer from {', '.join(missing)}")

    def _take_envelopes(self, node: int, reply: KeysSealed) -> None:
        self._check_sender(node, reply.site)
        if reply.epoch != EPOCH or set(reply.envelopes) != set(self.roster.names):
            raise Malformed(f"site {reply.site!r} sealed the key of epoch {reply.epoch} to {sorted(reply.envelopes)}")
        self._envelopes = dict(reply.envelopes)

    def _take_update(self, node: int, reply: UpdateReply) -> None:
        self._check_sender(node, reply.site)
        if reply.round != self._expected.round:
            raise WrongRound(f"site {reply.site!r} answered for round {reply.round}, wanted {self._expected.round}")
        entry = self.roster.entry(reply.site)
        verify(entry, CONTEXT_ADAPTER, digest_message(self.run, reply.round, reply.digests), reply.signature)
        self._check_digests(reply.site, reply.digests)
        wanted = set(self.plan.scopes(entry.kind)) & set(self._sum().expected)
        if {scoped.scope for scoped in reply.update} != wanted:
            raise Malformed(
                f"site {reply.site!r} sent scopes {[s.scope for s in reply.update]}, wanted {sorted(wanted)}"
            )
        started = time.perf_counter()
        agg_update(self._sum(), reply.update)
        self._aggregate_seconds += time.perf_counter() - started
        self._keep_digests(reply.site, reply.digests)

    def _take_approval(self, node: int, reply: ReleaseApproved) -> None:
        self._check_sender(node, reply.site)
        signed = release_message(self.run, reply.digests, reply.statement)
        verify(self.roster.entry(reply.site), CONTEXT_RELEASE, signed, reply.signature)
        self._check_digests(reply.site, reply.digests)
        self._keep_digests(reply.site, reply.digests)
        self.approvals[reply.site] = reply

    def _check_sender(self, node: int, site: str) -> None:
        if self._sites.get(node) != site:
            raise WrongRound(f"node {node} was admitted as {self._sites.get(node)!r} and now answers as {site!r}")

    def _check_digests(self, site: str, digests: Mapping[str, bytes]) -> None:
        """Every site of a scope must start the round from the same tensors (docs/protocol.md, apply)."""
        wanted = set(self.plan.scopes(self.roster.entry(site).kind))
        if set(digests) != wanted:
            raise Malformed(f"site {site!r} signed digests of {sorted(digests)}, wanted {sorted(wanted)}")
        for scope, digest in digests.items():
            first, agreed = self._digests.get(scope, (site, digest))
            if digest != agreed:
                raise AdapterDiverged(
                    f"round {self._expected.round}: site {site!r} holds other values of {scope!r} than site {first!r}",
                    hint="the run stops before they are mixed; compare versions and hardware of the two sites",
                )

    def _keep_digests(self, site: str, digests: Mapping[str, bytes]) -> None:
        """What the next sites are compared with; only of a reply that was taken whole."""
        for scope, digest in digests.items():
            self._digests.setdefault(scope, (site, digest))

    def _ciphertexts(self) -> dict[str, int]:
        return {scope: n for admitted in self._admitted.values() for scope, n in admitted.ciphertexts.items()}

    def _start_sum(self, expected: Mapping[str, int]) -> None:
        self._aggregate = agg_init(self.plan.packing.params, expected, max_sites=self.plan.packing.max_sites)
        self._aggregate_seconds = 0.0

    def _sum(self) -> Aggregate:
        if self._aggregate is None:
            raise WrongRound("no round is open")
        return self._aggregate

    def _finish_sum(self) -> tuple[ScopedSum, ...]:
        self._all_answered()
        started = time.perf_counter()
        sums = agg_finish(self._sum(), min_sites=MIN_SITES_IN_SUM)
        self._aggregate_seconds += time.perf_counter() - started
        self._observe(
            {
                "event": "aggregated",
                "phase": self._expected.phase,
                "round": self._expected.round,
                "seconds": self._aggregate_seconds,
            }
        )
        return sums

    def _round_requests(self, number: int, sums: tuple[ScopedSum, ...]) -> dict[int, bytes]:
        return {
            node: encode_message(
                RoundRequest(
                    run=self.run,
                    round=number,
                    envelope=self._envelopes[site] if number == 1 else None,
                    previous=self._down(site, number - 1, sums) if number > 1 else None,
                )
            )
            for node, site in self._sites.items()
        }

    def _close_requests(self, rounds: int, sums: tuple[ScopedSum, ...]) -> dict[int, bytes]:
        return {
            node: encode_message(CloseRequest(run=self.run, round=rounds, previous=self._down(site, rounds, sums)))
            for node, site in self._sites.items()
        }

    def _release_requests(self, rounds: int, metrics: tuple[ScopedSum, ...]) -> dict[int, bytes]:
        first = min(self._sites.values())
        return {
            node: encode_message(
                ReleaseRequest(run=self.run, metrics=self._down(site, rounds, metrics), send_adapter=site == first)
            )
            for node, site in self._sites.items()
        }

    def _down(self, site: str, number: int, sums: tuple[ScopedSum, ...]) -> AggregateDown:
        scopes = self.plan.scopes(self.roster.entry(site).kind)
        return AggregateDown(round=number, sums=tuple(total for total in sums if total.scope in scopes))


def refusal(reply: Refused) -> FedseekError:
    """A site's "no" as an error of this side: by which rule, and with the exit code of its family."""
    if reply.code == PlanRefused.__name__:
        return PlanRefused(reply.site, f"{reply.rule} ({reply.code})", hint="the site's own log says more")
    return SiteRefused(reply.site, reply.code, reply.rule)
