"""A round under encryption against the same round in plaintext, and what the parties end up with."""

import inspect
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest

from fedseek.decrypt import apply_mean
from fedseek.encode import UpdateLayout, decode_sum, encode_update, next_value_range, quantiser_bound
from fedseek.errors import AdapterDiverged, CohortTooSmall, Malformed
from fedseek.identity.keys import SiteIdentity
from simulations.protocol import Participant, ScopeState, run_round

RUN = "试运行"
KINDS = {"北岸银行": "bank", "harbour-bank": "bank", "仁济医院": "hospital", "st-anna": "hospital"}
LAYOUTS = {
    "global": UpdateLayout("global", (("lora_B", (40, 50)), ("lora_B.二", (7,)))),
    "kind/bank": UpdateLayout("kind/bank", (("head.weight", (2, 8)),), ("held_back_count",)),
    "kind/hospital": UpdateLayout("kind/hospital", (("head.weight", (3, 8)),), ("held_back_count",)),
}
RANGE = 0.5
WEIGHTS = {"北岸银行": 10, "harbour-bank": 3, "仁济医院": 7, "st-anna": 1}


@pytest.fixture
def plan(tiny_plan):
    return tiny_plan(
        cohort={"max_sites": 4, "weighting": "records", "record_cap": 10},
        training={"server_learning_rate": 0.5, "server_momentum": 0.9},
    )


def start(scope):
    layout, rng = LAYOUTS[scope], np.random.default_rng([5, len(scope)])
    weights = rng.standard_normal(layout.num_values).astype(np.float32)
    return ScopeState(layout, weights, np.zeros(layout.num_values), RANGE)


def participants(*, scopes=None, seed=0, scale=0.02):
    """Four sites with updates of their own; ``scopes`` by site continues from an earlier round."""
    sites = []
    for number, (name, kind) in enumerate(KINDS.items()):
        mine = scopes[name] if scopes else {scope: start(scope) for scope in ("global", f"kind/{kind}")}
        rng = np.random.default_rng([seed, number])
        updates = {
            scope: (scale * rng.standard_normal(state.layout.num_values)).astype(np.float32)
            for scope, state in mine.items()
        }
        sites.append(
            Participant(
                SiteIdentity.generate(name, kind),
                mine,
                updates,
                metrics={f"kind/{kind}": {"held_back_count": 10.0 * (number + 1)}},
                weight=WEIGHTS[name],
                rng=np.random.default_rng([seed, number, 1]),
            )
        )
    return sites


def members_of(scope, sites):
    return [site for site in sites if scope in site.scopes]


def integer_sums(plan, sites, *, seed=0):
    """The same round without encryption: the slots that each site encodes, added as integers."""
    slots = {}
    for number, site in enumerate(sites):
        rng = np.random.default_rng([seed, number, 1])  # the rounding draws of the encrypted run
        for scope, state in site.scopes.items():
            encoded = encode_update(
                site.updates[scope],
                state.layout,
                packing=plan.packing,
                value_range=state.value_range,
                weight=site.weight,
                weight_cap=plan.weight_cap,
                metrics=site.metrics.get(scope, {}),
                rng=rng,
            )
            slots.setdefault(scope, []).append(encoded)
    return {scope: reduce(np.add, each) for scope, each in slots.items()}


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


def test_every_site_applies_to_what_it_holds_so_one_that_holds_other_weights_is_named(plan):
    *others, last = participants()
    held = last.scopes["global"]
    drifted = replace(held, weights=np.nextafter(held.weights, np.float32(np.inf)))
    last = replace(last, scopes={**last.scopes, "global": drifted})
    with pytest.raises(AdapterDiverged, match=r"'st-anna' holds other values of 'global'"):
        run_round(plan, [*others, last], run=RUN, number=1)


def test_bytes_are_counted_and_nothing_carried_shows_an_update(plan):
    sites = participants()
    outcome = run_round(plan, sites, run=RUN, number=1)
    sent = sum(site.bytes_up + site.bytes_down for site in outcome.sites.values())
    assert sent + sum(len(envelope) for envelope in outcome.carried[:4]) == sum(map(len, outcome.carried))
    for site in sites:
        for update in site.updates.values():
            assert not any(update.tobytes()[:32] in message for message in outcome.carried)


def test_the_whole_round_fits_on_a_page():
    assert len(inspect.getsource(run_round).splitlines()) <= 80


def test_fewer_sites_than_the_plan_wants_stop_the_round(tiny_plan):
    plan = tiny_plan(cohort={"min_sites": 3, "max_sites": 4, "weighting": "records", "record_cap": 10})
    with pytest.raises(CohortTooSmall, match="'kind/bank': 2 sites contributed; wanted at least 3"):
        run_round(plan, participants(), run=RUN, number=1)


def test_more_sites_than_the_packing_holds_stop_the_round(tiny_plan):
    plan = tiny_plan(cohort={"max_sites": 3, "weighting": "records", "record_cap": 10})
    with pytest.raises(Malformed, match="holds 3 sites"):
        run_round(plan, participants(), run=RUN, number=1)
