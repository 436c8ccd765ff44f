"""What the courier says when the gate is shut, and what it does not take from a coordinator."""

import datetime
import gzip
import logging
import socket
import ssl
import threading

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from loopback import DAY, NOW, PEM, free_port, make_certificates, make_node_key, write

from fedseek.errors import CustodyError, NotAdmitted, TooLarge, Unreachable
from fedseek_site import courier, flower
from fedseek_site.courier import CourierSettings
from fedseek_site.gate import LARGEST_ANSWER, Credentials, explained, guarded_http, load_authority, load_node_key


@pytest.fixture
def certificates(tmp_path):
    make_certificates(tmp_path / "gate")
    return tmp_path / "gate"


@pytest.fixture
def answering():
    """Starts a server on loopback that says the same to everybody; gives its port, and the number of bytes it sent."""
    listeners = []

    def start(answer=b"", certificates=None, *, plain=False, newest=ssl.TLSVersion.TLSv1_3):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = newest
        if certificates:
            context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        seen = []

        def run():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                try:
                    with connection if plain else context.wrap_socket(connection, server_side=True) as stream:
                        seen.append(stream.recv(65536))
                        stream.sendall(answer)
                        while stream.recv(65536):
                            pass
                except OSError:
                    continue

        threading.Thread(target=run, daemon=True).start()
        return listener.getsockname()[1], seen

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def client_for(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority)
    return guarded_http(context)


def knock(port, authority, *, host="127.0.0.1"):
    address = f"{host}:{port}"
    with explained(address), client_for(authority) as client:
        client.post(f"https://{address}/v1/fleet/activate-node", content=b"x").raise_for_status()


def why(error_type, *arguments, **named):
    with pytest.raises(error_type) as caught:
        knock(*arguments, **named)
    text = courier._one_line(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_nobody_there(certificates):
    text = why(Unreachable, free_port(), certificates / "ca.pem")
    assert "refused" in text
    assert "does the coordinator run" in text


def test_another_authority(certificates, tmp_path, answering):
    port, _ = answering(certificates=certificates)
    other = make_certificates(tmp_path / "other")
    assert "really the coordinator" in why(Unreachable, port, other)


@pytest.mark.parametrize(
    ("since", "until", "says"),
    [(NOW - 9 * DAY, NOW - DAY, "has to renew"), (NOW + datetime.timedelta(minutes=10), NOW + DAY, "clock")],
    ids=["expired", "not yet valid"],
)
def test_a_certificate_out_of_its_time(tmp_path, answering, since, until, says):
    authority = make_certificates(tmp_path / "gate", since=since, until=until)
    port, _ = answering(certificates=tmp_path / "gate")
    assert says in why(Unreachable, port, authority)


def test_a_certificate_for_another_name(certificates, answering):
    port, _ = answering(certificates=certificates)
    assert "dial the name" in why(Unreachable, port, certificates / "ca.pem", host="localhost")


def test_a_port_without_tls(certificates, answering):
    port, _ = answering(b"hello\r\n\r\n", plain=True)
    assert "TLS 1.3" in why(Unreachable, port, certificates / "ca.pem")


def test_older_tls(certificates, answering):
    port, seen = answering(b"", certificates, newest=ssl.TLSVersion.TLSv1_2)
    assert "TLS 1.3" in why(Unreachable, port, certificates / "ca.pem")
    assert not seen


def reply(status, body=b"", *headers):
    lines = [f"HTTP/1.1 {status} X", *(headers or (f"content-length: {len(body)}",)), "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (reply(401, b"not a registered site"), "roster"),
        (reply(401, b"the site's clock is 600 s behind the coordinator's"), "set this machine's clock"),
        (reply(404, b"<html>"), "does a fleet gate"),
    ],
)
def test_a_gate_that_refuses_says_what_to_do(certificates, answering, answer, says):
    port, _ = answering(answer, certificates)
    assert says in why(NotAdmitted, port, certificates / "ca.pem")


@pytest.mark.parametrize("answer", [reply(200, b"\xff\xff junk"), reply(200, bytes(50))])
def test_a_server_that_is_no_gate_is_told(certificates, answering, answer, tmp_path):
    port, _ = answering(answer, certificates)
    make_node_key(tmp_path / "key")
    authority, key = load_authority(certificates / "ca.pem"), load_node_key(tmp_path / "key")
    with pytest.raises(NotAdmitted, match="no answer that a fleet gate gives"):
        flower.take_place(Credentials(f"127.0.0.1:{port}", authority, key), tmp_path / "node")
    assert not (tmp_path / "node").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:notaport", "[", "a b:1"])
def test_an_address_that_is_none_is_told(certificates, tmp_path, address):
    make_node_key(tmp_path / "key")
    authority, key = load_authority(certificates / "ca.pem"), load_node_key(tmp_path / "key")
    with pytest.raises((NotAdmitted, Unreachable)):
        flower.take_place(Credentials(address, authority, key), tmp_path / "node")


def test_the_gates_words_cannot_write_lines_into_our_log(certificates, answering):
    port, _ = answering(reply(401, b"no\n2026 ERROR forged \x1b[2J" + b"x" * 5000), certificates)
    text = why(NotAdmitted, port, certificates / "ca.pem")
    assert "\x1b" not in text
    assert len(text) < 400


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(certificates, answering, status):
    inside, seen = answering(reply(200), plain=True)
    answer = reply(status, b"", f"location: http://127.0.0.1:{inside}/inside", "content-length: 0")
    port, _ = answering(answer, certificates)
    why(NotAdmitted, port, certificates / "ca.pem")
    assert not seen


@pytest.mark.parametrize(
    "headers",
    [
        (f"content-length: {LARGEST_ANSWER + 1}",),
        ("content-length: 9999999999999999",),
        ("transfer-encoding: chunked",),
        ("content-length: 31", "content-encoding: gzip"),
        ("x: y",),
    ],
)
def test_an_answer_that_is_too_large_or_packed_is_not_read(certificates, answering, headers):
    body = gzip.compress(bytes(1000))
    port, _ = answering(reply(200, body, *headers), certificates)
    with pytest.raises(TooLarge):
        knock(port, certificates / "ca.pem")


def test_an_answer_of_the_largest_size_passes(certificates, answering):
    port, _ = answering(reply(200, bytes(LARGEST_ANSWER)), certificates)
    knock(port, certificates / "ca.pem")


def test_an_answer_ends_where_it_said(certificates, answering):
    port, _ = answering(reply(200, bytes(100), "content-length: 3"), certificates)
    with client_for(certificates / "ca.pem") as client:
        assert client.get(f"https://127.0.0.1:{port}/").content == bytes(3)


# ------------------------------------------------------------------------------------------------------------- files
def test_a_node_key_is_read(tmp_path):
    public_key = make_node_key(tmp_path / "key")
    read = load_node_key(tmp_path / "key").public_key()
    assert read.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo) == public_key


def test_a_node_key_that_others_may_read_is_refused(tmp_path):
    make_node_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(CustodyError, match="0640"):
        load_node_key(tmp_path / "key")


@pytest.mark.parametrize("content", [b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", bytes(1000)])
def test_what_is_no_node_key_is_refused(tmp_path, content):
    with pytest.raises(NotAdmitted, match="no readable node key"):
        load_node_key(write(tmp_path / "key", content))


def test_a_node_key_of_another_kind_is_refused(tmp_path):
    make_node_key(tmp_path / "key", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(NotAdmitted, match="another kind"):
        load_node_key(tmp_path / "key")


def test_a_node_key_in_another_form_is_refused(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.NoEncryption()
    write(tmp_path / "key", key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain))
    with pytest.raises(NotAdmitted, match="no readable node key"):
        load_node_key(tmp_path / "key")


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\xff", b"-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_authority_is_refused(tmp_path, content):
    with pytest.raises(NotAdmitted, match="no readable certificate"):
        load_authority(write(tmp_path / "ca.pem", content))


def test_an_authority_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(NotAdmitted, match="no readable certificate"):
        load_authority(tmp_path / "ca.pem")


def test_credentials_do_not_show_the_key():
    shown = repr(Credentials("127.0.0.1:1", b"authority", ec.generate_private_key(ec.SECP256R1())))
    assert shown == "Credentials(address='127.0.0.1:1')"


# ---------------------------------------------------------------------------------------------------------- knocking
@pytest.fixture
def settings(tmp_path, certificates, monkeypatch):
    monkeypatch.setattr(courier, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(courier, "LONGEST_PAUSE", 0.002)
    state = tmp_path / "courier"
    state.mkdir()
    make_node_key(tmp_path / "node.key")
    return CourierSettings(state, "127.0.0.1:1", certificates / "ca.pem", tmp_path / "node.key", tmp_path / "s.sock")


def test_the_courier_knocks_until_it_is_let_in_and_tells_each_trouble_once(settings, caplog):
    trouble = [Unreachable("nobody", hint="wait"), Unreachable("nobody", hint="wait"), NotAdmitted("who?")]

    def take_place(credentials, memory):
        if trouble:
            raise trouble.pop(0)
        return 7

    with caplog.at_level(logging.INFO):
        assert courier._knock(settings, take_place).address == "127.0.0.1:1"
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "Unreachable: nobody (wait); tried again until it works",
        "NotAdmitted: who?; tried again until it works",
        "connected to 127.0.0.1:1 as node 7",
    ]


def test_a_key_that_is_put_right_meanwhile_is_used(settings):
    settings.node_key.unlink()
    tried = []

    def put_right():
        public_key = make_node_key(settings.node_key)
        tried.append(public_key)

    timer = threading.Timer(0.2, put_right)
    timer.start()
    credentials = courier._knock(settings, lambda credentials, memory: 7)
    timer.join()
    public_key = credentials.key.public_key()
    assert public_key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo) == tried[0]


def test_the_connection_is_made_as_strictly_as_it_is_meant():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with guarded_http(context) as client:
        assert not client.follow_redirects
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert client.headers["accept-encoding"] == "identity"
        assert client.timeout == httpx.Timeout(30.0)
