"""A run of sites that learn words: what is measured, what goes out as sums, and that no text leaves a site."""

import logging
import math

import pytest
from language_sites import language_changes, language_data

from fedseek_site.desk import AUDITED

BANKS, HOSPITALS = ("北岸银行", "harbour-bank"), ("仁济医院", "st-anna")
ROUNDS = 2


@pytest.fixture(scope="module")
def played(make_desk, tiny_causal):
    """A whole run, and everything that was logged."""
    changes = language_changes(tiny_causal, training={"rounds": ROUNDS, "learning_rate": 0.05})
    desk = make_desk(data={name: language_data(name) for name in (*BANKS, *HOSPITALS)}, **changes)
    logged: list[str] = []
    sink = logging.Handler()
    sink.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger().addHandler(sink)
    try:
        desk.play()
    finally:
        logging.getLogger().removeHandler(sink)
    return desk, logged


def of(played, site, event):
    return [each for each in played[0].events[site] if each["event"] == event]


@pytest.mark.parametrize(("sites", "task"), [(BANKS, "instruct"), (HOSPITALS, "continue")])
def test_perplexity_and_tokens_are_told_of_each_round(played, sites, task):
    for site in sites:
        told = of(played, site, "utility")
        assert [each["round"] for each in told] == list(range(ROUNDS + 1))
        assert {each["task"] for each in told} == {task}
        assert all(each["perplexity"] == pytest.approx(math.exp(each["loss"])) for each in told)
        assert len({each["tokens"] for each in told}) == 1
        assert told[-1]["loss"] < told[0]["loss"], "it learned"
        assert 0 <= told[-1]["utility"] <= 1


def test_only_sites_that_answer_are_asked_and_before_and_after_training_alone(played):
    for site in BANKS:
        assert [(each["round"], each["count"]) for each in of(played, site, "answers")] == [(0, 4), (ROUNDS, 4)]
    assert not any(of(played, site, event) for site in HOSPITALS for event in ("answers", "answers_of_kind", "sample"))


def test_every_bank_sees_the_scores_of_its_kind_and_no_other_figure(played):
    for number in (0, ROUNDS):
        own = [next(each for each in of(played, site, "answers") if each["round"] == number) for site in BANKS]
        for site in BANKS:
            whole = next(each for each in of(played, site, "answers_of_kind") if each["round"] == number)
            assert whole["count"] == 8
            for score in ("exact", "f1", "rouge_l"):
                assert whole[score] == pytest.approx(sum(each[score] for each in own) / 2, abs=1e-4)


def test_a_few_samples_are_in_the_sites_own_report(played):
    for site in BANKS:
        samples = of(played, site, "sample")
        assert len(samples) == 3
        for sample in samples:
            assert f"保留 {site} 问题" in sample["prompt"]
            assert f"保留 {site} 答复" in sample["reference"]
        assert any(sample["base"] != sample["adapter"] for sample in samples), "the adapter shows"


def test_no_text_is_in_anything_that_a_site_sends_or_logs_or_releases(played):
    desk, logged = played
    texts = {
        text
        for site in BANKS
        for sample in of(played, site, "sample")
        for text in sample.values()
        if isinstance(text, str) and len(text.encode()) > 8
    }
    texts |= {"问题", "答复", "保留 ", "训练 "}
    assert len(texts) > 10
    sent = b"\0".join(answer for _, _, answer in desk.seen)
    released = b"\0".join(
        path.read_bytes() for site in BANKS for path in (desk.folder / site / "release").rglob("*") if path.is_file()
    )
    assert len(sent) > 10_000
    assert len(released) > 1_000
    for text in texts - {"sample"}:
        assert text.encode() not in sent
        assert text.encode() not in released
        assert not any(text in line for line in logged)


def test_texts_and_figures_stay_out_of_the_audit_record():
    assert {"sample", "answers", "answers_of_kind", "utility", "resting", "rests"}.isdisjoint(AUDITED)


def test_the_release_goes_by_the_accuracy_of_tokens(played):
    for sites in (BANKS, HOSPITALS):
        last = [of(played, site, "utility")[-1] for site in sites]
        released = {of(played, site, "released")[-1]["utility"] for site in sites}
        hits = sum(each["utility"] * each["tokens"] for each in last)
        assert len(released) == 1
        assert released.pop() == pytest.approx(hits / sum(each["tokens"] for each in last), abs=1e-3)


def test_the_stage_after_a_domain_stage_is_told_of_its_own_task_and_begins_with_its_own_range(make_desk, tiny_causal):
    domain = {"rounds": 2, "steps_per_round": 1, "sampling_probability": 0.5, "learning_rate": 0.001}
    training = {"rounds": 2, "steps_per_round": 2, "learning_rate": 0.05, "server_momentum": 0.5}
    desk = make_desk(
        data={name: language_data(name) for name in (*BANKS, *HOSPITALS)},
        domain=domain,
        **language_changes(tiny_causal, training=training),
    )
    # two sites are away in the last round of the first stage and so have dealt nothing for the next: both rounds are given
    # up, and the second stage begins all the same
    few = (BANKS[1], HOSPITALS[1])
    desk.play(until=("unmask", 4), away=lambda phase, number, site: (phase, number) == ("round", 2) and site in few)
    for name, task in ((BANKS[0], "instruct"), (HOSPITALS[0], "continue")):
        told = [(each["round"], each["task"]) for each in desk.events[name] if each["event"] == "utility"]
        assert told == [(0, "continue"), (1, "continue"), (3, task)]
        held = desk.state(name).scopes
        assert {scope: each.value_range for scope, each in held.items()} == {
            scope: desk.plan.initial_range(scope, 3) for scope in held
        }
        assert not any(each.momentum for each in held.values())
    assert not [each for name in HOSPITALS for each in desk.events[name] if each["event"] == "answers"]


def test_a_floor_on_the_accuracy_of_tokens_holds_the_release_back(make_desk, tiny_causal):
    changes = language_changes(tiny_causal, training={"rounds": 1})
    changes["kinds"]["bank"] = {"task": "instruct", "min_utility": 0.99, "generation": {"rows": 0}}
    desk = make_desk(data={name: language_data(name) for name in (*BANKS, *HOSPITALS)}, **changes)
    asked = desk.play(until=("release", 2))
    assert desk.code(BANKS[0], asked[BANKS[0]]) == "ReleaseRefused"
    assert "0.99" in desk.text(BANKS[0])
    assert desk.code(HOSPITALS[0], asked[HOSPITALS[0]]) == "ReleaseApproved"
    assert not [each for each in desk.events[BANKS[0]] if each["event"] == "answers"]
