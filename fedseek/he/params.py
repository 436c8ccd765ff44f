"""BFV parameters, and a proof in code that a planned cohort decrypts exactly.

One parameter shape serves every plan: ring degree 4096 and a single 58-bit coefficient prime. Nothing is ever
multiplied under encryption, so no key-switching prime is needed, and 58 bits is the most that SEAL admits at 256-bit
security for this degree (Homomorphic Encryption Standard, 2018, table 1: classical attacks, ternary secret). Only the
plain modulus varies.

Source: J. Fan, F. Vercauteren, "Somewhat practical fully homomorphic encryption", eprint 2012/144 (BFV).

>>> from fedseek.he.params import HeParams, noise_budget_bits, plain_modulus_above
>>> params = HeParams(plain_modulus=plain_modulus_above(48))
>>> round(noise_budget_bits(params, num_sites=8, num_ciphertexts=180), 2)
2.3
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from Crypto.Util.number import isPrime

POLY_MODULUS_DEGREE = 4096
COEFF_MOD_BIT_SIZES = (58,)

# SEAL samples noise as popcount(21 bits) - popcount(21 other bits): SEAL_NOISE_SAMPLER = sample_poly_cbd.
NOISE_BITS = 42
NOISE_BOUND = NOISE_BITS // 2

# The statement "every coefficient decrypts exactly" fails with at most this probability, 2^-64, per sum.
FAILURE_PROBABILITY_BITS = 64

# Largest plain modulus SEAL takes for batching.
MAX_PLAIN_MODULUS_BITS = 60


@dataclass(frozen=True, slots=True)
class HeParams:
    """Parameters of the BFV scheme; public, and equal at all parties of a plan.

    Attributes:
        plain_modulus: the prime t; a slot holds one integer mod t. t = 1 mod 2N, so that slots exist (batching).
        poly_modulus_degree: N, also the number of slots of a ciphertext.
        coeff_mod_bit_sizes: bits of the one coefficient prime q.

    Raises:
        ValueError: a size other than the one whose security and noise are argued here, or a modulus without slots.
    """

    plain_modulus: int
    poly_modulus_degree: int = POLY_MODULUS_DEGREE
    coeff_mod_bit_sizes: tuple[int, ...] = COEFF_MOD_BIT_SIZES

    def __post_init__(self) -> None:
        if (self.poly_modulus_degree, self.coeff_mod_bit_sizes) != (POLY_MODULUS_DEGREE, COEFF_MOD_BIT_SIZES):
            raise ValueError(
                f"he params: got degree {self.poly_modulus_degree} with coefficient primes of "
                f"{self.coeff_mod_bit_sizes} bits; wanted {POLY_MODULUS_DEGREE} with {COEFF_MOD_BIT_SIZES}"
            )
        t = self.plain_modulus
        if t.bit_length() > MAX_PLAIN_MODULUS_BITS or t % (2 * self.poly_modulus_degree) != 1 or not isPrime(t):
            raise ValueError(
                f"plain_modulus: got {t}; wanted a prime = 1 mod {2 * self.poly_modulus_degree} "
                f"of at most {MAX_PLAIN_MODULUS_BITS} bits"
            )

    @property
    def slot_count(self) -> int:
        """Integers that one ciphertext holds."""
        return self.poly_modulus_degree


@lru_cache(maxsize=64)
def plain_modulus_above(bits: int) -> int:
    """Smallest prime above ``2**bits`` that is 1 mod 2N, hence the same at every site."""
    step = 2 * POLY_MODULUS_DEGREE
    candidate = (1 << bits) // step * step + 1
    while candidate <= 1 << bits or not isPrime(candidate):
        candidate += step
    return candidate


@lru_cache(maxsize=1)
def coeff_modulus() -> int:
    """The coefficient prime q: the largest 58-bit prime = 1 mod 2N, as SEAL's ``CoeffModulus.Create`` picks it."""
    step = 2 * POLY_MODULUS_DEGREE
    candidate = ((1 << COEFF_MOD_BIT_SIZES[0]) - 1) // step * step + 1
    while not isPrime(candidate):
        candidate -= step
    return candidate


def noise_budget_bits(params: HeParams, num_sites: int, num_ciphertexts: int) -> float:
    """Noise budget that is left after summing ``num_sites`` updates and subtracting one plaintext.

    Formal guarantee: with probability at least 1 - 2^-64 over SEAL's encryption noise, every coefficient of all
    ``num_ciphertexts`` sums has at least this many bits left. At more than 0 bits the sums decrypt exactly.

    Why. A fresh symmetric ciphertext of m decrypts to ``q m / t + e + r`` mod q: e is the noise, r the rounding of
    ``q m / t`` to an integer. Sums that wrap around t cost nothing more, since q is an integer. So the noise of a
    sum is S noises e, plus S + 1 roundings r (one belongs to the subtracted plaintext). Decryption, round(t c(s) / q),
    is exact while that is below q / (2 t). SEAL's decryption gives up a further 2^-60 of that bound, its own
    ``invariant_noise_budget`` rounds the same quantity down to whole bits: from 1 bit here it is never 0 there.

    Args:
        params: the BFV parameters.
        num_sites: fresh ciphertexts in one sum, at least 1.
        num_ciphertexts: sums that have to be right at once, at least 1.

    Returns:
        ``log2(q / (2 t noise))`` in bits; negative when exactness cannot be promised.
    """
    # Each e is a sum of 42 independent bits, centred: Hoeffding (1963), theorem 2, over 42 S bits of range 1 gives
    # P(|sum| >= x) <= 2 exp(-2 x^2 / (42 S)); a union bound over all coefficients, solved for x:
    num_coefficients = params.poly_modulus_degree * num_ciphertexts
    log_events = math.log(2 * num_coefficients) + FAILURE_PROBABILITY_BITS * math.log(2)
    tail = math.sqrt(NOISE_BITS * num_sites * log_events / 2)
    noise = min(tail, float(NOISE_BOUND * num_sites))
    # SEAL rounds with floor((x + (t + 1) / 2) / t): off by at most 1/2 + 1/(2t).
    rounding = (num_sites + 1) * 0.5 * (1 + 1 / params.plain_modulus)
    capacity = coeff_modulus() / (2 * params.plain_modulus)
    return math.log2(capacity / (noise + rounding))
