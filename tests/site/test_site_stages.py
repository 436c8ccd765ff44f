"""A run of two stages at a site: each stage is trained, spent and counted by itself, and stated together."""

import json
from types import SimpleNamespace

import pytest

from fedseek.canary_record import read_canary_record
from fedseek.dp.composition import composed_epsilon
from fedseek.lora.source import model_digest
from fedseek_site.ledger_entries import Mechanism, parts_of
from fedseek_site.plan_words import describe
from fedseek_site.run import _steps_spent
from fedseek_site.training import has_steps_left

ME = "仁济医院"
DOMAIN = {"rounds": 1, "steps_per_round": 2, "sampling_probability": 1.0, "learning_rate": 0.001}
PACE = {"rounds": 1, "steps_per_round": 3, "sampling_probability": 1.0, "warmup_steps": 2}


@pytest.fixture(scope="module")
def staged_plan(tiny_plan, tiny_causal):
    model = {"source": f"path:{tiny_causal}", "sha256": model_digest(tiny_causal), "family": "qwen2"}
    changes = {"model": model, "lora": {"target_modules": "auto"}, "domain": DOMAIN, "training": PACE}
    return tiny_plan(private=True, audit={"canaries": 8}, **changes)


@pytest.fixture(scope="module")
def played(make_desk, staged_plan):
    desk = make_desk(plan=staged_plan)
    desk.play()
    return desk


def events(desk, kind):
    return [event for event in desk.events[ME] if event["event"] == kind]


def test_steps_are_counted_by_stage(played):
    state = played.state(ME)
    assert (state.steps_done, state.steps_accounted) == ((2, 3), (2, 3))
    assert [(event["round"], event["step"], event["of"]) for event in events(played, "step")] == [
        *((1, step, 2) for step in (1, 2)),
        *((2, step, 3) for step in (1, 2, 3)),
    ]


def test_the_ledger_has_each_round_under_the_noise_of_its_stage(played, staged_plan):
    spends = list(played.ledgers[ME].account().spends())
    wanted = [(1, Mechanism.of(staged_plan.stages[0].privacy), 2), (2, Mechanism.of(staged_plan.stages[1].privacy), 3)]
    assert [(spent.round, spent.mechanism, spent.steps) for spent in spends] == wanted
    assert [(spent.mechanism, spent.steps) for spent in spends] == list(parts_of(staged_plan))
    assert _steps_spent(staged_plan, played.ledgers[ME], [spends[0].run]) == (2, 3)
    assert _steps_spent(staged_plan, played.ledgers[ME], ["another"]) == (0, 0)


def test_epsilon_is_that_of_both_stages_in_every_report(played, staged_plan):
    first, second = staged_plan.spend_after(1), staged_plan.spend_after(2)
    assert [event["epsilon"] for event in events(played, "round")] == [first.epsilon(), second.epsilon()]
    said = json.loads(played.approved[ME].statement)
    assert said["epsilon"] == second.epsilon() == composed_epsilon(second.stages, 1e-3) <= 8.0
    assert [stage["num_steps"] for stage in said["stages"]] == [2, 3]
    assert [check["got"] for check in said["checks"] if check["name"] == "budget"] == ["2 + 3"]
    [record] = (played.folder / ME).glob("canar*")
    assert read_canary_record(record).claim == second.epsilon()


@pytest.mark.parametrize(
    ("accounted", "number", "left"),
    [((0, 0), 1, True), ((2, 0), 1, False), ((2, 0), 2, True), ((0, 3), 2, False), ((2, 2), 2, False)],
    ids=["fresh", "the-first-again", "the-second", "the-second-again", "not-a-whole-round"],
)
def test_a_round_more_stays_within_the_steps_of_its_own_stage(staged_plan, accounted, number, left):
    run, state = SimpleNamespace(plan=staged_plan), SimpleNamespace(steps_accounted=accounted)
    assert has_steps_left(run, state, number=number) is left


def test_people_read_both_stages_before_they_approve(played, staged_plan):
    words = dict(describe(staged_plan, played.federation.roster))
    assert words["stage 1"].startswith("all sites learn the next token of their own texts")
    assert "1 rounds of 2 steps, 2 steps in all; learning rate 0.001" in words["stage 1"]
    assert words["stage 2"] == (
        "1 rounds of 3 steps, 3 steps in all; learning rate 0.01, of heads 0.05, reached after 2 steps"
    )
    assert "its stages together" in words["privacy"]
    assert "training" not in words


# --- a coordinator is lost


@pytest.mark.slow
def test_a_stage_that_is_played_again_is_not_spent_again(make_cohort, staged_plan):
    """Lost when half of the sites have trained the first round: they rest when it is played again, and not in the next."""
    from fedseek_server.continuing import last_common
    from fedseek_server.coordinator import Coordinator

    cohort = make_cohort(plan=staged_plan)
    trained = []

    def lose(phase, number, site, answer):
        trained.extend([site] if (phase, number) == ("round", 1) else [])
        if len(trained) == 2:
            raise ConnectionError
        return answer

    with pytest.raises(ConnectionError):
        cohort.play(reply=lose)
    standings = {service.identity.name: service.standing() for service in cohort.services.values()}
    lost = cohort.coordinator
    there = {name: standing for name, standing in standings.items() if standing is not None}
    continues = last_common(there, lost.run, lost.roster)
    told = cohort.events["coordinator"].append
    cohort.coordinator = Coordinator(staged_plan, lost.roster, run="接续-1", observe=told, continues=continues)
    cohort.play()
    resting = {name for name in cohort.events if any(e["event"] == "plan-spent" for e in cohort.events[name])}
    assert resting == set(trained)
    for approval in cohort.coordinator.approvals.values():
        said = json.loads(approval.statement)
        assert [stage["num_steps"] for stage in said["stages"]] == [2, 3]
        assert said["epsilon"] <= 8.0
