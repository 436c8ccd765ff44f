"""Measure the whole secure sum: encode, encrypt, add blind, decrypt, decode; with the library's own code.

Seconds are CPU seconds of one thread, so that other work on the machine does not show in them.

The coordinator's half runs in a process of its own that is fed one serialised update at a time, so that its memory
can be compared between small and large cohorts.

Example:
    python benchmarks/secure_aggregation.py --values 2200000 --sites 8 --bits 13
    python benchmarks/secure_aggregation.py --values 2200000 --sites 4 --max-sites 64 --bits 8 --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from fedseek.aggregate import Aggregate, agg_finish, agg_init, agg_update
from fedseek.encode import UpdateLayout, decode_sum, encode_update, num_ciphertexts, num_slots, quantiser_bound
from fedseek.he.ciphertext import ScopedCiphertexts, ScopedSum
from fedseek.he.packing import Packing, choose_packing

if TYPE_CHECKING:
    from fedseek.he.keys import SecretKey

VALUE_RANGE = 0.01
WEIGHT_CAP = 10_000
METRICS = {"loss": 1.25, "examples": 512.0}


def peak_rss_mb() -> float:
    """Peak memory of this process alone; ru_maxrss would also count what a parent had when it started us."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fold(aggregate: Aggregate, message: bytes) -> float:
    """Add one serialised update; returns seconds."""
    started = time.process_time()
    agg_update(aggregate, msgspec.msgpack.decode(message, type=tuple[ScopedCiphertexts, ...]))
    return time.process_time() - started


def run_coordinator(pipe: Connection, packing: Packing, expected: dict[str, int]) -> None:
    """The coordinator's process: fold each update as it arrives, then send the sum, the times and the peak memory."""
    aggregate = agg_init(packing.params, expected, max_sites=packing.max_sites)
    seconds = []
    while path := pipe.recv():
        seconds.append(fold(aggregate, Path(path).read_bytes()))
        pipe.send("next")
    started = time.process_time()
    finished = agg_finish(aggregate, min_sites=1)
    report = {"seconds": seconds, "finish_s": time.process_time() - started, "rss_mb": peak_rss_mb()}
    pipe.send_bytes(msgspec.msgpack.encode(finished))
    pipe.send_bytes(msgspec.msgpack.encode(report))


@dataclass(slots=True)
class Sites:
    """What all sites together sent, kept in the clear to check the encrypted path against."""

    integer_sum: np.ndarray
    weighted_sum: np.ndarray
    plain_sum: np.ndarray
    weight: int = 0
    up_bytes: int = 0
    encode_s: list[float] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)


def play_site(
    sites: Sites, rng: np.random.Generator, *, key: SecretKey, layout: UpdateLayout, packing: Packing
) -> bytes:
    """One site's turn: make an update, encode and encrypt it; returns the message."""
    from fedseek.encrypt import encrypt_update  # here, so that the coordinator's process never imports it

    vector = rng.standard_normal(layout.num_values, dtype=np.float32) * np.float32(VALUE_RANGE / 6)
    weight = int(rng.integers(1, WEIGHT_CAP, endpoint=True))
    started = time.process_time()
    slots = encode_update(
        vector,
        layout,
        packing=packing,
        value_range=VALUE_RANGE,
        weight=weight,
        weight_cap=WEIGHT_CAP,
        metrics=METRICS,
    )
    update = encrypt_update(key, {layout.scope: slots})
    sites.encode_s.append(time.process_time() - started)
    message = msgspec.msgpack.encode(update)

    started = time.process_time()
    sites.plain_sum += vector
    sites.plain_s.append(time.process_time() - started)
    sites.integer_sum += slots
    sites.weighted_sum += vector.astype(np.float64) * weight
    sites.weight += weight
    sites.up_bytes = max(sites.up_bytes, len(message))
    return message


def check_sum(
    answer: bytes, sites: Sites, *, key: SecretKey, layout: UpdateLayout, packing: Packing
) -> dict[str, object]:
    """Decrypt the sum as a site does, and compare it with the sum of the integers."""
    from fedseek.he.keys import decrypt_slots

    started = time.process_time()
    (scoped,) = msgspec.msgpack.decode(answer, type=tuple[ScopedSum, ...])
    decrypted = decrypt_slots(key, scoped.ciphertexts)
    summed = decode_sum(decrypted, layout, packing=packing, value_range=VALUE_RANGE, weight_cap=WEIGHT_CAP)
    seconds = time.process_time() - started
    bound = quantiser_bound(
        packing,
        value_range=VALUE_RANGE,
        contributors=summed.contributors,
        weight=sites.weight,
        weight_cap=WEIGHT_CAP,
    )
    error = float(np.abs(summed.mean - sites.weighted_sum / sites.weight).max())
    equal = bool((decrypted[: sites.integer_sum.size] == sites.integer_sum).all())
    return {
        "decrypt_decode_s": round(seconds, 4),
        "exact": equal and summed.weight == sites.weight,
        "max_error": error,
        "quantiser_bound": bound,
        "within_bound": error <= bound,
    }


def measure(num_values: int, num_sites: int, *, value_bits: int, max_sites: int) -> dict[str, object]:
    packing = choose_packing(value_bits, max_sites)
    layout = UpdateLayout("global", (("lora_B", (num_values,)),), tuple(METRICS))
    expected = {layout.scope: num_ciphertexts(layout, packing)}
    near, far = multiprocessing.Pipe()
    coordinator = multiprocessing.get_context("spawn").Process(target=run_coordinator, args=(far, packing, expected))
    coordinator.start()
    from fedseek.he.keys import SecretKey

    key = SecretKey.generate(packing.params)
    rng = np.random.default_rng(20260801)
    sites = Sites(
        integer_sum=np.zeros(num_slots(layout, packing), dtype=np.uint64),
        weighted_sum=np.zeros(num_values, dtype=np.float64),
        plain_sum=np.zeros(num_values, dtype=np.float32),
    )
    with tempfile.TemporaryDirectory() as directory:  # a pipe would put its own buffers into the coordinator's memory
        for _ in range(num_sites):
            path = Path(directory, "update.msgpack")
            path.write_bytes(play_site(sites, rng, key=key, layout=layout, packing=packing))
            near.send(str(path))
            near.recv()
    near.send("")
    answer = near.recv_bytes()
    report = msgspec.msgpack.decode(near.recv_bytes())
    coordinator.join()
    return {
        "values": num_values,
        "sites": num_sites,
        "max_sites": max_sites,
        "bits": value_bits,
        "digits_per_slot": packing.digits_per_slot,
        "up_bytes_per_value": round(sites.up_bytes / num_values, 4),
        "down_bytes_per_value": round(len(answer) / num_values, 4),
        "up_vs_float32": round(sites.up_bytes / (4 * num_values), 3),
        "down_vs_float32": round(len(answer) / (4 * num_values), 3),
        "encode_encrypt_s": round(statistics.median(sites.encode_s), 4),
        "add_s_per_site": round(statistics.median(report["seconds"]), 4),
        "finish_s": round(report["finish_s"], 4),
        **check_sum(answer, sites, key=key, layout=layout, packing=packing),
        "plain_add_s_per_site": round(statistics.median(sites.plain_s), 6),
        "add_vs_plain": round(statistics.median(report["seconds"]) / statistics.median(sites.plain_s), 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "server_peak_rss_mb": round(report["rss_mb"], 1),
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure bytes, seconds and memory of the encrypted sum.",
        epilog="example: %(prog)s --values 2200000 --sites 8 --bits 13 --json",
    )
    parser.add_argument("--values", type=int, default=2_200_000, help="values in one update (default: %(default)s)")
    parser.add_argument("--sites", type=int, default=8, help="sites that are summed (default: %(default)s)")
    parser.add_argument(
        "--max-sites",
        type=int,
        help="sites the packing leaves room for (default: --sites); hold it fixed to compare memory between cohorts",
    )
    parser.add_argument("--bits", type=int, default=13, help="bits of a quantised value (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    max_sites = arguments.max_sites or arguments.sites
    result = measure(arguments.values, arguments.sites, value_bits=arguments.bits, max_sites=max_sites)
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value}")
    return 0 if result["exact"] and result["within_bound"] else 1


if __name__ == "__main__":
    sys.exit(main())
