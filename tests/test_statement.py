"""The privacy statement: what it says, that nothing is said which was not earned, and that it has one form."""

import dataclasses
import json

import msgspec
import pytest
from bundled import RUN, Signers
from hypothesis import given
from hypothesis import strategies as st

from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.composition import RunSpend, composed_epsilon, composed_epsilon_rdp
from fedseek.dp.guards import TRAINING_GUARDS
from fedseek.errors import Malformed, ReleaseRefused, TooLarge
from fedseek.plan import check_plan, parse_spec
from fedseek.statement import (
    MAX_STATEMENT_BYTES,
    NOT_COVERED,
    PrivacyStatement,
    StageStated,
    outcome_of,
    parse_statement,
    privacy_statement,
    statement_bytes,
)

SITE = "仁济医院"


@pytest.fixture(scope="module")
def private(tiny_plan):
    return Signers.of(tiny_plan(private=True))


@pytest.fixture(scope="module")
def public(tiny_plan):
    return Signers.of(tiny_plan())


def state(signers, **changes):
    """The statement without a gate in front of it."""
    return privacy_statement(signers.plan, signers.outcome(SITE, **changes), checks=())


def refused(signers, **changes) -> str:
    with pytest.raises(ReleaseRefused) as caught:
        state(signers, **changes)
    assert SITE in caught.value.message
    assert "no epsilon" in caught.value.hint
    return caught.value.message


def test_a_statement_says_what_was_earned(private):
    said, plan = private.statement(SITE), private.plan
    assert (said.version, said.run, said.site, said.kind, said.plan_digest) == (3, RUN, SITE, "hospital", plan.digest)
    assert (said.mechanism, said.unit) == ("dp-sgd", "patient")
    assert said.neighboring_relation == "add or remove one unit"
    assert said.epsilon == plan.spend_after(2).epsilon() <= 8.0
    assert said.epsilon_second_opinion >= said.epsilon
    assert (said.delta, said.l2_clip_norm) == (1e-3, 1.0)
    wanted = StageStated(noise_multiplier=plan.privacy.noise_multiplier, sampling_probability=0.5, num_steps=4)
    assert said.stages == (wanted,)
    assert set(TRAINING_GUARDS) <= set(said.guards_passed)
    assert "privacy loss distribution" in said.accountant
    assert set(said.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert set(said.tensors) == {"global", "kind/hospital"}
    assert said.contributors == private.roster.names
    assert said.roster_digest == private.roster.digest().hex()
    assert [check.name for check in said.checks] == [
        "budget",
        "guards",
        "epsilon",
        "canary-audit",
        "utility",
        "contributors",
        "adapter",
    ]
    assert said.audit.canaries == private.plan.num_canaries


def test_a_run_that_stopped_early_states_what_it_spent_and_not_the_plans_target(private):
    half = state(private, spend=private.plan.spend_after(1), steps=(2,))
    assert half.epsilon < state(private).epsilon
    assert half.stages[0].num_steps == 2


def test_no_statement_without_a_spend(private):
    assert "4 trained, 0 accounted" in refused(private, spend=None)


def test_no_statement_without_guards(private):
    message = refused(private, guards_passed=())
    for guard in TRAINING_GUARDS:
        assert guard in message


@pytest.mark.parametrize("guard", TRAINING_GUARDS)
def test_no_statement_when_one_guard_did_not_report(private, guard):
    passed = tuple(name for name in TRAINING_GUARDS if name != guard)
    assert f"guards not passed: {guard};" in refused(private, guards_passed=passed)


@pytest.mark.parametrize(("accounted", "trained"), [(3, 4), (5, 4), (0, 4), (2, 4)])
def test_no_statement_when_steps_and_spend_differ(private, accounted, trained):
    spend = private.plan.spend_of([accounted])
    assert f"{trained} trained, {accounted} accounted" in refused(private, spend=spend, steps=(trained,))


def test_no_statement_about_steps_that_are_not_in_the_ledger(private):
    assert "2 in the ledger" in refused(private, steps_spent=(2,))


def test_steps_in_the_ledger_that_were_never_trained_are_a_loss_and_no_lie(private):
    """Entered before training; the site was killed in between."""
    said = state(private, spend=private.plan.spend_after(1), steps=(2,), steps_spent=(4,))
    assert said.stages[0].num_steps == 2


def test_no_statement_about_another_mechanism_than_the_plans(private):
    louder = dataclasses.replace(private.plan.privacy, noise_multiplier=private.plan.privacy.noise_multiplier * 10)
    refused(private, spend=RunSpend((PrivacySpend(louder, 4),)))


def test_no_epsilon_where_the_plan_promises_none(public):
    said = public.statement(SITE)
    assert (said.mechanism, said.accountant) == ("none", "none")
    assert "no noise" in said.trust_model
    figures = ("epsilon", "epsilon_second_opinion", "delta", "l2_clip_norm", "audit", "site_level")
    assert [getattr(said, name) for name in figures] == [None] * len(figures)
    assert said.guards_passed == ()
    assert said.stages == (StageStated(noise_multiplier=None, sampling_probability=0.5, num_steps=4),)


def test_a_spend_without_a_promise_is_refused_and_earns_no_epsilon(private, public):
    refused(public, spend=private.plan.spend_after(2))


@pytest.mark.parametrize("limit", [None, 3])
def test_the_most_records_of_a_unit_are_those_of_the_plan(tiny_plan_document, limit):
    document = tiny_plan_document(private=True)
    document["privacy"] |= {} if limit is None else {"max_records_per_unit": limit}
    assert Signers.of(check_plan(parse_spec(document))).statement(SITE).max_records_per_unit == limit


def test_not_covered_names_every_limit_of_the_guarantee():
    for limit in (
        "took part",
        "held back for evaluation",
        "base model",
        "other runs on the same data",
        "more than one record of a person where the unit is the record",
        "in a sum of two sites each can subtract its own",
        "more sites work with the coordinator than the plan says",
        "how much may leak at least",
        "the signed word of the site",
    ):
        assert any(limit in line for line in NOT_COVERED), limit


# --- the one form


@pytest.mark.parametrize("name", ["private", "public"])
def test_the_signed_json_comes_back_as_the_same_statement(name, request):
    said = request.getfixturevalue(name).statement(SITE)
    data = statement_bytes(said)
    assert parse_statement(data) == said
    assert SITE.encode() in data
    assert json.loads(data)["not_covered"] == list(NOT_COVERED)


def form(document) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


OTHER_FORMS = {
    "a field too many": lambda d: {**d, "epsilon_is": 0.1},
    "a field too few": lambda d: {name: value for name, value in d.items() if name != "epsilon"},
    "version 2": lambda d: {**d, "version": 2},
    "another order": lambda d: dict(reversed(d.items())),
    "another order within": lambda d: {**d, "files": dict(reversed(d["files"].items()))},
    "an integer for a number": lambda d: {**d, "l2_clip_norm": 1},
    "a digest in capitals": lambda d: {**d, "plan_digest": d["plan_digest"].upper()},
    "a negative epsilon": lambda d: {**d, "epsilon": -1.0},
    "an epsilon without end": lambda d: {**d, "epsilon": 1e300},
    "an epsilon in words": lambda d: {**d, "epsilon": "1.0"},
    "a name without end": lambda d: {**d, "site": "x" * 65},
    "a list without end": lambda d: {**d, "not_covered": ["x"] * 33},
}


@pytest.mark.parametrize("alter", OTHER_FORMS.values(), ids=list(OTHER_FORMS))
def test_a_statement_in_any_other_form_is_none(private, alter):
    document = json.loads(statement_bytes(private.statement(SITE)))
    with pytest.raises(Malformed):
        parse_statement(form(alter(document)))


@pytest.mark.parametrize(
    "alter", [lambda d: d + b"\n", lambda d: d[:-1], lambda d: d.replace(b"  ", b" "), lambda d: b"\xff" + d]
)
def test_spaces_and_ends_are_part_of_the_form(private, alter):
    with pytest.raises(Malformed):
        parse_statement(alter(statement_bytes(private.statement(SITE))))


def test_a_statement_is_bounded(private):
    with pytest.raises(TooLarge):
        parse_statement(bytes(MAX_STATEMENT_BYTES + 1))
    with pytest.raises(Malformed):
        parse_statement(b"[" * MAX_STATEMENT_BYTES)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_statement_or_refused(data):
    with pytest.raises(Malformed):
        parse_statement(data)


def test_no_field_has_a_default_that_could_go_unsaid():
    assert [each.name for each in msgspec.structs.fields(PrivacyStatement) if not each.required] == ["version"]


# --- two stages

DOMAIN = {"rounds": 1, "steps_per_round": 2, "sampling_probability": 1.0, "learning_rate": 0.001}


@pytest.fixture(scope="module")
def staged(tiny_plan):
    """A stage of 2 steps on the sites' texts before one of 4."""
    return Signers.of(tiny_plan(private=True, domain=DOMAIN))


def test_the_epsilon_of_two_stages_is_that_of_their_composition(staged):
    said, plan = staged.statement(SITE), staged.plan
    assert [(stage.num_steps, stage.sampling_probability) for stage in said.stages] == [(2, 1.0), (4, 0.5)]
    assert [stage.noise_multiplier for stage in said.stages] == [each.privacy.noise_multiplier for each in plan.stages]
    assert said.epsilon == composed_epsilon(plan.spend_after(3).stages, 1e-3) <= 8.0
    assert said.epsilon_second_opinion == composed_epsilon_rdp(plan.spend_after(3).stages, 1e-3) > said.epsilon
    assert parse_statement(statement_bytes(said)) == said


def test_a_site_that_rested_in_part_of_a_stage_states_what_it_trained(staged):
    for steps in ((2, 2), (0, 4), (2, 0)):
        said = state(staged, steps=steps, spend=staged.plan.spend_of(steps))
        assert tuple(stage.num_steps for stage in said.stages) == steps
        assert said.epsilon == staged.plan.spend_of(steps).epsilon() < staged.plan.spend_after(3).epsilon()


def test_where_votes_may_end_training_epsilon_is_that_of_the_whole_plan(tiny_plan):
    """When it ends depends on what earlier steps gave out."""
    voting = Signers.of(tiny_plan(private=True, training={"early_stopping": {"patience": 1}}))
    said = state(voting, steps=(2,), spend=voting.plan.spend_of((2,)))
    assert said.stages[0].num_steps == 2
    assert said.epsilon == voting.plan.spend_after(2).epsilon() > voting.plan.spend_after(1).epsilon()
    assert said.epsilon_second_opinion == voting.plan.spend_after(2).epsilon_rdp()


@pytest.mark.parametrize(
    ("trained", "accounted", "in_ledger"),
    [((2, 4), (4, 2), (2, 4)), ((2, 4), (2, 2), (2, 4)), ((2, 4), (2, 4), (1, 5))],
    ids=["of the other stage", "not accounted", "in the ledger as the other stage's"],
)
def test_steps_of_one_stage_do_not_stand_for_those_of_another(staged, trained, accounted, in_ledger):
    refused(staged, steps=trained, spend=staged.plan.spend_of(accounted), steps_spent=in_ledger)


def test_stages_in_another_order_are_another_mechanism(staged):
    spend = RunSpend(tuple(reversed(staged.plan.spend_of((4, 2)).stages)))
    assert spend.steps == (2, 4)
    refused(staged, spend=spend)


def test_a_statement_of_another_number_of_stages_than_the_plan_has_is_refused(staged, private):
    refused(staged, steps=(6,), spend=private.plan.spend_of((4,)), steps_spent=(6,))
    with pytest.raises(ReleaseRefused, match="stages: got 2, wanted the plan's 1"):
        outcome_of(private.plan, staged.statement(SITE), largest_value=0.25)
