import hashlib
from collections.abc import Callable
from itertools import combinations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from masked_round import LOW_ORDER, federate, flip, make_identities, play_round

from fedseek import deal
from fedseek.cohort import round_graph
from fedseek.deal import (
    HeldShares,
    RoundSecrets,
    advertise,
    check_dealt,
    check_keys,
    deal_shares,
    draw_secrets,
    head_seed,
    mask_private_key,
    open_box,
    pairwise_seed,
    secret_digest,
    share_digest,
)
from fedseek.errors import Malformed, WrongKey, WrongRound
from fedseek.identity.signing import CONTEXT_ROUND_KEYS, CONTEXT_SHARES, sign
from fedseek.messages import MASK_KEY, SELF_MASK
from fedseek.secagg.shamir import combine

IDENTITIES = make_identities(5)
BANK, PEER, HOSPITAL = "北岸银行", "harbour-bank", "仁济医院"


@pytest.fixture(scope="module")
def plan(tiny_plan):
    return tiny_plan(cohort={"max_sites": 5})


@pytest.fixture(scope="module")
def played(plan):
    return play_round(federate(plan, IDENTITIES), IDENTITIES)


@pytest.fixture(scope="module")
def elsewhere(plan, tiny_plan) -> dict[str, Callable]:
    """Federations of the same sites that differ from the right one in one thing."""
    others = {**IDENTITIES, "st-anna": make_identities(4)["st-anna"]}
    return {
        "run": federate(plan, IDENTITIES, run="试运行-2"),
        "plan": federate(tiny_plan(seed=1, cohort={"max_sites": 5}), IDENTITIES),
        "roster": federate(plan, others),
    }


# --- secrets and round keys


def test_secrets_are_fresh_and_of_one_strength():
    drawn = [draw_secrets() for _ in range(8)]
    seeds = [seed for each in drawn for seed in (each.mask_seed, each.self_seed)]
    assert len(set(seeds)) == len(seeds) == 16
    assert {len(seed) for seed in seeds} == {16}
    assert len({each.share_key for each in drawn}) == 8
    assert {len(each.share_key) for each in drawn} == {32}


def test_secrets_and_shares_show_themselves_nowhere(played):
    secrets, held = played.secrets[BANK], played.held[PEER][BANK]
    assert repr(secrets) == str(secrets) == "RoundSecrets(<redacted>)"
    assert f"{[held]}" == "[HeldShares(<redacted>)]"


def test_what_a_site_stores_of_a_round_comes_back(played):
    for kept, form in ((played.secrets[BANK], RoundSecrets), (played.held[PEER][BANK], HeldShares)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(kept), type=form) == kept


def test_the_mask_key_follows_from_its_seed_alone(played):
    secrets, keys = played.secrets[BANK], played.keys[BANK]
    again = mask_private_key(bytes(bytearray(secrets.mask_seed)))
    assert again.public_key().public_bytes_raw() == keys.mask_key
    assert keys.share_key == X25519PrivateKey.from_private_bytes(secrets.share_key).public_key().public_bytes_raw()
    assert mask_private_key(flip(secrets.mask_seed, 0)).public_key().public_bytes_raw() != keys.mask_key


def test_keys_of_another_round_are_refused_by_number(played):
    with pytest.raises(WrongRound, match="got those of round 1, wanted 2"):
        check_keys(played.keys[BANK], played.federation, 2)
    renumbered = msgspec.structs.replace(played.keys[BANK], round=2)  # the signature says 1
    with pytest.raises(WrongKey, match="signature"):
        check_keys(renumbered, played.federation, 2)


@pytest.mark.parametrize("field", ["mask_key", "share_key", "signature"])
def test_keys_altered_in_any_field_are_refused(played, field):
    keys = played.keys[BANK]
    for place in range(len(getattr(keys, field))):
        altered = msgspec.structs.replace(keys, **{field: flip(getattr(keys, field), place)})
        with pytest.raises(WrongKey):
            check_keys(altered, played.federation, 1)


def test_keys_without_a_signature_or_with_another_sites_are_refused(played):
    keys, swapped = played.keys[BANK], played.keys[PEER]
    for altered in (
        msgspec.structs.replace(keys, signature=bytes(64)),
        msgspec.structs.replace(keys, signature=swapped.signature),
        msgspec.structs.replace(keys, site=PEER),  # one site's keys under another's name
        msgspec.structs.replace(keys, mask_key=keys.share_key, share_key=keys.mask_key),
    ):
        with pytest.raises(WrongKey, match="signature"):
            check_keys(altered, played.federation, 1)
    with pytest.raises(WrongKey, match="not on the roster"):
        check_keys(msgspec.structs.replace(keys, site="nobody"), played.federation, 1)


@pytest.mark.parametrize("what", ["run", "plan", "roster"])
def test_keys_signed_for_another_run_plan_or_roster_are_refused(played, elsewhere, what):
    with pytest.raises(WrongKey, match="signature"):
        check_keys(played.keys[BANK], elsewhere[what], 1)
    theirs = advertise(played.secrets[BANK], elsewhere[what], 1, identity=IDENTITIES[BANK])
    check_keys(theirs, elsewhere[what], 1)
    with pytest.raises(WrongKey, match="signature"):
        check_keys(theirs, played.federation, 1)


# --- keys of low order


def with_key(played, name, **changed):
    """Round keys that the site itself signed, with one of them chosen."""
    keys = msgspec.structs.replace(played.keys[name], **changed)
    signed = played.federation.bind_round(1, name.encode(), keys.mask_key, keys.share_key)
    return msgspec.structs.replace(keys, signature=sign(IDENTITIES[name], CONTEXT_ROUND_KEYS, signed))


@pytest.mark.parametrize("point", LOW_ORDER, ids=[point.hex()[:8] for point in LOW_ORDER])
def test_keys_of_low_order_are_refused_wherever_they_are_met(played, point):
    for field in ("mask_key", "share_key"):
        for encoded in (point, flip(point, 31, 0x80)):  # X25519 ignores the top bit
            with pytest.raises(WrongKey, match="low order"):
                check_keys(with_key(played, BANK, **{field: encoded}), played.federation, 1)
    mask_key = mask_private_key(played.secrets[PEER].mask_seed)
    with pytest.raises(WrongKey, match=f"'{BANK}' is of low order"):
        pairwise_seed(mask_key, with_key(played, BANK, mask_key=point), played.federation, me=PEER)
    with pytest.raises(WrongKey, match=f"'{BANK}' is of low order"):
        head_seed(played.secrets[PEER], with_key(played, BANK, share_key=point), played.federation, me=PEER)
    keys = {**played.keys, BANK: with_key(played, BANK, share_key=point)}
    with pytest.raises(WrongKey, match=f"'{BANK}' is of low order"):
        deal_shares(played.secrets[PEER], keys, played.federation, played.graph, identity=IDENTITIES[PEER])
    box = played.dealt[BANK].boxes[PEER]
    with pytest.raises(WrongKey, match=f"'{BANK}' is of low order"):
        open_box(box, played.secrets[PEER], keys[BANK], played.federation, receiver=played.keys[PEER])


# --- shares


def shared_out(played, dealer):
    return {MASK_KEY: played.secrets[dealer].mask_seed, SELF_MASK: played.secrets[dealer].self_seed}


def test_any_threshold_of_the_holders_rebuilds_each_secret_and_one_fewer_does_not(played):
    graph, threshold = played.graph, played.graph.threshold
    assert (threshold, len(graph.holders(BANK))) == (4, 5)
    for name, seed in shared_out(played, BANK).items():
        shares = {place: played.held[holder][BANK].shares[name] for place, holder in enumerate(graph.holders(BANK))}
        for places in combinations(shares, threshold):
            assert combine({place: shares[place] for place in places}, threshold=threshold) == seed
        for places in combinations(shares, threshold - 1):
            assert combine({place: shares[place] for place in places}, threshold=threshold - 1) != seed
        assert seed not in shares.values()


def test_a_site_shares_out_the_mask_key_and_the_self_mask_and_nothing_of_its_head(played):
    assert all(set(held.shares) == {MASK_KEY, SELF_MASK} for mine in played.held.values() for held in mine.values())
    assert set(played.dealt[BANK].boxes) == set(played.graph.neighbours[BANK])  # its own shares stay at home
    assert set(played.dealt[BANK].share_digests) == set(played.graph.holders(BANK))


def test_commitments_are_hashes_of_shares_and_seeds_each_in_a_place_of_its_own(played):
    federation, dealt = played.federation, played.dealt[BANK]
    for holder, digests in dealt.share_digests.items():
        for secret, digest in digests.items():
            share = played.held[holder][BANK].shares[secret]
            assert digest == share_digest(federation, 1, dealer=BANK, holder=holder, secret=secret, share=share)
    seeds = shared_out(played, BANK)
    assert set(dealt.secret_digests) == set(seeds)
    for secret, digest in dealt.secret_digests.items():
        assert digest == secret_digest(federation, 1, dealer=BANK, secret=secret, seed=seeds[secret])


def test_a_commitment_changes_with_all_that_it_speaks_of(played, elsewhere):
    right = {"dealer": BANK, "holder": PEER, "secret": MASK_KEY, "share": bytes(16)}
    changes = [{}, {"dealer": PEER}, {"holder": BANK}, {"secret": SELF_MASK}, {"share": bytes(15) + b"\1"}]
    digests = [share_digest(played.federation, 1, **(right | change)) for change in changes]
    digests.append(share_digest(played.federation, 2, **right))
    digests += [share_digest(other, 1, **right) for other in elsewhere.values()]
    digests.append(secret_digest(played.federation, 1, dealer=BANK, secret=MASK_KEY, seed=bytes(16)))
    digests.append(secret_digest(played.federation, 2, dealer=BANK, secret=MASK_KEY, seed=bytes(16)))
    digests.append(hashlib.sha256(bytes(16)).digest())
    assert len(set(digests)) == len(digests)


def test_dealing_twice_draws_other_polynomials(played):
    again, held = deal_shares(
        played.secrets[BANK], played.keys, played.federation, played.graph, identity=IDENTITIES[BANK]
    )
    assert again.secret_digests == played.dealt[BANK].secret_digests
    assert again.boxes.keys() == played.dealt[BANK].boxes.keys()
    assert all(again.boxes[holder] != box for holder, box in played.dealt[BANK].boxes.items())
    assert all(held.shares[name] != share for name, share in played.held[BANK][BANK].shares.items())


def test_nothing_that_leaves_a_site_holds_a_seed_or_a_share(played):
    for name, dealt in played.dealt.items():
        sent = msgspec.msgpack.encode((dealt, played.keys[name]))
        secrets = played.secrets[name]
        shares = [share for held in played.held.values() for share in held[name].shares.values()]
        assert not any(secret in sent for secret in (secrets.mask_seed, secrets.self_seed, *shares))
        assert secrets.share_key not in sent


def test_the_share_key_is_in_nobodys_shares(played):
    # What it masks stays masked, whatever shares come together.
    for name, secrets in played.secrets.items():
        held = [share for mine in played.held.values() for share in mine[name].shares.values()]
        assert not {secrets.share_key[:16], secrets.share_key[16:]} & set(held)
        graph, threshold = played.graph, played.graph.threshold
        for secret in (MASK_KEY, SELF_MASK):
            shares = {place: played.held[holder][name].shares[secret] for place, holder in enumerate(graph.listed)}
            assert combine(shares, threshold=threshold) not in secrets.share_key


# --- what the coordinator checks without reading it


def resigned(played, **changes):
    """What a dealer says with something changed, signed again by that dealer."""
    dealt = msgspec.structs.replace(played.dealt[BANK], **changes)
    message = deal._dealt_message(
        played.federation, BANK, dealt.round, dealt.boxes, dealt.share_digests, dealt.secret_digests
    )
    return msgspec.structs.replace(dealt, signature=sign(IDENTITIES[BANK], CONTEXT_SHARES, message))


def test_shares_of_another_round_are_refused_by_number(played):
    with pytest.raises(WrongRound, match="got those of round 2, wanted 1"):
        check_dealt(resigned(played, round=2), played.federation, played.graph, dealer=BANK)
    graph = round_graph(played.federation, 2, played.names)
    renumbered = msgspec.structs.replace(played.dealt[BANK], round=2)
    with pytest.raises(WrongKey):
        check_dealt(renumbered, played.federation, graph, dealer=BANK)


@pytest.mark.parametrize("what", ["run", "plan", "roster"])
def test_shares_for_another_run_plan_or_roster_are_refused(played, elsewhere, what):
    with pytest.raises(WrongKey, match="signature"):
        check_dealt(played.dealt[BANK], elsewhere[what], played.graph, dealer=BANK)


def test_shares_that_another_site_dealt_or_nobody_signed_are_refused(played):
    for dealt in (played.dealt[PEER], msgspec.structs.replace(played.dealt[BANK], signature=bytes(64))):
        with pytest.raises(WrongKey, match="signature"):
            check_dealt(dealt, played.federation, played.graph, dealer=BANK)


def test_shares_altered_on_their_way_are_refused(played):
    dealt = played.dealt[BANK]
    digests = dealt.share_digests
    swapped = {**dealt.boxes, PEER: dealt.boxes[HOSPITAL], HOSPITAL: dealt.boxes[PEER]}
    altered = [
        {"boxes": {**dealt.boxes, PEER: flip(dealt.boxes[PEER], 20)}},
        {"boxes": swapped},
        {"boxes": {name: box for name, box in dealt.boxes.items() if name != PEER}},
        {"share_digests": {**digests, PEER: {**digests[PEER], MASK_KEY: bytes(32)}}},
        {"share_digests": {**digests, PEER: digests[BANK], BANK: digests[PEER]}},
        {"secret_digests": {**dealt.secret_digests, SELF_MASK: bytes(32)}},
    ]
    for change in altered:
        with pytest.raises(WrongKey, match="signature"):
            check_dealt(msgspec.structs.replace(dealt, **change), played.federation, played.graph, dealer=BANK)


def without(table, name):
    return {key: value for key, value in table.items() if key != name}


# Each as a dealer could sign it: one that is silent about a share cannot be caught with it later.
INCOMPLETE = {
    "a box missing": lambda dealt: {"boxes": without(dealt.boxes, PEER)},
    "a box for itself": lambda dealt: {"boxes": {**dealt.boxes, BANK: b"box"}},
    "a box for a stranger": lambda dealt: {"boxes": {**dealt.boxes, "nobody": b"box"}},
    "no boxes": lambda dealt: {"boxes": {}},
    "a holder without digests": lambda dealt: {"share_digests": without(dealt.share_digests, PEER)},
    "own digests missing": lambda dealt: {"share_digests": without(dealt.share_digests, BANK)},
    "digests of a stranger": lambda dealt: {"share_digests": {**dealt.share_digests, "nobody": dealt.secret_digests}},
    "a share without digest": lambda dealt: {
        "share_digests": {**dealt.share_digests, PEER: without(dealt.share_digests[PEER], MASK_KEY)}
    },
    "a share too many": lambda dealt: {
        "share_digests": {**dealt.share_digests, PEER: {**dealt.share_digests[PEER], "kind/hospital": bytes(32)}}
    },
    "a seed without digest": lambda dealt: {"secret_digests": without(dealt.secret_digests, SELF_MASK)},
    "a seed too many": lambda dealt: {"secret_digests": {**dealt.secret_digests, "kind/hospital": bytes(32)}},
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_shares_that_are_not_one_for_each_secret_and_holder_are_refused(played, name):
    false = resigned(played, **INCOMPLETE[name](played.dealt[BANK]))
    with pytest.raises(Malformed, match="not one of each secret for each of its 5 holders"):
        check_dealt(false, played.federation, played.graph, dealer=BANK)


@pytest.mark.parametrize("shown", [repr, str, lambda each: str(list(each.__rich_repr__())), lambda each: f"{[each]}"])
def test_nothing_that_shows_secrets_or_shares_shows_a_byte_of_them(shown):
    """Rich tracebacks ask msgspec's own ``__rich_repr__``, which has every field."""
    drawn = draw_secrets()
    held = HeldShares({MASK_KEY: drawn.mask_seed})
    for each in (drawn, held):
        assert "seed" not in shown(each)
        assert not any(
            repr(secret)[2:-1] in shown(each) for secret in (drawn.mask_seed, drawn.self_seed, drawn.share_key)
        )
