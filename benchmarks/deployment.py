"""Measure a consortium of real daemons: coordinator, SuperLink, sites and couriers over TLS on loopback.

The sites' trainer does nothing (resting_sites.py); all else is the product. A round is held against a round of plain
Flower's own FedAvg, of the same float32 bytes, at its default settings, in the same run.

Example:
    python benchmarks/deployment.py --only round
    python benchmarks/deployment.py --only idle --seconds 60 --json
    python benchmarks/deployment.py --quick
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from deployed import (
    Deployment,
    by_role,
    cpu_seconds,
    deployed,
    memory_mb,
    peaks_mb,
    phase_seconds,
    play,
    round_seconds,
)
from plain_flower import fedavg_rounds

Result = dict[str, Any]

WANTED_RATIO = 1.0
WANTED_IDLE_SHARE = 0.01
WANTED_MEMORY_GROWTH = 1.1
LARGE_SITES, LARGE_VALUES, LARGE_BITS = 3, 26_000_000, 24  # one value a slot: about 200 MB under both locks
SETTLE_SECONDS = 15.0  # before what is idle is measured


def measure_round(arguments: argparse.Namespace) -> Iterator[Result]:
    """A round of ours against one of plain Flower, in turns."""
    ours: list[float] = []
    plain: list[float] = []
    costs: Result = {}
    for _ in range(arguments.repeats):
        plain += fedavg_rounds(sites=arguments.sites, values=arguments.values, rounds=arguments.plain_rounds)
        seconds, costs = timed_rounds(arguments)
        ours += seconds
    ratio = statistics.median(ours) / statistics.median(plain)
    yield {
        "figure": "round",
        "sites": arguments.sites,
        "values": arguments.values,
        "ours_s": ours,
        "plain_flower_s": [round(each, 3) for each in plain],
        "median_ours_s": round(statistics.median(ours), 3),
        "median_plain_flower_s": round(statistics.median(plain), 3),
        "ratio": round(ratio, 3),
        **costs,
        "met": ratio <= WANTED_RATIO,
    }


def timed_rounds(arguments: argparse.Namespace) -> tuple[list[float], Result]:
    """Seconds of each round of ours but the first, and what the rounds cost."""
    marks: list[dict[int, float]] = []  # CPU seconds so far, at the beginning of each round
    with deployed(**_size(arguments, rounds=arguments.rounds + 1, max_sites=8)) as deployment:

        def mark(phase: str, number: int) -> None:
            if phase in ("round", "close"):
                marks.append(cpu_seconds(deployment))

        events = play(deployment, on_phase=mark)
        costs = {
            "phases_s": phase_seconds(events),
            "cpu_s_a_round": _cpu_a_round(deployment, marks),
            "peak_rss_mb": peaks_mb(deployment),
        }
    return round_seconds(events), costs


def measure_large(arguments: argparse.Namespace) -> Iterator[Result]:
    """Updates of 200 MB, of the fewest sites that a plan allows: each takes several gigabytes."""
    values = arguments.values if arguments.quick else LARGE_VALUES
    size = {**_size(arguments, rounds=1, max_sites=8), "sites": LARGE_SITES, "processes": LARGE_SITES}
    with deployed(**{**size, "values": values, "bits": LARGE_BITS}) as deployment:
        events = play(deployment)
        largest = max(event["bytes_in"] for event in events if event["event"] == "reply")
        yield {
            "figure": "large",
            "sites": LARGE_SITES,
            "values": values,
            "update_mb": round(largest / 1e6, 1),
            "phases_s": phase_seconds(events),
            "peak_rss_mb": peaks_mb(deployment),
            "met": True,
        }


def measure_memory(arguments: argparse.Namespace) -> Iterator[Result]:
    """The coordinator's memory among few sites and many; the plan packs for the same number in both."""
    few, many = (4, 8) if arguments.quick else (4, 16)
    peaks = {}
    for sites in (few, many):
        size = {**_size(arguments, rounds=2, max_sites=many), "sites": sites, "processes": 2}
        with deployed(**size) as deployment:
            play(deployment)
            peaks[sites] = peaks_mb(deployment)
    growth = {role: round(peaks[many][role] / peaks[few][role], 3) for role in ("coordinator", "superlink")}
    yield {
        "figure": "memory",
        "values": arguments.values,
        "peak_rss_mb": peaks,
        "growth": growth,
        "met": growth["coordinator"] <= WANTED_MEMORY_GROWTH,
    }


def measure_idle(arguments: argparse.Namespace) -> Iterator[Result]:
    """What daemons cost between two runs: each has played one."""
    seconds = min(arguments.seconds, 5.0) if arguments.quick else arguments.seconds
    with deployed(**{**_size(arguments, rounds=1, max_sites=8), "values": 10_000}) as deployment:
        play(deployment)
        time.sleep(1.0 if arguments.quick else SETTLE_SECONDS)
        before, began = cpu_seconds(deployment), time.monotonic()
        time.sleep(seconds)
        after, lasted = cpu_seconds(deployment), time.monotonic() - began
        shares = {pid: round((after[pid] - before[pid]) / lasted, 5) for pid in after if pid in before}
        yield {
            "figure": "idle",
            "sites": arguments.sites,
            "seconds": round(lasted, 1),
            "share_of_a_core": by_role(shares, deployment.roles()),
            "memory_mb": {
                role: [round(each, 1) for each in found]
                for role, found in by_role(memory_mb(deployment), deployment.roles()).items()
            },
            "met": max(shares.values()) < WANTED_IDLE_SHARE,
        }


def measure_cohort(arguments: argparse.Namespace) -> Iterator[Result]:
    """Many sites on this one machine join and finish a round."""
    sites = 6 if arguments.quick else 24
    began = time.time()
    with deployed(**{**_size(arguments, rounds=1, max_sites=sites), "sites": sites, "processes": 2}) as deployment:
        events = play(deployment)
        answered = {event["site"] for event in events if event["event"] == "reply" and event["phase"] == "round"}
        first = next(event["t"] for event in events if event["event"] == "phase")
        yield {
            "figure": "cohort",
            "sites": sites,
            "values": arguments.values,
            "joined_s": round(first - began, 1),
            "phases_s": phase_seconds(events),
            "peak_rss_mb": peaks_mb(deployment),
            "met": len(answered) == sites,
        }


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Result]]] = {
    "round": measure_round,
    "large": measure_large,
    "memory": measure_memory,
    "idle": measure_idle,
    "cohort": measure_cohort,
}


def _size(arguments: argparse.Namespace, *, rounds: int, max_sites: int) -> dict[str, int]:
    sites = arguments.sites
    return {
        "sites": sites,
        "values": arguments.values,
        "rounds": rounds,
        "max_sites": max(max_sites, sites),
        "processes": sites,
    }


def _cpu_a_round(deployment: Deployment, marks: list[dict[int, float]]) -> dict[str, float]:
    """CPU seconds of each role, all of its processes together, from the second round on."""
    rounds = len(marks) - 2
    spent = {pid: marks[-1][pid] - marks[1][pid] for pid in marks[1]}
    return {role: round(sum(each) / rounds, 2) for role, each in by_role(spent, deployment.roles()).items()}


def show(result: Result) -> str:
    return "\n".join(f"{name:24} {value}" for name, value in result.items()) + "\n"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure a consortium of real daemons on loopback.",
        epilog="example: %(prog)s --only round --rounds 6 --json",
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="this part, not all; may be given again")
    parser.add_argument("--sites", type=int, default=4, help="sites of round and idle (default: %(default)s)")
    parser.add_argument("--values", type=int, default=2_200_000, help="of an update (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="of ours that are timed (default: %(default)s)")
    parser.add_argument("--plain-rounds", type=int, default=4, help="of plain Flower's (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="of both, in turns (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="that daemons are idle (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small updates, few rounds: that it runs, not how fast")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each part instead of a table")
    arguments = parser.parse_args(argv)
    if arguments.sites < 3 or min(arguments.values, arguments.rounds, arguments.plain_rounds, arguments.repeats) < 1:
        parser.error("wanted --sites of at least 3, and one or more of everything else")
    if arguments.quick:
        arguments.values, arguments.rounds, arguments.plain_rounds, arguments.repeats = 20_000, 1, 2, 1
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    met = True
    for part in arguments.only or PARTS:
        for result in PARTS[part](arguments):
            print(json.dumps(result) if arguments.json else show(result), flush=True)
            met &= bool(result["met"])
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
