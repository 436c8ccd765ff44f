"""The service around the steps: bytes in and bytes out, exactly once, also across restarts, and no word too many."""

import logging
import threading

import msgspec
import pytest
from msgspec.structs import replace

from fedseek.errors import FedseekError, WrongKey, WrongRound
from fedseek.groupkey import make_group_key
from fedseek.identity.vault import StorageKey
from fedseek.messages import (
    AggregateDown,
    KeyRequest,
    PlanAdmitted,
    Refused,
    ReleaseRequest,
    RoundRequest,
    ShareRequest,
    UnmaskRequest,
    UpdateReply,
    decode_reply,
    decode_request,
    encode_message,
)
from fedseek.records import Records
from fedseek_site.admission import SiteData
from fedseek_site.journal import Step
from fedseek_site.service import SiteService, step_of

RUN, ME, PEER, OTHER = "试运行-1", "仁济医院", "北岸银行", "harbour-bank"
PRIVATE_WORDS = "患者王小明 /data/病历.jsonl 13800000000"
GIVEN_UP = AggregateDown(round=3, epoch=0, survivors=(), sums=())


@pytest.fixture(scope="module")
def at_round_1(make_desk):
    desk = make_desk()
    return desk, desk.play(until=("round", 1))[ME]


def raw(message, **fields):
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(encode_message(message)), **fields})


# --- which run ----------------------------------------------------------------------------------------------------------

REQUESTS = [
    KeyRequest(run=RUN, epoch=0),
    ShareRequest(run=RUN, round=1, listed=(), keys=()),
    RoundRequest(
        run=RUN, round=1, previous=(), epoch=0, envelopes={}, participants=(), boxes={}, next_listed=(), next_keys=()
    ),
    UnmaskRequest(run=RUN, round=1, survivors=(), presence={}),
    ReleaseRequest(run=RUN, previous=(), metrics=GIVEN_UP, envelopes={}, send_adapter=False),
]


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: type(message).__name__)
def test_nothing_is_answered_before_a_plan_is_admitted(make_desk, message):
    desk = make_desk()
    assert desk.code(ME, message) == "WrongRound"
    assert "this site is in None" in desk.text(ME)


def test_a_request_of_another_run_is_refused(at_round_1):
    desk, request = at_round_1
    assert desk.code(ME, replace(request, run="another")) == "WrongRound"


def test_a_newer_run_ends_the_older_one_also_after_a_restart(make_desk):
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    first = desk.seen[0]
    assert desk.code(ME, desk.offer(1, run="第二轮")) == "PlanAdmitted"
    for _ in range(2):
        assert desk.code(ME, request) == "WrongRound"
        assert desk.code(ME, desk.offer(2)) == "WrongRound", "nor does an offer begin the older run afresh"
        assert desk.services[first[0]].handle(first[1]) == first[2], "what was answered is still answered"
        desk.restart(ME)
    assert desk.ask(ME, desk.offer(2, run="第二轮")).keys[0].round == 2


@pytest.mark.parametrize(
    ("message", "step"),
    [
        (REQUESTS[0], Step(RUN, "key", 0)),
        (REQUESTS[1], Step(RUN, "shares", 1)),
        (REQUESTS[2], Step(RUN, "round", 1)),
        (REQUESTS[3], Step(RUN, "unmask", 1)),
        (REQUESTS[4], Step(RUN, "release", 4)),
    ],
)
def test_each_kind_of_request_is_a_step_of_its_own(message, step):
    assert step_of(message) == step


# --- requests that do not parse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alter",
    [
        lambda request: b"",
        lambda request: encode_message(request)[:-1],
        lambda request: encode_message(request) + b"\0",
        lambda request: raw(request, note="x"),
        lambda request: raw(request, version=2),
        lambda request: raw(request, type="RunCode"),
        lambda request: raw(request, round="1"),
        lambda request: raw(request, round=0),
        lambda request: raw(request, run=""),
        lambda request: raw(request, run="x" * 129),
        lambda request: raw(request, run=b"\xff\xfe"),
    ],
    ids=["empty", "short", "long", "field", "version", "type", "text", "zero", "no-run", "long-run", "bytes"],
)
def test_a_request_that_does_not_parse_is_refused(at_round_1, alter):
    desk, request = at_round_1
    answer = desk.ask(ME, alter(request))
    assert isinstance(answer, Refused)
    assert (answer.code, answer.run) == ("Malformed", "unknown")


def test_a_reply_is_no_request(at_round_1):
    desk, _ = at_round_1
    assert desk.code(ME, desk.seen[0][2]) == "Malformed"


# --- exactly once -------------------------------------------------------------------------------------------------------


def test_a_refusal_is_nothing_done_and_is_not_repeated_from_memory(make_desk):
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    desk.now[0] += 91 * 86_400
    assert desk.code(ME, request) == "WrongKey", "the group key is too old"
    desk.now[0] -= 91 * 86_400
    assert desk.code(ME, request) == "UpdateReply", "the very same request, answered now"


def test_a_process_that_dies_before_its_answer_is_written_does_the_step_afresh(make_desk, monkeypatch):
    """Between computing and writing nothing has left the site: what was computed is thrown away."""
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    before = desk.state(ME).to_bytes()
    made = []

    def dies(step, request, reply, state):
        made.append(reply)
        raise SystemExit

    monkeypatch.setattr(desk.services[ME]._journal, "record", dies)
    with pytest.raises(SystemExit):
        desk.services[ME].handle(encode_message(request))
    desk.restart(ME)
    assert desk.state(ME).to_bytes() == before
    answer = desk.send(ME, request)
    assert answer != made[0], "fresh randomness: nobody has seen the first"
    assert desk.state(ME).steps_done == (2,)


def test_an_answer_that_cannot_be_written_does_not_leave(make_desk, monkeypatch):
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    before = desk.state(ME).to_bytes()
    journal = desk.services[ME]._journal

    def full(*args):
        raise FedseekError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(journal, "record", full)
        assert desk.code(ME, request) == "FedseekError"
    assert desk.state(ME).to_bytes() == before
    assert desk.code(ME, request) == "UpdateReply"


def test_two_requests_at_once_are_answered_one_after_the_other(make_desk):
    desk = make_desk()
    request = encode_message(desk.play(until=("round", 1))[ME])
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(desk.services[ME].handle(request))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1
    assert not isinstance(decode_reply(answers[0]), Refused)
    assert desk.state(ME).steps_done == (2,)


def test_after_a_restart_an_old_and_a_new_request_are_told_apart(make_desk):
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    first = desk.send(ME, request)
    desk.restart(ME)
    assert desk.send(ME, request) == first
    assert desk.code(ME, replace(request, next_listed=(), next_keys=())) == "WrongRound"
    assert len(desk.services[ME]._journal.refusals(RUN)) == 1


def test_a_restart_under_another_storage_key_or_beside_a_running_one_is_refused(make_desk):
    desk = make_desk()
    desk.ask(ME, desk.offer(1))
    service = desk.services[ME]

    def another(key):
        return SiteService(
            service.identity,
            service.data,
            roster=None,
            state_folder=desk.folder / ME / "state",
            storage_key=key,
            ledger=desk.ledgers[ME],
            release_folder=desk.folder / "x",
            observe=print,
        )

    with pytest.raises(FedseekError, match="in use by another process"):
        another(StorageKey.generate())
    service.close()
    with pytest.raises(WrongKey):
        another(StorageKey.generate())
    desk.services[ME] = desk.reopen(ME)


def test_a_run_that_was_forgotten_is_not_begun_again(make_desk):
    desk = make_desk()
    desk.ask(ME, desk.offer(1))
    desk.services[ME]._journal.forget(RUN)
    desk.restart(ME)
    assert desk.code(ME, desk.offer(1)) == "WrongRound"
    assert desk.code(ME, desk.offer(2)) == "WrongRound"
    with pytest.raises(WrongRound):
        desk.state(ME)


# --- a sum that does not pass -------------------------------------------------------------------------------------------


def test_a_sum_that_does_not_pass_ends_the_run_at_this_site_and_is_tried_once(make_desk):
    """Asked again and again, what passes and what does not would tell a coordinator about the group key."""
    desk = make_desk()
    request = desk.play(until=("round", 2))[ME]
    (down,) = request.previous
    false = tuple(replace(each, ciphertexts=down.sums[0].ciphertexts) for each in down.sums)
    spoilt = replace(request, previous=(replace(down, sums=false),))
    first = desk.send(ME, spoilt)
    assert decode_reply(first) == Refused(run=RUN, site=ME, code="Tampered", rule="Tampered")
    for _ in range(2):
        assert desk.send(ME, spoilt) == first, "not tried again: the noise of a second try would tell"
        for asked in (request, desk.offer(3), KeyRequest(run=RUN, epoch=1), desk.share_request(ME, 2)):
            assert desk.code(ME, asked) == "WrongRound"
        state = desk.state(ME)
        assert (state.stopped, state.rounds, state.group_keys, state.last_applied) == (True, {}, {}, 0)
        desk.restart(ME)
    assert desk.ask(ME, desk.offer(1, run="第二轮")).run == "第二轮", "another run may begin"


def test_what_was_answered_before_a_run_was_stopped_is_still_answered(make_desk):
    desk = make_desk()
    request = desk.play(until=("round", 2))[ME]
    (down,) = request.previous
    false = tuple(replace(each, ciphertexts=down.sums[0].ciphertexts) for each in down.sums)
    assert desk.code(ME, replace(request, previous=(replace(down, sums=false),))) == "Tampered"
    mine = [(asked, answer) for site, asked, answer in desk.seen if site == ME][:-1]
    assert len(mine) == 4
    assert [desk.services[ME].handle(asked) for asked, _ in mine] == [answer for _, answer in mine]


# --- how long an answer is kept -----------------------------------------------------------------------------------------


def test_a_group_key_once_made_is_sent_again_rounds_later(make_desk):
    """Epochs are not rounds: an answer of epoch 1 is not old because round 6 is played. A second key would split sites."""
    desk = make_desk(training={"rounds": 7})
    desk.play(until=("round", 2))
    asked = KeyRequest(run=RUN, epoch=1)
    first = desk.send(ME, asked)
    desk.take(ME, decode_reply(first))
    for number in range(2, 7):
        for site, request in desk.round_requests(number).items():
            desk.take(site, desk.ask(site, request))
        for site, request in desk.unmask_requests(number).items():
            desk.take(site, desk.ask(site, request))
        desk.downs[number] = desk.finish(number)
        assert desk.send(ME, asked) == first
    desk.restart(ME)
    assert desk.send(ME, asked) == first


def test_an_epoch_far_ahead_does_not_make_a_site_forget_its_answers(make_desk):
    """Whoever makes a group key names its epoch. A site that lies there shall not cost another its updates."""
    desk = make_desk()
    requests = desk.play(until=("round", 1))
    far = make_group_key(desk.federation, 900_000, identity=desk.services[OTHER].identity, now=desk.now[0])
    asked = replace(requests[ME], epoch=900_000, envelopes={900_000: far.envelopes[ME]})
    first = desk.send(ME, asked)
    assert isinstance(decode_reply(first), UpdateReply)
    assert desk.code(ME, KeyRequest(run=RUN, epoch=900_001)) == "KeysSealed"
    assert desk.send(ME, asked) == first
    assert desk.code(ME, desk.seen[0][1] if desk.seen[0][0] == ME else desk.offer(1)) == "PlanAdmitted"


def test_answers_of_a_phase_are_kept_for_three_of_its_rounds(make_desk):
    desk = make_desk(training={"rounds": 3})
    desk.play(until=("release", 4))
    mine = {
        (step.phase, step.round): (request, answer)
        for site, request, answer in desk.seen
        if site == ME and (step := step_of(decode_request(request)))
    }
    for number in (2, 3, 4):
        request, answer = mine["round", number]
        assert desk.services[ME].handle(request) == answer
    assert decode_reply(desk.services[ME].handle(mine["round", 1][0])).code == "WrongRound"
    assert "no longer kept" in desk.text(ME)
    for phase, number in (("plan", 1), ("shares", 1), ("unmask", 1), ("unmask", 3)):
        request, answer = mine[phase, number]
        assert desk.services[ME].handle(request) == answer, "the last three of each phase, whatever the others count"


# --- what a refusal tells -----------------------------------------------------------------------------------------------


def test_a_refused_plan_names_its_rule_to_the_coordinator(make_desk, tiny_data):
    desk = make_desk(data={ME: tiny_data("hospital", unit=None)})
    answer = desk.ask(ME, desk.offer(1))
    assert (answer.code, answer.site) == ("PlanRefused", ME)
    assert answer.rule == "the plan protects a patient, this site's data names no unit column"


@pytest.mark.parametrize("event", ["layout", "refused"])
def test_of_an_internal_error_no_word_leaves_the_site(make_desk, caplog, event):
    """Also of one that happens while a refusal is being reported."""
    desk = make_desk()

    def full_disk(told):
        if told["event"] == event:
            raise OSError(28, PRIVATE_WORDS)

    desk.services[ME]._observe = full_disk
    asked = desk.offer(1) if event == "layout" else desk.offer(1, plan=b"{}")
    with caplog.at_level(logging.ERROR):
        reply = desk.send(ME, asked)
    assert decode_reply(reply) == Refused(run=RUN, site=ME, code="InternalError", rule="internal error")
    for word in ("王小明", "病历", "13800000000", "OSError", "Errno", "/data"):
        assert word.encode() not in reply
    assert PRIVATE_WORDS in caplog.text, "the site's own log has it"


def test_an_error_over_data_is_told_as_a_code_alone(make_desk, tiny_data):
    data = tiny_data("hospital")
    odd = Records(data.train.texts, (PRIVATE_WORDS, *data.train.labels[1:]), data.train.units, data.train.unit_column)
    desk = make_desk(data={ME: SiteData(odd, data.held_back)})
    assert desk.ask(ME, desk.offer(1)) == Refused(run=RUN, site=ME, code="InvalidPlan", rule="InvalidPlan")


def test_a_refusal_is_told_as_a_code_and_explained_at_the_site(at_round_1):
    desk, request = at_round_1
    answer = desk.ask(ME, replace(request, participants=(0, 1)))
    assert answer.rule == answer.code
    assert len(desk.text(ME)) > len(answer.rule)


def test_a_plan_that_was_refused_leaves_the_run_in_progress_alone(make_desk):
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    assert desk.code(ME, desk.offer(1, run="第二轮", plan=b"{}")) == "InvalidPlan"
    assert desk.code(ME, request) == "UpdateReply"


def test_an_admitted_plan_survives_a_restart_and_a_changed_base_model_does_not(
    make_desk, tiny_plan, make_tiny_model, tmp_path
):
    from fedseek.lora.source import model_digest

    folder = make_tiny_model(tmp_path / "模型")
    plan = tiny_plan(model={"source": f"path:{folder}", "sha256": model_digest(folder)})
    desk = make_desk(plan=plan)
    assert isinstance(desk.ask(ME, desk.offer(1)), PlanAdmitted)
    desk.restart(ME)
    assert isinstance(desk.ask(ME, desk.offer(2)), PlanAdmitted)
    make_tiny_model(folder, seed=1)
    desk.restart(ME)
    assert desk.code(ME, desk.offer(3)) == "PlanRefused"
