from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fedseek.records import Records, cap_records
from fedseek.tokenise import tokenise

SEED = 2024

small_text = st.text('汇款ab\0"\\,', max_size=3)
rows = st.lists(
    st.tuples(st.sampled_from(["甲", "乙", "c", "d"]), small_text, st.sampled_from(["欺诈", "正常"])), max_size=40
)


def records_of(rows) -> Records:
    units, texts, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Records(tuple(texts), tuple(labels), tuple(units), "customer")


def rows_of(records: Records) -> list[tuple[str, str, str]]:
    return list(zip(records.units, records.texts, records.labels, strict=True))


def of_unit(records, unit: str) -> Counter:
    return Counter(row for row in records if row[0] == unit)


@given(rows=rows, cap=st.integers(1, 6), seed=st.integers(0, 2**64 - 1))
def test_a_unit_keeps_all_its_records_or_exactly_the_cap(rows, cap, seed):
    kept = rows_of(cap_records(records_of(rows), cap, seed=seed))
    had, has = Counter(unit for unit, *_ in rows), Counter(unit for unit, *_ in kept)
    assert has == Counter({unit: min(count, cap) for unit, count in had.items()})
    assert not Counter(kept) - Counter(rows)


@given(rows=rows, cap=st.integers(1, 6))
def test_a_unit_with_no_more_than_the_cap_is_left_as_it_is(rows, cap):
    kept = rows_of(cap_records(records_of(rows), cap, seed=SEED))
    small = {unit for unit, count in Counter(unit for unit, *_ in rows).items() if count <= cap}
    assert [row for row in kept if row[0] in small] == [row for row in rows if row[0] in small]


@given(rows=rows, cap=st.integers(1, 6), data=st.data())
def test_what_is_kept_of_a_unit_does_not_depend_on_the_other_units(rows, cap, data):
    kept = rows_of(cap_records(records_of(rows), cap, seed=SEED))
    changed = [row for row in rows if row[0] != "甲"] + data.draw(
        st.lists(st.tuples(st.just("甲"), small_text, small_text))
    )
    kept_then = rows_of(cap_records(records_of(changed), cap, seed=SEED))
    for unit in ("乙", "c", "d"):
        assert of_unit(kept_then, unit) == of_unit(kept, unit)


@given(rows=rows, cap=st.integers(1, 6), data=st.data())
def test_the_order_of_the_file_does_not_matter(rows, cap, data):
    kept = rows_of(cap_records(records_of(rows), cap, seed=SEED))
    turned = rows_of(cap_records(records_of(data.draw(st.permutations(rows))), cap, seed=SEED))
    assert Counter(turned) == Counter(kept)


@given(rows=rows, cap=st.integers(1, 6))
def test_records_stay_in_the_order_of_the_file_and_a_second_time_changes_nothing(rows, cap):
    once = cap_records(records_of(rows), cap, seed=SEED)
    left = iter(rows)
    assert all(row in left for row in rows_of(once))
    assert cap_records(once, cap, seed=SEED) == once == cap_records(records_of(rows), cap, seed=SEED)


@given(rows=rows, cap=st.integers(1, 5))
def test_a_larger_cap_keeps_what_a_smaller_one_kept(rows, cap):
    fewer, more = (Counter(rows_of(cap_records(records_of(rows), each, seed=SEED))) for each in (cap, cap + 1))
    assert not fewer - more


def many(count: int = 30) -> list[tuple[str, str, str]]:
    return [("甲", f"第{number}笔", "正常") for number in range(count)]


def test_it_is_not_the_first_ones_of_the_file_and_each_has_its_chance():
    times = Counter()
    for seed in range(400):
        times.update(text for _, text, _ in rows_of(cap_records(records_of(many()), 3, seed=seed)))
    assert len(times) == 30
    # 400 x 3 / 30 = 40 times each; 6 standard deviations
    assert all(abs(count - 40) < 6 * (400 * 0.1 * 0.9) ** 0.5 for count in times.values())


def test_two_units_with_equal_texts_draw_lots_of_their_own():
    alike = [(unit, text, label) for unit in ("甲", "乙") for _, text, label in many()]
    kept = rows_of(cap_records(records_of(alike), 5, seed=SEED))
    assert {text for unit, text, _ in kept if unit == "甲"} != {text for unit, text, _ in kept if unit == "乙"}


def test_who_is_kept_is_fixed_for_good():
    """A site that restarts under a newer version goes on with the same records."""
    kept = cap_records(records_of(many(10)), 3, seed=SEED)
    assert [text for _, text, _ in rows_of(kept)] == ["第0笔", "第3笔", "第4笔"]


def test_the_unit_column_goes_along_and_tokenising_sees_only_what_is_kept(tiny_model):
    kept = cap_records(records_of(many()), 4, seed=SEED)
    assert kept.unit_column == "customer"
    tokenised = tokenise(kept, tiny_model, labels=("欺诈", "正常"), max_tokens=16)
    assert (len(tokenised), tokenised.num_units) == (4, 1)
