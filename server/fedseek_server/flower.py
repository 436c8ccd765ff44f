"""The coordinator's one adapter to Flower's internals (flwr 1.41.0, pinned; tests hold it to that).

Two halves. :func:`superlink_app` builds Flower's SuperLink for the process that hosts it (superlink.py).
:class:`FlowerLink` is used by the driver: it talks to that SuperLink over a Unix socket that only the coordinator's
account can open, because the SuperLink's Control interface has no authentication of its own.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, inflate_object_from_contents, push_objects
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.superexec_auth import SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from fedseek.daemon.bundle import bundle_digest
from fedseek.daemon.supervise import repeat
from fedseek.errors import Malformed, SessionOver, TooLarge, Undelivered, Unreachable
from fedseek_server.app import from_record, to_record
from fedseek_server.driver import Arrival
from fedseek_server.fleet_gate import NEWS_PATH

if TYPE_CHECKING:
    from fastapi import FastAPI

ClientT = TypeVar("ClientT", ControlHttpClient, RuntimeHttpClient)

HTTP_SECONDS: Final = 30.0
HEARTBEAT_SECONDS: Final = 10.0  # the SuperLink ends a run after 60 s without one
CHUNK_BYTES: Final = 5 << 20  # Flower's FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE; only the last may be smaller
OBJECTS_AROUND: Final = 4  # the chunks: message, record dictionary, array record, array
_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"
# an answer of Flower's that says nothing about the site's own will: the request may be sent again
PASSING: Final = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)


# ---------------------------------------------------------------------------------------------------- the host's half
def superlink_app(database: Path, superexec_secret: bytes) -> FastAPI:
    """Flower's SuperLink as an ASGI application: node authentication on, process isolation, no installs at run time.

    The options are those of ``flower-superlink --enable-supernode-auth --isolation process --database ...
    --superexec-auth-secret-file ... --disable-runtime-dependency-installation``; TLS and addresses are the caller's.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="",
        port=0,
        insecure=False,
        certificates=None,
        superexec_auth_secret=superexec_secret,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(database),
        isolation="process",
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


def node_lookup(app: FastAPI, *, keep: float = 2.0) -> Callable[[bytes], int | None]:
    """Tells the number of the node that a public key (PEM) is registered for.

    An answer is kept for ``keep`` seconds. That opens nothing to a node just revoked: Flower looks again at each call.
    """
    factory = app.state.linkstate_factory
    known: dict[bytes, tuple[int, float]] = {}

    def node_of(public_key: bytes) -> int | None:
        node, until = known.get(public_key, (None, 0.0))
        if node is None or until < time.monotonic():
            known.pop(public_key, None)
            node = factory.state().get_node_id_by_public_key(public_key)
            if node is not None:
                known[public_key] = (node, time.monotonic() + keep)
        return node

    return node_of


# -------------------------------------------------------------------------------------------------- the driver's half
@dataclass(frozen=True, slots=True)
class _Where:
    """Where an answer's objects are."""

    message_id: str
    tree: ObjectTree


class FlowerLink:
    """A run of Flower's that carries our messages, for as long as it lasts; then another.

    Our own run has its own name inside the messages: Flower's runs are only transport, and a new one is opened
    whenever the old one is gone.

    Args:
        socket: the SuperLink's Unix socket.
        superexec_secret: lets us, and nobody else, claim the run's ServerApp task.
        bundle: the code-free bundle (fedseek/daemon/bundle.py).
    """

    def __init__(self, socket: Path, superexec_secret: bytes, bundle: bytes) -> None:
        self._socket = socket
        self._secret = superexec_secret
        self._bundle = bundle
        self._control = _over_socket(ControlHttpClient("http://superlink"), socket)
        self._runtime: RuntimeHttpClient | None = None
        self._run_id = 0
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._stop_heartbeat: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"FlowerLink({str(self._socket)!r}, run {self._run_id})"

    def open(self) -> None:
        """Begin a run of Flower's, ending any that a predecessor of this process left behind.

        Raises:
            Unreachable: the SuperLink is not there.
            SessionOver: it is, and does not give us the run's task.
        """
        self.close()
        with _translated():
            self._stop_leftovers()
            fab = Fab(hash_str=bundle_digest(self._bundle), content=self._bundle)
            self._run_id = self._control.StartRun(StartRunRequest(fab=fab)).run_id
            self._runtime = self._client(RuntimeTokenHttpInterceptor(self._claim_task()))
            begun = self._runtime.PullTaskInput(PullTaskInputRequest())
        # Flower's Message asks these class attributes for its sender
        TaskIdentity.task_id, TaskIdentity.run_id = begun.task_id, begun.run.run_id
        TaskIdentity.node_id = begun.context.node_id
        self._stop_heartbeat = repeat(HEARTBEAT_SECONDS, self._beat, name="flower-heartbeat")

    def close(self) -> None:
        """End the run, if there is one. The SuperLink then drops what it holds for it."""
        self._stop_heartbeat()
        if self._runtime is None:
            return
        self._runtime.close()
        self._runtime = None
        try:
            with _translated():
                self._control.StopRun(StopRunRequest(run_id=self._run_id))
        except (Unreachable, SessionOver):
            pass  # the SuperLink ends it by itself after a minute without heartbeat

    # -- sites
    def enrolled(self) -> dict[bytes, int]:
        """Node ids by public key (PEM) of every registered node, connected or not."""
        with _translated():
            nodes = self._control.ListNodes(ListNodesRequest()).nodes_info
        return {bytes(node.public_key): int(node.node_id) for node in nodes if node.status != "unregistered"}

    def enrol(self, public_key: bytes, name: str) -> int:
        """Register a node; returns its id. Only a registered key passes the fleet gate."""
        with _translated():
            return int(self._control.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def revoke(self, node: int) -> None:
        """Unregister a node: from now on the gate refuses its key."""
        with _translated():
            self._control.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def nodes(self) -> dict[int, str]:
        """Connected nodes, each with a stamp that changes when its SuperNode starts anew."""
        with _translated():
            nodes = self._opened().GetNodes(GetNodesRequest()).nodes
        return {int(node.node_id): node.last_activated_at for node in nodes}

    # -- messages
    def push(self, node: int, data: bytes, phase: str, number: int, *, lifetime: float) -> str:
        """Send one request; returns its id.

        Args:
            node: that is to answer.
            data: the encoded request.
            phase: of the exchange.
            number: the round.
            lifetime: seconds after which Flower forgets request and reply.
        """
        runtime = self._opened()
        # The id of a message is the hash of what is in it. With a nonce it cannot be guessed, so no site can answer
        # for another (Flower 1.41 does not compare a reply's sender with the node that brings it).
        group = f"{number}.{secrets.token_hex(16)}"
        message = Message(to_record(data), node, f"query.{phase}", ttl=lifetime, group_id=group)
        with _translated(), no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            asked = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(message))],
                message_object_trees=[get_object_tree(message)],
            )
            accepted = runtime.PushMessages(asked)
            if list(accepted.message_ids) != [message.object_id]:
                raise Undelivered(f"{phase}: the SuperLink takes no message for node {node}")
            send = make_push_object_fn_protobuf(runtime.PushObject, self._node, self._run_id, accepted.session_id)
            push_objects(get_all_nested_objects(message), send, object_ids_to_push=set(accepted.objects_to_push))
            runtime._client.post(f"http://superlink{NEWS_PATH}{node}").raise_for_status()
        return str(message.metadata.message_id)

    def poll(self, message_ids: Iterable[str]) -> list[Arrival]:
        """Answers announced since the last call to requests with these ids, each told once."""
        asked = PullAppMessagesRequest(message_ids=list(message_ids))
        with _translated():
            answer = self._opened().PullMessages(asked)
        arrivals = []
        for proto, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            message = message_from_proto(proto)
            error = message.error.code if message.has_error() else None
            where = _Where(message.metadata.message_id, tree)
            arrivals.append(Arrival(message.metadata.reply_to_message_id, error, error in PASSING, where))
        return arrivals

    def fetch(self, arrival: Arrival, *, limit: int) -> bytes | None:
        """The reply's bytes; None while its sender is still uploading.

        A SuperNode uploads the message's root last, so nothing is held here for an upload that may never end.

        Raises:
            Undelivered: the sender gave up; the request may be sent again.
            TooLarge: more than ``limit`` bytes are offered.
            Malformed: what came is not a reply of ours.
        """
        where = _where(arrival)
        ids = list(dict.fromkeys(tree.object_id for tree in iterate_object_tree(where.tree)))
        if (len(ids) - OBJECTS_AROUND - 1) * CHUNK_BYTES > limit:
            raise TooLarge(f"reply of {len(ids)} objects, wanted at most {limit} bytes")
        contents: dict[str, bytes] = {}
        for object_id in reversed(ids):
            content = self._pull(object_id)
            if content is None:
                return None
            contents[object_id] = content
        self.discard(arrival)
        return from_record(_inflated(where.message_id, contents))

    def discard(self, arrival: Arrival) -> None:
        """Have the SuperLink delete what it holds of this answer."""
        done = ConfirmMessageReceivedRequest(
            node=self._node, run_id=self._run_id, message_object_id=_where(arrival).message_id
        )
        with _translated():
            self._opened().ConfirmMessageReceived(done)

    # -- inside
    def _pull(self, object_id: str) -> bytes | None:
        asked = PullObjectRequest(node=self._node, run_id=self._run_id, object_id=object_id)
        with _translated():
            answer = self._opened().PullObject(asked)
        if not answer.object_found:
            raise Undelivered("a reply was announced and not uploaded")
        return answer.object_content if answer.object_available else None

    def _claim_task(self) -> str:
        proof = SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods=frozenset({_ACQUIRE}))
        client = self._client(proof)
        try:
            claimed = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
        finally:
            client.close()
        if not claimed.token or claimed.task.run_id != self._run_id:
            raise SessionOver("the SuperLink gave us no task for the run just begun")
        return str(claimed.token)

    def _stop_leftovers(self) -> None:
        for run in self._control.ListRuns(ListRunsRequest()).run_dict.values():
            if run.status.status != "finished":
                self._control.StopRun(StopRunRequest(run_id=run.run_id))

    def _client(self, *interceptors: Any) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        return _over_socket(RuntimeHttpClient("http://superlink", interceptors=[version, *interceptors]), self._socket)

    def _opened(self) -> RuntimeHttpClient:
        if self._runtime is None:
            raise SessionOver("no run is open")
        return self._runtime

    def _beat(self) -> None:
        try:
            with _translated():
                self._opened().SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except (Unreachable, SessionOver):
            pass  # the driver meets the same error in its own next call, and acts on it


def _where(arrival: Arrival) -> _Where:
    if not isinstance(arrival.handle, _Where):
        raise TypeError("an arrival of another link")
    return arrival.handle


def _inflated(message_id: str, contents: dict[str, bytes]) -> RecordDict:
    try:
        message = inflate_object_from_contents(message_id, contents)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise Malformed("Flower message: its objects do not make one") from error
    if not isinstance(message, Message) or not message.has_content():
        raise Malformed("Flower message: wanted one with content")
    return message.content


def _over_socket(client: ClientT, socket: Path) -> ClientT:
    """Have one of Flower's clients speak through a Unix socket, which its constructor does not offer."""
    client._client.close()
    client._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=HTTP_SECONDS)
    return client


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise Unreachable(
            f"SuperLink: {type(error).__name__}", hint="it is restarted by itself; see its log"
        ) from error
    except ObjectPushError as error:
        raise Undelivered("the SuperLink did not take an object") from error
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (502, 503, 504):
            raise Unreachable(f"SuperLink: HTTP {status}") from error
        raise SessionOver(f"SuperLink: HTTP {status} {_flower_code(error.response)}") from error


def _flower_code(response: httpx.Response) -> str:
    try:
        return f"Flower code {json.loads(response.text)['code']}"
    except (ValueError, KeyError, TypeError):
        return "without a code of Flower's"
