"""``fedseek consortium up``: real daemons leave what a simulation leaves, agree with it, and are all taken down."""

import json
import os
import signal
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import psutil
import pytest
from marked_command import Command

from fedseek.daemon.reports import read_events
from fedseek.errors import FedseekError, InvalidPlan, PlanRefused
from fedseek.plan import check_plan, parse_spec
from fedseek_server.consortium import open_consortium
from fedseek_server.orders import Status
from fedseek_site.config import load_config, read_site_data
from fedseek_site.policy import check_policy, load_policy
from simulations.consortium import check_released, prepare
from simulations.daemons import Daemon, end_all, is_alive
from simulations.enrolling import to_toml
from simulations.run_folder import create_run_folder
from simulations.scenario import load_scenario
from simulations.scenario import read_site_data as read_scenario_data
from simulations.summary import Summary

NAMES = ["北岸银行", "harbour-bank", "仁济医院", "st-anna"]
# Nats. Training takes 0.14 and more off every loss. Of the hospitals' losses only that they fall can be told: the order of a
# batch is drawn anew, and where a gradient is almost zero, as theirs is, Adam makes whole steps of what rounding leaves of it.
BANK_LOSS_TOLERANCE = 0.002


@pytest.fixture
def scratch():
    """Where temporary files go. Short: sockets have paths of at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.fixture
def prepared(write_tiny_scenario, scratch, tmp_path):
    """The consortium of a scenario, enrolled and not started."""

    def make(**changes):
        file = write_tiny_scenario(**changes)
        scenario = load_scenario(file)
        return scenario, prepare(scratch, create_run_folder(file, scenario, tmp_path / "运行", rounds=None), scenario)

    return make


# What is written ------------------------------------------------------------------------------------------------------


def test_a_site_is_given_its_part_of_the_data_and_no_other(prepared):
    scenario, made = prepared()
    for site in scenario.spec.sites:
        folder = made.folders[site.name]
        own = read_site_data(folder, load_config(folder).data)
        wanted = read_scenario_data(scenario, site)
        assert (own.train, own.held_back) == (wanted.train, wanted.held_back)


@pytest.mark.parametrize("private", [False, True])
def test_each_policy_permits_the_plan_and_nothing_beyond_it(prepared, tiny_plan_document, private):
    scenario, made = prepared(private=private)
    roster = made_roster(made)

    def check(plan, name):
        policy = load_policy(made.folders[name] / "policy.toml")
        check_policy(policy, plan, roster, site=name, total_epsilon_after=plan.spec.privacy.epsilon or 0.0)

    beyond = {
        "limits.max_rounds": {"training": {"rounds": 3}},
        "tasks.metrics": {"kinds": {"bank": {"labels": ["欺诈", "正常"], "metric": "auc"}}},
        "models.allowed": {"model": {"sha256": "0" * 64}},
        "required.min_colluders": {"cohort": {"colluders": 0}},
    }
    for name in NAMES:
        check(scenario.plan, name)
    for rule, changes in beyond.items():
        with pytest.raises(PlanRefused) as refused:
            check(check_plan(parse_spec(tiny_plan_document(private=private, **changes))), "北岸银行")
        assert rule in f"{refused.value.rule} {refused.value.hint}"


def made_roster(made):
    return open_consortium(made.home).signed_roster.roster


def test_everything_with_a_key_in_it_is_for_this_account_alone(prepared):
    _, made = prepared()
    files = [path for path in made.scratch.rglob("*") if path.is_file()]
    assert files
    assert {path.stat().st_mode & 0o077 for path in (*files, made.home, *made.folders.values())} == {0}


def test_a_site_that_is_to_be_away_is_refused(write_tiny_scenario, scratch, tmp_path):
    file = write_tiny_scenario()
    file.write_text(file.read_text("utf-8").replace('name = "st-anna"\n', 'name = "st-anna"\naway = [1]\n'), "utf-8")
    with pytest.raises(InvalidPlan, match=r"sites\.st-anna\.away"):
        prepare(scratch, tmp_path, load_scenario(file))


def test_toml_holds_what_was_given():
    document = {"a": 1, "b": {"names": ["客户", '"\n'], "c": {"d": 1e-5}}, "e": False}
    assert tomllib.loads(to_toml(document)) == document


# Processes ------------------------------------------------------------------------------------------------------------


def test_a_daemon_that_ended_says_so_with_its_last_lines_and_code(tmp_path):
    program = "import sys; print('磁盘满了'); sys.exit(8)"
    daemon = Daemon("北岸银行", (sys.executable, "-c", program), tmp_path / "log")
    daemon.start()
    daemon.process.wait()
    assert not daemon.is_running
    assert "ended with 8" in daemon.failure().message
    assert "磁盘满了" in daemon.failure().message
    assert daemon.failure().exit_code == 8
    assert end_all([daemon]) == []


def test_a_daemon_that_does_not_listen_is_killed_with_its_children(tmp_path):
    program = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'], start_new_session=True); "
        "print('up', flush=True); time.sleep(99)"
    )
    daemon = Daemon("顽固", (sys.executable, "-c", program), tmp_path / "log")
    daemon.start()
    limit = time.monotonic() + 20
    while "up" not in daemon.tail() and time.monotonic() < limit:
        time.sleep(0.05)
    (child,) = psutil.Process(daemon.pid).children()
    assert end_all([daemon], grace=0.3) == ["顽固"]
    assert not is_alive(child)


@pytest.mark.parametrize(("code", "exit_code"), [("AdapterDiverged", 4), ("CohortTooSmall", 6), ("", 1)])
def test_a_run_that_failed_has_the_exit_code_of_its_error(code, exit_code):
    with pytest.raises(FedseekError) as failed:
        check_released(Status(run="r", state="failed", code=code, text="两处不同", hint="看日志"))
    assert failed.value.exit_code == exit_code
    assert "两处不同" in failed.value.message


# The whole ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_daemons_leave_what_a_simulation_leaves_and_agree_with_it(write_tiny_scenario, scratch, tmp_path):
    scenario = write_tiny_scenario(training={"sampling_probability": 1.0, "rounds": 2})  # every step sees every record
    summaries, names = {}, {}
    for words in ("consortium up", "simulate"):
        out = tmp_path / words.replace(" ", "-")
        command = Command([*words.split(), scenario, "--out", out, "--json"], scratch)
        returncode, told, err = command.finish(timeout=400)
        assert returncode == 0, err
        assert command.left_behind() == []
        assert list(scratch.iterdir()) == []
        (line,) = told.splitlines()
        (folder,) = out.iterdir()
        summaries[words] = Summary.model_validate_json(line)
        names[words] = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".log"}
        adapters = {path.read_bytes() for path in folder.rglob("adapter_model.safetensors")}
        assert len(adapters) == 1, "the coordinator and all sites release the same adapter"
        assert len([*folder.rglob("adapter_model.safetensors")]) == 1 + len(NAMES)
        assert [e["event"] for e in read_events(folder / "coordinator.jsonl")][-1] == "finished"
    assert names["consortium up"] == {*names["simulate"], "release/audit-heads.json"}, (
        "daemons keep audit records besides"
    )
    check_agreement(summaries["consortium up"], summaries["simulate"])


def check_agreement(real, simulated):
    """What seeds decide is equal: data, model, first values. Rounding is drawn anew, so training agrees but for that."""
    for name in ("plan_digest", "model", "sites", "encryption", "privacy", "versions", "scenario"):
        assert getattr(real, name) == getattr(simulated, name), name
    assert real.totals.plain_float32_bytes == simulated.totals.plain_float32_bytes
    assert real.release.trainable_values == simulated.release.trainable_values
    assert real.release.guards_passed == simulated.release.guards_passed
    kinds = {site.name: site.kind for site in real.sites}
    for ours, theirs in zip(real.rounds, simulated.rounds, strict=True):
        for site, other in zip(ours.sites, theirs.sites, strict=True):
            assert (site.site, site.metric, site.epsilon) == (other.site, other.metric, other.epsilon)
            if ours.round == 0 or kinds[site.site] == "bank":
                assert site.loss == pytest.approx(other.loss, abs=BANK_LOSS_TOLERANCE if ours.round else 1e-6)
            assert site.bytes_up == pytest.approx(other.bytes_up, rel=0.01)  # the same ciphertexts, of other randomness
    for first, final in zip(real.rounds[0].sites, real.final.sites, strict=True):
        assert final.loss < first.loss - 0.1


@pytest.mark.slow
def test_a_site_that_refuses_ends_everything_with_its_rule(write_tiny_scenario, scratch, tmp_path):
    rows = [{"text": f"汇款 {n}", "label": ("欺诈", "正常")[n % 2], "unit": f"客{n}"} for n in range(200)]
    scenario = write_tiny_scenario(private=True, privacy={"delta": 0.009}, rows={"北岸银行": rows})  # 1/n is 0.005
    command = Command(["consortium", "up", scenario, "--out", tmp_path / "运行"], scratch)
    returncode, out, err = command.finish(timeout=400)
    assert returncode == 3, err
    assert out == ""
    assert "北岸银行" in err
    assert "delta 0.009 is not below 1 / number of units of this site" in " ".join(err.split())
    assert "Traceback" not in err
    assert command.left_behind() == []
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_is_ended_no_process_is_left(write_tiny_scenario, scratch, tmp_path, number):
    command = Command(
        ["consortium", "up", write_tiny_scenario(training={"rounds": 500}), "--out", tmp_path / "运行"], scratch
    )
    wait_for_report(command, tmp_path / "运行")
    assert len(command.alive()) == 1 + 2 * (1 + len(NAMES)), "the command, and each daemon with its child"
    os.kill(command.process.pid, number)
    returncode, _, err = command.finish(timeout=60)
    assert returncode == (-number if number == signal.SIGKILL else 130)
    assert "Traceback" not in err
    assert command.left_behind(patience=15.0) == []
    if number != signal.SIGKILL:  # nobody is left to clear up after that
        assert list(scratch.iterdir()) == []


def wait_for_report(command, out, timeout=300):
    """Until a site has taken part in a round."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert command.process.poll() is None, command.finish(timeout=400)
        for path in out.glob("*/sites/*/report.jsonl"):
            if any(json.loads(line)["event"] == "round" for line in path.read_text("utf-8").splitlines(keepends=False)):
                return
        time.sleep(0.2)
    raise TimeoutError("no site took part in a round")
