"""A site that lost its disk begins its record anew, when the operator says so."""

from functools import partial

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedseek.daemon.audit import AuditChain
from fedseek.errors import AuditBroken, Malformed
from fedseek.identity.signing import sign_with
from fedseek_server.accepting import ACCEPTED, accept_waiting, ask_to_accept

SITE = "仁济医院"


def chain(folder, name, key):
    return AuditChain(folder, name=name, sign=partial(sign_with, key), public_key=key.public_key().public_bytes_raw())


@pytest.fixture
def world(tmp_path):
    """The coordinator keeps a head of a record that is longer than the one that the site begins anew."""
    keys = {SITE: Ed25519PrivateKey.generate(), "coordinator": Ed25519PrivateKey.generate()}
    public = {SITE: keys[SITE].public_key().public_bytes_raw()}
    with chain(tmp_path / "audit", "coordinator", keys["coordinator"]) as coordinator:
        with chain(tmp_path / "old", SITE, keys[SITE]) as old:
            for number in range(5):
                old.record("answered", round=number)
            coordinator.note_heads([old.head()], public)
        with chain(tmp_path / "new", SITE, keys[SITE]) as new:
            yield tmp_path, coordinator, new, public


def test_a_record_that_begins_anew_is_refused_until_the_operator_accepts_it(world):
    folder, coordinator, new, public = world
    with pytest.raises(AuditBroken):
        coordinator.note_heads([new.head()], public)
    accept_waiting(folder, coordinator)
    with pytest.raises(AuditBroken):
        coordinator.note_heads([new.head()], public)
    ask_to_accept(folder, SITE, "disk lost on 3 May")
    accept_waiting(folder, coordinator)
    coordinator.note_heads([new.head()], public)
    assert not list((folder / ACCEPTED).iterdir())


def test_a_word_about_nobody_and_a_file_that_is_no_word_are_removed(world):
    folder, coordinator, _, _ = world
    ask_to_accept(folder, "nobody", "why")
    (folder / ACCEPTED / "x.json").write_bytes(b"{}")
    (folder / ACCEPTED / "x.json").chmod(0o600)
    before = coordinator.head().number
    accept_waiting(folder, coordinator)
    assert not list((folder / ACCEPTED).iterdir())
    assert coordinator.head().number == before


@pytest.mark.parametrize(("name", "why"), [("", "w"), ("n" * 65, "w"), ("n", ""), ("n", "w" * 1001)])
def test_a_word_out_of_bounds_is_refused(tmp_path, name, why):
    with pytest.raises(Malformed):
        ask_to_accept(tmp_path, name, why)
    assert not (tmp_path / ACCEPTED).exists()
