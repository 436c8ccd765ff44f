"""The courier's one adapter to Flower's internals (flwr 1.41.0, pinned; tests hold it to that).

:func:`run_supernode` is Flower's own SuperNode loop, in isolation mode ``process``, with its Runtime interface on a
private Unix socket in place of a port and with shorter pauses. :class:`Tasks` is what a worker needs of that interface:
the next message, and a way to answer it. Bundles stay in the SuperNode's memory: nothing here unpacks, writes or imports
one. What the coordinator answers is bounded, and cannot send the courier elsewhere: see gate.py.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import flwr.supernode.fleet_http_connection as fleet_connection
import flwr.supernode.start_client_internal as supernode
import httpx
import uvicorn
from flwr import __version__ as flower_version
from flwr.app import Error, Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError, iterate_object_tree
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
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedseek.daemon.bundle import bundle_digest
from fedseek.daemon.supervise import repeat
from fedseek.errors import Malformed, SessionOver, TooLarge, Unreachable
from fedseek.identity.secret_files import write_secret_file
from fedseek_site.app import from_record, to_record
from fedseek_site.gate import CHUNK_BYTES, HTTP_SECONDS, Credentials, Failure, explained, guarded_http

PAUSE_SECONDS: Final = 0.1  # Flower: 3 s between two requests for messages, 0.5 s between two looks for a reply
BACKOFF_SECONDS: Final = 0.05  # Flower: 1 s before an object that is not there yet is asked for again
LOST_SECONDS: Final = 200.0  # after which an object does not come any more: Flower keeps an upload open for 180 s
HEARTBEAT_SECONDS: Final = 10.0
MOST_OBJECTS: Final = (1 << 30) // CHUNK_BYTES + 8  # of a message: its chunks, and what Flower wraps them in
WANTED_VERSION: Final = "1.41.0"
_flowers_pull: Final = supernode._pull_and_store_message
_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"
_log = logging.getLogger(__name__)

_CODES: Final = {
    Failure.REFUSED: ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
    Failure.AWAY: ErrorCode.CLIENT_APP_CRASHED,  # the coordinator sends its request again
    Failure.WRONG_BUNDLE: ErrorCode.INVALID_FAB,
}


# ------------------------------------------------------------------------------------------------------ the SuperNode
class _GuardedClient(FleetHttpClient):
    """Flower's client of the fleet gate, over gate.py's connection; takes no message larger than any of ours."""

    def __init__(self, base_url: str, **options: Any) -> None:
        super().__init__(base_url, **options)
        self._client.close()
        self._client = guarded_http(options["verify"])

    def PullMessages(self, request: PullMessagesRequest) -> PullMessagesResponse:  # noqa: N802  (Flower's name)
        """As Flower's.

        Raises:
            TooLarge: the message has more objects than any of ours.
        """
        answer = super().PullMessages(request)
        count = sum(1 for tree in answer.message_object_trees for _ in iterate_object_tree(tree))
        if count > MOST_OBJECTS:
            raise TooLarge(f"coordinator: got a message of {count} objects, wanted at most {MOST_OBJECTS}")
        return answer


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

    def create_task(self, task_type: str, *others: Any, **named: Any) -> int | None:
        """Whatever kind of run the coordinator calls it, our worker answers: a task of another kind waits for ever."""
        return super().create_task(TaskType.CLIENT_APP, *others, **named)


def run_supernode(credentials: Credentials, listener: socket.socket, secret: bytes, bell: threading.Event) -> None:
    """Flower's SuperNode. Returns when Flower gives up; ends the process on SIGTERM and SIGINT (Flower's handlers).

    Args:
        credentials: for the coordinator's fleet gate.
        listener: a bound Unix socket for the Runtime interface.
        secret: without which no task is given out there.
        bell: set when a message has come.
    """
    adapt_flower()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    objects = ObjectStoreFactory()
    factory = NodeStateFactory(objectstore_factory=objects)
    factory.state_instance = _RingingState(objects, bell)
    app = create_app(state_factory=factory, superexec_auth_secret=secret)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", server_header=False))
    threading.Thread(target=server.run, args=([listener],), name="runtime", daemon=True).start()
    supernode.start_client_internal(
        state_factory=factory,
        server_address=credentials.address,
        node_config={},
        root_certificates=credentials.authority,
        insecure=False,
        authentication_keys=(credentials.key, credentials.key.public_key()),
        isolation="process",
        superexec_auth_secret=secret,
        runtime_dependency_install=False,
    )


def adapt_flower() -> None:
    """Change what Flower has as constants in its functions.

    Pauses: the gate holds requests, so short ones cost nothing. The client: see above. The bundle: its configuration is
    of no use to us, so it is not unpacked.

    Raises:
        NotImplementedError: another Flower than the one this was written for and tested with.
    """
    defaults = pull_objects.__kwdefaults__
    wanted = {"initial_backoff", "backoff_cap", "max_tries_per_object", "max_time"}
    if flower_version != WANTED_VERSION or defaults is None or wanted - set(defaults):
        raise NotImplementedError(
            f"got flwr {flower_version}, wanted {WANTED_VERSION}: install what pyproject.toml says"
        )
    defaults.update(initial_backoff=BACKOFF_SECONDS, backoff_cap=0.2, max_tries_per_object=None, max_time=LOST_SECONDS)
    clock = types.SimpleNamespace(**{name: getattr(time, name) for name in dir(time) if not name.startswith("_")})
    clock.sleep = lambda seconds: time.sleep(min(seconds, PAUSE_SECONDS))
    vars(supernode)["time"] = clock
    vars(supernode)["get_fused_config_from_fab"] = lambda bundle, run: {}
    vars(fleet_connection)["FleetHttpClient"] = _GuardedClient
    vars(supernode)["_pull_and_store_message"] = _pull_and_store_message


def _pull_and_store_message(**named: Any) -> int | None:
    """As Flower's, which takes back what it cannot receive whole, but not when the run of Flower's ended meanwhile.

    Message and task would stay, be answered, and that answer be pushed in place of the next message's own; that one would
    wait until yet another message comes. So the end of a run is told as any other failure.
    """
    for name in ("pull_object", "confirm_message_received"):
        named[name] = _failing(named[name])
    return _flowers_pull(**named)


def _failing(call: Callable[..., Any]) -> Callable[..., Any]:
    def told(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RunNotRunningException:  # a BaseException
            raise SessionOver("the run of Flower's has ended") from None

    return told


# ------------------------------------------------------------------------------------------------------- at the gate
def take_place(credentials: Credentials, memory: Path) -> int:
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
        NodeAuthHttpInterceptor(credentials.key, credentials.key.public_key()),
    ]
    address, authority = credentials.address, credentials.authority
    with _GuardedClient.from_server_address(address, False, authority, interceptors) as client, explained(address):
        node = _remembered(memory)
        if node is not None:
            try:
                client.DeactivateNode(DeactivateNodeRequest(node_id=node))
            except httpx.HTTPStatusError:
                memory.unlink()  # enrolled anew, with another number, or not any more: asking for it will tell
            else:
                return node
        public_key = public_key_to_bytes(credentials.key.public_key())
        asked = ActivateNodeRequest(public_key=public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        node = int(client.ActivateNode(asked).node_id)
        write_secret_file(memory, str(node).encode())
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    return node


def _remembered(memory: Path) -> int | None:
    try:
        return int(memory.read_bytes()[:20])
    except (OSError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------------- the worker
class Tasks:
    """The SuperNode's Runtime interface, as its worker uses it.

    Args:
        path: of the socket where the interface is.
        secret: proves that we are the worker.
        allowed: digests of the bundles that may be answered for.
    """

    def __init__(self, path: Path, secret: bytes, allowed: frozenset[str]) -> None:
        self._path = path
        self._allowed = allowed
        proof = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
        self._acquirer = self._client(proof)

    def answer_next(self, answer: Callable[[bytes], bytes | Failure]) -> bool:
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

    def _answer(self, token: str, answer: Callable[[bytes], bytes | Failure]) -> None:
        client = self._client(RuntimeTokenHttpInterceptor(token))
        stop_heartbeat = repeat(HEARTBEAT_SECONDS, lambda: _beat(client), name="task-heartbeat")
        try:
            begun = client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id, TaskIdentity.run_id = begun.task_id, begun.run.run_id
            TaskIdentity.node_id = begun.context.node_id
            context = context_from_proto(begun.context)
            pulled = client.PullMessages(PullAppMessagesRequest())
            ended, details = SubStatus.COMPLETED, ""
            try:
                content = self._content(client, begun.fab.content, pulled, answer)
            except ObjectPullError:
                ended, details = SubStatus.FAILED, "incomplete"
            else:
                asked = message_from_proto(pulled.messages_list[0])
                push_message(client, _reply(content, asked), context)
            push_task_output(client=client, context=context, sub_status=ended, details=details)
        finally:
            stop_heartbeat()
            client.close()

    def _content(
        self,
        client: RuntimeHttpClient,
        bundle: bytes,
        pulled: PullAppMessagesResponse,
        answer: Callable[[bytes], bytes | Failure],
    ) -> bytes | Failure:
        """What to reply.

        Raises:
            ObjectPullError: the message is not all there. When a run ends while the SuperNode takes a message of it,
                Flower 1.41 forgets to take back the task: its objects never come, and waiting would block the site.
        """
        if not pulled.messages_list:
            raise ObjectPullError("", "no message")
        tree = pulled.message_object_trees[0]
        if bundle_digest(bundle) not in self._allowed:
            _log.warning("a message came under another bundle than the one allowed; it is refused")
            client.ConfirmMessageReceived(ConfirmMessageReceivedRequest(message_object_id=tree.object_id))
            return Failure.WRONG_BUNDLE
        try:
            request = from_record(_whole_message(client, tree).content)
        except (Malformed, UnexpectedObjectContentError, ValueError, KeyError, TypeError) as error:
            _log.warning("a message came that is none of ours (%s); it is refused", type(error).__name__)
            return Failure.REFUSED
        return answer(request)

    def _client(self, *interceptors: Any) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        client = RuntimeHttpClient("http://supernode", interceptors=[version, *interceptors])
        client._client.close()
        client._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(self._path)), timeout=HTTP_SECONDS)
        return client


def _reply(content: bytes | Failure, asked: Message) -> Message:
    if isinstance(content, Failure):
        return Message(Error(_CODES[content], content.value), reply_to=asked)
    return Message(to_record(content), reply_to=asked)


def _whole_message(client: RuntimeHttpClient, tree: ObjectTree) -> Message:
    """A message of which the SuperNode has every object.

    Raises:
        ObjectPullError: it has not.
        UnexpectedObjectContentError, ValueError, KeyError, TypeError: the objects do not make a message.
    """
    node = Node(node_id=TaskIdentity.node_id)
    pull = make_pull_object_fn_protobuf(client.PullObject, node, TaskIdentity.run_id)

    def pull_now(object_id: str) -> bytes:
        try:
            return pull(object_id)
        except ObjectUnavailableError as error:
            raise ObjectPullError(object_id, "it is not there") from error

    confirm = make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, TaskIdentity.run_id)
    return pull_and_inflate_object_from_tree(tree, pull_now, confirm, return_type=Message)


def _beat(client: RuntimeHttpClient) -> None:
    with contextlib.suppress(httpx.HTTPError, RuntimeError):  # without the SuperNode in here nobody would answer
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
