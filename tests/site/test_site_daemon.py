"""The site's daemon in this process: real sockets, real record, real data; no courier and no network."""

import hashlib
import json
import threading
import time

import pytest
from joined import OPEN_POLICY, join_all

from fedseek.daemon.audit_check import checked_lines
from fedseek.errors import AddressTaken, InvalidConfig, InvalidRecords, LocalRefused, PlanRefused
from fedseek.messages import PlanOffer, decode_reply, encode_message
from fedseek_site import daemon as module
from fedseek_site.config import load_config
from fedseek_site.daemon import run_daemon, serving
from fedseek_site.enrol import open_site
from fedseek_site.local_api import RecordAccepted, ask, socket_path
from fedseek_site.paths import Paths

BEIAN = "北岸银行"
CONFIG = """
version = 1
[data]
name = "账户"
train = "训练.jsonl"
held_back = "保留.jsonl"
unit = "客户"
[courier]
separate = true
"""


def write_rows(path, count):
    rows = [{"text": f"余额 {n}", "label": "正常", "客户": f"c{n // 2}"} for n in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


@pytest.fixture
def folder(tmp_path):
    join_all(tmp_path).close()
    found = tmp_path / BEIAN
    (found / "site.toml").write_text(CONFIG, "utf-8")
    write_rows(found / "训练.jsonl", 12)
    write_rows(found / "保留.jsonl", 6)
    return found


def served(folder, changed=lambda: None):
    return serving(open_site(folder), load_config(folder), Paths(folder), changed)


def kinds(folder):
    site = open_site(folder)
    key = site.identity.public().signing_key
    return [line.kind for line in checked_lines(folder / "audit", public_key=key, name=BEIAN)]


def test_people_are_answered_each_on_the_socket_of_their_role(folder):
    run = folder / "run"
    with served(folder) as desk:
        assert ask(run, "operator", "status")["consortium"] == desk.site.join.consortium
        told = ask(run, "steward", "data")
        assert (told["name"], told["records"], told["units"], told["held_back_records"]) == ("账户", 12, 6, 6)
        head = ask(run, "officer", "audit_head")
        assert head["name"] == BEIAN
        with pytest.raises(LocalRefused):
            ask(run, "operator", "audit_head")
        for role in ("operator", "steward", "officer"):
            assert socket_path(run, role).stat().st_mode & 0o077 == 0
        assert Paths(folder).service_socket.stat().st_mode & 0o077 == 0
    assert not list(run.glob("*.sock"))
    assert [kind for kind in kinds(folder) if kind != "local-call"] == ["begun", "ledger", "started", "stopped"]


def test_a_steward_has_the_files_read_again(folder):
    with served(folder):
        before = ask(folder / "run", "steward", "data")["sha256"]
        write_rows(folder / "训练.jsonl", 20)
        told = ask(folder / "run", "steward", "reload_data")
        assert (told["records"], told["sha256"] != before) == (20, True)
        (folder / "训练.jsonl").write_text("{}\n")
        with pytest.raises(LocalRefused, match="label"):
            ask(folder / "run", "steward", "reload_data")
        assert ask(folder / "run", "steward", "data")["records"] == 20


def test_a_record_that_nobody_keeps_cannot_be_accepted_anew(folder):
    with served(folder), pytest.raises(LocalRefused, match="no head of the record"):
        ask(folder / "run", "officer", "accept_record", RecordAccepted(name="仁济医院", why="磁盘坏了"))


def test_a_plan_is_judged_by_the_policy_on_the_disk(folder, tiny_plan):
    (folder / "policy.toml").write_text(OPEN_POLICY.replace("min_sites = 2", "min_sites = 9"))
    with served(folder) as desk:
        roster = desk.site.signed_roster.roster
        with pytest.raises(PlanRefused, match=r"required\.min_sites"):
            desk.permit("run-1", "plan", tiny_plan(), roster)
        (folder / "policy.toml").write_text("version = 3")
        with pytest.raises(PlanRefused, match="cannot be used"):
            desk.permit("run-1", "plan", tiny_plan(), roster)
        request = PlanOffer(
            run="run-1",
            round=1,
            plan=tiny_plan().canonical(),
            roster=roster.canonical_bytes(),
            make_key=False,
            continues=None,
        )
        assert decode_reply(desk.service.handle(encode_message(request))).code == "PlanRefused"


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda folder: (folder / "训练.jsonl").unlink(), InvalidRecords),
        (lambda folder: (folder / "保留.jsonl").write_text(""), InvalidRecords),
        (
            lambda folder: (folder / "site.toml").write_text(CONFIG + '[sockets]\noperator_group = "no-such-group"\n'),
            InvalidConfig,
        ),
        (
            lambda folder: (folder / "site.toml").write_text(CONFIG + '[sockets]\ncourier_group = "no-such-group"\n'),
            InvalidConfig,
        ),
    ],
    ids=["no rows", "empty", "group of people", "group of the courier"],
)
def test_what_cannot_be_served_is_told_and_leaves_nothing_open(folder, spoil, error):
    spoil(folder)
    with pytest.raises(error), served(folder):
        pass
    assert not list((folder / "run").glob("*.sock"))
    write_rows(folder / "训练.jsonl", 12)
    write_rows(folder / "保留.jsonl", 6)
    (folder / "site.toml").write_text(CONFIG, "utf-8")
    with served(folder):
        pass


def test_one_daemon_a_folder(folder):
    stop = threading.Event()
    daemon = threading.Thread(target=run_daemon, args=(folder, stop))
    daemon.start()
    try:
        while not socket_path(folder / "run", "operator").exists():
            assert daemon.is_alive()
            time.sleep(0.02)
        with pytest.raises(AddressTaken, match="running here already"):
            run_daemon(folder, threading.Event())
    finally:
        stop.set()
        daemon.join(timeout=20)
    assert not daemon.is_alive()


def test_a_policy_that_cannot_be_used_permits_nothing_but_the_record_is_kept(folder):
    (folder / "policy.toml").write_text("version = 3")
    with served(folder):
        told = ask(folder / "run", "operator", "status")
        assert (told["policy"], len(told["problems"])) == ("unusable", 1)


def test_the_fingerprint_is_of_the_file(folder):
    data = (folder / "训练.jsonl").read_bytes()
    assert module.fingerprint_of(folder / "训练.jsonl") == hashlib.sha256(data).hexdigest()
