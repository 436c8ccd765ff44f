import numpy as np
import pytest
from masked_round import federate, make_identities

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.decrypt import decrypt_sum
from fedseek.encode import UpdateLayout, encode_update, num_ciphertexts, quantiser_bound
from fedseek.encrypt import encrypt_update
from fedseek.errors import FedseekError, Malformed, Tampered
from fedseek.he.ciphertext import CiphertextForm, ScopedSum, load_ciphertext, save_ciphertext, subtract_slots
from fedseek.he.keys import SecretKey
from fedseek.tag import add_tags, tag_key

SITES = make_identities(3, ("bank", "bank", "bank"))
NAMES = tuple(sorted(SITES))
LAYOUTS = {
    "global": UpdateLayout("global", (("lora_B", (500, 30)),), ("loss",)),
    "kind/bank": UpdateLayout("kind/bank", (("head", (7,)),)),
}
RANGES = {"global": 0.5, "kind/bank": 2.0}
WEIGHTS = dict(zip(NAMES, (100, 1, 37), strict=True))
NUMBER = 4


@pytest.fixture(scope="module")
def federation(tiny_plan):
    return federate(tiny_plan(cohort={"max_sites": 4, "weighting": "records", "record_cap": 100}), SITES)


@pytest.fixture(scope="module")
def key(federation):
    return SecretKey.generate(federation.plan.packing.params)


def vector(name, scope):
    rng = np.random.default_rng([NAMES.index(name), len(scope)])
    return rng.uniform(-RANGES[scope], RANGES[scope], LAYOUTS[scope].num_values).astype(np.float32)


def encoded(federation, key, name, *, number=NUMBER, weight=None):
    """One site's update, tagged for the round; masks are off the sum when it gets here."""
    plan = federation.plan
    slots = {
        scope: encode_update(
            vector(name, scope),
            layout,
            packing=plan.packing,
            value_range=RANGES[scope],
            weight=weight or WEIGHTS[name],
            weight_cap=plan.weight_cap,
            metrics=dict.fromkeys(layout.metrics, 1.5),
            rng=np.random.default_rng(5),
        )
        for scope, layout in LAYOUTS.items()
    }
    modulus = plan.packing.params.plain_modulus
    return {
        scope: add_tags(each, tag_key(key, federation, number, scope), site=name, modulus=modulus)
        for scope, each in slots.items()
    }


def fold(federation, key, updates):
    packing = federation.plan.packing
    expected = {scope: num_ciphertexts(layout, packing) for scope, layout in LAYOUTS.items()}
    aggregate = agg_init(packing.params, expected, max_sites=4)
    for update in updates:
        agg_update(aggregate, encrypt_update(key, update))
    return agg_finish(aggregate, min_sites=1)


@pytest.fixture(scope="module")
def sums(federation, key):
    return fold(federation, key, [encoded(federation, key, name) for name in NAMES])


def decrypt(federation, key, sums, *, number=NUMBER, survivors=NAMES, layouts=LAYOUTS, ranges=RANGES):
    return decrypt_sum(
        key,
        sums,
        federation=federation,
        number=number,
        survivors=dict.fromkeys(LAYOUTS, survivors),
        layouts=layouts,
        value_ranges=ranges,
    )


def test_encrypted_path_gives_the_weighted_mean_in_every_scope(federation, key, sums):
    decoded = decrypt(federation, key, sums)
    assert list(decoded) == ["global", "kind/bank"]
    packing, weights = federation.plan.packing, list(WEIGHTS.values())
    for scope, summed in decoded.items():
        vectors = [vector(name, scope).astype(np.float64) for name in NAMES]
        bound = quantiser_bound(packing, value_range=RANGES[scope], contributors=3, weight=138, weight_cap=100)
        assert np.abs(summed.mean - np.average(vectors, axis=0, weights=weights)).max() <= bound
        assert (summed.contributors, summed.weight) == (3, 138)
    assert decoded["global"].metrics == {"loss": 4.5}


def test_scopes_of_others_are_ignored(federation, key, sums):
    wanted = {"kind/bank": LAYOUTS["kind/bank"]}
    assert list(decrypt(federation, key, sums, layouts=wanted)) == ["kind/bank"]
    assert decrypt(federation, key, sums, layouts={}) == {}


def change(sums, place, **changes):
    """The sums with one scope's entry changed."""
    fields = {name: getattr(sums[place], name) for name in ("scope", "contributors", "ciphertexts")}
    return [*sums[:place], ScopedSum(**(fields | changes)), *sums[place + 1 :]]


INCOMPLETE = {
    "nothing": (lambda sums: [], "got scopes"),
    "a scope missing": (lambda sums: sums[:1], "got scopes"),
    "a scope twice": (lambda sums: [*sums, sums[1]], "each once"),
    "a scope twice in place of another": (lambda sums: [sums[0], sums[0]], "each once"),
    "a ciphertext missing": (lambda sums: change(sums, 0, ciphertexts=sums[0].ciphertexts[:1]), "ciphertexts; wanted"),
    "a ciphertext too many": (
        lambda sums: change(sums, 1, ciphertexts=(*sums[1].ciphertexts, sums[1].ciphertexts[0])),
        "ciphertexts; wanted",
    ),
    "no ciphertext": (lambda sums: change(sums, 0, ciphertexts=(b"", *sums[0].ciphertexts[1:])), "SEAL object"),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_incomplete_sums_are_refused(federation, key, sums, name):
    alter, message = INCOMPLETE[name]
    with pytest.raises(Malformed, match=message):
        decrypt(federation, key, alter(sums))


@pytest.mark.parametrize("announced", [0, 2, 4])
@pytest.mark.parametrize("place", [0, 1])
def test_the_count_beside_a_sum_must_be_the_encrypted_one(federation, key, sums, place, announced):
    with pytest.raises(Malformed, match=f"announced 3 sites and counted {announced}, it holds 3"):
        decrypt(federation, key, change(sums, place, contributors=announced))


def test_another_epochs_key_is_refused(federation, key, sums):
    with pytest.raises(Tampered, match="sum of 'global', round 4: ciphertext: no noise budget left under this key"):
        decrypt(federation, SecretKey.generate(key.params), sums)


def test_a_sum_that_does_not_open_is_refused_like_one_that_opens_to_something_else(federation, key, sums):
    """Two errors would tell a coordinator that alters sums little by little about the key (a reaction attack)."""
    altered = change(sums, 0, ciphertexts=tuple(reversed(sums[0].ciphertexts)))  # opens, with other slots
    refused = []
    for group_key, told in ((SecretKey.generate(key.params), sums), (key, altered)):
        with pytest.raises(FedseekError) as caught:
            decrypt(federation, group_key, told)
        refused.append(type(caught.value))
    assert refused == [Tampered, Tampered]


# --- sums that are not those of the sites announced


@pytest.mark.parametrize("survivors", [NAMES[:2], NAMES[1:], (*NAMES, "nobody"), (*NAMES[:2], "nobody")])
def test_survivors_that_are_not_those_in_the_sum_are_found(federation, key, sums, survivors):
    with pytest.raises(Tampered, match="sum of 'global', round 4"):
        decrypt(federation, key, sums, survivors=survivors)


def test_an_update_left_out_or_added_twice_is_found(federation, key, sums):
    updates = [encoded(federation, key, name) for name in NAMES]
    for chosen in (updates[:2], [*updates, updates[0]], [updates[0], updates[0], updates[2]]):
        forged = fold(federation, key, chosen)
        for counted in (forged, [ScopedSum(each.scope, 3, each.ciphertexts) for each in forged]):
            with pytest.raises(Tampered):
                decrypt(federation, key, counted)


def test_a_sum_of_another_round_or_scope_is_found(federation, key, sums):
    with pytest.raises(Tampered, match="round 5"):
        decrypt(federation, key, sums, number=5)
    replayed = fold(federation, key, [encoded(federation, key, name, number=3) for name in NAMES])
    with pytest.raises(Tampered):
        decrypt(federation, key, replayed)
    with pytest.raises(Tampered, match="'kind/bank'"):  # a sum of one scope under the name of another
        decrypt(federation, key, change(sums, 1, ciphertexts=sums[0].ciphertexts[:1]))


def test_a_sum_that_the_coordinator_moved_without_the_key_is_found(federation, key, sums):
    params = federation.plan.packing.params
    for slot in (0, 2, 8, 4095):
        ciphertext = load_ciphertext(params, sums[1].ciphertexts[0], form=CiphertextForm.SUMMED)
        known = np.zeros(params.slot_count, dtype=np.uint64)
        known[slot] = 1
        subtract_slots(params, ciphertext, known)
        with pytest.raises(Tampered, match="'kind/bank'"):
            decrypt(federation, key, change(sums, 1, ciphertexts=(save_ciphertext(ciphertext),)))


def test_ciphertexts_in_another_order_are_found(federation, key, sums):
    with pytest.raises(Tampered, match="'global'"):
        decrypt(federation, key, change(sums, 0, ciphertexts=tuple(reversed(sums[0].ciphertexts))))


def test_nothing_is_returned_unless_every_scope_passes(federation, key, sums):
    other = fold(federation, key, [encoded(federation, key, name, number=3) for name in NAMES])
    with pytest.raises(Tampered, match="'kind/bank'"):
        decrypt(federation, key, [sums[0], other[1]])


def test_a_sum_with_tags_that_fit_is_still_no_sum_of_updates_when_its_header_is_wrong(federation, key):
    # A site can tag anything; what no update adds up to is refused none the less.
    modulus = federation.plan.packing.params.plain_modulus
    heavy = {}
    for scope, slots in encoded(federation, key, NAMES[0]).items():
        bare = slots.copy()
        bare[:2] = 0
        bare[3] = 101  # the weight, above the cap
        heavy[scope] = add_tags(bare, tag_key(key, federation, NUMBER, scope), site=NAMES[0], modulus=modulus)
    with pytest.raises(Malformed, match="cannot weigh 101"):
        decrypt(federation, key, fold(federation, key, [heavy]), survivors=NAMES[:1])


def test_a_site_that_claims_to_be_two_is_found_by_the_count(federation, key):
    modulus = federation.plan.packing.params.plain_modulus
    double = {}
    for scope, slots in encoded(federation, key, NAMES[0]).items():
        bare = slots.copy()
        bare[:2] = 0
        bare[2:4] = (2, 100)
        double[scope] = add_tags(bare, tag_key(key, federation, NUMBER, scope), site=NAMES[0], modulus=modulus)
    with pytest.raises(Malformed, match="announced 1 sites and counted 1, it holds 2"):
        decrypt(federation, key, fold(federation, key, [double]), survivors=NAMES[:1])
