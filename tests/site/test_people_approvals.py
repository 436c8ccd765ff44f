"""Plans announced, people's signatures and admitted runs, on the disk."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as altered

from fedseek.errors import CustodyError, InvalidPlan, JournalUnusable, Malformed, NotNow, WrongKey, WrongRound
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.signing import CONTEXT_RELEASE, sign_with
from fedseek.plan import check_plan, parse_spec
from fedseek_site import approvals as approvals_module
from fedseek_site.approvals import Approvals, Begun
from fedseek_site.people import (
    approval_message,
    is_encrypted,
    load_person_key,
    make_person_key,
    policy_line,
    sign_approval,
)
from fedseek_site.policy import Approval, Person, Policy, load_policy

ROOT = Path(__file__).resolve().parents[2]
SITE, NOW = "北岸银行", 1_800_000_000
ZHANG, ANNA, WANG = "张伟", "Anna Lindqvist", "王芳"
KEYS = {name: Ed25519PrivateKey.generate() for name in (ZHANG, ANNA, WANG)}
ROLES = {ZHANG: "privacy officer", ANNA: "privacy officer", WANG: "data steward"}


def policy_of(*names: str, required: int = 1) -> Policy:
    people = {name: Person(role=ROLES[name], key=KEYS[name].public_key().public_bytes_raw().hex()) for name in names}
    return Policy(version=1, approval=Approval(required=required, people=people))


POLICY = policy_of(*KEYS, required=2)
DOCUMENT = {
    "name": "demo",
    "model": {"source": "package:some-model", "sha256": "ab" * 32},
    "kinds": {"bank": {"labels": ["欺诈", "正常"]}},
    "lora": {"target_modules": ["query"]},
    "training": {
        "rounds": 2,
        "steps_per_round": 4,
        "sampling_probability": 0.25,
        "learning_rate": 0.002,
        "head_learning_rate": 0.01,
    },
    "privacy": {"mechanism": "none"},
    "cohort": {"max_sites": 8},
}


def make_plan(seed: int = 0, epsilon: float | None = None):
    plan = check_plan(parse_spec({**DOCUMENT, "seed": seed}))
    if epsilon is None:
        return plan
    privacy = plan.spec.privacy.model_copy(update={"mechanism": "dp-sgd", "epsilon": epsilon, "delta": 1e-5})
    return replace(plan, spec=plan.spec.model_copy(update={"privacy": privacy}))


PLAN = make_plan()
ROSTER, OTHER_ROSTER = (
    Roster.of(SiteIdentity.generate(name, "bank").public() for name in (SITE, "b", "c")) for _ in "12"
)


def signed(person: str = ZHANG, *, plan=PLAN, roster=ROSTER, site: str = SITE, at: int = NOW, key=None):
    return sign_approval(key or KEYS[person], plan.digest, roster.digest().hex(), site=site, person=person, at=at)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "批准.sqlite3"


@pytest.fixture
def approvals(path):
    opened = Approvals(path)
    opened.notice(PLAN, ROSTER, NOW)
    yield opened
    opened.close()


def standing(approvals: Approvals, policy: Policy = POLICY, roster=ROSTER) -> tuple[str, ...]:
    return approvals.standing(PLAN.digest, roster.digest().hex(), policy, site=SITE)


def take(approvals: Approvals, approval, policy: Policy = POLICY, now: float = NOW) -> None:
    approvals.approve(approval, policy, site=SITE, now=now)


# plans


def test_an_announced_plan_is_found_by_the_start_of_its_digest(approvals):
    for length in (12, 40, 64):
        found = approvals.get(PLAN.digest[:length])
        assert (found.plan.digest, found.roster, found.at) == (PLAN.digest, ROSTER, NOW)


@pytest.mark.parametrize("prefix", [PLAN.digest[:11], "", "z" * 12, "%" * 12, "0" * 64])
def test_a_prefix_that_is_short_or_fits_nothing_is_refused(approvals, prefix):
    with pytest.raises(InvalidPlan):
        approvals.get(prefix)


def test_a_prefix_that_fits_two_plans_is_refused(approvals, monkeypatch):
    monkeypatch.setattr(approvals_module, "MIN_PREFIX", 0)
    approvals.notice(make_plan(1), ROSTER, NOW)
    with pytest.raises(InvalidPlan, match="several plans"):
        approvals.get("")


def test_the_same_plan_among_other_sites_is_another_entry_and_the_newest_is_shown(approvals):
    approvals.notice(PLAN, OTHER_ROSTER, NOW + 1)
    approvals.notice(PLAN, ROSTER, NOW + 2)  # known: stays as it was
    assert [(each.roster, each.at) for each in approvals.noticed()] == [(OTHER_ROSTER, NOW + 1), (ROSTER, NOW)]
    assert approvals.get(PLAN.digest).roster == OTHER_ROSTER


def test_a_coordinator_that_announces_without_end_pushes_out_only_what_nobody_uses(path, monkeypatch):
    monkeypatch.setattr(approvals_module, "MAX_NOTICED", 3)
    approvals = Approvals(path)
    plans = [make_plan(seed) for seed in range(9)]
    for plan in plans[:2]:
        approvals.notice(plan, ROSTER, NOW)
    take(approvals, signed(plan=plans[0]))
    approvals.admit("run-1", plans[1], ROSTER, dataset="d", at=NOW)
    for plan in plans[2:]:
        approvals.notice(plan, OTHER_ROSTER, NOW)
    kept = [plans.index(next(p for p in plans if p.digest == each.plan.digest)) for each in approvals.noticed()]
    assert kept == [8, 7, 6, 1, 0]
    approvals.close()


# approvals


def test_approvals_of_different_officers_count(approvals):
    assert standing(approvals) == ()
    take(approvals, signed(ZHANG))
    take(approvals, signed(ANNA))
    assert standing(approvals) == tuple(sorted((ZHANG, ANNA)))
    assert standing(approvals, roster=OTHER_ROSTER) == ()


def test_the_same_person_twice_is_one(approvals):
    take(approvals, signed(ZHANG))
    take(approvals, signed(ZHANG))
    take(approvals, signed(ZHANG, at=NOW + 1))
    assert standing(approvals) == (ZHANG,)


WRONG = {
    "another person's key": lambda: signed(ZHANG, key=KEYS[ANNA]),
    "in another's name": lambda: altered(signed(ZHANG), person=ANNA),
    "nobody of this site": lambda: signed("Mallory", key=KEYS[ZHANG]),
    "not an officer": lambda: signed(WANG),
    "another plan": lambda: altered(signed(plan=make_plan(1)), plan=PLAN.digest),
    "another roster": lambda: altered(signed(roster=OTHER_ROSTER), roster=ROSTER.digest().hex()),
    "another site": lambda: signed(site="harbour-bank"),
    "another time": lambda: altered(signed(), at=NOW - 1),
    "another purpose": lambda: altered(
        signed(),
        signature=sign_with(
            KEYS[ZHANG],
            CONTEXT_RELEASE,
            approval_message(PLAN.digest, ROSTER.digest().hex(), site=SITE, person=ZHANG, at=NOW),
        ),
    ),
    "no signature": lambda: altered(signed(), signature=bytes(64)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_approval_that_is_not_this_persons_word_on_this_is_refused(approvals, wrong):
    with pytest.raises(WrongKey):
        take(approvals, WRONG[wrong]())
    assert standing(approvals) == ()


@given(st.integers(0, 63), st.integers(1, 255))
def test_a_signature_with_any_byte_changed_is_refused(position, change):
    approval = signed()
    mark = bytearray(approval.signature)
    mark[position] ^= change
    with pytest.raises(WrongKey):
        approvals_module.check_approval(altered(approval, signature=bytes(mark)), POLICY, site=SITE)


def test_only_a_plan_that_was_announced_can_be_approved(approvals):
    with pytest.raises(InvalidPlan, match="no such plan"):
        take(approvals, signed(plan=make_plan(1)))
    with pytest.raises(InvalidPlan, match="no such plan"):
        take(approvals, signed(roster=OTHER_ROSTER))


def test_a_withdrawn_approval_counts_no_more_and_is_not_played_again(approvals):
    first = signed()
    take(approvals, first)
    assert approvals.withdraw(PLAN.digest, ZHANG, NOW + 10) == 1
    assert approvals.withdraw(PLAN.digest, ZHANG, NOW + 11) == 0
    assert standing(approvals) == ()
    with pytest.raises(NotNow, match="withdrawn"):
        take(approvals, first, now=NOW + 20)
    assert standing(approvals) == ()
    take(approvals, signed(at=NOW + 20), now=NOW + 20)
    assert standing(approvals) == (ZHANG,)


def test_an_approval_from_the_future_is_refused(approvals):
    take(approvals, signed(at=NOW + 300))
    with pytest.raises(NotNow, match="future"):
        take(approvals, signed(ANNA, at=NOW + 301))


def test_who_has_left_or_changed_role_or_key_counts_no_more(approvals):
    take(approvals, signed(ZHANG))
    assert standing(approvals, policy_of(ANNA)) == ()
    steward = Person(role="data steward", key=POLICY.approval.people[ZHANG].key)
    rekeyed = Person(role="privacy officer", key=POLICY.approval.people[ANNA].key)
    for person in (steward, rekeyed):
        changed = Policy(version=1, approval=Approval(required=1, people={ZHANG: person}))
        assert standing(approvals, changed) == ()


def test_what_somebody_writes_into_the_file_is_no_approval(approvals, path):
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(
        "INSERT INTO approvals VALUES (?, ?, ?, ?, ?, NULL)",
        (PLAN.digest, ROSTER.digest().hex(), ZHANG, NOW, bytes(64)),
    )
    db.close()
    assert standing(approvals) == ()


# runs


def test_a_run_begins_once(approvals):
    approvals.admit("run-1", PLAN, ROSTER, dataset="d", at=NOW)
    for plan, roster in ((make_plan(1), ROSTER), (PLAN, OTHER_ROSTER)):
        with pytest.raises(WrongRound):
            approvals.admit("run-1", plan, roster, dataset="d", at=NOW)
    assert approvals.begun("run-1") == Begun(PLAN.digest, ROSTER.digest().hex())
    assert approvals.begun("run-9") is None


def test_rosters_of_admitted_runs_are_known(approvals):
    assert not approvals.knows_roster(ROSTER.digest().hex())
    approvals.admit("run-1", PLAN, ROSTER, dataset="d", at=NOW)
    assert approvals.knows_roster(ROSTER.digest().hex())
    assert not approvals.knows_roster(OTHER_ROSTER.digest().hex())


# the file


def test_everything_is_there_after_a_restart(approvals, path):
    take(approvals, signed())
    approvals.admit("run-1", make_plan(epsilon=1.5), ROSTER, dataset="d", at=NOW)
    approvals.pause(NOW)
    approvals.close()
    approvals.close()
    again = Approvals(path)
    assert standing(again) == (ZHANG,)
    assert again.begun("run-1") == Begun(make_plan(epsilon=1.5).digest, ROSTER.digest().hex())
    assert again.paused_at() == NOW
    again.resume()
    assert again.paused_at() is None
    again.close()


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_people_approvals import PLAN, make_plan, Approvals, Path
from fedseek.identity.roster import parse_roster
approvals = Approvals(Path(sys.argv[1]))
roster = approvals.noticed()[0].roster
number = 0
while True:
    approvals.admit(f"run-{number}", make_plan(epsilon=1.0), roster, dataset="d", at=1.0)
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
    number += 1
"""


def test_a_kill_loses_nothing_that_was_told_and_another_process_sees_it(approvals, path):
    here = [str(Path(__file__).parent), str(ROOT), str(ROOT / "clients"), str(ROOT / "server")]
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), *here], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(5)]
        time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
        told += [int(line) for line in child.stdout.read().split()]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert all(approvals.begun(f"run-{number}") for number in told)
    assert approvals.begun(f"run-{told[-1] + 2}") is None  # the one before may be on the disk and not told


def test_the_file_is_its_owners_alone(approvals, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    approvals.close()
    path.chmod(0o640)
    with pytest.raises(CustodyError, match="0640"):
        Approvals(path)


def test_a_link_and_a_missing_folder_are_refused(tmp_path, path):
    link = tmp_path / "link"
    link.symlink_to(path)
    for wrong in (link, tmp_path / "nowhere" / "file"):
        with pytest.raises(CustodyError):
            Approvals(wrong)


def test_another_database_and_a_damaged_one_are_refused(path):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE t (x)")
    db.close()
    path.chmod(0o600)
    with pytest.raises(JournalUnusable, match="not a site's approvals"):
        Approvals(path)
    path.write_bytes(b"\x00not a database" * 400)
    with pytest.raises(JournalUnusable):
        Approvals(path)


def test_a_step_that_fails_changes_nothing(approvals, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(approvals_module, "_begun", fail)
    with pytest.raises(KeyboardInterrupt):
        approvals.admit("run-1", PLAN, ROSTER, dataset="d", at=NOW)
    monkeypatch.undo()
    assert approvals.begun("run-1") is None


# people's keys


def test_a_persons_key_is_a_private_file_and_its_line_is_a_policy(tmp_path):
    name = '王 "小" 芳'
    public = make_person_key(tmp_path / "key.pem", name, None)
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert not is_encrypted(tmp_path / "key.pem")
    tmp_path.chmod(0o700)
    policy = tmp_path / "policy.toml"
    policy.write_text(f"version = 1\n{policy_line(name, 'privacy officer', public)}\n", "utf-8")
    policy.chmod(0o600)
    assert load_policy(policy).officers()[name].public_key == public
    assert load_person_key(tmp_path / "key.pem", None).public_key().public_bytes_raw() == public


def test_a_passphrase_locks_the_key_however_it_is_composed(tmp_path):
    path = tmp_path / "key.pem"
    public = make_person_key(path, ZHANG, "une cle\u0301 tres longue")
    assert is_encrypted(path)
    assert b"PRIVATE KEY" in path.read_bytes()
    assert load_person_key(path, "une cl\u00e9 tres longue").public_key().public_bytes_raw() == public
    for wrong in ("another long one", None):
        with pytest.raises(WrongKey, match="does not open"):
            load_person_key(path, wrong)


def test_what_is_no_persons_key_is_refused(tmp_path):
    path = tmp_path / "key.pem"
    make_person_key(path, ZHANG, None)
    before = path.read_bytes()
    with pytest.raises(CustodyError, match="File exists"):
        make_person_key(path, ZHANG, None)
    assert path.read_bytes() == before
    with pytest.raises(CustodyError, match="at least 12"):
        make_person_key(tmp_path / "short.pem", ZHANG, "short")
    with pytest.raises(Malformed):
        make_person_key(tmp_path / "nobody.pem", "", None)
    assert [each.name for each in tmp_path.iterdir()] == ["key.pem"]
    path.chmod(0o644)
    with pytest.raises(CustodyError, match="0644"):
        load_person_key(path, None)
    path.chmod(0o600)
    for wrong in (
        b"",
        b"x" * 100,
        generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    ):
        path.write_bytes(wrong)
        with pytest.raises(WrongKey):
            load_person_key(path, None)
