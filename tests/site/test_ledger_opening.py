"""A daemon's ledger: the limit of the day's policy, and no older copy than the audit record knows."""

import shutil
from functools import partial

import pytest
from people_of_a_site import PLAN, RECORDS, SITE, STORAGE_KEY, House

from fedseek.daemon.audit import AuditChain
from fedseek.errors import AuditBroken, BudgetExceeded, NotNow
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signing import sign as sign_as
from fedseek_site.ledger_opening import LEDGER_LINE, newest_entry_named, open_ledger


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    yield made
    made.approvals.close()
    made.ledger.close()


@pytest.fixture
def audit(tmp_path):
    identity = SiteIdentity.generate(SITE, "bank")
    with AuditChain(
        tmp_path / "audit", name=SITE, sign=partial(sign_as, identity), public_key=identity.public().signing_key
    ) as chain:
        yield chain


@pytest.fixture
def opening(house, audit, tmp_path):
    """Open the ledger as a daemon does when it starts; the one before is closed."""
    opened = []

    def make():
        while opened:
            opened.pop().close()
        opened.append(
            open_ledger(
                tmp_path / "daemon.sqlite3",
                STORAGE_KEY,
                dataset="账户",
                site=SITE,
                policy_path=tmp_path / "policy.toml",
                audit=audit,
                audit_folder=tmp_path / "audit",
            )
        )
        opened[0].take_data(RECORDS)
        return opened[0]

    yield make
    for ledger in opened:
        ledger.close()


def spend(ledger, audit, number):
    entered = ledger.spend("run-1", number, PLAN.privacy, 1)
    audit.record(LEDGER_LINE, run="run-1", round=number, entry=entered.number, digest=entered.digest.hex())
    return entered


def test_a_ledger_that_is_as_new_as_the_record_opens_and_is_named_in_it(opening, audit, tmp_path):
    assert newest_entry_named(tmp_path / "audit") == (0, bytes(32))
    entered = spend(opening(), audit, 1)
    assert newest_entry_named(tmp_path / "audit") == (entered.number, entered.digest)
    ahead = opening().spend("run-1", 2, PLAN.privacy, 1)  # killed before it was told to the record
    assert opening().head() == (ahead.number, ahead.digest) == newest_entry_named(tmp_path / "audit")


@pytest.mark.parametrize("put_back", [True, False], ids=["older copy", "removed"])
def test_an_older_ledger_or_none_is_refused(opening, audit, tmp_path, put_back):
    path = tmp_path / "daemon.sqlite3"
    spend(opening(), audit, 1)
    opening().close()
    shutil.copyfile(path, tmp_path / "copy")
    spend(opening(), audit, 2)
    opening().close()
    path.unlink()
    if put_back:
        shutil.copyfile(tmp_path / "copy", path)
        path.chmod(0o600)
    with pytest.raises(AuditBroken, match="the audit record knows of entry") as caught:
        opening()
    assert "Put the newest copy back" in caught.value.hint


def test_a_record_that_names_no_entry_is_refused(opening, audit):
    audit.record(LEDGER_LINE, entry=1, digest="nonsense")
    with pytest.raises(AuditBroken, match="names no entry"):
        opening()


def test_the_limit_is_that_of_the_policy_as_it_is_when_spending(opening, house, tmp_path):
    ledger = opening()
    ledger.spend("run-1", 1, PLAN.privacy, 1)
    house.write_policy(limits={"max_epsilon_total": 0.1})
    with pytest.raises(BudgetExceeded):
        ledger.spend("run-1", 2, PLAN.privacy, 1)
    (tmp_path / "policy.toml").unlink()
    with pytest.raises(NotNow, match="policy"):
        ledger.spend("run-1", 2, PLAN.privacy, 1)
    house.write_policy()
    ledger.spend("run-1", 2, PLAN.privacy, 1)
