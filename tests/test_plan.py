import math
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import pld
from plan_documents import PLAN_TOML, REMOVED, checked

from fedseek.errors import InvalidPlan
from fedseek.plan import load_plan, plan_from_canonical, read_toml
from fedseek.release import model_card


def problems(**changes: object) -> tuple[str, ...]:
    with pytest.raises(InvalidPlan) as caught:
        checked(**changes)
    return caught.value.problems


REFUSED = [
    # one field changed, where the problem must be named, and words of what is wanted or was got
    ({"colour": "red"}, "colour: ", ["not permitted", "'red'"]),
    ({"lora__dropout": 0.1}, "lora.dropout: ", ["not permitted", "0.1"]),
    ({"version": 2}, "version: ", ["should be 1", "got 2"]),
    ({"name": "Demo Plan"}, "name: ", ["match pattern", "'Demo Plan'"]),
    ({"name": "demo\n"}, "name: ", ["match pattern"]),
    ({"seed": -1}, "seed: ", ["greater than or equal to 0", "got -1"]),
    ({"seed": 2**63}, "seed: ", ["less than"]),
    ({"model": REMOVED}, "model: ", ["required"]),
    ({"cohort": REMOVED}, "cohort: ", ["required"]),
    ({"training__rounds": REMOVED}, "training.rounds: ", ["required"]),
    ({"training__rounds": 0}, "training.rounds: ", ["greater than or equal to 1", "got 0"]),
    ({"training__rounds": "3"}, "training.rounds: ", ["valid integer", "'3'"]),
    ({"training__rounds": 2.5}, "training.rounds: ", ["valid integer", "2.5"]),
    ({"training__rounds": True}, "training.rounds: ", ["valid integer", "True"]),
    ({"training__sampling_probability": 0.0}, "training.sampling_probability: ", ["greater than or equal to 0.001"]),
    ({"privacy__epsilon": 1000.0}, "privacy.epsilon: ", ["50", "got 1000"]),
    ({"training__sampling_probability": 1.01}, "training.sampling_probability: ", ["less than or equal to 1", "1.01"]),
    ({"training__learning_rate": math.nan}, "training.learning_rate: ", ["finite"]),
    ({"training__learning_rate": math.inf}, "training.learning_rate: ", ["finite"]),
    ({"training__head_learning_rate": -0.1}, "training.head_learning_rate: ", ["greater than 0", "-0.1"]),
    ({"training__server_momentum": 1.0}, "training.server_momentum: ", ["less than 1"]),
    ({"lora__rank": 0}, "lora.rank: ", ["greater than or equal to 1", "got 0"]),
    ({"lora__alpha": 0.0}, "lora.alpha: ", ["greater than 0"]),
    ({"lora__method": "dora"}, "lora.method: ", ["'dora'", "no record can be clipped"]),
    ({"lora__method": "qlora"}, "lora.method: ", ["'ffa', 'both'", "'qlora'"]),
    ({"lora__target_modules": []}, "lora.target_modules: ", ["'auto', or ", "at least 1", "got []"]),
    ({"training__physical_batch_size": 0}, "training.physical_batch_size: ", ["1, or ", "'auto'", "got 0"]),
    ({"lora__layers": []}, "lora.layers: ", ["at least 1"]),
    ({"lora__layers": [1, -1]}, "lora.layers.1: ", ["greater than or equal to 0"]),
    ({"privacy__epsilon": 0.0}, "privacy.epsilon: ", ["greater than 0", "got 0"]),
    ({"privacy__epsilon": -1.0}, "privacy.epsilon: ", ["greater than 0", "-1"]),
    ({"privacy__epsilon": math.inf}, "privacy.epsilon: ", ["finite"]),
    ({"privacy__epsilon": REMOVED}, "privacy.epsilon: ", ["missing", "dp-sgd"]),
    ({"privacy__delta": REMOVED}, "privacy.delta: ", ["missing", "dp-sgd"]),
    ({"privacy__delta": 0.0}, "privacy.delta: ", ["greater than 0"]),
    ({"privacy__delta": 1.0}, "privacy.delta: ", ["less than or equal to 0.01"]),
    ({"privacy__l2_clip_norm": 0.0}, "privacy.l2_clip_norm: ", ["greater than 0"]),
    ({"privacy__mechanism": "ldp"}, "privacy.mechanism: ", ["'dp-sgd' or 'none'"]),
    ({"model__sha256": "AB" * 32}, "model.sha256: ", ["match pattern"]),
    ({"model__source": "https://example.org/model"}, "model.source: ", ["match pattern"]),
    ({"model__max_tokens": 3}, "model.max_tokens: ", ["greater than or equal to 4"]),
    ({"kinds": {}}, "kinds: ", ["at least 1"]),
    ({"kinds__bank": 3}, "kinds.bank: ", ["object", "got 3"]),
    ({"kinds__bank__labels": ["一"]}, "kinds.bank.labels: ", ["at least 2"]),
    ({"kinds__hospital__labels": ["急诊", "普通", "急诊"]}, "kinds.hospital.labels: ", ["unique", "急诊"]),
    ({"kinds__bank__labels": ["a", "b", "c"]}, "kinds.bank: ", ["auc", "exactly 2", "got 3"]),
    ({"kinds__bank__unit": "household"}, "kinds.bank.unit: ", ["'record', 'customer' or 'patient'"]),
    ({"encryption__value_bits": 1}, "encryption.value_bits: ", ["greater than or equal to 2"]),
    ({"encryption__value_bits": 25}, "encryption.value_bits: ", ["less than or equal to 24"]),
    ({"encryption__key_days": 0}, "encryption.key_days: ", ["greater than or equal to 1", "got 0"]),
    ({"encryption__key_days": 91}, "encryption.key_days: ", ["less than or equal to 90", "got 91"]),
    ({"cohort__deadline_seconds": 9}, "cohort.deadline_seconds: ", ["greater than or equal to 10", "got 9"]),
    ({"cohort__deadline_seconds": 604_801}, "cohort.deadline_seconds: ", ["less than or equal to 604800"]),
    ({"encryption__key_days": 1.5}, "encryption.key_days: ", ["valid integer", "1.5"]),
    ({"cohort__min_sites": 2}, "cohort: ", ["min_sites 2 with 1 colluders", "at least colluders + 2"]),
    ({"cohort__colluders": 2}, "cohort: ", ["min_sites 3 with 2 colluders", "fewer than 2 honest"]),
    ({"cohort__colluders": -1}, "cohort.colluders: ", ["greater than or equal to 0", "got -1"]),
    ({"cohort__min_contributors": 1}, "cohort.min_contributors: ", ["greater than or equal to 2", "got 1"]),
    ({"cohort__dropout_fraction": -0.1}, "cohort.dropout_fraction: ", ["greater than or equal to 0", "-0.1"]),
    ({"cohort__dropout_fraction": 0.51}, "cohort.dropout_fraction: ", ["less than or equal to 0.5", "0.51"]),
    ({"cohort__dropout_fraction": math.nan}, "cohort.dropout_fraction: ", ["finite"]),
    ({"cohort__min_sites": 1}, "cohort.min_sites: ", ["greater than or equal to 2"]),
    ({"cohort__min_sites": 9}, "cohort: ", ["min_sites 9", "max_sites 8"]),
    ({"cohort__max_sites": 1025}, "cohort.max_sites: ", ["less than or equal to 1024", "1025"]),
]


@pytest.mark.parametrize(("change", "where", "words"), REFUSED, ids=[f"{c}" for c, _, _ in REFUSED])
def test_a_wrong_field_is_refused_by_name_with_what_was_got_and_wanted(change, where, words):
    (problem,) = problems(**change)
    assert problem.startswith(where)
    for word in words:
        assert word in problem


def test_all_problems_of_the_fields_are_told_at_once():
    found = problems(colour="red", lora__rank=0, privacy__epsilon=0.0, model__sha256="x", cohort=REMOVED)
    assert sorted(problem.split(":")[0] for problem in found) == [
        "cohort",
        "colour",
        "lora.rank",
        "model.sha256",
        "privacy.epsilon",
    ]


def test_all_problems_between_fields_are_told_at_once():
    found = problems(
        kinds__bank__labels=["a", "b", "c"], cohort__min_sites=9, privacy__delta=REMOVED, privacy__epsilon=REMOVED
    )
    assert sorted(problem.split(":")[0] for problem in found) == [
        "cohort",
        "kinds.bank",
        "privacy.delta",
        "privacy.epsilon",
    ]


@pytest.mark.parametrize("field", ["epsilon", "delta"])
def test_a_plan_without_mechanism_may_not_name_an_epsilon(field):
    privacy = {"mechanism": "none", field: 1e-5}
    (problem,) = problems(privacy=privacy)
    assert problem.startswith(f"privacy.{field}: ")
    assert "earns no guarantee" in problem


def test_a_plan_without_mechanism_has_no_privacy_and_no_spend():
    plan = checked(privacy={"mechanism": "none"})
    assert plan.privacy is None
    assert plan.spend_after(2) is None


@pytest.mark.parametrize(("value_bits", "max_sites"), [(2, 3), (13, 8), (24, 1024), (16, 1024), (2, 1024)])
def test_the_packing_holds_the_sum_of_all_planned_sites(value_bits, max_sites):
    packing = checked(encryption__value_bits=value_bits, cohort__max_sites=max_sites).packing
    assert packing.max_sites == max_sites
    largest = 2**value_bits - 1
    assert largest * max_sites < 2**packing.digit_bits
    assert packing.digit_bits * packing.digits_per_slot <= packing.params.plain_modulus.bit_length()


@pytest.mark.parametrize(
    "privacy",
    [
        {"epsilon": 1e-9, "delta": 1e-12},  # no noise is enough
        {"epsilon": 8.0, "delta": 1e-300},  # below what the accountant's arithmetic can tell from 0
    ],
)
def test_an_epsilon_that_no_noise_reaches_is_a_problem_of_the_plan(privacy):
    (problem,) = problems(privacy={"mechanism": "dp-sgd", **privacy})
    assert problem.startswith("privacy: target_epsilon is ")
    assert "within reach" in problem


def test_a_plan_that_would_keep_the_accountant_busy_for_hours_is_refused():
    (problem,) = problems(training__rounds=10_000, training__steps_per_round=100_000)
    assert problem.startswith("training: rounds x steps_per_round is 1000000000, wanted at most 100000")


# --- what follows from a plan


def test_the_calibrated_noise_keeps_the_promised_epsilon_by_the_accountants_own_count():
    plan = checked()
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    event = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(plan.privacy.noise_multiplier))
    accountant.compose(event, plan.total_steps)
    assert plan.total_steps == 8
    assert 7.5 < accountant.get_epsilon(1e-5) <= 8.0 + 1e-6
    assert plan.spend_after(2).epsilon() <= 8.0
    assert plan.spend_after(1).epsilon() < plan.spend_after(2).epsilon()


def test_more_rounds_and_a_smaller_epsilon_need_more_noise():
    noise = checked().privacy.noise_multiplier
    assert checked(training__rounds=4).privacy.noise_multiplier > noise
    assert checked(training__steps_per_round=8).privacy.noise_multiplier > noise
    assert checked(privacy__epsilon=4.0).privacy.noise_multiplier > noise


def test_privacy_takes_its_numbers_from_the_plan():
    privacy = checked(privacy__l2_clip_norm=0.5).privacy
    assert (privacy.sampling_probability, privacy.delta, privacy.l2_clip_norm) == (0.25, 1e-5, 0.5)


def test_the_first_range_covers_what_adam_can_move_in_a_round():
    plan = checked()
    assert plan.scopes("bank") == ("global", "kind/bank")
    assert plan.initial_range("global") == pytest.approx(1.25 * 4 * 0.002)
    assert plan.initial_range("kind/bank") == pytest.approx(1.25 * 4 * 0.01)


def test_seeds_differ_by_purpose_name_and_seed_and_are_known():
    plan = checked()
    seeds = [
        plan.seed_for("lora"),
        plan.seed_for("head/bank"),
        plan.seed_for("head/hospital"),
        checked(seed=8).seed_for("lora"),
        checked(name="other").seed_for("lora"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert plan.seed_for("lora") == checked(training__rounds=3).seed_for("lora") == 18268535789859720830


def test_the_weight_of_a_site_is_capped_only_when_records_count():
    assert checked(cohort__record_cap=500).weight_cap == 1
    assert checked(cohort__record_cap=500, cohort__weighting="records").weight_cap == 500


def test_a_cap_on_records_a_unit_that_would_do_nothing_is_refused():
    capped = {"privacy__max_records_per_unit": 5}
    assert checked(**capped, kinds__bank__unit="record").spec.privacy.max_records_per_unit == 5
    found = problems(**capped, kinds__bank__unit="record", kinds__hospital__unit="record")
    assert [problem.split(": ")[0] for problem in found] == ["privacy.max_records_per_unit"]
    assert 'every kind\'s unit is "record"' in found[0]


def test_a_delta_that_calls_for_no_noise_is_refused():
    found = problems(privacy__delta=0.009, training__sampling_probability=0.001, training__rounds=1)
    assert any("not below the chance" in problem for problem in found)


def test_what_a_cohort_is_unless_the_plan_says_otherwise():
    cohort = checked(cohort={"max_sites": 8}).spec.cohort
    assert (cohort.min_sites, cohort.colluders, cohort.min_contributors, cohort.dropout_fraction) == (3, 1, 3, 0.1)
    assert checked(encryption={}).spec.encryption.key_days == 90


@pytest.mark.parametrize(("min_sites", "colluders"), [(2, 0), (3, 1), (6, 4), (8, 6)])
def test_two_honest_sites_in_a_sum_are_enough_for_a_plan(min_sites, colluders):
    cohort = checked(cohort__min_sites=min_sites, cohort__colluders=colluders).spec.cohort
    assert (cohort.min_sites, cohort.colluders) == (min_sites, colluders)
    (problem,) = problems(cohort__min_sites=min_sites, cohort__colluders=colluders + 1)
    assert "fewer than 2 honest sites" in problem


# --- files


def test_a_plan_file_and_the_plan_table_of_a_scenario_are_the_same(tmp_path: Path):
    text = PLAN_TOML.format(sha="ab" * 32)
    alone, inside = tmp_path / "计划.toml", tmp_path / "scenario.toml"
    alone.write_text(text, "utf-8")
    inside.write_text("[simulation]\nworkers = 1\n[plan]\n" + text.replace("\n[", "\n[plan."), "utf-8")
    assert load_plan(alone) == load_plan(inside)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("name = 'x", "not TOML"),
        ("name = '账户'".encode("gb18030"), "not UTF-8 at byte 8"),
        ("plan = 3", "the document"),
        ("a = 1979-05-27", "a: extra inputs"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path: Path, content, words):
    path = tmp_path / "坏.toml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidPlan, match=words) as caught:
        load_plan(path)
    assert "坏.toml" in caught.value.message


def test_a_folder_is_no_plan(tmp_path: Path):
    with pytest.raises(InvalidPlan, match="folder"):
        read_toml(tmp_path)


def test_kinds_have_one_order_however_they_were_written():
    kinds = {"hospital": {"labels": ["急诊", "普通"]}, "bank": {"labels": ["欺诈", "正常"]}}
    plan = checked(kinds=kinds)
    read_back = plan_from_canonical(plan.canonical())
    assert list(plan.spec.kinds) == list(read_back.spec.kinds) == ["bank", "hospital"]
    cards = [model_card(each, run="r", statements=(), utility={}, base="b") for each in (plan, read_back)]
    assert cards[0] == cards[1]
