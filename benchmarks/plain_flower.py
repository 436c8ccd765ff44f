"""Plain Flower's own FedAvg over TLS on loopback, at its default settings: what a deployed round is held against.

SuperLink and SuperNodes are Flower's commands with node authentication, submitted to with ``flwr run``. Clients return
float32 values of their own, all different: Flower uploads identical ones once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedseek.identity.authority import create_authority, issue_certificate
from simulations.daemons import free_port

HOST = "127.0.0.1"
UP_SECONDS = 60.0  # that the SuperLink has to come up
RUN_SECONDS = 600.0  # that all rounds may take
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_LOG_LEVEL": "WARNING"}
APP_TOML = """\
[project]
name = "plain"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "plain:server"
clientapp = "plain:client"
"""
APP_CODE = """
import json, time
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    rng = np.random.default_rng()
    arrays = [a + rng.random(a.shape, np.float32) for a in message.content["arrays"].to_numpy_ndarrays()]
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 10})}), reply_to=message)

@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < SITES:
        time.sleep(0.5)
    marks = []
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=SITES, min_available_nodes=SITES)
    strategy.start(grid=grid, initial_arrays=ArrayRecord([np.zeros(VALUES, np.float32)]), num_rounds=ROUNDS,
                   evaluate_fn=lambda number, arrays: marks.append(time.time()))
    Path(OUT).write_text(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""


def fedavg_rounds(*, sites: int, values: int, rounds: int) -> list[float]:
    """Seconds of each round but the first, from one aggregate to the next."""
    with tempfile.TemporaryDirectory(prefix="pf-", ignore_cleanup_errors=True) as name, ExitStack() as closing:
        folder, port = Path(name), free_port()
        _write_credentials(folder, sites)
        _write_app(folder / "app", OUT=str(folder / "seconds.json"), SITES=sites, VALUES=values, ROUNDS=rounds + 1)
        closing.enter_context(_process(folder, "superlink", "flower-superlink", *_superlink_options(folder, port)))
        _register(folder, port, sites)
        for number in range(sites):
            options = _supernode_options(folder, port, number)
            closing.enter_context(_process(folder, f"supernode-{number}", "flower-supernode", *options))
        _submit(folder, port)
        return _wait(folder / "seconds.json")[1:]


def _superlink_options(folder: Path, port: int) -> list[str]:
    options = ["--host", HOST, "--port", str(port), "--database", str(folder / "state.db"), "--enable-supernode-auth"]
    options += ["--ssl-ca-certfile", str(folder / "ca.pem"), "--ssl-certfile", str(folder / "server.pem")]
    return [*options, "--ssl-keyfile", str(folder / "server.key"), "--disable-runtime-dependency-installation"]


def _supernode_options(folder: Path, port: int, number: int) -> list[str]:
    options = ["--superlink", f"{HOST}:{port}", "--root-certificates", str(folder / "ca.pem")]
    options += ["--auth-supernode-private-key", str(folder / f"node-{number}"), "--host", HOST]
    return [*options, "--port", str(free_port())]


def _write_credentials(folder: Path, sites: int) -> None:
    authority = create_authority(folder / "authority", name="plain", now=time.time())
    certificate, key = issue_certificate(authority, [HOST], now=time.time())
    for name, data in (("ca.pem", authority.ca), ("server.pem", certificate), ("server.key", key)):
        (folder / name).write_bytes(data)
    for number in range(sites):
        node_key = ec.generate_private_key(ec.SECP384R1())  # what Flower's own instructions make
        public = node_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / f"node-{number}").write_bytes(
            node_key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        )
        (folder / f"node-{number}.pub").write_bytes(public)


def _write_app(folder: Path, **values: object) -> None:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(APP_TOML)
    constants = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    (folder / "plain.py").write_text(constants + APP_CODE)


def _register(folder: Path, port: int, sites: int) -> None:
    from flwr.proto.control_pb2 import RegisterNodeRequest
    from flwr.supercore.control.control_http_client import ControlHttpClient

    control = ControlHttpClient.from_server_address(f"{HOST}:{port}", False, (folder / "ca.pem").read_bytes(), [])
    limit = time.monotonic() + UP_SECONDS
    for number in range(sites):
        request = RegisterNodeRequest(public_key=(folder / f"node-{number}.pub").read_bytes(), name=f"site-{number}")
        while True:
            try:
                control.RegisterNode(request)
                break
            except Exception:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.5)


def _submit(folder: Path, port: int) -> None:
    home = folder / "cli"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "dep"\n[superlink.dep]\naddress = "{HOST}:{port}"\n'
        f'root-certificates = "{folder / "ca.pem"}"\n'
    )
    with _process(folder, "cli-run", "flwr", "run", str(folder / "app"), "dep", home=home) as process:
        if process.wait(timeout=UP_SECONDS):
            raise RuntimeError(f"plain Flower: the run was not taken:\n{(folder / 'cli-run.log').read_text()}")


def _wait(result: Path) -> list[float]:
    limit = time.monotonic() + RUN_SECONDS
    while not result.exists():
        if time.monotonic() > limit:
            raise TimeoutError("plain Flower did not finish its rounds")
        time.sleep(0.2)
    time.sleep(0.2)  # written in one go, but not at once
    seconds: list[float] = json.loads(result.read_text())
    return seconds


@contextmanager
def _process(
    folder: Path, name: str, program: str, *options: str, home: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """One of Flower's commands in a group of its own; all that it started ends with the block."""
    programs = Path(sys.executable).parent
    environment = {**os.environ, **QUIET, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    environment["FLWR_HOME"] = str(home or folder / name)
    with (folder / f"{name}.log").open("ab") as log:
        command = [str(programs / program), *options]
        process = subprocess.Popen(  # noqa: S603  Flower's own commands
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue
    for each in family:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
