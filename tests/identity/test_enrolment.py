import base64
import json
import subprocess
import sys
from contextlib import suppress

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enrolled import CONSORTIUM, NOW, member, node_public_key, public_bytes, signed_roster
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fedseek.errors import CustodyError, FedseekError, Malformed, TooLarge, WrongKey, WrongRound
from fedseek.identity.authority import create_authority
from fedseek.identity.enrolment import (
    MAX_JOIN_FILE_BYTES,
    MAX_RENEWAL_BYTES,
    MAX_REQUEST_BYTES,
    check_node_key,
    check_renewal,
    check_request,
    make_join_file,
    make_renewal,
    make_request,
    parse_join_file,
    parse_renewal,
    parse_request,
    split_address,
)
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import MAX_ROSTER_ENTRIES, RosterEntry
from fedseek.identity.signed_roster import (
    MAX_SIGNED_ROSTER_BYTES,
    Member,
    authority_digest,
    changes,
    check_successor,
    make_signed_roster,
    parse_signed_roster,
)
from fedseek.identity.signing import CONTEXT_JOIN_REQUEST, sign, sign_with

KEY = Ed25519PrivateKey.generate()
AUTHORITY = public_bytes(KEY)
BANK = SiteIdentity.generate("北岸银行", "bank")
NEW_BANK = SiteIdentity.generate("北岸银行", "bank")
HOSPITAL = SiteIdentity.generate("仁济医院", "hospital")
EMPTY = signed_roster(KEY)
FIRST = signed_roster(KEY, BANK, after=EMPTY)
ROSTER = signed_roster(KEY, HOSPITAL, BANK, after=FIRST)
REQUEST = make_request(BANK, node_public_key(), NOW)
NEW_REQUEST = make_request(NEW_BANK, node_public_key(), NOW)
RENEWAL = make_renewal(BANK, NEW_REQUEST)


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return create_authority(tmp_path_factory.mktemp("ca") / "authority", name=CONSORTIUM, now=NOW).ca


@pytest.fixture(scope="module")
def join_file(ca):
    return make_join_file(
        KEY,
        coordinator="fl.example.org:9443",
        ca=ca,
        coordinator_key=public_bytes(Ed25519PrivateKey.generate()),
        roster=ROSTER,
    )


def parse_roster(data: bytes):
    return parse_signed_roster(data, authority=AUTHORITY)


def alterations(value, path=()):
    """Every leaf of a JSON document, and for each a document in which that one alone is another."""
    match value:
        case dict():
            for key in value:
                for where, changed in alterations(value[key], (*path, key)):
                    yield where, {**value, key: changed}
        case list():
            for place in range(len(value)):
                for where, changed in alterations(value[place], (*path, place)):
                    yield where, [*value[:place], changed, *value[place + 1 :]]
            if value:
                yield (*path, "fewer"), value[1:]
        case int():
            yield path, value + 1
        case str():
            try:
                raw = base64.b64decode(value, validate=True)
                yield path, base64.b64encode(raw[:-1] + bytes([raw[-1] ^ 1])).decode()
            except ValueError:
                yield path, value + "x"


def documents(form):
    return alterations(json.loads(form.to_bytes()))


# every form


def parse_renewal_of_the_bank(data: bytes):
    renewal = parse_renewal(data)
    check_renewal(renewal, BANK.public())  # the outer signature is checked against the roster
    return renewal


@pytest.mark.parametrize(
    ("form", "parse"), [(ROSTER, parse_roster), (REQUEST, parse_request), (RENEWAL, parse_renewal_of_the_bank)]
)
def test_every_altered_field_is_refused(form, parse):
    assert parse(form.to_bytes()) == form
    seen = set()
    for where, document in documents(form):
        seen.add(where[0])
        with pytest.raises((WrongKey, Malformed)):
            parse(json.dumps(document).encode())
    assert seen == set(json.loads(form.to_bytes()))


def test_every_altered_field_of_a_join_file_is_refused(join_file):
    assert parse_join_file(join_file.to_bytes()) == join_file
    seen = set()
    for where, document in documents(join_file):
        seen.add(where[0])
        with pytest.raises((WrongKey, Malformed)):
            parse_join_file(json.dumps(document).encode())
    assert seen == set(json.loads(join_file.to_bytes()))


FORMS = [
    (ROSTER, parse_roster, MAX_SIGNED_ROSTER_BYTES),
    (REQUEST, parse_request, MAX_REQUEST_BYTES),
    (RENEWAL, parse_renewal, MAX_RENEWAL_BYTES),
    (None, parse_join_file, MAX_JOIN_FILE_BYTES),
]
PARSERS = [parse for _, parse, _ in FORMS]


@pytest.mark.parametrize(("form", "parse", "limit"), FORMS)
def test_a_form_is_strict_and_bounded(form, parse, limit, join_file):
    data = (form or join_file).to_bytes()
    document = json.loads(data)
    for key in document:
        with pytest.raises(Malformed, match=key):
            parse(json.dumps({each: value for each, value in document.items() if each != key}).encode())
    with pytest.raises(Malformed, match="note"):
        parse(json.dumps({**document, "note": 1}).encode())
    with pytest.raises(Malformed):
        parse(json.dumps({**document, "version": 2}).encode())
    with pytest.raises(TooLarge):
        parse(data + b" " * limit)
    assert parse(data + b" " * (limit - len(data))) == (form or join_file)


@pytest.mark.parametrize(("form", "parse", "limit"), FORMS)
def test_spaces_and_line_ends_do_not_matter(form, parse, limit, join_file):
    form = form or join_file
    assert parse(form.to_bytes().replace(b"\n", b"\r\n")) == form
    assert parse(json.dumps(json.loads(form.to_bytes())).encode()) == form  # with escapes for what is not ASCII


@pytest.mark.parametrize("parse", PARSERS)
@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_random_bytes_are_refused(parse, data):
    with pytest.raises(FedseekError):
        parse(data)


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("data", [b"[" * 9000, b'{"x":' + b"[" * 9000, b'{"consortium":"\\ud800"}', b"\xff\xfe", b""])
def test_hostile_json_is_refused(parse, data):
    with pytest.raises(Malformed):
        parse(data)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_cut_short_or_with_a_flipped_bit_is_refused_or_says_the_same(data):
    whole = FIRST.to_bytes().rstrip()
    place = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(FedseekError):
        parse_roster(whole[:place])
    flipped = whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1 :]
    with suppress(FedseekError):
        assert parse_roster(flipped) == FIRST  # a space became another one


def test_what_is_too_large_inside_is_refused(join_file):
    document = json.loads(join_file.to_bytes())
    for key, size in (("coordinator", 301), ("ca", 16_000)):
        with pytest.raises(Malformed, match=key):
            parse_join_file(json.dumps({**document, key: "a" * size}).encode())
    document = json.loads(ROSTER.to_bytes())
    members = document["members"][:1] * (MAX_ROSTER_ENTRIES + 1)
    with pytest.raises((Malformed, TooLarge)):
        parse_roster(json.dumps({**document, "members": members}).encode())


def test_the_largest_roster_and_join_file_fit(ca):
    entry = HOSPITAL.public()
    members = [
        Member(
            RosterEntry(
                "𠀋" * 59 + f"{number:05d}", "𠀋" * 64, number.to_bytes(32, "big"), number.to_bytes(1216, "big")
            ),
            1 << 39,
            1 << 40,
        )
        for number in range(1, MAX_ROSTER_ENTRIES + 1)
    ]
    largest = make_signed_roster(
        KEY, consortium="𠀋" * 64, number=2**31 - 1, members=members, issued_at=1 << 40, previous=b"\xff" * 32
    )
    assert parse_roster(largest.to_bytes()) == largest
    join = make_join_file(
        KEY, coordinator="h" * 253 + ":65535", ca=ca, coordinator_key=entry.signing_key, roster=largest
    )
    assert parse_join_file(join.to_bytes()) == join


# rosters


def test_a_roster_sorts_its_members_and_is_the_protocols():
    assert ROSTER.roster.names == ("仁济医院", "北岸银行")
    assert ROSTER.roster.entry("北岸银行") == BANK.public()
    assert ROSTER.member("北岸银行") == member(BANK)
    assert ROSTER.member("nobody") is None


def test_an_empty_roster_is_signed_but_is_no_roster_of_the_protocol():
    assert parse_roster(EMPTY.to_bytes()) == EMPTY
    with pytest.raises(CustodyError, match="no sites"):
        _ = EMPTY.roster


def test_another_authority_is_refused():
    with pytest.raises(WrongKey, match="roster authority"):
        parse_signed_roster(ROSTER.to_bytes(), authority=public_bytes(Ed25519PrivateKey.generate()))
    foreign = replace(ROSTER, signature=sign_with(KEY, CONTEXT_JOIN_REQUEST, ROSTER.signed_content()))
    with pytest.raises(WrongKey):  # the right key, for another purpose
        parse_roster(foreign.to_bytes())


@pytest.mark.parametrize(
    ("names", "error"),
    [(("b", "a"), Malformed), (("a", "a"), Malformed), (("Bank", "bank"), Malformed)],
)
def test_a_roster_keeps_the_rules_of_rosters_also_when_it_is_signed(names, error):
    members = tuple(member(SiteIdentity.generate(name, "bank")) for name in names)
    with pytest.raises(error):
        replace(EMPTY, members=members)


def test_two_sites_with_one_key_are_refused():
    twin = replace(BANK.public(), name="另一家")
    with pytest.raises(WrongKey, match="same key"):
        replace(EMPTY, members=(member(BANK), Member(twin, NOW, NOW + 1)))


def test_a_consortium_name_is_a_name():
    with pytest.raises(Malformed, match="consortium name"):
        signed_roster(KEY, consortium=" x")


@pytest.mark.parametrize("expires_at", [NOW, NOW - 1])
def test_keys_do_not_end_before_they_begin(expires_at):
    with pytest.raises(Malformed, match="good until"):
        Member(BANK.public(), NOW, expires_at)


def test_expired_and_due():
    old = make_signed_roster(
        KEY,
        consortium="x",
        number=0,
        members=[member(BANK, days=30), member(HOSPITAL)],
        issued_at=NOW,
        previous=bytes(32),
    )
    end = NOW + 30 * 86_400
    assert old.expired(end - 1) == ()
    assert old.expired(end) == ("北岸银行",)
    assert old.expired(NOW + 90 * 86_400) == ("仁济医院", "北岸银行")
    hospital = member(HOSPITAL)
    assert not hospital.due(NOW + 60 * 86_400 - 1)
    assert hospital.due(NOW + 60 * 86_400)


def test_digest_is_of_all_but_the_signature():
    assert replace(ROSTER, signature=bytes(64)).digest() == ROSTER.digest()
    others = [{"number": 9}, {"issued_at": 1}, {"previous": bytes(32)}, {"members": FIRST.members}, {"consortium": "x"}]
    assert len({replace(ROSTER, **other).digest() for other in others} | {ROSTER.digest()}) == 6


def test_a_successor_is_later_and_made_from_the_one_held():
    check_successor(EMPTY, FIRST)
    check_successor(FIRST, ROSTER)
    check_successor(EMPTY, ROSTER)  # one was missed
    for held, offered in ((FIRST, EMPTY), (ROSTER, EMPTY), (FIRST, FIRST)):
        with pytest.raises(WrongRound, match="wanted a later one"):
            check_successor(held, offered)


def test_a_roster_of_another_consortium_is_no_successor():
    with pytest.raises(CustodyError, match="wanted one of"):
        check_successor(EMPTY, signed_roster(KEY, BANK, number=1, consortium="另一个"))


def test_two_rosters_of_one_number_are_a_fork_that_names_both():
    other = signed_roster(KEY, HOSPITAL, after=EMPTY)
    with pytest.raises(CustodyError, match="two rosters of number 1") as caught:
        check_successor(FIRST, other)
    assert FIRST.digest().hex() in str(caught.value)
    assert other.digest().hex() in str(caught.value)


def test_a_roster_made_from_another_one_shows_the_fork():
    other = signed_roster(KEY, HOSPITAL, after=EMPTY)
    following = signed_roster(KEY, HOSPITAL, BANK, after=other)
    with pytest.raises(CustodyError, match="two rosters of number 1") as caught:
        check_successor(FIRST, following)
    assert other.digest().hex() in str(caught.value)


def test_changes_name_who_came_went_and_renewed():
    third = SiteIdentity.generate("st-anna", "hospital")
    after = signed_roster(KEY, NEW_BANK, third, after=ROSTER)
    found = changes(ROSTER, after)
    assert (found.added, found.removed, found.renewed) == (("st-anna",), ("仁济医院",), ("北岸银行",))
    assert changes(ROSTER, ROSTER) == changes(EMPTY, EMPTY)


# requests


def test_a_request_proves_that_its_maker_holds_the_key():
    stolen = replace(REQUEST, entry=HOSPITAL.public())
    with pytest.raises(WrongKey):
        parse_request(stolen.to_bytes())
    with pytest.raises(WrongKey):
        check_request(replace(REQUEST, node_key=node_public_key()))


def raw_request(node_key: bytes) -> bytes:
    """A request that is rightly signed, whatever the node key."""
    unsigned = replace(REQUEST, node_key=node_key, signature=b"")
    return replace(unsigned, signature=sign(BANK, CONTEXT_JOIN_REQUEST, unsigned.signed_content())).to_bytes()


@pytest.mark.parametrize(
    "node_key",
    [
        b"",
        b"not a key",
        node_public_key(ec.SECP384R1()),
        node_public_key() + b"\n",
        b" " + node_public_key(),
        node_public_key() + node_public_key(),
        node_public_key().replace(b"\n", b"\r\n"),
    ],
)
def test_a_node_key_is_one_p256_key_to_the_byte(node_key):
    with pytest.raises(Malformed, match="node key"):
        parse_request(raw_request(node_key))
    with pytest.raises(Malformed):
        make_request(BANK, node_key, NOW)


def test_a_private_key_is_no_node_key():
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(Malformed):
        check_node_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


# renewals


def test_a_renewal_is_vouched_for_by_the_keys_on_the_roster():
    parsed = parse_renewal(RENEWAL.to_bytes())
    check_renewal(parsed, BANK.public())
    with pytest.raises(WrongKey):  # the new keys do not vouch for themselves
        check_renewal(make_renewal(NEW_BANK, NEW_REQUEST), BANK.public())
    with pytest.raises(WrongKey):  # nor do another site's
        check_renewal(make_renewal(HOSPITAL, NEW_REQUEST), BANK.public())
    with pytest.raises(WrongKey):  # and once it is done, not again
        check_renewal(parsed, NEW_BANK.public())


@pytest.mark.parametrize(("name", "kind"), [("南岸银行", "bank"), ("北岸银行", "hospital")])
def test_a_renewal_keeps_name_and_kind(name, kind):
    request = make_request(SiteIdentity.generate(name, kind), node_public_key(), NOW)
    with pytest.raises(WrongKey, match="got a renewal of"):
        check_renewal(make_renewal(BANK, request), BANK.public())


def test_a_renewal_has_new_keys():
    with pytest.raises(WrongKey, match="keeps an old key"):
        check_renewal(make_renewal(BANK, REQUEST), BANK.public())


def test_a_renewal_whose_new_keys_were_not_shown_is_refused():
    stolen = replace(NEW_REQUEST, signature=bytes(64))
    with pytest.raises(WrongKey):
        parse_renewal(make_renewal(BANK, stolen).to_bytes())
    with pytest.raises(WrongKey):
        check_renewal(make_renewal(BANK, stolen), BANK.public())


# join files


def test_a_join_file_holds_the_roster_and_one_authority(join_file):
    assert parse_join_file(join_file.to_bytes()).signed_roster() == ROSTER
    foreign = Ed25519PrivateKey.generate()
    with pytest.raises(WrongKey):  # a roster of another authority
        parse_join_file(resigned(join_file, KEY, roster=signed_roster(foreign, BANK).to_bytes()))
    with pytest.raises(WrongKey):  # a true roster in a false file
        parse_join_file(resigned(join_file, foreign, authority=public_bytes(foreign)))
    with pytest.raises(Malformed, match="holds a roster of"):
        parse_join_file(resigned(join_file, KEY, consortium="另一个"))


def resigned(join_file, key, **changed) -> bytes:
    from fedseek.identity.signing import CONTEXT_JOIN_FILE

    unsigned = replace(join_file, **changed)
    return replace(unsigned, signature=sign_with(key, CONTEXT_JOIN_FILE, unsigned.signed_content())).to_bytes()


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:", ":1", "host:0", "host:65536", "ho st:1", "host:1/x", "2001:db8::1:9", "[x]:1", "h:\uff11"],
)
def test_a_wrong_address_is_refused(join_file, address):
    with pytest.raises(Malformed, match="HOST:PORT"):
        parse_join_file(resigned(join_file, KEY, coordinator=address))


def test_addresses():
    assert split_address("fl.example.org:9443") == ("fl.example.org", 9443)
    assert split_address("[2001:db8::1]:443") == ("2001:db8::1", 443)


def test_a_join_file_holds_one_ca(join_file, ca):
    for wrong in (b"", b"x", ca + ca, ca[:-40], b"\n" + ca):
        with pytest.raises(Malformed, match="CA"):
            parse_join_file(resigned(join_file, KEY, ca=wrong))


def test_the_fingerprint_of_an_authority_is_its_keys():
    assert len(authority_digest(AUTHORITY)) == 32
    assert authority_digest(AUTHORITY) != authority_digest(bytes(32))


def test_forms_decode_as_they_were_encoded_with_nothing_rounded():
    assert msgspec.json.decode(ROSTER.to_bytes(), type=type(ROSTER)) == ROSTER


def test_a_coordinator_that_enrols_never_loads_the_modules_of_private_keys():
    script = (
        "import sys, fedseek.identity.enrolment, fedseek.identity.authority, fedseek.identity.words\n"
        "import fedseek_server.enrol_commands\n"
        "sys.exit(bool({'fedseek.identity.keys', 'fedseek.identity.vault', 'torch', 'fedseek_site'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
