import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enrolled import CONSORTIUM, NOW, public_bytes

from fedseek.errors import CustodyError, Malformed, WrongKey
from fedseek.identity.authority import create_authority
from fedseek.identity.enrolment import make_join_file, parse_request
from fedseek.identity.signed_roster import Member, authority_digest, make_signed_roster
from fedseek.identity.words import fingerprint_words, parse_fingerprint
from fedseek_site.enrol import open_site
from fedseek_site.enrol_commands import init, join, keys, request

KEY = Ed25519PrivateKey.generate()
WORDS = fingerprint_words(authority_digest(public_bytes(KEY)))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSEEK_PASSPHRASE", raising=False)
    return tmp_path


def run(command, *arguments, answers="", env=None):
    return CliRunner().invoke(command, arguments, input=answers, env=env)


def ok(command, *arguments, answers="", env=None) -> str:
    result = run(command, *arguments, answers=answers, env=env)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def join_file(here):
    """A site that was made, and the join file for it."""
    ok(init, "--name", "北岸银行", "--kind", "bank")
    ok(request)
    entry = parse_request((here / "北岸银行-request.json").read_bytes()).entry
    roster = make_signed_roster(
        KEY,
        consortium=CONSORTIUM,
        number=1,
        members=[Member(entry, NOW, NOW + 90 * 86_400)],
        issued_at=NOW,
        previous=bytes(32),
    )
    ca = create_authority(here / "authority", name=CONSORTIUM, now=NOW).ca
    made = make_join_file(
        KEY, coordinator="fl.example.org:9443", ca=ca, coordinator_key=public_bytes(KEY), roster=roster
    )
    (here / "join.json").write_bytes(made.to_bytes())
    return made


@pytest.mark.parametrize("command", [init, request, join, keys])
def test_help_has_an_example(command):
    assert f"Example: fedseek-site {command.name}" in ok(command, "--help")


def test_the_words_of_init_request_and_file_are_the_same(here):
    shown = ok(init, "--name", "北岸银行", "--kind", "bank").splitlines()
    again = ok(request, "--out", "申请.json").splitlines()
    made = parse_request((here / "申请.json").read_bytes())
    for lines in (shown, again):
        assert parse_fingerprint("".join(lines[-5:-1])) == made.entry.digest()
        assert lines[-1].strip() == made.entry.digest().hex()


def test_a_site_is_made_once():
    ok(init, "--name", "北岸银行", "--kind", "bank")
    assert isinstance(run(init, "--name", "北岸银行", "--kind", "bank").exception, CustodyError)


def test_join_shows_the_authoritys_words_and_asks(join_file):
    told = ok(join, "join.json", answers="y\n")
    assert f"'{CONSORTIUM}' at fl.example.org:9443; on its roster: 北岸银行" in told
    shown = told.split("fingerprint of the authority")[1].splitlines()
    assert fingerprint_words(parse_fingerprint("".join(shown[1:5]))) == WORDS
    assert open_site(Path("site")).join == join_file


@pytest.mark.usefixtures("join_file")
@pytest.mark.parametrize("answers", ["", "n\n", "\n"])
def test_no_consortium_is_joined_whose_authority_was_not_compared(answers):
    assert run(join, "join.json", answers=answers).exit_code == 1
    assert not Path("site/join.json").exists()


@pytest.mark.usefixtures("join_file")
def test_a_fingerprint_that_is_given_is_compared_by_the_program():
    other = fingerprint_words(authority_digest(bytes(32)))
    assert isinstance(run(join, "join.json", "--fingerprint", other).exception, WrongKey)
    assert isinstance(run(join, "join.json", "--fingerprint", "lusab").exception, Malformed)
    assert run(join, "join.json", "--yes").exit_code == 2
    assert not Path("site/join.json").exists()
    ok(join, "join.json", "--fingerprint", WORDS)


@pytest.mark.usefixtures("join_file")
def test_keys_tell_their_age():
    assert isinstance(run(keys).exception, CustodyError)
    ok(join, "join.json", "--fingerprint", WORDS)
    ages = {each["what"]: each for each in json.loads(ok(keys, "--json"))}
    assert set(ages) == {"keys of 北岸银行", "node key", "CA certificate"}
    assert "fingerprint of this site" in ok(keys)


def test_a_passphrase_from_the_environment_is_needed_again():
    env = {"FEDSEEK_PASSPHRASE": "北岸银行的密码短语共十二字以上"}
    ok(init, "--name", "北岸银行", "--kind", "bank", env=env)
    assert isinstance(run(request).exception, CustodyError)
    ok(request, env=env)
