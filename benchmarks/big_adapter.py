"""Measure a round of an adapter as large as that of a 7B model: seconds, bytes and memory of each party by phase.

By default 40 million values (7B, rank 16, all linears) of three sites under both locks, with the library's own code and
the messages of the wire. Every party is a process of its own that is fed one message at a time.

    a site           peak memory from encoding to the written message, above what it has with the update loaded
    the coordinator  peak memory, above what it has before the first update, the message in hand included; in ciphertexts
                     of one site with both polynomials (16 bytes a slot), the form in which they are added. A site sends
                     half of that, with a seed in place of the second polynomial: ``coordinator_uploads`` counts in these

Seconds are CPU seconds of one thread. Ends in status 1 if the sum is not what the sites sent. At 40 million values or
more also if a figure is missed; at fewer, what does not grow with the adapter counts for too much.

Example:
    python benchmarks/big_adapter.py
    python benchmarks/big_adapter.py --values 40000000 --bits 16 --max-sites 64 --json figures.json
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the coordinator's process loads this file again, and must not load what can decrypt
    from big_site import Measured, ToldOfSum
    from party import Party
    from workload import Workload

Result = dict[str, Any]

FULL_VALUES = 40_000_000
SITE_LIMIT_MB = 1000.0
COORDINATOR_LIMIT = 2.0

UP = ("encode", "tag", "mask", "encrypt", "write")
DOWN = ("read", "decrypt", "apply")
ADDING = ("update", "unmask", "finish")
PHASES = {
    "encode": "site: encode",
    "tag": "site: tag",
    "mask": "site: mask",
    "encrypt": "site: encrypt",
    "write": "site: write the message",
    "update": "coordinator: read and add one update",
    "unmask": "coordinator: take the mask off",
    "finish": "coordinator: write the sum",
    "read": "site: read the message",
    "decrypt": "site: decrypt, verify, decode",
    "apply": "site: apply",
}
_MB = 2**20 / 1e6  # a MiB, as the parties count


def measure(workload: Workload) -> Result:
    """Play the round; the figures of the site that took most, and of the coordinator."""
    import msgspec
    from adding_side import start_both
    from big_site import Measured, ToldOfSum, start_site
    from party import Party
    from workload import KIND

    from fedseek.encode import num_ciphertexts
    from fedseek.he.keys import SecretKey
    from fedseek.identity.keys import SiteIdentity
    from fedseek.identity.roster import Roster

    count, plan = num_ciphertexts(workload.layout, workload.packing), workload.plan().canonical()
    identities = [SiteIdentity.generate(f"支行-{number:04d}", KIND) for number in range(workload.sites)]
    roster = Roster.of(identity.public() for identity in identities).canonical_bytes()
    given = (plan, roster, SecretKey.generate(workload.packing.params).to_bytes(), workload)
    with ExitStack() as opened:
        adding = opened.enter_context(Party(start_both, plan, roster, count))
        sites = {
            identity.name.encode(): opened.enter_context(Party(start_site, *given, identity.to_bytes(), number))
            for number, identity in enumerate(identities)
        }
        base_mb, kept_mb, bytes_up, down = _play(adding, sites)
        told = [msgspec.msgpack.decode(site.ask("receive", down), type=ToldOfSum) for site in sites.values()]
        measured = [msgspec.msgpack.decode(site.ask("measured"), type=Measured) for site in sites.values()]
    result = {
        "values": workload.values,
        "sites": workload.sites,
        "max_sites": workload.max_sites,
        "bits": workload.bits,
        "digits_per_slot": workload.packing.digits_per_slot,
        "ciphertexts": count,
        "vector_mb": round(4 * workload.values / 1e6, 1),
        "bytes_up": bytes_up,
        "bytes_down": len(down),
        **_of_sites(measured),
        **_of_coordinator(adding, base_mb, kept_mb, slots=count * workload.packing.params.slot_count, up=bytes_up),
        "right": _is_right(workload, told),
    }
    return {**result, "met": _is_met(result)}


def _play(adding: Party, sites: dict[bytes, Party]) -> tuple[float, float, int, bytes]:
    """The round up to the written sum.

    Returns:
        What the coordinator has before the first update; what it keeps of all of them; the bytes of the largest update;
        the message with the sum.
    """
    for site in sites.values():
        adding.ask("keys", site.ask("keys"))
    for name, site in sites.items():
        adding.ask("shares", site.ask("deal", adding.ask("share_request", name)))
    base_mb, bytes_up = adding.held_mb, 0
    for name, site in sites.items():
        site.ask("train")
        update = site.ask("submit", adding.ask("round_request", name))
        bytes_up = max(bytes_up, len(update))
        adding.ask("update", update)
    kept_mb = adding.held_mb - base_mb
    for name, site in sites.items():
        adding.ask("reveal", site.ask("reveal", adding.ask("unmask_request", name)))
    adding.ask("unmask")
    return base_mb, kept_mb, bytes_up, adding.ask("finish")


def _of_sites(measured: list[Measured]) -> Result:
    seconds = {phase: round(max(each.seconds[phase] for each in measured), 3) for phase in (*UP, *DOWN)}
    peaks = {phase: round(max(each.peaks_mb[phase] for each in measured) * _MB, 1) for phase in (*UP, *DOWN)}
    return {
        "site_seconds": seconds,
        "site_peaks_mb": peaks,
        "site_up_s": round(sum(seconds[phase] for phase in UP), 3),
        "site_down_s": round(sum(seconds[phase] for phase in DOWN), 3),
        "site_up_peak_mb": max(peaks[phase] for phase in UP),
        "site_down_peak_mb": max(peaks[phase] for phase in DOWN),
    }


def _of_coordinator(adding: Party, base_mb: float, kept_mb: float, *, slots: int, up: int) -> Result:
    peaks = {phase: round((max(adding.peaks[phase]) - base_mb) * _MB, 1) for phase in ADDING}
    ciphertext_mb, peak = 16 * slots / 1e6, max(peaks.values())
    return {
        "coordinator_seconds": {phase: round(max(adding.seconds[phase]), 3) for phase in ADDING},
        "coordinator_peaks_mb": peaks,
        "ciphertext_mb": round(ciphertext_mb, 1),
        "coordinator_peak_mb": peak,
        "coordinator_kept_mb": round(kept_mb * _MB, 1),
        "coordinator_ciphertexts": round(peak / ciphertext_mb, 2),
        "coordinator_uploads": round(peak / (up / 1e6), 3),
        "coordinator_kept_uploads": round(kept_mb * _MB / (up / 1e6), 3),
    }


def _is_right(workload: Workload, told: list[ToldOfSum]) -> bool:
    """Whether all sites hold the same weights, and the first values of the mean are within the quantiser's bound.

    That the tags fit is known: a site decodes nothing else.
    """
    import numpy as np
    from workload import VALUE_RANGE, WEIGHT_CAP

    from fedseek.encode import quantiser_bound

    mean = np.frombuffer(told[0].mean, "<f8")
    wanted, weight = np.zeros(mean.size), 0
    for number in range(workload.sites):
        vector, own = workload.update(number)
        wanted += own * vector[: mean.size].astype(np.float64)
        weight += own
    bound = quantiser_bound(
        workload.packing, value_range=VALUE_RANGE, contributors=workload.sites, weight=weight, weight_cap=WEIGHT_CAP
    )
    agree = len({(each.digest, each.contributors, each.weight) for each in told}) == 1
    counted = (told[0].contributors, told[0].weight) == (workload.sites, weight)
    return bool(agree and counted and np.abs(mean - wanted / weight).max() <= bound)


def _is_met(result: Result) -> dict[str, bool]:
    return {
        "site_up_peak_mb": result["site_up_peak_mb"] <= SITE_LIMIT_MB,
        "coordinator_ciphertexts": result["coordinator_ciphertexts"] <= COORDINATOR_LIMIT,
    }


def show(result: Result) -> str:
    """A table of phases, then the figures."""
    seconds = {**result["site_seconds"], **result["coordinator_seconds"]}
    peaks = {**result["site_peaks_mb"], **result["coordinator_peaks_mb"]}
    lines = [
        f"{result['values']:,} values ({result['vector_mb']:g} MB), {result['sites']} sites, {result['bits']} bits, "
        f"{result['digits_per_slot']} to a slot, {result['ciphertexts']} ciphertexts",
        f"{'':40}{'CPU seconds':>12}{'peak above, MB':>16}",
        *(f"{label:40}{seconds[phase]:>12.2f}{peaks[phase]:>16.1f}" for phase, label in PHASES.items()),
        f"up {result['bytes_up'] / 1e6:.1f} MB, down {result['bytes_down'] / 1e6:.1f} MB a site",
        f"a site: {result['site_up_peak_mb']:g} MB above the vector, wanted at most {SITE_LIMIT_MB:g}: "
        + _word(result["met"]["site_up_peak_mb"]),
        f"the coordinator: {result['coordinator_ciphertexts']:g} ciphertexts of one site, wanted at most "
        f"{COORDINATOR_LIMIT:g}: {_word(result['met']['coordinator_ciphertexts'])}; that is "
        f"{result['coordinator_uploads']:g} uploads, of which it keeps {result['coordinator_kept_uploads']:g} between updates",
        f"the sum: {'as sent' if result['right'] else 'NOT what the sites sent'}",
    ]
    return "\n".join(lines)


def _word(met: bool) -> str:
    return "met" if met else "missed"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure seconds, bytes and memory of a round with a big adapter.",
        epilog="example: %(prog)s --values 40000000 --json figures.json",
    )
    parser.add_argument("--values", type=int, default=FULL_VALUES, help="values in one update (default: %(default)s)")
    parser.add_argument("--sites", type=int, default=3, help="sites of the round (default: %(default)s)")
    parser.add_argument("--max-sites", type=int, default=8, help="sites the packing leaves room for (default: 8)")
    parser.add_argument("--bits", type=int, default=13, help="bits of a quantised value (default: %(default)s)")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="", help="write the figures there; without FILE, print them"
    )
    arguments = parser.parse_args(argv)
    if arguments.values < 1 or not 2 <= arguments.sites <= arguments.max_sites:
        parser.error("wanted --values of at least 1, and two --sites or more, not more than --max-sites")
    return arguments


def main(argv: list[str] | None = None) -> int:
    from workload import Workload

    from fedseek.errors import FedseekError

    asked = parse_arguments(argv)
    workload = Workload(values=asked.values, sites=asked.sites, max_sites=asked.max_sites, bits=asked.bits)
    try:
        result = measure(workload)
    except FedseekError as error:  # a packing that no plan allows
        print(f"error: {error}", file=sys.stderr)
        return 2
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result) if asked.json == "" else show(result))
    return 0 if result["right"] and (workload.values < FULL_VALUES or all(result["met"].values())) else 1


if __name__ == "__main__":
    sys.exit(main())
