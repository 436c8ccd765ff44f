"""What several runs cost together: (epsilon, delta) of mechanisms of different noise, sampling and length, composed.

The privacy loss distributions of the mechanisms are convolved (Sommer, Meiser and Mohammadi 2019, "Privacy Loss
Classes"; Doroshenko et al. 2022, arXiv:2207.04380). That is far below the sum of the runs' epsilons. It holds for
mechanisms whose noise, sampling and length are settled without looking at what the earlier ones gave out. Where people
choose those numbers by earlier results, the proof at hand is that of a Renyi filter (Feldman and Zrnic 2021,
arXiv:2008.11193); so the second opinion, by Renyi accounting (Mironov 2017, arXiv:1702.07476,
proposition 1), is worth more than one here.

>>> from fedseek.dp.accounting import PrivacyParams
>>> params = PrivacyParams(noise_multiplier=1.1, sampling_probability=0.15, delta=1e-5, l2_clip_norm=1.0)
>>> run = PrivacySpend(params, 67)
>>> round(run.epsilon(), 2), round(composed_epsilon([run, run], 1e-5), 2)
(7.41, 10.57)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import dp_accounting
from dp_accounting import rdp

from fedseek.dp.accounting import (
    NEIGHBORING_RELATION,
    RENYI_ORDERS,
    STATED_INTERVAL,
    PrivacySpend,
    dp_event,
    epsilon,
    fitting_interval,
    pld_accountant,
)
from fedseek.errors import UnsupportedMechanism

_Parts = tuple[tuple[float, float, int], ...]  # noise_multiplier, sampling_probability, steps


def composed_epsilon(spends: Sequence[PrivacySpend], delta: float) -> float:
    """Epsilon at ``delta`` of all these spends together, by the privacy loss distribution.

    Args:
        spends: of whatever mechanisms, in any order; a spend of no steps counts nothing. Their own deltas do not enter.
        delta: of the whole, in (0, 1).

    Guarantees:
        An upper bound on the true epsilon under ADD_OR_REMOVE_ONE, for a unit that is in the data of each of them;
        0 for no steps; for spends of one mechanism the figure of :func:`fedseek.dp.accounting.epsilon`.

    Raises:
        UnsupportedMechanism: a delta for which no guarantee exists.

    Cost:
        About 1 s a mechanism for the first call with given numbers, then cached; more for an epsilon in the hundreds.
    """
    parts = _parts(spends, delta)
    if len(parts) == 1:
        [(noise_multiplier, sampling_probability, steps)] = parts
        return epsilon(noise_multiplier, sampling_probability, num_steps=steps, delta=delta)
    return _by_pld(parts, delta) if parts else 0.0


def composed_epsilon_rdp(spends: Sequence[PrivacySpend], delta: float) -> float:
    """The second opinion on :func:`composed_epsilon`, by Renyi accounting: looser, by another proof and other code."""
    parts = _parts(spends, delta)
    return _by_rdp(parts, delta) if parts else 0.0


def _parts(spends: Sequence[PrivacySpend], delta: float) -> _Parts:
    """One entry a mechanism: the order of steps does not enter, nor how they were cut into rounds and runs."""
    if not 0 < delta < 1:
        raise UnsupportedMechanism(f"delta is {delta}, wanted in (0, 1)", hint="no privacy guarantee exists otherwise")
    steps = Counter[tuple[float, float]]()
    for spend in spends:
        steps[spend.params.noise_multiplier, spend.params.sampling_probability] += spend.num_steps
    return tuple((*mechanism, count) for mechanism, count in sorted(steps.items()) if count)


@lru_cache(maxsize=256)
def _by_pld(parts: _Parts, delta: float) -> float:
    # One grid for all: that of the mechanism with the largest loss. It errs high for the others, by little of the whole.
    accountant = pld_accountant(max(fitting_interval(noise, chance, STATED_INTERVAL) for noise, chance, _ in parts))
    for part in parts:
        accountant.compose(dp_event(*part))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def _by_rdp(parts: _Parts, delta: float) -> float:
    accountant = rdp.RdpAccountant(RENYI_ORDERS, dp_accounting.NeighboringRelation[NEIGHBORING_RELATION])
    for part in parts:
        accountant.compose(dp_event(*part))
    return float(accountant.get_epsilon(delta))
