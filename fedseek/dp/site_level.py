"""A guarantee for whole sites: parameters and accounting of the distributed discrete Gaussian mechanism.

    update of a site --clip to c--> round to a grid of step gamma --> + N_Z(0, sigma^2), its share --> sum with the others'

Nobody sees a share alone: what is decrypted is the sum, and the noise in it is that of all sites. Source: P. Kairouz,
Z. Liu, T. Steinke, "The distributed discrete Gaussian mechanism for federated learning with secure aggregation", ICML
2021, arXiv:2102.06387 (below: KLS); for one discrete Gaussian C. Canonne, G. Kamath, T. Steinke, arXiv:2004.00010 (CKS).

Neighbouring runs: the same sites take part, and one site's updates, all of the run, are zeros in one of the two
(ZERO_OUT_ONE). So who sees the sums cannot tell what data a site had; that it took part is public. Up to ``tolerated``
sites may tell the coordinator what noise they added: it is sized for the fewest other sites that any sum can hold.

What differs from KLS, and why it holds (docs/adr/0023 has the argument in full):
    - no modular wrap-around and no rotation: digits are wide enough, and a value that leaves them is clamped. That
      happens in a run with a probability that is paid for in delta.
    - the clip norm bounds what is sent after rounding, exactly and in integers; a site that finds its rounded update
      longer rounds again (KLS, Algorithm 1). Its float update is made shorter first, so that this is rare.
    - a bound on the number of values replaces the dimension: parameters depend on the plan alone, not on the model.

Nothing here knows of tensors or data, so that a coordinator can check a plan's numbers by itself.

>>> params = site_level_params(
...     8.0, 1e-5, l2_clip_norm=0.1, rounds=10, levels=2**15 - 1, max_sites=16, honest=(12, 3), tolerated=1
... )
>>> round(params.epsilon(10), 2), round(params.epsilon(1), 2), params.norm_bound
(8.0, 2.15, 2493)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedseek.errors import UnsupportedMechanism

NEIGHBORING_RELATION: Final = "ZERO_OUT_ONE"
MECHANISM: Final = "distributed discrete Gaussian: each site's update clipped, rounded, and noised with its share"

MAX_VALUES: Final = 1 << 32
"""Most values of one update over all its scopes; tails and divergence are bounded for so many, whatever the model."""

# Of delta: for the event that any value of any site leaves its digit in the run.
_OVERFLOW_PART: Final = 1e-3
# sigma >= 4 makes the divergence from one discrete Gaussian below 1e-60: noise with fewer steps would be no cheaper.
_LEAST_VARIANCE: Final = 16
# Fewer steps from zero to the clip norm than this, and rounding is most of what is sent.
_LEAST_NORM_BOUND: Final = 32
# Rounding again is as rare as this.
_ROUNDED_AGAIN: Final = 1e-6
# Numbers that come out of logarithms are rounded up to these, so that the last bits of one machine's library do not matter.
_MULTIPLIER_STEP: Final = 1e-4
_TAIL_STEP: Final = 1e-3


@dataclass(frozen=True, slots=True)
class SiteLevelParams:
    """The numbers of the plan that fix the guarantee for a site; equal at every site. Made by ``site_level_params``.

    Attributes:
        l2_clip_norm: c, bound on what a site sends in a round, over all scopes together.
        delta: the delta of (epsilon, delta).
        rounds: of the plan; more are not covered.
        tolerated: sites that may tell their own noise.
        norm_bound: c in steps of the grid, an integer.
        levels: steps from 0 to the largest value a digit takes.
        adapter_variance: of a site's share of noise in the adapter, in squared steps, an integer.
        head_variance: the same in a head, which fewer sites sum.
        honest: fewest sites of which no noise is known, in a sum of the adapter and in one of a head.
        max_sites: most sites in a sum.
        graph_chance: per round, that a sum holds fewer honest sites than these; it does not depend on any data.
    """

    l2_clip_norm: float
    delta: float
    rounds: int
    tolerated: int
    norm_bound: int
    levels: int
    adapter_variance: int
    head_variance: int
    honest: tuple[int, int]
    max_sites: int
    graph_chance: float = 0.0

    @property
    def grid(self) -> float:
        """gamma: what one integer step stands for."""
        return self.l2_clip_norm / self.norm_bound

    @property
    def value_range(self) -> float:
        """The quantiser's C: the same in all scopes and rounds, since it follows from the plan alone."""
        return self.grid * self.levels

    def noise_std(self, variance: int, contributors: int) -> float:
        """Standard deviation of the noise in a value of a mean over so many sites, in units of the update."""
        return self.grid * math.sqrt(variance / contributors)

    def largest_norm(self, num_values: int) -> float:
        """Norm, in steps, to which an update of so many values is clipped so that rounding rarely takes it over the bound.

        KLS, Theorem 1, bounds the norm of a vector of norm r, each value rounded at random to a neighbour: always by
        r + sqrt(d), and but for a chance beta by the root of r^2 + d/4 + sqrt(2 ln 1/beta) (r + sqrt(d)/2). Solved for
        r; the larger one. The guarantee does not rest on it.

        Returns:
            r, above 0.

        Raises:
            UnsupportedMechanism: rounding takes more than half of the bound.
        """
        root, chance = math.sqrt(num_values), math.sqrt(2 * math.log(1 / _ROUNDED_AGAIN))
        square = chance**2 / 4 + self.norm_bound**2 - num_values / 4 - chance * root / 2
        norm = max(self.norm_bound - root, math.sqrt(max(square, 0.0)) - chance / 2)
        if num_values > MAX_VALUES or 2 * norm < self.norm_bound:
            raise UnsupportedMechanism(
                f"an update of {num_values} values does not fit a clip norm of {self.norm_bound} steps of the quantiser: "
                f"rounding takes more than half of it; wanted about {math.ceil(0.58 * root + 5)} steps or more",
                hint="more encryption.value_bits, a smaller adapter, or less noise",
            )
        return norm

    def epsilon(self, rounds: int) -> float:
        """Epsilon for one site after ``rounds`` rounds in which it sent an update, at ``delta``; an upper bound.

        Rounds that a site only rests in (its update is zeros whatever its data) cost nothing and do not count.

        Raises:
            UnsupportedMechanism: more rounds than the plan has.
        """
        if not 0 <= rounds <= self.rounds:
            raise UnsupportedMechanism(f"rounds is {rounds}, wanted 0 to the plan's {self.rounds}")
        # zCDP adds up over rounds, each of which may depend on those before (Bun and Steinke 2016, Lemma 2.3).
        rho = rounds * concentration(self) ** 2 / 2
        return concentrated_epsilon(rho, _delta_of_noise(self.delta, self.rounds, self.graph_chance)) if rounds else 0.0


def site_level_params(
    epsilon: float,
    delta: float,
    *,
    l2_clip_norm: float,
    rounds: int,
    levels: int,
    max_sites: int,
    honest: tuple[int, int],
    tolerated: int,
    graph_chance: float = 0.0,
) -> SiteLevelParams:
    """The grid and the shares of noise with which ``rounds`` sums are (epsilon, delta)-DP for one site.

    Args:
        epsilon: at the end of the run.
        delta: of it, a thousandth is for values that leave their digits.
        l2_clip_norm: c.
        rounds: in which a site sends an update.
        levels: steps from 0 to the largest value of a digit.
        max_sites: most sites in a sum.
        honest: fewest sites of which no noise is known, in a sum of the adapter and in one of a head; 1 or more.
        tolerated: for the record.
        graph_chance: per round, that a sum holds fewer of these, whatever the data.

    Raises:
        UnsupportedMechanism: noise and update do not fit the digits, or a number for which no guarantee exists.
    """
    if not (0 < epsilon < math.inf and 0 < delta < 1 and 0 < l2_clip_norm < math.inf and min(*honest, rounds) >= 1):
        raise UnsupportedMechanism(
            f"epsilon {epsilon}, delta {delta}, l2_clip_norm {l2_clip_norm}, rounds {rounds}, honest sites {honest}: "
            "wanted all above 0, and delta below 1"
        )
    multiplier = _noise_multiplier(epsilon, _delta_of_noise(delta, rounds, graph_chance), rounds)
    tail = _tail(epsilon, delta * _OVERFLOW_PART, rounds=rounds, max_sites=max_sites)
    norm_bound = math.floor(levels / (1 + tail * multiplier / math.sqrt(min(honest))))
    while norm_bound > 0 and norm_bound + tail * math.sqrt(max(_variances(multiplier, norm_bound, honest))) > levels:
        norm_bound -= 1  # a share's variance was rounded up to an integer
    if norm_bound < _LEAST_NORM_BOUND:
        raise UnsupportedMechanism(
            f"values of {levels} steps hold an update clipped to {norm_bound} steps beside a share of noise of "
            f"{multiplier / math.sqrt(min(honest)):.3g} times that; wanted room for {_LEAST_NORM_BOUND} steps or more",
            hint="more value_bits, more sites in the smallest sum, fewer rounds, or a larger epsilon",
        )
    adapter_variance, head_variance = _variances(multiplier, norm_bound, honest)
    params = SiteLevelParams(
        l2_clip_norm=l2_clip_norm,
        delta=delta,
        rounds=rounds,
        tolerated=tolerated,
        norm_bound=norm_bound,
        levels=levels,
        adapter_variance=adapter_variance,
        head_variance=head_variance,
        honest=honest,
        max_sites=max_sites,
        graph_chance=graph_chance,
    )
    if not params.epsilon(rounds) <= epsilon:
        raise UnsupportedMechanism(f"epsilon {epsilon} at delta {delta} is out of reach")
    return params


def concentration(params: SiteLevelParams) -> float:
    """The x for which the sum of one round is x^2 / 2-zCDP for a site.

    KLS, Proposition 14 (its last case): norm / (sqrt(n) sigma) + tau sqrt(d) for n shares. Each value may have an n and
    a sigma of its own, since the proof adds up over values; the least noise of any bounds them all. More than ``honest``
    sites in a sum only add noise, and tau is taken for the most there can be.
    """
    shares = zip(params.honest, (params.adapter_variance, params.head_variance), strict=True)
    noise = math.sqrt(min(count * variance for count, variance in shares))
    least = min(params.adapter_variance, params.head_variance)
    return params.norm_bound / noise + divergence_from_gaussian(params.max_sites, least) * math.sqrt(MAX_VALUES)


def divergence_from_gaussian(num_shares: int, variance: float) -> float:
    """tau: how far the sum of so many discrete Gaussians is from one of the summed variance, in max divergence.

    KLS, Theorem 1: tau = 10 sum over k < n of exp(-2 pi^2 sigma^2 k / (k + 1)), for sigma >= 1/2.
    """
    if variance < 0.25:
        raise UnsupportedMechanism(f"variance is {variance}, wanted at least 1/4")
    return 10 * math.fsum(math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, num_shares))


def concentrated_epsilon(rho: float, delta: float) -> float:
    """Epsilon at ``delta`` of a rho-zCDP mechanism; an upper bound.

    CKS, Proposition 12 and Corollary 13: delta = exp((alpha - 1)(alpha rho - epsilon)) / (alpha - 1) (1 - 1/alpha)^alpha,
    for every alpha > 1.
    Solved for epsilon, and least over alpha; any alpha gives a bound, so that the search need not be exact.
    """

    def bound(log_order: float) -> float:
        above = math.exp(log_order)  # alpha - 1
        order = 1 + above
        return order * rho + (-math.log(delta) - above * math.log1p(1 / above) - math.log(order)) / above

    low, high = -10.0, 25.0
    for _ in range(100):  # the bound falls, then rises
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if bound(first) < bound(second) else (first, high)
    return max(0.0, bound(low))


def _delta_of_noise(delta: float, rounds: int, graph_chance: float) -> float:
    """What is left of delta for the noise: an event that comes as often with either of two neighbours costs its chance."""
    left = delta * (1 - _OVERFLOW_PART) - rounds * graph_chance
    if left < delta / 2:
        raise UnsupportedMechanism(
            f"delta {delta:g} does not bear a chance of {graph_chance:.2g} in each of {rounds} rounds that too few honest "
            "sites are in a sum",
            hint="a larger delta, fewer rounds, or at most 20 sites",
        )
    return left


def _noise_multiplier(epsilon: float, delta: float, rounds: int) -> float:
    """Standard deviation of the noise in a sum over the clip norm, for ``rounds`` sums within (epsilon, delta); rounded up."""
    low, high = 0.0, 1.0
    while concentrated_epsilon(high, delta) < epsilon:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if concentrated_epsilon(middle, delta) < epsilon else (low, middle)
    if low == 0:
        raise UnsupportedMechanism(f"epsilon {epsilon} at delta {delta} is out of reach")
    return math.ceil(math.sqrt(rounds / (2 * low)) / _MULTIPLIER_STEP) * _MULTIPLIER_STEP


def _tail(epsilon: float, delta: float, *, rounds: int, max_sites: int) -> float:
    """How many standard deviations of a share must fit beside the update, so that clamping costs at most ``delta``.

    A discrete Gaussian is sub-Gaussian: P(|X| > z sigma) <= 2 exp(-z^2 / 2) (CKS, section 3). A union bound over every
    value of every site and round gives beta, the distance of what happens from the mechanism without clamping. Changing
    both of two (epsilon, delta)-close distributions by beta costs (1 + exp(epsilon)) beta of delta.
    """
    draws = math.log(2) + math.log(max_sites) + math.log(rounds) + math.log(MAX_VALUES)
    wanted = math.sqrt(2 * (draws + epsilon + math.log1p(math.exp(-epsilon)) - math.log(delta)))
    return math.ceil(wanted / _TAIL_STEP) * _TAIL_STEP


def _variances(multiplier: float, norm_bound: int, honest: tuple[int, int]) -> tuple[int, int]:
    """Of a share in the adapter and in a head: so many honest shares make the noise of the sum."""
    total = (multiplier * norm_bound) ** 2
    adapter, head = (max(_LEAST_VARIANCE, math.ceil(total / count)) for count in honest)
    return adapter, head
