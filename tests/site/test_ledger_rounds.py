"""The ledger within a run: spent before training, refused before anything is trained, over when the run is."""

import dataclasses

import pytest

from fedseek.errors import FedseekError, WrongRound
from fedseek.messages import Refused, decode_reply
from fedseek_site.ledger_entries import Limit, Spent

ME = "北岸银行"
TWO_ROUNDS = {"training": {"rounds": 2, "steps_per_round": 2}}


def entered(desk, site=ME):
    entries, _ = desk.ledgers[site].entries()
    return [
        (noted.entry.run, noted.entry.round, noted.entry.steps) for noted in entries if isinstance(noted.entry, Spent)
    ]


def test_every_round_is_entered_once_and_told_to_the_record(make_desk):
    desk = make_desk(**TWO_ROUNDS)
    desk.play()
    run = desk.federation.run
    for site in desk.services:
        assert entered(desk, site) == [(run, 1, 2), (run, 2, 2)]
        told = [event for event in desk.events[site] if event["event"] == "ledger"]
        assert [(event["round"], len(event["digest"])) for event in told] == [(1, 64), (2, 64)]
    account = desk.ledgers[ME].account()
    assert account.spent() == [(None, 2), (None, 2)], "without privacy, and entered all the same"


def test_training_that_fails_is_spent_and_tried_again_without_a_second_entry(make_desk, monkeypatch):
    from fedseek_site import training

    desk = make_desk(**TWO_ROUNDS)
    request = desk.play(until=("round", 1))[ME]
    seen = []

    def fail(*args, **options):
        seen.append(entered(desk))
        raise WrongRound("killed here")

    monkeypatch.setattr(training, "train_round", fail)
    assert desk.code(ME, request) == "WrongRound"
    assert seen == [[(desk.federation.run, 1, 2)]], "entered before training"
    monkeypatch.undo()
    desk.restart(ME)
    assert desk.code(ME, request) == "UpdateReply"
    assert entered(desk) == seen[0]


def test_a_round_that_would_overspend_is_refused_without_a_figure(make_desk, monkeypatch):
    from fedseek_site import training

    desk = make_desk(private=True, **TWO_ROUNDS)
    request = desk.play(until=("round", 1))[ME]
    monkeypatch.setattr(desk.ledgers[ME], "_limit", lambda: Limit(0.01, 1e-5))
    monkeypatch.setattr(training, "train_round", lambda *args, **options: pytest.fail("trained"))
    answer = decode_reply(desk.send(ME, request))
    assert isinstance(answer, Refused)
    assert (answer.code, answer.rule) == ("BudgetExceeded", "limits.max_epsilon_total")
    assert "the limit is 0.01" in desk.text(ME)
    assert entered(desk) == []


def test_no_service_takes_other_data_without_the_ledger_knowing(make_desk, tiny_data):
    desk = make_desk(**TWO_ROUNDS)
    service, ledger = desk.services[ME], desk.ledgers[ME]
    before = ledger.entries()[1]
    data = tiny_data("bank")
    service.replace_data(dataclasses.replace(data, train=data.held_back))
    assert ledger.entries()[1] != before
    assert ledger.account().data_sets == {before, ledger.entries()[1]}


def test_a_ledger_that_cannot_be_written_stops_the_training(make_desk, monkeypatch):
    from fedseek_site import training

    desk = make_desk(**TWO_ROUNDS)
    request = desk.play(until=("round", 1))[ME]
    desk.ledgers[ME].close()
    monkeypatch.setattr(training, "train_round", lambda *args, **options: pytest.fail("trained"))
    assert desk.code(ME, request) in {"InternalError", FedseekError.__name__}
