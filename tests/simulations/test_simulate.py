"""``fedseek simulate`` as a user runs it: what a run leaves behind, how it fails, and that it ends all it started."""

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from marked_command import Command
from peft import PeftModel
from transformers import AutoModel

from fedseek.daemon.reports import read_events
from simulations.summary import load_summary

pytestmark = pytest.mark.slow

NAMES = ["北岸银行", "harbour-bank", "仁济医院", "st-anna"]


@pytest.fixture
def scratch():
    """Where temporary files go. Short: Ray's sockets have paths of at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.fixture
def simulate(scratch, tmp_path):
    return lambda scenario, *options: Command(["simulate", scenario, "--out", tmp_path / "运行", *options], scratch)


def only_run(tmp_path):
    (folder,) = (tmp_path / "运行").iterdir()
    return folder


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_a_run_leaves_everything_that_was_promised_and_no_process(
    write_tiny_scenario, simulate, scratch, tmp_path, tiny_model
):
    scenario = write_tiny_scenario(simulation={"baselines": ["local_only"]})
    command = simulate(scenario, "--json")
    returncode, out, err = command.finish()
    assert returncode == 0, err
    assert command.left_behind() == []
    assert names_in(scratch) == set()
    folder = only_run(tmp_path)
    assert folder.name.startswith("两家银行-")
    check_summary(folder, out)
    check_releases(folder, tiny_model)
    check_reports(folder)
    assert "round 2 of 2: apply, train, mask, encrypt, add" in err


def check_summary(folder, out):
    (line,) = out.splitlines()  # one line of JSON and nothing else on standard output
    summary = load_summary(folder / "summary.json")
    assert json.loads(line)["plan_digest"] == summary.plan_digest
    assert json.loads(line) == json.loads((folder / "summary.json").read_text("utf-8"))
    assert [site.name for site in summary.sites] == NAMES
    assert [entry.round for entry in summary.rounds] == [0, 1, 2]
    assert {site.records for site in summary.sites} == {24}
    assert summary.privacy is None
    assert set(summary.baselines.local_only) == set(NAMES)
    assert summary.baselines.centralised is None
    metrics = [json.loads(text) for text in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [(entry["round"], entry["site"]) for entry in metrics] == [(r, name) for r in range(3) for name in NAMES]


def check_releases(folder, tiny_model):
    for release in (folder / "release", *(folder / "sites" / name / "release" for name in NAMES)):
        loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), str(release))
        moved = [tensor for name, tensor in loaded.named_parameters() if "lora_B" in name]
        assert len(moved) == 4
        assert all(tensor.any() for tensor in moved)
    adapters = {path.read_bytes() for path in folder.rglob("adapter_model.safetensors")}
    assert len(adapters) == 1, "the coordinator and all sites release the same adapter"
    assert {f"privacy-{name}.json" for name in NAMES} <= names_in(folder / "release")


def check_reports(folder):
    page = (folder / "report.html").read_text("utf-8")
    assert "北岸银行" in page
    events = list(read_events(folder / "coordinator.jsonl"))
    assert events[-1]["event"] == "finished"
    assert events[-1]["secret_key_type_loaded"] is False
    for name in NAMES:
        seen = [event["event"] for event in read_events(folder / "sites" / name / "report.jsonl")]
        assert seen.count("round") == seen.count("applied") == 2
        assert "refused" not in seen


def failed(command):
    returncode, out, err = command.finish()
    assert command.left_behind() == []
    assert out == ""
    assert "Traceback" not in err
    return returncode, " ".join(err.split())  # the console wraps lines


def test_a_site_that_refuses_the_plan_ends_the_run_with_its_rule(write_tiny_scenario, simulate, scratch, tmp_path):
    scenario = write_tiny_scenario(model={"sha256": "0" * 64})
    returncode, err = failed(simulate(scenario))
    assert returncode == 3
    assert "refused the plan: the base model here is not the one the plan names" in err
    folder = only_run(tmp_path)
    assert not (folder / "release").exists()
    assert not (folder / "summary.json").exists()
    assert names_in(scratch) == set()


def test_a_delta_of_one_in_the_number_of_units_is_refused_by_the_site(write_tiny_scenario, simulate, tmp_path):
    rows = [{"text": f"汇款 {n}", "label": ("欺诈", "正常")[n % 2], "unit": f"客{n}"} for n in range(200)]
    scenario = write_tiny_scenario(private=True, privacy={"delta": 0.009}, rows={"北岸银行": rows})  # 1/n is 0.005
    returncode, err = failed(simulate(scenario))
    assert returncode == 3
    assert "delta 0.009 is not below 1 / number of units of this site" in err
    assert not (only_run(tmp_path) / "release").exists()


def test_a_data_file_that_is_not_there(write_tiny_scenario, simulate, tmp_path):
    scenario = write_tiny_scenario()
    (tmp_path / "数据" / "harbour-bank.csv").unlink()
    returncode, err = failed(simulate(scenario))
    assert returncode == 4
    assert "harbour-bank.csv: no such file" in err


def test_a_label_that_the_plan_does_not_name(write_tiny_scenario, simulate):
    rows = [{"text": "汇款", "label": "未知标签", "unit": "客1"}]
    returncode, err = failed(simulate(write_tiny_scenario(rows={"harbour-bank": rows})))
    assert returncode == 4
    assert "1 label(s) not in the plan: '未知标签'" in err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cohort": {"max_sites": 3}}, "sites: got 4, wanted 3 to 3 (plan.cohort)"),
        ({"training": {"rounds": 0}}, "training.rounds"),
        ({"simulation": {"worker": 2}}, "simulation.worker"),
    ],
)
def test_a_scenario_that_cannot_be_run(write_tiny_scenario, simulate, tmp_path, options, problem):
    returncode, err = failed(simulate(write_tiny_scenario(**options)))
    assert returncode == 3
    assert problem in err
    assert not (tmp_path / "运行").exists()


def test_a_scenario_file_that_is_not_there(simulate, tmp_path):
    returncode, err = failed(simulate(tmp_path / "无.toml"))
    assert returncode == 3
    assert "无.toml: 1 problem - no such file hint: check the path" in err.replace("fedseek: ", "")


def test_ctrl_c_ends_every_process_and_leaves_no_release(write_tiny_scenario, simulate, scratch, tmp_path):
    command = simulate(write_tiny_scenario(training={"rounds": 1000}))
    wait_for_round(command, tmp_path)
    assert len(command.alive()) > 5, "Ray, the hosts and the engine are running"
    os.killpg(command.process.pid, signal.SIGINT)  # what a terminal does
    returncode, out, err = command.finish(timeout=120)  # seconds; a loaded machine takes its time
    assert (returncode, out) == (130, "")
    assert "fedseek: interrupted" in err
    assert "Traceback" not in err
    assert command.left_behind() == []
    assert names_in(scratch) == set()
    assert not (only_run(tmp_path) / "release").exists()


def wait_for_round(command, tmp_path, timeout=180):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert command.process.poll() is None, command.finish()
        for path in (tmp_path / "运行").glob("*/coordinator.jsonl"):
            if '"round": 2' in path.read_text("utf-8"):
                return
        time.sleep(0.1)
    raise TimeoutError("the run did not reach its second round")
