"""What a hostile party does, for the tests beside this file. The victims are the real sites and the real coordinator.

A hostile coordinator has all that the real one has: what it holds and what it saw (``Cohort.seen``). It alters requests
on their way, asks on its own, and works with the library. It gets nothing from a site's inside, unless the site colludes:
then ``Plot`` has what that site has on its disk. A hostile site has its own identity and its own disk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow
import pytest
from msgspec.structs import replace

from fedseek.cohort import presence_message, round_graph
from fedseek.errors import FedseekError
from fedseek.groupkey import GroupKey
from fedseek.he.ciphertext import (
    CiphertextForm,
    ScopedCiphertexts,
    ScopedSum,
    load_ciphertext,
    save_ciphertext,
    seal_context,
)
from fedseek.identity.signing import CONTEXT_PRESENCE, sign
from fedseek.messages import (
    Refused,
    ReleaseApproved,
    UpdateReply,
    decode_reply,
    decode_request,
    encode_message,
)
from fedseek_site.journal import JOURNAL_FILE
from fedseek_site.state import SiteState

RUN = "试运行-1"
HARBOUR, ANNA, RENJI, BEIAN = "harbour-bank", "st-anna", "仁济医院", "北岸银行"  # in roster order
EVERYBODY = (HARBOUR, ANNA, RENJI, BEIAN)
FIFTH = "第五家银行"
FIVE = ((BEIAN, "bank"), (HARBOUR, "bank"), (RENJI, "hospital"), (ANNA, "hospital"), (FIFTH, "bank"))
KIND_OF = dict(FIVE)
GLOBAL = "global"

Where = tuple[str, int]
Refusal = tuple[str, str]  # the code that leaves the site, and the site's own words
_HEAD = 97  # bytes in front of a ciphertext's coefficients: see fedseek/he/ciphertext.py


# --- what is there ------------------------------------------------------------------------------------------------------


def disk(cohort: Any, site: str) -> bytes | None:
    """What the site would go on from."""
    return cohort.site(site)._journal.state(RUN)


def state(cohort: Any, site: str) -> SiteState:
    return SiteState.from_bytes(disk(cohort, site))


def group_key(cohort: Any, site: str) -> Any:
    """The newest group key on the site's disk."""
    held, params = state(cohort, site).group_keys, cohort.coordinator.plan.packing.params
    return GroupKey.from_bytes(held[max(held)], epoch=max(held), params=params).secret


def holdings(cohort: Any) -> Any:
    """All that the coordinator holds."""
    return cohort.coordinator._state


def federation(cohort: Any) -> Any:
    return holdings(cohort).federation


def positions(cohort: Any, *names: str) -> tuple[int, ...]:
    """Their places on the roster."""
    return federation(cohort).positions(names)


def without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}


def node_of(cohort: Any, site: str) -> int:
    return next(node for node, service in cohort.services.items() if service.identity.name == site)


def replies(cohort: Any, kind: type[Any]) -> list[Any]:
    """The replies of this kind that the coordinator has got."""
    found = []
    for data in cohort.seen:
        try:
            found.append(msgspec.msgpack.decode(data, type=kind))
        except msgspec.MsgspecError:
            continue
    return found


def update_of(cohort: Any, site: str, number: int) -> UpdateReply:
    return next(each for each in replies(cohort, UpdateReply) if (each.site, each.round) == (site, number))


def told(cohort: Any, event: str, *fields: str) -> list[Any]:
    """Of the coordinator's record, the events of this name."""
    return [tuple(each[name] for name in fields) for each in cohort.events["coordinator"] if each["event"] == event]


def ended(cohort: Any) -> dict[int, tuple[str, ...]]:
    """By round, whose updates are in its sum."""
    return {down.round: federation(cohort).names(down.survivors) for down in holdings(cohort).history.ended}


def check_released(cohort: Any, sites: Iterable[str] = EVERYBODY) -> None:
    """The run came to its end: these sites approved one and the same adapter."""
    approvals = cohort.coordinator.approvals
    assert set(approvals) == set(sites)
    assert len({approval.digests[GLOBAL] for approval in approvals.values()}) == 1


# --- a hostile coordinator ----------------------------------------------------------------------------------------------


def ask(cohort: Any, site: str, message: Any) -> Any:
    """Ask the site something of one's own."""
    data = message if isinstance(message, bytes) else encode_message(message)
    answer = cohort.site(site).handle(data)
    cohort.seen += [data, answer]
    return decode_reply(answer)


def refused(cohort: Any, site: str, message: Any) -> Refusal:
    """Ask something that must be refused: with a code and no more, and with nothing trained, applied or released.

    The site is as it was. After a sum that did not pass it has stopped: it holds no key and no share any more.
    """
    before, events = disk(cohort, site), len(cohort.events[site])
    answer = ask(cohort, site, message)
    assert isinstance(answer, Refused), f"{site} answers with {type(answer).__name__}"
    assert answer.rule == answer.code or answer.code == "PlanRefused"
    later = cohort.events[site][events:]
    assert not {"step", "round", "released"} & {event["event"] for event in later}
    if answer.code == "Tampered":
        stopped = replace(SiteState.from_bytes(before or b""), stopped=True, rounds={}, group_keys={})
        assert state(cohort, site) == stopped, f"{site} has not stopped as it was"
    else:
        assert disk(cohort, site) == before, f"{site} is not what it was"
    return answer.code, next(event["text"] for event in reversed(cohort.events[site]) if event["event"] == "refused")


def attack(
    cohort: Any, where: Where | list[Where], forge: Callable[[str, Any], Any], **play: Any
) -> dict[str, list[Refusal]]:
    """Play a run in which each site, before its true request of ``where``, gets false ones; all must be refused.

    ``forge`` makes one false request, several or none, of a site's name and its true request. After them the site gets
    the true one, and the run must go on to its release by all. A false sum stops a site for good; so that several can be
    tried, and the true one after them, its disk is put back each time, as no attacker can.
    """
    found: dict[str, list[Refusal]] = {}
    places = where if isinstance(where, list) else [where]

    def request(phase: str, number: int, site: str, asked: bytes) -> bytes:
        if (phase, number) in places:
            made = forge(site, decode_request(asked))
            for false in [made] if isinstance(made, msgspec.Struct) else made:
                saved = journal_file(cohort, site).read_bytes()
                found.setdefault(site, []).append(refused(cohort, site, false))
                put_back(cohort, site, saved)
        return asked

    cohort.play(request=request, **play)
    check_released(cohort, cohort.coordinator.contributors)
    return found


def journal_file(cohort: Any, site: str) -> Path:
    return cohort.folder / site / "state" / JOURNAL_FILE


def put_back(cohort: Any, site: str, saved: bytes) -> None:
    """Undo that the site stopped."""
    stored = disk(cohort, site)
    if stored is not None and SiteState.from_bytes(stored).stopped:
        cohort.site(site).close()
        journal_file(cohort, site).write_bytes(saved)
        cohort.restart(site)


def check(found: dict[str, list[Refusal]], *wanted: Refusal, sites: Iterable[str] = EVERYBODY) -> None:
    """Each of these sites refused each false request with this code, and these words are in its own report."""
    assert set(found) == set(sites)
    for site, refusals in found.items():
        got = [(code, part if part in text else text) for (code, text), (_, part) in zip(refusals, wanted, strict=True)]
        assert got == list(wanted), site


def announced(asked: Any, **fields: Any) -> Any:
    """The request with another announcement of its last round."""
    *earlier, last = asked.previous
    return replace(asked, previous=(*earlier, replace(last, **fields)))


def with_sums(asked: Any, alter: Callable[[str, int, bytes], bytes]) -> Any:
    """The request with other ciphertexts in its last sum; ``alter`` gets scope, place and ciphertext."""
    sums = tuple(
        ScopedSum(each.scope, each.contributors, tuple(alter(each.scope, *one) for one in enumerate(each.ciphertexts)))
        for each in asked.previous[-1].sums
    )
    return announced(asked, sums=sums)


def combined(cohort: Any, data: bytes, other: bytes, operation: Callable[..., None]) -> bytes:
    """A sum after ``operation`` (add or subtract) with another ciphertext, of a sum or of an update."""
    params = cohort.coordinator.plan.packing.params
    running = load_ciphertext(params, data, form=CiphertextForm.SUMMED)
    form = CiphertextForm.FRESH if len(other) < len(data) * 3 // 4 else CiphertextForm.SUMMED
    operation(params, running, load_ciphertext(params, other, form=form))
    return save_ciphertext(running)


def as_sum(cohort: Any, fresh: bytes) -> bytes:
    """The ciphertext of an update in the form of a sum."""
    return save_ciphertext(load_ciphertext(cohort.coordinator.plan.packing.params, fresh, form=CiphertextForm.FRESH))


def modulus_of(cohort: Any) -> int:
    """q of the plan's ciphertexts; it is one prime."""
    (prime,) = seal_context(cohort.coordinator.plan.packing.params).first_context_data().parms().coeff_modulus()
    return int(prime.value())


def with_coefficients(data: bytes, alter: Callable[[Any], None], *, modulus: int) -> bytes:
    """A sum's ciphertext with other coefficients; ``alter`` changes an array of Python integers, shape (2, N)."""
    content_bytes = _HEAD + 2 * 8 * 4096
    content = pyarrow.decompress(data[16:], content_bytes, codec="zstd", asbytes=True)
    coefficients = np.frombuffer(content[_HEAD:], "<u8").reshape(2, -1).astype(object)
    alter(coefficients)
    packed = content[:_HEAD] + (coefficients % modulus).astype("<u8").tobytes()
    frame = pyarrow.compress(packed, codec="zstd", asbytes=True)
    return data[:8] + struct.pack("<Q", 16 + len(frame)) + frame


# --- a hostile site -----------------------------------------------------------------------------------------------------


def change(data: bytes, **fields: Any) -> bytes:
    """The same reply with other fields."""
    return encode_message(replace(decode_reply(data), **fields))


def with_update(data: bytes, alter: Callable[[str, tuple[bytes, ...]], Iterable[bytes]]) -> bytes:
    """The same update with other ciphertexts."""
    update = decode_reply(data).update
    sent = {each.scope: tuple(map(bytes, each.ciphertexts)) for each in update}
    return change(
        data, update=tuple(ScopedCiphertexts(scope, tuple(alter(scope, each))) for scope, each in sent.items())
    )


def presence_over(
    cohort: Any, site: str, number: int, names: Iterable[str], update: UpdateReply, *, listed: Iterable[str] = EVERYBODY
) -> bytes:
    """A site's word that it masked the update with these, on this key list."""
    run = federation(cohort)
    graph = round_graph(run, number, tuple(listed))
    vouched = presence_message(run, graph, tuple(names), epoch=update.epoch, digest=update.digests[GLOBAL])
    return sign(cohort.site(site).identity, CONTEXT_PRESENCE, vouched)


def books(cohort: Any) -> Any:
    """What the coordinator would go on from; equal before and after a reply that is refused."""
    held = holdings(cohort)
    masked, pipeline = held.masked, held.pipeline
    playing = masked and (
        dict(masked.presence),
        dict(masked.revealed),
        dict(masked.digests),
        dict(masked.aggregate.contributors),
        {scope: list(sums) for scope, sums in masked.aggregate.sums.items()},
    )
    prepared = [{number: dict(each) for number, each in kept.items()} for kept in (pipeline.keys, pipeline.dealt)]
    rest = (dict(held.admissions.sites), dict(held.admissions.sizes), held.envelopes.epoch, dict(held.approvals))
    return playing, prepared, rest


def rejected(cohort: Any, site: str, data: bytes) -> Refusal:
    """Give the coordinator a reply that it must refuse, with its books as they were."""
    before = books(cohort)
    with pytest.raises(FedseekError) as caught:
        cohort.coordinator.receive(node_of(cohort, site), data)
    assert books(cohort) == before
    return caught.value.code, str(caught.value)


def spoil(
    cohort: Any,
    where: Where | list[Where],
    site: str,
    forge: Callable[[bytes], Any],
    *,
    then_true: bool = False,
    silent: Where | None = None,
) -> list[Refusal]:
    """Play a run in which ``site`` gives false answers in ``where``; all must be refused, and the run be released.

    ``forge`` makes one false answer, or several, of the true one. Then comes the true one, or none at all. In
    ``silent`` the site does not answer.
    """
    found: list[Refusal] = []
    places = where if isinstance(where, list) else [where]

    def reply(phase: str, number: int, name: str, answer: bytes) -> bytes:
        if name != site or (phase, number) not in [*places, silent]:
            return answer
        if (phase, number) == silent:
            return b""
        made = forge(answer)
        found.extend(rejected(cohort, site, data) for data in ([made] if isinstance(made, bytes) else made))
        return answer if then_true else b""

    cohort.play(reply=reply)
    check_released(cohort)
    return found


def check_rejected(found: list[Refusal], *wanted: Refusal) -> None:
    got = [(code, part if part in text else text) for (code, text), (_, part) in zip(found, wanted, strict=True)]
    assert got == list(wanted)


def lost(phase: str, number: int, site: str) -> Callable[..., bytes]:
    """The answer of one site in one exchange gets lost, or is thrown away."""
    return at(phase, number, site, lambda answer: b"")


def at(phase: str, number: int, site: str, alter: Callable[[bytes], bytes]) -> Callable[..., bytes]:
    """Alter the answer of one site in one exchange; leave all others alone."""
    return lambda *where_and_data: (
        alter(where_and_data[3]) if where_and_data[:3] == (phase, number, site) else where_and_data[3]
    )


def open_requests(cohort: Any) -> dict[str, bytes]:
    """By site, what the coordinator has asked last."""
    asked = cohort.coordinator._requests
    return {cohort.services[node].identity.name: data for node, data in asked.items()}


def nobody_applies(cohort: Any, sites: Iterable[str]) -> set[Refusal]:
    """The coordinator's last requests are refused by each of these sites; none has released anything."""
    asked = open_requests(cohort)
    assert not replies(cohort, ReleaseApproved)
    return {refused(cohort, site, asked[site]) for site in sites}
