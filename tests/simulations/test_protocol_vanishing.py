"""Sites that deal shares and send no update: the adapter goes on, a head opens whole or not at all."""

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from four_sites import KINDS, LAYOUTS, RANGE, RUN, WEIGHTS, integer_sums, messages, participants, start

from fedseek.encode import decode_sum
from fedseek.errors import CohortTooSmall
from fedseek.identity.keys import SiteIdentity
from fedseek.messages import AggregateDown, SharesRevealed
from simulations.protocol import encode_scopes, run_round


@pytest.fixture
def plan(tiny_plan):
    return tiny_plan(
        cohort={"max_sites": 4, "weighting": "records", "record_cap": 10},
        training={"server_learning_rate": 0.5, "server_momentum": 0.9},
    )


@pytest.mark.parametrize("gone", KINDS)
def test_a_site_that_vanishes_is_left_out_of_the_sum_and_of_nothing_else(plan, gone):
    sites = participants()
    outcome = run_round(plan, sites, run=RUN, number=1, vanish=[gone])
    survivors = [site for site in sites if site.identity.name != gone]
    for name, kind in KINDS.items():
        summed = outcome.sites[name].summed
        # the masks of its kind's head do not cancel without it
        assert set(summed) == {"global", *([f"kind/{kind}"] if kind != KINDS[gone] else [])}
        assert summed["global"].contributors == 3
        assert summed["global"].weight == sum(WEIGHTS.values()) - WEIGHTS[gone]
    seeds = {site.identity.name: number for number, site in enumerate(sites)}
    slots = [
        encode_scopes(plan, replace(site, rng=np.random.default_rng([0, seeds[site.identity.name], 1])))["global"]
        for site in survivors
    ]
    plain = decode_sum(
        reduce(np.add, slots), LAYOUTS["global"], packing=plan.packing, value_range=RANGE, weight_cap=plan.weight_cap
    )
    assert (outcome.sites["st-anna"].summed["global"].mean == plain.mean).all()


@pytest.mark.parametrize("gone", KINDS)
def test_the_head_of_a_kind_that_lost_a_site_stays_as_it_was_and_the_other_is_summed(plan, gone):
    whole = run_round(plan, participants(), run=RUN, number=1)
    outcome = run_round(plan, participants(), run=RUN, number=1, vanish=[gone])
    for name, kind in KINDS.items():
        head, held = f"kind/{kind}", outcome.sites[name].scopes[f"kind/{kind}"]
        if kind == KINDS[gone]:
            assert (held.weights == start(head).weights).all()
            assert not held.momentum.any()
            assert held.value_range == RANGE
            assert outcome.sites[name].digests[head] == start(head).digest()
        else:  # to the bit as in a round from which nobody vanished
            assert (held.weights == whole.sites[name].scopes[head].weights).all()
            assert outcome.sites[name].digests[head] != start(head).digest()


def test_the_sum_of_a_closed_head_is_sent_to_nobody(plan):
    outcome = run_round(plan, participants(), run=RUN, number=1, vanish=["st-anna"])
    downs = messages(outcome, AggregateDown)
    assert {each.scope for down in downs for each in down.sums} == {"global", "kind/bank"}


def test_survivors_reveal_one_share_for_each_site_whatever_its_head(plan):
    outcome = run_round(plan, participants(), run=RUN, number=1, vanish=["st-anna"])
    for each in messages(outcome, SharesRevealed):
        assert (set(each.self_masks), set(each.mask_keys)) == (set(KINDS) - {"st-anna"}, {"st-anna"})


def test_a_head_that_was_closed_moves_again_in_the_next_round(plan):
    after_first = run_round(plan, participants(), run=RUN, number=1, vanish=["st-anna"])
    second = participants(scopes={name: site.scopes for name, site in after_first.sites.items()}, seed=2)
    outcome = run_round(plan, second, run=RUN, number=2)
    sums = integer_sums(plan, second, seed=2)["kind/hospital"]
    plain = decode_sum(
        sums, LAYOUTS["kind/hospital"], packing=plan.packing, value_range=RANGE, weight_cap=plan.weight_cap
    )
    for name in ("仁济医院", "st-anna"):
        assert (outcome.sites[name].summed["kind/hospital"].mean == plain.mean).all()


def test_a_head_of_three_is_closed_when_one_vanishes_though_two_are_left(tiny_plan):
    plan = tiny_plan(cohort={"max_sites": 5, "weighting": "records", "record_cap": 10})
    *sites, last = participants()
    third = replace(sites[0], identity=SiteIdentity.generate("banque-août", "bank"))
    cohort = [*sites, last, third]
    assert run_round(plan, cohort, run=RUN, number=1).sites["北岸银行"].summed["kind/bank"].contributors == 3
    outcome = run_round(plan, cohort, run=RUN, number=1, vanish=["harbour-bank"])
    for name in ("北岸银行", "banque-août", "harbour-bank"):
        assert set(outcome.sites[name].summed) == {"global"}
        assert outcome.sites[name].digests["kind/bank"] == start("kind/bank").digest()
    assert set(outcome.sites["st-anna"].summed) == {"global", "kind/hospital"}
    assert outcome.sites["st-anna"].summed["global"].contributors == 4


def test_all_sites_agree_after_a_round_that_one_missed(plan):
    outcome = run_round(plan, participants(), run=RUN, number=1, vanish=["harbour-bank"])
    assert len({site.digests["global"] for site in outcome.sites.values()}) == 1


def test_more_sites_that_vanish_than_the_threshold_spares_give_the_round_up(plan):
    with pytest.raises(CohortTooSmall, match="2 sites survived, wanted at least 3 of 4"):
        run_round(plan, participants(), run=RUN, number=1, vanish=["st-anna", "harbour-bank"])


def test_a_head_of_one_site_stays_at_home_and_the_adapter_is_summed_all_the_same(tiny_plan):
    plan = tiny_plan(cohort={"max_sites": 4, "weighting": "records", "record_cap": 10})
    *sites, last = participants()[:4]
    at_home = replace(last, scopes={"global": last.scopes["global"]}, updates={"global": last.updates["global"]})
    lone = next(site for site in sites if site.identity.kind == "hospital")
    moved = SiteIdentity.generate("st-anna", "insurer")  # one bank pair, one hospital, one insurer
    lone_home = replace(lone, scopes={"global": lone.scopes["global"]}, updates={"global": lone.updates["global"]})
    cohort = [lone_home if site is lone else site for site in sites] + [replace(at_home, identity=moved)]
    outcome = run_round(plan, cohort, run=RUN, number=1)
    assert {scope for site in outcome.sites.values() for scope in site.summed} == {"global", "kind/bank"}
    assert outcome.sites["st-anna"].summed["global"].contributors == 4
