"""What the coordinator uses of Flower beyond its public interface, at exactly the version that is pinned.

Another version fails here, by name, before it fails in a run. What each line is for is said in fedseek_server/flower.py,
flower_host.py and fleet_gate.py; when one of these tests fails after an upgrade, those are the files to read.
"""

import dataclasses
import inspect
import logging

import flwr
import httpx
import pytest
import uvicorn
from flwr.common import constant
from flwr.common.constant import ErrorCode
from flwr.proto import control_pb2, fleet_pb2, message_pb2, node_pb2, runtime_pb2
from flwr.supercore import constant as core_constant
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable import inflatable_object, inflatable_protobuf_utils, inflatable_utils
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.superexec_auth import SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet import node_auth
from flwr.superlink.routers.fleet.router import router as fleet_router
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from fedseek_server import fleet_gate, flower, flower_host, listeners

OURS = "1.41.0"


def arguments(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def fields(message) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.fields}


def test_the_version_is_the_one_that_was_read():
    assert flwr.__version__ == OURS, (
        f"flwr is {flwr.__version__}; the coordinator was written against {OURS}. Read fedseek_server/flower.py, "
        "flower_host.py and fleet_gate.py against the new version, run this file, then change OURS."
    )


# ------------------------------------------------------------------------------------------------------------ the host
def test_the_superlink_is_built_with_these_options():
    assert arguments(create_app) == ["config", "superlink_lifespan_class"]
    assert {field.name for field in dataclasses.fields(SuperLinkLifespanConfig)} == {
        "control_address", "health_server_address", "host", "port", "insecure", "certificates", "superexec_auth_secret",
        "authn_plugin", "event_log_plugin", "fleet_event_log_plugin", "enable_event_log", "artifact_provider",
        "enable_supernode_auth", "fleet_api_type", "fleet_api_address", "simulation", "ssl_ca_certfile", "ssl_certfile",
        "ssl_keyfile", "database", "isolation", "runtime_dependency_install",
    }  # fmt: skip


@pytest.fixture
def app(tmp_path):
    return flower_host.superlink_app(tmp_path / "state.db", b"x" * 32)


def test_the_application_has_node_authentication_and_our_secret(app):
    assert app.state.enable_supernode_auth is True
    assert app.state.superexec_auth_secret == b"x" * 32
    assert logging.getLogger("flwr").level == logging.WARNING


def test_a_key_is_looked_up_in_its_database_and_an_answer_is_kept_for_a_while(app):
    factory, asked = app.state.linkstate_factory, []
    assert factory.state().get_node_id_by_public_key(b"nobody's") is None

    class State:
        def get_node_id_by_public_key(self, key):
            asked.append(key)
            return 7 if key == b"known" else None

    factory.state_instance = State()
    node_of = flower_host.node_lookup(app, keep=60)
    assert [node_of(b"known"), node_of(b"known"), node_of(b"no"), node_of(b"no")] == [7, 7, None, None]
    assert asked == [b"known", b"no", b"no"]
    node_of = flower_host.node_lookup(app, keep=-1)
    assert [node_of(b"known"), node_of(b"known")] == [7, 7]
    assert len(asked) == 5


# ------------------------------------------------------------------------------------------------------------ the gate
def test_the_ten_calls_are_flowers_fleet_interface_less_registration():
    paths = {route.path for route in fleet_router.routes}
    assert paths - set(fleet_gate.LIMITS) == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert set(fleet_gate.LIMITS) <= paths
    assert {("POST", path) for path in fleet_gate.LIMITS} <= set(PROTOBUF_REQUEST_TYPES)


def test_the_gate_reads_the_headers_and_the_window_that_flower_does():
    assert core_constant.FLEET_HTTP_PUBLIC_KEY_HEADER == fleet_gate.KEY_HEADER
    assert core_constant.FLEET_HTTP_SIGNATURE_HEADER == fleet_gate.SIGNATURE_HEADER
    assert constant.TIMESTAMP_HEADER == fleet_gate.TIME_HEADER
    assert constant.SYSTEM_TIME_TOLERANCE == fleet_gate.AHEAD
    assert constant.TIMESTAMP_TOLERANCE + constant.SYSTEM_TIME_TOLERANCE == fleet_gate.BEHIND


def test_flower_itself_binds_each_call_to_the_node_whose_key_signed_it():
    """The gate relies on it: it checks that a node is registered, not that the node in the body is the sender."""
    source = inspect.getsource(node_auth.authenticate_node)
    assert "get_node_id_by_public_key(public_key) != node_id" in source
    assert "protobuf_request.public_key != public_key" in source
    for path in fleet_gate.LIMITS:
        request = PROTOBUF_REQUEST_TYPES["POST", path]
        named = {"node", "node_id", "public_key"} & fields(request)
        assert named, f"{path}: {request.__name__} does not say whose it is"


def test_chunks_are_of_the_size_that_the_gate_lets_in():
    header = 1000
    assert constant.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + header < fleet_gate.OBJECT


def test_a_held_call_is_answered_before_a_supernode_gives_up():
    assert inspect.signature(ProtobufClient.__init__).parameters["timeout"].default > fleet_gate.HOLD_SECONDS + 5


PULLED = {
    fleet_pb2.PushMessagesRequest: {"node", "messages_list", "message_object_trees", "clientapp_runtime_list"},
    message_pb2.ObjectTree: {"object_id", "children"},
    message_pb2.Metadata: {
        "run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "ttl", "message_type",
        "created_at", "src_task_id", "dst_task_id",
    },
}  # fmt: skip


@pytest.mark.parametrize("message", PULLED, ids=lambda message: message.__name__)
def test_a_pushed_reply_has_the_fields_that_are_checked(message):
    assert fields(message) == PULLED[message]


def reply(*, source=5, to=1, answers="q", message_id="m", tree=("m", []), count=1):
    def grow(node):
        return message_pb2.ObjectTree(object_id=node[0], children=[grow(child) for child in node[1]])

    metadata = message_pb2.Metadata(
        src_node_id=source, dst_node_id=to, reply_to_message_id=answers, message_id=message_id
    )
    return fleet_pb2.PushMessagesRequest(
        messages_list=[message_pb2.Message(metadata=metadata)] * count, message_object_trees=[grow(tree)] * count
    ).SerializeToString()


LIKE_OURS = ("m", [("dict", [("record", [("array", [("c1", []), ("c2", []), ("c1", [])])])])])


def test_a_reply_of_the_nodes_own_is_one():
    assert flower_host.is_own_reply(5, reply(tree=LIKE_OURS))
    assert flower_host.is_own_reply(5, reply())  # an error has no objects but itself


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xff",
        reply(source=6),
        reply(source=1),
        reply(to=6),
        reply(to=0),
        reply(answers=""),
        reply(count=2),
        reply(message_id="another"),
        reply(tree=("m", [("a", [("m", [])])])),
        reply(tree=("m", [("a", [("b", [("c", [("d", [("e", [])])])])])])),
    ],
)
def test_what_is_not_a_reply_of_the_nodes_own_is_none(body):
    assert not flower_host.is_own_reply(5, body)


# ---------------------------------------------------------------------------------------------------------- the driver
def test_the_clients_are_made_of_a_base_and_an_httpx_client_that_can_be_replaced():
    for kind in (ControlHttpClient, RuntimeHttpClient):
        with kind("http://superlink") as client:
            assert isinstance(client._client, httpx.Client)
            assert arguments(kind.__init__)[1:2] == ["base_url"]


SENT = {
    control_pb2.StartRunRequest: {"fab"},
    control_pb2.StopRunRequest: {"run_id"},
    control_pb2.RegisterNodeRequest: {"public_key", "name"},
    control_pb2.UnregisterNodeRequest: {"node_id"},
    control_pb2.ListNodesResponse: {"nodes_info"},
    control_pb2.ListRunsResponse: {"run_dict"},
    node_pb2.NodeInfo: {"node_id", "public_key", "name", "status", "last_activated_at"},
    runtime_pb2.AcquireTaskRequest: {"supported_task_types"},
    runtime_pb2.AcquireTaskResponse: {"token", "task"},
    runtime_pb2.PullTaskInputResponse: {"task_id", "run", "context"},
    runtime_pb2.PushAppMessagesRequest: {"messages_list", "message_object_trees"},
    runtime_pb2.PushAppMessagesResponse: {"message_ids", "objects_to_push", "session_id"},
    runtime_pb2.PullAppMessagesResponse: {"messages_list", "message_object_trees"},
    message_pb2.PullObjectResponse: {"object_found", "object_available", "object_content"},
    message_pb2.ConfirmMessageReceivedRequest: {"node", "run_id", "message_object_id"},
}


@pytest.mark.parametrize("message", SENT, ids=lambda message: message.__name__)
def test_requests_and_answers_have_the_fields_that_are_used(message):
    assert fields(message) >= SENT[message]


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (RuntimeTokenHttpInterceptor.__init__, ["self", "token"]),
        (RuntimeVersionHttpInterceptor.__init__, ["self", "component_name"]),
        (SuperExecAuthHttpInterceptor.__init__, ["self", "master_secret", "protected_methods"]),
        (inflatable_object.get_object_tree, ["obj"]),
        (inflatable_utils.push_objects, ["objects", "push_object_fn", "object_ids_to_push", "keep_objects"]),
        (
            inflatable_protobuf_utils.make_push_object_fn_protobuf,
            ["push_object_protobuf", "node", "run_id", "session_id"],
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_functions_take_the_arguments_that_are_given(function, wanted):
    given = arguments(function)
    assert given[: len(wanted)] == wanted


def test_a_messages_sender_is_asked_of_the_task():
    for name in ("task_id", "run_id", "node_id"):
        assert isinstance(getattr(type(TaskIdentity), name), property)
        assert f"_{name}" in vars(TaskIdentity)
    assert constant.SUPERLINK_NODE_ID == 1


def test_the_errors_that_pass_are_told_from_those_that_are_the_sites_will():
    everything = {getattr(ErrorCode, name) for name in dir(ErrorCode) if name.isupper()}
    assert len(everything) == 9, "Flower has other error codes: which of them may be answered by asking again?"
    will = {ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.INVALID_FAB, ErrorCode.LOAD_CLIENT_APP_EXCEPTION}
    assert not flower.PASSING & will


def test_a_key_that_was_taken_once_is_told_by_this_code():
    assert ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE == 23


# --------------------------------------------------------------------------------------------------------- uvicorn, h11
def test_a_connection_of_uvicorns_tells_what_it_is_at():
    assert uvicorn.__version__.startswith("0.49.")
    assert "cycle" in inspect.getsource(H11Protocol.__init__)
    assert "self.response_complete = False" in inspect.getsource(RequestResponseCycle.__init__)
    assert listeners.http_config(None).http == "h11"
    assert arguments(uvicorn.Server.on_tick) == ["self", "counter"]
    assert arguments(uvicorn.Server._serve) == ["self", "sockets"]
