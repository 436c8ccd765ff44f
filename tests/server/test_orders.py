"""Runs asked for lie in files: a daemon that is killed, or not running, loses none."""

import json

import pytest
from plan_documents import DOCUMENT

from fedseek.errors import FedseekError, InvalidPlan, Malformed
from fedseek.plan import check_plan, parse_spec
from fedseek_server.orders import RUNS, Status, all_runs, next_run, run_folder, submit


@pytest.fixture(scope="module")
def plan():
    return check_plan(parse_spec(DOCUMENT))


def test_an_order_is_there_at_once_and_holds_the_plan(tmp_path, plan):
    made = submit(tmp_path, plan, wait_seconds=60.0)
    assert made.plan() == plan
    assert made.order().wait_seconds == 60.0
    assert made.status() == Status(run=made.path.name, state="queued")
    assert next_run(tmp_path).path == made.path
    assert made.path.name.startswith(plan.spec.name)
    assert made.path.stat().st_mode & 0o077 == 0


def test_runs_come_in_the_order_they_were_asked_for(tmp_path, plan):
    names = ["z-first", "a-second", "m-third"]
    for name in names:
        submit(tmp_path, plan, wait_seconds=0, run=name)
    assert [each.path.name for each in all_runs(tmp_path)] == names
    for name in names:
        found = next_run(tmp_path)
        assert found.path.name == name
        found.write_status(Status(run=name, state="released"))
    assert next_run(tmp_path) is None


@pytest.mark.parametrize("state", ["queued", "waiting", "running"])
def test_a_run_that_is_not_over_is_taken_up_again(tmp_path, plan, state):
    made = submit(tmp_path, plan, wait_seconds=0, run="r")
    made.write_status(Status(run="r", state=state))
    assert next_run(tmp_path).path == made.path


def test_a_name_is_given_once(tmp_path, plan):
    submit(tmp_path, plan, wait_seconds=0, run="r")
    with pytest.raises(InvalidPlan, match="exists"):
        submit(tmp_path, plan, wait_seconds=0, run="r")


@pytest.mark.parametrize("name", ["../r", "R", "", " r", "r/s", "北", "r" * 129])
def test_a_name_that_is_no_folder_of_ours_is_refused(tmp_path, plan, name):
    if name == "":
        assert submit(tmp_path, plan, wait_seconds=0, run=name).path.parent == tmp_path / RUNS
        return
    with pytest.raises(InvalidPlan):
        submit(tmp_path, plan, wait_seconds=0, run=name)
    assert not list(tmp_path.rglob("order.json"))


def test_a_folder_without_an_order_is_not_an_order_yet(tmp_path, plan):
    made = submit(tmp_path, plan, wait_seconds=0, run="r")
    (made.path / "order.json").unlink()
    assert next_run(tmp_path) is None


def test_a_run_is_found_by_the_beginning_of_its_name(tmp_path, plan):
    for name in ("alpha-1", "alpha-2", "beta"):
        submit(tmp_path, plan, wait_seconds=0, run=name)
    assert run_folder(tmp_path, "b").path.name == "beta"
    assert run_folder(tmp_path, "alpha-1").path.name == "alpha-1"
    for unclear in ("alpha", "gamma"):
        with pytest.raises(FedseekError, match="wanted 1") as refused:
            run_folder(tmp_path, unclear)
        assert "alpha-2" in refused.value.hint


def test_stopping_leaves_a_mark_and_a_run_that_is_over_is_not_stopped(tmp_path, plan):
    made = submit(tmp_path, plan, wait_seconds=0, run="r")
    assert not made.is_to_stop
    made.ask_to_stop()
    assert made.is_to_stop
    made.write_status(Status(run="r", state="failed", code="CohortTooSmall"))
    with pytest.raises(FedseekError, match="failed already"):
        made.ask_to_stop()


@pytest.mark.parametrize("file", ["order.json", "status.json"])
@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"version": 2}', " " * (1 << 20) + "{}"])
def test_a_file_that_was_edited_is_refused_by_name(tmp_path, plan, file, text):
    made = submit(tmp_path, plan, wait_seconds=0, run="r")
    made.write_status(Status(run="r", state="running"))
    (made.path / file).write_text(text)
    with pytest.raises(Malformed, match=file):
        made.order() if file == "order.json" else made.status()


def test_a_status_is_replaced_whole(tmp_path, plan):
    made = submit(tmp_path, plan, wait_seconds=0, run="r")
    made.write_status(Status(run="r", state="waiting", sites={"北岸银行": "waiting: approval"}))
    told = json.loads((made.path / "status.json").read_text("utf-8"))
    assert told["sites"] == {"北岸银行": "waiting: approval"}
    assert told["updated_at"] > 1e9
    assert not list(made.path.glob(".status*"))
