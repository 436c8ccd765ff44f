"""A simulated run of sites that answer instructions, from files made on the spot: small model, two stages, report."""

import math
import tempfile
from pathlib import Path

import pytest
from marked_command import Command
from tiny_instruct import SITES, write_tiny_instruct

from fedseek.daemon.reports import read_events
from fedseek.lora.source import check_model, locate_model
from fedseek.plan import plan_from_canonical
from simulations.events import coordinator_log, site_log
from simulations.summary import load_summary

pytestmark = pytest.mark.slow

NAMES = [name for name, _, _ in SITES]


@pytest.fixture
def scratch():
    """Where temporary files go. Short: Ray's sockets have paths of at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


def test_sites_that_answer_leave_a_report_of_perplexity_and_no_answers(scratch, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scenario = write_tiny_instruct(tmp_path)
    command = Command(["simulate", scenario, "--out", tmp_path / "runs"], scratch)
    returncode, _, err = command.finish()
    assert returncode == 0, err
    assert "small model: step 6 of 6" in err.replace("\n", " ")
    (folder,) = (tmp_path / "runs").iterdir()
    plan = plan_from_canonical((folder / "plan.json").read_bytes())
    check_model(locate_model(plan.spec.model.source), plan.spec.model.sha256)
    summary = load_summary(folder / "summary.json")
    assert summary.plan_digest == plan.digest
    check_figures(summary)
    check_answers(folder, summary)
    check_report((folder / "report.html").read_text("utf-8"))


def check_figures(summary):
    assert [(stage.task, stage.first_round, stage.rounds) for stage in summary.stages] == [
        ("continue", 1, 1),
        (None, 2, 2),
    ]
    for entry in summary.rounds:
        assert {site.task for site in entry.sites} == {"instruct" if entry.round else "continue"}
        for site in entry.sites:
            assert site.perplexity == pytest.approx(math.exp(site.loss))
            assert 0 <= site.utility <= 1
    lines = summary.baselines
    assert {len(losses) for losses in lines.local_only_loss.values()} == {4}
    assert set(lines.local_only_loss) == set(lines.base_loss) == set(NAMES)
    assert lines.linear_probe is lines.dp_linear_probe is None
    assert next(verdict.claim for verdict in summary.verdicts).startswith("Federated perplexity below local-only")


def check_answers(folder, summary):
    assert [answers.site for answers in summary.answers] == NAMES
    for answers in summary.answers:
        assert answers.base.count == answers.adapter.count == 2
    own = [event for name in NAMES for event in read_events(site_log(folder, name)) if event["event"] == "sample"]
    assert own, "a site's own people see some answers"
    shared = (folder / "report.html").read_text("utf-8") + coordinator_log(folder).read_text("utf-8")
    assert not [event for event in own if event["prompt"] in shared]


def check_report(page):
    assert "Perplexity by round" in page
    assert "base model" in page
    assert "ROUGE-L" in page
    assert "Rounds 1 to 1 learn the next token" in page
