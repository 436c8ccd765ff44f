"""The canonical form of a plan: one digest for what sites agree to, and nothing else accepted from a coordinator."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_documents import DOCUMENT, PLAN_TOML, REMOVED, changed, checked

from fedseek.errors import InvalidPlan
from fedseek.plan import (
    MAX_PLAN_BYTES,
    canonical_bytes,
    load_plan,
    parse_spec,
    plan_digest,
    plan_from_canonical,
)

# --- canonical form and digest


@settings(deadline=None)
@given(st.randoms(use_true_random=False))
def test_key_order_does_not_change_the_digest(random):
    def shuffled(value: object) -> object:
        if not isinstance(value, dict):
            return value
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    assert canonical_bytes(parse_spec(shuffled(DOCUMENT))) == canonical_bytes(parse_spec(DOCUMENT))


def test_formatting_of_the_toml_does_not_change_the_digest(tmp_path: Path):
    plain = PLAN_TOML.format(sha="ab" * 32)
    reworded = plain.replace("2e-3", "0.002_0").replace('["query"]', '[\n  "query",  # 注释\n]\nalpha = 32')
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(plain, "utf-8")
    two.write_text(reworded.replace(" = ", "=").replace("\n", "\r\n"), "utf-8")
    assert one.read_bytes() != two.read_bytes()
    assert load_plan(one).digest == load_plan(two).digest


CHANGES = [
    {"name": "demo-2"},
    {"seed": 8},
    {"model__source": "package:other-model"},
    {"model__sha256": "ac" * 32},
    {"model__max_tokens": 33},
    {"kinds__bank__labels": ["正常", "欺诈"]},
    {"kinds__hospital__metric": "accuracy", "kinds__hospital__unit": "record"},
    {"lora__method": "both"},
    {"lora__rank": 5},
    {"lora__alpha": 8.5},
    {"lora__target_modules": ["value", "query"]},
    {"lora__layers": [0]},
    {"lora__layers": REMOVED},
    {"training__rounds": 3},
    {"training__steps_per_round": 5},
    {"training__sampling_probability": 0.26},
    {"training__learning_rate": 0.0021},
    {"training__head_learning_rate": 0.011},
    {"training__physical_batch_size": 63},
    {"training__server_learning_rate": 0.9},
    {"training__server_momentum": 0.1},
    {"privacy__epsilon": 7.9},
    {"privacy__delta": 1.1e-5},
    {"privacy__l2_clip_norm": 1.1},
    {"privacy": {"mechanism": "none"}},
    {"encryption__value_bits": 12},
    {"encryption__key_days": 30},
    {"cohort__min_sites": 4},
    {"cohort__colluders": 0},
    {"cohort__min_contributors": 2},
    {"cohort__dropout_fraction": 0.2},
    {"cohort__max_sites": 9},
    {"cohort__weighting": "records"},
    {"cohort__record_cap": 2},
    {"cohort__deadline_seconds": 60},
]


def test_any_value_changes_the_digest_and_no_two_changes_give_the_same():
    specs = [parse_spec(DOCUMENT), *(parse_spec(changed(**change)) for change in CHANGES)]
    digests = {plan_digest(canonical_bytes(spec)) for spec in specs}
    assert len(digests) == 1 + len(CHANGES)


def test_a_default_written_out_is_the_same_plan():
    assert checked(training__physical_batch_size=64).digest == checked().digest
    cohort = {"cohort__colluders": 1, "cohort__min_contributors": 3, "cohort__dropout_fraction": 0.1}
    assert checked(encryption__key_days=90, **cohort).digest == checked().digest


def test_the_digest_is_bound_to_its_purpose():
    data = checked().canonical()
    assert checked().digest == hashlib.sha256(b"fedseek/plan/v1\0" + data).hexdigest()
    assert checked().digest != hashlib.sha256(data).hexdigest()


# --- a plan from the coordinator


def test_a_canonical_plan_comes_back_the_same_chinese_labels_included():
    plan = checked()
    assert "欺诈".encode() in plan.canonical()
    again = plan_from_canonical(plan.canonical())
    assert again == plan
    assert again.spec.kinds["bank"].labels == ("欺诈", "正常")


def refused_bytes(data: bytes) -> InvalidPlan:
    with pytest.raises(InvalidPlan) as caught:
        plan_from_canonical(data)
    assert "received plan" in caught.value.message
    return caught.value


def test_what_is_not_canonical_is_refused():
    data = checked().canonical()
    document = json.loads(data)
    for other in (
        data + b"\n",
        b" " + data,
        json.dumps(document, sort_keys=True, separators=(",", ":")).encode(),  # escapes instead of UTF-8
        json.dumps(document, separators=(", ", ": "), sort_keys=True, ensure_ascii=False).encode(),
        json.dumps(dict(reversed(document.items())), separators=(",", ":"), ensure_ascii=False).encode(),
        data.replace(b'"alpha":8.0', b'"alpha":8'),
        data.replace(b'"seed":7', b'"seed":9,"seed":7'),
    ):
        assert other != data
        assert "canonical" in refused_bytes(other).message


def test_a_plan_that_leaves_its_defaults_out_is_not_canonical():
    bare = json.dumps(DOCUMENT, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert "canonical" in refused_bytes(bare).message


def test_an_oversized_plan_is_refused_before_it_is_parsed():
    error = refused_bytes(b"{" * (MAX_PLAN_BYTES + 1))
    assert str(MAX_PLAN_BYTES) in error.message
    assert str(MAX_PLAN_BYTES + 1) in error.message


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b'{"name":"\xd5\xcb"}', b'{"name":"\\ud800"}', b"{", b'{"a":' * 20_000, b"\xff\xfe{\0}\0"],
    ids=["empty", "null", "list", "gb18030", "surrogate", "cut", "deep", "utf-16"],
)
def test_what_is_no_json_plan_is_refused(data):
    refused_bytes(data)


def test_a_canonical_plan_whose_parts_do_not_fit_is_refused():
    spec = parse_spec(changed(cohort__min_sites=9))
    assert "min_sites 9" in refused_bytes(canonical_bytes(spec)).message


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_invalid_plan(data):
    refused_bytes(data)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_plan_with_some_bytes_changed_is_refused_or_is_another_plan(data):
    good = checked(privacy={"mechanism": "none"}).canonical()
    position = data.draw(st.integers(0, len(good) - 1))
    other = good[:position] + data.draw(st.binary(max_size=3)) + good[position + 1 :]
    try:
        plan = plan_from_canonical(other)
    except InvalidPlan:
        return
    assert plan.canonical() == other
