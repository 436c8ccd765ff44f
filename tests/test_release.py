"""The release gate, a test for each check that trips it; and the model card."""

import dataclasses
import math

import msgspec
import pytest
import yaml
from bundled import RUN, Signers
from hypothesis import given
from hypothesis import strategies as st

from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.composition import RunSpend
from fedseek.dp.guards import TRAINING_GUARDS
from fedseek.errors import ReleaseRefused
from fedseek.release import approvals_wanted, check_release, model_card, released_config
from fedseek.statement import CanaryAudit, privacy_statement

SITE, NAN = "仁济医院", math.nan


@pytest.fixture(scope="module")
def private(tiny_plan):
    """With a floor on utility."""
    kinds = {"hospital": {"labels": ["急诊", "普通", "自理"], "unit": "patient", "min_utility": 0.75}}
    return Signers.of(tiny_plan(private=True, kinds=kinds))


@pytest.fixture(scope="module")
def public(tiny_plan):
    return Signers.of(tiny_plan())


def audit(released_adapter=0.5, every_round=1.0, canaries=64, confidence=0.95):
    return CanaryAudit(
        canaries=canaries, confidence=confidence, released_adapter=released_adapter, every_round=every_round
    )


def spend(signers, steps):
    return signers.plan.spend_of([steps])


def louder(signers):
    params = dataclasses.replace(signers.plan.privacy, noise_multiplier=signers.plan.privacy.noise_multiplier * 10)
    return RunSpend((PrivacySpend(params, 4),))


def refused(signers, **changes):
    with pytest.raises(ReleaseRefused) as caught:
        check_release(signers.plan, signers.outcome(SITE, **changes))
    assert caught.value.exit_code == 7
    return caught.value


TRIPS = {
    "a step that the accountant does not know": (lambda s: {"steps": (5,)}, "budget", "5 trained, 4 accounted"),
    "a step that was accounted and not trained": (lambda s: {"steps": (3,)}, "budget", "3 trained, 4 accounted"),
    "no spend": (lambda s: {"spend": None}, "budget", "0 accounted"),
    "the spend of another mechanism": (lambda s: {"spend": louder(s)}, "budget", "4 trained, 4 accounted"),
    "a step that the ledger does not know": (lambda s: {"steps_spent": (3,)}, "budget", "3 in the ledger"),
    "a step more than the plan has": (
        lambda s: {"steps": (5,), "spend": spend(s, 5), "steps_spent": (5,)},
        "budget",
        "wanted <= 4",
    ),
    "a ledger with more than the plan has": (lambda s: {"steps_spent": (6,)}, "budget", "6 in the ledger"),
    "no guards": (lambda s: {"guards_passed": ()}, "guards", "clipping_applied"),
    "a guard that does not exist": (
        lambda s: {"guards_passed": tuple(sorted({*TRAINING_GUARDS, "trust_me"}))},
        "guards",
        "unknown trust_me",
    ),
    "a guard twice": (
        lambda s: {"guards_passed": (*sorted(TRAINING_GUARDS), sorted(TRAINING_GUARDS)[-1])},
        "guards",
        "",
    ),
    "no canary audit": (lambda s: {"audit": None}, "canary-audit", "no outcome"),
    "fewer canaries than the plan says": (lambda s: {"audit": audit(canaries=8)}, "canary-audit", "8 canaries"),
    "another confidence": (lambda s: {"audit": audit(confidence=0.51)}, "canary-audit", "0.51"),
    "an adapter that tells more than is claimed": (
        lambda s: {"audit": audit(released_adapter=8.1)},
        "canary-audit",
        "8.1000",
    ),
    "rounds that tell more than is claimed": (lambda s: {"audit": audit(every_round=8.1)}, "canary-audit", "8.1000"),
    "a bound that is no number": (lambda s: {"audit": audit(released_adapter=NAN)}, "canary-audit", "nan"),
    "another bound that is no number": (lambda s: {"audit": audit(every_round=NAN)}, "canary-audit", "nan"),
    "utility below the floor": (lambda s: {"utility": 0.7499}, "utility", "0.7499, wanted >= 0.75"),
    "no figure of utility": (lambda s: {"utility": None}, "utility", "no figure"),
    "utility that is no number": (lambda s: {"utility": NAN}, "utility", "nan"),
    "too few sites in the adapter": (lambda s: {"contributors": ("a", "b")}, "contributors", "got 2, wanted >= 3"),
    "an adapter that did not move": (lambda s: {"largest_value": 0.0}, "adapter", "got 0"),
    "an adapter that is not finite": (lambda s: {"largest_value": NAN}, "adapter", "nan"),
    "an adapter that is infinite": (lambda s: {"largest_value": math.inf}, "adapter", "inf"),
}


@pytest.mark.parametrize(("changes", "name", "said"), TRIPS.values(), ids=list(TRIPS))
def test_the_gate_is_closed_by(private, changes, name, said):
    error = refused(private, **changes(private))
    assert f"does not release run {RUN!r}: {name}: " in error.message
    assert said in error.message
    assert "nothing is released" in error.hint


@pytest.mark.parametrize("guard", TRAINING_GUARDS)
def test_one_guard_that_did_not_report_closes_the_gate(private, guard):
    passed = tuple(sorted(set(TRAINING_GUARDS) - {guard}))
    assert f"guards: got {len(passed)}, without {guard}" in refused(private, guards_passed=passed).message


def test_the_first_failure_is_the_message_and_the_others_are_in_the_hint(private):
    error = refused(private, utility=0.1, largest_value=0.0, contributors=())
    assert "utility: got 0.1000" in error.message
    assert "contributors" not in error.message
    assert "contributors: got 0" in error.hint
    assert "adapter: got 0" in error.hint


def test_an_open_gate_lists_every_check_once(private):
    checks = check_release(private.plan, private.outcome(SITE))
    got = {check.name: (check.wanted, check.got) for check in checks}
    assert got["budget"] == ("<= 4", "4")
    assert got["contributors"] == (">= 3", "4")
    assert got["adapter"] == ("> 0, < inf", "0.25")
    assert got["epsilon"][0] == "<= 8"
    assert len(got) == len(checks) == 7


@given(utility=st.floats(0.75, 1.0))
def test_nobody_is_told_the_figure_of_utility(private, utility):
    """It was computed on held-back records without noise."""
    told = check_release(private.plan, private.outcome(SITE, utility=utility))
    assert told == check_release(private.plan, private.outcome(SITE, utility=0.75))


@given(released=st.floats(0, 20), every=st.floats(0, 20))
def test_the_gate_is_open_exactly_up_to_the_stated_epsilon(private, released, every):
    claimed = private.plan.spend_after(2).epsilon()
    outcome = private.outcome(SITE, audit=audit(released, every))
    if max(released, every) <= claimed:
        check_release(private.plan, outcome)
    else:
        with pytest.raises(ReleaseRefused, match="canary-audit"):
            check_release(private.plan, outcome)


def test_the_audit_is_held_against_what_was_spent_and_not_against_the_plans_target(private):
    half = {"steps": (2,), "spend": spend(private, 2)}
    claimed = spend(private, 2).epsilon()
    assert "canary-audit" in refused(private, **half, audit=audit(every_round=claimed + 0.01)).message
    check_release(private.plan, private.outcome(SITE, **half, audit=audit(every_round=claimed - 0.01)))


def test_a_plan_that_promises_nothing_asks_for_no_epsilon(public):
    got = {check.name: (check.wanted, check.got) for check in check_release(public.plan, public.outcome(SITE))}
    assert got["epsilon"] == got["canary-audit"] == got["utility"] == ("-", "-")
    assert "adapter" in refused(public, largest_value=0.0).message
    assert "canary-audit" in refused(public, audit=audit()).message


def test_canaries_are_wanted_where_the_plan_asks_for_them_though_it_promises_nothing(tiny_plan):
    asked = Signers.of(tiny_plan(audit={"canaries": 64}))
    check_release(asked.plan, asked.outcome(SITE, audit=audit(every_round=99.0)))
    assert "canary-audit" in refused(asked, audit=None).message


def test_a_plan_may_do_without_canaries_and_that_is_said(tiny_plan):
    without = Signers.of(tiny_plan(private=True, audit={"canaries": 0}))
    outcome = without.outcome(SITE, audit=None)
    assert privacy_statement(without.plan, outcome, checks=check_release(without.plan, outcome)).audit is None


@pytest.mark.parametrize(("asked", "wanted"), [(None, 2), (3, 3)])
def test_how_many_must_approve(tiny_plan, asked, wanted):
    plan = tiny_plan(release={} if asked is None else {"min_approvals": asked})
    assert approvals_wanted(plan, ["a", "b"]) == wanted


# --- two stages


@pytest.fixture(scope="module")
def staged(tiny_plan):
    """A stage of 2 steps on the sites' texts before one of 4."""
    domain = {"rounds": 1, "steps_per_round": 2, "sampling_probability": 1.0, "learning_rate": 0.001}
    return Signers.of(tiny_plan(private=True, domain=domain))


def test_the_gate_tells_the_steps_of_each_stage(staged):
    got = {check.name: (check.wanted, check.got) for check in check_release(staged.plan, staged.outcome(SITE))}
    assert got["budget"] == ("<= 2 + 4", "2 + 4")
    assert 7.9 < float(got["epsilon"][1]) <= 8.0


def test_fewer_steps_than_the_plan_has_pass_the_gate_with_the_epsilon_they_cost(staged):
    for steps in ((2, 2), (0, 4), (2, 0)):
        changes = {"steps": steps, "spend": staged.plan.spend_of(steps), "audit": audit(every_round=0.01)}
        got = {check.name: check.got for check in check_release(staged.plan, staged.outcome(SITE, **changes))}
        assert got["epsilon"] == f"{staged.plan.spend_of(steps).epsilon():.4f}"


def test_steps_of_a_stage_beyond_the_plans_close_the_gate_though_the_sum_of_all_is_within(staged):
    steps = (3, 3)
    changes = {"steps": steps, "spend": staged.plan.spend_of(steps), "steps_spent": steps}
    error = refused(staged, **changes)
    assert "budget: got 3 + 3 trained, 3 + 3 accounted, 3 + 3 in the ledger, wanted <= 2 + 4" in error.message
    assert "epsilon: got nan" in error.hint


def test_the_model_card_tells_the_stages_and_how_to_load_what_writes(staged, private):
    text = card(staged)
    assert "- 1 rounds of 2 steps on text of the sites' domains (`continue`)\n- 2 rounds of 2 steps\n" in text
    assert "AutoModelForCausalLM" in text
    assert "AutoModelForCausalLM" not in card(private)


def test_the_model_card_of_a_language_kind_has_no_labels(tiny_plan):
    kinds = {"bank": {"task": "instruct"}, "hospital": {"labels": ["急诊", "普通"], "unit": "patient"}}
    plan = tiny_plan(kinds=kinds)
    text = model_card(plan, run=RUN, statements=[], utility={"bank": 0.5}, base="b")
    assert "- `bank`: task instruct, no head of its own; accuracy of the next token on held-back rows 0.500" in text
    assert "- `hospital`: 2 labels, accuracy on held-back rows not disclosed" in text


# --- model card


def state(signers, **changes):
    return msgspec.structs.replace(signers.statement(SITE), **changes)


def card(signers, *statements, utility=None) -> str:
    told = list(statements) or [state(signers)]
    return model_card(signers.plan, run=RUN, statements=told, utility=utility or {}, base="package:some-model")


def test_the_model_card_of_a_private_run_states_every_site(private):
    other = state(private, site="北岸银行", kind="bank", unit="record")
    text = card(private, state(private), other, utility={"bank": 0.875})
    assert text.startswith("---\nlibrary_name: peft\nbase_model: package:some-model\n")
    assert f"- {SITE} (hospital): **(8.00, 0.001)-differential privacy** for one patient" in text
    assert "- 北岸银行 (bank): **(8.00, 0.001)-differential privacy** for one record" in text
    assert "- `bank`: 2 labels, accuracy on held-back rows 0.875" in text
    assert "- `hospital`: 3 labels, accuracy on held-back rows not disclosed" in text
    assert f"plan `{private.plan.digest}`" in text
    assert private.plan.spec.model.sha256 in text
    assert "[PRIVACY.zh.md](PRIVACY.zh.md)" in text


def test_the_model_card_has_no_epsilon_and_no_such_tag_when_none_was_earned(public):
    text = card(public)
    assert "No privacy guarantee" in text
    assert "epsilon" not in text
    assert "differential" not in text
    assert "tags: [lora, federated-learning]\n" in text


def test_one_site_without_a_guarantee_takes_the_tag_from_the_whole_card(private):
    without = state(private, epsilon=None)
    assert "differential-privacy" not in card(private, state(private), without).split("---")[1]
    nobody = model_card(private.plan, run=RUN, statements=[], utility={}, base="b")
    assert "differential-privacy" not in nobody


def test_the_metadata_block_is_yaml(private):
    block = yaml.safe_load(card(private).split("---")[1])
    assert block["tags"] == ["lora", "federated-learning", "differential-privacy"]
    assert block["base_model"] == "package:some-model"


def test_the_configuration_follows_from_the_plan_alone(tiny_plan):
    """In PEFT's own, modules are a set, in an order that changes from process to process."""
    one = tiny_plan(lora={"target_modules": ["value", "query", "value"], "layers": [1, 0]})
    other = tiny_plan(lora={"target_modules": ["query", "value"], "layers": [0, 1]})
    assert released_config(one) == released_config(other)
    assert released_config(one) != released_config(tiny_plan(lora={"rank": 3}))
