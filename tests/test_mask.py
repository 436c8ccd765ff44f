from itertools import chain, combinations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_round import LOW_ORDER, check_uniform, federate, make_identities, play_round

from fedseek.deal import RoundSecrets, draw_secrets, head_seed, mask_private_key, pairwise_seed
from fedseek.errors import WrongKey
from fedseek.mask import add_pairwise_mask, add_self_mask, mask_slots
from fedseek.secagg.stream import expand
from fedseek.unmask import total_mask

IDENTITIES = make_identities(24)
BANK, PEER, HOSPITAL = "北岸银行", "harbour-bank", "仁济医院"


@pytest.fixture(scope="module")
def plan(tiny_plan):
    return tiny_plan(cohort={"max_sites": 24})


@pytest.fixture(scope="module")
def small_rounds(plan):
    """Complete graphs of 3 to 6 sites."""
    cohorts = {count: dict(list(IDENTITIES.items())[:count]) for count in range(3, 7)}
    return {count: play_round(federate(plan, sites), sites) for count, sites in cohorts.items()}


@pytest.fixture(scope="module")
def four(small_rounds):
    return small_rounds[4]


@pytest.fixture(scope="module")
def six(small_rounds):
    """Three banks and three hospitals."""
    return small_rounds[6]


@pytest.fixture(scope="module")
def sparse(plan):
    played = play_round(federate(plan, IDENTITIES), IDENTITIES)
    assert len(played.graph.neighbours[BANK]) < 23  # or it would show nothing about sparse graphs
    return played


def added(vectors, modulus):
    return sum(vectors, np.zeros(5, dtype=object)) % modulus  # objects: Python integers do not overflow


def check_that_masks_come_off(played, updates, masked, participants, survivors):
    """What the survivors' sum of the adapter carries besides their updates is ``total_mask``, exactly."""
    self_seeds = {name: played.secrets[name].self_seed for name in survivors}
    mask_seeds = {name: played.secrets[name].mask_seed for name in participants if name not in survivors}
    record = played.record(participants, survivors)
    mask = total_mask(self_seeds, mask_seeds, record, played.federation, num_slots=5)
    left = added([masked[name]["global"] for name in survivors], played.modulus) - mask.astype(object)
    wanted = added([updates[name]["global"] for name in survivors], played.modulus)
    assert (left % played.modulus == wanted).all()


def check_heads(played, updates, masked, participants, survivors):
    """Heads carry no mask where their sum is open, and a mask in every slot where it is not."""
    opened = played.federation.open_scopes(participants, survivors)
    for scope, senders in played.federation.summed_scopes(participants).items():
        there = [name for name in senders if name in survivors]
        if scope == "global" or not there:
            continue
        got = added([masked[name][scope] for name in there], played.modulus)
        wanted = added([updates[name][scope] for name in there], played.modulus)
        assert (got == wanted).all() if scope in opened else (got != wanted).all()


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_masks_come_off_the_sum_of_every_set_of_survivors_exactly(small_rounds, count):
    played = small_rounds[count]
    updates = played.updates(seed=count)
    masked = played.mask(updates)
    subsets = chain.from_iterable(combinations(played.names, size) for size in range(1, count + 1))
    for survivors in subsets:  # also of those that are too few: that is for others to refuse
        check_that_masks_come_off(played, updates, masked, played.names, survivors)
        check_heads(played, updates, masked, played.names, survivors)


def test_masks_come_off_when_some_that_were_listed_dealt_no_shares(six):
    updates = six.updates()
    for away in six.names:
        participants = [name for name in six.names if name != away]
        masked = six.mask(updates, participants)
        assert all(set(mine) == set(six.scopes(name)) for name, mine in masked.items())  # two of each kind are left
        for gone in (None, *participants):
            survivors = [name for name in participants if name != gone]
            check_that_masks_come_off(six, updates, masked, participants, survivors)
            check_heads(six, updates, masked, participants, survivors)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_masks_come_off_in_a_sparse_graph_whoever_is_away_or_vanishes(sparse, data):
    updates = sparse.updates(seed=data.draw(st.integers(0, 99)))
    away = data.draw(st.sets(st.sampled_from(sparse.names), max_size=3))
    participants = [name for name in sparse.names if name not in away]
    vanished = data.draw(st.sets(st.sampled_from(participants), max_size=10))
    survivors = [name for name in participants if name not in vanished]
    masked = sparse.mask(updates, participants)
    check_that_masks_come_off(sparse, updates, masked, participants, survivors)
    check_heads(sparse, updates, masked, participants, survivors)


def formula(played, name, scope, slots, peers):
    """By the equations of the module in Python integers, from the streams alone."""
    secrets, total = played.secrets[name], slots.astype(object)
    if scope == "global":
        total += expand(secrets.self_seed, b"self", slots.size, played.modulus)
    private_key = mask_private_key(secrets.mask_seed)
    for peer in peers:
        keys, federation = played.keys[peer], played.federation
        seed = (
            pairwise_seed(private_key, keys, federation, me=name)
            if scope == "global"
            else head_seed(secrets, keys, federation, me=name)
        )
        pair = expand(seed, b"pair", slots.size, played.modulus).astype(object)
        total += pair if name < peer else -pair  # roster order is the order of names
    return (total % played.modulus).tolist()


def test_masked_slots_are_the_formula(six):
    for away in (None, "st-anna"):
        participants = [name for name in six.names if name != away]
        updates = six.updates()
        for name, masked in six.mask(updates, participants).items():
            for scope, slots in masked.items():
                peers = [peer for peer in six.federation.members(scope) if peer in participants and peer != name]
                assert slots.tolist() == formula(six, name, scope, updates[name][scope], peers)


def test_masked_slots_are_the_formula_in_a_sparse_graph(sparse):
    """The adapter is masked with neighbours, a head with all of the kind, neighbours or not."""
    updates = sparse.updates()
    for name, masked in sparse.mask(updates).items():
        kin = [peer for peer in sparse.names if peer != name and IDENTITIES[peer].kind == IDENTITIES[name].kind]
        assert set(kin) - set(sparse.graph.neighbours[name])
        for scope, slots in masked.items():
            peers = sparse.graph.neighbours[name] if scope == "global" else kin
            assert slots.tolist() == formula(sparse, name, scope, updates[name][scope], peers)


def test_nothing_is_drawn_and_no_argument_is_changed(four):
    updates = four.updates()
    kept = {name: {scope: slots.copy() for scope, slots in mine.items()} for name, mine in updates.items()}
    first, second = four.mask(updates), four.mask(updates)
    for name, mine in updates.items():
        for scope, slots in mine.items():
            assert (slots == kept[name][scope]).all()
            assert (first[name][scope] == second[name][scope]).all()
            assert (first[name][scope] != slots).all()


def test_masks_differ_between_scopes_sites_and_rounds(plan, four):
    zeros = {name: {scope: np.zeros(5, np.uint64) for scope in four.scopes(name)} for name in four.names}
    later = play_round(four.federation, four.identities, number=2)
    masks = [
        tuple(slots.tolist())
        for played in (four, later)
        for mine in played.mask(zeros).values()
        for slots in mine.values()
    ]
    assert len(set(masks)) == len(masks) == 16


def test_who_does_not_take_part_leaves_no_mask(six):
    updates = six.updates()[BANK]
    whole = six.mask_one(BANK, updates, six.names)
    fewer = six.mask_one(BANK, updates, [name for name in six.names if name != HOSPITAL])
    assert (whole["kind/bank"] == fewer["kind/bank"]).all()  # a hospital is in no mask of a bank's head
    assert (whole["global"] != fewer["global"]).all()
    fewer = six.mask_one(BANK, updates, [name for name in six.names if name != PEER])
    assert (whole["kind/bank"] != fewer["kind/bank"]).all()


def test_the_closing_round_masks_heads_alone_and_as_in_any_round(six):
    updates = six.updates()
    heads = {name: {scope: mine[scope] for scope in mine if scope != "global"} for name, mine in updates.items()}
    masked, whole = six.mask(heads), six.mask(updates)
    for name, mine in masked.items():
        (scope,) = mine
        assert (mine[scope] == whole[name][scope]).all()
    check_heads(six, updates, masked, six.names, six.names)  # no mask is left to take off


def with_key(played, me, **keys):
    """Round keys as ``me`` holds them, some of its peers' replaced."""
    return {peer: keys.get(peer, played.keys[peer]) for peer in played.graph.peers(me)}


def mask_with(played, me, slots, keys, secrets=None):
    arguments = (slots, secrets or played.secrets[me], keys, played.federation, played.graph)
    return mask_slots(*arguments, participants=played.names, me=me)


@pytest.mark.parametrize(("scope", "field"), [("global", "mask_key"), ("kind/bank", "share_key")])
def test_a_peers_key_of_low_order_stops_a_site_before_it_masks(four, scope, field):
    slots = {scope: four.updates()[BANK][scope]}
    for point in LOW_ORDER:
        keys = with_key(four, BANK, **{PEER: msgspec.structs.replace(four.keys[PEER], **{field: point})})
        with pytest.raises(WrongKey, match=f"'{PEER}' is of low order"):
            mask_with(four, BANK, slots, keys)


# --- what masks look like


@pytest.mark.parametrize("kept", ["both", "self mask", "pairwise masks"])
def test_an_update_of_zeros_looks_uniform_once_it_is_masked(four, kept):
    """Each lock by itself: whoever takes one kind of mask off still sees uniform slots."""
    count = 1 << 17
    secrets = draw_secrets()
    total = np.zeros(count, dtype=np.uint64)
    if kept != "pairwise masks":
        add_self_mask(total, secrets.self_seed, modulus=four.modulus)
    if kept != "self mask":
        key = mask_private_key(secrets.mask_seed)
        for peer in four.graph.neighbours[BANK]:
            seed = pairwise_seed(key, four.keys[peer], four.federation, me=BANK)
            add_pairwise_mask(total, seed, (BANK, peer), four.federation, modulus=four.modulus)
    if kept == "both":
        zeros = {"global": np.zeros(count, dtype=np.uint64)}
        assert (mask_with(four, BANK, zeros, four.keys, secrets)["global"] == total).all()
    check_uniform(total, four.modulus)


def test_the_uniformity_test_would_show_an_update_that_is_not_masked(four):
    slots = four.updates(size=1 << 17)[BANK]["global"] % np.uint64(1 << 40)
    with pytest.raises(AssertionError):
        check_uniform(slots, four.modulus)


def test_the_same_masks_hide_two_updates_no_longer(four):
    # Why secrets are drawn for each round: under the same masks the difference of two updates is in the open.
    one, two = four.updates(seed=1), four.updates(seed=2)
    difference = four.mask(two)[BANK]["global"].astype(object) - four.mask(one)[BANK]["global"].astype(object)
    plain = two[BANK]["global"].astype(object) - one[BANK]["global"].astype(object)
    assert ((difference - plain) % four.modulus == 0).all()


@pytest.mark.parametrize("scope", ["global", "kind/bank"])
def test_slots_that_are_not_reduced_are_not_masked(four, scope):
    slots = {scope: np.array([four.modulus], dtype=np.uint64)}
    with pytest.raises(ValueError, match="not reduced"):
        mask_with(four, BANK, slots, four.keys, RoundSecrets(bytes(16), bytes(16), b"\1" * 32))


# --- the mask of a sum


def test_the_total_mask_is_that_of_the_survivors(six):
    """By its definition, in Python integers from the streams alone."""
    for vanished in ((), (BANK,), (BANK, HOSPITAL)):
        survivors = [name for name in six.names if name not in vanished]
        self_seeds = {name: six.secrets[name].self_seed for name in survivors}
        mask_seeds = {name: six.secrets[name].mask_seed for name in vanished}
        wanted = np.zeros(9, dtype=object)
        for name in survivors:
            wanted += expand(self_seeds[name], b"self", 9, six.modulus)
            for gone in vanished:
                key = mask_private_key(mask_seeds[gone])
                seed = pairwise_seed(key, six.keys[name], six.federation, me=gone)
                pair = expand(seed, b"pair", 9, six.modulus).astype(object)
                wanted += pair if name < gone else -pair  # roster order is the order of names
        mask = total_mask(self_seeds, mask_seeds, six.record(six.names, survivors), six.federation, num_slots=9)
        assert mask.tolist() == (wanted % six.modulus).tolist()


def test_sites_that_vanished_leave_no_mask_with_each_other(six):
    vanished = (BANK, PEER)
    survivors = [name for name in six.names if name not in vanished]
    self_seeds = {name: six.secrets[name].self_seed for name in survivors}
    record = six.record(six.names, survivors)
    gone = {name: six.secrets[name].mask_seed for name in vanished}
    both = total_mask(self_seeds, gone, record, six.federation, num_slots=9).astype(object)
    none = total_mask(self_seeds, {}, record, six.federation, num_slots=9).astype(object)
    each = [total_mask(self_seeds, {name: gone[name]}, record, six.federation, num_slots=9) for name in vanished]
    assert ((sum(mask.astype(object) for mask in each) - none - both) % six.modulus == 0).all()


def test_the_mask_of_nobodys_sum_is_nothing(six):
    mask = total_mask({}, {}, six.record(six.names, ()), six.federation, num_slots=9)
    assert mask.tolist() == [0] * 9
