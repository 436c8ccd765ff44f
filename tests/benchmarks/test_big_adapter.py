import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """The script as a module, to call its parts here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import big_adapter

    return big_adapter


def test_a_small_adapter_is_measured_and_its_sum_is_right(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "big_adapter.py"), "--values", "200000"]
    command += ["--sites", "2", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(figures.read_text("utf-8"))
    assert (result["values"], result["sites"], result["digits_per_slot"], result["right"]) == (200_000, 2, 3, True)
    assert result["ciphertexts"] == 17
    assert result["bytes_up"] == pytest.approx(17 * 4096 * 7.8, rel=0.02)
    assert result["bytes_down"] == pytest.approx(2 * result["bytes_up"], rel=0.02)
    assert set(result["site_seconds"]) == {"encode", "tag", "mask", "encrypt", "write", "read", "decrypt", "apply"}
    assert 0 < result["site_up_peak_mb"] < 50
    assert 0 < result["coordinator_peak_mb"] < 50
    assert result["met"]["site_up_peak_mb"] is True
    assert "the sum: as sent" in done.stdout
    assert "site: encode" in done.stdout


@pytest.mark.parametrize(
    ("changed", "values", "status"),
    [({}, 40_000_000, 0), ({"right": False}, 1000, 1), ({"missed": True}, 40_000_000, 1), ({"missed": True}, 1000, 0)],
    ids=["met", "wrong-sum", "missed", "missed-but-small"],
)
def test_the_exit_status_says_whether_sum_and_figures_are_right(script, monkeypatch, capsys, changed, values, status):
    peaks = dict.fromkeys((*script.UP, *script.DOWN, *script.ADDING), 1.0)
    result = {
        "values": values,
        "vector_mb": 1.0,
        "sites": 3,
        "bits": 13,
        "digits_per_slot": 3,
        "ciphertexts": 1,
        "bytes_up": 1,
        "bytes_down": 2,
        "site_seconds": peaks,
        "coordinator_seconds": peaks,
        "site_peaks_mb": peaks,
        "coordinator_peaks_mb": peaks,
        "site_up_peak_mb": 1001.0 if changed.get("missed") else 1000.0,
        "coordinator_ciphertexts": 2.0,
        "coordinator_uploads": 4.0,
        "coordinator_kept_uploads": 2.0,
        "right": changed.get("right", True),
    }
    monkeypatch.setattr(script, "measure", lambda _: {**result, "met": script._is_met(result)})
    assert script.main(["--values", str(values)]) == status
    told = capsys.readouterr().out
    assert ("missed" in told) is bool(changed.get("missed"))
    assert ("NOT what the sites sent" in told) is ("right" in changed)


@pytest.mark.parametrize("options", [("--values", "0"), ("--sites", "1"), ("--sites", "9")])
def test_rounds_that_make_no_sense_are_refused(script, capsys, options):
    with pytest.raises(SystemExit):
        script.main(list(options))
    assert "wanted" in capsys.readouterr().err


def test_the_coordinator_loads_nothing_that_decrypts():
    code = "import sys, big_adapter, adding_side; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=BENCHMARKS)
    assert not {"fedseek.he.keys", "fedseek.identity.keys", "big_site", "torch"} & set(done.stdout.split())
