import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner
from enrolled import node_public_key

from fedseek.errors import CustodyError, Malformed, WrongKey
from fedseek.identity.enrolment import make_request, parse_join_file
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.words import parse_fingerprint, words_of
from fedseek_server.consortium import open_consortium
from fedseek_server.enrol_commands import admit, init, keys, revoke, roster

PASSPHRASE = "联合体的密码短语共十二个字以上"  # noqa: S105
BANK = SiteIdentity.generate("北岸银行", "bank")
WORDS = words_of(BANK.public())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSEEK_PASSPHRASE", raising=False)
    Path("request.json").write_bytes(make_request(BANK, node_public_key(), 1_800_000_000).to_bytes())
    return tmp_path


def run(command, *arguments, answers="", env=None):
    return CliRunner().invoke(command, arguments, input=answers, env=env)


def ok(command, *arguments, answers="", env=None) -> str:
    result = run(command, *arguments, answers=answers, env=env)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(command, *arguments, answers="", error, env=None) -> str:
    result = run(command, *arguments, answers=answers, env=env)
    assert isinstance(result.exception, error), (result.output, result.exception)
    return str(result.exception)


def made(**env) -> None:
    ok(init, "--name", "华东联合", "--host", "localhost", "--host", "127.0.0.1", env=env or None)


@pytest.mark.parametrize("command", [init, admit, revoke, roster, keys])
def test_help_has_an_example(command):
    assert f"Example: fedseek-server {command.name}" in ok(command, "--help")


def test_init_makes_a_consortium_and_shows_the_words():
    told = json.loads(ok(init, "--name", "华东联合", "--host", "localhost", "--port", "9444", "--json"))
    assert told["address"] == "localhost:9444"
    assert parse_fingerprint(told["words"]).hex() == told["authority"]
    assert open_consortium(Path("consortium")).name == "华东联合"


def test_init_tells_that_there_is_no_passphrase_and_sites_dial_the_first_host():
    told = ok(init, "--name", "x", "--host", "::1", "--host", "localhost")
    assert "have no passphrase" in told
    assert "[::1]:9443" in told


@pytest.mark.parametrize("arguments", [["--name", "x"], ["--host", "x"], ["--name", "x", "--host", "x", "--port", "0"]])
def test_init_says_what_is_missing(arguments):
    assert run(init, *arguments).exit_code == 2


def test_admit_shows_words_and_hexadecimal_and_asks(here):
    made()
    told = ok(admit, "request.json", answers="y\n")
    assert "'北岸银行' (bank)" in told
    shown = told.split("fingerprint of 北岸银行:")[1]
    assert parse_fingerprint("".join(shown.splitlines()[1:5])) == BANK.public().digest()
    assert BANK.public().digest().hex() in shown
    join = parse_join_file((here / "北岸银行-join.json").read_bytes())
    assert join.signed_roster().roster.names == ("北岸银行",)
    assert stat.S_IMODE((here / "北岸银行-join.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("answers", ["", "n\n", "\n"])
def test_nobody_is_admitted_who_was_not_compared(here, answers):
    made()
    result = run(admit, "request.json", answers=answers)
    assert result.exit_code == 1
    assert open_consortium(Path("consortium")).signed_roster.members == ()
    assert not list(here.glob("*join*"))


@pytest.mark.parametrize(
    "given", [WORDS, WORDS.upper().replace("-", " "), BANK.public().fingerprint()], ids=["words", "shouted", "hex"]
)
def test_a_fingerprint_that_is_given_is_compared_by_the_program(here, given):
    made()
    ok(admit, "request.json", "--fingerprint", given, "--out", "加入.json")
    assert (here / "加入.json").exists()


def test_another_fingerprint_is_refused():
    made()
    other = words_of(SiteIdentity.generate("北岸银行", "bank").public())
    assert "not the one given" in refused(admit, "request.json", "--fingerprint", other, error=WrongKey)
    refused(admit, "request.json", "--fingerprint", WORDS[:-6], error=Malformed)
    assert run(admit, "request.json", "--yes").exit_code == 2
    assert open_consortium(Path("consortium")).signed_roster.members == ()


def test_a_file_that_is_no_request_is_refused(here):
    made()
    refused(admit, "nothing.json", error=CustodyError)
    (here / "x.json").write_text("{}")
    refused(admit, "x.json", error=Malformed)
    refused(admit, str(here), error=CustodyError)


def test_revoke_asks_and_takes_a_site_off():
    made()
    ok(admit, "request.json", "--fingerprint", WORDS)
    assert run(revoke, "北岸银行", answers="n\n").exit_code == 1
    assert len(open_consortium(Path("consortium")).signed_roster.members) == 1
    ok(revoke, "北岸银行", answers="y\n")
    assert open_consortium(Path("consortium")).signed_roster.members == ()
    refused(revoke, "北岸银行", "--yes", error=WrongKey)


def test_roster_lists_sites():
    made()
    ok(admit, "request.json", "--fingerprint", WORDS)
    told = json.loads(ok(roster, "--json"))
    held = open_consortium(Path("consortium")).signed_roster
    assert (told["number"], told["digest"], told["consortium"]) == (1, held.digest().hex(), "华东联合")
    (site,) = told["sites"]
    assert (site["name"], site["kind"], site["words"]) == ("北岸银行", "bank", WORDS)
    assert site["days_left"] in (89, 90)
    shown = ok(roster)
    assert "北岸银行" in shown
    assert WORDS.split()[0] in shown


def test_keys_tell_their_age():
    made()
    ages = {each["what"]: each for each in json.loads(ok(keys, "--json"))}
    assert ages["server certificate"]["days_left"] in (89, 90)
    assert "CA certificate" in ok(keys)


def test_a_passphrase_comes_from_a_file_or_the_environment_and_is_needed_to_sign(here):
    made(FEDSEEK_PASSPHRASE=PASSPHRASE)
    refused(admit, "request.json", "--fingerprint", WORDS, error=CustodyError)
    path = here / "passphrase"
    path.write_text(PASSPHRASE + "\n", "utf-8")
    path.chmod(0o644)
    refused(admit, "request.json", "--fingerprint", WORDS, "--passphrase-file", str(path), error=CustodyError)
    path.chmod(0o600)
    ok(admit, "request.json", "--fingerprint", WORDS, "--passphrase-file", str(path))
    ok(roster)
    refused(revoke, "北岸银行", "--yes", env={"FEDSEEK_PASSPHRASE": "wrong" * 5}, error=WrongKey)
