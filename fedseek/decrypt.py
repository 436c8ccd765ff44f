"""Decrypt: the encrypted sum becomes numbers, and is believed when its tags and counts fit. Run by each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedseek.cohort import Federation
from fedseek.encode import SummedUpdate, UpdateLayout, decode_sum, num_ciphertexts
from fedseek.errors import Malformed, Tampered, WrongKey
from fedseek.he.ciphertext import ScopedSum
from fedseek.he.keys import SecretKey, decrypt_slots
from fedseek.tag import check_tags, tag_key


def decrypt_sum(
    key: SecretKey,
    sums: Sequence[ScopedSum],
    *,
    federation: Federation,
    number: int,
    survivors: Mapping[str, Sequence[str]],
    layouts: Mapping[str, UpdateLayout],
    value_ranges: Mapping[str, float],
) -> dict[str, SummedUpdate]:
    """Decrypt, verify and decode the sum of a round.

    Guarantee: every returned sum is that of exactly the updates which the announced survivors tagged for this scope and
    round, each once, unless somebody with the group key helped to forge it (``fedseek.tag``). Nothing is returned
    unless all scopes pass.

    Args:
        key: the group key of the round's epoch.
        sums: from the coordinator, untrusted; scopes not in ``layouts`` are ignored.
        federation: the run.
        number: of the round.
        survivors: the announced sites by scope, members of it.
        layouts: the scopes wanted; each must be in ``sums``.
        value_ranges: C by scope, as they were when the updates were encoded.

    Raises:
        Malformed: a scope is missing or repeated, a count is wrong, or the content is no sum of updates.
        Tampered: the sum is not that of the sites announced, or does not open under this key. One error for both: which
            of the two it was would tell the sender about the key (a reaction attack).
    """
    plan = federation.plan
    by_scope = {each.scope: each for each in sums}
    if len(by_scope) != len(sums) or not set(layouts) <= set(by_scope):
        raise Malformed(f"sum: got scopes {[each.scope for each in sums]}; wanted {sorted(layouts)}, each once")
    decoded = {}
    for scope, layout in layouts.items():
        each = by_scope[scope]
        wanted = num_ciphertexts(layout, plan.packing)
        if len(each.ciphertexts) != wanted:
            raise Malformed(f"sum of {scope!r}: got {len(each.ciphertexts)} ciphertexts; wanted {wanted}")
        slots = _open(key, each, number)
        check_tags(
            slots,
            tag_key(key, federation, number, scope),
            survivors=survivors[scope],
            modulus=plan.packing.params.plain_modulus,
            what=f"sum of {scope!r}, round {number}",
        )
        summed = decode_sum(
            slots, layout, packing=plan.packing, value_range=value_ranges[scope], weight_cap=plan.weight_cap
        )
        if not summed.contributors == each.contributors == len(survivors[scope]):
            raise Malformed(
                f"sum of {scope!r}: coordinator announced {len(survivors[scope])} sites and counted "
                f"{each.contributors}, it holds {summed.contributors}"
            )
        decoded[scope] = summed
    return decoded


def _open(key: SecretKey, each: ScopedSum, number: int) -> npt.NDArray[np.uint64]:
    try:
        return decrypt_slots(key, each.ciphertexts)
    except WrongKey as error:
        raise Tampered(
            f"sum of {each.scope!r}, round {number}: {error.message}",
            hint="it was made under another epoch's key, over more sites than the plan allows, or altered; not applied",
        ) from error
