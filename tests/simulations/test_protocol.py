"""A round under encryption against the same round in plaintext, and what the parties end up with."""

import inspect
from dataclasses import replace
from functools import reduce

import msgspec
import numpy as np
import pytest
from four_sites import KINDS, LAYOUTS, RANGE, RUN, integer_sums, members_of, messages, participants, start

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.apply import ScopeState, apply_mean
from fedseek.cohort import Federation
from fedseek.encode import decode_sum, next_value_range, quantiser_bound
from fedseek.errors import AdapterDiverged, CohortTooSmall, Malformed, Tampered, WrongKey
from fedseek.groupkey import open_group_key
from fedseek.he.keys import decrypt_slots
from fedseek.identity.roster import Roster
from fedseek.messages import AggregateDown, GroupKeySealed, SharesDealt, SharesRevealed, UpdateReply
from fedseek.tag import check_tags, tag_key
from simulations.protocol import apply_down, ciphertexts_of, encode_scopes, run_round


@pytest.fixture
def plan(tiny_plan):
    return tiny_plan(
        cohort={"max_sites": 4, "weighting": "records", "record_cap": 10},
        training={"server_learning_rate": 0.5, "server_momentum": 0.9},
    )


def test_the_encrypted_sum_is_the_integer_sum_exactly(plan):
    sites = participants()
    outcome = run_round(plan, sites, run=RUN, number=1)
    for scope, slots in integer_sums(plan, sites).items():
        state = members_of(scope, sites)[0].scopes[scope]
        plain = decode_sum(
            slots, state.layout, packing=plan.packing, value_range=state.value_range, weight_cap=plan.weight_cap
        )
        for site in members_of(scope, sites):
            summed = outcome.sites[site.identity.name].summed[scope]
            assert (summed.mean == plain.mean).all()
            assert (summed.contributors, summed.weight) == (plain.contributors, plain.weight)
            assert summed.metrics == plain.metrics


@pytest.mark.parametrize("scope", LAYOUTS)
def test_the_mean_is_the_weighted_mean_of_the_members_within_the_quantiser_bound(plan, scope):
    sites = participants()
    members = members_of(scope, sites)
    weights = [site.weight for site in members]
    exact = np.average([site.updates[scope].astype(np.float64) for site in members], axis=0, weights=weights)
    bound = quantiser_bound(
        plan.packing, value_range=RANGE, contributors=len(members), weight=sum(weights), weight_cap=plan.weight_cap
    )
    summed = run_round(plan, sites, run=RUN, number=1).sites[members[0].identity.name].summed[scope]
    assert summed.saturated_fraction == 0
    assert 0 < np.abs(summed.mean - exact).max() <= bound < 0.05 * np.abs(exact).max()


def test_a_head_is_summed_over_its_kind_and_the_adapter_over_all(plan):
    sites = participants()
    outcome = run_round(plan, sites, run=RUN, number=1)
    for name, kind in KINDS.items():
        summed = outcome.sites[name].summed
        assert set(summed) == {"global", f"kind/{kind}"}
        assert (summed["global"].contributors, summed[f"kind/{kind}"].contributors) == (4, 2)
    assert outcome.sites["北岸银行"].summed["kind/bank"].metrics == {"held_back_count": 30.0}
    assert outcome.sites["st-anna"].summed["kind/hospital"].metrics == {"held_back_count": 70.0}

    # what the hospitals train does not reach the banks' head, nor does it leave the adapter alone
    changed = [
        replace(site, updates={scope: -update for scope, update in site.updates.items()})
        if site.identity.kind == "hospital"
        else site
        for site in participants()
    ]
    other = run_round(plan, changed, run=RUN, number=1).sites["北岸银行"].summed
    assert (other["kind/bank"].mean == outcome.sites["北岸银行"].summed["kind/bank"].mean).all()
    assert (other["global"].mean != outcome.sites["北岸银行"].summed["global"].mean).any()


def test_two_rounds_with_momentum_end_where_a_plaintext_run_ends(plan):
    first = participants(seed=1)
    after_first = run_round(plan, first, run=RUN, number=1)
    second = participants(scopes={name: site.scopes for name, site in after_first.sites.items()}, seed=2)
    after_second = run_round(plan, second, run=RUN, number=2)

    for scope in LAYOUTS:
        state = start(scope)
        for seed, sites in ((1, first), (2, second)):
            plain = decode_sum(
                integer_sums(plan, sites, seed=seed)[scope],
                state.layout,
                packing=plan.packing,
                value_range=state.value_range,
                weight_cap=plan.weight_cap,
            )
            weights, momentum = apply_mean(
                state.weights, plain.mean, state.momentum, learning_rate=0.5, momentum_factor=0.9
            )
            state = ScopeState(state.layout, weights, momentum, next_value_range(plain, state.value_range))
        for site in members_of(scope, second):
            held = after_second.sites[site.identity.name].scopes[scope]
            assert (held.weights == state.weights).all()
            assert (held.momentum == state.momentum).all()
            assert held.value_range == state.value_range != RANGE


def test_momentum_carries_the_first_round_into_the_second(plan):
    after_first = run_round(plan, participants(), run=RUN, number=1)
    scopes = {name: site.scopes for name, site in after_first.sites.items()}
    still = participants(scopes=scopes, scale=0.0)  # nobody moved: what moves is momentum alone
    moved = run_round(plan, still, run=RUN, number=2).sites["st-anna"].scopes["global"]
    before = scopes["st-anna"]["global"]
    carried = before.weights.astype(np.float64) + 0.5 * 0.9 * before.momentum
    assert (moved.weights == carried.astype(np.float32)).all()
    assert (moved.weights != before.weights).any()


def test_all_sites_end_with_the_same_digests(plan):
    sites = participants()
    outcome = run_round(plan, sites, run=RUN, number=1)
    for scope in LAYOUTS:
        digests = {outcome.sites[site.identity.name].digests[scope] for site in members_of(scope, sites)}
        assert len(digests) == 1
        assert digests != {start(scope).digest()}


def drifted(site, scope):
    """The site as one whose weights of a scope are not what all others hold."""
    held = site.scopes[scope]
    moved = replace(held, weights=np.nextafter(held.weights, np.float32(np.inf)))
    return replace(site, scopes={**site.scopes, scope: moved})


def test_a_site_that_starts_from_another_adapter_is_named_before_anything_is_revealed(plan):
    *others, last = participants()
    with pytest.raises(WrongKey, match=r"key of site 'st-anna' for 'fedseek/round-participants"):
        run_round(plan, [*others, drifted(last, "global")], run=RUN, number=1)


def test_every_site_applies_to_what_it_holds_so_one_that_holds_another_head_is_named(plan):
    *others, last = participants()
    with pytest.raises(AdapterDiverged, match=r"'st-anna' holds other values of 'kind/hospital'"):
        run_round(plan, [*others, drifted(last, "kind/hospital")], run=RUN, number=1)


def test_nothing_carried_shows_an_update(plan):
    sites = participants()
    outcome = run_round(plan, sites, run=RUN, number=1)
    forms = (GroupKeySealed, SharesDealt, UpdateReply, SharesRevealed, AggregateDown)
    assert [len(messages(outcome, form)) for form in forms] == [1, 4, 4, 4, 4]
    carried = b"".join(outcome.carried)
    for number, site in enumerate(sites):
        for update in site.updates.values():
            assert update.tobytes()[:32] not in carried
        again = replace(site, rng=np.random.default_rng([0, number, 1]))  # the rounding draws of the round
        for slots in encode_scopes(plan, again).values():
            assert slots[7:11].tobytes() not in carried


# --- one update alone


def colluding(plan, sites, outcome, number=1):
    """What a coordinator holds together with a site that gives its group key away."""
    roster = Roster.of(site.identity.public() for site in sites)
    federation = Federation.of(RUN, plan, roster)
    (sealed,) = messages(outcome, GroupKeySealed)
    traitor = sites[0].identity
    key = open_group_key(sealed.envelopes[traitor.name], federation, number, identity=traitor)
    return federation, key.secret


def decrypt_alone(plan, sites, reply, key):
    """Slots of one site's update, by scope, as if it were a sum."""
    aggregate = agg_init(plan.packing.params, ciphertexts_of(plan, sites), max_sites=4)
    agg_update(aggregate, reply.update)
    alone = agg_finish(aggregate, min_sites=1, scopes=[each.scope for each in reply.update])
    return {each.scope: decrypt_slots(key, each.ciphertexts) for each in alone}


def test_a_key_holder_that_is_handed_one_update_reads_nothing(plan):
    sites = participants()
    outcome = run_round(plan, sites, run=RUN, number=1)
    _, key = colluding(plan, sites, outcome)
    for reply in messages(outcome, UpdateReply):
        site = next(site for site in sites if site.identity.name == reply.site)
        site = replace(site, rng=np.random.default_rng([0, sites.index(site), 1]))
        for scope, slots in decrypt_alone(plan, sites, reply, key).items():
            plain = encode_scopes(plan, replace(site, scopes={scope: site.scopes[scope]}))[scope]
            assert (slots == plain).mean() < 0.001  # 1 in 2^45 by chance
            assert slots.max() > 0.99 * plan.packing.params.plain_modulus  # nothing of the encoding's bounds is left
            layout = site.scopes[scope].layout
            with pytest.raises(Malformed):
                decode_sum(slots, layout, packing=plan.packing, value_range=RANGE, weight_cap=plan.weight_cap)


def test_all_updates_but_one_do_not_show_that_one_either(plan):
    # A coordinator may add what it likes: without the shares of every mask a partial sum stays masked.
    sites = participants()
    outcome = run_round(plan, sites, run=RUN, number=1)
    federation, key = colluding(plan, sites, outcome)
    modulus = plan.packing.params.plain_modulus
    alone = [decrypt_alone(plan, sites, reply, key)["global"] for reply in messages(outcome, UpdateReply)]
    for left_out in range(4):
        partial = reduce(np.add, [slots for number, slots in enumerate(alone) if number != left_out]) % np.uint64(
            modulus
        )
        assert partial.max() > 0.99 * modulus
    whole = reduce(np.add, alone) % np.uint64(modulus)  # self masks are still in it
    with pytest.raises(Tampered):
        check_tags(
            whole,
            tag_key(key, federation, 1, "global"),
            survivors=federation.roster.names,
            modulus=modulus,
            what="sum",
        )


# --- sums that sites refuse


def test_a_sum_with_other_survivors_than_were_added_is_refused_by_every_site(plan):
    sites = participants()
    outcome = run_round(plan, sites, run=RUN, number=1)
    roster = Roster.of(site.identity.public() for site in sites)
    federation = Federation.of(RUN, plan, roster)
    (sealed,) = messages(outcome, GroupKeySealed)
    for down, site in zip(messages(outcome, AggregateDown), sites, strict=True):
        envelope = sealed.envelopes[site.identity.name]
        key = open_group_key(envelope, federation, 1, identity=site.identity)
        assert apply_down(federation, site, key, down).digests == outcome.sites[site.identity.name].digests
        for changed in ({"survivors": down.survivors[:3]}, {"round": 2}):
            with pytest.raises((Tampered, Malformed)):
                apply_down(federation, site, key, msgspec.structs.replace(down, **changed))


def test_the_whole_round_fits_on_a_page():
    assert len(inspect.getsource(run_round).splitlines()) <= 80


def test_fewer_sites_than_the_plan_wants_stop_the_round(tiny_plan):
    plan = tiny_plan(cohort={"min_sites": 4, "max_sites": 4, "weighting": "records", "record_cap": 10})
    with pytest.raises(CohortTooSmall, match="round 1: 3 sites are listed, wanted at least 4"):
        run_round(plan, participants()[:3], run=RUN, number=1)
    with pytest.raises(CohortTooSmall, match="3 sites survived, wanted at least 4"):
        run_round(plan, participants(), run=RUN, number=1, vanish=["st-anna"])


def test_more_sites_than_the_packing_holds_stop_the_round(tiny_plan):
    plan = tiny_plan(cohort={"max_sites": 3, "weighting": "records", "record_cap": 10})
    with pytest.raises(Malformed, match="holds 3 sites"):
        run_round(plan, participants(), run=RUN, number=1)
