"""The Flower side of the coordinator: one ``ServerApp`` that carries messages and knows nothing of their content.

The only file of this package that touches Flower. Ciphertexts travel as uint8 arrays, which Flower cuts into chunks;
requests are pushed and replies pulled one at a time, so one update at most is in memory beside the running sum.

A node that fails, or does not answer in time, is missing from the exchange; what comes of that is the coordinator's
business. A reply that comes later is never pulled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedseek.errors import CohortTooSmall, CustodyError, Malformed, MessageError
from fedseek_server.coordinator import Coordinator
from fedseek_server.exchange import Exchange

MESSAGE_TYPES: Final = {
    "plan": "query.plan",
    "key": "query.key",
    "shares": "query.shares",
    "round": "train.round",
    "unmask": "evaluate.unmask",
    "close": "evaluate.close",
    "release": "query.release",
}
RECORD, FIELD = "fedseek", "message"
POLL_SECONDS = 0.05
CONNECT_SECONDS = 120.0

_log = logging.getLogger(__name__)


def build_server_app(
    coordinator: Coordinator,
    finish: Callable[[Coordinator], None],
    *,
    timeout: float | None = None,
    connect_timeout: float = CONNECT_SECONDS,
) -> ServerApp:
    """A ``ServerApp`` that plays one run and calls ``finish`` at its end.

    Args:
        coordinator: of the run.
        finish: is given the coordinator when all exchanges are over.
        timeout: how long an exchange waits for its slowest node, in seconds; None: for ever.
        connect_timeout: how long to wait at the start for every site of the roster, in seconds.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        cohort = coordinator.plan.spec.cohort
        sites = len(coordinator.roster.entries)
        wait_for_nodes(grid, sites, at_least=cohort.min_sites, timeout=connect_timeout)
        for exchange in coordinator.play(lambda: sorted(grid.get_node_ids())):
            time.sleep(exchange.pause_seconds)
            for node, content in deliver(grid, exchange, timeout=timeout):
                take(coordinator, node, content)
        finish(coordinator)

    return app


def wait_for_nodes(
    grid: Grid, wanted: int, *, at_least: int | None = None, timeout: float = CONNECT_SECONDS
) -> list[int]:
    """Node ids, once ``wanted`` of them are connected, or after ``timeout`` seconds if ``at_least`` so many are.

    Raises:
        CohortTooSmall: fewer are. ``at_least`` is ``wanted`` unless given.
    """
    deadline = time.monotonic() + timeout
    floor = wanted if at_least is None else at_least
    while len(nodes := sorted(grid.get_node_ids())) < wanted:
        if time.monotonic() > deadline:
            if len(nodes) >= floor:
                break
            raise CohortTooSmall(f"{len(nodes)} nodes connected after {timeout:.0f} s, wanted {floor}")
        time.sleep(POLL_SECONDS)
    return nodes


def take(coordinator: Coordinator, node: int, content: RecordDict) -> None:
    """Hand a reply to the coordinator; one that it refuses is recorded and counts as none.

    Raises:
        FedseekError: a reply that ends the run, such as a site's refusal.
    """
    try:
        coordinator.receive(node, from_record(content))
    except (MessageError, CustodyError) as error:
        coordinator.reject(node, error)


def deliver(grid: Grid, exchange: Exchange, *, timeout: float | None = None) -> Iterator[tuple[int, RecordDict]]:
    """Send an exchange's requests; yield (node, reply) as replies come, one at a time.

    A node whose request cannot be sent, that fails, or that has not answered after ``timeout`` seconds is left out.
    Flower's error text may quote the site, so only its code is logged.
    """
    waiting = {message_id: node for node in exchange.requests if (message_id := _push(grid, exchange, node))}
    deadline = None if timeout is None else time.monotonic() + timeout
    while waiting:
        is_last_look = deadline is not None and time.monotonic() > deadline
        for message_id, node in list(waiting.items()):
            for reply in grid.pull_messages([message_id]):
                del waiting[message_id]
                if reply.has_error():
                    _log.warning("%s: node %d failed with Flower error %d", exchange.phase, node, reply.error.code)
                else:
                    yield node, reply.content
        if is_last_look:
            break
        time.sleep(POLL_SECONDS)


def _push(grid: Grid, exchange: Exchange, node: int) -> str | None:
    """Send one request; its message id, or None if Flower does not take it: the node has just gone."""
    message = Message(
        content=to_record(exchange.requests[node]),
        dst_node_id=node,
        message_type=MESSAGE_TYPES[exchange.phase],
        group_id=str(exchange.round),
    )
    message_id = next(iter(grid.push_messages([message])), None)
    if not message_id:
        _log.warning("%s: the request to node %d could not be sent", exchange.phase, node)
    return message_id


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
