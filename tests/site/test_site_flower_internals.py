"""What the courier uses of Flower's inside, held to flwr 1.41.0. If this fails, read clients/fedseek_site/flower.py.

Flower promises none of it. A new version is taken by going through these tests one by one, not by loosening them.
"""

import inspect
import re

import flwr.supernode.fleet_http_connection as fleet_connection
import flwr.supernode.start_client_internal as supernode
import httpx
import pytest
from flwr import __version__
from flwr.app import Error
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.corestate.in_memory_corestate import InMemoryCoreState
from flwr.supercore.exit import signal_handler
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, pull_objects
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedseek_site import flower, gate

CHANGED = "flwr's inside is not that of 1.41.0: see the head of this file"


def parameters(function):
    return set(inspect.signature(function).parameters)


def source(thing):
    return re.sub(r"\s+", " ", inspect.getsource(thing))


def test_the_version_is_the_one_pinned():
    assert __version__ == flower.WANTED_VERSION == "1.41.0", CHANGED


def test_another_version_is_refused_with_a_clear_message(monkeypatch):
    monkeypatch.setattr(flower, "flower_version", "1.42.0")
    with pytest.raises(NotImplementedError, match=r"got flwr 1\.42\.0, wanted 1\.41\.0: install what pyproject\.toml"):
        flower.adapt_flower()
    assert vars(fleet_connection)["FleetHttpClient"] is FleetHttpClient


def test_the_supernodes_loop_takes_the_arguments_we_give():
    given = {"state_factory", "server_address", "node_config", "root_certificates", "insecure", "authentication_keys"}
    given |= {"isolation", "superexec_auth_secret", "runtime_dependency_install"}
    assert given <= parameters(supernode.start_client_internal), CHANGED


def test_the_supernodes_loop_does_what_we_change_through_the_names_that_we_replace():
    assert supernode.time.sleep, CHANGED
    assert "time.sleep(3)" in source(supernode.start_client_internal), CHANGED
    assert "time.sleep(0.5)" in source(supernode._push_messages), CHANGED
    assert "run_cfg = get_fused_config_from_fab(fab.content, run_info)" in source(supernode._pull_and_store_message)
    assert "with FleetHttpClient.from_server_address(" in source(fleet_connection.http_request_response), CHANGED
    assert "state.get_messages_legacy(is_reply=True)" in source(supernode._push_messages), CHANGED
    assert "state.create_task( task_type=(" in source(supernode._pull_and_store_message), CHANGED


def test_nothing_else_in_the_supernode_looks_into_a_bundle_or_starts_a_process():
    loop = source(supernode)
    assert loop.count("fab.content") == 2, CHANGED  # its configuration; its signature, if there were trusted entities
    assert loop.count("subprocess.Popen(") == 1, CHANGED
    assert "if isolation == ISOLATION_MODE_SUBPROCESS:" in loop, CHANGED
    assert supernode.ISOLATION_MODE_SUBPROCESS == "subprocess", CHANGED


def test_the_pauses_of_pulling_are_defaults_that_can_be_changed():
    wanted = {"initial_backoff", "backoff_cap", "max_tries_per_object", "max_time", "max_concurrent_pulls"}
    assert set(pull_objects.__kwdefaults__) == wanted, CHANGED
    assert parameters(pull_objects) - wanted == {"object_ids", "pull_object_fn"}, CHANGED


def test_the_state_is_one_that_we_can_put_in_place():
    assert InMemoryNodeState.get_messages_legacy.__kwdefaults__ == {"run_ids": None, "is_reply": None, "limit": None}
    assert list(inspect.signature(InMemoryCoreState.create_task).parameters)[:4] == [
        "self",
        "task_type",
        "run_id",
        "fab_hash",
    ], CHANGED
    factory = NodeStateFactory(objectstore_factory=None)
    factory.state_instance = state = object()
    assert factory.state() is state, CHANGED
    assert parameters(create_app) == {"state_factory", "superexec_auth_secret"}, CHANGED


def test_the_clients_hold_their_connection_where_we_replace_it():
    for kind in (FleetHttpClient, RuntimeHttpClient):
        client = kind("http://nobody")
        assert isinstance(client, ProtobufClient), CHANGED
        assert isinstance(client._client, httpx.Client), CHANGED
        client.close()
    assert {"base_url", "interceptors", "verify"} <= parameters(ProtobufClient.__init__), CHANGED
    assert "verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)" in source(ProtobufClient.from_server_address), CHANGED
    assert "self._client." in source(ProtobufClient._send), CHANGED


def test_the_coordinators_connection_is_the_guarded_one():
    kept = vars(supernode).copy(), vars(fleet_connection).copy(), dict(pull_objects.__kwdefaults__)
    try:
        flower.adapt_flower()
        assert fleet_connection.FleetHttpClient is flower._GuardedClient
        assert supernode.get_fused_config_from_fab(b"not even a zip", None) == {}
        assert pull_objects.__kwdefaults__["initial_backoff"] == flower.BACKOFF_SECONDS
        assert supernode.time is not inflatable_utils.time
        assert supernode.time.monotonic is inflatable_utils.time.monotonic
    finally:
        vars(supernode).update(kept[0])
        vars(fleet_connection).update(kept[1])
        pull_objects.__kwdefaults__.update(kept[2])


def test_the_workers_helpers_take_what_we_give():
    assert list(inspect.signature(push_message).parameters) == ["client", "message", "context"], CHANGED
    assert {"client", "context", "sub_status", "details"} <= parameters(push_task_output), CHANGED
    assert {"task_id", "run_id", "node_id"} <= set(dir(type(TaskIdentity))), CHANGED
    assert (TaskType.CLIENT_APP, TaskType.AGENT_APP) == ("flwr-clientapp", "flwr-agentapp"), CHANGED
    assert (SubStatus.COMPLETED, SubStatus.FAILED) == ("completed", "failed"), CHANGED
    assert issubclass(ObjectPullError, Exception), CHANGED
    assert issubclass(ObjectUnavailableError, Exception), CHANGED


def test_the_codes_are_those_that_the_coordinator_knows():
    codes = {failure.name: code for failure, code in flower._CODES.items()}
    assert codes == {"REFUSED": 2, "AWAY": 8, "WRONG_BUNDLE": 7}, CHANGED
    assert codes["AWAY"] == ErrorCode.CLIENT_APP_CRASHED, CHANGED
    assert set(codes) == set(gate.Failure.__members__)
    assert Error(7, "text").reason == "text", CHANGED
    assert HEARTBEAT_DEFAULT_INTERVAL == 30, CHANGED


def test_a_node_signs_the_time_and_nothing_of_the_request():
    """So the gate's clock check and TLS are what protects a request; the gate's own tests rest on it too."""
    signing = source(NodeAuthHttpInterceptor)
    assert 'sign_message(self._private_key, timestamp.encode("ascii"))' in signing, CHANGED


def test_sigterm_is_flowers_once_its_loop_runs():
    assert "signal.signal(sig, graceful_exit_handler)" in source(signal_handler.register_signal_handlers), CHANGED
