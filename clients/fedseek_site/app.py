"""The Flower side of a site: one ``ClientApp`` that hands each message to the site service and knows nothing else.

The only file of this package that touches Flower. It runs in the courier process, which owns neither data nor keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedseek.errors import Malformed

RECORD, FIELD = "fedseek", "message"
Deliver = Callable[[Mapping[str, Any], bytes], bytes]


def build_client_app(deliver: Deliver) -> ClientApp:
    """A ``ClientApp`` that answers every message with ``deliver(node_config, request bytes)``."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        reply = deliver(context.node_config, from_record(message.content))
        return Message(to_record(reply), reply_to=message)

    for action in ("plan", "key", "shares", "release"):
        app.query(action)(answer)
    app.train("round")(answer)
    for action in ("close", "unmask"):
        app.evaluate(action)(answer)
    return app


def to_record(data: bytes) -> RecordDict:
    """Wrap bytes as a uint8 array: bytes in a ConfigRecord break above some tens of MB."""
    return RecordDict({RECORD: ArrayRecord({FIELD: Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)})})


def from_record(content: RecordDict) -> bytes:
    """Unwrap what the coordinator's side wrapped.

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
