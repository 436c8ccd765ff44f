"""Sites played with the library's own functions, for tests of the coordinator: real keys, masks and sums, tiny vectors.

A played site trains nothing: its update is a few numbers that follow from its name and the round, so a test can work out
the adapter that a run must end with. It checks what it decrypts as a real one does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from fedseek.apply import ScopeState, apply_sums
from fedseek.cohort import Federation, presence_message, round_graph
from fedseek.deal import advertise, check_keys, deal_shares, draw_secrets, open_box
from fedseek.decrypt import decrypt_sum
from fedseek.encode import UpdateLayout, encode_update, num_ciphertexts
from fedseek.encrypt import encrypt_update
from fedseek.errors import CustodyError, MessageError
from fedseek.groupkey import make_group_key, open_group_key
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster, parse_roster
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PLAN, CONTEXT_PRESENCE, CONTEXT_RELEASE, sign
from fedseek.mask import mask_slots
from fedseek.messages import (
    KeyRequest,
    KeysSealed,
    PlanAdmitted,
    PlanOffer,
    ReleaseApproved,
    ReleaseRequest,
    RoundRequest,
    ShareRequest,
    SharesSealed,
    UnmaskRequest,
    UpdateReply,
    decode_reply,
    decode_request,
    digest_message,
    encode_message,
    release_message,
)
from fedseek.plan import GLOBAL_SCOPE, check_plan, parse_spec, plan_from_canonical
from fedseek.reveal import reveal_shares
from fedseek.tag import add_tags, tag_key
from fedseek_server.coordinator import Coordinator

FOUR = (("北岸银行", "bank"), ("harbour-bank", "bank"), ("仁济医院", "hospital"), ("st-anna", "hospital"))
ROUND_1, HARBOUR, ANNA, RENJI, BEIAN = 1, "harbour-bank", "st-anna", "仁济医院", "北岸银行"  # names in roster order
RUN = "试运行-1"
NUM_VALUES = {GLOBAL_SCOPE: 5, "kind/bank": 3, "kind/hospital": 4}
MODEL = "ab" * 32


def played_plan(
    *,
    rounds: int = 2,
    kinds: Iterable[str] = ("bank", "hospital"),
    key_days: int = 90,
    release: dict[str, Any] | None = None,
    **cohort: Any,
):
    """A checked plan over a model that does not exist. Nobody waits for approvals unless ``release`` says so."""
    document = {
        "name": "played",
        "model": {"source": "package:nowhere", "sha256": MODEL},
        "kinds": {kind: {"labels": ["是", "否"]} for kind in kinds},
        "lora": {"target_modules": ["query"]},
        "training": {
            "rounds": rounds,
            "steps_per_round": 1,
            "sampling_probability": 0.5,
            "learning_rate": 0.01,
            "head_learning_rate": 0.05,
        },
        "privacy": {"mechanism": "none"},
        "encryption": {"key_days": key_days},
        "release": {"wait_hours": 0, **(release or {})},
        "cohort": {"max_sites": 8, "min_contributors": 2, **cohort},
    }
    return check_plan(parse_spec(document))


def delta(site: str, scope: str, number: int) -> np.ndarray:
    """The update of a site in a round: float32, small enough that nothing saturates."""
    seed = hashlib.sha256(f"{site}/{scope}/{number}".encode()).digest()
    return np.random.default_rng(list(seed)).uniform(-0.008, 0.008, NUM_VALUES[scope]).astype(np.float32)


@dataclass
class PlayedSite:
    """One site; ``log`` is what it was asked, in order."""

    identity: SiteIdentity
    log: list[Any] = field(default_factory=list)
    done: dict[tuple[str, int], tuple[bytes, bytes]] = field(default_factory=dict)
    federation: Federation | None = None
    states: dict[str, ScopeState] = field(default_factory=dict)
    applied: int = 0
    secrets: dict[int, Any] = field(default_factory=dict)
    own_keys: dict[int, Any] = field(default_factory=dict)
    graphs: dict[int, Any] = field(default_factory=dict)
    peers: dict[int, dict[str, Any]] = field(default_factory=dict)
    held: dict[int, dict[str, Any]] = field(default_factory=dict)
    group_keys: dict[int, Any] = field(default_factory=dict)
    participants: dict[int, tuple[str, ...]] = field(default_factory=dict)
    vouched: dict[int, bytes] = field(default_factory=dict)
    clock: Callable[[], float] = lambda: 1_000_000.0

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def scopes(self) -> tuple[str, ...]:
        return self.federation.shared_scopes(self.identity.kind)

    def handle(self, data: bytes) -> bytes:
        """Answer as a site does: each step once."""
        request = decode_request(data)
        step = (type(request).__name__, getattr(request, "round", getattr(request, "epoch", -1)))
        if step in self.done:
            asked, reply = self.done[step]
            assert asked == data, f"{self.name} was asked two different things as {step}"
            return reply
        self.log.append(request)
        steps = {
            PlanOffer: self.admit,
            KeyRequest: self.make_key,
            ShareRequest: self.deal,
            RoundRequest: self.play_round,
            UnmaskRequest: self.unmask,
            ReleaseRequest: self.release,
        }
        reply = encode_message(steps[type(request)](request))
        self.done[step] = (data, reply)
        return reply

    def admit(self, offer: PlanOffer) -> PlanAdmitted:
        if self.federation is None:
            plan = plan_from_canonical(offer.plan)
            self.federation = Federation.of(offer.run, plan, parse_roster(offer.roster))
            for scope in self.scopes:
                layout = UpdateLayout(scope, (("x", (NUM_VALUES[scope],)),), () if scope == GLOBAL_SCOPE else ("hits",))
                zeros = np.zeros(NUM_VALUES[scope], np.float32)
                self.states[scope] = ScopeState(layout, zeros, zeros.astype(np.float64), plan.initial_range(scope))
        packing = self.federation.plan.packing
        layouts = {scope: state.layout for scope, state in self.states.items()}
        return PlanAdmitted(
            run=offer.run,
            site=self.name,
            round=offer.round,
            model_sha256=MODEL,
            num_values={scope: layout.num_values for scope, layout in layouts.items()},
            ciphertexts={scope: num_ciphertexts(layout, packing) for scope, layout in layouts.items()},
            signature=sign(self.identity, CONTEXT_PLAN, self.federation.bound),
            keys=(self.keys_for(offer.round), self.keys_for(offer.round + 1)),
            group_key=self.group_key(0) if offer.make_key else None,
            contributors=(),
        )

    def group_key(self, epoch: int):
        return make_group_key(self.federation, epoch, identity=self.identity, now=self.clock())

    def make_key(self, request: KeyRequest) -> KeysSealed:
        return KeysSealed(run=request.run, site=self.name, group_key=self.group_key(request.epoch))

    def keys_for(self, number: int):
        if number not in self.secrets:
            self.secrets[number] = draw_secrets()
            self.own_keys[number] = advertise(self.secrets[number], self.federation, number, identity=self.identity)
        return self.own_keys[number]

    def shares_for(self, number: int, listed: tuple[int, ...], keys: tuple[Any, ...]):
        graph = round_graph(self.federation, number, self.federation.names(listed))
        for each in keys:
            check_keys(each, self.federation, number)
        assert tuple(each.site for each in keys) == graph.peers(self.name)
        self.graphs[number], self.peers[number] = graph, {each.site: each for each in keys}
        dealt, mine = deal_shares(
            self.secrets[number], self.peers[number], self.federation, graph, identity=self.identity
        )
        self.held[number] = {self.name: mine}
        return dealt

    def deal(self, request: ShareRequest) -> SharesSealed:
        shares = self.shares_for(request.round, request.listed, request.keys)
        return SharesSealed(run=request.run, site=self.name, shares=shares)

    def apply(self, ended: Iterable[Any], epochs: dict[int, bytes]) -> None:
        for epoch, envelope in epochs.items():
            opened = open_group_key(envelope, self.federation, epoch, identity=self.identity)
            assert self.group_keys.setdefault(epoch, opened).secret.fingerprint() == opened.secret.fingerprint()
        for down in ended:
            if down.round <= self.applied:  # an answer of this site was lost, so it is told again
                continue
            assert down.round == self.applied + 1, f"{self.name} applied {self.applied} rounds and got {down.round}"
            self.applied = down.round
            self.states = apply_sums(self.states, self.decrypt(down, self.scopes), self.federation.plan)

    def decrypt(self, down: Any, wanted: Iterable[str]):
        survivors = self.federation.names(down.survivors)
        took_part = self.participants.get(down.round)
        alive = self.federation.open_scopes(took_part or survivors, survivors) if survivors else {}
        scopes = [each.scope for each in down.sums]
        if took_part:  # a site that was away does not know which heads are whole
            assert scopes == [scope for scope in wanted if scope in alive]
        return decrypt_sum(
            self.group_keys[down.epoch].secret,
            down.sums,
            federation=self.federation,
            number=down.round,
            survivors=alive,
            layouts={scope: self.states[scope].layout for scope in scopes},
            value_ranges={scope: self.states[scope].value_range for scope in scopes},
        )

    def play_round(self, request: RoundRequest) -> UpdateReply:
        number, rounds = request.round, self.federation.plan.spec.training.rounds
        is_closing = number == rounds + 1
        self.apply(request.previous, request.envelopes)
        assert self.applied == number - 1
        names = self.federation.names(request.participants)
        graph, peers = self.graphs[number], self.peers[number]
        self.participants[number] = names
        around = [name for name in graph.neighbours[self.name] if name in names]
        assert set(request.boxes) == set(around)
        for dealer, box in request.boxes.items():
            self.held[number][dealer] = open_box(
                box, self.secrets[number], peers[dealer], self.federation, receiver=self.own_keys[number]
            )
        sent = self.federation.summed_scopes(names)
        scopes = [scope for scope in self.scopes if scope in sent and not (is_closing and scope == GLOBAL_SCOPE)]
        shares = None
        if request.next_listed:
            shares = self.shares_for(number + 1, request.next_listed, request.next_keys)
        digests = {scope: state.digest() for scope, state in self.states.items()}
        self.vouched[number] = presence_message(
            self.federation, graph, names, epoch=request.epoch, digest=digests[GLOBAL_SCOPE]
        )
        return UpdateReply(
            run=request.run,
            site=self.name,
            round=number,
            epoch=request.epoch,
            digests=digests,
            signature=sign(self.identity, CONTEXT_ADAPTER, digest_message(request.run, number, digests)),
            presence=sign(self.identity, CONTEXT_PRESENCE, self.vouched[number]),
            update=self.update(number, request.epoch, scopes),
            shares=shares,
            keys=None if number + 2 > rounds + 1 else self.keys_for(number + 2),
        )

    def update(self, number: int, epoch: int, scopes: Iterable[str]):
        key, packing = self.group_keys[epoch].secret, self.federation.plan.packing
        rounds = self.federation.plan.spec.training.rounds
        tagged = {}
        for scope in scopes:
            state = self.states[scope]
            vector = delta(self.name, scope, number) if number <= rounds else np.zeros(NUM_VALUES[scope], np.float32)
            slots = encode_update(
                vector,
                state.layout,
                packing=packing,
                value_range=state.value_range,
                weight=1,
                weight_cap=1,
                metrics=dict.fromkeys(state.layout.metrics, 1.0),
            )
            key_of_tags = tag_key(key, self.federation, number, scope)
            tagged[scope] = add_tags(slots, key_of_tags, site=self.name, modulus=packing.params.plain_modulus)
        masked = mask_slots(
            tagged,
            self.secrets[number],
            self.peers[number],
            self.federation,
            self.graphs[number],
            participants=self.participants[number],
            me=self.name,
        )
        return encrypt_update(key, masked)

    def unmask(self, request: UnmaskRequest):
        number = request.round
        return reveal_shares(
            request,
            self.held[number],
            self.federation,
            self.graphs[number],
            participants=self.participants[number],
            vouched=self.vouched[number],
            identity=self.identity,
        )

    def release(self, request: ReleaseRequest) -> ReleaseApproved:
        self.apply(request.previous, request.envelopes)
        metrics = self.decrypt(request.metrics, [scope for scope in self.scopes if scope != GLOBAL_SCOPE])
        assert all(summed.metrics["hits"] == summed.contributors for summed in metrics.values())
        digests = {scope: state.digest() for scope, state in self.states.items()}
        statement = b"a statement"
        return ReleaseApproved(
            run=request.run,
            site=self.name,
            digests=digests,
            statement=statement,
            signature=sign(self.identity, CONTEXT_RELEASE, release_message(request.run, digests, statement)),
            adapter={"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"} if request.send_adapter else {},
        )


Alter = Callable[[str, int, str, bytes], bytes]
Away = Callable[[str, int, str], bool]


@dataclass
class Federated:
    """Played sites and the coordinator between them. ``here`` are the nodes that are connected."""

    coordinator: Coordinator
    sites: dict[int, PlayedSite]
    told: list[dict[str, Any]]
    here: set[int]
    exchanges: list[Any] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    late: list[tuple[int, bytes]] = field(default_factory=list)

    def site(self, name: str) -> PlayedSite:
        return next(site for site in self.sites.values() if site.name == name)

    def node(self, name: str) -> int:
        return next(node for node, site in self.sites.items() if site.name == name)

    def start(self):
        """The run as a generator; delivering is up to the caller."""
        return self.coordinator.play(lambda: [node for node in self.sites if node in self.here])

    def play(self, *, reply: Alter | None = None, away: Away | None = None, until: tuple[str, int] | None = None):
        """Play the run as a driver does. ``reply`` may alter an answer; ``b""`` is one that gets lost on its way.

        A site that is ``away`` in an exchange is not reached. Stops before ``until`` and returns its exchange.
        """
        run = self.start()
        for exchange in run:
            if (exchange.phase, exchange.round) == until:
                return exchange
            if not exchange.requests:
                self.waited.append(exchange.pause_seconds)
                continue
            self.exchanges.append(exchange)
            for node in exchange.requests:
                name = self.sites[node].name
                if not (away and away(exchange.phase, exchange.round, name)):
                    self.deliver(exchange, node, reply)
        return None

    def deliver(self, exchange: Any, node: int, reply: Alter | None = None) -> None:
        """One request and its answer."""
        answer = self.sites[node].handle(exchange.requests[node])
        got = reply(exchange.phase, exchange.round, self.sites[node].name, answer) if reply else answer
        if got:
            self.give(node, got)
        else:
            self.late.append((node, answer))

    def give(self, node: int, data: bytes) -> None:
        try:
            self.coordinator.receive(node, data)
        except (MessageError, CustodyError) as error:
            self.coordinator.reject(node, error)

    def events(self, name: str, *fields: str) -> list[Any]:
        """Of all events of this name, the values of these fields."""
        return [tuple(event[each] for each in fields) for event in self.told if event["event"] == name]

    @property
    def ended(self):
        """By round, the names of the sites whose updates are in its sum."""
        history = self.coordinator._state.history.ended
        return {down.round: self.coordinator._state.federation.names(down.survivors) for down in history}

    def check_adapter(self, name: str = ANNA) -> None:
        """The adapter is the sum over rounds of the plain mean of the survivors' updates, to within the rounding."""
        rounds = self.coordinator.plan.spec.training.rounds
        wanted = np.zeros(NUM_VALUES[GLOBAL_SCOPE])
        for number, names in self.ended.items():
            if names and number <= rounds:
                wanted += np.mean([delta(each, GLOBAL_SCOPE, number) for each in names], axis=0)
        got = self.site(name).states[GLOBAL_SCOPE].weights
        assert np.abs(got - wanted).max() < 2e-4 * rounds
        assert np.abs(got).max() > 1e-3


def federate(
    plan: Any, sites: Iterable[tuple[str, str]] = FOUR, *, clock: Callable[[], float] = lambda: 1_000_000.0
) -> Federated:
    """A fresh federation, all sites connected, as nodes 100 and up in the order given."""
    played = {100 + place: PlayedSite(SiteIdentity.generate(*site), clock=clock) for place, site in enumerate(sites)}
    roster = Roster.of(site.identity.public() for site in played.values())
    told: list[dict[str, Any]] = []
    waited: list[float] = []
    coordinator = Coordinator(plan, roster, run=RUN, observe=told.append, clock=lambda: clock() + sum(waited))
    return Federated(coordinator, played, told, set(played), waited=waited)


def change(data: bytes, **fields: Any) -> bytes:
    """The same reply with other fields."""
    return encode_message(msgspec.structs.replace(decode_reply(data), **fields))


def at(phase: str, number: int, site: str, alter: Callable[[bytes], bytes]) -> Alter:
    """Alter the reply of one site in one exchange; leave all others alone."""
    return lambda *where_and_data: (
        alter(where_and_data[3]) if where_and_data[:3] == (phase, number, site) else where_and_data[3]
    )


def lost(*places: tuple[str, int, str]) -> Alter:
    """The answers of these (phase, round, site) get lost."""
    return lambda *where_and_data: b"" if where_and_data[:3] in places else where_and_data[3]


def away(*places: tuple[str, int, str]) -> Away:
    """In these (phase, round, site) the site is not reached."""
    return lambda *where: where in places
