"""Flower's SuperLink for the process that hosts it (superlink.py): flwr 1.41.0, pinned, its internals under test.

The driver's side of it is flower.py, which runs in another process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    from fastapi import FastAPI

KEEP_SECONDS: Final = 2.0
DEEPEST: Final = 5  # objects in one another: message, record dictionary, array record, array, chunk


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


def node_lookup(app: FastAPI, *, keep: float = KEEP_SECONDS) -> Callable[[bytes], int | None]:
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


def is_own_reply(node: int, body: bytes) -> bool:
    """Whether the body of a push-messages call is one reply of this node's to the coordinator.

    Flower 1.41 checks who calls, but takes the sender named inside at its word: a site could answer for another, and,
    under the SuperLink's own number, even send a request to another site.
    """
    asked = PushMessagesRequest()
    try:
        asked.ParseFromString(body)
    except DecodeError:
        return False
    if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
        return False
    metadata, tree = asked.messages_list[0].metadata, asked.message_object_trees[0]
    return (
        (metadata.src_node_id, metadata.dst_node_id) == (node, SUPERLINK_NODE_ID)
        and bool(metadata.reply_to_message_id)
        and metadata.message_id == tree.object_id
        and _is_tree(tree)
    )


def _is_tree(tree: ObjectTree, above: tuple[str, ...] = ()) -> bool:
    """Flower follows an object's children as they are named; in a ring it would never end."""
    if len(above) == DEEPEST or tree.object_id in above:
        return False
    return all(_is_tree(child, (*above, tree.object_id)) for child in tree.children)
