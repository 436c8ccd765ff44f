"""What a guarantee for whole sites costs: noise against signal in the mean of synthetic updates, no training.

Each site's update has the clip norm; a part of it is common to all sites and the rest its own (`--agreement` is the
cosine between two sites' updates). Clip, rounding and noise are those of the product; nothing is encrypted.

Example:
    python benchmarks/site_level.py --sites 4 16 64 --values 768 24576 --epsilon 8
    python benchmarks/site_level.py --json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from fedseek.dp.site_level import SiteLevelParams, site_level_params
from fedseek.dp.site_share import noise_update
from fedseek.errors import UnsupportedMechanism
from fedseek.he.packing import MAX_VALUE_BITS, choose_packing
from fedseek.secagg.graph import choose_graph, honest_in_sum

DELTA, CLIP, COLLUDERS, DROPOUT = 1e-5, 1.0, 1, 0.1
SCOPE = "adapter"


@dataclass(frozen=True, slots=True)
class Cost:
    """One line of the table.

    Attributes:
        honest: fewest honest sites in a sum, for which the noise is sized.
        value_bits: the fewest that fit update and noise.
        noise_to_signal: norm of what noise, clip and rounding did to a round's mean, over the norm of the mean.
        cosine_of_a_round: between the mean that is applied and the mean without noise.
        cosine_of_the_run: between the sum of all rounds and the part that the updates of all sites have in common.
    """

    sites: int
    values: int
    epsilon: float
    honest: int
    value_bits: int
    noise_to_signal: float
    cosine_of_a_round: float
    cosine_of_the_run: float


def smallest_fit(sites: int, values: int, epsilon: float, rounds: int) -> tuple[int, SiteLevelParams]:
    """The fewest bits a value, and the parameters; one site in ten may be missing from a sum."""
    listed = range(max(sites - math.floor(DROPOUT * sites), COLLUDERS + 2), sites + 1)
    graphs = [choose_graph(count, colluders=COLLUDERS, dropout_fraction=DROPOUT) for count in listed]
    honest = min(honest_in_sum(graph, min_survivors=listed[0]) for graph in graphs)
    for bits in range(8, MAX_VALUE_BITS + 1):
        try:
            params = site_level_params(
                epsilon,
                DELTA,
                l2_clip_norm=CLIP,
                rounds=rounds,
                levels=choose_packing(bits, sites).levels,
                max_sites=sites,
                honest=(honest, honest),
                tolerated=COLLUDERS,
            )
            if params.largest_norm(values) >= 0.9 * params.norm_bound:
                return bits, params
        except UnsupportedMechanism:
            continue
    raise SystemExit(f"{sites} sites, {values} values, epsilon {epsilon}: nothing fits")


def measure(sites: int, values: int, epsilon: float, *, rounds: int, agreement: float) -> Cost:
    bits, params = smallest_fit(sites, values, epsilon, rounds)
    rng = np.random.default_rng([sites, values])
    common, run = _unit(rng, values), np.zeros(values, np.float64)
    ratios, cosines = list[float](), list[float]()
    for _ in range(rounds):
        updates = [math.sqrt(agreement) * common + math.sqrt(1 - agreement) * _unit(rng, values) for _ in range(sites)]
        sent = sum(
            noise_update(
                {SCOPE: update.astype(np.float32)}, params, variances={SCOPE: params.adapter_variance}
            ).numbers[SCOPE]
            for update in updates
        )
        mean, noised = np.sum(updates, axis=0) / sites, np.asarray(sent) * (params.grid / sites)
        ratios.append(float(np.linalg.norm(noised - mean) / np.linalg.norm(mean)))
        cosines.append(_cosine(noised, mean))
        run += noised
    return Cost(
        sites=sites,
        values=values,
        epsilon=epsilon,
        honest=params.honest[0],
        value_bits=bits,
        noise_to_signal=float(np.mean(ratios)),
        cosine_of_a_round=float(np.mean(cosines)),
        cosine_of_the_run=_cosine(run, common),
    )


def _unit(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    vector = rng.standard_normal(size)
    return vector / np.linalg.norm(vector)


def _cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


def table(costs: list[Cost]) -> str:
    lines = [
        "| sites | honest | values | ε | bits | noise / signal | cosine, a round | cosine, the run |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {c.sites} | {c.honest} | {c.values:,} | {c.epsilon:g} | {c.value_bits} | {c.noise_to_signal:.2f} | "
        f"{c.cosine_of_a_round:.2f} | {c.cosine_of_the_run:.2f} |"
        for c in costs
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--values", type=int, nargs="+", default=[768, 24_576])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--agreement", type=float, default=0.3, help="cosine between two sites' updates")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    costs = [
        measure(sites, values, epsilon, rounds=asked.rounds, agreement=asked.agreement)
        for epsilon in asked.epsilon
        for values in asked.values
        for sites in asked.sites
    ]
    print(table(costs))
    if asked.json:
        print(json.dumps({"rounds": asked.rounds, "agreement": asked.agreement, "costs": [asdict(c) for c in costs]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
