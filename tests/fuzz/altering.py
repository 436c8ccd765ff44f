"""A way in for bytes of a stranger, what may come of them, and how such bytes are made out of valid ones."""

from __future__ import annotations

import copy
import gc
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedseek.errors import FedseekError, InvalidConfig, InvalidPlan

MAX_CPU_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """One way in.

    Attributes:
        read: takes the bytes of a stranger.
        valid: inputs it takes, to be altered.
        document: whether inputs are JSON, and altered as such too.
        native: whether the bytes reach C++ that may end the process: to be read in a child process.
        max_cpu: seconds of CPU an input may cost.
    """

    read: Callable[[bytes], object]
    valid: Sequence[bytes]
    document: bool = False
    native: bool = False
    max_cpu: float = MAX_CPU_SECONDS


class Finding(AssertionError):
    """A target did something else than to take its input or to refuse it."""


def outcome(target: Target, data: bytes) -> str:
    """ "taken", or the class of the refusal and what kind of text it has.

    Raises:
        Finding: another exception, or too slow.
    """
    # A full collection walks everything the process ever imported: 0.3 s with torch and Flower loaded, more after some
    # thousand tests, and charged to whichever input it falls on. It belongs to the process, so it waits.
    gc.disable()
    started = time.process_time()
    try:
        target.read(data)
        told = "taken"
    except FedseekError as error:
        told = f"{error.code}: {shape_of(error)}"
    except Exception as error:
        raise Finding(f"{error!r} from {data[:200]!r} ({len(data)} bytes)") from error
    finally:
        seconds = time.process_time() - started
        gc.enable()
    if seconds > target.max_cpu:
        raise Finding(f"{seconds:.1f} s of CPU for {data[:200]!r} ({len(data)} bytes)")
    return told


def shape_of(error: FedseekError) -> str:
    """The text of an error without the values it quotes, so that two inputs refused by one rule look alike."""
    text = error.problems[0] if isinstance(error, InvalidPlan | InvalidConfig) else error.message
    words = [word for word in text.split() if word.isascii() and word.isalpha()]
    return " ".join(words)[:120]


# Altering


def mutate(rng: random.Random, target: Target) -> bytes:
    """A valid input with one to four things done to it; now and then bytes out of nothing."""
    if rng.random() < 0.03:
        return rng.randbytes(rng.randrange(200))
    data = rng.choice(target.valid)
    if target.document and rng.random() < 0.7:
        return mutate_json(rng, data)
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(MUTATIONS)(rng, data, target)
    return data


def flip_bits(rng: random.Random, data: bytes, _target: Target) -> bytes:
    altered = bytearray(data)
    for _ in range(rng.randint(1, 8) if altered else 0):
        altered[place(rng, altered)] ^= 1 << rng.randrange(8)
    return bytes(altered)


def place(rng: random.Random, data: bytes | bytearray) -> int:
    """Where to alter: half of the time near the front, where lengths and types are."""
    return rng.randrange(min(len(data), 64) if rng.random() < 0.5 else len(data))


def cut(rng: random.Random, data: bytes, _target: Target) -> bytes:
    if not data:
        return data
    start = place(rng, data)
    return data[:start] if rng.random() < 0.5 else data[:start] + data[start + rng.randint(1, 32) :]


def splice(rng: random.Random, data: bytes, target: Target) -> bytes:
    other = rng.choice(target.valid)
    start, end = sorted((rng.randrange(len(other) + 1), rng.randrange(len(other) + 1)))
    at = rng.randrange(len(data) + 1)
    return data[:at] + other[start:end] + data[at if rng.random() < 0.5 else at + end - start :]


def insert(rng: random.Random, data: bytes, _target: Target) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TELLING) + data[at if rng.random() < 0.5 else at + 1 :]


def nest(rng: random.Random, data: bytes, _target: Target) -> bytes:
    """Deep nesting, which has ended many a parser."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([b"\x91", b"\x81\xa1a", b"[", b'{"a":']) * rng.choice([10, 1000, 20_000]) + data[at:]


# MessagePack heads and lengths, numbers at an edge, broken UTF-8, JSON that parsers disagree about
TELLING = (
    b"\xc0", b"\xc1", b"\xc2", b"\xc3", b"\xc4\xff", b"\xc6\xff\xff\xff\xff", b"\xc7\x04\x01", b"\xcb\x7f\xf8" + bytes(6),
    b"\xcc\x01", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7), b"\xd6\xff" + bytes(4), b"\xd9\xff", b"\xdb\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xff", b"\xa4\xff\xfe\xfd\xfc", b"\xa3\xed\xa0\x80", bytes(64),
    b"NaN", b"1e999", b"-0", b"\\ud800", b'"', b"null", b"\x00",
)  # fmt: skip
MUTATIONS = (flip_bits, flip_bits, cut, splice, insert, insert, nest)

ODD_VALUES: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 24, 50, 1023, 1024, 1025, 2**31, 2**53, 2**63, 2**64, 10**30, 0.0, -0.0, 1e-300, 1e308, 0.5, 1e-3,
    0.999999, True, False, None, "", "a", "\u0000", "\u202e", "e\u0301", "行" * 300, [], {}, [[]], {"a": 1}, "dp-sgd", "auc",
    "none", 8.0, 100_000, 10_000,
)  # fmt: skip


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """A document with some of its values replaced, in canonical form again: it gets past the first check."""
    document = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        inner = document
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(inner[key], dict | list) and rng.random() < 0.8:
                inner = inner[key]
                continue
            if rng.random() < 0.1 and isinstance(inner, dict):
                del inner[key]
            else:
                inner[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            break
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
