import dataclasses
import json

import msgspec
import pytest
import yaml

from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.guards import TRAINING_GUARDS
from fedseek.errors import ReleaseRefused
from fedseek.release import (
    NOT_COVERED,
    PrivacyStatement,
    describe_statement,
    model_card,
    privacy_statement,
    statement_bytes,
)

RUN, SITE = "试运行-1", "仁济医院"


@pytest.fixture(scope="module")
def private(tiny_plan):
    return tiny_plan(private=True)


@pytest.fixture(scope="module")
def public(tiny_plan):
    return tiny_plan()


def state(plan, **changes) -> PrivacyStatement:
    """The statement of the site after the whole run, if nothing went wrong; ``changes`` is what did."""
    earned = {"spend": plan.spend_after(2), "guards_passed": TRAINING_GUARDS if plan.privacy else (), "steps": 4}
    spoken_of = {"adapter_sha256": "ab" * 32, "digests": {"global": b"\x01" * 32, "kind/hospital": b"\x02" * 32}}
    return privacy_statement(plan, run=RUN, site=SITE, kind="hospital", **{**earned, **spoken_of, **changes})


def refused(plan, **changes) -> str:
    with pytest.raises(ReleaseRefused) as caught:
        state(plan, **changes)
    assert SITE in caught.value.message
    assert "no epsilon" in caught.value.hint
    return caught.value.message


def test_a_statement_says_what_was_earned(private):
    said = state(private)
    assert (said.run, said.site, said.kind, said.plan_digest) == (RUN, SITE, "hospital", private.digest)
    assert (said.mechanism, said.unit, said.num_steps) == ("dp-sgd", "patient", 4)
    assert said.neighboring_relation == "add or remove one unit"
    assert said.epsilon == private.spend_after(2).epsilon() <= 8.0
    assert said.epsilon_second_opinion >= said.epsilon
    assert (said.delta, said.l2_clip_norm, said.sampling_probability) == (1e-3, 1.0, 0.5)
    assert said.noise_multiplier == private.privacy.noise_multiplier
    assert set(said.guards_passed) == set(TRAINING_GUARDS)
    assert "privacy loss distribution" in said.accountant
    assert said.adapter_sha256 == "ab" * 32
    assert said.tensors == {"global": "01" * 32, "kind/hospital": "02" * 32}


def test_a_run_that_stopped_early_states_what_it_spent_and_not_the_plans_target(private):
    half = state(private, spend=private.spend_after(1), steps=2)
    assert half.epsilon < state(private).epsilon
    assert half.num_steps == 2


def test_no_statement_without_a_spend(private):
    assert "4 steps trained, 0 accounted" in refused(private, spend=None)


def test_no_statement_without_guards(private):
    message = refused(private, guards_passed=())
    for guard in TRAINING_GUARDS:
        assert guard in message


@pytest.mark.parametrize("guard", TRAINING_GUARDS)
def test_no_statement_when_one_guard_did_not_report(private, guard):
    assert f"guards not passed: {guard};" in refused(private, guards_passed=[g for g in TRAINING_GUARDS if g != guard])


@pytest.mark.parametrize(("accounted", "trained"), [(3, 4), (5, 4), (0, 4), (2, 4)])
def test_no_statement_when_steps_and_spend_differ(private, accounted, trained):
    spend = PrivacySpend(private.privacy).after(accounted)
    assert f"{trained} steps trained, {accounted} accounted" in refused(private, spend=spend, steps=trained)


def test_no_statement_about_another_mechanism_than_the_plans(private):
    louder = dataclasses.replace(private.privacy, noise_multiplier=private.privacy.noise_multiplier * 10)
    refused(private, spend=PrivacySpend(louder).after(4))


def test_no_epsilon_where_the_plan_promises_none(public):
    said = state(public)
    assert said.mechanism == "none"
    assert said.accountant == "none"
    figures = ("epsilon", "epsilon_second_opinion", "delta", "noise_multiplier", "l2_clip_norm")
    assert [getattr(said, name) for name in figures] == [None] * len(figures)
    assert said.guards_passed == ()


def test_a_spend_without_a_promise_is_refused_and_earns_no_epsilon(private, public):
    refused(public, spend=private.spend_after(2))


# --- JSON


@pytest.mark.parametrize("plan_name", ["private", "public"])
def test_the_signed_json_comes_back_as_the_same_statement(plan_name, request):
    said = state(request.getfixturevalue(plan_name))
    data = statement_bytes(said)
    assert msgspec.json.decode(data, type=PrivacyStatement) == said
    assert SITE.encode() in data
    assert data.endswith(b"}\n")
    document = json.loads(data)
    assert document["epsilon"] == said.epsilon
    assert document["not_covered"] == list(NOT_COVERED)
    assert statement_bytes(said) == data


def test_a_json_statement_with_a_field_too_many_or_too_few_is_no_statement(private):
    document = json.loads(statement_bytes(state(private)))
    for wrong in ({**document, "epsilon_is": 0.1}, {k: v for k, v in document.items() if k != "epsilon"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(json.dumps(wrong), type=PrivacyStatement)


# --- words


def test_not_covered_names_every_limit_of_the_guarantee():
    for limit in (
        "took part",
        "held back for evaluation",
        "base model",
        "other runs on the same data",
        "more than one record of a person where the unit is the record",
        "in a sum of two sites each can subtract its own",
        "more sites work with the coordinator than the plan says",
    ):
        assert any(limit in line for line in NOT_COVERED), limit


def test_the_statement_in_words_has_unit_epsilon_delta_and_guards(private):
    text = describe_statement(state(private))
    epsilon = f"{state(private).epsilon:.2f}"
    assert f"**({epsilon}, 0.001)-differential privacy** for one patient" in text
    assert "add or remove one unit" in text
    assert "4 steps" in text
    assert f"noise multiplier {private.privacy.noise_multiplier:.3f}" in text
    for guard in TRAINING_GUARDS:
        assert guard in text


def test_the_statement_in_words_promises_nothing_that_was_not_earned(public, private):
    for said in (state(public), msgspec.structs.replace(state(private), epsilon=None)):
        text = describe_statement(said)
        assert "No privacy guarantee" in text
        assert "differential privacy" not in text
        assert "epsilon" not in text


def card(plan, *statements, utility=None) -> str:
    return model_card(
        plan, run=RUN, statements=statements or [state(plan)], utility=utility or {}, base="package:some-model"
    )


def test_the_model_card_of_a_private_run_states_every_site(private):
    other = msgspec.structs.replace(state(private), site="北岸银行", kind="bank", unit="record")
    text = card(private, state(private), other, utility={"bank": 0.875})
    assert text.startswith("---\nlibrary_name: peft\nbase_model: package:some-model\n")
    assert "differential-privacy" in text.split("---")[1]
    assert f"### {SITE} (hospital)" in text
    assert "### 北岸银行 (bank)" in text
    assert text.count("-differential privacy** for one") == 2
    assert "for one patient" in text
    assert "for one record" in text
    assert "0.001" in text
    assert "- `bank`: 2 labels, accuracy on held-back rows 0.875" in text
    assert "- `hospital`: 3 labels, accuracy on held-back rows not disclosed" in text
    assert f"plan `{private.digest}`" in text
    assert private.spec.model.sha256 in text
    for line in NOT_COVERED:
        assert f"- {line}\n" in text


def test_the_model_card_has_no_epsilon_and_no_such_tag_when_none_was_earned(public):
    text = card(public)
    assert "No privacy guarantee" in text
    assert "epsilon" not in text
    assert "differential" not in text
    assert "tags: [lora, federated-learning]\n" in text


def test_one_site_without_a_guarantee_takes_the_tag_from_the_whole_card(private):
    without = msgspec.structs.replace(state(private), epsilon=None)
    assert "differential-privacy" not in card(private, state(private), without).split("---")[1]
    assert "differential-privacy" not in model_card(private, run=RUN, statements=[], utility={}, base="b")


def test_the_metadata_block_is_yaml(private):
    block = yaml.safe_load(card(private).split("---")[1])
    assert block["tags"] == ["lora", "federated-learning", "differential-privacy"]
    assert block["base_model"] == "package:some-model"
