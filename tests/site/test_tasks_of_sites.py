"""Which records a site trains on in which round, and what it does without any."""

import dataclasses

import numpy as np
import pytest
from language_sites import language_changes, language_data

from fedseek.errors import PlanRefused
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.records import Records
from fedseek_site import canary_audit
from fedseek_site.admission import SiteData, check_admission, check_labels, tasks_of, units_for

ME = SiteIdentity.generate("北岸银行", "bank").public()
OTHERS = [SiteIdentity.generate(name, kind).public() for name, kind in (("乙", "bank"), ("仁济医院", "hospital"))]
ROSTER = Roster.of([ME, *OTHERS])
DOMAIN = {"rounds": 2, "steps_per_round": 2, "sampling_probability": 0.5, "learning_rate": 0.01}
BANK, HOSPITAL = "北岸银行", "仁济医院"


def without(records: Records, part: str) -> Records:
    blank = ("",) * len(records)
    return dataclasses.replace(records, **{part: () if part == "dialogues" else blank})


@pytest.fixture
def language_plan(tiny_plan, tiny_causal):
    return lambda **changes: tiny_plan(**language_changes(tiny_causal, **changes))


def refusal(plan, data) -> PlanRefused:
    with pytest.raises(PlanRefused) as caught:
        check_admission(plan, ROSTER, me=ME, data=data)
    return caught.value


# --- admission


def test_a_site_has_a_record_for_every_task_of_the_plan(language_plan):
    data = language_data(BANK)
    plan, staged = language_plan(), language_plan(domain=DOMAIN)
    check_admission(plan, ROSTER, me=ME, data=data)
    check_admission(staged, ROSTER, me=ME, data=data)
    assert (tasks_of(plan, "bank"), tasks_of(staged, "bank")) == (("instruct",), ("continue", "instruct"))
    assert tasks_of(staged, "hospital") == ("continue",)


@pytest.mark.parametrize("part", ["train", "held_back"])
@pytest.mark.parametrize(("lacking", "task"), [("dialogues", "instruct"), ("texts", "continue")])
def test_a_plan_with_a_task_that_the_data_has_no_record_for_is_refused(language_plan, part, lacking, task):
    data = language_data(BANK)
    error = refusal(
        language_plan(domain=DOMAIN), dataclasses.replace(data, **{part: without(getattr(data, part), lacking)})
    )
    assert error.rule == f"the plan has a task {task}, this site's data has no record for it"
    assert "site.toml" in error.hint


def test_a_site_without_labels_does_not_classify(tiny_plan, tiny_data):
    data = tiny_data("bank")
    error = refusal(tiny_plan(), SiteData(without(data.train, "labels"), data.held_back))
    assert error.rule == "the plan has a task classify, this site's data has no record for it"


def test_records_that_are_no_part_of_the_task_do_not_stand_in_its_way(tiny_plan, tiny_data):
    data = tiny_data("bank")
    more = Records(
        (*data.train.texts, "没有标签", ""), (*data.train.labels, "", ""), (*data.train.units, "甲", "乙"), "unit"
    )
    mixed = SiteData(more, data.held_back)
    check_admission(tiny_plan(), ROSTER, me=ME, data=mixed)
    check_labels(tiny_plan(), "bank", mixed)


def test_labels_of_a_site_that_learns_words_are_not_looked_at(language_plan):
    data = language_data(BANK)
    odd = dataclasses.replace(data.train, labels=("罕见病",) * len(data.train))
    check_labels(language_plan(), "bank", SiteData(odd, data.held_back))


def test_delta_is_held_against_all_units_of_the_data_whatever_the_task(language_plan):
    """Also against those that have no record for the task: the bound may only be stricter."""
    data = language_data(BANK)
    more = 1_000
    train = Records(
        (*data.train.texts, *("别的",) * more),
        (*data.train.labels, *("",) * more),
        tuple(str(number) for number in range(12 + more)),
        None,
        (*data.train.dialogues, *((),) * more),
    )
    plan = language_plan(privacy={"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3})
    check_admission(plan, ROSTER, me=ME, data=data)
    assert "is not below 1 / number of units" in refusal(plan, SiteData(train, data.held_back)).rule


def test_a_patients_records_are_limited_before_tasks_take_theirs(language_plan):
    kinds = {"bank": {"task": "instruct", "unit": "customer"}, "hospital": {"task": "continue"}}
    plan = language_plan(kinds=kinds, privacy={"mechanism": "none", "max_records_per_unit": 2})
    data = language_data(BANK).train
    one = dataclasses.replace(data, units=("甲",) * len(data), unit_column="客户")
    assert len(units_for(plan, "bank", one)) == len(units_for(plan, "bank", one).dialogues) == 2


# --- a run


@pytest.fixture(scope="module")
def make_staged(make_desk, tiny_causal):
    """Banks classify, hospitals instruct, after a stage on everybody's texts."""

    def make(rounds=2):
        data = {name: language_data(name) for name in (BANK, "harbour-bank", HOSPITAL, "st-anna")}
        for name in (BANK, "harbour-bank"):
            labels = ("欺诈", "正常", "") * 4  # a third of the texts has no label
            train = dataclasses.replace(data[name].train, labels=labels, dialogues=())
            data[name] = SiteData(train, dataclasses.replace(data[name].held_back, labels=labels[:6], dialogues=()))
        kinds = {"bank": {"labels": ["欺诈", "正常"]}, "hospital": {"task": "instruct"}}
        pace = {"domain": {**DOMAIN, "rounds": rounds}, "training": {"rounds": rounds}}
        changes = language_changes(tiny_causal, kinds=kinds, audit={"canaries": 8}, **pace)
        return make_desk(data=data, **changes)

    return make


@pytest.fixture(scope="module")
def begun(make_staged):
    """What each site holds before its first round: its run and its state."""
    desk = make_staged()
    desk.play(until=("round", 1))
    return {name: service._held for name, service in desk.services.items()}


def test_each_round_has_the_records_of_its_task(begun):
    bank, hospital = begun[BANK][0], begun[HOSPITAL][0]
    assert [bank.task_in(number) for number in (1, 2, 3, 4, bank.closing_round)] == ["continue"] * 2 + ["classify"] * 3
    assert (len(bank.train_in(2)), len(bank.train_in(3))) == (12, 8)
    assert (len(bank.held_back_in(2)), len(bank.held_back_in(3))) == (6, 4)
    assert bank.train_in(3).counted is None
    assert bank.train_in(3).labels.tolist() == [0, 1] * 4
    for run in (bank, hospital):
        assert all(counted.any() for counted in run.train_in(1).counted)
    assert (len(hospital.train_in(1)), len(hospital.train_in(3))) == (12, 12)
    assert hospital.train_in(1) is not hospital.train_in(3)
    assert (bank.prompts, len(hospital.prompts)) == ((), 6)
    assert hospital.prompts[0].reference == f"保留 {HOSPITAL} 答复 0"
    assert "array" not in repr(hospital), "no record shows"


def test_candidates_are_the_same_in_both_stages_each_in_the_form_of_its_task(begun):
    run, state = begun[BANK]
    words, labelled = (canary_audit.training_records(run, state, number=number) for number in (1, 3))
    coins = canary_audit._canaries(run, state.canaries.seed).coins
    assert (len(words), len(labelled)) == (12 + coins.sum(), 8 + coins.sum())
    assert words.input_ids[12:] != []
    assert all(map(np.array_equal, words.input_ids[12:], labelled.input_ids[8:]))
    assert labelled.counted is None
    assert all(counted[1:].all() and not counted[0] for counted in words.counted[12:])
    # the divisor of a step counts the units of its own task
    assert canary_audit.expected_units(run, state, number=1) == 12 + 4
    assert canary_audit.expected_units(run, state, number=3) == 8 + 4


def test_candidates_of_a_kind_that_writes_are_words_from_first_to_last(begun):
    run, state = begun[HOSPITAL]
    assert run.vocabulary.num_tokens == 16
    assert begun[BANK][0].vocabulary.num_tokens == 8
    final = canary_audit._canaries(run, state.canaries.seed)
    assert all(len(row) == 16 for row in final.records.input_ids)
    assert final.records.counted is not None
    assert np.isfinite(np.frombuffer(state.canaries.first_losses, "<f8")).all()


@pytest.mark.slow
def test_a_run_of_two_stages_is_audited_in_the_form_of_each(make_staged):
    desk = make_staged(rounds=1)
    desk.play()
    for name, service in desk.services.items():
        run, state = service._held
        assert next(each["task"] for each in desk.events[name] if each["event"] == "utility") == "continue"
        assert state.canaries.rounds == run.plan.rounds == 2
        assert np.frombuffer(state.canaries.round_scores, "<f8").any()
        assert [each["canaries"] for each in desk.events[name] if each["event"] == "audited"] == [8]
