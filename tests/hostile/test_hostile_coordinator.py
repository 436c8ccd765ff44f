"""A coordinator in the middle: other keys, rosters, boxes and strangers. Each test is one attack on real sites.

Every attack goes through ``attack``: at every honest site nothing was applied, trained or stored, nothing but a code
came back, and the true request afterwards is answered, up to a release of the run. What it can do to sums is in
test_hostile_sums.py, with stories in test_hostile_stories.py.
"""

from __future__ import annotations

import pytest
from attacks import (
    EVERYBODY,
    FIFTH,
    FIVE,
    HARBOUR,
    KIND_OF,
    RUN,
    ask,
    attack,
    check,
    disk,
    federation,
    holdings,
    replies,
)
from msgspec.structs import replace

from fedseek.deal import advertise, draw_secrets
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.messages import (
    KeyRequest,
    SharesSealed,
    UnmaskRequest,
)

WHERE_KEYS_ARE = pytest.mark.parametrize(
    ("where", "place", "number"), [(("shares", 1), "keys", 1), (("round", 1), "next_keys", 2)], ids=["first", "later"]
)


def keys_of(cohort, number):
    return holdings(cohort).pipeline.keys[number]


@WHERE_KEYS_ARE
def test_a_man_in_the_middle_with_round_keys_of_its_own_is_refused(begin, where, place, number):
    cohort = begin()

    def forge(site, asked):
        first, *rest = getattr(asked, place)
        impostor = SiteIdentity.generate(first.site, KIND_OF[first.site])
        made = advertise(draw_secrets(), federation(cohort), number, identity=impostor)
        yield replace(asked, **{place: (made, *rest)})
        yield replace(asked, **{place: (replace(first, mask_key=made.mask_key), *rest)})
        yield replace(asked, **{place: (replace(first, share_key=made.share_key), *rest)})

    check(attack(cohort, where, forge), *[("WrongKey", "round-keys")] * 3)


@WHERE_KEYS_ARE
def test_two_sites_round_keys_swapped_are_refused(begin, where, place, number):
    def forge(site, asked):
        first, second, *rest = getattr(asked, place)
        yield replace(asked, **{place: (replace(first, site=second.site), replace(second, site=first.site), *rest)})

    check(attack(begin(), where, forge), ("WrongKey", "round-keys"))


@WHERE_KEYS_ARE
def test_round_keys_of_another_round_are_refused(begin, where, place, number):
    cohort = begin()

    def forge(site, asked):
        other = keys_of(cohort, 3 - number)
        old = tuple(other[each.site] for each in getattr(asked, place))
        yield replace(asked, **{place: old})
        yield replace(asked, **{place: tuple(replace(each, round=number) for each in old)})

    wanted = ("WrongRound", f"got those of round {3 - number}, wanted {number}")
    check(attack(cohort, where, forge), wanted, ("WrongKey", "round-keys"))


def test_a_false_roster_is_refused_by_every_site(begin):
    """With sealing and signing keys of the coordinator's own under a site's name; or with one site more."""
    cohort = begin()

    def forge(site, asked):
        entries = cohort.coordinator.roster.entries
        peer = next(name for name in EVERYBODY if name != site)
        impostor = SiteIdentity.generate(peer, KIND_OF[peer]).public()
        swapped = Roster.of(impostor if entry.name == peer else entry for entry in entries)
        yield replace(asked, roster=swapped.canonical_bytes())
        yield replace(
            asked, roster=Roster.of([*entries, SiteIdentity.generate("x", "bank").public()]).canonical_bytes()
        )
        assert disk(cohort, site) is None

    check(attack(cohort, ("plan", 1), forge), *[("PlanRefused", "not the one that is trusted")] * 2)


def test_strangers_of_the_coordinators_choice_are_not_dealt_shares(begin):
    """A name that is on no roster; and a site of the roster that is away, with keys the coordinator made for it."""
    cohort = begin(sites=FIVE, cohort={"max_sites": 5})

    def forge(site, asked):
        for name in (FIFTH, "陌生人"):
            made = SiteIdentity.generate(name, "bank")
            keys = advertise(draw_secrets(), federation(cohort), 1, identity=made)
            yield replace(asked, listed=(0, 1, 2, 3, 4), keys=(*asked.keys, keys))

    found = attack(cohort, ("shares", 1), forge, away=lambda *where: where[2] == FIFTH)
    check(found, ("WrongKey", "round-keys"), ("Malformed", "got keys of"))


@pytest.mark.parametrize(
    ("where", "field", "words"),
    [
        (("round", 1), "participants", f"hold {FIFTH}, not on the key list"),
        (("unmask", 1), "survivors", f"hold {FIFTH}, with whom this site did not mask"),
    ],
    ids=["mask", "reveal"],
)
def test_strangers_of_the_coordinators_choice_are_not_masked_with_nor_counted(begin, where, field, words):
    cohort = begin(sites=FIVE, cohort={"max_sites": 5})
    found = attack(
        cohort,
        where,
        lambda site, asked: replace(asked, **{field: (0, 1, 2, 3, 4)}),
        away=lambda *where: where[2] == FIFTH,
    )
    check(found, ("WrongRound", words))


def test_a_box_of_shares_opens_at_its_holder_and_in_its_round_only(begin):
    """Another site's box, last round's box, and one box under another dealer's name."""
    cohort = begin()

    def forge(site, asked):
        one, two, _ = asked.boxes
        first_round = {each.site: each.shares for each in replies(cohort, SharesSealed)}
        for box in (
            holdings(cohort).pipeline.dealt[2][one].boxes[two],
            first_round[one].boxes[site],
            asked.boxes[two],
        ):
            yield replace(asked, boxes={**asked.boxes, one: box})

    check(attack(cohort, ("round", 2), forge), *[("WrongKey", "the box does not open")] * 3)


def test_nobody_encrypts_under_an_old_group_key(begin):
    cohort = begin(3)

    def forge(site, asked):
        if isinstance(asked, UnmaskRequest):
            cohort.coordinator.request_rotation()
            return []
        return replace(asked, epoch=0)

    found = attack(cohort, [("unmask", 1), ("round", 2)], forge)
    check(found, ("WrongKey", "of epoch 0, the newest held here is of 1"))


def test_a_second_group_key_of_an_epoch_is_refused(begin):
    """Two sites are asked for it, each in good faith, to split the cohort."""
    cohort, second = begin(), {}

    def forge(site, asked):
        return [replace(asked, envelopes={0: second[0].envelopes[site]})]

    def reply(phase, number, site, answer):
        if (phase, number, site) == ("plan", 1, HARBOUR):
            second[0] = ask(cohort, HARBOUR, KeyRequest(run=RUN, epoch=0)).group_key
        return answer

    found = attack(cohort, ("round", 2), forge, reply=reply)
    check(found, ("WrongKey", "second group key of epoch 0"))
