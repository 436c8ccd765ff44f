import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedseek.daemon import reports as events_module
from fedseek.daemon.reports import EventLog, peak_rss_mb, read_events
from fedseek.plan import plan_from_canonical
from simulations.events import EventTail, coordinator_log, site_log
from simulations.run_folder import create_run_folder, open_scenario, synthetic_folder
from simulations.scenario import load_scenario

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "simulations" / "scenarios" / "demo.toml"


@pytest.fixture(scope="module")
def demo():
    return load_scenario(DEMO, rounds=1)


@pytest.fixture
def small_demo(tmp_path):
    """The demo's scenario with few records, under a name in Chinese."""
    path = tmp_path / "演示.toml"
    path.write_text(DEMO.read_text("utf-8").replace("records_per_site = 600", "records_per_site = 50"), "utf-8")
    return path


# --- the run folder


def test_a_run_folder_has_what_the_engine_reads(demo, small_demo, tmp_path):
    scenario = load_scenario(small_demo, rounds=1)
    folder = create_run_folder(small_demo, scenario, tmp_path / "runs" / "新", rounds=1)
    assert folder.parent == tmp_path / "runs" / "新"
    assert folder.name.startswith("演示-20")
    assert (folder / "scenario.toml").read_bytes() == small_demo.read_bytes()
    assert plan_from_canonical((folder / "plan.json").read_bytes()) == scenario.plan
    for site in scenario.spec.sites:
        for file in ("train.jsonl", "held_back.jsonl"):
            assert (folder / "data" / site.name / file).is_file()
    assert synthetic_folder(folder) == folder / "data"


def test_the_scenario_of_a_run_folder_is_the_one_that_was_played_rounds_and_name_included(small_demo, tmp_path):
    scenario = load_scenario(small_demo, rounds=1)
    folder = create_run_folder(small_demo, scenario, tmp_path, rounds=1)
    small_demo.write_text("changed afterwards", "utf-8")
    opened = open_scenario(folder)
    assert (opened.name, opened.plan, opened.spec) == ("演示", scenario.plan, scenario.spec)
    assert opened.plan.spec.training.rounds == 1


def test_a_run_folder_is_never_used_twice(demo, tmp_path, monkeypatch):
    no_data = type(demo)(demo.name, demo.spec.model_copy(update={"synthetic": None}), demo.plan)
    folders = [create_run_folder(DEMO, no_data, tmp_path, rounds=None) for _ in range(4)]
    assert len(set(folders)) == 4
    assert {folder.name[: len("demo-20260101-000000")].count("-") for folder in folders} == {2}
    assert synthetic_folder(folders[0]) is None


def test_the_places_of_the_logs():
    assert site_log(Path("r"), "仁济医院") == Path("r/sites/仁济医院/report.jsonl")
    assert coordinator_log(Path("r")) == Path("r/coordinator.jsonl")


# --- the event log


AWKWARD = "第一行\n第二行\r\u2028\u2029\x85\x0b 完"


def test_events_come_back_in_order_with_their_time_whatever_their_text(tmp_path):
    log = EventLog(tmp_path / "deep" / "er" / "a.jsonl")
    log.write({"event": "refused", "text": AWKWARD})
    log.write({"event": "data", "records": 3})
    first, second = read_events(tmp_path / "deep" / "er" / "a.jsonl")
    assert (first["event"], first["text"]) == ("refused", AWKWARD)
    assert (second["event"], second["records"]) == ("data", 3)
    assert 1.7e9 < first["t"] <= second["t"]


def test_a_log_that_does_not_exist_has_no_events(tmp_path):
    assert list(read_events(tmp_path / "none.jsonl")) == []
    assert EventTail(tmp_path / "none.jsonl").read_new() == []


def test_a_log_is_appended_to_and_never_cut(tmp_path):
    for number in range(2):
        EventLog(tmp_path / "a.jsonl").write({"event": "data", "number": number})
    assert [event["number"] for event in read_events(tmp_path / "a.jsonl")] == [0, 1]


def test_steps_are_thinned_out_but_the_last_of_a_round_is_kept(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(events_module.time, "time", lambda: now[0])
    log = EventLog(tmp_path / "a.jsonl")
    for step in range(1, 101):
        now[0] += 0.01
        log.write({"event": "step", "round": 1, "step": step, "of": 100})
    steps = [event["step"] for event in read_events(tmp_path / "a.jsonl")]
    assert steps[0] == 1
    assert steps[-1] == 100
    assert 4 <= len(steps) <= 6


def test_other_events_are_never_thinned_out(tmp_path):
    log = EventLog(tmp_path / "a.jsonl")
    for number in range(50):
        log.write({"event": "utility", "round": number})
    assert len(list(read_events(tmp_path / "a.jsonl"))) == 50


# --- the tail


def test_a_tail_gives_each_event_once_and_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    tail = EventTail(path)
    assert tail.read_new() == []
    line = json.dumps({"event": "甲", "text": "\u2028"}, ensure_ascii=False).encode()
    path.write_bytes(line + b"\n" + line[:9])
    assert [event["event"] for event in tail.read_new()] == ["甲"]
    assert tail.read_new() == []
    with path.open("ab") as stream:
        stream.write(line[9:])
    assert tail.read_new() == []  # the line is whole, its end is not there yet
    with path.open("ab") as stream:
        stream.write(b"\n" + line + b"\n")
    assert [event["text"] for event in tail.read_new()] == ["\u2028", "\u2028"]
    assert tail.read_new() == []


def test_a_tail_may_be_cut_inside_a_character(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = '{"event": "医院"}\n'.encode()
    tail, seen = EventTail(path), []
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        seen += tail.read_new()
    assert seen == [{"event": "医院"}]


def test_a_tail_follows_a_log_that_is_being_written(tmp_path):
    log, tail = EventLog(tmp_path / "a.jsonl"), EventTail(tmp_path / "a.jsonl")
    for number in range(3):
        log.write({"event": "data", "number": number})
        assert [event["number"] for event in tail.read_new()] == [number]


# --- memory


GROW = """
from fedseek.daemon.reports import peak_rss_mb
before = peak_rss_mb()
held = b"x" * 200_000_000
print(before, peak_rss_mb())
"""


def test_peak_memory_is_in_megabytes_and_a_processs_own():
    ballast = b"x" * 300_000_000  # what this process holds is no memory of the one it starts
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True, cwd=ROOT)
    before, after = map(float, done.stdout.split())
    assert after - before == pytest.approx(200, rel=0.1)
    assert before < 100 < len(ballast) / 1e6


def test_peak_memory_is_also_known_where_there_is_no_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(events_module, "PROC_STATUS", tmp_path / "none")
    assert peak_rss_mb() > 20
