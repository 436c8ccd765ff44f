"""A real SuperLink, and real sites before it, on loopback: certificates, processes, and a way to ask.

python loopback.py SOCKET LOG      a site service that turns messages round, as a process that can be killed
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedseek.daemon.bundle import code_free_bundle
from fedseek.daemon.supervise import Child, supervise
from fedseek.errors import Unreachable
from fedseek_site.courier import CourierSettings, courier
from fedseek_site.socket_service import serve

PEM = serialization.Encoding.PEM
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def turned(request: bytes) -> bytes:
    """What every site service here answers: easy to check, and not what was asked."""
    return request[::-1]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def make_node_key(path: Path, key: object = None) -> bytes:
    """Write a node key; returns its public key as the coordinator registers it."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    write(path, key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()))
    return key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def make_certificates(
    folder: Path, *, until: datetime.datetime = NOW + 90 * DAY, since: datetime.datetime = NOW - DAY
) -> Path:
    """ca.pem, server.pem and server.key for loopback."""
    folder.mkdir(exist_ok=True)
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback CA")])
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def certificate(subject: x509.Name, public_key: ec.EllipticCurvePublicKey, *, ca: bool) -> x509.CertificateBuilder:
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
        )
        usage |= {"decipher_only": False, "digital_signature": not ca, "key_cert_sign": ca, "crl_sign": ca}
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(since if not ca else NOW - 400 * DAY)
            .not_valid_after(until if not ca else NOW + 400 * DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )

    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    served = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gate")])
    gate = certificate(served, key.public_key(), ca=False)
    gate = gate.add_extension(x509.SubjectAlternativeName(names), critical=False)
    gate = gate.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    write(folder / "server.pem", gate.sign(ca_key, hashes.SHA256()).public_bytes(PEM))
    plain = serialization.NoEncryption()
    write(folder / "server.key", key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain))
    authority = certificate(issuer, ca_key.public_key(), ca=True).sign(ca_key, hashes.SHA256())
    return write(folder / "ca.pem", authority.public_bytes(PEM))


@contextmanager
def kept_alive(child: Child) -> Iterator[None]:
    """A supervised process for as long as the block lasts; it must end within seconds."""
    stop = threading.Event()
    keeper = threading.Thread(target=supervise, args=(child, stop))
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join(timeout=20)
        assert not keeper.is_alive()


@dataclass
class Gate:
    """A SuperLink behind its gate, and the driver's way to it."""

    folder: Path
    port: int
    settings: object
    secret: bytes

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def link(self, bundle: bytes | None = None) -> object:
        from fedseek_server.flower import FlowerLink

        return FlowerLink(self.settings.socket, self.secret, code_free_bundle() if bundle is None else bundle)

    def enrol(self, public_key: bytes, name: str) -> int:
        return until(lambda: self.link().enrol(public_key, name), 30, Unreachable)

    def site(self, name: str) -> CourierSettings:
        """Settings of a new site, not enrolled."""
        folder = self.folder / name
        folder.mkdir()
        make_node_key(folder / "node.key")
        return CourierSettings(
            folder / "courier", self.address, self.folder / "ca.pem", folder / "node.key", folder / "service.sock"
        )

    def enrolled_site(self, name: str) -> tuple[CourierSettings, int]:
        settings = self.site(name)
        public_key = make_node_key(settings.node_key)
        return settings, self.enrol(public_key, name)


@contextmanager
def gate_at(folder: Path) -> Iterator[Gate]:
    """A real SuperLink as a child process, over TLS."""
    from fedseek_server.superlink import SuperLinkSettings, prepare, superlink

    make_certificates(folder)
    port = free_port()
    settings = SuperLinkSettings(folder / "state", "127.0.0.1", port, folder / "server.pem", folder / "server.key")
    secret = prepare(settings)
    with kept_alive(superlink(settings, log_file=folder / "superlink.log")):
        gate = Gate(folder, port, settings, secret)
        until(lambda: gate.link().enrolled() is not None, 40, Unreachable)
        yield gate


@contextmanager
def site_at(settings: CourierSettings, handle: object = turned) -> Iterator[Path]:
    """A site service in this process and a courier as a child; gives the courier's log."""
    log = settings.state.with_suffix(".log")
    stop = serve(handle, settings.service) if handle else lambda grace: None
    try:
        with kept_alive(courier(settings, log_file=log)):
            yield log
    finally:
        stop(0.5)


def until(look: object, seconds: float, *errors: type[Exception]) -> object:
    """The first true value of ``look``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := look():
                return found
        except errors:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


class Asked:
    """Plays the Coordinator: one exchange with one node."""

    def __init__(self, node: int, request: bytes) -> None:
        self.node, self.request = node, request
        self.reply: bytes | None = None
        self.rejected: Exception | None = None

    def play(self, nodes: object) -> Iterator[SimpleNamespace]:
        until(lambda: self.node in nodes(), 40)
        yield SimpleNamespace(phase="round", round=1, requests={self.node: self.request}, pause_seconds=0.0)

    def receive(self, node: int, data: bytes) -> None:
        self.reply = data

    def reject(self, node: int, error: Exception) -> None:
        self.rejected = error


def ask(link: object, node: int, request: bytes, *, seconds: float = 60.0) -> Asked:
    """Ask as the real driver does: it sends again what was lost on the way."""
    from fedseek_server.driver import Driver

    asked = Asked(node, request)
    Driver(link, deadline=lambda exchange: seconds, stop=threading.Event()).drive(asked)
    return asked


def pids(*words: object) -> list[int]:
    """Processes that have all these words in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if int(entry.name) != os.getpid() and all(str(word) in line for word in words):
            found.append(int(entry.name))
    return found


def service_process(path: Path, log: Path) -> Child:
    """A site service as a child of its own; each message it begins is a line of ``log``."""
    return Child("service", (sys.executable, __file__, str(path), str(log)), {}, log.with_suffix(".out"))


def main() -> None:
    log = Path(sys.argv[2])

    def slow(request: bytes) -> bytes:
        with log.open("a") as file:
            file.write(f"{len(request)}\n")
        time.sleep(1.5)
        return turned(request)

    stop = serve(slow, Path(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(stop(0.5)))
    signal.pause()


if __name__ == "__main__":
    main()
