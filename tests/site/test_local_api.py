"""The sockets of the site's own people: who may ask what, and what is written down of it."""

import os
import re
import socket
import stat
import threading
import time
from pathlib import Path

import grpc
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from people_of_a_site import PLAN, ROSTER, SITE, ZHANG, House, sign, sign_release

import fedseek_site
from fedseek.errors import AddressTaken, AuditBroken, FedseekError, InvalidConfig, LocalRefused, Malformed, Unreachable
from fedseek_site import local_answers, local_api
from fedseek_site.budget import BudgetAsked, RunEnded
from fedseek_site.local_api import (
    METHODS,
    ROLES,
    SERVICE,
    LocalApi,
    PlanAsked,
    RecordAccepted,
    ReleaseAsked,
    ReleaseWithdrawal,
    Withdrawal,
    ask,
    role_for,
    rpc_name,
    serve_local,
    socket_path,
)

QUESTIONS = {
    "plan": PlanAsked(plan=PLAN.digest),
    "withdraw": Withdrawal(plan=PLAN.digest, person=ZHANG),
    "budget": BudgetAsked(),
    "end_run": RunEnded(run="试运行-1"),
    "accept_record": RecordAccepted(name="仁济医院", why="disk lost"),
    "approve": sign(ZHANG),
    "release": ReleaseAsked(release="ab" * 32),
    "approve_release": sign_release(ZHANG, "ab" * 32),
    "withdraw_release": ReleaseWithdrawal(release="ab" * 32, person=ZHANG),
}
ANYBODYS = {"status", "plans", "plan", "budget", "releases", "release"}
ALLOWED = {
    "operator": {*ANYBODYS, "pause", "resume"},
    "steward": {*ANYBODYS, "data", "reload_data"},
    "officer": {
        *ANYBODYS,
        "approve",
        "withdraw",
        "approve_release",
        "withdraw_release",
        "end_run",
        "audit_head",
        "accept_record",
    },
}


def echo_api(**changes) -> LocalApi:
    """Answers each method with its name, and with the plan it was asked for."""

    def told(name):
        return lambda *asked: {
            "method": name,
            **({"plan": asked[0].plan} if asked and hasattr(asked[0], "plan") else {}),
        }

    return LocalApi(**{**{name: told(name) for name in METHODS}, **changes})


class Told(list):
    def __call__(self, kind, /, **facts):
        self.append((kind, facts))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "运行 %41"


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def serving(folder, told):
    stops = []

    def serve(api=None, **options):
        stops.append(serve_local(api or echo_api(), folder, **{"record": told, **options}))
        return stops[-1]

    yield serve
    for stop in stops:
        stop(0.2)


# rights


@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_ask_what_its_work_needs_and_no_more(serving, folder, told, role):
    serving()
    for method in METHODS:
        told.clear()
        facts = {"role": role, "method": method}
        if method in ALLOWED[role]:
            assert ask(folder, role, method, QUESTIONS.get(method))["method"] == method
            assert [(kind, {**facts, "outcome": "asked"}.items() <= seen.items()) for kind, seen in told] == [
                ("local-call", True)
            ]
        else:
            with pytest.raises(LocalRefused) as caught:
                ask(folder, role, method, QUESTIONS.get(method))
            assert caught.value.refused_code == "PermissionDenied"
            may = next(name for name in ROLES if method in ALLOWED[name])
            assert f"is for the {local_api.ROLE_NAMES[may]}" in caught.value.message
            assert local_api.ROLE_NAMES[role] in caught.value.message
            assert told == [("local-call", {**facts, "outcome": "PermissionDenied"})]


def test_what_may_not_be_asked_is_not_done(serving, folder):
    def never():
        raise AssertionError("done")

    serving(echo_api(pause=never))
    for role in ("steward", "officer"):
        with pytest.raises(LocalRefused):
            ask(folder, role, "pause")


def test_the_table_of_methods_is_the_interface():
    assert set(METHODS) == set(LocalApi.__dataclass_fields__)
    for role, methods in ALLOWED.items():
        assert {name for name, method in METHODS.items() if role in method.roles} == methods


def test_a_command_finds_a_socket_that_it_may_open(serving, folder):
    serving()
    assert role_for(folder, "status") == "operator"
    socket_path(folder, "operator").unlink()
    assert role_for(folder, "status") == "steward"
    assert role_for(folder, "pause") == "operator"


# the record


def test_plan_and_person_are_written_down(serving, folder, told):
    serving()
    ask(folder, "officer", "withdraw", QUESTIONS["withdraw"])
    expected = {"role": "officer", "method": "withdraw", "plan": PLAN.digest, "person": ZHANG, "outcome": "asked"}
    assert told == [("local-call", expected)]


def test_a_refusal_is_written_down_and_told_with_its_words(serving, folder, told):
    def refuse():
        raise InvalidConfig(["data set 账户 is gone"], source="site.toml", hint="find it")

    serving(echo_api(reload_data=refuse))
    with pytest.raises(LocalRefused) as caught:
        ask(folder, "steward", "reload_data")
    assert (caught.value.refused_code, caught.value.exit_code, caught.value.hint) == ("InvalidConfig", 3, "find it")
    assert "账户" in caught.value.message
    assert [facts["outcome"] for _, facts in told] == ["asked", "InvalidConfig"]


def test_where_a_call_cannot_be_written_down_nothing_is_done(serving, folder):
    done = []

    def fail(kind, /, **facts):
        raise AuditBroken("disk full")

    serving(echo_api(pause=lambda: done.append(1) or {}), record=fail)
    with pytest.raises(LocalRefused) as caught:
        ask(folder, "operator", "pause")
    assert caught.value.refused_code == "AuditBroken"
    with pytest.raises(LocalRefused, match="is for the operator"):
        ask(folder, "officer", "pause")
    assert done == []


def test_a_probe_that_asks_the_status_all_day_is_written_down_once(serving, folder, told):
    serving()
    for _ in range(5):
        ask(folder, "operator", "status")
    assert len(told) == 1
    ask(folder, "operator", "pause")
    ask(folder, "operator", "pause")
    ask(folder, "operator", "status")
    assert [facts["method"] for _, facts in told] == ["status", "pause", "pause", "status"]


# what is no question


def raw(folder, role, method, data: bytes):
    with grpc.insecure_channel(local_api.grpc_address(socket_path(folder, role))) as channel:
        return channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=5)


def question(json: bytes, version: int = 1) -> bytes:
    return local_api._Question(version=version, json=json).SerializeToString()


BAD = [
    b"\xff\xff",
    question(b"{}", version=2),
    question(b""),
    question(b"[]"),
    question(b'{"plan": "abc"}'),
    question(b'{"plan": "' + b"z" * 12 + b'"}'),
    question(b'{"plan": "' + b"a" * 65 + b'"}'),
    question(b'{"plan": "' + b"a" * 12 + b'", "extra": 1}'),
    question(b'{"plan": "\xff' + b"a" * 12 + b'"}'),
]


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_what_is_no_question_is_refused(serving, folder, told, data):
    serving()
    answer = local_api._parse(local_api._Answer, raw(folder, "officer", "Plan", data))
    assert (answer.code, answer.json) == ("Malformed", b"")
    assert told == []


@given(st.binary(max_size=200), st.sampled_from(sorted(METHODS)))
@settings(max_examples=200)
def test_any_bytes_are_a_question_or_malformed(data, method):
    for sent in (data, question(data)):
        try:
            read = local_api._read(sent, METHODS[method].question)
        except Malformed:
            continue
        assert isinstance(read, METHODS[method].question)


def test_too_large_a_question_and_an_unknown_method_are_refused(serving, folder):
    serving()
    for method, data in (("Plan", bytes(local_api.MAX_QUESTION_BYTES + 1)), ("Shutdown", question(b"{}"))):
        with pytest.raises(grpc.RpcError) as caught:
            raw(folder, "officer", method, data)
        assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED)


def test_a_failure_tells_the_caller_nothing_of_itself(serving, folder):
    def fail():
        raise RuntimeError("账户 张三")

    serving(echo_api(status=fail))
    with pytest.raises(grpc.RpcError) as caught:
        raw(folder, "operator", "Status", question(b"{}"))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    with pytest.raises(Malformed, match="could not answer"):
        ask(folder, "operator", "status")


# sockets


def test_sockets_are_for_the_daemons_account_alone(serving, folder):
    serving()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(socket_path(folder, role).stat().st_mode) for role in ROLES} == {0o600}


def test_a_group_may_open_the_socket_of_its_role_and_no_other(serving, folder):
    import grp

    group = grp.getgrgid(os.getgid())
    serving(groups={"officer": group.gr_name, "steward": ""})
    modes = {role: stat.S_IMODE(socket_path(folder, role).stat().st_mode) for role in ROLES}
    assert modes == {"operator": 0o600, "steward": 0o600, "officer": 0o660}
    assert socket_path(folder, "officer").stat().st_gid == group.gr_gid
    assert stat.S_IMODE(folder.stat().st_mode) == 0o711


def test_a_group_that_does_not_exist_leaves_no_socket(serving, folder):
    with pytest.raises(InvalidConfig, match="no such group"):
        serving(groups={"steward": "no-such-group-here"})
    assert list(folder.iterdir()) == []
    serving()
    assert ask(folder, "operator", "status")


def test_a_second_daemon_is_refused_and_the_first_goes_on(serving, folder):
    serving()
    with pytest.raises(AddressTaken):
        serving()
    assert ask(folder, "operator", "status") == {"method": "status"}


def test_a_stale_socket_is_replaced_and_none_is_left(serving, folder):
    folder.mkdir()
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(socket_path(folder, "officer")))
    left.close()
    stop = serving()
    assert ask(folder, "officer", "audit_head") == {"method": "audit_head"}
    stop(0.2)
    assert list(folder.iterdir()) == []
    until = time.monotonic() + 5
    while any(thread.name.startswith(ROLES) for thread in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.02)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(ROLES)]
    with pytest.raises(Unreachable, match="nobody answers"):
        ask(folder, "officer", "status", timeout=5)


# the written interface


def test_the_proto_says_what_is_served():
    text = (Path(fedseek_site.__file__).parent / "local_api.proto").read_text("utf-8")
    assert re.findall(r"^package (.*);", text, re.M)[0] + ".LocalApi" == SERVICE
    rpcs = dict(re.findall(r"rpc (\w+)\(Question\) returns \(Answer\);\s+// (.*)", text))
    assert set(rpcs) == {rpc_name(name) for name in METHODS}
    for name, method in METHODS.items():
        who = "anybody" if method.roles == ROLES else local_api.ROLE_NAMES[method.roles[0]]
        assert rpcs[rpc_name(name)] == who
    types = {"uint32": 13, "bytes": 12, "string": 9}
    for kind in (local_api._Question, local_api._Answer):
        body = re.search(rf"message {kind.DESCRIPTOR.name} {{(.*?)\n}}", text, re.S).group(1)
        written = [(types[t], name, int(number)) for t, name, number in re.findall(r"(\w+) (\w+) = (\d+);", body)]
        assert written == [(each.type, each.name, each.number) for each in kind.DESCRIPTOR.fields]


# with the real policy behind it


def test_an_approval_travels_from_the_plan_shown_to_the_verdict(serving, folder, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    house = House(site)
    house.write_policy(approval={"required": 1})
    permission = house.permission
    serving(
        local_answers.answer_from(
            permission,
            more_status=lambda: {"run": "run-7"},
            data=dict,
            reload_data=dict,
            audit_head=dict,
            accept_record=lambda asked: {},
        )
    )
    permission.notice(PLAN, ROSTER)
    house.now += 5
    [line] = ask(folder, "operator", "plans")["plans"]
    assert (line["digest"], line["num_sites"], line["status"], line["approved_by"]) == (PLAN.digest, 3, "waiting", [])
    shown = msgspec.convert(ask(folder, "officer", "plan", PlanAsked(plan=PLAN.digest[:12])), local_answers.PlanShown)
    assert (shown.site, shown.open()[0].digest, shown.open()[1]) == (SITE, PLAN.digest, ROSTER)
    told = ask(folder, "officer", "approve", sign(ZHANG))
    assert (told["status"], told["approved_by"]) == ("ready", [ZHANG])
    assert ask(folder, "officer", "withdraw", QUESTIONS["withdraw"])["withdrawn"] == 1
    with pytest.raises(FedseekError, match="withdrawn"):
        ask(folder, "officer", "approve", sign(ZHANG))
    status = ask(folder, "steward", "status")
    assert (status["site"], status["approvals_required"], status["run"]) == (SITE, 1, "run-7")
    house.approvals.admit("run-7", PLAN, ROSTER, dataset="d", at=1.0)
    assert ask(folder, "steward", "plans")["plans"][0]["runs"] == ["run-7"]
    house.write("version = 9")
    assert ask(folder, "steward", "status")["policy"] == "unusable"
    assert ask(folder, "steward", "plans")["plans"][0]["status"] == "refused"
    house.approvals.close()
