"""Whole runs of real sites: dropouts, returners, rounds given up, restarts at every step, a head that stays at home."""

import json

import numpy as np
import pytest

from fedseek.deal import RoundSecrets
from fedseek.messages import ReleaseApproved, decode_reply

BANK, CLINIC, ALONE = "harbour-bank", "仁济医院", "孤岛医院"
ONE_CLINIC = (("北岸银行", "bank"), (BANK, "bank"), ("third-bank", "bank"), (ALONE, "hospital"))


def told(desk, site, name):
    return [event for event in desk.events[site] if event["event"] == name]


def same_everywhere(desk, scope="global"):
    digests = {reply.digests[scope] for reply in desk.approved.values() if scope in reply.digests}
    assert len(digests) == 1
    return digests.pop()


def has_learned(desk, site):
    """Whether the adapter moved away from where the plan's seed put it."""
    return any(any(values.weights) for scope, values in desk.state(site).scopes.items() if scope == "global")


def test_a_run_ends_in_the_same_adapter_at_every_site(make_desk):
    desk = make_desk()
    desk.play()
    assert set(desk.approved) == set(desk.services)
    same_everywhere(desk)
    assert all(has_learned(desk, site) for site in desk.services)
    assert [event["round"] for event in told(desk, CLINIC, "utility")] == [0, 1, 2]
    assert [(event["round"], event["sites"]) for event in told(desk, CLINIC, "applied")] == [(1, 4), (2, 4)]
    wanted = {"train", "evaluate", "encode", "tag", "mask", "encrypt", "shares", "decrypt", "apply"}
    assert set(told(desk, CLINIC, "round")[1]["seconds"]) == wanted


def test_every_process_is_restarted_after_every_step_and_nothing_is_lost(make_desk):
    """Four sites, two rounds: each answer comes from a process that has only the folder of the one before."""
    desk = make_desk(private=True)

    def ask_again_and_restart(site):
        _, request, answer = desk.seen[-1]
        desk.restart(site)
        assert desk.services[site].handle(request) == answer, "the same bytes, from another process"

    desk.play(after_each=ask_again_and_restart)
    same_everywhere(desk)
    for site, reply in desk.approved.items():
        statement = json.loads(reply.statement)
        assert [stage["num_steps"] for stage in statement["stages"]] == [4], (
            f"{site}: every step is counted, none twice"
        )
        assert statement["epsilon"] <= 8.0
        assert len(told(desk, site, "round")) == 2, "no round was trained twice"


def test_a_site_that_vanishes_in_a_round_does_not_hold_it_up(make_desk):
    desk = make_desk()
    desk.play(away=lambda phase, number, site: site == BANK and number >= 1 and phase != "shares" and phase != "plan")
    assert set(desk.approved) == set(desk.services) - {BANK}
    same_everywhere(desk)
    assert [event["sites"] for event in told(desk, CLINIC, "applied")] == [3, 3]


def test_a_site_that_was_away_comes_back_with_every_sum_it_missed(make_desk):
    desk = make_desk(training={"rounds": 3})
    desk.play(away=lambda phase, number, site: (phase, number, site) == ("round", 1, BANK))
    assert set(desk.approved) == set(desk.services)
    same_everywhere(desk)
    assert [event["round"] for event in told(desk, BANK, "round")] == [3]
    assert [event["round"] for event in told(desk, BANK, "applied")] == [1, 2, 3]
    assert [number for number, updates in desk.updates.items() if BANK in updates] == [3, 4]


def test_a_site_whose_update_is_lost_is_left_out_of_the_sum_and_comes_back(make_desk):
    """It sent an update that never arrived: its mask key is rebuilt, and the next sum says that it was not in it."""
    desk = make_desk(training={"rounds": 3})
    taken = desk.take

    def lose_one(site, reply):
        if (site, getattr(reply, "round", 0), type(reply).__name__) != (BANK, 1, "UpdateReply"):
            taken(site, reply)

    desk.take = lose_one
    desk.play()
    assert set(desk.approved) == set(desk.services)
    same_everywhere(desk)
    assert BANK not in desk.updates[1]
    assert [event["sites"] for event in told(desk, BANK, "applied")] == [3, 3, 4]


def test_a_round_with_too_few_updates_is_given_up_and_the_run_goes_on(make_desk):
    desk = make_desk(training={"rounds": 4})
    desk.play(away=lambda phase, number, site: (phase, number) == ("round", 2) and site in (BANK, CLINIC))
    assert set(desk.approved) == set(desk.services)
    same_everywhere(desk)
    for site in desk.services:
        assert [event["round"] for event in told(desk, site, "given-up")] == [2, 3]
        assert [event["round"] for event in told(desk, site, "applied")] == [1, 4]
    assert desk.revealed.keys() == {1, 4}, (
        "nobody revealed a share of a round that was given up, nor of the closing one"
    )


def test_a_scope_with_too_few_survivors_stays_as_it_was(make_desk):
    desk = make_desk()
    until = desk.play(
        until=("round", 2), away=lambda phase, number, site: (phase, number, site) == ("round", 1, "st-anna")
    )
    assert [each.scope for each in until[CLINIC].previous[0].sums] == ["global"]
    before = desk.state(CLINIC).scopes
    desk.take(CLINIC, desk.ask(CLINIC, until[CLINIC]))
    after = desk.state(CLINIC).scopes
    assert after["kind/hospital"] == before["kind/hospital"]
    assert after["global"] != before["global"]
    assert [each.scope for each in until[BANK].previous[0].sums] == ["global", "kind/bank"]


def test_the_run_goes_on_under_the_next_epochs_key(make_desk):
    desk = make_desk(training={"rounds": 3})
    for phase, number, requests in desk.exchanges():
        if (phase, number) == ("round", 2):
            desk.rotate(CLINIC)
            requests = desk.round_requests(2)
        for site, request in requests.items():
            desk.take(site, desk.ask(site, request))
    same_everywhere(desk)
    assert [reply.epoch for reply in (desk.updates[n][BANK] for n in (1, 2, 3, 4))] == [0, 1, 1, 1]


# --- a head that stays at home ----------------------------------------------------------------------------------------


def test_the_only_hospital_keeps_its_head_and_its_metrics_at_home(make_desk):
    desk = make_desk(sites=ONE_CLINIC)
    desk.play()
    same_everywhere(desk)
    assert told(desk, ALONE, "head-stays-home") == [
        {"event": "head-stays-home", "kind": "hospital", "sites": 1, "wanted": 2}
    ]
    assert set(desk.admitted[ALONE].ciphertexts) == {"global"}
    for number, updates in desk.updates.items():
        sent = [scoped.scope for scoped in updates[ALONE].update]
        assert sent == (["global"] if number < desk.last else []), "in the closing round it has nothing to send"
        assert set(updates[ALONE].digests) == {"global"}
    assert set(desk.approved[ALONE].digests) == {"global"}
    card = (desk.folder / ALONE / "release" / "README.md").read_text("utf-8")
    assert "This site's head" in card
    assert "This site's head" not in (desk.folder / BANK / "release" / "README.md").read_text("utf-8")
    own = told(desk, ALONE, "utility")[-1]["utility"]
    assert told(desk, ALONE, "released")[0]["utility"] == own, "its figure is over its own rows"


def test_a_head_at_home_is_trained_round_after_round(make_desk):
    desk = make_desk(sites=ONE_CLINIC)
    heads = []
    for phase, _, requests in desk.exchanges():
        for site, request in requests.items():
            desk.take(site, desk.ask(site, request))
        if phase == "round":
            heads.append(np.frombuffer(desk.state(ALONE).scopes["kind/hospital"].weights, "<f4"))
    first, second, closing = heads
    assert first.any()
    assert not np.array_equal(first, second)
    assert np.array_equal(second, closing), "the closing round trains nothing"


def test_a_head_at_home_survives_a_round_that_was_given_up(make_desk):
    desk = make_desk(sites=ONE_CLINIC, training={"rounds": 4})
    desk.play(away=lambda phase, number, site: (phase, number) == ("round", 2) and site in (BANK, "third-bank"))
    assert set(desk.approved) == set(desk.services)
    same_everywhere(desk)


# --- what is never there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
def test_no_text_label_or_unit_of_the_data_is_in_any_message(make_desk, private):
    desk = make_desk(private=private)
    desk.play()
    carried = b"\0".join(part for _, request, answer in desk.seen for part in (request, answer))
    data = desk.services[CLINIC].data
    for text in {*data.train.texts, *data.held_back.texts, *data.train.units, *data.held_back.units}:
        assert text.encode() not in carried


def test_no_secret_is_in_the_clear_in_a_message_in_the_database_or_in_a_repr(make_desk):
    desk = make_desk()
    secrets = set()

    def collect(site):
        state = desk.state(site)
        for each in state.rounds.values():
            secrets.update(secret for held in each.held.values() for secret in held.shares.values())
            if isinstance(each.secrets, RoundSecrets):
                secrets.update((each.secrets.mask_seed, each.secrets.share_key, each.secrets.self_seed))
        secrets.update(state.group_keys.values())
        secrets.update(values.weights for values in state.scopes.values() if any(values.weights))
        shown = f"{state!r} {state.rounds!r} {state.scopes!r} {state.__rich_repr__()} {desk.services[site]._held!r}"
        assert not any(repr(secret)[2:-1] in shown for secret in secrets if len(secret) < 100)
        assert len(shown) < 4000, "nor anything of the size of weights"

    desk.play(after_each=collect)
    assert len(secrets) > 100
    on_disk = b"".join(path.read_bytes() for path in desk.folder.glob("*/state/*") if path.is_file())
    assert len(on_disk) > 100_000
    assert not [secret for secret in secrets if secret in on_disk]
    # shares of survivors' self masks are revealed on purpose, in exchange B; nothing else ever is
    quiet = b"\0".join(
        answer for _, _, answer in desk.seen if type(decode_reply(answer)).__name__ not in ("SharesRevealed",)
    )
    assert not [secret for secret in secrets if secret in quiet]


def test_what_a_finished_run_leaves_holds_no_key(make_desk):
    desk = make_desk()
    desk.play()
    for site, reply in desk.approved.items():
        assert isinstance(reply, ReleaseApproved)
        state = desk.state(site)
        assert (state.rounds, state.group_keys, state.released) == ({}, {}, True)
