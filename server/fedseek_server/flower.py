"""The driver's adapter to Flower's internals (flwr 1.41.0, pinned; tests/server/test_flower_internals.py holds it to that).

:class:`FlowerLink` talks to the SuperLink (flower_host.py) over a Unix socket that only the coordinator's account can
open, because the SuperLink's Control interface has no authentication of its own.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import Node, NodeInfo
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
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, push_objects
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.superexec_auth import SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedseek.daemon.bundle import bundle_digest
from fedseek.daemon.supervise import repeat
from fedseek.errors import NotAdmitted, SessionOver, Undelivered, Unreachable
from fedseek_server.app import to_record
from fedseek_server.driver import Arrival
from fedseek_server.fleet_gate import NEWS_PATH
from fedseek_server.objects import read_reply

ClientT = TypeVar("ClientT", ControlHttpClient, RuntimeHttpClient)

HTTP_SECONDS: Final = 30.0
HEARTBEAT_SECONDS: Final = 10.0  # the SuperLink ends a run after 60 s without one
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


@dataclass(frozen=True, slots=True)
class _Where:
    """Where an answer is: the id of its root object."""

    message_id: str


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
        return {bytes(node.public_key): int(node.node_id) for node in self._registered()}

    def names(self) -> dict[int, str]:
        """The name that each registered node was given, by its id."""
        return {int(node.node_id): str(node.name) for node in self._registered()}

    def enrol(self, public_key: bytes, name: str) -> int:
        """Register a node; returns its id. Only a registered key passes the fleet gate.

        Raises:
            NotAdmitted: the key is no P-256, P-384 or P-521 key, or was registered before; Flower takes none twice.
        """
        try:
            with _translated():
                asked = RegisterNodeRequest(public_key=public_key, name=name)
                return int(self._control.RegisterNode(asked).node_id)
        except SessionOver as error:
            raise NotAdmitted(
                f"node key of {name!r} is not taken: {error.message}",
                hint="a key that was revoked is not taken again; have the site make a new one",
            ) from error

    def revoke(self, node: int) -> None:
        """Unregister a node: from now on each of its calls is refused, and the one that the gate holds is ended."""
        with _translated():
            self._control.UnregisterNode(UnregisterNodeRequest(node_id=node))
            self._ring(self._control, node)

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
            self._ring(runtime, node)
        return str(message.metadata.message_id)

    def poll(self, message_ids: Iterable[str]) -> list[Arrival]:
        """Answers to requests with these ids that have been announced.

        Each is told once. Do not ask again for a request that was answered: Flower makes up an error once the reply
        has been fetched or deleted.
        """
        asked = PullAppMessagesRequest(message_ids=list(message_ids))
        with _translated():
            answer = self._opened().PullMessages(asked)
        arrivals = []
        for message in answer.messages_list:
            error = message.error.code if message.HasField("error") else None
            told = message.metadata
            arrivals.append(Arrival(told.reply_to_message_id, error, error in PASSING, _Where(told.message_id)))
        return arrivals

    def fetch(self, arrival: Arrival, *, limit: int) -> bytes | None:
        """The reply's bytes; None while its sender is still uploading.

        A SuperNode uploads the message's root last, so nothing is held here for an upload that may never end.

        Raises:
            Undelivered: the sender gave up; the request may be sent again.
            TooLarge: more than ``limit`` bytes are offered.
            Malformed: what came is not a reply of ours.
        """
        data = read_reply(_where(arrival).message_id, self._pull, limit=limit)
        if data is not None:
            self.discard(arrival)
        return data

    def discard(self, arrival: Arrival) -> None:
        """Have the SuperLink delete what it holds of this answer."""
        done = ConfirmMessageReceivedRequest(
            node=self._node, run_id=self._run_id, message_object_id=_where(arrival).message_id
        )
        with _translated():
            self._opened().ConfirmMessageReceived(done)

    # -- inside
    def _registered(self) -> list[NodeInfo]:
        with _translated():
            nodes = self._control.ListNodes(ListNodesRequest()).nodes_info
        return [node for node in nodes if node.status != "unregistered"]

    @staticmethod
    def _ring(client: ControlHttpClient | RuntimeHttpClient, node: int) -> None:
        client._client.post(f"http://superlink{NEWS_PATH}{node}").raise_for_status()

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
