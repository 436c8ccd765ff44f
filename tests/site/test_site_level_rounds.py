"""The guarantee for whole sites through the real path: real sites, the real coordinator, encrypted and masked sums."""

import math

import numpy as np
import pytest

from fedseek.dp import site_share
from fedseek.dp.site_guards import SITE_LEVEL_GUARDS
from fedseek.errors import PlanRefused, SiteRefused, UnsupportedMechanism
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.site_noise import share_variance
from fedseek_site import rounds
from fedseek_site.plan_words import describe

SITE = {"epsilon": 20.0, "delta": 1e-3, "l2_clip_norm": 0.5}
NAME = "harbour-bank"


def site_plan(tiny_plan, **changes):
    privacy = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "site": SITE}
    return tiny_plan(privacy=privacy, encryption={"value_bits": 16}, **changes)


@pytest.fixture
def spied(monkeypatch):
    """Weights by site and round as they are when a round begins, and the guards that each update passed."""
    seen = {"weights": {}, "guards": []}

    def evaluate(site_run, scopes, *, number):
        seen["weights"].setdefault(site_run.me, {})[number] = {s: held.weights.copy() for s, held in scopes.items()}
        return real_evaluate(site_run, scopes, number=number)

    def encode(*arguments, number):
        slots, guards = real_encode(*arguments, number=number)
        seen["guards"].append(guards)
        return slots, guards

    real_evaluate, real_encode = rounds.evaluate_weights, rounds.encode
    monkeypatch.setattr(rounds, "evaluate_weights", evaluate)
    monkeypatch.setattr(rounds, "encode", encode)
    return seen


def moves(spied, scope, site=NAME):
    held = spied["weights"][site]
    return np.concatenate([held[number][scope] - held[number - 1][scope] for number in sorted(held) if number])


def test_with_updates_of_zeros_the_adapter_moves_by_the_noise_that_was_promised(
    make_cohort, tiny_plan, spied, monkeypatch
):
    monkeypatch.setattr(rounds, "has_steps_left", lambda *_, **__: False)  # every round is rested in: zeros are sent
    plan = site_plan(tiny_plan, lora={"rank": 16}, training={"rounds": 2})
    cohort = make_cohort(plan=plan)
    with pytest.raises(SiteRefused, match="ReleaseRefused"):  # what was not trained in is not released
        cohort.play()
    for scope, sites in (("global", 4), ("kind/bank", 2)):
        moved = moves(spied, scope)
        promised = plan.site_level.noise_std(share_variance(plan.site_level, scope), sites)
        assert moved.size > 60
        assert moved.std() == pytest.approx(promised, rel=6 / math.sqrt(2 * moved.size))
    everywhere = [held[number]["global"] for held in spied["weights"].values() for number in held if number == 2]
    assert all((each == everywhere[0]).all() for each in everywhere)


def test_every_update_passes_the_guards_and_the_release_lists_them(make_cohort, tiny_plan, spied):
    cohort = make_cohort(plan=site_plan(tiny_plan, training={"rounds": 1}))
    cohort.play()
    released = [event for event in cohort.events[NAME] if event["event"] == "released"]
    assert set(SITE_LEVEL_GUARDS) <= set(released[0]["guards_passed"])
    assert set(spied["guards"]) == {tuple(sorted(SITE_LEVEL_GUARDS))}  # the closing round among them
    assert len(spied["guards"]) == 4 * 2


def test_without_such_a_guarantee_nothing_is_clipped_or_noised(make_cohort, tiny_plan, spied):
    cohort = make_cohort(plan=tiny_plan(training={"rounds": 1}))
    cohort.play()
    assert set(spied["guards"]) == {()}


def test_a_site_whose_noise_is_missing_sends_nothing(make_cohort, tiny_plan, monkeypatch):
    monkeypatch.setattr(site_share, "discrete_gaussian", lambda size, *_: np.zeros(size, np.int64))
    cohort = make_cohort(plan=site_plan(tiny_plan))
    sent = []
    with pytest.raises(SiteRefused, match="GuardTripped"):
        cohort.play(reply=lambda phase, number, name, data: sent.append((phase, len(data))) or data)
    assert sent[-1][0] == "round"
    assert sent[-1][1] < 1_000  # a refusal; an update has some 100,000 bytes


def test_a_repeated_request_gets_the_same_noise(make_cohort, tiny_plan):
    cohort = make_cohort(plan=site_plan(tiny_plan))
    exchange = cohort.play(until=("round", 1))
    node, asked = next(iter(exchange.requests.items()))
    first = cohort.services[node].handle(asked)
    assert len(first) > 50_000
    assert cohort.services[node].handle(asked) == first


def test_who_is_asked_to_approve_reads_of_it(tiny_plan):
    rows = dict(describe(site_plan(tiny_plan), Roster.of([SiteIdentity.generate(NAME, "bank").public()])))
    assert rows["privacy of a site"].startswith("ε 20 at δ 0.001")
    assert "no more than 1 of the others" in rows["privacy of a site"]


def test_a_site_refuses_an_adapter_that_does_not_fit_the_grid(make_cohort, tiny_plan, monkeypatch):
    plan = site_plan(tiny_plan)
    monkeypatch.setattr(type(plan.site_level), "largest_norm", refuse)
    cohort = make_cohort(plan=plan)
    with pytest.raises(PlanRefused, match="rounding takes more than half"):
        cohort.play()


def refuse(params, num_values):
    raise UnsupportedMechanism("rounding takes more than half of it")
