"""`fedseek audit`: the table, the JSON line, the picture and the exit code, over records of real form."""

import json
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from test_canary_record import record

from fedseek.audit_command import audit_record, find_records
from fedseek.audit_picture import AuditBar, audit_picture
from fedseek.canary_record import write_canary_record
from fedseek.cli import cli
from fedseek.errors import ClaimRefuted, InvalidRecords


@pytest.fixture
def run_folder(tmp_path):
    """A simulation's folder with two sites."""

    def make(**claims: float | None):
        for site, claim in claims.items():
            folder = tmp_path / "run" / "sites" / site
            folder.mkdir(parents=True)
            write_canary_record(folder / "canary-audit.json", record(site=site, claim=claim))
        return tmp_path / "run"

    return make


def asked(*words):
    return CliRunner().invoke(cli, ["audit", *map(str, words)])


def test_a_claim_that_stands(run_folder):
    folder = run_folder(北岸银行=8.0, clinic=7.5)
    done = asked(folder)
    assert done.exit_code == 0, done.output
    assert "北岸银行" in done.output
    assert "not refuted" in done.output
    assert "does not prove" in done.output
    assert (folder / "canary-audit.svg").exists()


def test_a_claim_that_is_refuted_is_named_and_ends_the_command_with_five(run_folder):
    folder = run_folder(北岸银行=8.0, clinic=0.5)
    done = asked(folder, "--json")
    assert isinstance(done.exception, ClaimRefuted)
    assert done.exception.exit_code == 5
    assert "clinic" in done.exception.message
    assert "北岸银行" not in done.exception.message
    told = json.loads(done.output)
    assert [(each["site"], each["verdict"]) for each in told["sites"]] == [
        ("clinic", "REFUTED"),
        ("北岸银行", "not refuted"),
    ]
    bound = told["sites"][0]["every_round"]["epsilon_lower_bound"]
    assert bound == pytest.approx(record().every_round, abs=1e-4)
    assert 0.5 < bound <= told["sites"][0]["could_refute"] + 1e-9


def test_without_a_claim_the_bound_is_what_leaks(run_folder):
    done = asked(run_folder(clinic=None), "--json")
    assert done.exit_code == 0
    site = json.loads(done.output)["sites"][0]
    assert site["claim"] is None
    assert "no claim" in site["verdict"]


def test_one_file_and_a_site_s_own_folder_do_too(run_folder, tmp_path):
    own = run_folder(clinic=8.0) / "sites" / "clinic"
    assert asked(own).exit_code == 0
    picture = tmp_path / "图.svg"
    assert asked(own / "canary-audit.json", "--picture", picture).exit_code == 0
    assert picture.exists()


def test_nothing_to_audit_is_said(tmp_path):
    with pytest.raises(InvalidRecords, match=r"no canary-audit\.json"):
        find_records(tmp_path)


def test_the_picture_is_well_formed_and_says_what_the_table_says():
    bars = [
        AuditBar("<北岸银行>", "every round", 1.5, 60, 64, claim=1.0, could_refute=2.7),
        AuditBar("clinic", "released adapter", 0.0, 30, 64, claim=None, could_refute=2.7),
    ]
    drawn = audit_picture(bars)
    words = " ".join(each.text or "" for each in ET.fromstring(drawn).iter())  # noqa: S314  our own
    assert "<北岸银行>, every round" in words
    assert "1.50; 60 of 64 guesses right" in words
    assert drawn == audit_picture(bars)
    ET.fromstring(audit_picture([]))  # noqa: S314


def test_few_canaries_are_audited_too():
    few = replace(record(), coins=(True,), released_scores=(1.0,), round_scores=(1.0,), every_round=0.0)
    assert audit_record(few).could_refute == 0.0
    assert audit_record(few).verdict == "not refuted"
