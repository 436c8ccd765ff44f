"""Many altered inputs in a row, in a child process: an abort in C++ is then a finding and not the end of the run.

Input number i of a target is a function of (seed, target, i) alone, so a parent knows which input ended its child.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from altering import Finding, Target, mutate, outcome
from fuzz_targets import targets

ALLOWED_CPU_SECONDS = 60  # of one input, before the child is ended


@dataclass(frozen=True, slots=True)
class Batch:
    """What a child did.

    Attributes:
        done: inputs read, from the first number on.
        outcomes: what came of them: how often, and the number of the smallest such input.
        finding: what ended it early, if something did.
    """

    done: int
    outcomes: dict[str, tuple[int, int]]
    finding: str | None


def numbered_input(name: str, seed: str, number: int) -> bytes:
    """Input ``number`` of a target."""
    return mutate(random.Random(f"{seed}/{name}/{number}"), targets()[name])


def run_batch(name: str, seed: str, first: int, *, count: int, seconds: float) -> Batch:
    """Read up to ``count`` inputs from number ``first`` on, for at most about ``seconds``, in a child process."""
    targets()  # made once, before the fork
    reached = mmap.mmap(-1, 8)
    receive, send = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _child(name, seed, range(first, first + count), seconds, reached, send)
    os.close(send)
    told = b"".join(_read(receive))
    _, status = os.waitpid(child, 0)
    number = int.from_bytes(reached[:8], "little")
    if os.WIFSIGNALED(status):
        what = f"{name}: input {number} of seed {seed!r} ended the process: {signal.Signals(os.WTERMSIG(status)).name}"
        return Batch(number - first + 1, {}, what)
    if not told.startswith(b"{"):
        raise RuntimeError(f"{name}, seed {seed!r}, input {number}: {told.decode()}")
    document = json.loads(told)
    return Batch(
        document["done"], {key: tuple(value) for key, value in document["outcomes"].items()}, document["found"]
    )


def _read(descriptor: int) -> Iterator[bytes]:
    with os.fdopen(descriptor, "rb") as stream:
        while piece := stream.read(1 << 16):
            yield piece


def _child(name: str, seed: str, numbers: range, seconds: float, reached: mmap.mmap, send: int) -> None:
    """Never returns: whatever happens, nothing of the parent's program goes on in here."""
    try:
        faulthandler.disable()  # pytest's would print where the child ended
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 2)  # what C++ says when it aborts; the parent tells it better
        try:
            document = json.dumps(_read_inputs(name, targets()[name], seed, numbers, seconds, reached))
        except Exception:  # noqa: BLE001  of this program, not of a target
            document = traceback.format_exc()
        with os.fdopen(send, "wb") as stream:
            stream.write(document.encode())
        os._exit(0)
    finally:
        os._exit(70)


def _read_inputs(
    name: str, target: Target, seed: str, numbers: range, seconds: float, reached: mmap.mmap
) -> dict[str, object]:
    outcomes: dict[str, tuple[int, int]] = {}
    sizes: dict[str, int] = {}
    started, done = time.monotonic(), 0
    for number in numbers:
        reached[:8] = number.to_bytes(8, "little")
        data = numbered_input(name, seed, number)
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + ALLOWED_CPU_SECONDS, resource.RLIM_INFINITY))
        done += 1
        try:
            told = outcome(target, data)
        except Finding as finding:
            text = f"{name}: input {number} of seed {seed!r}: {finding}"
            return {"done": done, "outcomes": outcomes, "found": text}
        often, smallest = outcomes.get(told, (0, number))
        if len(data) < sizes.get(told, 1 << 62):
            sizes[told], smallest = len(data), number
        outcomes[told] = (often + 1, smallest)
        if time.monotonic() - started > seconds:
            break
    return {"done": done, "outcomes": outcomes, "found": None}
