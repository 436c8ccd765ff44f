"""The courier's one adapter to Flower's internals (flwr 1.41.0, pinned; tests hold it to that).

:func:`run_supernode` is Flower's own SuperNode loop, in isolation mode ``process``, with its Runtime interface on a
private Unix socket in place of a port and with shorter pauses. :class:`Tasks` is what a worker needs of that interface:
the next message, and a way to answer it. Bundles stay in the SuperNode's memory: nothing here writes or imports one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import flwr.supernode.start_client_internal as supernode
import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Error, Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode, SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    pull_and_inflate_object_from_tree,
    pull_objects,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.superexec_auth import SuperExecAuthHttpInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedseek.daemon.supervise import repeat
from fedseek.errors import Malformed, NotAdmitted, Unreachable
from fedseek_site.app import from_record, to_record

PAUSE_SECONDS: Final = 0.1  # Flower: 3 s between two requests for messages, 0.5 s between two looks for a reply
BACKOFF_SECONDS: Final = 0.05  # Flower: 1 s before an object that is not there yet is asked for again
LOST_SECONDS: Final = 200.0  # after which an object does not come any more: Flower keeps an upload open for 180 s
HEARTBEAT_SECONDS: Final = 10.0
HTTP_SECONDS: Final = 30.0
_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"

REFUSED: Final = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the site refused the message")
AWAY: Final = Error(ErrorCode.CLIENT_APP_CRASHED, "the site service is away")
WRONG_BUNDLE: Final = Error(ErrorCode.INVALID_FAB, "the site runs no such bundle")


# ------------------------------------------------------------------------------------------------------ the SuperNode
class _RingingState(InMemoryNodeState):
    """Flower's node state; rings when a message has come whole, so that the worker need not ask for tasks all the time.

    The SuperNode takes a message with all its objects, and then looks for a reply again and again.
    """

    def __init__(self, objects: ObjectStoreFactory, bell: threading.Event) -> None:
        super().__init__(objects.store())
        self._bell = bell

    def get_messages_legacy(
        self, *, run_ids: Sequence[int] | None = None, is_reply: bool | None = None, limit: int | None = None
    ) -> Sequence[Message]:
        """Ring when it is replies that are looked for."""
        if is_reply:
            self._bell.set()
        return super().get_messages_legacy(run_ids=run_ids, is_reply=is_reply, limit=limit)


def run_supernode(
    address: str, ca: bytes, key: ec.EllipticCurvePrivateKey, listener: Any, secret: bytes, bell: threading.Event
) -> None:
    """Flower's SuperNode. Returns when Flower gives up; ends the process on SIGTERM and SIGINT (Flower's handlers).

    Args:
        address: HOST:PORT of the coordinator's fleet gate.
        ca: PEM of the authority that its certificate must be from.
        key: the site's node key.
        listener: a bound Unix socket for the Runtime interface.
        secret: without which no task is given out there.
        bell: set when a message has come.
    """
    _shorten_pauses()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    objects = ObjectStoreFactory()
    factory = NodeStateFactory(objectstore_factory=objects)
    factory.state_instance = _RingingState(objects, bell)
    app = create_app(state_factory=factory, superexec_auth_secret=secret)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", server_header=False))
    threading.Thread(target=server.run, args=([listener],), name="runtime", daemon=True).start()
    supernode.start_client_internal(
        state_factory=factory,
        server_address=address,
        node_config={},
        root_certificates=ca,
        insecure=False,
        authentication_keys=(key, key.public_key()),
        isolation="process",
        superexec_auth_secret=secret,
        runtime_dependency_install=False,
    )


def _shorten_pauses() -> None:
    """Flower's pauses are constants in its functions. The gate holds requests, so short ones cost nothing."""
    clock = types.SimpleNamespace(**{name: getattr(time, name) for name in dir(time) if not name.startswith("_")})
    clock.sleep = lambda seconds: time.sleep(min(seconds, PAUSE_SECONDS))
    vars(supernode)["time"] = clock
    defaults = pull_objects.__kwdefaults__
    if defaults is None or {"initial_backoff", "backoff_cap", "max_tries_per_object"} - set(defaults):
        raise NotImplementedError("flwr is not 1.41.0: pull_objects has other arguments")
    defaults.update(initial_backoff=BACKOFF_SECONDS, backoff_cap=0.2, max_tries_per_object=None, max_time=LOST_SECONDS)


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a node key (OpenSSH form, no passphrase).

    Raises:
        NotAdmitted: it is not one.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise NotAdmitted(f"{path}: no readable node key ({type(error).__name__})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise NotAdmitted(f"{path}: got a key of another kind, wanted an elliptic curve key in OpenSSH form")
    return key


def take_place(address: str, ca: bytes, key: ec.EllipticCurvePrivateKey, memory: Path) -> int:
    """Make sure that the gate admits this node, and that it has no place taken by a predecessor that was killed.

    Flower refuses a node that it still holds for connected, which after a ``kill -9`` it does for a minute. The node may
    sign itself off, though, if it knows its number: it is kept in ``memory``.

    Returns:
        The node's number at the coordinator.

    Raises:
        Unreachable: nobody there, or no TLS with this authority; says which.
        NotAdmitted: the gate's own words why.
    """
    interceptors: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    with FleetHttpClient.from_server_address(address, False, ca, interceptors) as client, _explained(address):
        if memory.exists():
            node = int(memory.read_text("ascii"))
        else:
            public_key = public_key_to_bytes(key.public_key())
            asked = ActivateNodeRequest(public_key=public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            node = client.ActivateNode(asked).node_id
            memory.write_text(str(node), "ascii")
        try:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node))
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                memory.unlink()  # enrolled anew: another number
                raise
    return node


@contextmanager
def _explained(address: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        text = error.response.text[:200] if error.response.status_code == httpx.codes.UNAUTHORIZED else ""
        raise NotAdmitted(
            f"{address}: HTTP {error.response.status_code} {text}".rstrip(),
            hint="compare the node key's fingerprint with the coordinator's roster, and both clocks",
        ) from error
    except httpx.TransportError as error:
        raise Unreachable(f"{address}: {error}", hint="it is tried again") from error


# --------------------------------------------------------------------------------------------------------- the worker
class Tasks:
    """The SuperNode's Runtime interface, as its worker uses it.

    Args:
        socket: where the interface is.
        secret: proves that we are the worker.
        allowed: digests of the bundles that may be answered for.
    """

    def __init__(self, socket: Path, secret: bytes, allowed: frozenset[str]) -> None:
        self._socket = socket
        self._allowed = allowed
        proof = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
        self._acquirer = self._client(proof)

    def answer_next(self, answer: Callable[[bytes], bytes | Error]) -> bool:
        """Answer one message, if there is one. False if there was none.

        A message under another bundle is answered with an error, unread; the bundle is neither written nor imported.

        Raises:
            Unreachable: the SuperNode is not there.
        """
        try:
            claimed = self._acquirer.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
            if not claimed.token:
                return False
            self._answer(claimed.token, answer)
        except httpx.HTTPError as error:
            raise Unreachable(f"SuperNode: {type(error).__name__}") from error
        return True

    def _answer(self, token: str, answer: Callable[[bytes], bytes | Error]) -> None:
        client = self._client(RuntimeTokenHttpInterceptor(token))
        stop_heartbeat = repeat(HEARTBEAT_SECONDS, lambda: _beat(client), name="task-heartbeat")
        try:
            begun = client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id, TaskIdentity.run_id = begun.task_id, begun.run.run_id
            TaskIdentity.node_id = begun.context.node_id
            context = context_from_proto(begun.context)
            ended, details = SubStatus.COMPLETED, ""
            try:
                message = _whole_message(client, context)
            except ObjectPullError:
                ended, details = SubStatus.FAILED, "incomplete"
            else:
                content: bytes | Error = WRONG_BUNDLE
                if begun.fab.hash_str in self._allowed:
                    content = _answered(message, answer)
                reply = Message(content if isinstance(content, Error) else to_record(content), reply_to=message)
                push_message(client, reply, context)
            push_task_output(client=client, context=context, sub_status=ended, details=details)
        finally:
            stop_heartbeat()
            client.close()

    def _client(self, *interceptors: Any) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        client = RuntimeHttpClient("http://supernode", interceptors=[version, *interceptors])
        client._client.close()
        client._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(self._socket)), timeout=HTTP_SECONDS)
        return client


def _whole_message(client: RuntimeHttpClient, context: Context) -> Message:
    """The message of a task.

    Raises:
        ObjectPullError: it is not all there. When a run ends while the SuperNode takes a message of it, Flower 1.41
            forgets to take back the task: its objects never come, and to wait for them would block the site.
    """
    pulled = client.PullMessages(PullAppMessagesRequest())
    if not pulled.messages_list:
        raise ObjectPullError("", "no message")
    node = Node(node_id=context.node_id)
    pull = make_pull_object_fn_protobuf(client.PullObject, node, context.run_id)

    def pull_now(object_id: str) -> bytes:
        try:
            return pull(object_id)
        except ObjectUnavailableError as error:
            raise ObjectPullError(object_id, "it is not there") from error

    confirm = make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, context.run_id)
    tree = pulled.message_object_trees[0]
    message = pull_and_inflate_object_from_tree(tree, pull_now, confirm, return_type=Message)
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def _answered(message: Message, answer: Callable[[bytes], bytes | Error]) -> bytes | Error:
    try:
        request = from_record(message.content)
    except Malformed:
        return REFUSED
    return answer(request)


def _beat(client: RuntimeHttpClient) -> None:
    with contextlib.suppress(httpx.HTTPError, RuntimeError):  # without the SuperNode in here nobody would answer
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
