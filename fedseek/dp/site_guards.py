"""Run-time guards of the guarantee for whole sites: what a site is about to send was clipped, and its share of noise is in it.

    site_update_clipped  an update that reached the sum longer than the clip norm: the noise was sized for less
    site_noise_added     a share of noise that is missing or too small: the sum of all shares falls short of the plan

As in ``fedseek.dp.guards``: one that holds returns its name, one that does not raises ``GuardTripped``.
"""

from __future__ import annotations

import math
from typing import Final

from fedseek.errors import GuardTripped

SITE_UPDATE_CLIPPED: Final = "site_update_clipped"
SITE_NOISE_ADDED: Final = "site_noise_added"

SITE_LEVEL_GUARDS: Final = (SITE_UPDATE_CLIPPED, SITE_NOISE_ADDED)
"""What every update must pass before it is sent, where the plan has a guarantee for whole sites."""

# One false alarm in a billion rounds.
_LOG_FALSE_ALARM: Final = math.log(1e9)


def check_site_update_clipped(sum_of_squares: int, *, norm_bound: int) -> str:
    """The rounded update is no longer than the clip norm: in integers, so to the last bit. Every update.

    Args:
        sum_of_squares: of the integers before noise, over all scopes that are sent.
        norm_bound: of the plan.
    """
    if not 0 <= sum_of_squares <= norm_bound**2:
        raise GuardTripped(
            SITE_UPDATE_CLIPPED,
            f"the update about to be sent has norm {math.sqrt(abs(sum_of_squares)):.6g}, wanted at most {norm_bound} steps",
            hint="an update must be clipped, rounded and checked before its noise is added",
        )
    return SITE_UPDATE_CLIPPED


def check_site_noise_added(sum_of_squares: int, num_values: int, *, variance: int) -> str:
    """What was added to the integers of one scope has the variance of the plan, up to chance. Every update.

    Args:
        sum_of_squares: of the noised integers minus those before noise.
        num_values: of them.
        variance: of a share, from the plan.
    """
    # A sum S of independent numbers >= 0: P(S <= E S - x) <= exp(-x^2 / (2 sum of E X_i^2)) (Maurer 2003, theorem 2.1);
    # here X_i is a squared draw, and the fourth moment of a discrete Gaussian of sigma >= 4 is 3 sigma^4.
    least = variance * (num_values - math.sqrt(6 * num_values * _LOG_FALSE_ALARM))
    if not sum_of_squares > max(least, 0.0) * (1 - 1e-6):
        std = math.sqrt(max(sum_of_squares, 0) / max(num_values, 1))
        raise GuardTripped(
            SITE_NOISE_ADDED,
            f"the share of noise has standard deviation {std:.4g}, wanted {math.sqrt(variance):.4g} steps",
        )
    return SITE_NOISE_ADDED
