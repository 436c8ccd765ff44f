"""The door that sites come through: the ten calls a SuperNode needs, for registered nodes, and nothing else.

Flower 1.41 serves three interfaces on one port. Control (submit a run, register a node) and Runtime (act as the
ServerApp) are not for sites, and Control has no authentication. So the whole application listens on a private socket,
and this gate, which wraps the same application, is all that the network sees. What it refuses:

    any path but the ten, any method but POST         404
    no length, or more than the call may have         411, 413
    a key that is not registered, a bad signature     401, before a byte of the body is read
    a registered key whose clock is off               401, and the answer says by how much
    a header that decides, given twice                400
    more calls at a time than a SuperNode makes       429
    a message that is no reply of the caller's own    403

A request for messages is held while there are none, so that idle sites cost next to nothing and a message still
reaches them at once.
"""

from __future__ import annotations

import asyncio
import binascii
import datetime
from base64 import b64decode
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakSet

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedseek_server.refusals import Refusals

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Bytes. An object is one of Flower's 5 MiB chunks and its header. A reply is announced with 68 bytes an object in a small
# call, so no site can announce more than 2.4 GiB for one request.
SMALL, OBJECT = 32 << 10, (5 << 20) + (64 << 10)
PULL_MESSAGES: Final = "/v1/fleet/pull-messages"
PUSH_MESSAGES: Final = "/v1/fleet/push-messages"
LIMITS: Final[Mapping[str, int]] = {
    "/v1/fleet/activate-node": SMALL,
    "/v1/fleet/deactivate-node": SMALL,
    "/v1/fleet/send-node-heartbeat": SMALL,
    PULL_MESSAGES: SMALL,
    PUSH_MESSAGES: SMALL,
    "/v1/fleet/get-run": SMALL,
    "/v1/fleet/get-fab": SMALL,
    "/v1/fleet/push-object": OBJECT,
    "/v1/fleet/pull-object": SMALL,
    "/v1/fleet/confirm-message-received": SMALL,
}
NEWS_PATH: Final = "/fedseek/news/"  # and a node's number; on the private socket only
KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER = "flwr-public-key", "flwr-timestamp", "flwr-signature"
DECIDING: Final = frozenset({"content-length", KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER})
TWICE: Final = ":twice"  # no header's name: a colon ends one
LONGEST_HEADER: Final = 2048  # bytes; a P-521 key in PEM and base64 has 360
AHEAD, BEHIND = 5.0, 305.0  # seconds that a site's clock may differ; Flower's own window
HOLD_SECONDS: Final = 20.0  # a SuperNode waits 30 s for an answer
AT_ONCE: Final = 12  # calls of one node; a SuperNode makes six: messages, heartbeat, two objects up, two down


class Doorbell:
    """Wakes the held request of a node when there is a message for it. Belongs to one event loop."""

    def __init__(self) -> None:
        self.closed = False
        self._rung: dict[int, asyncio.Event] = {}
        self._all: WeakSet[asyncio.Event] = WeakSet()

    def ring(self, node: int) -> None:
        """Wake this node's request, if one is held. If none is, its next one looks for messages before it waits."""
        if node in self._rung:
            self._rung[node].set()

    def close(self) -> None:
        """Have every held request answered now, and hold no other: the process is about to end."""
        self.closed = True
        for event in list(self._all):
            event.set()

    def listen(self, node: int) -> asyncio.Event:
        """Set from the next ring on. A node's earlier request hears it no more: its connection may be a dead one."""
        event = self._rung[node] = asyncio.Event()
        self._all.add(event)
        return event


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in."""

    status: int
    reason: str


NOBODY_WE_KNOW: Final = Refusal(401, "not a registered site")
NOT_YOURS: Final = Refusal(403, "not a reply of this site's")
TOO_MANY: Final = Refusal(429, f"more than {AT_ONCE} calls at a time")


def in_turn(app: Application, turn: asyncio.Semaphore) -> Application:
    """Let requests into the application in turn, each with its whole answer, which is sent when the next is in already.

    Every call of Flower's writes to its database. Let in together, they wait for the lock in naps of up to 0.1 s.
    """

    async def call(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        async with turn:
            await app(scope, receive, keep)
        for message in answer:
            await send(message)

    return call


def with_bell(app: Application, bell: Doorbell) -> Application:
    """The application on the private socket, with one more path: the driver rings for a node when a message is there."""

    async def call(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        node = scope.get("path", "").removeprefix(NEWS_PATH)
        if not (node.isascii() and node.isdigit()):
            await app(scope, receive, send)
            return
        bell.ring(int(node))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    return call


def fleet_gate(
    app: Application,
    node_of: Callable[[bytes], int | None],
    bell: Doorbell,
    *,
    is_own_reply: Callable[[int, bytes], bool],
    now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    hold: float = HOLD_SECONDS,
) -> Application:
    """The application as sites may see it.

    Args:
        app: the whole SuperLink.
        node_of: the number of the node that a public key, in PEM, belongs to; None if it is not registered now.
        bell: rung when there may be messages.
        is_own_reply: whether the body of a push-messages call is a reply of the node that sends it.
        now: the time.
        hold: how long a request for messages is held while there are none, in seconds.
    """
    under_way: Counter[int] = Counter()
    refusals = Refusals()

    async def refuse(scope: MutableMapping[str, Any], send: Send, refusal: Refusal) -> None:
        client = scope.get("client")
        refusals.note(client[0] if client else "somebody", refusal.reason)
        await _refuse(send, refusal)

    async def let_in(scope: MutableMapping[str, Any], receive: Receive, send: Send, node: int, length: int) -> None:
        body = await _read(receive, length)
        if body is None:
            return
        if scope["path"] == PUSH_MESSAGES and not is_own_reply(node, body):
            await refuse(scope, send, NOT_YOURS)
        elif scope["path"] == PULL_MESSAGES:
            await _answer_when_there_is_news(_Held(app, scope, body, node, bell, hold), receive, send)
        else:
            await app(scope, _replay(body, receive), send)

    async def gate(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = _headers(scope)
        sender: Refusal | int | None = check_call(scope["method"], scope["path"], headers)
        if sender is None:
            sender = await asyncio.to_thread(check_sender, headers, node_of, now())
        if not isinstance(sender, Refusal) and under_way[sender] >= AT_ONCE:
            sender = TOO_MANY
        if isinstance(sender, Refusal):
            await refuse(scope, send, sender)
            return
        under_way[sender] += 1
        try:
            await let_in(scope, receive, send, sender, int(headers["content-length"]))
        finally:
            under_way[sender] -= 1

    return gate


def check_call(method: str, path: str, headers: Mapping[str, str]) -> Refusal | None:
    """Is it one of the ten calls, and of bearable size?"""
    limit = LIMITS.get(path)
    if limit is None or method != "POST":
        return Refusal(404, "not found")
    if TWICE in headers:
        return Refusal(400, f"{headers[TWICE]} is given twice")
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
        return Refusal(411, "length required")
    if len(length) > 12 or int(length) > limit:
        return Refusal(413, f"more than {limit} bytes")
    return None


def check_sender(
    headers: Mapping[str, str], node_of: Callable[[bytes], int | None], now: datetime.datetime
) -> Refusal | int:
    """The registered node that signed it, lately. Flower checks again, and that the node is the one in the body."""
    try:
        key, signature = _decoded(headers[KEY_HEADER]), _decoded(headers[SIGNATURE_HEADER])
        stamp = headers[TIME_HEADER]
        node = node_of(key)
        if node is None:
            return NOBODY_WE_KNOW
        public_key = load_pem_public_key(key)
        if not isinstance(public_key, ec.EllipticCurvePublicKey):
            return NOBODY_WE_KNOW
        public_key.verify(signature, stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        behind = (now - datetime.datetime.fromisoformat(stamp)).total_seconds()
    except (KeyError, ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, binascii.Error):
        return NOBODY_WE_KNOW
    if -AHEAD < behind < BEHIND:
        return node
    direction = "behind" if behind > 0 else "ahead of"
    return Refusal(401, f"the site's clock is {abs(behind):.0f} s {direction} the coordinator's")


def _decoded(value: str) -> bytes:
    if len(value) > LONGEST_HEADER:
        raise ValueError("header too long")
    return b64decode(value, validate=True)


def _headers(scope: Mapping[str, Any]) -> dict[str, str]:
    """By name. If one that decides is there twice, its name is under ``TWICE``: Flower might go by the other."""
    headers: dict[str, str] = {}
    for raw_name, value in scope["headers"]:
        name = raw_name.decode("latin-1")
        if name in DECIDING and name in headers:
            headers[TWICE] = name
        headers[name] = value.decode("latin-1")
    return headers


async def _refuse(send: Send, refusal: Refusal) -> None:
    text = refusal.reason.encode()
    headers = [
        (b"content-type", b"text/plain"),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


async def _read(receive: Receive, length: int) -> bytes | None:
    """The body, of exactly the length announced; None if the sender left."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > length:
            return None
        if not message.get("more_body", False):
            return bytes(body) if len(body) == length else None


def _replay(body: bytes, receive: Receive) -> Receive:
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


@dataclass(frozen=True, slots=True)
class _Held:
    """A request for messages."""

    app: Application
    scope: MutableMapping[str, Any]
    body: bytes
    node: int
    bell: Doorbell
    seconds: float


async def _answer_when_there_is_news(held: _Held, receive: Receive, send: Send) -> None:
    """Ask the application; if its answer is empty, wait for the bell and ask once more.

    A message that the application has handed out is not handed out again, so nothing is asked for a site that left.
    """
    rung = held.bell.listen(held.node)
    left = asyncio.ensure_future(receive())
    waiting = asyncio.ensure_future(rung.wait())
    try:
        answer = await _ask(held, left)
        if _is_empty(answer) and not held.bell.closed:
            await asyncio.wait({waiting, left}, timeout=held.seconds, return_when=asyncio.FIRST_COMPLETED)
            if rung.is_set() and not left.done() and not held.bell.closed:
                answer = await _ask(held, left)
    finally:
        left.cancel()
        waiting.cancel()
    for message in answer:
        await send(message)


async def _ask(held: _Held, left: asyncio.Future[Message]) -> list[Message]:
    answer: list[Message] = []

    async def keep(message: Message) -> None:
        answer.append(message)

    async def until_left() -> Message:
        return await asyncio.shield(left)

    # the application writes into its scope, so each question gets its own copy
    scope = {**held.scope, "state": dict(held.scope.get("state", {}))}
    await held.app(scope, _replay(held.body, until_left), keep)
    return answer


def _is_empty(answer: list[Message]) -> bool:
    """A protobuf message with nothing in it is no bytes at all."""
    return answer[0].get("status") == 200 and not any(message.get("body") for message in answer[1:])
