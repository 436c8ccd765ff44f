import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.decrypt import apply_mean, decrypt_sum
from fedseek.encode import UpdateLayout, encode_update, num_ciphertexts, quantiser_bound
from fedseek.encrypt import encrypt_update
from fedseek.errors import Malformed, WrongKey
from fedseek.he.ciphertext import ScopedSum
from fedseek.he.keys import SecretKey
from fedseek.he.packing import choose_packing

PACKING = choose_packing(13, 8)
KEY = SecretKey.generate(PACKING.params)
LAYOUTS = {
    "global": UpdateLayout("global", (("lora_B", (500, 30)),), ("loss",)),
    "bank": UpdateLayout("bank", (("head", (7,)),)),
}
RANGES = {"global": 0.5, "bank": 2.0}
WEIGHTS = (100, 1, 37)
WEIGHT_CAP = 100


def site_vectors(site):
    rng = np.random.default_rng(site)
    return {
        scope: rng.uniform(-RANGES[scope], RANGES[scope], layout.num_values).astype(np.float32)
        for scope, layout in LAYOUTS.items()
    }


def encrypted_sum():
    expected = {scope: num_ciphertexts(layout, PACKING) for scope, layout in LAYOUTS.items()}
    aggregate = agg_init(PACKING.params, expected, max_sites=8)
    for site, weight in enumerate(WEIGHTS):
        vectors = site_vectors(site)
        encoded = {
            scope: encode_update(
                vectors[scope],
                layout,
                packing=PACKING,
                value_range=RANGES[scope],
                weight=weight,
                weight_cap=WEIGHT_CAP,
                metrics=dict.fromkeys(layout.metrics, 1.5),
            )
            for scope, layout in LAYOUTS.items()
        }
        agg_update(aggregate, encrypt_update(KEY, encoded))
    return agg_finish(aggregate, min_sites=3)


SUMS = encrypted_sum()


def decrypt(sums, *, key=KEY, layouts=LAYOUTS):
    return decrypt_sum(key, sums, layouts=layouts, packing=PACKING, value_ranges=RANGES, weight_cap=WEIGHT_CAP)


def test_encrypted_path_gives_the_weighted_mean_in_every_scope():
    decoded = decrypt(SUMS)
    assert list(decoded) == ["global", "bank"]
    for scope, summed in decoded.items():
        vectors = [site_vectors(site)[scope].astype(np.float64) for site in range(3)]
        bound = quantiser_bound(
            PACKING, value_range=RANGES[scope], contributors=3, weight=sum(WEIGHTS), weight_cap=WEIGHT_CAP
        )
        assert np.abs(summed.mean - np.average(vectors, axis=0, weights=WEIGHTS)).max() <= bound
        assert (summed.contributors, summed.weight) == (3, 138)
    assert decoded["global"].metrics == {"loss": 4.5}


def test_scopes_of_others_are_ignored():
    assert list(decrypt(SUMS, layouts={"global": LAYOUTS["global"]})) == ["global"]


@pytest.mark.parametrize("announced", [0, 2, 4])
def test_announced_count_must_be_the_encrypted_one(announced):
    wrong = ScopedSum(scope="global", contributors=announced, ciphertexts=SUMS[0].ciphertexts)
    with pytest.raises(Malformed, match="it holds 3"):
        decrypt([wrong, SUMS[1]])


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ([], "wanted"),
        ([SUMS[0]], "wanted"),
        ([SUMS[0], SUMS[1], SUMS[1]], "each once"),
        ([ScopedSum("global", 3, SUMS[0].ciphertexts[:1]), SUMS[1]], "ciphertexts; wanted"),
        ([ScopedSum("global", 3, (b"", *SUMS[0].ciphertexts[1:])), SUMS[1]], "SEAL object"),
    ],
)
def test_incomplete_or_altered_sums_are_refused(sums, message):
    with pytest.raises(Malformed, match=message):
        decrypt(sums)


def test_another_epochs_key_is_refused():
    with pytest.raises(WrongKey):
        decrypt(SUMS, key=SecretKey.generate(PACKING.params))


def naive_step(weights, mean, momentum, *, learning_rate, momentum_factor):
    """The same step one value at a time, in Python floats (IEEE doubles)."""
    new_momentum = [momentum_factor * v + m for v, m in zip(momentum.tolist(), mean.tolist(), strict=True)]
    new_weights = [w + learning_rate * v for w, v in zip(weights.tolist(), new_momentum, strict=True)]
    return np.array(new_weights, dtype=np.float32), np.array(new_momentum)


@given(
    seed=st.integers(0, 2**32),
    learning_rate=st.floats(1e-3, 10.0),
    momentum_factor=st.floats(0.0, 0.99),
    size=st.integers(1, 70),
)
@settings(max_examples=50)
def test_step_equals_the_naive_reference_bit_for_bit(seed, learning_rate, momentum_factor, size):
    rng = np.random.default_rng(seed)
    weights, momentum = rng.standard_normal(size).astype(np.float32), np.zeros(size)
    expected = (weights, momentum)
    for _ in range(3):
        mean = rng.standard_normal(size)
        factors = {"learning_rate": learning_rate, "momentum_factor": momentum_factor}
        weights, momentum = apply_mean(weights, mean, momentum, **factors)
        expected = naive_step(expected[0], mean, expected[1], **factors)
    assert weights.dtype == np.float32
    assert (weights == expected[0]).all()
    assert (momentum == expected[1]).all()


def test_plain_fedavg_adds_the_mean_and_keeps_its_arguments():
    weights, mean, momentum = np.ones(3, np.float32), np.array([0.5, -1.0, 0.0]), np.zeros(3)
    stepped, _ = apply_mean(weights, mean, momentum, learning_rate=1.0, momentum_factor=0.0)
    assert stepped.tolist() == [1.5, 0.0, 1.0]
    assert weights.tolist() == [1.0, 1.0, 1.0]
    assert momentum.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("mean", "momentum", "factors", "message"),
    [
        (np.zeros(2), np.zeros(3), (1.0, 0.0), "shapes"),
        (np.zeros(3, np.float32), np.zeros(3), (1.0, 0.0), "wanted float32"),
        (np.zeros(3), np.zeros(3), (0.0, 0.0), "learning_rate"),
        (np.zeros(3), np.zeros(3), (np.nan, 0.0), "learning_rate"),
        (np.zeros(3), np.zeros(3), (1.0, 1.0), "momentum_factor"),
        (np.zeros(3), np.zeros(3), (1.0, -0.1), "momentum_factor"),
        (np.full(3, 1e39), np.zeros(3), (1.0, 0.0), "not finite"),
    ],
)
def test_steps_out_of_range_are_refused(mean, momentum, factors, message):
    with pytest.raises(ValueError, match=message):
        apply_mean(np.zeros(3, np.float32), mean, momentum, learning_rate=factors[0], momentum_factor=factors[1])


def test_open_a_key_holder_that_is_handed_one_update_reads_it():
    # Not a wish: one lock, whose key every site holds. Masks turn this test round.
    layout = LAYOUTS["bank"]
    vector = site_vectors(0)["bank"]
    slots = encode_update(vector, layout, packing=PACKING, value_range=2.0, weight=1, weight_cap=1, metrics={})
    aggregate = agg_init(PACKING.params, {"bank": num_ciphertexts(layout, PACKING)}, max_sites=8)
    agg_update(aggregate, encrypt_update(KEY, {"bank": slots}))
    (alone,) = agg_finish(aggregate, min_sites=1)
    read = decrypt_sum(
        KEY, [alone], layouts={"bank": layout}, packing=PACKING, value_ranges={"bank": 2.0}, weight_cap=1
    )
    assert np.abs(read["bank"].mean - vector).max() < 1e-3
