"""Plans of two stages: what belongs to which round, and one epsilon for both."""

import pytest
from plan_documents import checked

from fedseek.dp.accounting import calibrate_noise_multiplier
from fedseek.dp.composition import composed_epsilon
from fedseek.plan_stages import sections, stage_shapes

DOMAIN = {
    "rounds": 3,
    "steps_per_round": 2,
    "sampling_probability": 1.0,
    "learning_rate": 1e-4,
    "warmup_steps": 2,
    "budget_share": 0.25,
}
NOT_PRIVATE = {"privacy": {"mechanism": "none"}}
TWO = {"domain": DOMAIN, "training__sampling_probability": 1.0, "training__warmup_steps": 5}


@pytest.fixture(scope="module")
def two():
    return checked(**TWO)


def test_rounds_steps_and_rates_are_those_of_their_stage(two):
    first, second = two.stages
    assert (first.task, first.first_round, first.rounds, first.num_steps, first.warmup_steps) == (
        "continue",
        1,
        3,
        6,
        2,
    )
    assert (second.task, second.first_round, second.rounds, second.num_steps, second.warmup_steps) == (None, 4, 2, 8, 5)
    assert (first.learning_rate, first.head_learning_rate) == (1e-4, 1e-4)
    assert (second.learning_rate, second.head_learning_rate) == (0.002, 0.01)
    assert (two.rounds, two.total_steps) == (5, 14)
    assert [two.stage_of(number).index for number in range(1, 8)] == [0, 0, 0, 1, 1, 1, 1]
    assert [two.task_in("bank", number) for number in (1, 3, 4, 6)] == ["continue", "continue", "classify", "classify"]
    assert two.writes("bank")
    assert list(sections(two.spec)) == ["domain", "training"]


def test_a_plan_of_one_stage_is_what_it_was():
    plan = checked()
    (only,) = plan.stages
    assert (only.index, only.task, only.first_round, only.rounds, only.num_steps) == (0, None, 1, 2, 8)
    wanted = calibrate_noise_multiplier(8.0, 1e-5, sampling_probability=0.25, num_steps=8)
    assert plan.privacy.noise_multiplier == wanted
    assert plan.spend_after(2).stages[0].num_steps == plan.total_steps == 8
    assert not plan.writes("bank")
    assert stage_shapes(plan.spec)[0].share == 1.0


def test_both_stages_together_are_within_epsilon_and_use_it_up(two):
    first, second = (stage.privacy for stage in two.stages)
    assert two.privacy == second
    assert (first.delta, first.l2_clip_norm) == (second.delta, second.l2_clip_norm) == (1e-5, 1.0)
    assert 0.99 * 8.0 <= two.spend_after(5).epsilon() <= 8.0
    assert two.spend_after(5).epsilon() == composed_epsilon(two.spend_after(5).stages, 1e-5)


def test_the_share_of_the_first_stage_is_of_what_each_would_take_by_itself(two):
    alone = [stage.epsilon() for stage in two.spend_after(5).stages]
    assert alone[0] / sum(alone) == pytest.approx(0.25, rel=0.01)


def test_steps_are_counted_by_stage_and_never_beyond_it(two):
    assert [two.steps_after(rounds) for rounds in (0, 1, 3, 4, 5, 9)] == [
        (0, 0),
        (2, 0),
        (6, 0),
        (6, 4),
        (6, 8),
        (6, 8),
    ]
    assert two.spend_after(3).epsilon() < two.spend_after(4).epsilon() < two.spend_after(5).epsilon()
    assert two.spend_of((2, 4)).steps == (2, 4)
    with pytest.raises(ValueError, match="shorter"):
        two.spend_of((2,))


def test_the_range_starts_over_with_the_rates_of_the_stage(two):
    assert two.initial_range("global") == two.initial_range("global", 3) == pytest.approx(1.25 * 2 * 1e-4)
    assert two.initial_range("global", 4) == pytest.approx(1.25 * 4 * 0.002)
    assert two.initial_range("kind/bank", 4) == pytest.approx(1.25 * 4 * 0.01)


def test_noise_for_whole_sites_is_sized_for_the_rounds_of_both_stages(two):
    site = {"privacy__site": {"epsilon": 8.0, "delta": 1e-5, "l2_clip_norm": 0.1}}
    cohort = {"cohort": {"min_sites": 8, "max_sites": 8, "min_contributors": 4}}
    plan = checked(**TWO, **site, **cohort)
    assert 0.9 * 8.0 < plan.site_level.epsilon(5) <= 8.0
    assert plan.initial_range("global", 1) == plan.initial_range("global", 4) == plan.site_level.value_range


def test_without_privacy_there_are_stages_and_no_spend():
    plan = checked(**TWO, **NOT_PRIVATE)
    assert [stage.privacy for stage in plan.stages] == [None, None]
    assert plan.spend_after(5) is None


def test_the_split_of_epsilon_is_part_of_the_plans_digest():
    plans = [checked(**TWO, domain__budget_share=share, **NOT_PRIVATE) for share in (0.25, 0.5)]
    assert plans[0].digest != plans[1].digest
