"""A real run that waits for its people: the service behind a policy, an officer at the local socket, a restart between."""

import json

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedseek.errors import LocalRefused, NotNow, ReleaseRefused
from fedseek.messages import Refused, ReleaseApproved
from fedseek.statement import parse_statement
from fedseek.statement_words import CHINESE
from fedseek_site import releasing
from fedseek_site.local_api import METHODS, LocalApi, ReleaseAsked, ask, serve_local
from fedseek_site.local_releases import (
    local_approve_release,
    local_release,
    local_releases,
    local_withdraw_release,
    read_shown,
)
from fedseek_site.people_commands import COMMANDS
from fedseek_site.policy import load_policy
from fedseek_site.release_approvals import ReleaseApprovals
from fedseek_site.release_permission import ReleasePermission

ME, ZHANG = "仁济医院", "张伟"
KEY = Ed25519PrivateKey.generate()
POLICY = f"""
version = 1
[approval]
required = 0
releases = 1
[approval.people."{ZHANG}"]
role = "privacy officer"
key = "{KEY.public_key().public_bytes_raw().hex()}"
"""


class Daemon:
    """What the daemon of one site puts around its service; started anew as often as a test likes."""

    def __init__(self, desk, folder):
        self.desk, self.folder, self.recorded = desk, folder, []
        (folder / "policy.toml").write_text(POLICY, "utf-8")
        (folder / "policy.toml").chmod(0o600)
        self.start()

    def start(self):
        self.approvals = ReleaseApprovals(self.folder / "releases.sqlite3")
        self.releases = ReleasePermission(
            site=ME,
            policy=lambda: load_policy(self.folder / "policy.toml"),
            approvals=self.approvals,
            record=lambda kind, /, **facts: self.recorded.append((kind, facts)),
        )
        self.desk.services[ME]._permit_release = self.releases.permit
        methods = {name: lambda *asked: {"plans": []} for name in METHODS}
        methods |= {
            "releases": lambda: local_releases(self.releases),
            "release": lambda asked: local_release(self.releases, asked),
            "approve_release": lambda approval: local_approve_release(self.releases, approval),
            "withdraw_release": lambda asked: local_withdraw_release(self.releases, asked),
        }
        self.stop = serve_local(LocalApi(**methods), self.folder / "run", record=lambda kind, /, **facts: None)

    def end(self):
        self.stop(0.2)
        self.approvals.close()

    def restart(self):
        """As after kill -9: nothing but the disk is left."""
        self.end()
        self.desk.restart(ME)
        self.start()

    def command(self, name, *arguments, **options):
        command = next(each for each in COMMANDS if each.name == name)
        result = CliRunner().invoke(command, ["--folder", str(self.folder), *map(str, arguments)], **options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result


@pytest.fixture(scope="module")
def desk(make_desk):
    made = make_desk()
    made.request = made.play(until=("release", made.last))[ME]
    return made


@pytest.fixture
def daemon(desk, tmp_path):
    folder = tmp_path / "站"
    folder.mkdir(mode=0o700)
    made = Daemon(desk, folder)
    yield made
    made.end()


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "officer.pem"
    path.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return path


def test_it_waits_survives_a_restart_is_approved_at_the_socket_and_goes_out(desk, daemon, key_file, monkeypatch):
    computed = []
    draft = releasing.draft_release
    monkeypatch.setattr(releasing, "draft_release", lambda *asked: computed.append(1) or draft(*asked))
    folder, events = desk.folder / ME / "release", desk.events[ME]
    told = desk.ask(ME, desk.request)
    assert isinstance(told, Refused)
    assert (told.code, told.rule) == ("NotNow", "approval.releases: 0 of 1 people have approved")
    assert desk.ask(ME, desk.request) == told
    assert not folder.exists()
    assert len(computed) == 1
    assert [event["code"] for event in events if event["event"] == "refused"] == ["NotNow"], "told once"

    daemon.restart()
    assert desk.ask(ME, desk.request) == told
    assert len(computed) == 1, "a release that waits is not computed anew after a restart"
    [line] = json.loads(daemon.command("releases", "--json").stdout)["releases"]
    assert (line["run"], line["status"], line["approved_by"]) == (desk.federation.run, "waiting", [])

    prefix = line["digest"][:12]
    shown = read_shown(ask(daemon.folder / "run", "officer", "release", ReleaseAsked(release=prefix)), prefix)
    words = daemon.command("approve", prefix, "--person", ZHANG, "--key", key_file, input="n\n")
    assert words.exit_code == 1
    assert desk.ask(ME, desk.request) == told, "who does not say yes has not approved"
    words = daemon.command("approve", prefix, "--person", ZHANG, "--key", key_file, input="y\n").output
    for text in ("Not covered", ME, desk.plan.digest, shown.digest, f"Do you approve that {ME} signs this statement"):
        assert text in words

    daemon.restart()
    answer = desk.ask(ME, desk.request)
    assert isinstance(answer, ReleaseApproved)
    assert answer.statement == shown.statement, "what was approved is what goes out, to the byte"
    assert parse_statement(answer.statement).site == ME
    assert (folder / "privacy.json").read_bytes() == shown.statement
    assert len(computed) == 2

    daemon.restart()
    assert desk.ask(ME, desk.request) == answer
    assert len(computed) == 2
    with pytest.raises(LocalRefused, match="may have been sent"):
        daemon.command("withdraw", prefix, "--person", ZHANG)
    assert "released" in daemon.command("releases").stdout
    kinds = [kind for kind, _ in daemon.recorded]
    assert kinds.count("release-announced") == 1
    assert kinds.count("release-approved") == 1
    assert kinds[-1] == "release-permitted"


def test_a_release_is_shown_in_chinese_too_and_one_that_is_not_there_is_not(daemon, desk):
    request = b"another"
    statement = (desk.folder / ME / "release" / "privacy.json").read_bytes()
    made = releasing.Draft(desk.federation.run, statement, digests_of(statement), {}, 0.5, None)
    with pytest.raises(NotNow):
        daemon.releases.permit(desk.plan.digest, request, lambda: made)
    [line] = json.loads(daemon.command("releases", "--json").stdout)["releases"]
    assert CHINESE.not_covered_title in daemon.command("releases", line["digest"][:12], "--language", "zh").stdout
    shown = json.loads(daemon.command("releases", line["digest"], "--json").stdout)
    assert (shown["digest"], shown["approved_by"]) == (line["digest"], [])
    missing = daemon.command("releases", "0" * 12)
    assert missing.exit_code == 2
    assert "no release drafted here" in missing.output


def test_a_statement_that_speaks_of_another_run_is_not_shown_for_approval(daemon, desk, key_file):
    statement = (desk.folder / ME / "release" / "privacy.json").read_bytes()
    made = releasing.Draft("another-run", statement, digests_of(statement), {}, 0.5, None)
    with pytest.raises(NotNow):
        daemon.releases.permit(desk.plan.digest, b"x", lambda: made)
    [line] = daemon.approvals.announced()
    with pytest.raises(Exception, match="its statement speaks of"):
        daemon.command("approve", line.digest, "--person", ZHANG, "--key", key_file, "--yes")
    assert daemon.approvals.standing(line.digest, load_policy(daemon.folder / "policy.toml"), site=ME) == ()


def test_a_gate_that_is_closed_asks_nobody(daemon, desk):
    def closed():
        raise ReleaseRefused("utility")

    with pytest.raises(ReleaseRefused):
        daemon.releases.permit(desk.plan.digest, b"x", closed)
    assert daemon.approvals.announced() == ()


def digests_of(statement):
    return {scope: bytes.fromhex(digest) for scope, digest in parse_statement(statement).tensors.items()}
