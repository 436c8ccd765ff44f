import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "secure_aggregation.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("bits", "sites", "up_limit"), [(13, 8, 2.7), (8, 16, 2.1)])
def test_json_ends_in_one_line_that_meets_the_byte_targets(bits, sites, up_limit):
    output = run("--values", "600000", "--sites", str(sites), "--bits", str(bits), "--json")
    result = json.loads(output.splitlines()[-1])
    assert result["exact"] is True
    assert result["within_bound"] is True
    assert result["up_bytes_per_value"] <= up_limit
    assert result["down_bytes_per_value"] <= 2 * result["up_bytes_per_value"]
    measured = ("encode_encrypt_s", "add_s_per_site", "decrypt_decode_s", "peak_rss_mb", "server_peak_rss_mb")
    assert all(result[name] > 0 for name in measured)


def test_table_and_help_are_readable():
    assert "up_bytes_per_value" in run("--values", "5000", "--sites", "2")
    assert "example:" in run("--help")
