"""The Flower side of the coordinator: one ``ServerApp`` that carries messages and knows nothing of their content.

The only file of this package that touches Flower. Ciphertexts travel as uint8 arrays, which Flower cuts into chunks;
replies are pulled one at a time, so one update at most is in memory beside the running sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedseek.errors import CohortTooSmall, Malformed
from fedseek_server.coordinator import Coordinator, Exchange

MESSAGE_TYPES = {
    "plan": "query.plan",
    "key": "query.key",
    "round": "train.round",
    "close": "evaluate.close",
    "release": "query.release",
}
RECORD, FIELD = "fedseek", "message"
POLL_SECONDS = 0.05


def build_server_app(coordinator: Coordinator, finish: Callable[[Coordinator], None]) -> ServerApp:
    """A ``ServerApp`` that plays one run and calls ``finish`` when every site has approved the release."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = wait_for_nodes(grid, len(coordinator.roster.entries))
        for exchange in coordinator.play(nodes):
            for node, reply in deliver(grid, exchange):
                coordinator.receive(node, reply)
        finish(coordinator)

    return app


def wait_for_nodes(grid: Grid, wanted: int, *, timeout: float = 120.0) -> list[int]:
    """Node ids, once ``wanted`` of them are connected.

    Raises:
        CohortTooSmall: not within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while len(nodes := sorted(grid.get_node_ids())) < wanted:
        if time.monotonic() > deadline:
            raise CohortTooSmall(f"{len(nodes)} nodes connected after {timeout:.0f} s, wanted {wanted}")
        time.sleep(POLL_SECONDS)
    return nodes


def deliver(grid: Grid, exchange: Exchange) -> Iterator[tuple[int, bytes]]:
    """Send an exchange's requests; yield (node, reply) as replies come, one at a time.

    Raises:
        CohortTooSmall: a node failed. Flower's error text may quote the site, so only its code is repeated.
    """
    messages = [
        Message(
            content=to_record(data),
            dst_node_id=node,
            message_type=MESSAGE_TYPES[exchange.phase],
            group_id=str(exchange.round),
        )
        for node, data in exchange.requests.items()
    ]
    waiting = dict(zip(grid.push_messages(messages), exchange.requests, strict=True))
    while waiting:
        for message_id, node in list(waiting.items()):
            for reply in grid.pull_messages([message_id]):
                del waiting[message_id]
                if reply.has_error():
                    raise CohortTooSmall(f"{exchange.phase}: node {node} failed with Flower error {reply.error.code}")
                yield node, from_record(reply.content)
        time.sleep(POLL_SECONDS)


def to_record(data: bytes) -> RecordDict:
    """Wrap bytes as a uint8 array: bytes in a ConfigRecord break above some tens of MB."""
    return RecordDict({RECORD: ArrayRecord({FIELD: Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)})})


def from_record(content: RecordDict) -> bytes:
    """Unwrap what :func:`to_record` wrapped.

    Raises:
        Malformed: anything else.
    """
    record = content.get(RECORD)
    if not isinstance(record, ArrayRecord) or list(record) != [FIELD] or len(content) != 1:
        raise Malformed(f"Flower message: got records {sorted(content)}, wanted one array record {RECORD!r}")
    array = record[FIELD]
    if array.dtype != "uint8" or array.stype != "raw" or array.shape != (len(array.data),):
        raise Malformed(
            f"Flower message: got {array.dtype} {array.stype} of shape {array.shape}, wanted raw uint8 bytes"
        )
    return array.data
