"""Packing: several quantised values side by side in one slot, wide enough that a sum over sites never carries.

A value of ``value_bits`` bits is a digit of ``digit_bits = value_bits + ceil(log2(max_sites))`` bits: the sum of
``max_sites`` digits still fits, so digits add independently when slots add. ``choose_packing`` takes as many digits a
slot as the proven noise budget allows: upload bytes a value are about 8 / digits_per_slot.

>>> choose_packing(13, 8).digits_per_slot, choose_packing(13, 8).digit_bits
(3, 16)
>>> pack(np.array([1, 2, 3, 4], dtype=np.uint32), choose_packing(13, 8)).tolist()  # two slots: 1,3 and 2,4
[196609, 262146]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedseek.errors import InvalidPlan
from fedseek.he.params import HeParams, noise_budget_bits, plain_modulus_above

MIN_VALUE_BITS = 2
MAX_VALUE_BITS = 24
MAX_SITES = 1024

# One bit more than exact decryption needs.
NOISE_MARGIN_BITS = 1.0

# Sums that must be right at once: 2^20 ciphertexts hold over 4e9 values, more than any adapter has.
MAX_CIPHERTEXTS = 1 << 20

# Header slots hold counts (records, saturated values): even where the digits need less, 2^44 leaves every site of
# MAX_SITES room to count to 2^34.
MIN_SLOT_BITS = 44

# Values a span: a few float64 buffers of this size stay in a core's cache.
_SPAN = 1 << 14


@dataclass(frozen=True, slots=True)
class Packing:
    """How quantised values share slots; public, derived by ``choose_packing``.

    Attributes:
        value_bits: bits of one site's quantised value, b.
        max_sites: most sites in one sum.
        digit_bits: bits reserved for the sum of one value, w.
        digits_per_slot: values in a slot, k.
        params: the BFV parameters whose plain modulus holds k digits.
    """

    value_bits: int
    max_sites: int
    digit_bits: int
    digits_per_slot: int
    params: HeParams

    @property
    def header_bound(self) -> int:
        """Largest integer that every one of ``max_sites`` sites may put in a slot of its own without wrapping t."""
        return (self.params.plain_modulus - 1) // self.max_sites

    @property
    def levels(self) -> int:
        """Steps from 0 to the largest value. One code of 2^b is given up so that zero is a code of its own, in the middle."""
        return (1 << (self.value_bits - 1)) - 1

    def num_slots(self, num_values: int) -> int:
        """Slots that ``num_values`` values fill."""
        return -(-num_values // self.digits_per_slot)


@lru_cache(maxsize=64)
def choose_packing(value_bits: int, max_sites: int) -> Packing:
    """Choose the densest packing whose noise budget is provably positive.

    Args:
        value_bits: bits of one quantised value, in [2, 24].
        max_sites: most sites in one sum, in [1, 1024].

    Returns:
        The packing with the largest ``digits_per_slot`` that keeps ``NOISE_MARGIN_BITS`` of noise budget.

    Raises:
        InvalidPlan: a size is out of range; lists every problem.
    """
    problems = [
        f"{name}: got {got}; wanted {low} to {high}"
        for name, got, low, high in (
            ("value_bits", value_bits, MIN_VALUE_BITS, MAX_VALUE_BITS),
            ("max_sites", max_sites, 1, MAX_SITES),
        )
        if not low <= got <= high
    ]
    if problems:
        raise InvalidPlan(problems, source="packing")
    digit_bits = value_bits + (max_sites - 1).bit_length()
    for digits_per_slot in range(64 // digit_bits, 0, -1):
        packing = _packing(value_bits, max_sites, digit_bits, digits_per_slot)
        if packing is not None:
            return packing
    raise InvalidPlan(
        [f"no packing of {value_bits}-bit values for {max_sites} sites decrypts exactly"], source="packing"
    )


def _packing(value_bits: int, max_sites: int, digit_bits: int, digits_per_slot: int) -> Packing | None:
    """The packing with this many digits, or None where its noise budget is too small."""
    slot_bits = max(digit_bits * digits_per_slot, MIN_SLOT_BITS)
    if slot_bits > 58:  # no room below q at all
        return None
    params = HeParams(plain_modulus=plain_modulus_above(slot_bits))
    if noise_budget_bits(params, max_sites, MAX_CIPHERTEXTS) < NOISE_MARGIN_BITS:
        return None
    return Packing(value_bits, max_sites, digit_bits, digits_per_slot, params)


@dataclass(frozen=True, slots=True)
class Span:
    """A run of consecutive values that lie in consecutive slots, at the same place of each.

    Attributes:
        values: where in the vector of values.
        slots: where in the packed slots; as long.
        shift: bits below the digit.
    """

    values: slice
    slots: slice
    shift: np.uint64


def spans(num_values: int, packing: Packing) -> Iterator[Span]:
    """Every value once, in order, in pieces that stay in a core's cache: what packs or unpacks needs no more memory.

    Slot i holds digits i, i + m, i + 2m, ... (m slots), lowest first: each piece is then contiguous on both sides.
    """
    num_slots = packing.num_slots(num_values)
    for place in range(packing.digits_per_slot):
        begin, end = place * num_slots, min((place + 1) * num_slots, num_values)
        for start in range(begin, end, _SPAN):
            stop = min(start + _SPAN, end)
            yield Span(slice(start, stop), slice(start - begin, stop - begin), np.uint64(place * packing.digit_bits))


def pack(digits: npt.NDArray[np.unsignedinteger], packing: Packing) -> npt.NDArray[np.uint64]:
    """Pack digits into slots, in the order of ``spans``.

    The last digits of the last slots are zero when k does not divide n.

    Args:
        digits: shape (n,), unsigned, each below ``2**packing.digit_bits`` (the quantiser's guarantee, not checked).
        packing: how many digits a slot takes, and how wide they are.

    Returns:
        Slots, shape (ceil(n / k),).
    """
    slots = np.zeros(packing.num_slots(digits.size), dtype=np.uint64)
    for span in spans(digits.size, packing):
        slots[span.slots] |= digits[span.values].astype(np.uint64) << span.shift
    return slots


def unpack(slots: npt.NDArray[np.uint64], num_values: int, packing: Packing) -> npt.NDArray[np.uint64]:
    """Undo ``pack``, also for a sum of packed slots.

    Args:
        slots: shape (ceil(num_values / k),).
        num_values: n.
        packing: as given to ``pack``.

    Returns:
        Digits, shape (num_values,).

    Raises:
        ValueError: the number of slots does not fit ``num_values``.
    """
    num_slots = packing.num_slots(num_values)
    if slots.shape != (num_slots,):
        raise ValueError(f"unpack: got slots of shape {slots.shape}; wanted ({num_slots},) for {num_values} values")
    digits = np.empty(num_values, dtype=np.uint64)
    for span in spans(num_values, packing):
        digits[span.values] = unpack_span(slots, span, packing)
    return digits


def unpack_span(slots: npt.NDArray[np.uint64], span: Span, packing: Packing) -> npt.NDArray[np.uint64]:
    """The digits of one span; the slots are all of them."""
    return (slots[span.slots] >> span.shift) & np.uint64((1 << packing.digit_bits) - 1)
