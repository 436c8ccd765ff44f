import math

import numpy as np
import pytest
from tenseal import sealapi

from fedseek.he.ciphertext import CiphertextForm, add_in_place, load_ciphertext, seal_context
from fedseek.he.keys import SecretKey, encrypt_slots
from fedseek.he.packing import choose_packing
from fedseek.he.params import HeParams, coeff_modulus, noise_budget_bits, plain_modulus_above


def test_coefficient_prime_is_the_one_seal_picks():
    params = HeParams(plain_modulus_above(48))
    seal_params = sealapi.CoeffModulus.Create(params.poly_modulus_degree, list(params.coeff_mod_bit_sizes))
    assert [modulus.value() for modulus in seal_params] == [coeff_modulus()]


def test_context_passes_seals_256_bit_check_and_one_more_bit_would_not():
    assert seal_context(HeParams(plain_modulus_above(48))).parameters_set()
    assert sealapi.CoeffModulus.MaxBitCount(4096, sealapi.SEC_LEVEL_TYPE.TC256) == 58


@pytest.mark.parametrize("bits", [20, 44, 48, 49])
def test_plain_modulus_is_the_smallest_batching_prime_above(bits):
    sympy = pytest.importorskip("sympy")
    t = plain_modulus_above(bits)
    assert t > 2**bits
    assert t % 8192 == 1
    assert sympy.isprime(t)
    assert not [c for c in range((2**bits // 8192) * 8192 + 1, t, 8192) if c > 2**bits and sympy.isprime(c)]


@pytest.mark.parametrize(
    "changed",
    [
        {"plain_modulus": 2**48},
        {"plain_modulus": 281474976768001 + 8192},
        {"plain_modulus": 281474976768001, "poly_modulus_degree": 2048},
        {"plain_modulus": 281474976768001, "coeff_mod_bit_sizes": (60,)},
        {"plain_modulus": 281474976768001, "coeff_mod_bit_sizes": (30, 28)},
    ],
)
def test_sizes_without_an_argument_for_them_are_refused(changed):
    with pytest.raises(ValueError, match="wanted"):
        HeParams(**changed)


def seal_budgets(params, num_sites, *, key, rng):
    """SEAL's own noise budget of the sum of ``num_sites`` fresh ciphertexts."""
    running = None
    for _ in range(num_sites):
        slots = rng.integers(0, params.plain_modulus, size=params.slot_count, dtype=np.uint64)  # wraps around t
        (data,) = encrypt_slots(key, slots)
        fresh = load_ciphertext(params, data, form=CiphertextForm.FRESH)
        if running is None:
            running = fresh
        else:
            add_in_place(params, running, fresh)
    return sealapi.Decryptor(seal_context(params), key._seal_key).invariant_noise_budget(running)


@pytest.mark.parametrize("num_sites", [1, 8, 64])
@pytest.mark.parametrize("slot_bits", [44, 48])
def test_bound_holds_against_seals_measured_budget(num_sites, slot_bits):
    params = HeParams(plain_modulus_above(slot_bits))
    key = SecretKey.generate(params)
    claimed = noise_budget_bits(params, num_sites, 1)
    rng = np.random.default_rng(7)
    measured = min(seal_budgets(params, num_sites, key=key, rng=rng) for _ in range(3))
    # SEAL rounds log2(q / (2 t noise)) down to whole bits, so a true bound lies below measured + 1 ...
    assert claimed < measured + 1
    # ... and a useful one not far below it.
    assert claimed > measured - 3


def test_bound_uses_the_worst_case_where_it_is_the_smaller_one():
    params = HeParams(plain_modulus_above(48))
    exact = math.log2(coeff_modulus() / (2 * params.plain_modulus) / (21 + 1))
    assert noise_budget_bits(params, 1, 1000) == pytest.approx(exact, abs=1e-9)


def test_bound_shrinks_with_sites_and_with_ciphertexts():
    params = HeParams(plain_modulus_above(48))
    budgets = [noise_budget_bits(params, sites, 100) for sites in (2, 8, 16, 64, 1024)]
    assert budgets == sorted(budgets, reverse=True)
    assert noise_budget_bits(params, 64, 1) > noise_budget_bits(params, 64, 10**6)
    assert budgets[-1] < 0  # refused by choose_packing, not silently wrong


def test_sum_beyond_the_bound_really_loses_its_budget():
    # The modulus is as large as q allows: SEAL itself sees no budget left where the bound is far below zero.
    params = HeParams(plain_modulus_above(56))
    assert noise_budget_bits(params, 8, 1) < 0
    key = SecretKey.generate(params)
    assert seal_budgets(params, 8, key=key, rng=np.random.default_rng(1)) == 0


def test_largest_cohort_keeps_a_bit():
    packing = choose_packing(24, 1024)
    assert noise_budget_bits(packing.params, 1024, 1 << 20) >= 1
