"""What a stranger, a former site and a current site can do to the real SuperLink, over TLS: their own ten calls."""

import socket
import ssl
import stat
import threading
import time
from pathlib import Path

import httpx
import pytest
from flwr.app import Message
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, GetNodesRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore.task_identity import TaskIdentity
from superlink_process import Party, a_world, until

from fedseek.daemon.bundle import bundle_digest, code_free_bundle
from fedseek_server.app import to_record

WHO = ("stranger", "former", "current")
BUNDLE = Fab(hash_str=bundle_digest(code_free_bundle()), content=code_free_bundle())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with a_world(tmp_path_factory.mktemp("gate")) as world:
        yield world


@pytest.fixture(scope="module")
def parties(world):
    parties = {who: world.party("" if who == "stranger" else who) for who in (*WHO, "other")}
    for who in ("former", "current", "other"):
        parties[who].activate()
    world.link.open()
    world.link.revoke(parties["former"].node)
    yield parties
    for party in parties.values():
        party.close()


@pytest.fixture
def wire(world):
    """A new TLS connection, with nothing said on it yet."""
    context = ssl.create_default_context(cafile=str(world.authority.file))
    opened = []

    def connect():
        plain = socket.create_connection(("127.0.0.1", world.settings.port), timeout=10)
        opened.append(context.wrap_socket(plain, server_hostname="localhost"))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def status_of(call, *arguments):
    """HTTP status with which a call is refused; None if it is not."""
    try:
        call(*arguments)
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    return None


CALLS = {
    "submit a run": lambda party: party.control.StartRun(StartRunRequest(fab=BUNDLE)),
    "list runs": lambda party: party.control.ListRuns(ListRunsRequest()),
    "register a node": lambda party: party.control.RegisterNode(RegisterNodeRequest(public_key=party.pem)),
    "unregister a node": lambda party: party.control.UnregisterNode(UnregisterNodeRequest(node_id=party.node)),
    "claim a task": lambda party: party.runtime.AcquireTask(
        AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    ),
    "take a task's input": lambda party: party.runtime.PullTaskInput(PullTaskInputRequest()),
    "list nodes": lambda party: party.runtime.GetNodes(GetNodesRequest()),
    "pull replies": lambda party: party.runtime.PullMessages(PullAppMessagesRequest(message_ids=["x"])),
    "register by fleet": lambda party: party.fleet.RegisterNode(RegisterNodeFleetRequest(public_key=party.pem)),
    "unregister by fleet": lambda party: party.fleet.UnregisterNode(UnregisterNodeFleetRequest(node_id=party.node)),
}


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("what", CALLS)
def test_nobody_reaches_control_or_runtime_or_registers_a_node(world, parties, who, what):
    before = world.link.enrolled()
    assert status_of(CALLS[what], parties[who]) == 404
    assert world.link.enrolled() == before


@pytest.mark.parametrize("who", ["stranger", "former"])
def test_who_is_not_registered_now_may_not_even_activate(parties, who):
    party = parties[who]
    asked = ActivateNodeRequest(public_key=party.pem, heartbeat_interval=30)
    seen = {status_of(party.fleet.ActivateNode, asked), status_of(party.pull)}
    assert seen <= {401, 412}  # Flower's own refusal, as long as the gate remembers the key
    until(lambda: status_of(party.fleet.ActivateNode, asked) == 401, seconds=5)
    assert status_of(party.pull) == 401


@pytest.mark.parametrize("who", WHO)
def test_nobody_pulls_messages_of_another(world, parties, who):
    other = parties["other"]
    world.link.push(other.node, b"for the other", "round", 1, lifetime=60)
    assert status_of(parties[who].pull, other.node) == 401
    [(message, _)] = other.pull()
    assert message.metadata.dst_node_id == other.node


def test_a_site_neither_beats_nor_signs_off_for_another(parties):
    current, other = parties["current"], parties["other"]
    beat = SendNodeHeartbeatRequest(node=Node(node_id=other.node), heartbeat_interval=30)
    assert status_of(current.fleet.SendNodeHeartbeat, beat) == 401
    assert status_of(current.fleet.DeactivateNode, DeactivateNodeRequest(node_id=other.node)) == 401
    asked = ActivateNodeRequest(public_key=other.pem, heartbeat_interval=30)
    assert status_of(current.fleet.ActivateNode, asked) == 401


@pytest.mark.parametrize("name", ["the other's", "the SuperLink's"])
def test_a_site_answers_for_nobody_else(world, parties, name):
    current, other = parties["current"], parties["other"]
    sent = world.link.push(other.node, b"question", "round", 1, lifetime=60)
    [(request, _)] = other.pull()
    claimed = other.node if name == "the other's" else 1
    assert status_of(lambda: current.announce(request, b"forged", as_node=claimed)) == 403
    assert world.link.poll([sent]) == []


def test_a_site_sends_no_request_to_another_site(world, parties, monkeypatch):
    """Flower alone takes it: the number of the SuperLink, as the sender, is all that it asks for."""
    current, other = parties["current"], parties["other"]
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    forged = Message(to_record(b"do this"), other.node, "query.round", ttl=60)
    assert status_of(current.push, forged) == 403
    sent = world.link.push(other.node, b"the coordinator's own", "round", 1, lifetime=60)
    assert [message_id for _, message_id in other.pull()] == [sent]
    # without the gate: why there is a check at all
    inside = httpx.Client(transport=httpx.HTTPTransport(uds=str(world.settings.socket)))
    monkeypatch.setattr(current.fleet, "_client", inside)
    monkeypatch.setattr(current.fleet, "_base_url", "http://superlink")
    assert status_of(current.push, forged) is None
    assert [message_id for _, message_id in other.pull()] == [forged.metadata.message_id]
    inside.close()


def test_a_reply_goes_all_the_way_and_is_deleted_when_taken(world, parties):
    current, data = parties["current"], bytes(range(256)) * 50_000
    sent = world.link.push(current.node, b"question", "round", 1, lifetime=60)
    [(request, message_id)] = current.pull()
    assert message_id == sent
    reply, accepted = current.announce(request, data)
    [arrival] = world.link.poll([sent])
    assert (arrival.reply_to, arrival.error) == (sent, None)
    assert world.link.fetch(arrival, limit=len(data)) is None  # on its way
    current.upload(reply, accepted)
    assert world.link.fetch(arrival, limit=len(data)) == data
    left = PullObjectRequest(
        node=Node(node_id=current.node), run_id=request.metadata.run_id, object_id=reply.metadata.message_id
    )
    assert not current.fleet.PullObject(left).object_found


def test_a_site_revoked_while_its_call_is_held_is_cut_off_at_once(world):
    party = world.party("soon gone")
    party.activate()
    answers = []
    held = threading.Thread(target=lambda: answers.append(status_of(party.pull)))
    held.start()
    time.sleep(0.5)
    assert not answers
    began = time.monotonic()
    world.link.revoke(party.node)
    held.join(timeout=10)
    assert time.monotonic() - began < 2
    assert answers == [401]
    assert status_of(party.pull) == 401
    party.close()


# ------------------------------------------------------------------------------------------------------ bytes on a wire
ODD_PATHS = [
    b"/",
    b"/docs",
    b"/openapi.json",
    b"/health",
    b"/v1/fleet/../control/start-run",
    b"/v1/fleet/%2e%2e/control/start-run",
    b"/v1/fleet/%2E%2E%2Fcontrol%2Fstart-run",
    b"/v1/fleet/pull-messages/../../control/list-runs",
    b"/v1/fleet/pull-messages/",
    b"/v1/fleet/pull-messages%00",
    b"/v1/fleet/pull-messages;/v1/control/list-runs",
    b"//v1/control/list-runs",
    b"/v1/control/list-runs?/v1/fleet/pull-messages",
    b"/V1/FLEET/PULL-MESSAGES",
    b"/fedseek/news/1",
    b"https://localhost/v1/control/list-runs",
    b"/v1/fleet/\xc3\xa9",
]


def answer_to(connection, head: bytes, body: bytes = b"") -> bytes:
    """All that comes back until the other side has hung up or answered once."""
    connection.sendall(head + body)
    got = b""
    try:
        while b"\r\n\r\n" not in got and (more := connection.recv(4096)):
            got += more
    except (ConnectionError, ssl.SSLError):
        pass
    return got


def head(party: Party | None, path: bytes, *lines: bytes, method: bytes = b"POST") -> bytes:
    signed = party.headers().items() if party else ()
    signature = [f"{name}: {value}".encode() for name, value in signed]
    return b"\r\n".join([method + b" " + path + b" HTTP/1.1", b"host: x", *signature, *lines, b"", b""])


@pytest.mark.parametrize("path", ODD_PATHS)
def test_no_spelling_of_a_path_leads_past_the_gate(parties, wire, path):
    answer = answer_to(wire(), head(parties["current"], path, b"content-length: 0"))
    assert answer.split(b" ")[1][:3] in (b"404", b"400")


PULL = b"/v1/fleet/pull-messages"
OBJECT = b"/v1/fleet/push-object"
BAD_FRAMES = {
    "no length": (head, PULL, (), b"411"),
    "chunked": (head, PULL, (b"transfer-encoding: chunked",), b"411"),
    "both": (head, PULL, (b"content-length: 0", b"transfer-encoding: chunked"), b"411"),
    "two lengths": (head, PULL, (b"content-length: 0", b"content-length: 5"), b"400"),
    "negative": (head, PULL, (b"content-length: -1",), b"400"),
    "huge": (head, OBJECT, (b"content-length: 99999999999999999999",), b"4"),
    "6 MiB": (head, OBJECT, (b"content-length: 6291456",), b"413"),
    "an upgrade": (head, PULL, (b"content-length: 0", b"connection: upgrade", b"upgrade: websocket"), b""),
    "not HTTP": (lambda *_: b"\x16\x03\x01\x02\x00 hello\r\n\r\n", PULL, (), b"400"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_body_that_is_not_plainly_bounded_is_refused(parties, wire, name):
    make, path, lines, status = BAD_FRAMES[name]
    answer = answer_to(wire(), make(parties["stranger"], path, *lines))
    assert b" 2" not in answer[:12]
    assert answer == b"" or answer.split(b" ")[1].startswith(status)


def test_a_signature_twice_is_refused(parties, wire):
    party = parties["current"]
    twice = f"flwr-public-key: {party.headers()['flwr-public-key']}".encode()
    assert b" 400 " in answer_to(wire(), head(party, PULL, twice, b"content-length: 0"))


def test_a_strangers_large_body_is_refused_before_it_is_sent(parties, wire):
    connection = wire()
    answer = answer_to(connection, head(parties["stranger"], OBJECT, b"content-length: 5242880"))
    assert b" 401 " in answer
    assert b"connection: close" in answer.lower()


def test_headers_without_end_are_cut_off(wire):
    connection, sent = wire(), 0
    connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\n")
    try:
        while sent < 20_000_000:
            sent += connection.send(b"x: " + b"y" * 10_000 + b"\r\n")
    except (ConnectionError, ssl.SSLError):
        pass
    assert sent < 20_000_000


def test_garbage_in_a_call_that_is_let_in_harms_nobody(world, parties):
    current = parties["current"]
    with httpx.Client(verify=ssl.create_default_context(cafile=str(world.authority.file))) as client:
        for path in ("push-messages", "pull-object", "push-object", "get-run", "send-node-heartbeat"):
            url = f"https://{world.address}/v1/fleet/{path}"
            for content in (b"", b"\xff" * 64, b"\x0a\x02\x08\x01" * 5000):
                assert client.post(url, content=content, headers=current.headers()).status_code >= 400
            other_type = {**current.headers(), "content-type": "application/json"}
            assert client.post(url, content=b"{}", headers=other_type).status_code >= 400
    assert beats(current)


def beats(party):
    asked = SendNodeHeartbeatRequest(node=Node(node_id=party.node), heartbeat_interval=30)
    return party.fleet.SendNodeHeartbeat(asked).success


def test_many_connections_that_say_nothing_leave_room_for_a_site(world, parties):
    idle = [socket.create_connection(("127.0.0.1", world.settings.port), timeout=5) for _ in range(150)]
    try:
        assert beats(parties["current"])
    finally:
        for connection in idle:
            connection.close()


def test_one_address_holds_so_many_connections_and_no_more(world, parties):
    idle = []
    try:
        for _ in range(300):
            idle.append(socket.create_connection(("127.0.0.1", world.settings.port), timeout=5))
        until(lambda: not is_open(idle[-1]), seconds=5)
        assert 200 < sum(is_open(connection) for connection in idle) <= 256
    finally:
        for connection in idle:
            connection.close()
    until(lambda: beats(parties["current"]), seconds=5)


def is_open(connection) -> bool:
    connection.settimeout(0.0)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


# ------------------------------------------------------------------------------------------------------ on the machine
def test_files_and_doors_are_for_the_coordinators_account_alone(world):
    state = world.settings.state
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE(world.settings.socket.stat().st_mode) == 0o600
    for path in state.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_the_superlink_listens_on_its_port_and_on_no_other(world):
    [process] = world.processes()
    assert listening_ports(process) == {world.settings.port}


def listening_ports(process: int) -> set[int]:
    """TCP ports (IPv4 and IPv6) of the listening sockets that a process has open."""
    inodes = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        target = str(link.readlink()) if link.is_symlink() else ""
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.add(int(fields[1].rsplit(":", 1)[1], 16))
    return ports


def test_the_log_holds_no_secret_and_no_traceback(world):
    secret = world.settings.secret_file.read_bytes()
    assert secret.hex() not in world.log
    assert "Traceback" not in world.log
    assert "refused 127.0.0.1: not a registered site" in world.log
