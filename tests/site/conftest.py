"""A coordinator in the fewest lines, so that a site can be tested without the real one: honest, and easy to make lie."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from fedseek.aggregate import Aggregate, agg_finish, agg_init, agg_update
from fedseek.cohort import Federation, RoundGraph, round_graph
from fedseek.deal import check_dealt, check_keys
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.vault import StorageKey
from fedseek.messages import (
    AggregateDown,
    GroupKeySealed,
    KeyRequest,
    KeysSealed,
    PlanAdmitted,
    PlanOffer,
    Refused,
    ReleaseApproved,
    ReleaseRequest,
    RoundRequest,
    ShareRequest,
    SharesRevealed,
    SharesSealed,
    UnmaskRequest,
    UpdateReply,
    decode_reply,
    encode_message,
)
from fedseek.plan import GLOBAL_SCOPE
from fedseek.unmask import RoundRecord, check_revealed, unmask_sum
from fedseek_site.ledger import Ledger
from fedseek_site.service import SiteService

RUN = "试运行-1"
BANK, CLINIC = "harbour-bank", "仁济医院"
SITES = (("北岸银行", "bank"), (BANK, "bank"), (CLINIC, "hospital"), ("st-anna", "hospital"))

Away = Callable[[str, int, str], bool]
Requests = dict[str, Any]


@dataclass
class Desk:
    """What a coordinator holds of a run, by round and by site; ``services`` are the sites."""

    plan: Any
    federation: Federation
    ledgers: dict[str, Ledger]
    services: dict[str, SiteService]
    reopen: Callable[..., SiteService]
    folder: Path
    events: dict[str, list[dict[str, Any]]]
    now: list[float]
    keys: dict[int, dict[str, Any]] = field(default_factory=dict)
    dealt: dict[int, dict[str, Any]] = field(default_factory=dict)
    listed: dict[int, tuple[str, ...]] = field(default_factory=dict)
    taking_part: dict[int, tuple[str, ...]] = field(default_factory=dict)
    updates: dict[int, dict[str, UpdateReply]] = field(default_factory=dict)
    revealed: dict[int, dict[str, SharesRevealed]] = field(default_factory=dict)
    group_keys: dict[int, GroupKeySealed] = field(default_factory=dict)
    downs: dict[int, AggregateDown] = field(default_factory=dict)
    applied: dict[str, int] = field(default_factory=dict)
    admitted: dict[str, PlanAdmitted] = field(default_factory=dict)
    approved: dict[str, ReleaseApproved] = field(default_factory=dict)
    seen: list[tuple[str, bytes, bytes]] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.plan.rounds + 1

    @property
    def epoch(self) -> int:
        return max(self.group_keys)

    # --- one message ---

    def send(self, site: str, message: Any) -> bytes:
        data = message if isinstance(message, bytes) else encode_message(message)
        answer = self.services[site].handle(data)
        self.seen.append((site, data, answer))
        return answer

    def ask(self, site: str, message: Any) -> Any:
        return decode_reply(self.send(site, message))

    def code(self, site: str, message: Any) -> str:
        """The code of a refusal, or what kind of answer it is."""
        answer = self.ask(site, message)
        return answer.code if isinstance(answer, Refused) else type(answer).__name__

    def text(self, site: str) -> str:
        """What the site's own report says of its last refusal."""
        return [event["text"] for event in self.events[site] if event["event"] == "refused"][-1]

    def state(self, site: str) -> Any:
        """What the site would go on from."""
        held = self.services[site]._held or self.services[site]._resume(self.federation.run)
        return held[1]

    def stops(self, site: str, message: Any) -> tuple[str, str]:
        """The code and the site's own words of a refusal that must end the run at this site.

        Its state folder is put back afterwards, so that it can go on as if it had never been asked.
        """
        folder, aside = self.folder / site / "state", self.folder / site / "aside"
        self.services[site].close()
        shutil.copytree(folder, aside)
        self.services[site] = self.reopen(site)
        try:
            before, answer = self.state(site), self.send(site, message)
            told, after = decode_reply(answer), self.state(site)
            assert (after.stopped, after.rounds, after.group_keys) == (True, {}, {}), "with every secret of the run"
            assert replace(after, stopped=False, rounds=before.rounds, group_keys=before.group_keys) == before
            self.restart(site)
            assert self.send(site, message) == answer, "one answer, also from another process"
            assert isinstance(told, Refused), told
            return told.code, self.text(site)
        finally:
            self.services[site].close()
            shutil.rmtree(folder)
            aside.rename(folder)
            self.services[site] = self.reopen(site)

    def restart(self, site: str) -> None:
        self.services[site].close()
        self.services[site] = self.reopen(site)

    # --- requests ---

    def offer(self, number: int = 1, *, make_key: bool = False, **changes: Any) -> PlanOffer:
        roster = self.federation.roster.canonical_bytes()
        asked = PlanOffer(
            run=self.federation.run,
            round=number,
            plan=self.plan.canonical(),
            roster=roster,
            make_key=make_key,
            continues=None,
        )
        return replace(asked, **changes)

    def graph(self, number: int) -> RoundGraph:
        return round_graph(self.federation, number, self.listed[number])

    def peers_keys(self, site: str, number: int) -> tuple[Any, ...]:
        return tuple(self.keys[number][name] for name in self.graph(number).peers(site))

    def share_request(self, site: str, number: int) -> ShareRequest:
        positions = self.federation.positions(self.listed[number])
        keys = self.peers_keys(site, number)
        return ShareRequest(run=self.federation.run, round=number, listed=positions, keys=keys)

    def round_request(self, site: str, number: int) -> RoundRequest:
        listed = self.listed.get(number + 1, ())
        around = set(self.graph(number).neighbours[site]) & set(self.taking_part[number])
        return RoundRequest(
            run=self.federation.run,
            round=number,
            previous=self.previous(site, number - 1),
            epoch=self.epoch,
            envelopes={epoch: key.envelopes[site] for epoch, key in self.group_keys.items()},
            participants=self.federation.positions(self.taking_part[number]),
            boxes={dealer: self.dealt[number][dealer].boxes[site] for dealer in around},
            next_listed=self.federation.positions(listed),
            next_keys=self.peers_keys(site, number + 1) if site in listed else (),
        )

    def unmask_request(self, site: str, number: int) -> UnmaskRequest:
        survivors = tuple(self.updates[number])
        around = set(self.graph(number).neighbours[site]) & set(survivors)
        return UnmaskRequest(
            run=self.federation.run,
            round=number,
            survivors=self.federation.positions(survivors),
            presence={name: self.updates[number][name].presence for name in around},
        )

    def release_request(self, site: str) -> ReleaseRequest:
        return ReleaseRequest(
            run=self.federation.run,
            previous=self.previous(site, self.last - 1),
            metrics=self.down(site, self.last),
            envelopes={epoch: key.envelopes[site] for epoch, key in self.group_keys.items()},
            send_adapter=site == self.federation.roster.names[0],
        )

    def previous(self, site: str, until: int) -> tuple[AggregateDown, ...]:
        return tuple(self.down(site, number) for number in range(self.applied.get(site, 0) + 1, until + 1))

    def down(self, site: str, number: int) -> AggregateDown:
        shared = self.federation.shared_scopes(self.federation.roster.entry(site).kind)
        down = self.downs[number]
        return replace(down, sums=tuple(each for each in down.sums if each.scope in shared))

    # --- the run ---

    def exchanges(self) -> Iterator[tuple[str, int, Requests]]:
        names = self.federation.roster.names
        yield "plan", 1, {site: self.offer(1, make_key=site == names[0]) for site in names}
        self.listed[1] = tuple(self.keys[1])
        yield "shares", 1, {site: self.share_request(site, 1) for site in self.listed[1]}
        for number in range(1, self.last + 1):
            yield "round", number, self.round_requests(number)
            if number < self.last:  # heads alone are sent in the closing round, and need no unmasking
                yield "unmask", number, self.unmask_requests(number)
            self.downs[number] = self.finish(number)
        yield "release", self.last, {site: self.release_request(site) for site in self.admitted}

    def round_requests(self, number: int) -> Requests:
        self.taking_part[number] = tuple(name for name in self.listed[number] if name in self.dealt.get(number, {}))
        if number < self.last:
            self.listed[number + 1] = self.in_order(self.keys.get(number + 1, {}))
        few = len(self.taking_part[number]) < self.graph(number).min_survivors
        asked = {} if few else {site: self.round_request(site, number) for site in self.taking_part[number]}
        entering = {
            site: self.share_request(site, number + 1)
            for site in self.listed.get(number + 1, ())
            if site not in asked and site not in self.dealt.get(number + 1, {})
        }
        return {**asked, **entering}

    def unmask_requests(self, number: int) -> Requests:
        survivors = self.updates.get(number, {})
        enough = len(survivors) >= self.graph(number).min_survivors
        asked = {site: self.unmask_request(site, number) for site in survivors} if enough else {}
        wanted = [site for site in self.federation.roster.names if site not in self.keys.get(number + 2, {})]
        offered = {site: self.offer(number + 2) for site in wanted if number + 2 <= self.last}
        return {**offered, **asked}

    def finish(self, number: int) -> AggregateDown:
        survivors = self.updates.get(number, {})
        if len(survivors) < self.graph(number).min_survivors:
            return AggregateDown(round=number, epoch=self.epoch, survivors=(), sums=())
        aggregate = self.aggregate(number)
        if number < self.last:
            self.unmask(aggregate, number)
        opened = set(self.federation.open_scopes(self.taking_part[number], tuple(survivors))) & set(aggregate.expected)
        epochs = {reply.epoch for reply in survivors.values()}
        return AggregateDown(
            round=number,
            epoch=epochs.pop(),
            survivors=self.federation.positions(survivors),
            sums=agg_finish(aggregate, min_sites=2, scopes=sorted(opened)),
        )

    def unmask(self, aggregate: Aggregate, number: int) -> None:
        record = RoundRecord(
            self.graph(number),
            self.keys[number],
            self.dealt[number],
            participants=self.taking_part[number],
            survivors=self.in_order(self.updates[number]),
        )
        checked = {
            name: check_revealed(reply, record, self.federation) for name, reply in self.revealed[number].items()
        }
        unmask_sum(aggregate, checked, record, self.federation)

    def aggregate(self, number: int) -> Aggregate:
        """The sum of the scopes that are sent in this round, and of no others."""
        sent = set(self.federation.summed_scopes(self.taking_part[number]))
        sent -= {GLOBAL_SCOPE} if number == self.last else set()
        counts = {scope: n for admitted in self.admitted.values() for scope, n in admitted.ciphertexts.items()}
        expected = {scope: n for scope, n in counts.items() if scope in sent}
        aggregate = agg_init(self.plan.packing.params, expected, max_sites=self.plan.packing.max_sites)
        for reply in self.updates[number].values():
            if reply.update:
                agg_update(aggregate, reply.update)
        return aggregate

    def in_order(self, names: Any) -> tuple[str, ...]:
        return self.federation.names(self.federation.positions(tuple(names)))

    def take(self, site: str, reply: Any) -> None:
        """File an answer away, and check it as a coordinator does."""
        match reply:
            case PlanAdmitted():
                self.admitted[site] = reply
                for keys in reply.keys:
                    check_keys(keys, self.federation, keys.round)
                    self.keys.setdefault(keys.round, {})[site] = keys
                if reply.group_key:
                    self.group_keys[reply.group_key.epoch] = reply.group_key
            case KeysSealed():
                self.group_keys[reply.group_key.epoch] = reply.group_key
            case SharesSealed():
                self.take_shares(site, reply.shares)
            case UpdateReply():
                self.take_update(site, reply)
            case SharesRevealed():
                self.revealed.setdefault(reply.round, {})[site] = reply
            case ReleaseApproved():
                self.approved[site] = reply
            case Refused():
                raise AssertionError(f"{site} refused: {reply.code}: {self.text(site)}")

    def take_shares(self, site: str, shares: Any) -> None:
        check_dealt(shares, self.federation, self.graph(shares.round), dealer=site)
        self.dealt.setdefault(shares.round, {})[site] = shares

    def take_update(self, site: str, reply: UpdateReply) -> None:
        self.updates.setdefault(reply.round, {})[site] = reply
        self.applied[site] = reply.round - 1
        if reply.shares:
            self.take_shares(site, reply.shares)
        if reply.keys:
            check_keys(reply.keys, self.federation, reply.round + 2)
            self.keys.setdefault(reply.round + 2, {})[site] = reply.keys

    def play(
        self,
        *,
        until: tuple[str, int] | None = None,
        away: Away = lambda phase, number, site: False,
        after_each: Callable[[str], None] = lambda site: None,
    ) -> Requests:
        """Play the run up to an exchange and return its requests; all of it if ``until`` is None."""
        for phase, number, requests in self.exchanges():
            if (phase, number) == until:
                return requests
            for site, request in requests.items():
                if not away(phase, number, site):
                    self.take(site, self.ask(site, request))
                    after_each(site)
        return {}

    def rotate(self, maker: str) -> None:
        self.take(maker, self.ask(maker, KeyRequest(run=self.federation.run, epoch=self.epoch + 1)))


@pytest.fixture(scope="module")
def make_desk(
    tiny_plan: Callable[..., Any], tiny_data: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Desk]]:
    """Sites with a coordinator's desk between them; takes what ``tiny_plan`` takes, ``run``, ``sites`` and ``data``."""
    desks: list[Desk] = []
    storage_key = StorageKey.generate()

    def make(
        *,
        run: str = RUN,
        sites: tuple[tuple[str, str], ...] = SITES,
        data: dict[str, Any] | None = None,
        plan: Any = None,
        **changes: Any,
    ) -> Desk:
        plan = plan or tiny_plan(**changes)
        folder = tmp_path_factory.mktemp("桌")
        identities = {name: SiteIdentity.generate(name, kind) for name, kind in sites}
        roster = Roster.of(identity.public() for identity in identities.values())
        events: dict[str, list[dict[str, Any]]] = {name: [] for name in identities}
        now = [1_800_000_000.0]
        for name in identities:
            (folder / name).mkdir()
        ledgers = {name: Ledger(folder / name / "ledger.sqlite3", storage_key, dataset="记录") for name in identities}

        def reopen(name: str, **options: Any) -> SiteService:
            return SiteService(
                identities[name],
                (data or {}).get(name) or tiny_data(identities[name].kind),
                roster=roster,
                state_folder=folder / name / "state",
                storage_key=storage_key,
                ledger=ledgers[name],
                release_folder=folder / name / "release",
                observe=events[name].append,
                clock=lambda: now[0],
                **options,
            )

        services = {name: reopen(name) for name in roster.names}
        desk = Desk(plan, Federation.of(run, plan, roster), ledgers, services, reopen, folder, events, now)
        desks.append(desk)
        return desk

    yield make
    for desk in desks:
        for service in desk.services.values():
            service.close()
        for ledger in desk.ledgers.values():
            ledger.close()
