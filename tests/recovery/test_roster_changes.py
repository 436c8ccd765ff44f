"""A site goes, a site comes, keys are renewed: while everything runs, and nobody touches the other sites."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import pytest
from under_fire import is_in, under_fire

import simulations.enrolling
from fedseek.identity.enrolment import parse_request
from fedseek_server.consortium import create_consortium, open_consortium
from fedseek_site.enrol import create_site, join, make_join_request, open_site
from simulations.daemons import end_all, site_daemon
from simulations.enrolling import Member, write_site_files
from simulations.scenario import read_site_data

PATIENCE = 120.0  # seconds; the machine may be busy


@pytest.fixture
def scratch():
    with tempfile.TemporaryDirectory(prefix="k-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def wait_until(true, seconds=PATIENCE):
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.2)


def audit_kinds(folder):
    lines = [json.loads(line) for path in sorted((folder / "audit").glob("20*.jsonl")) for line in path.open("rb")]
    return [(line["kind"], line["detail"]) for line in lines]


def roster_number(folder):
    return json.loads((folder / "roster.json").read_text("utf-8"))["number"]


@pytest.mark.slow
@pytest.mark.soak
def test_one_site_goes_and_another_comes_while_the_others_serve(write_tiny_scenario, scratch, tmp_path):
    scenario = write_tiny_scenario(private=True, training={"rounds": 1}, cohort={"deadline_seconds": 600})
    with under_fire(scratch, tmp_path / "runs", scenario, seed=8) as fire:
        fire.finish(fire.submit())

        gone = fire.consortium.sites.pop("st-anna")
        gone_folder = fire.consortium.folders.pop("st-anna")
        consortium = open_consortium(fire.consortium.home)
        consortium.revoke("st-anna", time.time())
        others = list(fire.consortium.folders.values())
        wait_until(lambda: all(roster_number(folder) == consortium.signed_roster.number for folder in others))
        fire.finish(fire.submit())  # with three sites
        wait_until(lambda: "not a registered site" in (gone_folder / "courier.log").read_text("utf-8"))
        end_all([gone])

        site = next(each for each in fire.scenario.spec.sites if each.name == "st-anna")
        results = fire.results / "sites" / "新站"
        member = Member(
            "新站", site.kind, read_site_data(fire.scenario, site), results / "report.jsonl", results / "release"
        )
        folder = scratch / "site-new"
        create_site(folder, name=member.name, kind=member.kind)
        request = parse_request(make_join_request(folder, now=time.time()).to_bytes())
        join(folder, consortium.admit(request, time.time()).to_bytes(), now=time.time())
        write_site_files(folder, fire.scenario.plan, member)
        new = site_daemon(member.name, folder, results / "daemon.log")
        new.start()
        try:
            fire.consortium.sites[member.name], fire.consortium.folders[member.name] = new, folder
            fire.finish(fire.submit())
        finally:
            end_all([new])
        changes = [detail for kind, detail in audit_kinds(others[0]) if kind == "roster-taken"]
        assert [(each["removed"], each["added"]) for each in changes] == [(["st-anna"], []), ([], ["新站"])]


@pytest.mark.slow
@pytest.mark.soak
def test_sites_renew_their_keys_by_themselves_and_a_run_goes_on_with_the_new_ones(
    write_tiny_scenario, scratch, tmp_path, monkeypatch
):
    """Keys of a day, twenty hours old: it is time to renew them."""

    def made_yesterday(folder, *, now, **others):
        return create_consortium(folder, now=now - 20 * 3600, days=1, **others)

    monkeypatch.setattr(simulations.enrolling, "create_consortium", made_yesterday)
    real = simulations.enrolling.time.time
    monkeypatch.setattr(simulations.enrolling.time, "time", lambda: real() - 20 * 3600)
    scenario = write_tiny_scenario(private=True, training={"rounds": 1}, cohort={"deadline_seconds": 600})
    with under_fire(scratch, tmp_path / "runs", scenario, seed=9) as fire:
        monkeypatch.undo()
        old = {name: open_site(folder).identity.public() for name, folder in fire.consortium.folders.items()}
        home = fire.consortium.home
        wait_until(lambda: not open_consortium(home).former_node_keys() and roster_number(home) >= 2 * len(old), 300)
        renewed = {name: open_site(folder).identity.public() for name, folder in fire.consortium.folders.items()}
        assert all(renewed[name].signing_key != old[name].signing_key for name in old)
        wait_until(lambda: all(roster_number(f) == roster_number(home) for f in fire.consortium.folders.values()))
        fire.finish(fire.submit())
        left = [age for age in open_consortium(home).ages(time.time()) if age.what.startswith("keys of")]
        assert [age.days_left for age in left] == [0] * len(old)
    fire.check()


def test_a_run_waits_for_a_persons_approval(write_tiny_scenario, scratch, tmp_path):
    """Nobody trains before a privacy officer of the site has signed."""
    from fedseek_site.local_api import ask
    from fedseek_site.people import load_person_key as load_key
    from fedseek_site.people import make_person_key, policy_line, sign_approval

    scenario = write_tiny_scenario(private=True, training={"rounds": 1}, cohort={"deadline_seconds": 600})
    with under_fire(scratch, tmp_path / "runs", scenario, seed=10) as fire:
        folder = fire.consortium.folders["仁济医院"]
        public = make_person_key(tmp_path / "officer.pem", "张伟", None)
        policy = (folder / "policy.toml").read_text("utf-8")
        policy = policy.replace("required = 0", "required = 1")
        line = policy_line("张伟", "privacy officer", public)
        (folder / "policy.toml").write_text(f"{policy}\n{line}\n", "utf-8")
        run = fire.submit()
        status = fire.wait(run, lambda status: "approval.required" in status.sites.get("仁济医院", ""))
        assert {name: word for name, word in status.sites.items() if name != "仁济医院"} == {
            name: "ready" for name in fire.consortium.sites if name != "仁济医院"
        }
        assert not is_in(status, "round", 0)
        plan = fire.scenario.plan.digest
        roster = open_site(folder).signed_roster.roster.digest().hex()
        signed = sign_approval(
            load_key(tmp_path / "officer.pem", None), plan, roster, site="仁济医院", person="张伟", at=int(time.time())
        )
        ask(folder / "run", "officer", "approve", signed)
        fire.finish(run)
        assert ("approved", "张伟") in [(kind, detail.get("person")) for kind, detail in audit_kinds(folder)]
