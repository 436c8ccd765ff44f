import subprocess
import sys

import msgspec
import pytest

from fedseek.errors import Malformed, WrongKey
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import MAX_NAME_CHARS, Roster, RosterEntry


def entry(name: str, kind: str = "bank") -> RosterEntry:
    return SiteIdentity.generate(name, kind).public()


def test_a_set_of_sites_has_one_roster_and_one_digest():
    a, b, c = entry("a"), entry("北京协和医院", "hospital"), entry("c")
    assert Roster.of([a, b, c]) == Roster.of([c, a, b])
    assert Roster.of([a, b, c]).digest() == Roster.of([b, c, a]).digest()
    assert Roster.of([c, b, a]).names == ("a", "c", "北京协和医院")
    assert len(Roster.of([a]).digest()) == 32


def test_digest_changes_with_every_field_of_every_entry():
    a, b = entry("a"), entry("b")
    digests = {
        Roster.of(entries).digest()
        for entries in (
            [a, b],
            [a],
            [a, entry("b")],
            [a, msgspec.structs.replace(b, name="b2")],
            [a, msgspec.structs.replace(b, kind="hospital")],
            [a, msgspec.structs.replace(b, signing_key=bytes(32))],
            [a, msgspec.structs.replace(b, sealing_key=bytes(1216))],
        )
    }
    assert len(digests) == 7


def test_fingerprint_covers_every_field_in_full():
    a = entry("工商银行")
    changed = [
        msgspec.structs.replace(a, name="工商银行2"),
        msgspec.structs.replace(a, kind="hospital"),
        msgspec.structs.replace(a, signing_key=bytes(32)),
        msgspec.structs.replace(a, sealing_key=bytes(1216)),
    ]
    assert len({each.fingerprint() for each in [a, *changed]}) == 5
    groups = a.fingerprint().split("-")
    assert [len(group) for group in groups] == [8] * 8
    assert bytes.fromhex("".join(groups))


def test_canonical_bytes_decode_to_the_same_roster():
    roster = Roster.of([entry("b"), entry("中国银行")])
    assert msgspec.msgpack.decode(roster.canonical_bytes(), type=Roster) == roster


def test_entry_looks_up_by_name_and_refuses_a_stranger():
    a, b = entry("a"), entry("b")
    roster = Roster.of([a, b])
    assert roster.entry("b") == b
    with pytest.raises(WrongKey, match="'mallory' is not on the roster"):
        roster.entry("mallory")


def test_require_refuses_a_listed_name_with_other_keys_and_shows_both_fingerprints():
    a = entry("a")
    impostor = entry("a")
    with pytest.raises(WrongKey) as caught:
        Roster.of([a]).require(impostor)
    assert a.fingerprint() in str(caught.value)
    assert impostor.fingerprint() in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [("bank-a", "bank-a"), ("bank-a", "Bank-A"), ("bank-a", "ｂａｎｋ-a")],  # noqa: RUF001
    ids=["equal", "case", "full-width"],
)
def test_two_names_that_read_alike_are_refused(first, second):
    with pytest.raises(Malformed, match="same to a reader"):
        Roster.of([entry(first), entry(second)])


@pytest.mark.parametrize("field", ["signing_key", "sealing_key"])
def test_one_key_under_two_names_is_refused(field):
    a, b = entry("a"), entry("b")
    with pytest.raises(WrongKey, match="'a' and 'b' show the same key"):
        Roster.of([a, msgspec.structs.replace(b, **{field: getattr(a, field)})])


def test_unsorted_and_empty_rosters_are_refused():
    a, b = entry("a"), entry("b")
    with pytest.raises(Malformed, match="order"):
        Roster(entries=(b, a))
    with pytest.raises(Malformed, match="0 sites"):
        Roster(entries=())


@pytest.mark.parametrize(
    "name",
    ["", "x" * (MAX_NAME_CHARS + 1), " bank", "bank ", "ba\nnk", "ba\u200bnk", "\u202eknab", "e\u0301"],
    ids=["empty", "long", "space before", "space after", "newline", "zero width", "right to left", "not NFC"],
)
def test_names_that_mislead_a_reader_are_refused(name):
    with pytest.raises(Malformed):
        RosterEntry(name=name, kind="bank", signing_key=bytes(32), sealing_key=bytes(1216))
    with pytest.raises(Malformed):
        RosterEntry(name="bank", kind=name, signing_key=bytes(32), sealing_key=bytes(1216))


@pytest.mark.parametrize(
    "broken",
    [
        {"name": "a\u200b"},
        {"signing_key": bytes(31)},
        {"sealing_key": bytes(1217)},
    ],
    ids=["name", "signing key", "sealing key"],
)
def test_decoding_enforces_what_building_enforces(broken):
    fields = {"name": "a", "kind": "bank", "signing_key": bytes(32), "sealing_key": bytes(1216)}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=RosterEntry).name == "a"
    with pytest.raises(Malformed):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields | broken), type=RosterEntry)


def test_decoding_refuses_unknown_fields():
    fields = {"name": "a", "kind": "bank", "signing_key": bytes(32), "sealing_key": bytes(1216), "note": "hi"}
    with pytest.raises(msgspec.ValidationError, match="note"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=RosterEntry)


def test_a_process_that_only_verifies_never_loads_the_module_of_private_keys():
    script = (
        "import sys, fedseek.identity.roster, fedseek.identity.signing\n"
        "sys.exit('fedseek.identity.keys' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
