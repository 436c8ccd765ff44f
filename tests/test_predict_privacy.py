"""The noise for an epsilon, the epsilon for a noise, and epsilon by round: held to the accountants themselves."""

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from plan_documents import changed, checked

from fedseek.cli import cli
from fedseek.dp.accounting import epsilon, epsilon_rdp
from fedseek.errors import UnsupportedMechanism
from fedseek.predict_picture import privacy_picture
from fedseek.predict_privacy import (
    AROUND_THE_PLANS,
    MAX_ROUNDS_SHOWN,
    MIN_NOISE_MULTIPLIER,
    TARGET_EPSILONS,
    StagePace,
    _some_rounds,
    predict_privacy,
    privacy_document,
)

Q, STEPS, DELTA = 1.0, 8, 1e-5  # of the plan below; everybody in every step, which is quick to account for
NO_PROMISE = {"privacy": {"mechanism": "none"}}


def plan_of(**changes):
    return checked(**({"training__sampling_probability": Q} | changes))


@pytest.fixture(scope="module")
def plan():
    return plan_of()


@pytest.fixture(scope="module")
def predicted(plan):
    return predict_privacy(plan)


def inline(value):
    """As TOML on one line: JSON writes plain values as TOML does."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(each)}" for key, each in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


@pytest.fixture
def plan_file(tmp_path):
    def write(**changes):
        path = tmp_path / "计划.toml"
        document = changed(**({"training__sampling_probability": Q} | changes))
        path.write_text("".join(f"{key} = {inline(value)}\n" for key, value in document.items()), "utf-8")
        return path

    return write


def run(*arguments):
    return CliRunner().invoke(cli, ["plan", "predict", *map(str, arguments)])


def test_what_it_is_for(plan, predicted):
    assert (predicted.stages, predicted.num_steps, predicted.delta) == ((StagePace(2, 4, STEPS, Q),), STEPS, DELTA)
    assert predicted.plan.noise_multiplier == plan.privacy.noise_multiplier
    assert predicted.plan.target_epsilon == 8.0
    assert 7.9 < predicted.plan.epsilon <= 8.0 < predicted.plan.epsilon_rdp


def test_every_figure_is_that_of_both_accountants(predicted):
    for level in predicted.levels:
        noise = level.noise_multiplier
        assert level.epsilon == epsilon(noise, Q, num_steps=STEPS, delta=DELTA)
        assert level.epsilon_rdp == epsilon_rdp(noise, Q, num_steps=STEPS, delta=DELTA)
        assert level.epsilon < level.epsilon_rdp


def test_the_noise_for_an_epsilon_is_what_a_plan_of_that_epsilon_gets(predicted):
    assert [level.target_epsilon for level in predicted.noise_for_epsilon] == list(TARGET_EPSILONS)
    for level in predicted.noise_for_epsilon:
        assert level.noise_multiplier == plan_of(privacy__epsilon=level.target_epsilon).privacy.noise_multiplier
        assert 0.98 * level.target_epsilon < level.epsilon <= level.target_epsilon


def test_noises_around_the_plans_are_looked_at(plan, predicted):
    noises = [level.noise_multiplier for level in predicted.epsilon_for_noise]
    assert noises == [round(plan.privacy.noise_multiplier * factor, 2) for factor in AROUND_THE_PLANS]
    assert noises[0] < plan.privacy.noise_multiplier < noises[-1]
    assert min(noises) >= MIN_NOISE_MULTIPLIER


def test_more_noise_is_less_epsilon_and_no_level_comes_twice(predicted):
    levels = predicted.levels
    assert [level.noise_multiplier for level in levels] == sorted({level.noise_multiplier for level in levels})
    assert [level.epsilon for level in levels] == sorted((level.epsilon for level in levels), reverse=True)
    assert predicted.plan in levels


def test_epsilon_by_round_grows_to_that_of_the_plan(plan, predicted):
    assert [(each.round, each.steps) for each in predicted.by_round] == [(1, 4), (2, 8)]
    for each in predicted.by_round:
        spend = plan.spend_after(each.round)
        assert (each.epsilon, each.epsilon_rdp) == (spend.epsilon(), spend.epsilon_rdp())
        assert each.site_level_epsilon is None
    assert predicted.by_round[-1].epsilon == predicted.plan.epsilon


@given(rounds=st.integers(1, 10_000))
def test_a_few_rounds_are_shown_the_first_and_the_last_among_them(rounds):
    shown = _some_rounds(rounds)
    assert len(shown) == min(rounds, MAX_ROUNDS_SHOWN)
    assert (shown[0], shown[-1]) == (1, rounds)
    assert shown == sorted(set(shown))


def test_only_what_is_asked_for_is_looked_up(plan):
    seen = []
    asked = predict_privacy(plan, epsilons=(3.0,), noises=(1.5,), on_progress=lambda done, of: seen.append((done, of)))
    assert [level.target_epsilon for level in asked.noise_for_epsilon] == [3.0]
    assert [level.noise_multiplier for level in asked.epsilon_for_noise] == [1.5]
    assert seen == [(done, 5) for done in range(1, 6)]  # the plan's own, two rounds, two that were asked for


@pytest.mark.parametrize(
    "asked",
    [{"noises": (0.1,)}, {"noises": (math.inf,)}, {"noises": (math.nan,)}, {"epsilons": (math.nan,)}],
    ids=["little-noise", "inf-noise", "nan-noise", "nan-epsilon"],
)
def test_what_no_guarantee_exists_for_is_refused(plan, asked):
    with pytest.raises(UnsupportedMechanism):
        predict_privacy(plan, **asked)


def test_a_plan_that_promises_nothing_has_no_figures():
    plan = checked(**NO_PROMISE)
    assert predict_privacy(plan) is None
    assert privacy_document(None) is None
    with pytest.raises(UnsupportedMechanism, match="has no delta"):
        predict_privacy(plan, epsilons=(1.0,))


SITE = {"epsilon": 8.0, "delta": 1e-5, "l2_clip_norm": 0.1}


def test_the_guarantee_for_whole_sites_is_stated_apart():
    plan = plan_of(privacy__site=SITE, cohort={"min_sites": 8, "max_sites": 8, "min_contributors": 4})
    predicted = predict_privacy(plan, epsilons=(8.0,))
    assert predicted.site_level.delta == 1e-5
    assert 0 < predicted.site_level.epsilon <= 8.0
    by_round = [each.site_level_epsilon for each in predicted.by_round]
    assert by_round == [plan.site_level.epsilon(1), plan.site_level.epsilon(2)]
    assert by_round[-1] == predicted.site_level.epsilon
    assert predicted.plan.epsilon != predicted.site_level.epsilon


# --- the command


def test_the_command_prints_one_line_of_json(plan_file):
    done = run(plan_file(), "--privacy-only", "--json", "--epsilon", "2", "--epsilon", "4", "--noise", "1.25")
    assert done.exit_code == 0, done.output
    privacy = json.loads(done.stdout)["privacy"]
    assert set(json.loads(done.stdout)) == {"privacy"}
    assert [level["target_epsilon"] for level in privacy["noise_for_epsilon"]] == [2.0, 4.0]
    assert privacy["epsilon_for_noise"][0]["epsilon"] == epsilon(1.25, Q, num_steps=STEPS, delta=DELTA)
    assert done.stdout.count("\n") == 1


def test_the_command_shows_tables(plan_file):
    done = run(plan_file(), "--privacy-only", "--epsilon", "2")
    for words in (
        "sampling probability 1, 8 steps, δ 1e-05",
        "this plan",
        "for ε 2",
        "ε (PLD)",
        "ε (RDP)",
        "ε by round",
    ):
        assert words in done.output
    assert "ciphertexts" not in done.output
    assert "whole site" not in done.output


def test_a_plan_without_privacy_says_so(plan_file):
    assert "privacy: none" in run(plan_file(**NO_PROMISE), "--privacy-only").output
    done = run(plan_file(**NO_PROMISE), "--privacy-only", "--json")
    assert json.loads(done.stdout) == {"privacy": None}


@pytest.mark.parametrize("wrong", [("--epsilon", "0"), ("--epsilon", "51"), ("--noise", "0.2"), ("--noise", "much")])
def test_wrong_options_are_wrong_use(plan_file, wrong):
    assert run(plan_file(), "--privacy-only", *wrong).exit_code == 2


def test_a_picture_that_cannot_be_written_is_named(plan_file, tmp_path):
    done = run(plan_file(), "--privacy-only", "--epsilon", "8", "--picture", tmp_path / "没有" / "p.svg")
    assert done.exit_code == 1
    assert "cannot be written" in done.output


# --- the picture


def test_the_picture_shows_both_accountants_and_the_plan(plan_file, tmp_path):
    picture = tmp_path / "隐私.svg"
    done = run(plan_file(), "--privacy-only", "--epsilon", "2", "--epsilon", "8", "--picture", picture, "--json")
    assert done.exit_code == 0, done.output
    tree = ElementTree.fromstring(picture.read_text("utf-8"))  # noqa: S314
    tags = [element.tag.rpartition("}")[2] for element in tree.iter()]
    assert (tags.count("polyline"), tags.count("circle")) == (4, 2)
    words = " ".join(filter(None, (element.text for element in tree.iter())))
    for shown in ("plan demo", "noise multiplier", "round", "δ 1e-05", "PLD", "RDP"):
        assert shown in words


def test_every_point_of_the_picture_is_inside_it(predicted):
    drawn = privacy_picture("demo", predicted)
    assert drawn == privacy_picture("demo", predicted)
    tree = ElementTree.fromstring(drawn)  # noqa: S314
    _, _, width, height = map(float, tree.get("viewBox").split())
    for line in tree.iter("{http://www.w3.org/2000/svg}polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 < x < width
            assert 0 < y < height


def test_a_name_is_text_in_the_picture_and_nothing_else(predicted):
    drawn = privacy_picture("<script>&北岸", predicted)
    assert "<script>" not in drawn
    assert "&lt;script&gt;&amp;北岸" in drawn


# --- two stages

DOMAIN = {
    "rounds": 1,
    "steps_per_round": 2,
    "sampling_probability": 1.0,
    "learning_rate": 1e-4,
    "budget_share": 0.25,
}


@pytest.fixture(scope="module")
def staged():
    return plan_of(domain=DOMAIN)


@pytest.fixture(scope="module")
def of_stages(staged):
    return predict_privacy(staged, epsilons=(8.0,), noises=(2 * staged.privacy.noise_multiplier,))


def test_the_figures_of_two_stages_are_of_both_together(staged, of_stages):
    assert of_stages.stages == (StagePace(1, 2, 2, 1.0), StagePace(2, 4, 8, 1.0))
    own = tuple(stage.privacy.noise_multiplier for stage in staged.stages)
    assert (of_stages.plan.noise_multiplier, of_stages.plan.noise_multipliers) == (own[-1], own)
    assert of_stages.plan.epsilon == staged.spend_after(3).epsilon() <= 8.0
    assert of_stages.noise_for_epsilon[0].noise_multipliers == own, "for an epsilon: as a plan that asks for it"


def test_a_noise_that_is_given_is_of_the_last_stage_and_the_other_is_scaled_alike(staged, of_stages):
    [level] = of_stages.epsilon_for_noise
    assert level.noise_multipliers == pytest.approx([2 * stage.privacy.noise_multiplier for stage in staged.stages])
    assert level.epsilon < of_stages.plan.epsilon


def test_rounds_are_told_with_the_stage_they_are_in(staged, of_stages):
    assert [(each.round, each.stage, each.steps) for each in of_stages.by_round] == [(1, 1, 2), (2, 2, 6), (3, 2, 10)]
    for each in of_stages.by_round:
        assert each.epsilon == staged.spend_after(each.round).epsilon()


def test_too_little_noise_in_one_of_the_stages_is_refused(staged):
    last, first = staged.privacy.noise_multiplier, staged.stages[0].privacy.noise_multiplier
    assert last < first
    with pytest.raises(UnsupportedMechanism, match=r"wanted 0\.3"):
        predict_privacy(staged, noises=(0.29,))


def test_the_command_and_the_picture_tell_the_stages(plan_file, tmp_path):
    picture = tmp_path / "两阶段.svg"
    done = run(plan_file(domain=DOMAIN), "--privacy-only", "--epsilon", "8", "--picture", picture)
    assert done.exit_code == 0, done.output
    assert "sampling probability 1, 2 steps, then sampling probability 1, 8 steps" in " ".join(done.output.split())
    assert "stage" in done.output
    assert "noise multiplier of the last stage" in picture.read_text("utf-8")
