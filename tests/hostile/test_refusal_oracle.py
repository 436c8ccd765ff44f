"""What refusals tell: a coordinator asks a site about the group key by handing it false sums. It gets one answer.

The attack. A sum is moved so that the noise of one coefficient is just below the limit, and a little of the secret key
is added: whether it still decrypts says on which side of the limit it is. If a site told that, and went on, two requests
would tell one coefficient of the key, 8192 all of them. Two things stand against it: a sum that decrypts and one that
does not are refused with one code, and a site that refused either stops.

What is left: whether a sum was applied. That is one bit a round, and the first bit that helps ends the run at the site.

Source: the usual attack on encryption that is not secure against chosen ciphertexts, here for BFV: M. Chenal, Q. Tang,
"On key recovery attacks against existing somewhat homomorphic encryption schemes", LATINCRYPT 2014.
"""

from __future__ import annotations

import numpy as np
from attacks import (
    GLOBAL,
    HARBOUR,
    attack,
    group_key,
    modulus_of,
    refused,
    state,
    with_coefficients,
    with_sums,
)
from msgspec.structs import replace
from tenseal import sealapi

from fedseek.he.ciphertext import (
    CiphertextForm,
    load_ciphertext,
    save_ciphertext,
    seal_context,
    subtract_slots,
)
from fedseek.he.keys import encrypt_slots
from fedseek.messages import decode_request

PLACES = range(12)  # of 4096


def secret_coefficients(key):
    """The true ones, read by their owner: (0, q / t) decrypts to s."""
    (fresh,) = encrypt_slots(key, np.zeros(1, np.uint64))
    data = save_ciphertext(load_ciphertext(key.params, fresh, form=CiphertextForm.FRESH))
    context = seal_context(key.params)
    (prime,) = context.first_context_data().parms().coeff_modulus()

    def only_s(coefficients):
        coefficients[:] = 0
        coefficients[1, 0] = int(prime.value()) // key.params.plain_modulus

    crafted = with_coefficients(data, only_s, modulus=int(prime.value()))
    plaintext = sealapi.Plaintext()
    loaded = load_ciphertext(key.params, crafted, form=CiphertextForm.SUMMED)
    sealapi.Decryptor(context, key._seal_key).decrypt(loaded, plaintext)
    values = [int(plaintext.data(place)) if place < plaintext.coeff_count() else 0 for place in PLACES]
    return [value - key.params.plain_modulus if value > 1 else value for value in values]


def with_spoilt_tag(params, data):
    one = np.zeros(params.slot_count, np.uint64)
    one[0] = 1
    loaded = load_ciphertext(params, data, form=CiphertextForm.SUMMED)
    subtract_slots(params, loaded, one)
    return save_ciphertext(loaded)


def questions(cohort, asked):
    """Two false sums for each coefficient of the key: does it lie on this side of the limit, or on that?"""
    modulus, params = modulus_of(cohort), cohort.coordinator.plan.packing.params
    limit = 1 << (modulus.bit_length() - 2)  # from here on SEAL reports no noise budget
    one_noise = pow(params.plain_modulus, -1, modulus)  # what adds 1 to t (c0 + c1 s) mod q

    def question(place, sign):
        def nudge(coefficients):
            coefficients[0, place] += (limit - limit // 8) * one_noise
            coefficients[1, 0] += sign * (limit // 4) * one_noise

        return lambda scope, _, data: (
            with_coefficients(with_spoilt_tag(params, data), nudge, modulus=modulus) if scope == GLOBAL else data
        )

    return [with_sums(asked, question(place, sign)) for place in PLACES for sign in (1, -1)]


def test_all_false_sums_are_refused_with_one_code(begin):
    """The site's own report knows which was which, and so the key, coefficient by coefficient. Nobody else does."""
    cohort, true = begin(), []

    def forge(site, asked):
        if site != HARBOUR:
            return []
        true.extend(secret_coefficients(group_key(cohort, HARBOUR)))
        return questions(cohort, asked)

    refusals = attack(cohort, ("round", 2), forge)[HARBOUR]
    assert {code for code, _ in refusals} == {"Tampered"}
    is_beyond = ["no noise budget" in text for _, text in refusals]
    assert [plus - minus for plus, minus in zip(is_beyond[::2], is_beyond[1::2], strict=True)] == true
    assert any(true)


def test_a_site_that_was_handed_a_false_sum_answers_no_more_in_that_run(begin):
    """Not even the true request, and not after a restart: there is no second question."""
    cohort = begin()
    exchange = cohort.play(until=("round", 2))
    asked = decode_request(next(iter(exchange.requests.values())))
    site = cohort.services[next(iter(exchange.requests))].identity.name
    first, second, *_ = questions(cohort, asked)
    assert refused(cohort, site, first)[0] == "Tampered"
    for _ in range(2):
        for again in (asked, second, replace(asked, round=3)):
            code, text = refused(cohort, site, again)
            assert code == "WrongRound"
            assert "was stopped at this site" in text or "another request" in text
        assert not state(cohort, site).group_keys
        cohort.restart(site)
