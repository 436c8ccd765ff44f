"""The gate lets registered nodes make ten calls, and nobody anything else."""

import asyncio
import datetime
from base64 import b64encode

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from fedseek_server.fleet_gate import (
    AT_ONCE,
    LIMITS,
    OBJECT,
    PULL_MESSAGES,
    PUSH_MESSAGES,
    SMALL,
    Doorbell,
    Refusal,
    check_call,
    check_sender,
    fleet_gate,
    in_turn,
    with_bell,
)

NOW = datetime.datetime(2026, 11, 22, 12, 0, tzinfo=datetime.UTC)
NODE = 2**63 + 5
KEY = ec.generate_private_key(ec.SECP256R1())


def pem(key):
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signed(key=KEY, at=NOW, *, stamp=None, claim=None):
    stamp = at.isoformat() if stamp is None else stamp
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": b64encode(claim or pem(key)).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": b64encode(signature).decode(),
    }


def node_of(public_key):
    return NODE if public_key == pem(KEY) else None


class App:
    """Answers from a list; keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked, self.inside, self.most_inside = list(answers), [], 0, 0

    async def __call__(self, scope, receive, send):
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        body = (await receive()).get("body", b"")
        self.asked.append((scope["path"], body))
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.answers.pop(0) if self.answers else b"ok"})
        self.inside -= 1


async def ask(gate, path, headers, body=b"", *, method="POST", left=None, twice=()):
    sent, told = [], False

    async def receive():
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        await (left or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = {"content-length": str(len(body)), **headers}
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in [*headers.items(), *twice]]
    await gate({"type": "http", "method": method, "path": path, "headers": pairs, "state": {}}, receive, send)
    return (sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])) if sent else None


def gate_of(app, bell=None, **options):
    options = {"is_own_reply": lambda node, body: body != b"of another", "now": lambda: NOW, **options}
    return fleet_gate(app, node_of, bell or Doorbell(), **options)


@pytest.mark.parametrize("path", sorted(LIMITS))
def test_a_registered_node_makes_each_of_the_ten_calls(path):
    app = App(b"answer")
    assert asyncio.run(ask(gate_of(app), path, signed(), b"question")) == (200, b"answer")
    assert app.asked == [(path, b"question")]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/health",
        "/openapi.json",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/pull-messages/",
        "//v1/fleet/pull-messages",
        "/v1/fleet/Pull-Messages",
        "/fedseek/news/1",
    ],
)
def test_a_registered_node_makes_no_other_call(path):
    app = App()
    assert asyncio.run(ask(gate_of(app), path, signed()))[0] == 404
    assert not app.asked


@given(st.text(max_size=60))
def test_no_path_but_the_ten_passes(path):
    refusal = check_call("POST", path, {"content-length": "0"})
    assert (refusal is None) == (path in LIMITS)


def test_other_methods_are_not_found():
    for method in ("GET", "HEAD", "OPTIONS", "PUT", "CONNECT", "post"):
        assert check_call(method, PULL_MESSAGES, {"content-length": "0"}) == Refusal(404, "not found")


@pytest.mark.parametrize("length", ["", "-1", "1e3", "\u0661", " 5", "0x10"])
def test_a_call_of_no_length_is_refused(length):
    assert check_call("POST", PULL_MESSAGES, {"content-length": length}).status == 411


def test_a_body_in_chunks_is_refused_whatever_length_is_claimed():
    headers = {"content-length": "5", "transfer-encoding": "chunked"}
    assert check_call("POST", PULL_MESSAGES, headers).status == 411


def test_sizes_are_limited_by_call():
    assert check_call("POST", "/v1/fleet/push-object", {"content-length": str(OBJECT)}) is None
    for path, length in (("/v1/fleet/push-object", OBJECT + 1), (PULL_MESSAGES, SMALL + 1), (PULL_MESSAGES, 10**40)):
        assert check_call("POST", path, {"content-length": str(length)}).status == 413


def test_more_or_fewer_bytes_than_announced_never_reach_flower():
    app = App()
    for length in ("3", "9"):
        headers = {**signed(), "content-length": length}
        assert asyncio.run(ask(gate_of(app), PULL_MESSAGES, headers, b"12345")) is None
    assert not app.asked


STRANGER = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    "headers",
    [
        {},
        signed(STRANGER),
        signed(STRANGER, claim=pem(KEY)),
        {**signed(), "flwr-signature": "not base64"},
        {**signed(), "flwr-public-key": "A" * 4000},
        {**signed(), "flwr-timestamp": (NOW + datetime.timedelta(seconds=1)).isoformat()},
        {**signed(), "flwr-timestamp": "é"},
        signed(stamp="yesterday"),
        signed(stamp="2026-11-22T12:00:00"),
    ],
)
def test_a_stranger_is_told_nothing(headers):
    app = App()
    assert asyncio.run(ask(gate_of(app), PULL_MESSAGES, headers)) == (401, b"not a registered site")
    assert not app.asked


@pytest.mark.parametrize("name", ["content-length", "flwr-public-key", "flwr-timestamp", "flwr-signature"])
def test_a_header_that_decides_may_not_be_there_twice(name):
    app = App()
    twice = [(name, signed().get(name, "0"))]
    assert asyncio.run(ask(gate_of(app), PULL_MESSAGES, signed(), twice=twice))[0] == 400
    assert not app.asked


def test_only_replies_of_the_senders_own_are_passed_on():
    app = App()
    assert asyncio.run(ask(gate_of(app), PUSH_MESSAGES, signed(), b"of another"))[0] == 403
    assert not app.asked
    assert asyncio.run(ask(gate_of(app), PUSH_MESSAGES, signed(), b"my own"))[0] == 200


def test_a_node_has_so_many_calls_at_a_time_and_no_more():
    async def run():
        bell, app = Doorbell(), App(*[b""] * AT_ONCE)
        gate = gate_of(app, bell, hold=30)
        held = [asyncio.create_task(ask(gate, PULL_MESSAGES, signed())) for _ in range(AT_ONCE)]
        await asyncio.sleep(0.2)
        refused = await ask(gate, PULL_MESSAGES, signed())
        bell.close()
        answers = await asyncio.wait_for(asyncio.gather(*held), 5)
        again = await ask(gate_of(app), PUSH_MESSAGES, signed())
        return refused[0], {status for status, _ in answers}, again[0]

    assert asyncio.run(run()) == (429, {200}, 200)


def test_a_stranger_is_refused_before_his_body_is_read():
    async def receive():
        raise AssertionError("the body was read")

    async def run():
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": PULL_MESSAGES, "headers": [(b"content-length", b"9")]}
        await gate_of(App())(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(run()) == 401


def test_a_key_of_another_kind_is_no_node():
    other = ed25519.Ed25519PrivateKey.generate()
    headers = {**signed(), "flwr-public-key": b64encode(pem(other)).decode()}
    assert check_sender(headers, lambda key: NODE, NOW).status == 401


@pytest.mark.parametrize(("seconds", "text"), [(600, "600 s behind"), (-60, "60 s ahead of")])
def test_a_registered_site_learns_that_its_clock_is_off(seconds, text):
    headers = signed(at=NOW - datetime.timedelta(seconds=seconds))
    refusal = check_sender(headers, node_of, NOW)
    assert refusal.status == 401
    assert text in refusal.reason


@pytest.mark.parametrize("seconds", [-4, 0, 300])
def test_a_small_difference_of_clocks_is_borne(seconds):
    assert check_sender(signed(at=NOW - datetime.timedelta(seconds=seconds)), node_of, NOW) == NODE


def test_messages_are_waited_for():
    async def run():
        bell, app = Doorbell(), App(b"", b"a message")
        asked = asyncio.create_task(ask(gate_of(app, bell, hold=30), PULL_MESSAGES, signed(), b"me"))
        await asyncio.sleep(0.05)
        held = not asked.done()
        bell.ring(NODE + 1)
        await asyncio.sleep(0.05)
        still_held = not asked.done()
        bell.ring(NODE)
        return held, still_held, await asyncio.wait_for(asked, 5), app.asked

    held, still_held, answer, asked = asyncio.run(run())
    assert held
    assert still_held
    assert answer == (200, b"a message")
    assert asked == [(PULL_MESSAGES, b"me")] * 2


def test_a_ring_during_the_first_look_is_heard():
    async def run():
        bell = Doorbell()

        class Late(App):
            async def __call__(self, scope, receive, send):
                bell.ring(NODE)  # the message comes after the database was read
                await super().__call__(scope, receive, send)

        return await asyncio.wait_for(ask(gate_of(Late(b"", b"news"), bell, hold=30), PULL_MESSAGES, signed()), 5)

    assert asyncio.run(run()) == (200, b"news")


def test_an_empty_answer_comes_when_the_wait_is_over_or_the_process_ends():
    async def run():
        bell = Doorbell()
        waited = await asyncio.wait_for(ask(gate_of(App(b""), bell, hold=0.05), PULL_MESSAGES, signed()), 5)
        asked = asyncio.create_task(ask(gate_of(App(b"", b"x"), bell, hold=30), PULL_MESSAGES, signed()))
        await asyncio.sleep(0.05)
        bell.close()
        return waited, await asyncio.wait_for(asked, 5)

    assert asyncio.run(run()) == ((200, b""), (200, b""))


def test_no_message_is_taken_for_a_site_that_left():
    async def run():
        bell, app, left = Doorbell(), App(b"", b"a message"), asyncio.Event()
        asked = asyncio.create_task(ask(gate_of(app, bell, hold=30), PULL_MESSAGES, signed(), left=left))
        await asyncio.sleep(0.05)
        left.set()
        await asyncio.sleep(0.05)
        bell.ring(NODE)
        await asyncio.wait_for(asked, 5)
        return len(app.asked)

    assert asyncio.run(run()) == 1


def test_the_driver_rings_on_the_private_socket():
    async def run():
        bell, app = Doorbell(), App()
        inside = with_bell(app, bell)
        event = bell.listen(NODE)
        rung = await ask(inside, f"/fedseek/news/{NODE}", {})
        other = await ask(inside, "/fedseek/news/x", {})
        return rung[0], event.is_set(), other[0], len(app.asked)

    assert asyncio.run(run()) == (204, True, 200, 1)


def test_requests_enter_flower_in_turn_and_a_slow_reader_holds_nobody_up():
    async def run():
        app = App()
        turn = in_turn(app, asyncio.Semaphore(1))
        never = asyncio.Event()

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def slow(message):
            await never.wait()

        scope = {"type": "http", "path": "/slow"}
        stuck = asyncio.create_task(turn(scope, receive, slow))
        answers = await asyncio.wait_for(asyncio.gather(*(ask(turn, "/x", {}) for _ in range(5))), 5)
        stuck.cancel()
        return app.most_inside, answers

    assert asyncio.run(run()) == (1, [(200, b"ok")] * 5)
