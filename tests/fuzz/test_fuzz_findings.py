"""What fuzzing found, each as small as it gets. An expected failure is not mended yet; mended, it says so itself."""

import faulthandler
import json
import os
import resource
import signal

import msgspec
import pytest
from fuzz_targets import targets
from seal_inputs import COEFFICIENTS, SEAL_HEADER, SEED, SIZES, framed, inflated

from fedseek.errors import FedseekError, Malformed
from fedseek.he.sealfile import open_frame
from fedseek.plan import plan_from_canonical

POLYNOMIALS = 33  # where a ciphertext says how many it has


def in_a_child(read, *, cpu_seconds):
    """How a child ends that reads something: "taken", the code of a refusal, a foreign error, or a signal."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()  # pytest's would print where the child ended
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                read()
                told = "taken"
            except FedseekError as error:
                told = error.code
            except Exception as error:  # noqa: BLE001
                told = repr(error)
            os.write(send, told.encode())
        finally:
            os._exit(0)
    os.close(send)
    told = os.read(receive, 1000).decode()
    os.close(receive)
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else told


def content_of(form):
    return bytearray(targets()[f"load_{form}_inside"].valid[0])


def load(form, content):
    whole = framed(bytes(content), SIZES[form], targets()[f"load_{form}"].valid[0][4])
    return in_a_child(lambda: targets()[f"load_{form}"].read(whole), cpu_seconds=20)


def test_a_ciphertext_of_no_polynomials_is_malformed():
    """SEAL raised an IndexError while it expanded the seed; ``load_object`` let it through."""
    content = content_of("fresh")
    assert content[POLYNOMIALS : POLYNOMIALS + 8] == (2).to_bytes(8, "little")
    content[POLYNOMIALS : POLYNOMIALS + 8] = bytes(8)
    with pytest.raises(Malformed, match="poly_index"):
        targets()["load_fresh_inside"].read(bytes(content))


NESTED = [("fresh", COEFFICIENTS["fresh"]), ("fresh", SEED), ("summed", COEFFICIENTS["summed"])]


@pytest.mark.parametrize(("form", "at"), NESTED)
def test_a_nested_header_that_says_too_much_is_malformed(form, at):
    """One header inside the content says: compressed, and one byte more than there is."""
    content = content_of(form)
    *_, announced = SEAL_HEADER.unpack_from(content, at)
    assert load(form, content) == "taken"
    SEAL_HEADER.pack_into(content, at, 0xA15E, 16, 4, 3, 2, 0, SIZES[form] - at + 1)
    assert announced <= SIZES[form] - at
    assert load(form, content) == "Malformed"
    with pytest.raises(Malformed, match=f"compression 2 at byte {at};"):  # by our check, before SEAL sees it
        targets()[f"load_{form}_inside"].read(bytes(content))


def test_a_nested_header_of_a_secret_key_that_says_too_much_is_malformed():
    """The same in a group key: its maker can seal any bytes to every other site."""
    target = targets()["open_group_key_inside"]
    made_at, key = msgspec.msgpack.decode(target.valid[0])
    size, at = SIZES["secret key"], COEFFICIENTS["secret key"]
    content = bytearray(inflated(key, size))
    assert in_a_child(lambda: target.read(sealed_key(made_at, content, key[4])), cpu_seconds=20) == "taken"
    SEAL_HEADER.pack_into(content, at, 0xA15E, 16, 4, 3, 2, 0, size - at + 1)
    altered = sealed_key(made_at, content, key[4])
    assert in_a_child(lambda: target.read(altered), cpu_seconds=20) == "Malformed"
    with pytest.raises(Malformed, match=f"compression 2 at byte {at};"):
        target.read(altered)


def sealed_key(made_at, content, minor):
    return msgspec.msgpack.encode([made_at, framed(bytes(content), SIZES["secret key"], minor)])


def test_a_zstd_block_that_ends_too_early_is_malformed():
    """The frame announces the right size; its one block has fewer bytes, stored as literals (RFC 8878, 3.1.1.3.1.1)."""
    content = bytes(content_of("fresh"))[: SEED + 8]
    literals = (len(content) << 4 | 0b1100).to_bytes(3, "little") + content
    block = literals + b"\0"  # no sequences
    frame = b"\x28\xb5\x2f\xfd\xa0" + SIZES["fresh"].to_bytes(4, "little")
    frame += (len(block) << 3 | 0b101).to_bytes(3, "little") + block
    minor = targets()["load_fresh"].valid[0][4]
    whole = SEAL_HEADER.pack(0xA15E, 16, 4, minor, 2, 0, 16 + len(frame)) + frame
    with pytest.raises(Malformed, match="does not inflate"):
        open_frame(whole, content_size=SIZES["fresh"], inner={})
    assert in_a_child(lambda: targets()["load_fresh"].read(whole), cpu_seconds=20) == "Malformed"


def private_plan(**numbers):
    document = json.loads(targets()["plan_from_canonical"].valid[1])
    for table in ("privacy", "training"):
        document[table].update({key: value for key, value in numbers.items() if key in document[table]})
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "numbers",
    [
        {"epsilon": 8.0, "delta": 0.999999, "sampling_probability": 0.5},
        {"epsilon": 0.001, "delta": 0.5, "sampling_probability": 0.001},
        {"epsilon": 8.0, "delta": 0.0101, "sampling_probability": 0.5},
    ],
    ids=["delta near 1", "tiny epsilon", "just above the bound"],
)
def test_a_plan_whose_numbers_promise_nothing_is_refused_at_once(numbers):
    """The accountant worked on the first two for minutes and took gigabytes."""
    data = private_plan(**numbers)
    assert in_a_child(lambda: plan_from_canonical(data), cpu_seconds=2) == "InvalidPlan"


@pytest.mark.parametrize(
    "numbers",
    [
        {"epsilon": 8.0, "delta": 0.01, "sampling_probability": 0.5},
        {"epsilon": 0.001, "delta": 0.01, "sampling_probability": 0.5},
        pytest.param({"epsilon": 50.0, "delta": 0.01, "rounds": 1, "steps_per_round": 1}, marks=pytest.mark.slow),
    ],
    ids=["largest delta", "tiny epsilon", "little noise"],
)
def test_a_plan_at_the_largest_delta_is_decided_soon(numbers):
    """Measured: 1.6, 0.5 and 10 s of CPU."""
    data = private_plan(**numbers)
    assert in_a_child(lambda: plan_from_canonical(data), cpu_seconds=40) in {"taken", "InvalidPlan"}


# delta is above 1 - (1 - q)^steps, the chance that a unit is in any of the 8 steps: without any noise the plan keeps its
# epsilon. The calibration looks for ever less noise, and the accountant's tables grow as the noise shrinks.
def test_a_plan_whose_delta_covers_every_sample_is_decided_soon():
    data = private_plan(epsilon=0.001, delta=0.01, sampling_probability=0.001)
    assert in_a_child(lambda: plan_from_canonical(data), cpu_seconds=5) in {"taken", "InvalidPlan"}
