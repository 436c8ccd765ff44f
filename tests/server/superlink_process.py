"""A real SuperLink behind its gate, on loopback and a free port, and the parties that call it: for tests only."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import subprocess
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import push_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedseek.daemon.bundle import code_free_bundle
from fedseek.daemon.supervise import supervise
from fedseek.errors import FedseekError
from fedseek_server.app import to_record
from fedseek_server.flower import FlowerLink
from fedseek_server.superlink import SuperLinkSettings, prepare, superlink

PEM = serialization.Encoding.PEM


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Authority:
    """A CA that signs certificates for loopback."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    name: x509.Name

    @property
    def file(self) -> Path:
        return self.folder / "ca.pem"

    def issue(self, *, begin: float = -1.0, days: float = 90.0, key: ec.EllipticCurvePrivateKey | None = None) -> int:
        """Write server.pem and server.key, the way a renewal does; returns the serial number."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")]))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() + datetime.timedelta(days=begin))
            .not_valid_after(now() + datetime.timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        put(self.folder / "server.key", private_pem(key))
        put(self.folder / "server.pem", certificate.public_bytes(PEM))
        return certificate.serial_number


def private_pem(key: ec.EllipticCurvePrivateKey, *, passphrase: bytes = b"") -> bytes:
    how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, how)


def put(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    new.rename(path)


def make_authority(folder: Path) -> Authority:
    """Write ca.pem, server.pem and server.key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    no_use = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    usage = dict.fromkeys([*no_use, "encipher_only", "decipher_only"], False)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - datetime.timedelta(days=1))
        .not_valid_after(now() + datetime.timedelta(days=90))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    authority = Authority(folder, key, name)
    put(authority.file, certificate.public_bytes(PEM))
    authority.issue()
    return authority


class Party:
    """Somebody with a node key, registered or not, and the CA's certificate."""

    def __init__(self, address: str, ca: Path) -> None:
        self.address, self.ca = address, ca
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.pem = self.key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.node = 0
        self.fleet, self.control, self.runtime = (
            kind.from_server_address(
                address,
                False,
                ca.read_bytes(),
                [
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    NodeAuthHttpInterceptor(self.key, self.key.public_key()),
                ],
            )
            for kind in (FleetHttpClient, ControlHttpClient, RuntimeHttpClient)
        )

    def close(self) -> None:
        for client in (self.fleet, self.control, self.runtime):
            client.close()

    def activate(self) -> None:
        self.node = self.fleet.ActivateNode(ActivateNodeRequest(public_key=self.pem, heartbeat_interval=30)).node_id

    def pull(self, node: int | None = None) -> list[tuple[Message, str]]:
        """(request, id) that wait for the node: its own, unless another is named."""
        asked = PullMessagesRequest(node=Node(node_id=self.node if node is None else node))
        answer = self.fleet.PullMessages(asked)
        return [(message_from_proto(proto), proto.metadata.message_id) for proto in answer.messages_list]

    def announce(self, request: Message, data: bytes, *, as_node: int | None = None) -> tuple[Message, object]:
        """Push a reply without its objects, in the name of another node if one is given."""
        reply = self.reply(request, to_record(data))
        if as_node is not None:
            reply.metadata.__dict__["_src_node_id"] = as_node
        return reply, self.push(reply)

    def reply(self, request: Message, content: RecordDict | Error) -> Message:
        """As this node: Flower takes the sender from the process, which is the coordinator's here."""
        reply = Message(content, reply_to=request)
        reply.metadata.__dict__["_src_node_id"] = self.node
        return reply

    def push(self, message: Message) -> object:
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            return self.fleet.PushMessages(
                PushMessagesRequest(
                    node=Node(node_id=self.node),
                    messages_list=[message_to_proto(remove_content_from_message(message))],
                    message_object_trees=[get_object_tree(message)],
                )
            )

    def upload(self, reply: Message, accepted: object) -> None:
        node, run = Node(node_id=self.node), reply.metadata.run_id
        send = make_push_object_fn_protobuf(self.fleet.PushObject, node, run, accepted.session_id)
        with no_object_id_recompute():
            objects = get_all_nested_objects(reply)
            push_objects(objects, send, object_ids_to_push=set(accepted.objects_to_push))

    def headers(self) -> dict[str, str]:
        """What signs a call."""
        stamp = now().isoformat()
        return {
            "content-type": "application/protobuf",
            "flwr-public-key": b64encode(self.pem).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": b64encode(self.key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
        }


@dataclass
class World:
    """A SuperLink under supervision."""

    folder: Path
    authority: Authority
    settings: SuperLinkSettings
    link: FlowerLink
    stop: threading.Event

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.settings.port}"

    @property
    def log(self) -> str:
        return (self.folder / "superlink.log").read_text(encoding="utf-8")

    def party(self, name: str = "") -> Party:
        """Registered if it has a name."""
        party = Party(self.address, self.authority.file)
        if name:
            party.node = self.link.enrol(party.pem, name)
        return party

    def processes(self) -> list[int]:
        """Numbers of the SuperLink's processes."""
        return pids(str(self.settings.state))


def pids(needle: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if needle in words and "fedseek_server.superlink" in words:
            found.append(int(entry.name))
    return found


def until(what: object, *, seconds: float = 30.0) -> object:
    """Wait for something to be true; returns it."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if found := what():
                return found
        except (FedseekError, httpx.HTTPError, OSError):
            pass
        time.sleep(0.05)
    raise AssertionError(f"still not after {seconds} s: {what}")


@contextmanager
def a_world(folder: Path) -> Iterator[World]:
    authority, stop = make_authority(folder), threading.Event()
    pair = (folder / "server.pem", folder / "server.key")
    settings = SuperLinkSettings(folder / "state", "127.0.0.1", free_port(), *pair)
    link = FlowerLink(settings.socket, prepare(settings), code_free_bundle())
    child = superlink(settings, log_file=folder / "superlink.log")
    keeper = threading.Thread(target=supervise, args=(child, stop))
    keeper.start()
    world = World(folder, authority, settings, link, stop)
    try:
        until(lambda: link.enrolled() is not None, seconds=60)
        yield world
    finally:
        link.close()
        stop.set()
        keeper.join()


def start_by_hand(settings: SuperLinkSettings) -> subprocess.CompletedProcess[str]:
    """The child's command, run until it ends by itself; its input stays open."""
    child = superlink(settings)
    environment = {**os.environ, **child.environment}
    return subprocess.run(child.command, env=environment, capture_output=True, text=True, timeout=30, check=False)
