"""Measure the whole secure sum: encode, tag, mask, encrypt, add blind, unmask, decrypt, verify, decode.

All of it with the library's own code. Seconds are CPU seconds of one thread, so that other work on the machine does
not show in them. The coordinator runs in a process of its own that is fed one serialised message at a time.

Example:
    python benchmarks/secure_aggregation.py --values 2200000 --sites 8 --bits 13 --dropouts 2
    python benchmarks/secure_aggregation.py --sites 4 --max-sites 64 --bits 8 --json
    python benchmarks/secure_aggregation.py --compare
    python benchmarks/secure_aggregation.py --growth --values 200000 --dropout-fraction 0.05
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the coordinator's process loads this file again, and must not load what can decrypt
    from workload import Workload

Result = dict[str, Any]

LOCKS = ("none", "outer", "both")
SCHEMES = {"none": "plain float32", "outer": "one lock", "both": "both locks", "ckks": "CKKS (TenSEAL)"}
COMPARED = {
    "up_bytes_per_value": "up, bytes a value",
    "down_bytes_per_value": "down, bytes a value",
    "site_up_s": "site until its update leaves, s",
    "site_down_s": "site from there to the mean, s",
    "add_s_per_site": "coordinator adds a site, s",
    "unmask_s": "coordinator unmasks, s",
    "server_idle_rss_mb": "coordinator before, MB",
    "server_peak_rss_mb": "coordinator peak, MB",
    "exact": "the sum exactly",
    "max_error": "largest error of a mean value",
}
GROWTH_SITES = (64, 128, 256)
GROWTH_SITES_A_COLLUDER = 16
GROWING = ("degree", "site_crypto_s", "inner_lock_s", "share_bytes", "unmask_s", "server_peak_rss_mb")


def measure(workload: Workload, scheme: str) -> Result:
    """One scheme over one workload."""
    import peers
    import site_side

    measured = {
        "none": peers.measure_plain,
        "outer": site_side.measure_outer,
        "both": site_side.measure_both,
        "ckks": peers.measure_ckks,
    }[scheme](workload)
    return {"locks": scheme, **asdict(workload), **measured}


def is_right(result: Result) -> bool:
    """Whether the sum is exact, its tags fit and its mean is within the quantiser's bound, where a scheme has them.

    CKKS promises none of these.
    """
    return result["locks"] == "ckks" or all(result.get(name, True) for name in ("exact", "tags_fit", "within_bound"))


def show(result: Result) -> str:
    return "\n".join(f"{name:24} {value}" for name, value in result.items())


def show_comparison(results: list[Result]) -> str:
    """One column a scheme."""
    lines = [f"{'':32}" + "".join(f"{SCHEMES[result['locks']]:>16}" for result in results)]
    for name, label in COMPARED.items():
        cells = [result[name] for result in results]
        lines.append(f"{label:32}" + "".join(f"{_cell(value):>16}" for value in cells))
    return "\n".join(lines)


def show_growth(results: list[Result]) -> str:
    """Each figure, and beside it how it grew: times the first one, and that over the growth of log2 n."""
    first = results[0]
    lines = [f"{'sites':24}" + "".join(f"{result['sites']:>26}" for result in results)]
    for name in GROWING:
        cells = []
        for result in results:
            times = result[name] / first[name]
            of_log = times * math.log2(first["sites"]) / math.log2(result["sites"])
            cells.append(f"{_cell(result[name])} x{times:.2f} /log {of_log:.2f}")
        lines.append(f"{name:24}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2e}" if isinstance(value, float) and 0 < value < 1e-4 else f"{value}"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure bytes, seconds and memory of the secure sum.",
        epilog="example: %(prog)s --values 2200000 --sites 8 --bits 13 --dropouts 2 --json",
    )
    parser.add_argument("--values", type=int, default=2_200_000, help="values in one update (default: %(default)s)")
    parser.add_argument("--sites", type=int, default=8, help="sites of the round (default: %(default)s)")
    parser.add_argument(
        "--max-sites",
        type=int,
        help="sites the packing leaves room for (default: --sites); hold it fixed to compare memory between cohorts",
    )
    parser.add_argument("--bits", type=int, default=13, help="bits of a quantised value (default: %(default)s)")
    parser.add_argument("--locks", choices=LOCKS, default="both", help="what hides an update (default: %(default)s)")
    parser.add_argument("--dropouts", type=int, default=0, help="sites that deal shares and then vanish")
    parser.add_argument("--colluders", type=int, help="as in a plan (default: 1, or 0 of two sites)")
    parser.add_argument("--dropout-fraction", type=float, default=0.1, help="as in a plan (default: %(default)s)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--compare", action="store_true", help="all schemes in one run: no lock, one, both, CKKS")
    modes.add_argument(
        "--growth", action="store_true", help=f"both locks with {GROWTH_SITES} sites, one in 16 of them colluding"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    arguments = parser.parse_args(argv)
    largest = max(GROWTH_SITES) if arguments.growth else arguments.sites
    arguments.max_sites = largest if arguments.max_sites is None else arguments.max_sites
    if arguments.values < 1 or arguments.sites < 2 or arguments.max_sites < largest:
        parser.error("wanted --values of at least 1, --sites of at least 2, and --max-sites not below --sites")
    if not 0 <= arguments.dropouts <= arguments.sites - 2:
        parser.error("--dropouts: wanted two sites or more to stay")
    return arguments


def measure_all(arguments: argparse.Namespace) -> list[Result]:
    """What the options ask for, one result a cohort or scheme."""
    from workload import Workload

    workload = Workload(
        values=arguments.values,
        sites=arguments.sites,
        max_sites=arguments.max_sites,
        bits=arguments.bits,
        colluders=min(1, arguments.sites - 2) if arguments.colluders is None else arguments.colluders,
        dropout_fraction=arguments.dropout_fraction,
        dropouts=arguments.dropouts,
    )
    if arguments.growth:
        cohorts = [replace(workload, sites=n, colluders=n // GROWTH_SITES_A_COLLUDER) for n in GROWTH_SITES]
        return [measure(cohort, "both") for cohort in cohorts]
    return [measure(workload, scheme) for scheme in (SCHEMES if arguments.compare else (arguments.locks,))]


def main(argv: list[str] | None = None) -> int:
    from fedseek.errors import FedseekError

    arguments = parse_arguments(argv)
    try:
        results = measure_all(arguments)
    except FedseekError as error:  # a cohort that no plan allows, or too few survivors
        print(f"error: {error}", file=sys.stderr)
        return 2
    mode = "compare" if arguments.compare else "growth" if arguments.growth else None
    if arguments.json:
        print(json.dumps({mode: results} if mode else results[0]))
    else:
        print({"compare": show_comparison, "growth": show_growth}[mode](results) if mode else show(results[0]))
    return 0 if all(is_right(result) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
