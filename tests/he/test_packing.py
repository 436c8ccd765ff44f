import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.errors import InvalidPlan
from fedseek.he.packing import MAX_CIPHERTEXTS, choose_packing, pack, spans, unpack, unpack_span
from fedseek.he.params import noise_budget_bits

sizes = st.tuples(st.integers(2, 24), st.integers(1, 1024))


@pytest.mark.parametrize(
    ("value_bits", "max_sites", "digits_per_slot", "digit_bits"),
    [(13, 8, 3, 16), (8, 16, 4, 12), (8, 64, 3, 14), (13, 64, 2, 19), (24, 1024, 1, 34), (2, 1, 25, 2)],
)
def test_packings_of_the_design(value_bits, max_sites, digits_per_slot, digit_bits):
    packing = choose_packing(value_bits, max_sites)
    assert (packing.digits_per_slot, packing.digit_bits) == (digits_per_slot, digit_bits)


@given(sizes)
def test_every_packing_decrypts_exactly_and_never_carries(size):
    value_bits, max_sites = size
    packing = choose_packing(value_bits, max_sites)
    assert noise_budget_bits(packing.params, max_sites, MAX_CIPHERTEXTS) >= 1
    assert max_sites * (2**value_bits - 1) < 2**packing.digit_bits
    assert 2 ** (packing.digit_bits * packing.digits_per_slot) < packing.params.plain_modulus
    assert packing.header_bound * max_sites < packing.params.plain_modulus
    assert packing.header_bound >= 2**34 - 1


@pytest.mark.parametrize(("value_bits", "max_sites"), [(1, 8), (25, 8), (13, 0), (13, 1025)])
def test_sizes_out_of_range_are_refused(value_bits, max_sites):
    with pytest.raises(InvalidPlan, match="wanted"):
        choose_packing(value_bits, max_sites)


def test_all_problems_are_listed_at_once():
    with pytest.raises(InvalidPlan) as caught:
        choose_packing(99, 5000)
    assert len(caught.value.problems) == 2


@given(sizes, st.integers(1, 400), st.integers(0, 2**32))
def test_unpack_undoes_pack(size, num_values, seed):
    packing = choose_packing(*size)
    digits = np.random.default_rng(seed).integers(0, 2**packing.digit_bits, size=num_values, dtype=np.uint64)
    slots = pack(digits, packing)
    assert slots.shape == (packing.num_slots(num_values),)
    assert int(slots.max()) < packing.params.plain_modulus
    assert (unpack(slots, num_values, packing) == digits).all()


@given(sizes, st.integers(1, 50))
def test_sum_of_slots_is_sum_of_digits_when_all_sites_send_the_maximum(size, num_values):
    value_bits, max_sites = size
    packing = choose_packing(value_bits, max_sites)
    slots = pack(np.full(num_values, 2**value_bits - 1, dtype=np.uint32), packing)
    total = slots * np.uint64(max_sites)
    assert int(total.max()) < packing.params.plain_modulus
    assert (unpack(total, num_values, packing) == max_sites * (2**value_bits - 1)).all()


def test_unpack_refuses_a_wrong_number_of_slots():
    packing = choose_packing(13, 8)
    with pytest.raises(ValueError, match=r"wanted \(4,\) for 10 values"):
        unpack(np.zeros(3, dtype=np.uint64), 10, packing)


@pytest.mark.parametrize("num_values", [0, 1, 3 * 2**14, 3 * 2**14 + 1, 100_003])
def test_spans_hold_every_value_once_and_in_order_where_packing_puts_it(num_values):
    packing = choose_packing(13, 8)
    digits = np.random.default_rng(num_values).integers(0, 2**16, size=num_values, dtype=np.uint64)
    slots, found = pack(digits, packing), list(spans(num_values, packing))
    assert [place for span in found for place in range(*span.values.indices(num_values))] == list(range(num_values))
    for span in found:
        assert span.values.stop - span.values.start == span.slots.stop - span.slots.start <= 2**14
        assert (unpack_span(slots, span, packing) == digits[span.values]).all()
    m = packing.num_slots(num_values)
    for number in {0, m - 1, m, num_values - 1} & set(range(num_values)):  # slot i holds digits i, i + m, i + 2m
        assert int(slots[number % m]) >> 16 * (number // m) & 0xFFFF == digits[number]
