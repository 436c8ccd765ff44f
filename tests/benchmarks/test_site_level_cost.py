import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "site_level.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True).stdout


def test_noise_against_signal_is_what_the_parameters_say():
    result = json.loads(
        run("--sites", "4", "8", "--values", "400", "--epsilon", "20", "--agreement", "1", "--json").splitlines()[-1]
    )
    few, many = result["costs"]
    assert (few["sites"], many["sites"], few["honest"]) == (4, 8, 3)
    assert few["noise_to_signal"] > 1.5 * many["noise_to_signal"]
    for cost in (few, many):  # noise and mean are at right angles: the cosine follows from their ratio
        assert cost["cosine_of_a_round"] == pytest.approx((1 + cost["noise_to_signal"] ** 2) ** -0.5, abs=0.05)


def test_help_has_an_example():
    assert "example:" in run("--help").lower()
