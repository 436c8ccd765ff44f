"""Share boxes and seeds of masks: they open, and agree, between two sites in one round of one run, and nowhere else."""

import os

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from masked_round import federate, flip, make_identities, play_round

from fedseek import deal
from fedseek.deal import advertise, draw_secrets, head_seed, mask_private_key, open_box, pairwise_seed
from fedseek.errors import Malformed, WrongKey
from fedseek.messages import MASK_KEY, SELF_MASK

IDENTITIES = make_identities(4)
BANK, PEER, HOSPITAL = "北岸银行", "harbour-bank", "仁济医院"


@pytest.fixture(scope="module")
def played(tiny_plan):
    return play_round(federate(tiny_plan(), IDENTITIES), IDENTITIES)


@pytest.fixture(scope="module")
def elsewhere(tiny_plan):
    """The same sites, with one thing different that shares are bound to."""
    others = {**IDENTITIES, "st-anna": make_identities(4)["st-anna"]}
    return {
        "run": federate(tiny_plan(), IDENTITIES, run="试运行-2"),
        "plan": federate(tiny_plan(seed=1), IDENTITIES),
        "roster": federate(tiny_plan(), others),
    }


def open_at(played, receiver=PEER, dealer=BANK, *, box=None, federation=None, dealer_keys=None, secrets=None):
    return open_box(
        played.dealt[dealer].boxes[receiver] if box is None else box,
        secrets or played.secrets[receiver],
        dealer_keys or played.keys[dealer],
        federation or played.federation,
        receiver=played.keys[receiver],
    )


def test_a_box_opens_for_its_receiver_to_the_shares_that_were_committed(played):
    for dealer, dealt in played.dealt.items():
        for holder in dealt.boxes:
            held = open_at(played, holder, dealer)
            assert held == played.held[holder][dealer]
            for secret, share in held.shares.items():
                digest = deal.share_digest(
                    played.federation, 1, dealer=dealer, holder=holder, secret=secret, share=share
                )
                assert digest == dealt.share_digests[holder][secret]


def test_a_box_opens_for_nobody_else(played):
    box = played.dealt[BANK].boxes[PEER]
    for other in (HOSPITAL, "st-anna"):
        with pytest.raises(WrongKey, match="does not open"):
            open_at(played, other, box=box)
    with pytest.raises(WrongKey, match="does not open"):  # the right key under another receiver's name
        open_box(box, played.secrets[PEER], played.keys[BANK], played.federation, receiver=played.keys[HOSPITAL])
    with pytest.raises(WrongKey, match="does not open"):  # the receiver's secrets of another round
        open_at(played, secrets=draw_secrets())


def test_a_box_is_not_taken_for_another_dealers_nor_for_an_answer_to_it(played):
    box = played.dealt[BANK].boxes[PEER]
    with pytest.raises(WrongKey, match=f"shares of site '{HOSPITAL}' for site '{PEER}'"):
        open_at(played, PEER, HOSPITAL, box=box)
    with pytest.raises(WrongKey, match="does not open"):  # back to who sealed it, as if it were the other's
        open_at(played, BANK, PEER, box=box)
    renamed = msgspec.structs.replace(played.keys[BANK], site=HOSPITAL)  # the dealer's key under another name
    with pytest.raises(WrongKey, match="does not open"):
        open_at(played, dealer_keys=renamed)


@pytest.mark.parametrize("what", ["run", "plan", "roster"])
def test_a_box_opens_in_no_other_run_plan_or_roster(played, elsewhere, what):
    with pytest.raises(WrongKey, match="does not open"):
        open_at(played, federation=elsewhere[what])


def test_a_box_opens_in_no_other_round_though_the_keys_are_the_same(played):
    renumbered = msgspec.structs.replace(played.keys[BANK], round=2)
    with pytest.raises(WrongKey, match="round 2: the box does not open"):
        open_at(played, dealer_keys=renumbered)


def test_a_box_altered_in_any_byte_or_cut_anywhere_does_not_open(played):
    box = played.dealt[BANK].boxes[PEER]
    for place in range(len(box)):
        with pytest.raises(WrongKey, match="does not open"):
            open_at(played, box=flip(box, place, 1 << place % 8))
        with pytest.raises(WrongKey, match="does not open"):
            open_at(played, box=box[:place])
    with pytest.raises(WrongKey, match="does not open"):
        open_at(played, box=box + b"\0")


@given(st.binary(max_size=200))
def test_random_bytes_are_no_box(played, data):
    with pytest.raises(WrongKey, match="does not open"):
        open_at(played, box=data)


def sealed(played, content: bytes) -> bytes:
    """A box from the bank to its peer, rightly sealed, with any content."""
    key, bound = deal._box_key(
        played.secrets[BANK], played.keys[PEER], played.federation, 1, sender=BANK, receiver=PEER
    )
    nonce = os.urandom(12)
    return nonce + AESGCM(key).encrypt(nonce, content, bound)


GOOD = {MASK_KEY: b"m" * 16, SELF_MASK: b"s" * 16}


def test_the_boxes_made_here_for_dealers_that_cheat_are_right_but_for_their_content(played):
    assert open_at(played, box=sealed(played, msgspec.msgpack.encode({"shares": GOOD}))).shares == GOOD


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        b"\xff" * 40,
        msgspec.msgpack.encode(GOOD),
        msgspec.msgpack.encode({"shares": GOOD, "more": 1}),
        msgspec.msgpack.encode({"shares": GOOD}) + b"\0",
        msgspec.msgpack.encode({"shares": {**GOOD, SELF_MASK: "text"}}),
        msgspec.msgpack.encode({"shares": {**GOOD, SELF_MASK: b"s" * 15}}),
        msgspec.msgpack.encode({"shares": {**GOOD, MASK_KEY: b"m" * 17}}),
        msgspec.msgpack.encode({"shares": {**GOOD, "kind/bank": b"h" * 16}}),  # a share too many
        msgspec.msgpack.encode({"shares": {MASK_KEY: GOOD[MASK_KEY], "global": b"g" * 16}}),
        *(msgspec.msgpack.encode({"shares": {name: GOOD[name]}}) for name in GOOD),
        msgspec.msgpack.encode({"shares": {}}),
        b"\x81\xa6shares\x81\xa1\xff\xc4\x00",
    ],
)
def test_a_box_that_opens_to_anything_but_one_share_of_each_secret_is_refused(played, content):
    with pytest.raises(Malformed, match=f"shares of site '{BANK}'"):
        open_at(played, box=sealed(played, content))


def test_a_refusal_quotes_no_share(played):
    with pytest.raises(Malformed) as caught:
        open_at(played, box=sealed(played, msgspec.msgpack.encode({"shares": {**GOOD, SELF_MASK: b"SECRET-15-bytes"}})))
    assert "SECRET" not in f"{caught.value}{caught.value.__cause__}"


# --- seeds of masks


def pair_of(played, me, peer, *, keys=None, federation=None):
    key = mask_private_key(played.secrets[me].mask_seed)
    return pairwise_seed(key, keys or played.keys[peer], federation or played.federation, me=me)


def head_of(played, me, peer, *, keys=None, federation=None):
    return head_seed(played.secrets[me], keys or played.keys[peer], federation or played.federation, me=me)


both_kinds = pytest.mark.parametrize("agree", [pair_of, head_of], ids=["adapter", "head"])


@both_kinds
def test_two_sites_agree_on_one_seed_and_no_two_pairs_on_the_same(played, agree):
    seeds = {}
    for me in played.names:
        for peer in played.graph.neighbours[me]:
            seeds[frozenset((me, peer))] = agree(played, me, peer)
            assert agree(played, peer, me) == agree(played, me, peer)
    assert len(set(seeds.values())) == len(seeds) == 6
    assert {len(seed) for seed in seeds.values()} == {16}


@both_kinds
def test_the_seed_changes_with_round_run_plan_roster_and_keys(played, elsewhere, agree):
    fresh = advertise(draw_secrets(), played.federation, 1, identity=IDENTITIES[PEER])
    seeds = [
        agree(played, BANK, PEER),
        agree(played, BANK, PEER, keys=msgspec.structs.replace(played.keys[PEER], round=2)),
        agree(played, BANK, PEER, keys=msgspec.structs.replace(played.keys[PEER], site=HOSPITAL)),
        agree(played, BANK, PEER, keys=fresh),
        *(agree(played, BANK, PEER, federation=federation) for federation in elsewhere.values()),
    ]
    assert len(set(seeds)) == len(seeds)


def test_the_seed_of_a_head_comes_from_share_keys_and_the_adapters_from_mask_keys_alone(played):
    other = advertise(draw_secrets(), played.federation, 1, identity=IDENTITIES[PEER])
    mask_key_changed = msgspec.structs.replace(played.keys[PEER], mask_key=other.mask_key)
    share_key_changed = msgspec.structs.replace(played.keys[PEER], share_key=other.share_key)
    for agree, same, changed in (
        (pair_of, share_key_changed, mask_key_changed),
        (head_of, mask_key_changed, share_key_changed),
    ):
        assert agree(played, BANK, PEER, keys=same) == agree(played, BANK, PEER)
        assert agree(played, BANK, PEER, keys=changed) != agree(played, BANK, PEER)


def test_the_seed_of_a_head_says_nothing_of_other_secrets_of_the_same_keys(played):
    """Share keys do two things; what comes of them is kept apart by its purpose, even where the keys are one."""
    secrets, keys = played.secrets[BANK], played.keys[PEER]
    seed = head_of(played, BANK, PEER)
    for sender, receiver in ((BANK, PEER), (PEER, BANK)):
        key, _ = deal._box_key(secrets, keys, played.federation, 1, sender=sender, receiver=receiver)
        assert seed not in (key[:16], key[16:])
    one_key = msgspec.structs.replace(keys, mask_key=keys.share_key)
    share_key = X25519PrivateKey.from_private_bytes(secrets.share_key)
    assert pairwise_seed(share_key, one_key, played.federation, me=BANK) != seed
