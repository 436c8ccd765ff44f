"""Masks of heads: a head's sum opens whole or not at all (docs/adr/0012)."""

from dataclasses import replace
from itertools import chain, combinations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_round import check_uniform, federate, make_identities, play_round

from fedseek.cohort import round_graph
from fedseek.deal import draw_secrets, head_seed
from fedseek.mask import add_pairwise_mask

SIX = make_identities(6, ("bank", "bank", "hospital", "bank", "bank", "hospital"))
BANKS = tuple(sorted(name for name, identity in SIX.items() if identity.kind == "bank"))
HOSPITALS = tuple(sorted(name for name, identity in SIX.items() if identity.kind == "hospital"))
MANY = 1 << 14  # slots to judge uniformity by, in 64 bins of 256


@pytest.fixture(scope="module")
def plan(tiny_plan):
    return tiny_plan(cohort={"max_sites": 24})


@pytest.fixture(scope="module")
def six(plan):
    """Four banks and two hospitals."""
    return play_round(federate(plan, SIX), SIX)


@pytest.fixture(scope="module")
def apart(plan):
    """24 sites in a sparse graph; the two hospitals are not neighbours."""
    identities = make_identities(24, ("hospital", *["bank"] * 11))
    federation = federate(plan, identities)
    one, other = federation.members("kind/hospital")
    numbers = (n for n in range(1, 500) if other not in round_graph(federation, n, identities).neighbours[one])
    return play_round(federation, identities, number=next(numbers))  # of 23 others, 10 are neighbours


def zeros(played, size):
    return {name: {scope: np.zeros(size, np.uint64) for scope in played.scopes(name)} for name in played.names}


def combine(played, masked, scope, coefficients):
    """A linear combination of masked updates, as a coordinator could make it under encryption."""
    parts = [masked[name][scope].astype(object) * factor for name, factor in coefficients.items()]
    return (sum(parts) % played.modulus).astype(np.uint64)


def subsets(names, *, up_to):
    return chain.from_iterable(combinations(names, size) for size in range(1, up_to + 1))


# --- whole, or nothing


@pytest.mark.parametrize("away", [(), BANKS[:1], BANKS[:2], HOSPITALS])
def test_masks_cancel_over_all_of_a_kind_and_leave_every_other_sum_uniform(six, away):
    participants = [name for name in six.names if name not in away]
    masked = six.mask(zeros(six, MANY), participants)
    for scope, senders in six.federation.summed_scopes(participants).items():
        if scope != "global":
            assert not combine(six, masked, scope, dict.fromkeys(senders, 1)).any()
            for some in subsets(senders, up_to=len(senders) - 1):
                check_uniform(combine(six, masked, scope, dict.fromkeys(some, 1)), six.modulus, bins=64)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**44), min_size=4, max_size=4).filter(lambda factors: len(set(factors)) > 1))
def test_any_combination_that_does_not_count_all_of_a_kind_alike_is_uniform(six, factors):
    masked = six.mask(zeros(six, MANY))
    found = combine(six, masked, "kind/bank", dict(zip(BANKS, factors, strict=True)))
    check_uniform(found, six.modulus, bins=64)


def test_a_multiple_of_the_whole_sum_is_all_that_opens(six):
    updates = six.updates()
    masked = six.mask(updates)
    for factor in (1, 2, six.modulus - 1):
        counted_alike = dict.fromkeys(BANKS, factor)
        got, wanted = (combine(six, each, "kind/bank", counted_alike) for each in (masked, updates))
        assert (got == wanted).all()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whoever_is_told_what_a_head_opens_with_all_that_its_site_masked_with_or_not_at_all(six, data):
    """A coordinator that tells each bank another list of participants, and adds what it likes."""
    told = {}
    for name in BANKS:
        others = data.draw(st.sets(st.sampled_from([bank for bank in BANKS if bank != name]), min_size=1))
        told[name] = {name, *others}
    factors = dict(zip(BANKS, data.draw(st.tuples(*[st.integers(0, 2)] * 4).filter(any)), strict=True))
    updates = zeros(six, 5)
    masked = {name: six.mask_one(name, {"kind/bank": updates[name]["kind/bank"]}, told[name]) for name in BANKS}
    mutual = {name: all(name in told[peer] for peer in told[name]) for name in BANKS}
    opens = all(
        mutual[name] and all(factors[peer] == factors[name] for peer in told[name]) for name in BANKS if factors[name]
    )
    left = combine(six, masked, "kind/bank", factors)
    assert not left.any() if opens else left.all()
    if opens:
        assert sum(map(bool, factors.values())) >= 2


# --- nothing that is shared out opens a head


def changed(played, **secrets):
    """The round of the same keys in which one bank's secrets are others."""
    mine = msgspec.structs.replace(played.secrets[BANKS[0]], **secrets)
    return replace(played, secrets={**played.secrets, BANKS[0]: mine})


def test_a_heads_masks_do_not_come_from_secrets_of_which_others_hold_shares(six):
    slots, other = zeros(six, 5)[BANKS[0]], draw_secrets()
    right = six.mask_one(BANKS[0], slots, six.names)
    for secrets in ({"mask_seed": other.mask_seed}, {"self_seed": other.self_seed}):
        masked = changed(six, **secrets).mask_one(BANKS[0], slots, six.names)
        assert (masked["kind/bank"] == right["kind/bank"]).all()
        assert (masked["global"] != right["global"]).all()
    masked = changed(six, share_key=other.share_key).mask_one(BANKS[0], slots, six.names)
    assert (masked["kind/bank"] != right["kind/bank"]).all()
    assert (masked["global"] == right["global"]).all()


def test_a_site_that_colludes_takes_off_the_masks_it_shares_and_no_others(six):
    masked = six.mask(zeros(six, MANY))
    for traitors in subsets(BANKS, up_to=3):
        honest = [name for name in BANKS if name not in traitors]
        for name in honest:
            left = masked[name]["kind/bank"].copy()
            for traitor in traitors:
                seed = head_seed(six.secrets[traitor], six.keys[name], six.federation, me=traitor)
                add_pairwise_mask(left, seed, (traitor, name), six.federation, modulus=six.modulus)
            if len(honest) > 1:
                check_uniform(left, six.modulus, bins=64)
            else:  # the limit: what is left of the whole sum after the others' heads is this one's
                assert not left.any()


# --- kin that are no neighbours


def test_heads_of_two_sites_far_apart_in_a_sparse_graph_are_masked_and_sum_right(apart):
    one, other = hospitals = apart.federation.members("kind/hospital")
    assert other not in apart.graph.neighbours[one]
    assert apart.graph.kin[one] == (other,)
    assert len(apart.names) == 24
    updates = apart.updates()
    masked = apart.mask(updates)
    for name in hospitals:
        assert (masked[name]["kind/hospital"] != updates[name]["kind/hospital"]).all()
    both = dict.fromkeys(hospitals, 1)
    got, wanted = (combine(apart, each, "kind/hospital", both) for each in (masked, updates))
    assert (got == wanted).all()


def test_each_of_two_heads_far_apart_is_uniform(apart):
    masked = apart.mask(zeros(apart, MANY))
    for name in apart.federation.members("kind/hospital"):
        check_uniform(masked[name]["kind/hospital"], apart.modulus, bins=64)


# --- heads that stay at home


def test_a_site_alone_of_its_kind_cannot_send_its_head(six):
    me, gone = HOSPITALS
    participants = [name for name in six.names if name != gone]
    slots = six.updates()[me]
    assert "kind/hospital" not in six.federation.summed_scopes(participants)
    with pytest.raises(ValueError, match="'kind/hospital': no other site to mask with"):
        six.mask_one(me, slots, participants)
    assert set(six.mask(six.updates(), participants)[me]) == {"global"}


def test_a_site_whose_kind_shares_no_head_cannot_send_one(tiny_plan):
    played = play_round(federate(tiny_plan(cohort={"max_sites": 6, "min_contributors": 3}), SIX), SIX)
    slots = {"kind/hospital": np.zeros(5, np.uint64)}
    for me in HOSPITALS:
        assert played.graph.kin[me] == ()
        with pytest.raises(ValueError, match="no other site to mask with"):
            played.mask_one(me, slots, played.names)
    assert set(played.mask(played.updates())[BANKS[0]]) == {"global", "kind/bank"}
