"""The SuperLink's process: what it refuses to start with, what it comes through, and how it ends."""

import os
import signal
import socket
import ssl
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from superlink_process import a_world, free_port, make_authority, private_pem, put, start_by_hand, until

from fedseek.errors import AddressTaken, CustodyError, NotAdmitted, TooLarge, Unreachable, WrongKey
from fedseek_server.flower import FlowerLink
from fedseek_server.registration import reconcile
from fedseek_server.superlink import SuperLinkSettings, prepare, superlink


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with a_world(tmp_path_factory.mktemp("link")) as world:
        yield world


@pytest.fixture
def settings(tmp_path):
    make_authority(tmp_path)
    return SuperLinkSettings(
        tmp_path / "state", "127.0.0.1", free_port(), tmp_path / "server.pem", tmp_path / "server.key"
    )


# ------------------------------------------------------------------------------------------------------------ the state
def test_the_state_folder_and_the_secret_are_private_and_the_secret_stays(settings):
    first = prepare(settings)
    assert len(first) == 32
    assert prepare(settings) == first
    assert stat.S_IMODE(settings.state.stat().st_mode) == 0o700
    assert stat.S_IMODE(settings.secret_file.stat().st_mode) == 0o600


def test_a_state_folder_that_was_open_is_closed(settings):
    settings.state.mkdir(mode=0o755)
    prepare(settings)
    assert stat.S_IMODE(settings.state.stat().st_mode) == 0o700


@pytest.mark.parametrize(("content", "error"), [(b"short", WrongKey), (b"x" * 33, TooLarge)])
def test_a_secret_that_is_none_is_not_used(settings, content, error):
    prepare(settings)
    settings.secret_file.write_bytes(content)
    with pytest.raises(error, match=r"superexec\.secret"):
        prepare(settings)


def test_a_secret_that_others_may_read_is_not_used(settings):
    prepare(settings)
    settings.secret_file.chmod(0o640)
    with pytest.raises(CustodyError, match="0640"):
        prepare(settings)


def test_a_path_too_long_for_a_socket_is_told(settings, tmp_path):
    with pytest.raises(AddressTaken, match="at most 100") as caught:
        prepare(replace(settings, state=tmp_path / ("x" * 100)))
    assert "shorter" in caught.value.hint


def test_a_file_in_the_place_of_the_folder_is_told(settings):
    settings.state.write_text("")
    with pytest.raises(CustodyError, match="cannot be made"):
        prepare(settings)


def test_the_command_line_carries_no_secret(settings):
    secret = prepare(settings)
    child = superlink(settings)
    words = " ".join((*child.command, *child.environment.values()))
    assert secret.hex() not in words
    assert child.environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert child.environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


# ------------------------------------------------------------------------------------------------ what it cannot start with
def with_port_taken(settings, held):
    held.append(socket.create_server(("127.0.0.1", settings.port)))


def with_address_of_another_machine(settings, held):
    return replace(settings, host="192.0.2.1")


def with_expired_certificate(settings, held):
    make_authority(settings.certificate.parent).issue(begin=-40, days=-9)


def with_key_of_another(settings, held):
    put(settings.key, private_pem(ec.generate_private_key(ec.SECP256R1())))


def with_passphrase(settings, held):
    put(settings.key, private_pem(ec.generate_private_key(ec.SECP256R1()), passphrase=b"x"))


def with_open_key(settings, held):
    settings.key.chmod(0o644)


def with_no_certificate(settings, held):
    settings.certificate.unlink()


def with_garbage_for_a_certificate(settings, held):
    put(settings.certificate, b"-----BEGIN CERTIFICATE-----\nnope\n-----END CERTIFICATE-----\n")


def with_a_file_for_a_socket(settings, held):
    prepare(settings)
    settings.socket.write_text("")


@pytest.mark.parametrize(
    ("spoil", "text", "code"),
    [
        (with_port_taken, "Address already in use", 8),
        (with_address_of_another_machine, "192.0.2.1", 8),
        (with_expired_certificate, "9 days ago", 6),
        (with_key_of_another, "a certificate and its own key", 6),
        (with_passphrase, "without a passphrase", 6),
        (with_open_key, "0644", 6),
        (with_no_certificate, "No such file", 6),
        (with_garbage_for_a_certificate, "no readable certificate", 6),
        (with_a_file_for_a_socket, "is not a socket", 8),
    ],
)
def test_it_says_in_a_line_or_two_why_it_cannot_start(settings, spoil, text, code):
    held = []
    changed = spoil(settings, held) or settings
    done = start_by_hand(changed)
    for listener in held:
        listener.close()
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_a_second_one_in_the_same_folder_leaves_the_first_alone(world):
    done = start_by_hand(replace(world.settings, port=free_port()))
    assert done.returncode == 8
    assert "running here already" in done.stderr
    assert world.link.enrolled() is not None


# ---------------------------------------------------------------------------------------------------------- what it survives
def test_nodes_are_as_the_roster_says(world):
    first, second = world.party(), world.party()
    roster = {"北岸银行": first.pem, "仁济医院": second.pem}
    assert reconcile(world.link, roster) == (["仁济医院", "北岸银行"], [])
    assert reconcile(world.link, roster) == ([], [])
    second.activate()
    renewed = world.party()
    assert reconcile(world.link, {**roster, "仁济医院": renewed.pem}) == (["仁济医院"], ["仁济医院"])
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        second.pull()
    renewed.activate()
    burnt = {"仁济医院": second.pem, "st-anna": renewed.pem}
    removed = reconcile(world.link, burnt)
    assert removed == ([], ["北岸银行"])  # the others are dealt with; the key that was revoked is told next
    with pytest.raises(NotAdmitted, match="仁济医院"):
        reconcile(world.link, burnt)


def test_after_kill_9_it_is_started_again_and_knows_its_nodes(world):
    party = world.party("st-anna")
    before, [process] = world.link.enrolled(), world.processes()
    assert world.settings.socket.exists()  # it will be a stale one
    os.kill(process, signal.SIGKILL)
    with pytest.raises(Unreachable):
        asked_again_and_again(world.link)
    assert until(world.link.enrolled) == before
    assert world.processes() != [process]
    party.activate()


def asked_again_and_again(link):
    for _ in range(100):
        link.enrolled()


def test_a_renewed_certificate_is_shown_without_a_restart(world):
    [process] = world.processes()
    serial = world.authority.issue()
    assert shown(world) != serial
    until(lambda: shown(world) == serial, seconds=10)
    world.party("after renewal").activate()
    world.authority.issue(begin=-9, days=-1)  # one that would serve nobody
    until(lambda: "stays the old one" in world.log, seconds=10)
    assert shown(world) == serial
    assert world.processes() == [process]


def shown(world) -> int:
    context = ssl.create_default_context(cafile=str(world.authority.file))
    with (
        socket.create_connection(("127.0.0.1", world.settings.port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        return int(wrapped.getpeercert()["serialNumber"], 16)


def test_an_older_tls_is_not_spoken(world):
    context = ssl.create_default_context(cafile=str(world.authority.file))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", world.settings.port), timeout=5) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="localhost")


def test_told_to_end_it_does_so_at_once_though_sites_are_connected(tmp_path):
    with a_world(tmp_path) as world:
        party = world.party("held")
        party.activate()
        answers = []

        def hold():
            try:
                answers.append(party.pull())
            except httpx.HTTPError as error:
                answers.append(error)

        held = threading.Thread(target=hold)
        held.start()
        idle = socket.create_connection(("127.0.0.1", world.settings.port), timeout=5)
        time.sleep(0.5)
        [process] = world.processes()
        began = time.monotonic()
        world.stop.set()
        until(lambda: not Path(f"/proc/{process}").exists(), seconds=10)
        assert time.monotonic() - began < 4
        held.join(timeout=5)
        assert answers
        idle.close()


def test_a_link_to_nobody_says_so(tmp_path):
    link = FlowerLink(tmp_path / "none.sock", b"x" * 32, b"")
    with pytest.raises(Unreachable, match="SuperLink"):
        link.open()
    assert "secret" not in repr(link)
    link.close()
