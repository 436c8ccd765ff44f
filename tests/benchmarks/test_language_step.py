import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "language_step.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True).stdout


def test_a_tiny_model_is_timed_and_json_ends_in_one_line():
    result = json.loads(run("--tiny", "--turns", "2", "--threads", "1", "--json").splitlines()[-1])
    assert result["dp_over_plain"] > 0
    assert min(result["plain_tokens_per_s"], result["dp_tokens_per_s"]) > 0
    assert (result["turns"], result["threads"]) == (2, 1)
    assert 0 < result["trained_values"] < result["parameters"]
