"""What a separate courier is lent: the right files, for the right group, and anew after a renewal."""

import grp
import os
import stat
import time

import pytest

from fedseek.errors import CustodyError, InvalidConfig
from fedseek.identity.enrolment import parse_request
from fedseek_server.consortium import create_consortium
from fedseek_site import lending
from fedseek_site.enrol import CA_FILE, JOIN_FILE, NODE_KEY_FILE, create_site, join, make_join_request
from fedseek_site.lending import LENT_FILES, borrow, group_number, lend
from fedseek_site.paths import Paths, courier_settings


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def site(tmp_path):
    consortium = create_consortium(
        tmp_path / "协调方", name="华东联合", hosts=["127.0.0.1"], address="127.0.0.1:9443", now=time.time()
    )
    create_site(tmp_path / "site", name="北岸银行", kind="bank")
    request = make_join_request(tmp_path / "site", now=time.time())
    consortium.admit(parse_request(request.to_bytes()), time.time())
    joined = join(tmp_path / "site", consortium.join_file().to_bytes(), now=time.time())
    Paths(tmp_path / "site").run.mkdir(mode=0o700)
    return joined


@pytest.fixture
def lent(site):
    return Paths(site.folder).lent


def test_three_files_are_lent_and_no_secret_of_the_sites_among_them(site, lent):
    lend(site, lent, None)
    assert sorted(path.name for path in lent.iterdir()) == sorted((JOIN_FILE, CA_FILE, NODE_KEY_FILE))
    for name in LENT_FILES:
        assert (lent / name).read_bytes() == (site.folder / name).read_bytes()


def test_without_a_group_nobody_else_may_read_them(site, lent):
    lend(site, lent, None)
    assert {mode_of(lent / name) for name in LENT_FILES} == {0o600}


def test_with_a_group_its_members_may_read_them_and_nobody_writes(site, lent):
    own = os.getgid()
    lend(site, lent, own)
    assert mode_of(lent) == 0o750
    assert {mode_of(lent / name) for name in LENT_FILES} == {0o640}
    assert {path.stat().st_gid for path in (lent, *lent.iterdir())} == {own}
    assert mode_of(lent.parent) == 0o711  # the run folder: through, and no look around


def test_what_is_lent_already_stays_and_what_was_renewed_is_lent_anew(site, lent):
    lend(site, lent, os.getgid())
    before = lending._stamp(lent)
    lend(site, lent, os.getgid())
    assert lending._stamp(lent) == before
    (site.folder / NODE_KEY_FILE).write_bytes(b"another key")
    lend(site, lent, os.getgid())
    assert lending._stamp(lent) != before
    assert (lent / NODE_KEY_FILE).read_bytes() == b"another key"
    assert mode_of(lent / NODE_KEY_FILE) == 0o640


def test_a_courier_has_copies_of_its_own_and_is_set_up_with_them(site, lent, tmp_path):
    lend(site, lent, os.getgid())
    own = tmp_path / "courier"
    settings = courier_settings(borrow(lent, own), Paths(site.folder), state=own)
    assert mode_of(own) == 0o700
    assert {mode_of(own / name) for name in LENT_FILES} == {0o600}
    assert (settings.state, settings.node_key, settings.ca) == (own, own / NODE_KEY_FILE, own / CA_FILE)
    assert settings.service == Paths(site.folder).service_socket
    assert settings.coordinator == "127.0.0.1:9443"


def test_where_nothing_is_lent_the_courier_says_so(lent, tmp_path):
    with pytest.raises(CustodyError, match=r"join\.json cannot be read"):
        borrow(lent, tmp_path / "courier")


def test_the_courier_ends_when_other_files_are_lent_and_not_before(site, lent, monkeypatch):
    ended = []
    monkeypatch.setattr(lending.os, "kill", lambda pid, number: ended.append(pid))
    lend(site, lent, None)
    lending.end_when_changed(lent, every=0.01)
    (lent / NODE_KEY_FILE).rename(lent / "away")  # a file is missing for a moment: no change yet
    time.sleep(0.1)
    assert not ended
    (lent / "away").rename(lent / NODE_KEY_FILE)
    lend(site, lent, None)
    time.sleep(0.1)
    assert not ended
    (site.folder / NODE_KEY_FILE).write_bytes(b"another key")
    lend(site, lent, None)
    limit = time.monotonic() + 5
    while not ended and time.monotonic() < limit:
        time.sleep(0.01)
    assert ended == [os.getpid()]


def test_groups_go_by_name():
    assert group_number("") is None
    assert group_number(grp.getgrgid(os.getgid()).gr_name) == os.getgid()
    with pytest.raises(InvalidConfig, match="没有这个组"):
        group_number("没有这个组")
