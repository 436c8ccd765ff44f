"""Releases that wait for people: what is drafted, whose word counts, and what is never signed without it."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace as altered
from people_of_a_site import ANNA, KEYS, NOON, PLAN, ROSTER, SITE, ZHANG, House, sign, sign_release

from fedseek.errors import FedseekError, JournalUnusable, Malformed, NotNow, ReleaseRefused, WrongKey
from fedseek.identity.signing import CONTEXT_APPROVAL, sign_with
from fedseek.messages import release_message
from fedseek_site import release_approvals as module
from fedseek_site.people import release_approval_message
from fedseek_site.release_approvals import AnnouncedRelease, ReleaseApprovals, release_digest

ROOT = Path(__file__).resolve().parents[2]
WANG = "王芳"
REQUEST = b"release it"
STEWARD = Ed25519PrivateKey.generate()


@dataclass
class Drafted:
    """What a site would sign, and how often that was computed."""

    run: str = "试运行-1"
    digests: dict[str, bytes] = field(default_factory=lambda: {"global": bytes(32)})
    statement: bytes = b'{"epsilon": 2.0}'
    computed: int = 0

    def __call__(self):
        self.computed += 1
        return self

    @property
    def digest(self):
        return release_digest(self.run, self.digests, self.statement)


@pytest.fixture
def house(tmp_path):
    folder = tmp_path / "站"
    folder.mkdir()
    made = House(folder)
    made.write_policy(approval={"releases": 2})
    text = (made.folder / "policy.toml").read_text("utf-8")
    public = STEWARD.public_key().public_bytes_raw().hex()
    made.write(f'{text}\n[approval.people."{WANG}"]\nrole = "data steward"\nkey = "{public}"\n')
    yield made
    made.approvals.close()
    made.release_approvals.close()
    made.ledger.close()


@pytest.fixture
def drafted():
    return Drafted()


def permit(house, drafted, request=REQUEST):
    """The rule of a "later", or "yes"."""
    try:
        assert house.permission.releases.permit(PLAN.digest, request, drafted) is drafted
    except NotNow as error:
        return error.rule
    return "yes"


def approve(house, approval):
    house.permission.releases.approve(approval)


def standing(house, drafted):
    return house.release_approvals.standing(drafted.digest, house.permission.policy(), site=SITE)


# until enough have approved


def test_a_release_waits_for_as_many_different_people_as_the_policy_says(house, drafted):
    assert permit(house, drafted) == "approval.releases: 0 of 2 people have approved"
    approve(house, sign_release(ZHANG, drafted.digest))
    assert permit(house, drafted) == "approval.releases: 1 of 2 people have approved"
    approve(house, sign_release(ANNA, drafted.digest))
    assert permit(house, drafted) == "yes"
    assert permit(house, drafted) == "yes", "asked again, the same comes out"


def test_where_the_policy_asks_nobody_it_goes_out_at_once_and_can_be_looked_at(house, drafted):
    house.write_policy(approval={"releases": 0})
    assert permit(house, drafted) == "yes"
    assert [release.digest for release in house.release_approvals.announced()] == [drafted.digest]


def test_while_approvals_are_missing_the_draft_is_computed_once_for_a_request(house, drafted):
    for _ in range(5):
        permit(house, drafted)
    assert drafted.computed == 1
    permit(house, drafted, b"another request")
    assert drafted.computed == 2
    assert len(house.release_approvals.announced()) == 1, "it gave the same release"


def test_what_is_approved_are_the_bytes_that_the_site_would_sign(house, drafted):
    permit(house, drafted)
    [found] = house.release_approvals.announced()
    assert (found.run, found.plan, found.digests, found.statement) == (
        drafted.run,
        PLAN.digest,
        drafted.digests,
        drafted.statement,
    )
    assert found.digest == module.sha256(release_message(drafted.run, drafted.digests, drafted.statement)).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [{"statement": b'{"epsilon": 2.5}'}, {"digests": {"global": bytes(31) + b"x"}}, {"run": "试运行-2"}],
    ids=["statement", "weights", "run"],
)
def test_a_draft_that_comes_out_otherwise_is_another_release_and_approved_anew(house, drafted, changes):
    permit(house, drafted)
    for person in (ZHANG, ANNA):
        approve(house, sign_release(person, drafted.digest))
    other = Drafted(**changes)
    assert permit(house, other) == "approval.releases: 0 of 2 people have approved"
    assert other.digest in {release.digest for release in house.release_approvals.announced()}


def test_a_policy_that_cannot_be_read_lets_nothing_go(house, drafted):
    permit(house, drafted)
    for person in (ZHANG, ANNA):
        approve(house, sign_release(person, drafted.digest))
    house.write("version = 9")
    assert permit(house, drafted) == "policy: this site's policy cannot be used"
    assert house.permission.releases.approved_by(house.release_approvals.get(drafted.digest)) == ()


def test_the_policy_of_the_day_counts(house, drafted):
    house.write_policy(approval={"releases": 1})
    permit(house, drafted)
    approve(house, sign_release(ZHANG, drafted.digest))
    assert permit(house, drafted) == "yes"
    house.write_policy(approval={"releases": 2})
    assert permit(house, drafted) == "approval.releases: 1 of 2 people have approved"
    house.write("\n".join(["version = 1", "[approval]", "required = 0", "releases = 0"]))
    assert standing(house, drafted) == (), "the person is no longer in the policy"


def test_a_paused_site_releases_nothing(house):
    house.permission.permit("r", "plan", PLAN, ROSTER)
    house.permission.pause()
    with pytest.raises(NotNow, match="paused"):
        house.permission.permit("r", "release", PLAN, ROSTER)


# hostile people


def stranger(drafted):
    return sign_release(ZHANG, drafted.digest, key=Ed25519PrivateKey.generate())


def of_a_plan(drafted):
    """Signed for the release's digest, but as an approval of a plan is."""
    message = release_approval_message(drafted.digest, site=SITE, person=ZHANG, at=int(NOON))
    return altered(sign_release(ZHANG, drafted.digest), signature=sign_with(KEYS[ZHANG], CONTEXT_APPROVAL, message))


HOSTILE = {
    "a stranger's key": (stranger, "does not verify"),
    "nobody of this site": (lambda d: altered(stranger(d), person="陌生人"), "not among the people"),
    "a data steward": (lambda d: altered(sign_release(ZHANG, d.digest, key=STEWARD), person=WANG), "data steward"),
    "another person's name": (lambda d: altered(sign_release(ZHANG, d.digest), person=ANNA), "does not verify"),
    "of another release": (lambda d: altered(sign_release(ZHANG, "ab" * 32), release=d.digest), "does not verify"),
    "of another time": (lambda d: altered(sign_release(ZHANG, d.digest), at=int(NOON) + 1), "does not verify"),
    "of a plan": (of_a_plan, "does not verify"),
    "signature of a plan's approval": (
        lambda d: altered(sign_release(ZHANG, d.digest), signature=sign(ZHANG).signature),
        "does not verify",
    ),
    "no signature": (lambda d: altered(sign_release(ZHANG, d.digest), signature=bytes(64)), "does not verify"),
}


@pytest.mark.parametrize(("forge", "words"), HOSTILE.values(), ids=list(HOSTILE))
def test_an_approval_that_is_not_an_officers_word_on_this_release_is_refused(house, drafted, forge, words):
    permit(house, drafted)
    with pytest.raises(WrongKey, match=words):
        approve(house, forge(drafted))
    assert permit(house, drafted) == "approval.releases: 0 of 2 people have approved"
    assert "release-approved" not in house.kinds()


@pytest.mark.parametrize("forge", [forge for forge, _ in HOSTILE.values()], ids=list(HOSTILE))
def test_what_somebody_writes_into_the_file_is_no_approval_of_a_release(house, drafted, forge):
    permit(house, drafted)
    approval = forge(drafted)
    database = sqlite3.connect(house.folder / "releases.sqlite3")
    row = (drafted.digest, approval.person, approval.at, approval.signature)
    database.execute("INSERT INTO approvals VALUES (?, ?, ?, ?, NULL)", row)
    database.commit()
    database.close()
    assert standing(house, drafted) == ()


def test_the_same_person_twice_is_one_person(house, drafted):
    permit(house, drafted)
    for later in (0, 1):
        approve(house, sign_release(ZHANG, drafted.digest, at=NOON + later))
    assert standing(house, drafted) == (ZHANG,)
    assert permit(house, drafted) == "approval.releases: 1 of 2 people have approved"


def test_an_approval_of_a_release_that_was_not_drafted_here_is_refused(house, drafted):
    with pytest.raises(Malformed, match="was not announced here"):
        approve(house, sign_release(ZHANG, drafted.digest))


def test_an_approval_from_the_future_is_refused(house, drafted):
    permit(house, drafted)
    with pytest.raises(NotNow, match="future"):
        approve(house, sign_release(ZHANG, drafted.digest, at=NOON + 1000))


# taking it back


def test_an_approval_that_was_withdrawn_does_not_count_and_the_old_one_is_not_taken_again(house, drafted):
    permit(house, drafted)
    for person in (ZHANG, ANNA):
        approve(house, sign_release(person, drafted.digest))
    house.now += 10
    assert house.permission.releases.withdraw(drafted.digest, ZHANG) == 1
    assert house.permission.releases.withdraw(drafted.digest, ZHANG) == 0
    assert permit(house, drafted) == "approval.releases: 1 of 2 people have approved"
    with pytest.raises(NotNow, match="withdrawn"):
        approve(house, sign_release(ZHANG, drafted.digest))
    approve(house, sign_release(ZHANG, drafted.digest, at=house.now + 1))
    assert permit(house, drafted) == "yes"


def test_when_it_is_let_go_it_is_too_late_to_take_an_approval_back(house, drafted):
    permit(house, drafted)
    for person in (ZHANG, ANNA):
        approve(house, sign_release(person, drafted.digest))
    assert permit(house, drafted) == "yes"
    with pytest.raises(ReleaseRefused, match="may have been sent"):
        house.permission.releases.withdraw(drafted.digest, ZHANG)
    release = house.release_approvals.get(drafted.digest)
    assert house.permission.releases.verdict(release) == ("released", "")


# the record


def test_what_happened_is_on_the_record_and_what_is_only_repeated_is_not(house, drafted):
    for _ in range(3):
        permit(house, drafted)
    approve(house, sign_release(ZHANG, drafted.digest))
    permit(house, drafted)
    approve(house, sign_release(ANNA, drafted.digest))
    for _ in range(2):
        permit(house, drafted)
    assert house.kinds() == [
        "release-announced",
        "release-put-off",
        "release-approved",
        "release-put-off",
        "release-approved",
        "release-permitted",
    ]
    facts = dict(house.recorded)["release-approved"]
    assert (facts["person"], facts["release"]) == (ANNA, drafted.digest)
    assert bytes.fromhex(facts["signature"]) == sign_release(ANNA, drafted.digest).signature


def test_where_it_cannot_be_recorded_nothing_goes_out(house, drafted):
    def full(kind, /, **facts):
        raise JournalUnusable("SQLITE_FULL")

    permit(house, drafted)
    for person in (ZHANG, ANNA):
        approve(house, sign_release(person, drafted.digest))
    house.permission.releases._record = full
    with pytest.raises(JournalUnusable):
        permit(house, drafted)


# the file


def test_prefixes(house, drafted):
    permit(house, drafted)
    assert house.release_approvals.get(drafted.digest[:12]).digest == drafted.digest
    for prefix in (drafted.digest[:11], "", "z" * 12, "%" * 12, "0" * 64):
        with pytest.raises(Malformed):
            house.release_approvals.get(prefix)


def test_a_coordinator_that_asks_in_ever_new_ways_fills_nothing(house, drafted):
    permit(house, drafted)
    approve(house, sign_release(ZHANG, drafted.digest))
    for number in range(2 * module.MAX_ANNOUNCED):
        permit(house, Drafted(statement=b"%d" % number), b"request %d" % number)
    found = house.release_approvals.announced()
    assert len(found) == module.MAX_ANNOUNCED + 1
    assert drafted.digest in {release.digest for release in found}, "what somebody approved is not forgotten"
    assert house.release_approvals.drafted_for(b"request 0") is None
    assert house.release_approvals.drafted_for(REQUEST).digest == drafted.digest


def test_the_file_is_private_and_no_other_database_is_taken_for_it(tmp_path):
    path = tmp_path / "releases.sqlite3"
    ReleaseApprovals(path).close()
    assert path.stat().st_mode & 0o077 == 0
    other = tmp_path / "other.sqlite3"
    database = sqlite3.connect(other)
    database.execute("CREATE TABLE x (y)")
    database.commit()
    database.close()
    other.chmod(0o600)
    with pytest.raises(JournalUnusable, match="not a site's approvals of releases"):
        ReleaseApprovals(other)
    path.chmod(0o644)
    with pytest.raises(FedseekError):
        ReleaseApprovals(path)


WRITER = """
import sys
from pathlib import Path
from fedseek_site.release_approvals import AnnouncedRelease, ReleaseApprovals
approvals = ReleaseApprovals(Path(sys.argv[1]))
for number in range(100_000):
    release = AnnouncedRelease.of("run-%d" % number, "ab" * 32, {"global": bytes(32)}, b"x" * 2000, at=1.0)
    approvals.announce(release, b"request %d" % number)
    print(number, flush=True)
"""


def test_what_was_announced_survives_kill_9(tmp_path):
    path, said = tmp_path / "releases.sqlite3", tmp_path / "said"
    with said.open("wb") as out:
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=out, cwd=ROOT)
        try:
            limit = time.monotonic() + 30
            while said.stat().st_size < 40 and time.monotonic() < limit:
                time.sleep(0.01)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
    last = int(said.read_bytes().rpartition(b"\n")[0].split()[-1])
    approvals = ReleaseApprovals(path)
    found = {release.run for release in approvals.announced()}
    assert {f"run-{number}" for number in range(last + 1)} <= found
    assert approvals.drafted_for(b"request %d" % last) == AnnouncedRelease.of(
        f"run-{last}", "ab" * 32, {"global": bytes(32)}, b"x" * 2000, at=1.0
    )
    approvals.close()
