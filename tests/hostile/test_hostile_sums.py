"""A coordinator that hands down other sums than it should: each test is one attack on real sites, and what they say.

Every attack goes through ``attack``: at every honest site nothing was applied or trained, and nothing but a code came
back. A site that decrypted something false stops for good; had it got the true sum, it would have applied it.

``test_open_...`` are attacks that succeed, or are noticed later than one would wish. They are what the threat model must
own up to; whoever closes one turns its test around.
"""

from __future__ import annotations

import numpy as np
import pytest
from attacks import (
    ANNA,
    BEIAN,
    EVERYBODY,
    FIFTH,
    FIVE,
    GLOBAL,
    HARBOUR,
    KIND_OF,
    RENJI,
    announced,
    as_sum,
    attack,
    check,
    check_released,
    combined,
    ended,
    federation,
    group_key,
    holdings,
    lost,
    modulus_of,
    positions,
    update_of,
    with_coefficients,
    with_sums,
    without,
)
from msgspec.structs import replace
from plot import Plot

from fedseek.errors import FedseekError, Tampered
from fedseek.he.ciphertext import (
    CiphertextForm,
    ScopedSum,
    add_in_place,
    load_ciphertext,
    save_ciphertext,
    subtract_in_place,
    subtract_slots,
)
from fedseek.he.keys import decrypt_slots, encrypt_slots
from fedseek.messages import (
    UnmaskRequest,
    decode_request,
    encode_message,
)
from fedseek.tag import _tags, tag_key

TAMPERED = ("Tampered", "its tags are not those of")


# --- the sum is another one -------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_noticed_by_every_site(begin):
    """One bit of one coefficient. The lowest ones only change the noise: those leave the sum what it is."""
    cohort, harmless = begin(), []

    def forge(site, asked):
        key, modulus = group_key(cohort, site), modulus_of(cohort)
        true = decrypt_slots(key, asked.previous[0].sums[0].ciphertexts)
        for polynomial, bit in ((part, bit) for part in (0, 1) for bit in (0, 5, 10, 20, 40, 56)):

            def flip(coefficients, polynomial=polynomial, bit=bit):
                coefficients[polynomial, 7] ^= 1 << bit

            false = with_sums(asked, lambda *one, flip=flip: with_coefficients(one[2], flip, modulus=modulus))
            try:
                same = (decrypt_slots(key, false.previous[0].sums[0].ciphertexts) == true).all()
            except FedseekError:  # the site says so itself, below
                same = False
            if same:
                harmless.append(bit)
            else:
                yield false

    found = attack(cohort, ("round", 2), forge)
    assert max(harmless) < 20
    assert all({code for code, _ in refusals} <= {"Tampered"} for refusals in found.values())
    assert min(map(len, found.values())) >= 6


def test_bytes_that_are_no_ciphertext_are_refused_as_such(begin):
    def forge(site, asked):
        yield with_sums(asked, lambda scope, place, data: data[:-1])
        yield with_sums(asked, lambda scope, place, data: data + b"\0")
        yield with_sums(asked, lambda scope, place, data: data[:40] + bytes([data[40] ^ 0x80]) + data[41:])

    check(attack(begin(), ("round", 2), forge), *[("Malformed", "SEAL object")] * 3)


def test_an_added_constant_is_noticed_by_every_site(begin):
    """Added under encryption, which needs no key: to a value, to the count of sites, to a tag, where nothing is."""
    cohort = begin()
    params = cohort.coordinator.plan.packing.params

    def forge(site, asked):
        for slot in (60, 2, 0, 4095):
            constant = np.zeros(params.slot_count, np.uint64)
            constant[slot] = 1

            def add(scope, place, data, constant=constant):
                loaded = load_ciphertext(params, data, form=CiphertextForm.SUMMED)
                subtract_slots(params, loaded, constant)
                return save_ciphertext(loaded)

            yield with_sums(asked, add)

    check(attack(cohort, ("round", 2), forge), *[TAMPERED] * 4)


def test_a_scaled_sum_is_noticed_by_every_site(begin):
    """Each update twice, announced as such or not; and the sum taken off itself."""
    cohort = begin()

    def forge(site, asked):
        twice = with_sums(asked, lambda scope, place, data: combined(cohort, data, data, add_in_place))
        yield twice
        sums = (ScopedSum(each.scope, 2 * each.contributors, each.ciphertexts) for each in twice.previous[0].sums)
        yield announced(twice, sums=tuple(sums))
        thrice = with_sums(twice, lambda scope, place, data: combined(cohort, data, data, add_in_place))
        yield thrice

    check(attack(cohort, ("round", 2), forge), *[TAMPERED] * 3)


def test_an_update_added_twice_or_taken_out_is_noticed_by_every_site(begin):
    cohort = begin()

    def forge(site, asked):
        update = {each.scope: each.ciphertexts for each in update_of(cohort, BEIAN, 1).update}
        for operation in (add_in_place, subtract_in_place):
            yield with_sums(
                asked,
                lambda scope, place, data, operation=operation: (
                    combined(cohort, data, update[scope][place], operation) if scope == GLOBAL else data
                ),
            )

    check(attack(cohort, ("round", 2), forge), TAMPERED, TAMPERED)


def test_swapped_sums_of_two_scopes_are_noticed_by_every_site(begin):
    def forge(site, asked):
        first, second = asked.previous[0].sums
        yield announced(
            asked,
            sums=(
                ScopedSum(first.scope, first.contributors, second.ciphertexts),
                ScopedSum(second.scope, second.contributors, first.ciphertexts),
            ),
        )

    check(attack(begin(), ("round", 2), forge), TAMPERED)


def test_swapped_sums_of_two_rounds_are_noticed(begin):
    """Told to a site that was away in both and applies both at once."""
    cohort = begin(3)

    def forge(site, asked):
        if site != ANNA:
            return []
        first, second = asked.previous
        previous = (replace(second, round=1), replace(first, round=2))
        return [replace(asked, previous=previous), replace(asked, previous=(second, first))]

    found = attack(cohort, ("round", 3), forge, away=lambda *where: where == ("round", 1, ANNA))
    check({ANNA: found[ANNA]}, TAMPERED, ("WrongRound", "got the sums of rounds [2, 1]"), sites=[ANNA])


def test_an_old_rounds_sum_is_not_applied_a_second_time(begin):
    cohort = begin(3)

    def forge(site, asked):
        shared = federation(cohort).shared_scopes(KIND_OF[site])
        old = holdings(cohort).history.ended[0]
        old = replace(old, sums=tuple(each for each in old.sums if each.scope in shared))
        yield replace(asked, previous=(old,))
        yield replace(asked, previous=(replace(old, round=2),))
        yield replace(asked, previous=(old, replace(old, round=2)))

    wanted = ("WrongRound", "got the sums of rounds [], wanted those of [2]")
    check(attack(cohort, ("round", 3), forge), wanted, TAMPERED, TAMPERED)


def test_a_sum_that_is_told_again_is_passed_over(begin):
    """As an honest coordinator does that lost a reply; nothing more is applied for it."""
    cohort = begin(3)

    def request(phase, number, site, asked):
        if (phase, number, site) != ("round", 3, RENJI):
            return asked
        shared = federation(cohort).shared_scopes(KIND_OF[site])
        old = holdings(cohort).history.ended[0]
        message = decode_request(asked)
        old = replace(old, sums=tuple(each for each in old.sums if each.scope in shared))
        return encode_message(replace(message, previous=(old, *message.previous)))

    cohort.play(request=request)
    check_released(cohort)


def test_a_single_update_handed_down_as_a_sum_is_refused(begin):
    """With its self mask taken off, which the coordinator knows: the pairwise masks make garbage of it."""
    cohort = begin()

    def forge(site, asked):
        update = {each.scope: each.ciphertexts for each in update_of(cohort, BEIAN, 1).update}
        yield with_sums(
            asked, lambda scope, place, data: as_sum(cohort, update[scope][place]) if scope == GLOBAL else data
        )

    check(attack(cohort, ("round", 2), forge), TAMPERED)


def test_a_sum_that_is_still_masked_is_refused(begin):
    """All four updates added, and no mask taken off: what a coordinator has before anybody revealed a share."""
    cohort = begin()

    def forge(site, asked):
        def masked(scope, place, data):
            names = [name for name in EVERYBODY if scope in {each.scope for each in update_of(cohort, name, 1).update}]
            parts = [
                {each.scope: each.ciphertexts for each in update_of(cohort, name, 1).update}[scope][place]
                for name in names
            ]
            total = as_sum(cohort, parts[0])
            for part in parts[1:]:
                total = combined(cohort, total, part, add_in_place)
            return total

        yield with_sums(asked, masked)

    check(attack(cohort, ("round", 2), forge), TAMPERED)


def test_an_old_epochs_sum_is_not_applied_as_a_new_ones(begin):
    """The key is changed before round 2. A sum under the old one: the refusal names both epochs; relabelled, it does
    not decrypt.
    """
    cohort = begin(3)

    def forge(site, asked):
        if isinstance(asked, UnmaskRequest):
            cohort.coordinator.request_rotation()
            return []
        assert (asked.epoch, asked.previous[0].epoch) == (1, 1)
        shared = federation(cohort).shared_scopes(KIND_OF[site])
        old = tuple(each for each in holdings(cohort).history.ended[0].sums if each.scope in shared)
        return [
            announced(asked, epoch=0, sums=old),
            announced(asked, epoch=0),
            announced(asked, sums=old),
        ]

    both = ("WrongKey", "announced under the group key of epoch 0, this site encrypted under that of epoch 1")
    check(attack(cohort, [("unmask", 1), ("round", 3)], forge), both, both, ("Tampered", "no noise budget left"))


# --- the sum is that of others ----------------------------------------------------------------------------------------


def test_a_survivor_that_is_dropped_in_silence_notices_it(begin):
    """Its update is thrown away; the sum of the other three is announced to all as that of all four."""
    cohort = begin(3)

    def forge(site, asked):
        if (asked.round == 3) != (site == BEIAN) or not hasattr(asked, "previous"):
            return []
        first, *rest = asked.previous
        sums = first.sums
        if site == BEIAN:  # of its head there was one survivor: something must stand in for that sum
            sums = (ScopedSum(GLOBAL, 4, sums[0].ciphertexts), ScopedSum("kind/bank", 2, sums[0].ciphertexts))
        return [replace(asked, previous=(replace(first, survivors=(0, 1, 2, 3), sums=sums), *rest))]

    found = attack(cohort, [("round", 2), ("round", 3)], forge, reply=lost("round", 1, BEIAN))
    others = without(found, BEIAN)
    check(others, ("WrongRound", "this site revealed shares for harbour-bank, st-anna"), sites=(HARBOUR, ANNA, RENJI))
    check({BEIAN: found[BEIAN]}, TAMPERED, sites=[BEIAN])


def test_fewer_or_more_survivors_than_were_summed_are_refused(begin):
    cohort = begin(sites=FIVE, cohort={"max_sites": 5})

    def forge(site, asked):
        others = tuple(name for name in EVERYBODY if name != site)[:2]
        names = federation(cohort).names(asked.previous[0].survivors)
        yield announced(asked, survivors=positions(cohort, site, *others, FIFTH))
        yield announced(asked, survivors=positions(cohort, *names, FIFTH))
        yield announced(asked, survivors=positions(cohort, *others))

    found = attack(cohort, ("round", 2), forge, away=lambda *where: where[2] == FIFTH)
    check(
        found,
        ("WrongRound", f"{FIFTH} announced, with whom this site did not mask"),
        ("WrongRound", f"{FIFTH} announced, with whom this site did not mask"),
        ("CohortTooSmall", "2 sites are in it"),
    )


def test_a_sum_of_one_site_is_asked_for_in_vain(begin):
    """At every step where a single site could be named: whom to mask with, who survived, whose sum it is."""
    cohort = begin()

    def forge(site, asked):
        alone = positions(cohort, site)
        if isinstance(asked, UnmaskRequest):
            return replace(asked, survivors=alone, presence={})
        if asked.round == 1:
            return replace(asked, participants=alone, boxes={})
        sums = tuple(
            ScopedSum(each.scope, 1, tuple(as_sum(cohort, one) for one in each.ciphertexts))
            for each in update_of(cohort, site, 1).update
        )
        return announced(asked, survivors=alone, sums=sums)

    check(
        attack(cohort, [("round", 1), ("unmask", 1), ("round", 2)], forge),
        ("CohortTooSmall", "1 sites take part, wanted at least 3"),
        ("CohortTooSmall", "1 sites survived, wanted at least 3"),
        ("CohortTooSmall", "1 sites are in it, wanted at least 3"),
    )


def test_the_head_of_a_single_survivor_stays_closed(begin):
    """Of two banks one vanishes. A hospital that colludes has the group key: the other's head is masked all the same.

    No share was dealt that could take the mask off. And nobody takes a sum of that head.
    """
    cohort, head, plots = begin(3), "kind/bank", []

    def forge(site, asked):
        if isinstance(asked, UnmaskRequest):
            plots[:] = plots or [Plot(cohort, ANNA)]
        if site != BEIAN or asked.round == 1:
            return []
        update = {each.scope: each.ciphertexts for each in update_of(cohort, BEIAN, 1).update}
        single = ScopedSum(head, 1, tuple(as_sum(cohort, one) for one in update[head]))
        return [announced(asked, sums=(*asked.previous[0].sums, single))]

    found = attack(cohort, [("unmask", 1), ("round", 2)], forge, reply=lost("round", 1, HARBOUR))
    check(found, ("Malformed", "got scopes ['global', 'kind/bank'], wanted ['global']"), sites=[BEIAN])
    assert ended(cohort)[1] == (ANNA, RENJI, BEIAN)
    with pytest.raises(Tampered):
        plots[0].open_head(update_of(cohort, BEIAN, 1), head)


# --- what succeeds ----------------------------------------------------------------------------------------------------


def test_open_with_a_site_that_colludes_a_forged_sum_is_applied(begin):
    """Succeeds, as fedseek/tag.py says: whoever holds the group key makes tags that fit. All sites are moved alike."""
    cohort = begin()
    modulus = cohort.coordinator.plan.packing.params.plain_modulus

    def forged(scope, place, data):
        if scope != GLOBAL:
            return data
        key = group_key(cohort, ANNA)
        slots = decrypt_slots(key, [data])
        slots[60] += np.uint64(1)
        slots[:2] = 0
        slots[:2] = _tags(slots, tag_key(key, federation(cohort), 1, GLOBAL), EVERYBODY, modulus=modulus)
        return as_sum(cohort, encrypt_slots(key, slots)[0])

    def request(phase, number, site, asked):
        message = decode_request(asked)
        return encode_message(with_sums(message, forged)) if (phase, number) == ("round", 2) else asked

    cohort.play(request=request)
    check_released(cohort)
