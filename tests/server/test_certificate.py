"""The coordinator's certificate: read, judged, and shown anew when its files change."""

import asyncio
import datetime
import socket
import ssl
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from superlink_process import make_authority, now, private_pem, put

from fedseek.errors import CustodyError, Expired, WrongKey
from fedseek_server.certificate import check_certificate, keep_fresh, renew, server_context


@pytest.fixture
def authority(tmp_path):
    return make_authority(tmp_path)


@pytest.fixture
def pair(authority):
    return authority.folder / "server.pem", authority.folder / "server.key"


def shown(context, authority) -> int:
    """Serial number that a client of this context sees."""
    ours, theirs = socket.socketpair()
    server = threading.Thread(target=serve, args=(context, ours))
    server.start()
    client = ssl.create_default_context(cafile=str(authority.file))
    with client.wrap_socket(theirs, server_hostname="localhost") as wrapped:
        serial = int(wrapped.getpeercert()["serialNumber"], 16)
        assert wrapped.version() == "TLSv1.3"
    server.join()
    return serial


def serve(context, ours):
    with context.wrap_socket(ours, server_side=True) as wrapped:
        wrapped.recv(1)


def test_a_good_one_tells_when_it_ends(authority, pair):
    authority.issue(days=12)
    left = check_certificate(pair[0], now()) - now()
    assert datetime.timedelta(days=11.9) < left <= datetime.timedelta(days=12)


def test_one_whose_time_is_over_says_since_when_and_what_to_do(authority, pair):
    authority.issue(begin=-100, days=-10)
    with pytest.raises(Expired, match=r"expired on 20\d\d-.* UTC, 10 days ago") as caught:
        check_certificate(pair[0], now() + datetime.timedelta(minutes=1))
    assert "renew it" in caught.value.hint


def test_one_whose_time_has_not_come_points_at_the_clock(authority, pair):
    authority.issue(begin=2, days=90)
    with pytest.raises(Expired, match="begins on") as caught:
        check_certificate(pair[0], now())
    assert "clock" in caught.value.hint


def test_the_last_second_counts(authority, pair):
    authority.issue(days=3)
    end = check_certificate(pair[0], now())
    assert check_certificate(pair[0], end) == end
    with pytest.raises(Expired):
        check_certificate(pair[0], end + datetime.timedelta(seconds=1))


@pytest.mark.parametrize("content", [b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_refused(pair, content):
    put(pair[0], content)
    with pytest.raises(WrongKey, match=r"server\.pem"):
        check_certificate(pair[0], now())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CustodyError, match=r"none\.pem"):
        check_certificate(tmp_path / "none.pem", now())


def test_a_pair_that_is_none_makes_no_context(pair):
    put(pair[1], private_pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(WrongKey, match="KEY_VALUES_MISMATCH"):
        server_context(*pair)


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(pair):
    put(pair[1], private_pem(ec.generate_private_key(ec.SECP256R1()), passphrase=b"secret"))
    with pytest.raises(WrongKey, match="without a passphrase"):
        server_context(*pair)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_open_to_others_is_refused(pair, mode):
    pair[1].chmod(mode)
    with pytest.raises(CustodyError, match=f"0{mode:o}"):
        server_context(*pair)


def test_no_session_can_be_resumed_past_a_renewal(authority, pair):
    assert server_context(*pair).num_tickets == 0


@pytest.mark.parametrize("spoil", ["expired", "mismatch", "garbage"])
def test_a_bad_renewal_leaves_the_context_as_it_was(authority, pair, spoil):
    serial = authority.issue()
    context = server_context(*pair)
    if spoil == "expired":
        authority.issue(begin=-9, days=-1)
    elif spoil == "mismatch":
        put(pair[1], private_pem(ec.generate_private_key(ec.SECP256R1())))
    else:
        put(pair[0], b"half a fil")
    with pytest.raises(CustodyError):
        renew(context, *pair)
    assert shown(context, authority) == serial


def test_changed_files_are_shown_and_a_half_written_pair_is_waited_for(authority, pair, caplog):
    first = authority.issue()
    context = server_context(*pair)

    async def run():
        keeper = asyncio.create_task(keep_fresh(context, *pair, every=0.01))
        await asyncio.sleep(0.05)
        seen = [shown(context, authority)]
        second = authority.issue()
        certificate, key = pair[0].read_bytes(), pair[1].read_bytes()
        put(pair[1], private_pem(ec.generate_private_key(ec.SECP256R1())))
        await asyncio.sleep(0.05)
        seen.append(shown(context, authority))
        pair[0].unlink()
        await asyncio.sleep(0.05)
        seen.append(shown(context, authority))
        put(pair[1], key)
        put(pair[0], certificate)
        await asyncio.sleep(0.1)
        seen.append(shown(context, authority))
        keeper.cancel()
        return seen, second

    seen, second = asyncio.run(run())
    assert seen == [first, first, first, second]
    refusals = [record for record in caplog.records if "stays the old one" in record.message]
    assert 1 <= len(refusals) <= 3  # told once a version, not once a look
