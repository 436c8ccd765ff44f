"""Early stopping: who votes when, that all rest alike once enough do, and that nothing is trained or spent from then on."""

import json
import math

import numpy as np
import pytest
from language_sites import language_changes, language_data

import fedseek_site.rounds as rounds
from fedseek.encode import SummedUpdate
from fedseek.evaluate import Evaluation
from fedseek_site.continuing import _at_round
from fedseek_site.state import EarlierAdapter, LossWatch, SiteState
from fedseek_site.voting import count_votes, is_resting, votes_to_stop, watch_loss

BANKS = (("北岸银行", "bank"), ("harbour-bank", "bank"), ("河畔银行", "bank"))
ROUNDS = 5


@pytest.fixture(scope="module")
def plan(tiny_plan):
    return tiny_plan(training={"rounds": ROUNDS, "early_stopping": {"patience": 2}})


def watched(plan, losses, *, first=1):
    watch, votes = None, []
    for number, loss in enumerate(losses, start=first):
        watch = watch_loss(plan, watch, loss, number=number)
        votes.append(votes_to_stop(plan, watch))
    return votes


# --- a site's own vote


@pytest.mark.parametrize(
    ("losses", "votes"),
    [
        ([3, 2, 1, 0.5], "...."),
        ([3, 4, 5, 6], "..vv"),
        ([3, 4, 2, 3, 3], "....v"),
        ([3, 3, 3, 3], "...."),  # no worse than its best
        ([3, math.nan, math.inf], "..v"),
        ([math.nan, 3, 2], "..."),
        ([math.nan, math.nan, math.nan], "..v"),
    ],
)
def test_a_site_votes_when_its_loss_was_above_its_best_for_so_many_rounds_in_a_row(plan, losses, votes):
    assert watched(plan, losses) == [each == "v" for each in votes]


def test_without_early_stopping_nobody_watches(tiny_plan):
    plan = tiny_plan()
    assert watch_loss(plan, None, 1.0, number=1) is None
    assert not votes_to_stop(plan, LossWatch(stage=0, round=9, best=0.0, worse=9))


def test_a_round_that_is_played_again_is_counted_once(plan):
    watch = LossWatch(stage=0, round=3, best=1.0, worse=1)
    assert watch_loss(plan, watch, 5.0, number=3) == watch
    assert watch_loss(plan, watch, 5.0, number=4).worse == 2


def test_what_is_remembered_is_not_printed():
    watch = LossWatch(stage=0, round=3, best=0.123456, worse=1)
    assert "0.123456" not in repr(watch)
    assert watch.__rich_repr__() == []


# --- all sites' decision


def summed(votes, contributors):
    mean = np.zeros(1)
    return {"global": SummedUpdate(contributors, contributors, mean, {"stop_votes": float(votes)}, 0.0, 1.0)}


@pytest.mark.parametrize(("votes", "contributors", "rests"), [(0, 3, 0), (1, 3, 0), (2, 3, 1), (2, 4, 0), (3, 4, 1)])
def test_more_than_half_of_the_contributors_decide(plan, votes, contributors, rests):
    assert count_votes(plan, 0, 2, summed(votes, contributors)) == 2 * rests


def test_the_first_decision_of_a_stage_stays(plan):
    assert count_votes(plan, 2, 4, summed(3, 3)) == 2
    assert count_votes(plan, 2, 4, {}) == 2
    assert [is_resting(plan, 2, number) for number in range(1, 6)] == [False, False, True, True, True]
    assert not any(is_resting(plan, 0, number) for number in range(1, 6))


def test_a_sum_without_votes_decides_nothing(plan):
    update = summed(0, 3)["global"]
    none = SummedUpdate(3, 3, update.mean, {}, 0.0, 1.0)
    assert count_votes(plan, 0, 2, {"global": none}) == 0


@pytest.mark.parametrize(("since", "left"), [(4, 0), (3, 3), (0, 0)])
def test_a_run_that_goes_on_from_the_round_before_forgets_a_decision_of_the_lost_one(since, left):
    before = EarlierAdapter(round=3, scopes={}, digests={}, contributors=())
    steps = (0,)
    state = SiteState(
        offer=b"",
        scopes={},
        steps_done=steps,
        steps_accounted=steps,
        last_applied=4,
        before=before,
        resting_since=since,
    )
    assert _at_round("st-anna", state, 3).resting_since == left
    assert _at_round("st-anna", state, 4).resting_since == since


# --- whole runs


@pytest.fixture
def losses(monkeypatch):
    """What each site's loss is said to be, by site and round that it begins: ``losses[site] = lambda number: ...``."""
    told = {}

    def evaluate(run, scopes, *, number):
        return Evaluation(loss_sum=told[run.me](number + 1), correct=1, count=1)

    monkeypatch.setattr(rounds, "evaluate_weights", evaluate)
    return told


def rounds_of(desk, site, event):
    return [each["round"] for each in desk.events[site] if each["event"] == event]


def play(make_desk, losses, rising, **changes):
    names = [name for name, _ in BANKS]
    losses.update({name: (lambda n: float(n)) if name in rising else (lambda n: 1.0 / n) for name in names})
    training = {"rounds": ROUNDS, "steps_per_round": 1, "early_stopping": {"patience": 1}}
    desk = make_desk(sites=BANKS, training=training, cohort={"max_sites": 4}, **changes)
    desk.play()
    return desk, names


def test_two_of_three_votes_and_all_rest_and_spend_no_more(make_desk, losses):
    desk, names = play(make_desk, losses, rising=[BANKS[0][0], BANKS[2][0]], private=True)
    for name in names:
        assert rounds_of(desk, name, "ledger") == [1, 2], "voted in 2, known from 3 on"
        assert rounds_of(desk, name, "rests") == [3, 4, 5]
        assert rounds_of(desk, name, "resting") == [2]
        assert desk.state(name).steps_accounted == (2,)
        assert desk.state(name).resting_since == 2
        statement = json.loads(desk.approved[name].statement)
        assert [stage["num_steps"] for stage in statement["stages"]] == [2]
        assert statement["epsilon"] == desk.plan.spend_after(ROUNDS).epsilon(), "that of a run in which nobody votes"
    digests = {number: {name: reply.digests for name, reply in desk.updates[number].items()} for number in desk.updates}
    assert len({str(each) for each in digests[3].values()}) == 1
    assert digests[2] != digests[3] == digests[4] == digests[5] == digests[6], "nothing moves while they rest"


def test_one_of_three_votes_and_all_go_on(make_desk, losses):
    desk, names = play(make_desk, losses, rising=[BANKS[1][0]])
    for name in names:
        assert rounds_of(desk, name, "ledger") == [1, 2, 3, 4, 5]
        assert rounds_of(desk, name, "rests") == rounds_of(desk, name, "resting") == []


def test_momentum_does_not_move_a_resting_adapter(make_desk, losses):
    names = [name for name, _ in BANKS]
    losses.update(dict.fromkeys(names, float))
    training = {"rounds": ROUNDS, "steps_per_round": 1, "server_momentum": 0.9, "early_stopping": {"patience": 1}}
    desk = make_desk(sites=BANKS, training=training, cohort={"max_sites": 4})
    desk.play(until=("round", ROUNDS + 1))
    replies = [desk.updates[number][names[0]].digests["global"] for number in (3, 4, 5)]
    assert len(set(replies)) == 1


def test_a_site_that_was_away_comes_to_the_same_conclusion(make_desk, losses):
    away = "st-anna"
    names = [name for name, _ in BANKS]
    losses.update(dict.fromkeys([*names, away], float))
    training = {"rounds": ROUNDS, "steps_per_round": 1, "early_stopping": {"patience": 1}}
    sites = (*BANKS, (away, "hospital"))
    desk = make_desk(sites=sites, training=training)
    desk.play(until=("release", ROUNDS + 1), away=lambda phase, number, site: site == away and number in (2, 3))
    assert away not in desk.updates[3]
    assert rounds_of(desk, away, "rests") == rounds_of(desk, away, "round")[1:]
    assert {desk.state(name).resting_since for name, _ in sites} == {2}
    assert len({desk.updates[ROUNDS + 1][name].digests["global"] for name, _ in sites}) == 1


def test_a_domain_stage_ends_early_and_the_next_stage_begins_in_its_time(make_desk, losses, tiny_causal):
    names = [name for name, _ in BANKS]
    losses.update(dict.fromkeys(names, float))
    domain = {"rounds": 3, "steps_per_round": 1, "sampling_probability": 0.5, "learning_rate": 0.02}
    changes = language_changes(
        tiny_causal,
        training={"rounds": 3, "steps_per_round": 1, "learning_rate": 0.01, "early_stopping": {"patience": 1}},
    )
    changes["kinds"] = {"bank": {"task": "instruct", "generation": {"rows": 0}}}
    data = {name: language_data(name) for name in names}
    desk = make_desk(sites=BANKS, data=data, cohort={"max_sites": 4}, domain=domain, **changes)
    desk.play(until=("round", 7))
    for name in names:
        assert rounds_of(desk, name, "rests") == [3, 6], (
            "voted in 2 and in 5, the first rounds that a best is missed in"
        )
        assert rounds_of(desk, name, "resting") == [2, 5]
        assert desk.state(name).resting_since == 5
