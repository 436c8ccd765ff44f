import json
import os

import click
import pytest
from click.testing import CliRunner

from fedseek.daemon.asking import read_passphrase, require_compared, show_ages
from fedseek.errors import CustodyError, InvalidConfig, TooLarge, WrongKey
from fedseek.identity.enrolment import Age
from fedseek.identity.secret_files import write_secret_file
from fedseek.identity.words import fingerprint_words

DIGEST = bytes(range(32))


def test_the_environment_is_rid_of_the_passphrase(monkeypatch):
    monkeypatch.setenv("FEDSEEK_PASSPHRASE", "密码短语")
    assert read_passphrase(None) == "密码短语"
    assert "FEDSEEK_PASSPHRASE" not in os.environ
    assert read_passphrase(None) is None


def test_the_first_line_of_the_file_goes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSEEK_PASSPHRASE", "other")
    write_secret_file(tmp_path / "p", "密码 短语\r\nsecond".encode())
    assert read_passphrase(tmp_path / "p") == "密码 短语"
    assert "FEDSEEK_PASSPHRASE" not in os.environ


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"", CustodyError), (b"\nx", CustodyError), (b"\xff", InvalidConfig), (b"x" * 5000, TooLarge)],
)
def test_files_without_a_passphrase_are_refused(tmp_path, content, error):
    write_secret_file(tmp_path / "p", content)
    with pytest.raises(error):
        read_passphrase(tmp_path / "p")


def test_a_passphrase_file_that_others_may_read_is_refused(tmp_path):
    (tmp_path / "p").write_text("secret")
    (tmp_path / "p").chmod(0o640)
    with pytest.raises(CustodyError, match="0600"):
        read_passphrase(tmp_path / "p")


@click.command()
@click.option("--given")
def compare(given):
    require_compared(DIGEST, whose="北岸银行", given=given)
    click.echo("went on")


@pytest.mark.parametrize(
    ("answers", "goes_on"), [("y\n", True), ("yes\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_only_a_yes_goes_on(answers, goes_on):
    result = CliRunner().invoke(compare, input=answers)
    assert ("went on" in result.output) is goes_on
    assert DIGEST.hex() in result.output
    assert "北岸银行" in result.output


def test_a_fingerprint_that_was_given_needs_no_yes_but_must_be_right():
    assert "went on" in CliRunner().invoke(compare, ["--given", fingerprint_words(DIGEST)]).output
    result = CliRunner().invoke(compare, ["--given", bytes(32).hex()], input="y\n")
    assert isinstance(result.exception, WrongKey)
    assert "went on" not in result.output


def test_ages_are_shown_as_a_table_or_as_json(capsys):
    ages = [Age("CA", 3, 10), Age("key of 北岸银行", 3, None), Age("old", 100, -1)]
    show_ages(ages, as_json=True)
    assert json.loads(capsys.readouterr().out)[1] == {"what": "key of 北岸银行", "days_old": 3, "days_left": None}
    show_ages(ages, as_json=False)
    assert "expired" in capsys.readouterr().out
