import json
import multiprocessing
import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enrolled import node_public_key
from msgspec.structs import replace

from fedseek.errors import CustodyError, Expired, FedseekError, InvalidConfig, Malformed, WrongKey
from fedseek.identity.authority import create_authority, write_private_key
from fedseek.identity.enrolment import make_renewal, make_request, parse_join_file
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signed_roster import check_successor, make_signed_roster, parse_signed_roster
from fedseek_server import consortium_files
from fedseek_server.consortium import create_consortium, open_consortium
from fedseek_server.node_list import NodeList

NOW = 1_800_000_000
DAY = 86_400
NAME = "华东联合"
PASSPHRASE = "联合体的密码短语共十二个字以上"  # noqa: S105
WORLD = {"name": NAME, "hosts": ("localhost", "127.0.0.1"), "address": "localhost:9443", "now": NOW}


@pytest.fixture
def consortium(tmp_path):
    return create_consortium(tmp_path / "联合体", **WORLD)


def site(name: str, kind: str = "bank"):
    identity = SiteIdentity.generate(name, kind)
    return identity, make_request(identity, node_public_key(), NOW)


def renewal(identity, *, node_key=None):
    new = SiteIdentity.generate(identity.name, identity.kind)
    request = make_request(new, node_key or node_public_key(), NOW)
    return new, request, make_renewal(identity, request).to_bytes()


def names(consortium):
    return [member.entry.name for member in consortium.signed_roster.members]


# making one


def test_a_new_consortium_has_an_empty_signed_roster_and_a_certificate(consortium):
    opened = open_consortium(consortium.folder)
    assert opened.signed_roster == consortium.signed_roster
    assert (opened.name, opened.signed_roster.number, opened.signed_roster.members) == (NAME, 0, ())
    assert opened.node_keys() == {}
    pem = opened.certificate.read_bytes()
    certificate, ca = (
        x509.load_pem_x509_certificate(each) for each in (pem, (consortium.folder / "ca.pem").read_bytes())
    )
    certificate.verify_directly_issued_by(ca)
    assert b"PRIVATE KEY" in opened.key.read_bytes()


def test_everything_is_for_its_owner_only(tmp_path):
    before = os.umask(0)
    try:
        made = create_consortium(tmp_path / "c", **WORLD)
        made.admit(site("北岸银行")[1], NOW)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [made.folder, *made.folder.rglob("*")]}
    assert modes == {0o700, 0o600}


def test_it_does_not_print_secrets(consortium):
    assert "PRIVATE" not in repr(consortium)
    assert NAME in repr(consortium)


def test_a_consortium_is_never_overwritten(consortium):
    with pytest.raises(CustodyError, match="exists"):
        create_consortium(consortium.folder, **WORLD)
    (consortium.folder / "consortium.json").unlink()  # even half of one
    with pytest.raises(CustodyError, match="exists"):
        create_consortium(consortium.folder, **WORLD)


def test_an_operators_own_files_may_be_there_before(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "coordinator.toml").write_text("# mine")
    create_consortium(tmp_path / "c", **WORLD)
    assert (tmp_path / "c" / "coordinator.toml").read_text() == "# mine"


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"name": " x"}, Malformed),
        ({"address": "elsewhere:9443"}, InvalidConfig),
        ({"address": "localhost"}, Malformed),
        ({"hosts": ()}, InvalidConfig),
        ({"hosts": ("localhost", "a_b")}, InvalidConfig),
        ({"passphrase": "short"}, CustodyError),
        ({"days": 0}, InvalidConfig),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, changed, error):
    with pytest.raises(error):
        create_consortium(tmp_path / "c", **{**WORLD, **changed})


def test_where_there_is_none_the_hint_says_how_to_make_one(tmp_path):
    with pytest.raises(CustodyError, match="init"):
        open_consortium(tmp_path)


# admitting


def test_a_site_is_admitted_and_gets_all_it_needs(consortium):
    bank, request = site("北岸银行")
    join = parse_join_file(consortium.admit(request, NOW).to_bytes())
    roster = join.signed_roster()
    assert roster == consortium.signed_roster
    assert roster.roster.names == ("北岸银行",)
    assert roster.member("北岸银行").expires_at == NOW + 90 * DAY
    assert (join.consortium, join.coordinator) == (NAME, "localhost:9443")
    assert join.ca == (consortium.folder / "ca.pem").read_bytes()
    assert join.authority == consortium.about.authority
    assert consortium.node_keys() == {"北岸银行": request.node_key}
    assert consortium.former_node_keys() == {}
    roster.roster.require(bank.public())


def test_every_roster_follows_the_one_before_and_is_kept(consortium):
    held = [consortium.signed_roster]
    for name in ("c", "a", "b"):
        consortium.admit(site(name)[1], NOW)
        held.append(consortium.signed_roster)
    held.append(consortium.revoke("a", NOW))
    for before, after in pairwise(held):
        check_successor(before, after)
        assert after.previous == before.digest()
    kept = sorted((consortium.folder / "rosters").iterdir())
    assert [parse_signed_roster(path.read_bytes(), authority=consortium.about.authority) for path in kept] == held


def test_the_same_request_twice_changes_nothing(consortium):
    _, request = site("北岸银行")
    first = consortium.admit(request, NOW)
    assert consortium.admit(request, NOW + DAY) == first
    assert consortium.signed_roster.number == 1


def test_a_name_that_is_taken_is_not_admitted_with_other_keys(consortium):
    bank, request = site("北岸银行")
    consortium.admit(request, NOW)
    for other in (site("北岸银行")[1], make_request(bank, node_public_key(), NOW)):
        with pytest.raises(WrongKey, match="other keys") as caught:
            consortium.admit(other, NOW)
        assert "renews" in caught.value.hint
        assert "revoke" in caught.value.hint
    assert consortium.node_keys() == {"北岸银行": request.node_key}
    assert consortium.signed_roster.number == 1


@pytest.mark.parametrize("name", ["bank a", "\uff22\uff21\uff2e\uff2b A"])
def test_a_name_that_reads_like_another_is_not_admitted(consortium, name):
    consortium.admit(site("Bank A")[1], NOW)
    with pytest.raises(Malformed):
        consortium.admit(site(name)[1], NOW)
    assert names(open_consortium(consortium.folder)) == ["Bank A"]


def test_a_request_that_was_altered_is_refused_also_when_nobody_parsed_it(consortium):
    _, request = site("北岸银行")
    with pytest.raises(WrongKey):
        consortium.admit(replace(request, node_key=node_public_key()), NOW)
    assert consortium.signed_roster.number == 0


def test_a_node_key_is_one_sites(consortium):
    _, request = site("北岸银行")
    consortium.admit(request, NOW)
    other = SiteIdentity.generate("南岸银行", "bank")
    with pytest.raises(WrongKey, match="node key"):
        consortium.admit(make_request(other, request.node_key, NOW), NOW)


def test_an_expired_site_is_admitted_again_with_new_keys_only(consortium):
    bank, request = site("北岸银行")
    consortium.admit(request, NOW)
    late = NOW + 90 * DAY
    with pytest.raises(WrongKey, match="were on roster"):
        consortium.admit(make_request(bank, node_public_key(), late), late)
    _, fresh = site("北岸银行")
    consortium.admit(fresh, late)
    assert consortium.node_keys() == {"北岸银行": fresh.node_key}
    assert consortium.former_node_keys() == {}  # nobody vouched for the new keys but people


# revoking


def test_a_revoked_site_is_off_the_roster_and_its_node_is_let_in_no_more(consortium):
    _, bank = site("北岸银行")
    _, other = site("南岸银行")
    for request in (bank, other):
        consortium.admit(request, NOW)
    roster = consortium.revoke("北岸银行", NOW)
    assert names(consortium) == ["南岸银行"]
    assert roster == consortium.signed_roster
    assert consortium.node_keys() == {"南岸银行": other.node_key}
    assert "北岸银行" not in (consortium.folder / "nodes.json").read_text("utf-8")


def test_revoked_keys_never_come_back_but_the_site_may(consortium):
    bank, request = site("北岸银行")
    consortium.admit(request, NOW)
    consortium.revoke("北岸银行", NOW)
    with pytest.raises(WrongKey, match="were on roster 1"):
        consortium.admit(request, NOW)
    renamed = SiteIdentity(
        "改名银行", "bank", SiteIdentity.generate("x", "x").signing_key, bank.mlkem_key, bank.x25519_key
    )
    with pytest.raises(WrongKey, match="as those of '北岸银行'"):  # nor half of them under another name
        consortium.admit(make_request(renamed, node_public_key(), NOW), NOW)
    consortium.admit(site("北岸银行")[1], NOW)
    assert names(consortium) == ["北岸银行"]


def test_a_stranger_cannot_be_revoked(consortium):
    with pytest.raises(WrongKey, match="on it are: none"):
        consortium.revoke("nobody", NOW)
    consortium.admit(site("北岸银行")[1], NOW)
    with pytest.raises(WrongKey, match="on it are: 北岸银行"):
        consortium.revoke("nobody", NOW)
    assert consortium.signed_roster.number == 1


# renewing


def test_a_site_renews_its_keys_itself_and_nobody_else_is_touched(consortium):
    bank, request = site("北岸银行")
    _, other = site("南岸银行")
    for each in (request, other):
        consortium.admit(each, NOW)
    untouched = consortium.signed_roster.member("南岸银行")
    new, new_request, data = renewal(bank)
    roster = consortium.renew(data, NOW + 60 * DAY)
    assert roster.member("北岸银行").entry == new.public()
    assert roster.member("北岸银行").expires_at == NOW + 150 * DAY
    assert roster.member("南岸银行") == untouched
    assert consortium.node_keys() == {"北岸银行": new_request.node_key, "南岸银行": other.node_key}
    assert consortium.former_node_keys() == {"北岸银行": request.node_key}  # the site does not know yet
    keys = {request.node_key: "北岸银行", new_request.node_key: "北岸银行", other.node_key: "南岸银行"}
    assert consortium.nodes() == keys


def test_the_former_node_key_goes_when_the_site_was_seen_or_renews_or_leaves(consortium):
    bank, request = site("北岸银行")
    consortium.admit(request, NOW)
    new, second, data = renewal(bank)
    consortium.renew(data, NOW)
    consortium.forget_former("北岸银行")
    assert consortium.former_node_keys() == {}
    assert consortium.node_keys() == {"北岸银行": second.node_key}
    newest, third, data = renewal(new)
    consortium.renew(data, NOW)
    assert consortium.former_node_keys() == {"北岸银行": second.node_key}
    _, fourth, data = renewal(newest)
    consortium.renew(data, NOW)
    assert consortium.former_node_keys() == {"北岸银行": third.node_key}
    assert consortium.node_keys() == {"北岸银行": fourth.node_key}
    consortium.revoke("北岸银行", NOW)
    assert (consortium.node_keys(), consortium.former_node_keys()) == ({}, {})


def test_the_same_renewal_twice_changes_nothing(consortium):
    bank, request = site("北岸银行")
    consortium.admit(request, NOW)
    _, _, data = renewal(bank)
    first = consortium.renew(data, NOW)
    assert consortium.renew(data, NOW + 1) == first
    assert consortium.former_node_keys() == {"北岸银行": request.node_key}


def test_an_old_renewal_does_not_bring_old_keys_back(consortium):
    bank, request = site("北岸银行")
    consortium.admit(request, NOW)
    new, _, first = renewal(bank)
    consortium.renew(first, NOW)
    _, _, second = renewal(new)
    consortium.renew(second, NOW)
    with pytest.raises(WrongKey):
        consortium.renew(first, NOW)
    back = make_renewal(new, request)  # vouched for, but with the keys of the first roster
    with pytest.raises(WrongKey):
        consortium.renew(back.to_bytes(), NOW)


def test_a_renewal_to_keys_that_were_used_before_is_refused(consortium):
    bank, request = site("北岸银行")
    consortium.admit(request, NOW)
    new, _, data = renewal(bank)
    consortium.renew(data, NOW)
    with pytest.raises(WrongKey, match="were on roster 1"):
        consortium.renew(make_renewal(new, make_request(bank, node_public_key(), NOW)).to_bytes(), NOW)


def test_false_renewals_are_refused(consortium):
    bank, request = site("北岸银行")
    stranger = SiteIdentity.generate("北岸银行", "bank")
    _, _, unknown = renewal(bank)
    with pytest.raises(WrongKey, match="not on the roster"):
        consortium.renew(unknown, NOW)
    consortium.admit(request, NOW)
    _, _, forged = renewal(stranger)
    with pytest.raises(WrongKey, match="does not verify"):
        consortium.renew(forged, NOW)
    _, _, same_node = renewal(bank, node_key=request.node_key)
    with pytest.raises(WrongKey, match="node key"):
        consortium.renew(same_node, NOW)
    with pytest.raises(Malformed):
        consortium.renew(b"{}", NOW)
    assert consortium.signed_roster.number == 1


def test_expired_keys_vouch_for_none(consortium):
    bank, request = site("北岸银行")
    consortium.admit(request, NOW)
    _, _, data = renewal(bank)
    with pytest.raises(Expired, match="expired 3 days ago"):
        consortium.renew(data, NOW + 93 * DAY)


# the authority's keys


def test_reading_needs_no_passphrase_and_signing_does(tmp_path):
    made = create_consortium(tmp_path / "c", **WORLD, passphrase=PASSPHRASE)
    bank, request = site("北岸银行")
    made.admit(request, NOW)
    daemon = open_consortium(tmp_path / "c")
    assert names(daemon) == ["北岸银行"]
    assert daemon.node_keys() == {"北岸银行": request.node_key}
    assert daemon.certificate.exists()
    daemon.audit_chain(retention_days=180).close()
    assert daemon.ages(NOW)
    _, _, data = renewal(bank)
    for sign in (
        lambda: daemon.admit(site("南岸银行")[1], NOW),
        lambda: daemon.renew(data, NOW),
        lambda: daemon.revoke("北岸银行", NOW),
        daemon.join_file,
    ):
        with pytest.raises(CustodyError, match="passphrase"):
            sign()
    with pytest.raises(WrongKey):
        open_consortium(tmp_path / "c", passphrase=PASSPHRASE + "!")
    open_consortium(tmp_path / "c", passphrase=PASSPHRASE).renew(data, NOW)
    assert daemon.signed_roster.number == 2


def test_the_authority_may_be_kept_elsewhere(consortium, tmp_path):
    consortium.admit(site("北岸银行")[1], NOW)
    (consortium.folder / "authority").rename(tmp_path / "stick")
    daemon = open_consortium(consortium.folder)
    assert names(daemon) == ["北岸银行"]
    with pytest.raises(CustodyError):
        daemon.revoke("北岸银行", NOW)
    (tmp_path / "stick").rename(consortium.folder / "authority")
    daemon.revoke("北岸银行", NOW)
    assert names(daemon) == []


def test_another_authority_in_its_place_signs_nothing(consortium, tmp_path):
    (consortium.folder / "authority").rename(tmp_path / "away")
    create_authority(consortium.folder / "authority", name=NAME, now=NOW)
    with pytest.raises(WrongKey, match="another authority"):
        open_consortium(consortium.folder).admit(site("北岸银行")[1], NOW)


def test_another_audit_key_in_its_place_is_noticed(consortium):
    write_private_key(consortium.folder / "coordinator.key", Ed25519PrivateKey.generate())
    with pytest.raises(WrongKey, match="join files name"):
        consortium.audit_chain(retention_days=180)


# certificates and ages


def test_a_certificate_is_renewed_in_its_last_month_and_is_of_the_same_authority(consortium):
    before = consortium.certificate.read_bytes()
    assert not consortium.renew_certificate(NOW + 59 * DAY)
    assert consortium.certificate.read_bytes() == before
    assert consortium.renew_certificate(NOW + 60 * DAY)
    after = consortium.certificate.read_bytes()
    assert after != before
    ca = x509.load_pem_x509_certificate((consortium.folder / "ca.pem").read_bytes())
    x509.load_pem_x509_certificate(after).verify_directly_issued_by(ca)
    assert not consortium.renew_certificate(NOW + 60 * DAY)


def test_a_short_lived_certificate_is_not_renewed_all_the_time(tmp_path):
    made = create_consortium(tmp_path / "c", **WORLD, days=3)
    assert not made.renew_certificate(NOW + DAY)
    assert made.renew_certificate(NOW + 2 * DAY)


def test_without_the_authority_a_good_certificate_stays_and_an_expired_one_is_an_error(consortium, tmp_path, caplog):
    (consortium.folder / "authority").rename(tmp_path / "stick")
    daemon = open_consortium(consortium.folder)
    assert not daemon.renew_certificate(NOW + 80 * DAY)
    assert "10 days" in caplog.text
    with pytest.raises(CustodyError):
        daemon.renew_certificate(NOW + 91 * DAY)


def test_ages(consortium):
    consortium.admit(site("北岸银行")[1], NOW + 10 * DAY)
    ages = {age.what: (age.days_old, age.days_left) for age in consortium.ages(NOW + 20 * DAY)}
    assert ages == {
        "CA certificate": (20, 3630),
        "roster key of the authority": (20, None),
        "audit key of the coordinator": (20, None),
        "server certificate": (20, 70),
        "keys of 北岸银行": (10, 80),
    }
    assert {age.what: age for age in consortium.ages(NOW + 101 * DAY)}["keys of 北岸银行"].days_left < 0


# two processes, crashes, damage


def test_a_running_daemon_sees_what_the_operator_does(consortium):
    daemon = open_consortium(consortium.folder)
    assert names(daemon) == []
    for count in range(1, 6):
        consortium.admit(site(f"bank-{count}")[1], NOW)
        assert len(names(daemon)) == len(daemon.node_keys()) == count
    daemon.revoke("bank-3", NOW)
    assert names(consortium) == names(daemon) == ["bank-1", "bank-2", "bank-4", "bank-5"]


def admit_five(folder: Path, prefix: str) -> None:
    opened = open_consortium(folder)
    for number in range(5):
        opened.admit(site(f"{prefix}-{number}")[1], NOW)


def test_two_processes_at_once_lose_nothing(consortium):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=admit_five, args=(consortium.folder, prefix)) for prefix in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert consortium.signed_roster.number == 10
    assert len(consortium.node_keys()) == 10


class PowerCut(BaseException):
    """Nothing of ours catches it."""


@pytest.mark.parametrize("action", ["admit", "renew", "revoke"])
@pytest.mark.parametrize("writes", [0, 1, 2])
@pytest.mark.parametrize("late", [False, True])
def test_a_crash_at_any_write_leaves_the_old_roster_or_the_new_one(consortium, monkeypatch, action, writes, late):
    bank, request = site("北岸银行")
    _, other = site("南岸银行")
    consortium.admit(request, NOW)
    _, new_request, data = renewal(bank)
    act = {
        "admit": lambda opened: opened.admit(other, NOW),
        "renew": lambda opened: opened.renew(data, NOW),
        "revoke": lambda opened: opened.revoke("北岸银行", NOW),
    }[action]
    expected = {
        "admit": {"北岸银行": request.node_key, "南岸银行": other.node_key},
        "renew": {"北岸银行": new_request.node_key},
        "revoke": {},
    }[action]
    done, true_write = [], consortium_files.write_secret_file

    def write(path, content):
        if len(done) == writes:
            if late:
                true_write(path, content)
            raise PowerCut
        done.append(path)
        true_write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(consortium_files, "write_secret_file", write)
        with pytest.raises(PowerCut):
            act(consortium)
    opened = open_consortium(consortium.folder)
    if opened.signed_roster.number == 1:  # nothing happened
        assert opened.node_keys() == {"北岸银行": request.node_key}
        assert opened.former_node_keys() == {}
    else:
        assert opened.node_keys() == expected
    if action != "revoke" or opened.signed_roster.number == 1:
        act(opened)  # again
    assert opened.signed_roster.number == 2
    assert opened.node_keys() == expected
    assert opened.former_node_keys() == ({"北岸银行": request.node_key} if action == "renew" else {})
    kept = sorted((consortium.folder / "rosters").iterdir())
    assert len(kept) == 3


def test_a_roster_put_back_from_a_backup_is_put_right(consortium):
    old = (consortium.folder / "roster.json").read_bytes()
    consortium.admit(site("北岸银行")[1], NOW)
    (consortium.folder / "roster.json").write_bytes(old)
    assert open_consortium(consortium.folder).signed_roster.number == 1
    (consortium.folder / "roster.json").unlink()
    assert open_consortium(consortium.folder).signed_roster.number == 1


def test_lost_past_rosters_do_not_stop_a_consortium(consortium):
    consortium.admit(site("北岸银行")[1], NOW)
    for path in (consortium.folder / "rosters").iterdir():
        path.unlink()
    opened = open_consortium(consortium.folder)
    opened.admit(site("南岸银行")[1], NOW)
    assert opened.signed_roster.number == 2


def test_two_rosters_of_one_number_are_not_built_upon(consortium):
    consortium.admit(site("北岸银行")[1], NOW)
    signer = consortium._signer()
    other = make_signed_roster(
        signer.roster_key, consortium=NAME, number=1, members=(), issued_at=NOW, previous=bytes(32)
    )
    (consortium.folder / "roster.json").write_bytes(other.to_bytes())
    with pytest.raises(CustodyError, match="two rosters of number 1"):
        open_consortium(consortium.folder)


@pytest.mark.parametrize("name", ["consortium.json", "roster.json", "nodes.json", "rosters/0000000001.json"])
def test_damaged_files_are_refused_and_named(consortium, name):
    consortium.admit(site("北岸银行")[1], NOW)
    path = consortium.folder / name
    document = json.loads(path.read_bytes())
    for damaged in ({**document, "note": 1}, {**document, "version": 2}, {}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(Malformed):
            open_consortium(consortium.folder).node_keys()
    path.write_text(json.dumps(document))
    path.chmod(0o644)
    with pytest.raises(CustodyError, match="0600"):
        open_consortium(consortium.folder).node_keys()
    path.chmod(0o600)
    assert open_consortium(consortium.folder).node_keys()


def test_an_altered_roster_or_authority_is_refused(consortium):
    consortium.admit(site("北岸银行")[1], NOW)
    path = consortium.folder / "roster.json"
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps({**document, "members": []}))
    with pytest.raises(WrongKey):
        _ = consortium.signed_roster
    path.write_text(json.dumps(document))
    about = consortium.folder / "consortium.json"
    about.write_text(json.dumps({**json.loads(about.read_bytes()), "name": "另一个"}))
    with pytest.raises(Malformed, match="wanted one of"):
        open_consortium(consortium.folder)


def test_a_node_list_is_strict():
    node = {"site": "x", "entry": "A" * 43 + "=", "key": "eA==", "number": 1}
    from fedseek.identity.forms import parse_form

    with pytest.raises(Malformed, match="node key"):
        parse_form(json.dumps({"version": 1, "nodes": [node]}).encode(), NodeList, limit=10_000)
    with pytest.raises(FedseekError):
        parse_form(b'{"nodes": []}', NodeList, limit=10_000)
