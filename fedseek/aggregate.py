"""Aggregate: add what cannot be read. Run by the coordinator.

A fold, as in VDAF (draft-irtf-cfrg-vdaf): ``agg_init``, ``agg_update`` once a site, ``agg_finish``; ``merge`` joins two
folds. One running sum a scope is kept, so memory does not grow with the number of sites.

The sum is kept as it will be sent, 16 bytes a slot: twice what a site sends. A ciphertext is an object of SEAL only while
something is added to it: SEAL never gives the memory of its objects back, so a sum made of them would be there twice from
the moment it is written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fedseek.errors import CohortTooSmall, Malformed
from fedseek.he.ciphertext import (
    CiphertextForm,
    ScopedCiphertexts,
    ScopedSum,
    add_in_place,
    load_ciphertext,
    save_ciphertext,
    subtract_in_place,
)
from fedseek.he.params import HeParams
from fedseek.he.sealfile import Scratch, scratch


@dataclass(slots=True)
class Aggregate:
    """A running sum. Made by ``agg_init``, changed by ``agg_update`` and ``merge`` only.

    Attributes:
        params: BFV parameters of the plan.
        expected: scopes of the plan, and how many ciphertexts an update has in each.
        max_sites: most sites a scope's sum may hold: more, and digits would carry into each other unseen.
        contributors: sites added so far, by scope.
        sums: serialised ciphertexts, of the summed form, by scope; none until a site contributed.
    """

    params: HeParams
    expected: Mapping[str, int]
    max_sites: int
    contributors: dict[str, int]
    sums: dict[str, list[bytes]] = field(repr=False)


def agg_init(params: HeParams, expected: Mapping[str, int], *, max_sites: int) -> Aggregate:
    """Start an empty sum.

    Args:
        params: BFV parameters of the plan.
        expected: number of ciphertexts by scope (``fedseek.encode.num_ciphertexts``).
        max_sites: of the plan's packing.
    """
    return Aggregate(
        params=params,
        expected=dict(expected),
        max_sites=max_sites,
        contributors=dict.fromkeys(expected, 0),
        sums={scope: [] for scope in expected},
    )


def agg_update(aggregate: Aggregate, update: Sequence[ScopedCiphertexts]) -> None:
    """Add one site's update.

    Guarantee: all or nothing. Shape and counts are checked first; should a ciphertext then fail to parse, those added
    before it are subtracted again. Addition mod q is exactly invertible, so the sum is as it was, bit for bit.
    Ciphertexts are parsed one at a time and nothing of ``update`` is kept.

    Args:
        aggregate: the running sum; changed in place.
        update: the scopes this site belongs to, each at most once.

    Raises:
        Malformed: empty, an unknown or repeated scope, a wrong number of ciphertexts, or one that does not parse.
        Malformed: a scope already holds ``max_sites`` sites.

    Cost: about 0.1 s for 2.2 million values packed three to a slot; memory for one ciphertext.
    """
    _check_scopes(aggregate, update)
    params = aggregate.params
    with scratch() as through, ExitStack() as undo:
        for scoped in update:
            running = aggregate.sums[scoped.scope]
            is_first, added = not running, list[memoryview]()
            if is_first:
                undo.callback(running.clear)
            else:
                undo.callback(_take_out, params, running, added, through)
            for position, data in enumerate(scoped.ciphertexts):
                fresh = load_ciphertext(params, data, form=CiphertextForm.FRESH, through=through)
                if is_first:
                    running.append(save_ciphertext(fresh, through))
                else:
                    running[position] = _sum_of(params, running[position], fresh, through)
                    added.append(data)
        undo.pop_all()  # complete: forget how to undo it
    for scoped in update:
        aggregate.contributors[scoped.scope] += 1


def merge(aggregate: Aggregate, other: Aggregate) -> None:
    """Add another fold over different sites to ``aggregate``; ``other`` is used up by it.

    Raises:
        ValueError: the two are not folds of the same plan.
        Malformed: together they hold more than ``max_sites`` sites in a scope.
    """
    if (aggregate.params, aggregate.expected, aggregate.max_sites) != (other.params, other.expected, other.max_sites):
        raise ValueError("merge: the two sums belong to different plans")
    for scope, contributors in other.contributors.items():
        _check_room(aggregate, scope, contributors)
    for scope, addends in other.sums.items():
        running = aggregate.sums[scope]
        with scratch() as through:
            for position, (held, data) in enumerate(zip(running, addends, strict=False)):  # one of them may be empty
                addend = load_ciphertext(aggregate.params, data, form=CiphertextForm.SUMMED, through=through)
                running[position] = _sum_of(aggregate.params, held, addend, through)
        running.extend(addends[len(running) :])
        aggregate.contributors[scope] += other.contributors[scope]
    other.sums = {scope: [] for scope in other.expected}
    other.contributors = dict.fromkeys(other.expected, 0)


def agg_finish(aggregate: Aggregate, *, min_sites: int, scopes: Sequence[str] | None = None) -> tuple[ScopedSum, ...]:
    """Write the sum out, one entry a scope in the plan's order.

    Args:
        aggregate: the running sum.
        min_sites: fewest sites of a scope that is written out.
        scopes: the ones to write out; all of them by default.

    Raises:
        CohortTooSmall: a scope holds fewer than ``min_sites`` sites: its sum would say too much about each of them.
    """
    chosen = [scope for scope in aggregate.expected if scopes is None or scope in scopes]
    for scope in chosen:
        contributors = aggregate.contributors[scope]
        if contributors < min_sites:
            raise CohortTooSmall(f"scope {scope!r}: {contributors} sites contributed; wanted at least {min_sites}")
    return tuple(
        ScopedSum(scope=scope, contributors=aggregate.contributors[scope], ciphertexts=tuple(aggregate.sums[scope]))
        for scope in chosen
    )


def _check_scopes(aggregate: Aggregate, update: Sequence[ScopedCiphertexts]) -> None:
    scopes = [scoped.scope for scoped in update]
    if not scopes or len(set(scopes)) != len(scopes) or not set(scopes) <= set(aggregate.expected):
        raise Malformed(f"update: got scopes {scopes}; wanted some of {sorted(aggregate.expected)}, each once")
    for scoped in update:
        wanted = aggregate.expected[scoped.scope]
        if len(scoped.ciphertexts) != wanted:
            raise Malformed(f"update of {scoped.scope!r}: got {len(scoped.ciphertexts)} ciphertexts; wanted {wanted}")
        _check_room(aggregate, scoped.scope, 1)


def _check_room(aggregate: Aggregate, scope: str, contributors: int) -> None:
    held = aggregate.contributors[scope]
    if held + contributors > aggregate.max_sites:
        raise Malformed(
            f"scope {scope!r}: holds {held} sites, got {contributors} more; wanted {aggregate.max_sites} in all"
        )


def _sum_of(params: HeParams, running: bytes, addend: Any, through: Scratch) -> bytes:
    total = load_ciphertext(params, running, form=CiphertextForm.SUMMED, through=through)
    add_in_place(params, total, addend)
    return save_ciphertext(total, through)


def _take_out(params: HeParams, running: list[bytes], added: Sequence[memoryview], through: Scratch) -> None:
    """Subtract what was added, from the first ciphertext on; it parsed before, so it parses again."""
    for position, data in enumerate(added):
        total = load_ciphertext(params, running[position], form=CiphertextForm.SUMMED, through=through)
        fresh = load_ciphertext(params, data, form=CiphertextForm.FRESH, through=through)
        subtract_in_place(params, total, fresh)
        running[position] = save_ciphertext(total, through)
