import base64
import os
import pickle
import stat
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from enrolled import CONSORTIUM, NOW, public_bytes, signed_roster

from fedseek.errors import CustodyError, Expired, Malformed, WrongKey, WrongRound
from fedseek.identity.authority import create_authority
from fedseek.identity.enrolment import check_renewal, make_join_file, parse_renewal, parse_request
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.secret_files import write_secret_file
from fedseek.identity.signed_roster import Member, make_signed_roster
from fedseek.identity.vault import open_at_rest, seal_at_rest, unlock
from fedseek_site import enrol
from fedseek_site.enrol import (
    begin_renewal,
    create_site,
    finish_renewal,
    join,
    make_join_request,
    open_public,
    open_site,
    site_ages,
    take_roster,
)

DAY = 86_400
PASSPHRASE = "北岸银行的密码短语共十二字以上"  # noqa: S105
OTHER = SiteIdentity.generate("仁济医院", "hospital")
KEY = Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return create_authority(tmp_path_factory.mktemp("ca") / "authority", name=CONSORTIUM, now=NOW).ca


@pytest.fixture
def make_join(ca):
    def make(roster, *, key=KEY, coordinator="localhost:9443"):
        return make_join_file(
            key, coordinator=coordinator, ca=ca, coordinator_key=public_bytes(KEY), roster=roster
        ).to_bytes()

    return make


@pytest.fixture
def folder(tmp_path):
    create_site(tmp_path / "北岸", name="北岸银行", kind="bank")
    return tmp_path / "北岸"


def roster_of(*entries, after=None, key=KEY, consortium=CONSORTIUM, number=None):
    """A roster of entries as the authority knows them: without private keys."""
    return make_signed_roster(
        key,
        consortium=consortium,
        number=(0 if after is None else after.number + 1) if number is None else number,
        members=[Member(entry, NOW, NOW + 90 * DAY) for entry in entries],
        issued_at=NOW,
        previous=bytes(32) if after is None else after.digest(),
    )


def node_public(path):
    """Of a node key as the courier reads it: OpenSSH form, no passphrase."""
    key = load_ssh_private_key(path.read_bytes(), None)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def own_entry(folder):
    return make_join_request(folder, now=NOW).entry


@pytest.fixture
def site(folder, make_join):
    return join(folder, make_join(roster_of(own_entry(folder), OTHER.public())), now=NOW)


# a new folder


def test_a_request_shows_the_public_half_and_the_node_key(folder):
    request = parse_request(make_join_request(folder, now=NOW).to_bytes())
    assert (request.entry.name, request.entry.kind) == ("北岸银行", "bank")
    assert node_public(folder / "node.key") == request.node_key


def test_no_private_key_is_in_a_request(folder):
    identity = open_identity(folder)
    data = make_join_request(folder, now=NOW).to_bytes()
    assert b"PRIVATE" not in data
    for secret in (identity.signing_key, identity.x25519_key, identity.mlkem_key):
        raw = secret.private_bytes_raw()
        assert base64.b64encode(raw)[:-4] not in data


def open_identity(folder):
    return unlock(folder / "identity.sealed", key_file=folder / "storage.key")[0]


def test_files_are_for_their_owner_only(tmp_path):
    before = os.umask(0)
    try:
        create_site(tmp_path / "s", name="x", kind="bank")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "s").iterdir()} == dict.fromkeys(
        (".lock", "identity.sealed", "storage.key", "node.key"), 0o600
    )


def test_a_site_is_never_overwritten(folder):
    before = own_entry(folder)
    with pytest.raises(CustodyError, match="holds a site already"):
        create_site(folder, name="北岸银行", kind="bank")
    assert own_entry(folder) == before


def test_a_site_that_was_half_made_is_made_again(folder):
    (folder / "identity.sealed").unlink()
    key = (folder / "storage.key").read_bytes()
    entry = create_site(folder, name="北岸银行", kind="bank")
    assert own_entry(folder) == entry
    assert (folder / "storage.key").read_bytes() == key  # it may have sealed other files


def test_under_a_passphrase_there_is_no_key_file(tmp_path, make_join):
    entry = create_site(tmp_path / "s", name="北岸银行", kind="bank", passphrase=PASSPHRASE)
    assert not (tmp_path / "s/storage.key").exists()
    with pytest.raises(CustodyError, match="got none"):
        make_join_request(tmp_path / "s", now=NOW)
    with pytest.raises(WrongKey):
        make_join_request(tmp_path / "s", now=NOW, passphrase=PASSPHRASE + "!")
    joined = join(tmp_path / "s", make_join(roster_of(entry)), now=NOW, passphrase=PASSPHRASE)
    renewal = parse_renewal(begin_renewal(joined, now=NOW))
    take_roster(joined, roster_of(renewal.request.entry, after=joined.signed_roster).to_bytes())
    opened = open_site(tmp_path / "s", passphrase=PASSPHRASE)
    assert opened.identity.public() == renewal.request.entry
    sealed = seal_at_rest(joined.storage_key, b"journal", purpose="p")
    assert open_at_rest(opened.storage_key, sealed, purpose="p") == b"journal"


def test_a_key_file_is_not_opened_with_a_passphrase(folder):
    with pytest.raises(WrongKey, match="key file"):
        make_join_request(folder, now=NOW, passphrase=PASSPHRASE)


@pytest.mark.parametrize(("name", "kind"), [("", "bank"), ("a/b", "bank"), ("x", " bank")])
def test_a_wrong_name_leaves_nothing(tmp_path, name, kind):
    with pytest.raises(Malformed):
        create_site(tmp_path / "s", name=name, kind=kind)
    assert not (tmp_path / "s").exists()


def test_folders_that_are_not_ready_say_what_to_do(folder, tmp_path):
    for act in (open_site, open_public):
        with pytest.raises(CustodyError, match="not joined") as caught:
            act(folder)
        assert "fedseek-site request" in caught.value.hint
    with pytest.raises(CustodyError, match="holds no site"):
        make_join_request(tmp_path, now=NOW)


# joining


def test_a_site_that_joined_has_all_it_needs(site, folder, ca):
    opened = open_site(folder)
    assert opened.signed_roster == site.signed_roster
    assert opened.join.coordinator == "localhost:9443"
    assert opened.trusted == site.signed_roster.roster
    assert opened.member.entry == opened.identity.public()
    assert opened.ca_path.read_bytes() == ca
    assert node_public(opened.node_key)
    public = open_public(folder)
    assert (public.join, public.node_key, public.ca_path) == (opened.join, opened.node_key, opened.ca_path)


def test_an_open_site_does_not_print_or_pickle_secrets(site):
    assert site.identity.signing_key.private_bytes_raw().hex() not in repr(site)
    assert "redacted" in repr(site)
    with pytest.raises(TypeError):
        pickle.dumps(site)


def test_a_join_file_without_this_site_is_refused(folder, make_join):
    twin = SiteIdentity.generate("北岸银行", "bank").public()
    for entries in ((OTHER.public(),), (twin, OTHER.public())):
        with pytest.raises(WrongKey):
            join(folder, make_join(roster_of(*entries)), now=NOW)
    with pytest.raises(CustodyError, match="no sites"):
        join(folder, make_join(roster_of()), now=NOW)
    with pytest.raises(CustodyError, match="not joined"):
        open_site(folder)


def test_an_altered_join_file_is_refused(folder, make_join):
    data = make_join(roster_of(own_entry(folder)))
    with pytest.raises(WrongKey):
        join(folder, data.replace(b"localhost:9443", b"evil.example:1"), now=NOW)
    with pytest.raises(Malformed):
        join(folder, data[:-20], now=NOW)


def test_expired_keys_do_not_join(folder, make_join):
    with pytest.raises(Expired):
        join(folder, make_join(roster_of(own_entry(folder))), now=NOW + 90 * DAY)


def test_the_same_authority_may_tell_a_new_address(site, folder, make_join):
    again = join(folder, make_join(site.signed_roster, coordinator="127.0.0.1:1"), now=NOW)
    assert again.join.coordinator == "127.0.0.1:1"
    later = roster_of(site.identity.public(), after=site.signed_roster)
    assert join(folder, make_join(later), now=NOW).signed_roster == later
    with pytest.raises(WrongRound):
        join(folder, make_join(site.signed_roster), now=NOW)


def test_another_authority_is_not_joined_in_the_same_folder(site, folder, make_join):
    stranger = Ed25519PrivateKey.generate()
    false = roster_of(site.identity.public(), key=stranger, number=9)
    with pytest.raises(CustodyError, match="another authority"):
        join(folder, make_join(false, key=stranger), now=NOW)
    elsewhere = roster_of(site.identity.public(), consortium="另一个", number=9)
    with pytest.raises(CustodyError, match="has joined"):
        join(folder, make_join(elsewhere), now=NOW)
    assert open_site(folder).signed_roster == site.signed_roster


# rosters


def test_a_newer_roster_is_taken_and_stays(site, folder):
    third = SiteIdentity.generate("st-anna", "hospital").public()
    newer = roster_of(site.identity.public(), OTHER.public(), third, after=site.signed_roster)
    assert take_roster(site, newer.to_bytes()) == newer
    assert take_roster(site, newer.to_bytes()) == newer  # twice is no harm
    assert open_site(folder).trusted.names == ("st-anna", "仁济医院", "北岸银行")


def test_false_old_and_forked_rosters_are_refused_and_change_nothing(site, folder):
    mine = site.identity.public()
    newer = roster_of(mine, after=site.signed_roster)
    take_roster(site, newer.to_bytes())
    forked = roster_of(mine, OTHER.public(), after=site.signed_roster)
    refusals = [
        (site.signed_roster, WrongRound),
        (forked, CustodyError),
        (roster_of(mine, after=forked), CustodyError),
        (roster_of(mine, number=9, key=Ed25519PrivateKey.generate()), WrongKey),
        (roster_of(mine, number=9, consortium="另一个"), CustodyError),
        (roster_of(SiteIdentity.generate("北岸银行", "bank").public(), after=newer), WrongKey),
    ]
    for offered, error in refusals:
        with pytest.raises(error):
            take_roster(site, offered.to_bytes())
    with pytest.raises(Malformed):
        take_roster(site, b"{}")
    assert open_site(folder).signed_roster == newer


def test_keys_that_the_site_never_made_are_told_as_such(site):
    stranger = SiteIdentity.generate("北岸银行", "bank")
    with pytest.raises(WrongKey, match="never made") as caught:
        take_roster(site, signed_roster(KEY, stranger, OTHER, after=site.signed_roster).to_bytes())
    assert stranger.public().fingerprint() in str(caught.value)


def test_a_site_that_was_taken_off_learns_it_and_trusts_none(site, folder):
    for gone in (roster_of(OTHER.public(), after=site.signed_roster), roster_of(number=7)):
        assert take_roster(site, gone.to_bytes()) == gone
        opened = open_site(folder)
        assert opened.member is None
        assert opened.trusted is None
        assert site_ages(opened, NOW)[0].days_left < 0


# renewals


def test_a_renewal_goes_through(site, folder):
    first = parse_renewal(begin_renewal(site, now=NOW))
    check_renewal(first, site.identity.public())
    again = parse_renewal(begin_renewal(site, now=NOW + 5))
    assert again.request.entry == first.request.entry  # made once, offered again
    assert again.request.node_key == first.request.node_key
    old_node = site.node_key.read_bytes()
    assert not finish_renewal(site)
    assert open_site(folder).identity.public() == site.identity.public()
    assert site.node_key.read_bytes() == old_node
    newer = roster_of(first.request.entry, OTHER.public(), after=site.signed_roster)
    take_roster(site, newer.to_bytes())
    assert finish_renewal(site)
    opened = open_site(folder)
    assert opened.identity.public() == first.request.entry
    assert opened.member.entry == first.request.entry
    assert node_public(opened.node_key) == first.request.node_key
    assert not (folder / "pending").exists()
    assert not finish_renewal(opened)
    assert parse_renewal(begin_renewal(opened, now=NOW)).request.entry != first.request.entry


def test_pending_keys_outlive_a_restart_and_other_rosters(site, folder):
    first = parse_renewal(begin_renewal(site, now=NOW))
    opened = open_site(folder)
    take_roster(opened, roster_of(opened.identity.public(), after=opened.signed_roster).to_bytes())
    opened = open_site(folder)
    assert parse_renewal(begin_renewal(opened, now=NOW)).request.entry == first.request.entry
    assert opened.identity.public() == site.identity.public()


def test_a_daemon_notices_that_another_process_finished_its_renewal(site, folder):
    pending = parse_renewal(begin_renewal(site, now=NOW)).request
    take_roster(site, roster_of(pending.entry, after=site.signed_roster).to_bytes())
    open_site(folder)  # such as `fedseek-site keys`
    assert finish_renewal(site)


def test_a_site_that_missed_its_renewal_may_join_again(site, folder, make_join):
    pending = parse_renewal(begin_renewal(site, now=NOW)).request
    newer = roster_of(pending.entry, OTHER.public(), after=site.signed_roster)
    assert join(folder, make_join(newer), now=NOW).identity.public() == pending.entry


class PowerCut(BaseException):
    """Nothing of ours catches it."""


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("moves", [0, 1])
def test_a_crash_while_keys_are_moved_into_place_is_made_up_for(site, folder, monkeypatch, moves, late):
    pending = parse_renewal(begin_renewal(site, now=NOW)).request
    take_roster(site, roster_of(pending.entry, after=site.signed_roster).to_bytes())
    done, true_replace = [], os.replace

    def cut(source, target):
        if len(done) == moves:
            if late:
                true_replace(source, target)
            raise PowerCut
        done.append(target)
        true_replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(enrol.os, "replace", cut)
        with pytest.raises(PowerCut):
            finish_renewal(site)
    opened = open_site(folder)
    assert opened.identity.public() == pending.entry
    assert node_public(opened.node_key) == pending.node_key
    assert not (folder / "pending" / "identity.sealed").exists()


@pytest.mark.parametrize("writes", [0, 1])
@pytest.mark.parametrize("late", [False, True])
def test_a_crash_while_a_roster_is_taken_leaves_matching_keys(site, folder, monkeypatch, writes, late):
    """The roster decides: with the old one the old keys, with the new one the new keys."""
    pending = parse_renewal(begin_renewal(site, now=NOW)).request
    newer = roster_of(pending.entry, after=site.signed_roster)

    def cut(path, data):
        if late:
            write_secret_file(path, data)
        raise PowerCut

    with monkeypatch.context() as patched:
        if writes == 0:
            patched.setattr(enrol, "write_secret_file", cut)
            with pytest.raises(PowerCut):
                take_roster(site, newer.to_bytes())
        else:
            take_roster(site, newer.to_bytes())
    opened = open_site(folder)
    assert opened.member is not None
    assert opened.identity.public() == (pending.entry if late or writes else site.identity.public())
    assert (node_public(opened.node_key) == pending.node_key) == (late or writes == 1)


@pytest.mark.parametrize("calls", range(2))
def test_a_crash_while_pending_keys_are_made_costs_nothing(site, folder, monkeypatch, calls):
    done = []
    for name in ("_make_node_key", "save_identity"):
        true = getattr(enrol, name)

        def act(*arguments, true=true):
            if len(done) == calls:
                raise PowerCut
            done.append(1)
            return true(*arguments)

        monkeypatch.setattr(enrol, name, act)
    with pytest.raises(PowerCut):
        begin_renewal(site, now=NOW)
    monkeypatch.undo()
    opened = open_site(folder)
    assert opened.identity.public() == site.identity.public()
    pending = parse_renewal(begin_renewal(opened, now=NOW)).request
    take_roster(opened, roster_of(pending.entry, after=opened.signed_roster).to_bytes())
    assert finish_renewal(opened)
    assert node_public(open_site(folder).node_key) == pending.node_key


# damage


@pytest.mark.parametrize("name", ["identity.sealed", "storage.key", "roster.json"])
def test_files_that_others_may_open_are_refused(site, folder, name):
    (folder / name).chmod(0o644)
    with pytest.raises(CustodyError, match="0600"):
        open_site(folder)


@pytest.mark.parametrize("name", ["identity.sealed", "storage.key", "roster.json", "join.json"])
def test_damaged_files_are_refused(site, folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises((Malformed, CustodyError)):
        open_site(folder)


def test_a_roster_file_of_another_authority_or_consortium_is_refused(site, folder):
    for false, error in (
        (roster_of(site.identity.public(), key=Ed25519PrivateKey.generate()), WrongKey),
        (roster_of(site.identity.public(), consortium="另一个"), Malformed),
    ):
        (folder / "roster.json").write_bytes(false.to_bytes())
        with pytest.raises(error):
            open_site(folder)


@pytest.mark.parametrize("content", [b"", b"not a key", b"-----BEGIN OPENSSH PRIVATE KEY-----\n"])
def test_a_broken_node_key_is_refused(folder, content):
    (folder / "node.key").write_bytes(content)
    with pytest.raises(Malformed, match="OpenSSH"):
        make_join_request(folder, now=NOW)


def test_ages(site):
    ages = {age.what: (age.days_old, age.days_left) for age in site_ages(site, NOW + 20 * DAY)}
    assert ages == {"keys of 北岸银行": (20, 70), "node key": (20, 70), "CA certificate": (20, 3630)}


def test_the_courier_opens_the_folder_without_loading_private_keys_of_the_site(site, folder):
    open_public(folder)
    (folder / "identity.sealed").unlink()
    (folder / "storage.key").unlink()
    assert open_public(folder).join == site.join


def test_enrolling_needs_no_training_library():
    script = "import sys, fedseek_site.enrol_commands\nsys.exit(bool({'torch', 'flwr', 'grpc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
