"""The benchmark of real daemons: its arithmetic, the plan it plays, and (slow) that its parts run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "deployment.py"


@pytest.fixture(autouse=True)
def beside_the_script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def phase(name, number, t):
    return {"event": "phase", "phase": name, "round": number, "t": t}


EVENTS = [
    phase("plan", 1, 0.0),
    phase("shares", 1, 1.0),
    phase("round", 1, 2.0),
    {"event": "reply", "phase": "round", "round": 1, "t": 3.0},
    phase("unmask", 1, 9.0),
    phase("round", 2, 10.0),
    phase("unmask", 2, 13.0),
    phase("round", 3, 14.0),
    phase("unmask", 3, 18.0),
    phase("close", 4, 20.0),
    phase("release", 4, 21.0),
    {"event": "finished", "t": 23.0},
]


def test_a_round_lasts_until_the_requests_of_the_next_and_the_first_is_left_out():
    from deployed import round_seconds

    assert round_seconds(EVENTS) == [4.0, 6.0]


def test_an_exchange_lasts_until_the_next_one():
    from deployed import phase_seconds

    assert phase_seconds(EVENTS) == {
        "plan": [1.0],
        "shares": [1.0],
        "round": [7.0, 3.0, 4.0],
        "unmask": [1.0, 1.0, 2.0],
        "close": [1.0],
        "release": [2.0],
    }


@pytest.mark.parametrize("values", [1_000, 20_000, 2_200_000, 75_000_000])
def test_an_update_has_as_many_values_as_were_asked_for(values):
    from deployed import LAYERS, rank_for, width_for

    assert LAYERS * rank_for(values) * width_for(values) == pytest.approx(values, rel=0.05)


def test_figures_are_sorted_by_role():
    from deployed import by_role

    assert by_role({7: 0.1, 8: 0.3, 9: 2.0}, {7: "site", 8: "site", 9: "superlink"}) == {
        "site": [0.3, 0.1],
        "superlink": [2.0],
    }


def test_cpu_of_a_round_counts_from_the_second_one_on():
    import deployment

    class Made:
        def roles(self):
            return {7: "site", 8: "site"}

    marks = [{7: 0.0, 8: 0.0}, {7: 5.0, 8: 1.0}, {7: 6.0, 8: 2.0}, {7: 9.0, 8: 3.0}]
    assert deployment._cpu_a_round(Made(), marks) == {"site": 3.0}


@pytest.mark.parametrize("options", [("--sites", "2"), ("--values", "0"), ("--only", "nothing"), ("--repeats", "0")])
def test_sizes_that_make_no_sense_are_refused(options):
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert not done.stdout


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("part", ["memory", "idle", "cohort", "large"])
def test_a_part_runs_and_leaves_nothing(part, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path.parent))  # short: sockets lie in it
    before = set(tmp_path.parent.iterdir())
    command = [sys.executable, str(SCRIPT), "--only", part, "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["figure"] == part
    assert set(tmp_path.parent.iterdir()) == before
