"""A coordinator that tells sites different things, to open one update: each test is one attack on real sites.

It works with one colluding site, which gives it the group key and both kinds of its shares. The tests count shares
against the threshold, try to read the update all the same, and show that a little more would be enough.

``test_open_...`` are attacks that succeed, or are noticed later than one would wish. They are what the threat model must
own up to; whoever closes one turns its test around.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from attacks import (
    ANNA,
    BEIAN,
    EVERYBODY,
    FIFTH,
    FIVE,
    GLOBAL,
    HARBOUR,
    RENJI,
    RUN,
    ask,
    attack,
    check,
    check_released,
    ended,
    federation,
    holdings,
    positions,
    refused,
    replies,
    state,
    update_of,
    without,
)
from msgspec.structs import replace
from plot import Plot

import fedseek.cohort
from fedseek.errors import SiteRefused, Tampered
from fedseek.messages import (
    MASK_KEY,
    SELF_MASK,
    AggregateDown,
    RoundRequest,
    SharesRevealed,
    UnmaskRequest,
    UpdateReply,
    decode_reply,
    decode_request,
    encode_message,
)

EIGHT = (*FIVE[:4], *((f"分行-{number}", "bank") for number in range(4)))
STORIES = pytest.mark.parametrize(("sites", "told_alive"), [(4, 1), (4, 2), (8, 3), (8, 4)])


# --- who survived -----------------------------------------------------------------------------------------------------


def lower_the_threshold(monkeypatch):
    """One share fewer opens a secret: what the attacks below need to succeed."""
    true = fedseek.cohort.choose_graph

    def lower(*args, **options):
        params = true(*args, **options)
        return dataclasses.replace(params, threshold=params.threshold - 1)

    monkeypatch.setattr(fedseek.cohort, "choose_graph", lower)


def tell_two_stories(cohort, told_alive, *, until=None):
    """Tell ``told_alive`` honest sites, the victim among them, that it survived round 1, and the others that it did not.

    st-anna works with the coordinator. Returns what the two know when all sites have answered.
    """
    names = federation(cohort).roster.names
    honest = [BEIAN, *(name for name in names if name not in (BEIAN, ANNA))]
    plots = []

    def request(phase, number, site, asked):
        if (phase, number) != ("unmask", 1):
            return asked
        if not plots:
            plots.append(Plot(cohort, ANNA))
        if site in honest[:told_alive]:
            return asked
        message = decode_request(asked)
        gone = positions(cohort, *(name for name in names if name != BEIAN))
        return encode_message(replace(message, survivors=gone, presence=without(message.presence, BEIAN)))

    cohort.play(request=request, until=until)
    return plots[0]


@STORIES
def test_two_stories_to_two_groups_open_nothing(begin, sites, told_alive):
    """One group is told that a site survived, the other that it vanished; a colluding site gives both kinds.

    With n = 4 a secret takes t = 3 shares, with n = 8 it takes 5. There are n - 1 honest answers and two shares of the
    colluder's: never 2 t. The round is lost, the next one takes place.
    """
    cohort = begin(sites=EIGHT[:sites], cohort={"max_sites": sites})
    plot = tell_two_stories(cohort, told_alive)
    threshold = plot.graph.threshold
    assert threshold == {4: 3, 8: 5}[sites]
    assert plot.count(BEIAN) == {SELF_MASK: told_alive + 1, MASK_KEY: sites - told_alive}
    assert min(plot.count(BEIAN).values()) == threshold - 1
    with pytest.raises(Tampered):
        plot.open_update(update_of(cohort, BEIAN, 1))
    everybody = {name for name, _ in EIGHT[:sites]}
    assert {number: set(names) for number, names in ended(cohort).items()} == {1: set(), 2: everybody, 3: everybody}
    check_released(cohort, everybody)


@STORIES
def test_with_a_threshold_one_lower_the_same_two_stories_open_an_update(begin, monkeypatch, sites, told_alive):
    """The attack is a real one: with n / 2 shares for a secret, the coordinator and one site read the victim's update."""
    lower_the_threshold(monkeypatch)
    cohort = begin(sites=EIGHT[:sites], cohort={"max_sites": sites})
    plot = tell_two_stories(cohort, told_alive, until=("round", 2))
    assert plot.graph.threshold == sites // 2
    opened = plot.open_update(update_of(cohort, BEIAN, 1))
    assert opened.contributors == 1
    assert np.abs(opened.mean).max() > 0


def test_an_update_kept_back_stays_closed_though_its_mask_key_is_rebuilt(begin):
    """It came in time, and the others are told that it did not; its own site is told that all survived.

    Three shares of three rebuild the mask key, so all pairwise masks come off. Of the self mask there are two: the
    site's own and the colluder's. With the seed of that mask the same attacker reads the update. And the site that was
    told another story refuses the sum.
    """
    cohort, plots, late, self_seeds = begin(3), [], [], []

    def keep(phase, number, site, answer):
        if (phase, number, site) == ("round", 1, BEIAN):
            late.append(decode_reply(answer))
            return b""
        return answer

    def request(phase, number, site, asked):
        if (phase, number, site) == ("round", 1, BEIAN):
            self_seeds.append(state(cohort, BEIAN).rounds[1].secrets.self_seed)
        if (phase, number) == ("unmask", 1) and not plots:
            plots.append(Plot(cohort, ANNA))
            presence = {name: update_of(cohort, name, 1).presence for name in (HARBOUR, ANNA, RENJI)}
            all_survived = UnmaskRequest(run=RUN, round=1, survivors=(0, 1, 2, 3), presence=presence)
            assert isinstance(ask(cohort, BEIAN, all_survived), SharesRevealed)
        return asked

    with pytest.raises(SiteRefused, match="'北岸银行' refused: WrongRound"):
        cohort.play(request=request, reply=keep)
    assert "this site revealed shares for" in cohort.events[BEIAN][-1]["text"]
    (plot,) = plots
    assert plot.count(BEIAN) == {SELF_MASK: 2, MASK_KEY: 3}
    assert plot.rebuild(BEIAN, MASK_KEY) is not None
    with pytest.raises(Tampered):
        plot.open_update(late[0])
    assert plot.open_update(late[0], stolen=self_seeds[0]).contributors == 1


def test_both_shares_are_never_revealed(begin):
    """A second announcement, with one survivor less: refused, written down, also after a restart."""
    cohort = begin()

    def forge(site, asked):
        first = ask(cohort, site, asked)
        gone = next(name for name in EVERYBODY if name != site)
        second = replace(
            asked,
            survivors=positions(cohort, *(name for name in EVERYBODY if name != gone)),
            presence=without(asked.presence, gone),
        )
        yield second
        cohort.restart(site)
        yield second
        noted = cohort.site(site)._journal.refusals(RUN)
        assert [(refusal.step.phase, refusal.step.round) for refusal in noted] == [("unmask", 1)] * 2
        assert gone in first.self_masks
        assert not state(cohort, site).rounds[1].held, "it could not even if it would"

    check(attack(cohort, ("unmask", 1), forge), *[("WrongRound", "another request")] * 2)
    assert not any(each.mask_keys for each in replies(cohort, SharesRevealed))


def test_a_round_is_masked_and_trained_once_whoever_is_said_to_take_part(begin):
    """Two masked updates of one round would tell their difference. Also after a restart there is one."""
    cohort = begin()

    def forge(site, asked):
        ask(cohort, site, asked)
        gone = next(name for name in EVERYBODY if name != site)
        fewer = replace(
            asked,
            participants=positions(cohort, *(name for name in EVERYBODY if name != gone)),
            boxes=without(asked.boxes, gone),
        )
        yield fewer
        cohort.restart(site)
        yield fewer
        assert len(cohort.site(site)._journal.refusals(RUN)) == 2
        assert state(cohort, site).steps_done == (1,)

    check(attack(cohort, ("round", 1), forge), *[("WrongRound", "another request")] * 2)
    sent = [(each.site, each.presence) for each in replies(cohort, UpdateReply) if each.round == 1]
    assert len(sent) == 8
    assert len(set(sent)) == 4


# --- who takes part, and from which adapter ---------------------------------------------------------------------------


def test_two_stories_about_who_takes_part_reveal_nothing(begin):
    """One site masks with two others, these with all; each word on whom it masked with is signed and rides along.

    The honest coordinator does not add such an update. The site that was told another story refuses the sum.
    """
    cohort, apart = begin(3), []

    def request(phase, number, site, asked):
        message = decode_request(asked)
        if (phase, number, site) == ("round", 1, HARBOUR):
            fewer = positions(cohort, HARBOUR, RENJI, BEIAN)
            return encode_message(replace(message, participants=fewer, boxes=without(message.boxes, ANNA)))
        if isinstance(message, UnmaskRequest) and number == 1:
            word = update_of(cohort, HARBOUR, 1).presence
            false = replace(message, survivors=(0, 1, 2, 3), presence={**message.presence, HARBOUR: word})
            apart.append(refused(cohort, site, false))
            theirs = {name: update_of(cohort, name, 1).presence for name in (RENJI, BEIAN)}
            three = UnmaskRequest(run=RUN, round=1, survivors=positions(cohort, HARBOUR, *theirs), presence=theirs)
            apart.append(refused(cohort, HARBOUR, three))
        return asked

    with pytest.raises(SiteRefused, match="'harbour-bank' refused: WrongRound"):
        cohort.play(request=request)
    assert [code for code, _ in apart] == ["WrongKey"] * 6
    assert all("does not verify" in text for _, text in apart)
    assert ended(cohort)[1] == (ANNA, RENJI, BEIAN)
    assert f"{ANNA} announced, with whom this site did not mask" in cohort.events[HARBOUR][-1]["text"]


def test_a_site_told_that_a_round_was_given_up_is_left_alone_by_the_others(begin):
    """It believes it, and goes on from another adapter than the others. None of them reveals a share for its update.

    Its word on what it masked holds the digest of the adapter it started from. Each side can be said to have vanished,
    no sum mixes the two. The honest coordinator ends such a run: the digests differ.
    """
    cohort, replied = begin(), {}
    exchange = cohort.play(until=("round", 2))
    for node, data in exchange.requests.items():
        site, asked = cohort.services[node].identity.name, decode_request(data)
        if site == ANNA:
            asked = replace(asked, previous=(AggregateDown(round=1, epoch=0, survivors=(), sums=()),))
        replied[site] = ask(cohort, site, asked)
    presence = {site: reply.presence for site, reply in replied.items()}
    found = {
        site: [
            refused(
                cohort,
                site,
                UnmaskRequest(run=RUN, round=2, survivors=(0, 1, 2, 3), presence=without(presence, site)),
            )
        ]
        for site in EVERYBODY
    }
    check(found, ("WrongKey", "does not verify"))
    assert replied[ANNA].digests[GLOBAL] != replied[RENJI].digests[GLOBAL]


def test_two_stories_about_the_key_list_reveal_nothing(begin):
    """One site is told a key list of five, the others one of four; the same four take part. Presence signs the list."""
    cohort = begin(sites=FIVE, cohort={"max_sites": 5})
    asked = {
        cohort.services[node].identity.name: decode_request(data)
        for node, data in cohort.play(until=("shares", 1)).requests.items()
    }
    four = tuple(name for name in asked if name != FIFTH)
    for name in four[:-1]:
        keys = tuple(each for each in asked[name].keys if each.site != FIFTH)
        asked[name] = replace(asked[name], listed=positions(cohort, *four), keys=keys)
    dealt = {name: ask(cohort, name, asked[name]).shares for name in four}

    def round_request(name):
        return RoundRequest(
            run=RUN,
            round=1,
            previous=(),
            epoch=0,
            envelopes=holdings(cohort).envelopes.for_site(name),
            participants=positions(cohort, *four),
            boxes={dealer: dealt[dealer].boxes[name] for dealer in four if dealer != name},
            next_listed=(),
            next_keys=(),
        )

    presence = {name: ask(cohort, name, round_request(name)).presence for name in four}

    def unmask_request(name):
        return UnmaskRequest(run=RUN, round=1, survivors=positions(cohort, *four), presence=without(presence, name))

    found = {name: [refused(cohort, name, unmask_request(name))] for name in four}
    check(found, ("WrongKey", "does not verify"), sites=four)
    assert [len(state(cohort, name).rounds[1].listed) for name in four] == [4, 4, 4, 5]


def test_open_with_a_bank_that_colludes_the_coordinator_chooses_whose_head_to_read(begin):
    """Succeeds with ``min_contributors`` of two: of three banks it leaves the other honest one out of the round.

    Then the two that take part mask their heads with each other, and one of them colludes. A plan that asks for
    ``min_contributors`` of colluders + 2 does not send such a head.
    """
    cohort, plots = begin(3, sites=FIVE, cohort={"max_sites": 5}), []

    def request(phase, number, site, asked):
        if (phase, number, site) == ("round", 1, FIFTH):
            plots.append(Plot(cohort, FIFTH))
        return asked

    cohort.play(request=request, away=lambda *where: where == ("shares", 1, HARBOUR), until=("unmask", 1))
    opened = plots[0].open_head(update_of(cohort, BEIAN, 1), "kind/bank")
    assert opened.contributors == 1
    assert np.abs(opened.mean).max() > 0
