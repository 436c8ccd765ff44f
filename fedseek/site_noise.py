"""Site noise: an update becomes integers that add, with this site's share of noise in them. Run by a site, for encode.

Only where the plan has a guarantee for whole sites (``[privacy.site]``); the mechanism is ``fedseek.dp.site_level``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedseek.dp.site_level import SiteLevelParams
from fedseek.dp.site_share import noise_update
from fedseek.encode import Float32Vector, Slots, UpdateLayout, encode_integers
from fedseek.he.packing import Packing
from fedseek.plan import GLOBAL_SCOPE


def encode_noised(
    updates: Mapping[str, Float32Vector],
    layouts: Mapping[str, UpdateLayout],
    *,
    params: SiteLevelParams,
    packing: Packing,
    metrics: Mapping[str, float],
) -> tuple[dict[str, Slots], tuple[str, ...]]:
    """Clip, round, noise and encode one site's update of a round.

    The noise is drawn here: a caller that must answer a repeated request keeps the first result and sends that again.

    Args:
        updates: by scope, float32, shape (num_values,): all that this site sends in the round, since one clip is for all.
            A scope without values gets no noise: it has nothing to hide.
        layouts: by scope.
        params: of the plan.
        packing: of the plan.
        metrics: by name; a scope takes those of its layout.

    Returns:
        Slots by scope, and the names of the guards that held.

    Raises:
        GuardTripped: the clip did not hold, or the noise is not there; nothing may be sent.
        UnsupportedMechanism: the update has too many values for the plan's grid.
    """
    numbers: dict[str, npt.NDArray[np.int64]] = {scope: np.zeros(0, np.int64) for scope in updates}
    guards_passed: tuple[str, ...] = ()
    valued = {scope: update for scope, update in updates.items() if update.size}  # noise on no values shows no guard
    if valued:
        noised = noise_update(valued, params, variances={scope: share_variance(params, scope) for scope in valued})
        numbers |= noised.numbers
        guards_passed = noised.guards_passed
    slots = {
        scope: encode_integers(
            each, layouts[scope], packing=packing, metrics={name: metrics[name] for name in layouts[scope].metrics}
        )
        for scope, each in numbers.items()
    }
    return slots, guards_passed


def share_variance(params: SiteLevelParams, scope: str) -> int:
    """Variance of a site's share of noise in a scope, in squared steps: fewer sites sum a head, so each adds more."""
    return params.adapter_variance if scope == GLOBAL_SCOPE else params.head_variance
