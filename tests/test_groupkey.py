import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from masked_round import federate, flip, make_identities

from fedseek.errors import Malformed, WrongKey
from fedseek.groupkey import GroupKey, check_age, make_group_key, open_group_key
from fedseek.he.keys import SecretKey
from fedseek.he.packing import choose_packing
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.sealing import SealedKey, seal
from fedseek.messages import GroupKeySealed

SITES = make_identities(4)
BANK, PEER = "北岸银行", "harbour-bank"
NOW = 1_790_000_000.7  # seconds
DAY = 86_400


@pytest.fixture(scope="module")
def federation(tiny_plan):
    return federate(tiny_plan(), SITES)


@pytest.fixture(scope="module")
def sealed(federation):
    return make_group_key(federation, 3, identity=SITES[BANK], now=NOW)


@pytest.fixture(scope="module")
def params(federation):
    return federation.plan.packing.params


def open_at(sealed, federation, name, *, epoch=3, identity=None):
    return open_group_key(sealed.envelopes[name], federation, epoch, identity=identity or SITES[name])


def test_every_site_of_the_roster_opens_the_same_key_and_its_maker_too(federation, sealed):
    assert (sealed.epoch, tuple(sealed.envelopes)) == (3, federation.roster.names)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(sealed), type=GroupKeySealed)
    keys = [open_at(wire, federation, name) for name in SITES]
    assert len({key.secret.fingerprint() for key in keys}) == 1
    assert {(key.epoch, key.made_at) for key in keys} == {(3, int(NOW))}


def test_each_key_is_drawn_anew(federation, sealed):
    again = make_group_key(federation, 3, identity=SITES[BANK], now=NOW)
    fingerprints = {open_at(each, federation, PEER).secret.fingerprint() for each in (sealed, again)}
    assert len(fingerprints) == 2


def test_the_courier_sees_no_stretch_of_the_key(federation, sealed):
    secret = open_at(sealed, federation, PEER).to_bytes()
    carried = msgspec.msgpack.encode(sealed)
    assert not any(secret[start : start + 16] in carried for start in range(64, len(secret) - 16, 16))


def test_an_envelope_opens_for_its_site_alone(federation, sealed):
    for name, other in ((BANK, PEER), (PEER, BANK)):
        with pytest.raises(WrongKey, match="is for receiver"):
            open_at(sealed, federation, name, identity=SITES[other])
    with pytest.raises(WrongKey):  # the right name with other keys
        open_at(sealed, federation, PEER, identity=SiteIdentity.generate(PEER, "bank"))


@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_a_key_of_another_epoch_is_refused(federation, sealed, epoch):
    with pytest.raises(WrongKey, match="is for epoch 3"):
        open_at(sealed, federation, PEER, epoch=epoch)


def test_a_key_of_another_run_or_roster_is_refused(federation, sealed):
    with pytest.raises(WrongKey, match="is for run"):
        open_at(sealed, federate(federation.plan, SITES, run="试运行-2"), PEER)
    grown = make_identities(5)
    with pytest.raises(WrongKey, match="is for roster digest"):  # who joined is not given the old key
        open_at(sealed, federate(federation.plan, {**grown, **SITES}), PEER)


def test_a_site_that_is_not_on_the_roster_makes_no_key(federation):
    for stranger in (SiteIdentity.generate("nobody", "bank"), SiteIdentity.generate(BANK, "bank")):
        with pytest.raises(WrongKey):
            make_group_key(federation, 0, identity=stranger, now=NOW)


def test_an_envelope_altered_anywhere_is_refused(federation, sealed):
    envelope = sealed.envelopes[PEER]
    for place in [*range(0, len(envelope), 997), *range(400), len(envelope) - 1]:
        with pytest.raises(WrongKey):
            open_group_key(flip(envelope, place), federation, 3, identity=SITES[PEER])


@pytest.mark.parametrize("cut", [0, 1, 100, 2000, -1])
def test_a_cut_envelope_does_not_parse(federation, sealed, cut):
    with pytest.raises(WrongKey, match="epoch 3 does not parse"):
        open_group_key(sealed.envelopes[PEER][:cut], federation, 3, identity=SITES[PEER])


@given(st.binary(max_size=100))
def test_random_bytes_are_no_envelope(federation, data):
    with pytest.raises(WrongKey, match="does not parse"):
        open_group_key(data, federation, 3, identity=SITES[PEER])


def test_trailing_bytes_and_text_that_is_no_utf8_are_no_envelope(federation, sealed):
    envelope = sealed.envelopes[PEER]
    for other in (envelope + b"\0", envelope.replace(PEER.encode(), b"\xff" + PEER.encode()[1:])):
        with pytest.raises(WrongKey, match="does not parse"):
            open_group_key(other, federation, 3, identity=SITES[PEER])


# --- what a site that cheats could seal


def sealed_content(federation, content: bytes) -> bytes:
    """An envelope rightly sealed and signed by the bank, with any content."""
    entry, roster = federation.roster.entry(PEER), federation.roster
    return msgspec.msgpack.encode(
        seal(content, sender=SITES[BANK], receiver=entry, roster=roster, run=federation.run, epoch=3)
    )


def contents(params):
    key = SecretKey.generate(params).to_bytes()
    foreign = SecretKey.generate(choose_packing(8, 64).params).to_bytes()
    pack = msgspec.msgpack.encode
    return {
        "not a message": b"\xc1",
        "no list": pack({"made_at": 1, "secret": key}),
        "the key alone": key,
        "a field missing": pack([1]),
        "a field too many": pack([1, key, 3]),
        "trailing bytes": pack([1, key]) + b"\0",
        "a fraction of a second": pack([1.5, key]),
        "a time as text": pack(["1", key]),
        "no time": pack([None, key]),
        "a key cut short": pack([1, key[:-1]]),
        "a key and a byte": pack([1, key + b"\0"]),
        "no key": pack([1, b""]),
        "a key of other parameters": pack([1, foreign]),
    }


NAMES = list(contents(choose_packing(13, 4).params))


@pytest.mark.parametrize("name", NAMES)
def test_an_envelope_that_opens_to_anything_but_a_key_of_this_plan_is_malformed(federation, params, name):
    with pytest.raises(Malformed):
        open_group_key(sealed_content(federation, contents(params)[name]), federation, 3, identity=SITES[PEER])


def test_the_envelopes_made_here_are_right_but_for_their_content(federation, params):
    good = GroupKey(3, 5, SecretKey.generate(params))
    opened = open_group_key(sealed_content(federation, good.to_bytes()), federation, 3, identity=SITES[PEER])
    assert (opened.made_at, opened.secret.fingerprint()) == (5, good.secret.fingerprint())


def test_the_parameters_of_a_foreign_key_are_other_ones(params):
    assert choose_packing(8, 64).params != params


# --- age


def aged(seconds, params):
    return GroupKey(7, int(NOW) - seconds, SecretKey.generate(params))


@pytest.mark.parametrize("seconds", [0, 1, DAY, 90 * DAY, -3600])
def test_a_key_is_used_until_the_plans_age_and_by_clocks_that_differ_a_little(params, seconds):
    check_age(aged(seconds, params), now=float(int(NOW)), max_days=90)


@pytest.mark.parametrize(("max_days", "days"), [(90, 91), (1, 2), (30, 3000)])
def test_an_old_key_is_refused_with_its_age(params, max_days, days):
    with pytest.raises(WrongKey, match=f"epoch 7 is {days} days old, wanted at most {max_days}"):
        check_age(aged(days * DAY, params), now=float(int(NOW)), max_days=max_days)
    with pytest.raises(WrongKey, match="days old"):
        check_age(aged(max_days * DAY + 1, params), now=float(int(NOW)), max_days=max_days)


@pytest.mark.parametrize(("seconds", "days"), [(3601, "0.04"), (2 * DAY, "2.00")])
def test_a_key_from_the_future_is_refused(params, seconds, days):
    # Else a site could make a key that never grows old.
    with pytest.raises(WrongKey, match=f"made {days} days from now"):
        check_age(aged(-seconds, params), now=float(int(NOW)), max_days=90)


@given(made_at=st.integers(-(2**63), 2**64 - 1))
def test_whatever_time_a_key_claims_its_age_is_checked_without_another_error(federation, params, made_at):
    key = GroupKey(0, made_at, SecretKey.generate(params))
    read = GroupKey.from_bytes(key.to_bytes(), epoch=0, params=params)
    assert read.made_at == made_at
    if -3600 <= NOW - made_at <= 90 * DAY:
        check_age(read, now=NOW, max_days=90)
    else:
        with pytest.raises(WrongKey):
            check_age(read, now=NOW, max_days=90)


def test_an_old_key_still_decrypts_but_says_its_age_when_asked(federation, sealed):
    old = open_at(sealed, federation, PEER)
    assert old.secret.derive(b"x") == open_at(sealed, federation, BANK).secret.derive(b"x")
    with pytest.raises(WrongKey):
        check_age(old, now=NOW + 91 * DAY, max_days=90)


# --- bytes and print


def test_a_key_survives_bytes(params):
    key = GroupKey(3, 1_790_000_000, SecretKey.generate(params))
    again = GroupKey.from_bytes(key.to_bytes(), epoch=3, params=params)
    assert (again.epoch, again.made_at, again.secret.fingerprint()) == (3, key.made_at, key.secret.fingerprint())
    assert len(key.to_bytes()) < 34_000


def test_a_key_shows_its_epoch_and_age_and_no_more(params):
    assert repr(GroupKey(3, 17, SecretKey.generate(params))) == "GroupKey(epoch=3, made_at=17)"


def test_envelopes_are_those_of_the_sealing_module(federation, sealed):
    envelope = msgspec.msgpack.decode(sealed.envelopes[PEER], type=SealedKey)
    assert (envelope.sender, envelope.receiver, envelope.epoch, envelope.run) == (BANK, PEER, 3, federation.run)
