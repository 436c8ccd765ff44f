"""A few of the kills of benchmarks/ledger_kills.py, in a process of its own: it forks."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ledger_kills.py"


def test_no_kill_loses_or_doubles_a_spend():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--trials", "25", "--seed", "7", "--longest", "0.2", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["trials"], told["lost"], told["doubled"], told["moved"]) == (25, 0, 0, 0)
    assert told["confirmed"] > 0, "else nothing was tested"
