"""The commands of the site's people, against a daemon with a real policy behind its sockets."""

import json
import re
import time

import click
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from people_of_a_site import ANNA, KEYS, PLAN, ROSTER, SITE, ZHANG, House, make_plan

from fedseek.errors import InvalidConfig, LocalRefused, Malformed, Unreachable, WrongKey
from fedseek.plan import check_plan, parse_spec
from fedseek_site.local_answers import answer_from
from fedseek_site.local_api import serve_local
from fedseek_site.people_commands import COMMANDS, PASSPHRASE_VARIABLE
from fedseek_site.plan_words import describe, visible
from fedseek_site.policy import load_policy

PREFIX = PLAN.digest[:12]


@pytest.fixture
def site(tmp_path):
    """A site whose daemon answers; its folder, and what its people recorded."""
    folder = tmp_path / "站点"
    folder.mkdir()
    house = House(folder, now=time.time())
    house.write_policy(approval={"required": 1})
    permission = house.permission
    permission.notice(PLAN, ROSTER)
    api = answer_from(
        permission,
        more_status=lambda: {"run": None},
        data=lambda: {"name": "账户", "records": 12},
        reload_data=lambda: {"name": "账户", "records": 13},
        audit_head=dict,
        accept_record=lambda asked: {"name": asked.name},
    )
    stop = serve_local(api, folder / "run", record=house.record)
    yield house
    stop(0.2)
    house.approvals.close()


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "officer.pem"
    path.write_bytes(KEYS[ZHANG].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return path


def run(*arguments, **options):
    """The result of a command; ours are raised, as ``fedseek.daemon.console`` takes them."""
    name, *rest = map(str, arguments)
    command = next(each for each in COMMANDS if each.name == name)
    result = CliRunner().invoke(command, rest, **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def at(house, *arguments, **options):
    name, *rest = arguments
    return run(name, "--folder", house.folder, *rest, **options)


def test_every_command_has_help_with_an_example():
    for command in COMMANDS:
        for each in [command, *getattr(command, "commands", {}).values()]:
            assert isinstance(each, click.Command)
            assert (each.epilog or "").startswith("Example: fedseek-site ")
            assert CliRunner().invoke(each, ["--help"]).exit_code == 0


def test_json_is_one_line_wherever_a_script_would_read(site, key_file):
    calls = [
        ("status",),
        ("plans",),
        ("plans", PREFIX),
        ("approve", PREFIX, "--person", ZHANG, "--key", key_file, "--yes"),
        ("withdraw", PREFIX, "--person", ZHANG),
        ("pause",),
        ("resume",),
        ("data",),
        ("data", "--reload"),
        ("releases",),
    ]
    for call in calls:
        told = at(site, *call, "--json").stdout
        assert len(told.splitlines()) == 1
        assert isinstance(json.loads(told), dict)


def test_an_officer_reads_the_plan_in_plain_words_and_signs_it(site, key_file):
    assert re.search(rf"{PLAN.digest[:16]}  fraud  3 sites  waiting \(approval.required", at(site, "plans").stdout)
    result = at(site, "approve", PREFIX, "--person", ZHANG, "--key", key_file, input="y\n")
    words = {
        "ε 2 at δ 1e-05",
        "2 rounds of 4 steps",
        "protects a customer; discloses accuracy",
        "欺诈, 正常",
        f"SHA-256 {'ab' * 32}",
        ROSTER.digest().hex(),
        *(entry.fingerprint() for entry in ROSTER.entries),
        *ROSTER.names,
        f"for {SITE}, among these 3 sites",
    }
    assert not {each for each in words if each not in result.output}
    assert f"ready, approved by {ZHANG}" in at(site, "plans").stdout
    site.permission.permit("run-1", "plan", PLAN, ROSTER)


def test_who_does_not_say_yes_has_not_approved(site, key_file):
    result = at(site, "approve", PREFIX, "--person", ZHANG, "--key", key_file, input="n\n")
    assert result.exit_code == 1
    assert site.permission.verdict(PLAN, ROSTER)[0] == "waiting"


def test_with_another_persons_key_nothing_is_approved(site, key_file):
    with pytest.raises(LocalRefused) as caught:
        at(site, "approve", PREFIX, "--person", ANNA, "--key", key_file, "--yes")
    assert caught.value.refused_code == "WrongKey"
    assert site.permission.verdict(PLAN, ROSTER)[0] == "waiting"


def test_a_withdrawal(site, key_file):
    at(site, "approve", PREFIX, "--person", ZHANG, "--key", key_file, "--yes")
    assert json.loads(at(site, "withdraw", PREFIX, "--person", ZHANG, "--json").stdout)["withdrawn"] == 1
    assert site.permission.verdict(PLAN, ROSTER)[0] == "waiting"


def test_a_pause_is_seen_in_the_status(site):
    at(site, "pause")
    assert re.search(r"paused since: +20\d\d-", at(site, "status").stdout)
    at(site, "resume")
    assert re.search(r"paused since: +-", at(site, "status").stdout)


@pytest.mark.parametrize("digest", [PLAN.digest[:11], "xyz", "", PLAN.digest + "0"])
def test_a_digest_that_is_none_is_wrong_use(site, digest):
    result = at(site, "plans", digest)
    assert result.exit_code == 2
    assert "12 or more" in result.output


def test_a_digest_in_capitals_is_the_same(site):
    assert PLAN.digest in at(site, "plans", PREFIX.upper()).output


def test_a_daemon_that_shows_another_plan_than_was_named_is_not_believed(site, key_file, monkeypatch):
    other = make_plan(1)
    site.permission.notice(other, ROSTER)
    found = site.approvals.get(other.digest)
    monkeypatch.setattr(site.approvals, "get", lambda prefix: found)
    with pytest.raises(Malformed, match="it shows"):
        at(site, "approve", PREFIX, "--person", ZHANG, "--key", key_file, "--yes")


def test_without_a_daemon_the_command_says_so(tmp_path):
    with pytest.raises(Unreachable, match="nobody answers"):
        run("status", "--folder", tmp_path)


# words


def test_a_plan_cannot_paint_over_what_it_says():
    spec = PLAN.spec.model_dump(mode="json")
    spec["kinds"]["bank"]["labels"] = ["a\x1b[2Jb", "c\r\nprivacy: ε 0.1", "d\u202ee"]
    spec["model"]["source"] = "path:/x\x1b[1A"
    shown = "".join(text for _, text in describe(check_plan(parse_spec(spec)), ROSTER))
    assert shown.isprintable()
    assert r"a\x1b[2Jb, c\r\nprivacy: ε 0.1, d\u202ee" in shown
    assert visible("仁济医院 ε") == "仁济医院 ε"


def test_a_plan_without_privacy_is_told_in_capitals():
    spec = {**PLAN.spec.model_dump(mode="json"), "privacy": {"mechanism": "none"}}
    assert dict(describe(check_plan(parse_spec(spec)), ROSTER))["privacy"].startswith("NONE")


# keys and policy


def test_a_persons_key_and_line(tmp_path):
    path = tmp_path / "key.pem"
    told = run("person", "王芳", "--key", path, input="a long passphrase\na long passphrase\n")
    assert b"ENCRYPTED" in path.read_bytes()
    line = told.stdout[told.stdout.index("[") :]
    assert line.startswith('[approval.people."王芳"]\nrole = "privacy officer"\nkey = "')
    with pytest.raises(Exception, match="File exists"):
        run("person", "王芳", "--key", path, "--no-passphrase")
    again = run("person", "王芳", "--key", tmp_path / "2.pem", "--no-passphrase", "--json", "--role", "operator")
    assert json.loads(again.stdout).keys() == {"name", "role", "key"}
    assert b"ENCRYPTED" not in (tmp_path / "2.pem").read_bytes()


def test_an_encrypted_key_signs_with_its_passphrase(site, tmp_path):
    path = tmp_path / "key.pem"
    secret = {PASSPHRASE_VARIABLE: "a long passphrase"}
    public = json.loads(run("person", "王芳", "--key", path, "--json", env=secret).stdout)["key"]
    text = (site.folder / "policy.toml").read_text("utf-8")
    site.write(f'{text}\n[approval.people."王芳"]\nrole = "privacy officer"\nkey = "{public}"\n')
    call = ("approve", PREFIX, "--person", "王芳", "--key", path, "--yes")
    with pytest.raises(WrongKey):
        at(site, *call, env={PASSPHRASE_VARIABLE: "another long one"})
    at(site, *call, input="a long passphrase\n")
    assert site.permission.verdict(PLAN, ROSTER) == ("ready", "")
    at(site, *call, env=secret)


def test_policy_check_and_show(site, tmp_path):
    path = site.folder / "policy.toml"
    digest = load_policy(path).digest()
    assert digest in run("policy", "check", "--folder", site.folder).stdout
    assert json.loads(run("policy", "check", path, "--json").stdout) == {"file": str(path), "digest": digest}
    shown = run("policy", "show", "--folder", site.folder).stdout
    assert "limits.max_epsilon = 2.0" in shown
    assert f'"{ZHANG}"' in shown
    assert json.loads(run("policy", "show", path, "--json").stdout)["audit"] == {"retention_days": 400}
    site.write("version = 1\n[limits]\nmax_epsilon = 99\n")
    with pytest.raises(InvalidConfig, match=r"limits\.max_epsilon"):
        run("policy", "check", path)


def test_every_call_is_recorded(site, key_file):
    at(site, "approve", PREFIX, "--person", ZHANG, "--key", key_file, "--yes")
    at(site, "pause")
    assert [(kind, facts.get("method")) for kind, facts in site.recorded] == [
        ("local-call", "releases"),
        ("local-call", "plan"),
        ("local-call", "approve"),
        ("approved", None),
        ("local-call", "pause"),
        ("paused", None),
    ]
    assert site.recorded[2][1] == {
        "role": "officer",
        "method": "approve",
        "plan": PLAN.digest,
        "person": ZHANG,
        "outcome": "asked",
    }
