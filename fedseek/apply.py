"""Apply: a decrypted mean becomes new weights. Run by each site, with the same result at all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedseek.encode import Float32Vector, Float64Vector, SummedUpdate, UpdateLayout, next_value_range, unflatten
from fedseek.lora.digest import tensors_digest
from fedseek.plan import Plan

_VALUES_A_PASS = 1 << 16  # so that what is worked out on the way takes no memory to speak of


@dataclass(frozen=True, slots=True, eq=False)
class ScopeState:
    """What every member of a scope holds between rounds, the same at all of them.

    Attributes:
        layout: names and shapes of the tensors.
        weights: float32, shape (num_values,).
        momentum: of the server step, float64, shape (num_values,).
        value_range: C of the quantiser.
    """

    layout: UpdateLayout
    weights: Float32Vector = field(repr=False)
    momentum: Float64Vector = field(repr=False)
    value_range: float

    def digest(self) -> bytes:
        """What a site signs about these tensors, 32 bytes."""
        return tensors_digest(unflatten(self.weights, self.layout))


def apply_sums(
    states: Mapping[str, ScopeState], summed: Mapping[str, SummedUpdate], plan: Plan
) -> dict[str, ScopeState]:
    """Take the server's step in every scope that has a sum; the others stay as they are.

    Raises:
        ValueError: a new weight is not finite.
    """
    applied = dict(states)
    for scope, update in summed.items():
        held = states[scope]
        weights, momentum = apply_mean(
            held.weights,
            update.mean,
            held.momentum,
            learning_rate=plan.spec.training.server_learning_rate,
            momentum_factor=plan.spec.training.server_momentum,
        )
        if not plan.spec.training.server_momentum:
            momentum = held.momentum  # zeros, and never used: nothing that a site would have to keep
        # with a guarantee for sites the range follows from the plan: it is the grid on which their noise was sized
        value_range = held.value_range if plan.site_level else next_value_range(update, held.value_range)
        applied[scope] = ScopeState(held.layout, weights, momentum, value_range)
    return applied


def enter_stage(states: Mapping[str, ScopeState], plan: Plan, number: int) -> dict[str, ScopeState]:
    """The states with which round ``number`` begins: in the first round of a later stage range and momentum start over.

    Both say how far the steps of the last stage went, which were of another task and at other rates: a momentum from there
    would go on for it, and a range that is too small for the new rates would cut off its first updates.
    """
    if number == 1 or number != plan.stage_of(number).first_round:
        return dict(states)
    return {
        scope: ScopeState(held.layout, held.weights, np.zeros(held.momentum.size), plan.initial_range(scope, number))
        for scope, held in states.items()
    }


def apply_mean(
    weights: Float32Vector,
    mean: Float64Vector,
    momentum: Float64Vector,
    *,
    learning_rate: float,
    momentum_factor: float,
) -> tuple[Float32Vector, Float64Vector]:
    """The server's optimiser step, which every site replays for itself.

    FedAvg with server momentum (FedAvgM): T.-M. H. Hsu, H. Qi, M. Brown, "Measuring the effects of non-identical data
    distribution for federated visual classification", arXiv:1909.06335. ``momentum_factor`` 0 and ``learning_rate`` 1
    are plain FedAvg.

    Guarantee: bit-identical at all sites. Each value takes the same IEEE 754 double operations in the same order, then
    one rounding to float32; nothing is summed across values.

    Args:
        weights: float32, shape (n,).
        mean: weighted mean of (trained - initial), float64, shape (n,).
        momentum: v of the last round, float64, shape (n,); zeros in the first.
        learning_rate: of the server, > 0.
        momentum_factor: beta, in [0, 1).

    Returns:
        New weights and new momentum; the arguments are not changed. At factor 0 the momentum is the mean itself.

    Raises:
        ValueError: shapes or types differ, a factor is out of range, or a new weight is not finite.
    """
    if not (weights.shape == mean.shape == momentum.shape and weights.ndim == 1):
        raise ValueError(f"apply_mean: shapes differ: {weights.shape}, {mean.shape}, {momentum.shape}")
    if [str(array.dtype) for array in (weights, mean, momentum)] != ["float32", "float64", "float64"]:
        raise ValueError(
            f"apply_mean: got {weights.dtype}, {mean.dtype}, {momentum.dtype}; wanted float32, float64 twice"
        )
    if not (0 < learning_rate < np.inf and 0 <= momentum_factor < 1):
        raise ValueError(
            f"apply_mean: learning_rate {learning_rate} wanted > 0, momentum_factor {momentum_factor} in [0, 1)"
        )
    new_weights, new_momentum = np.empty_like(weights), np.empty_like(mean) if momentum_factor else mean
    for start in range(0, weights.size, _VALUES_A_PASS):
        part = slice(start, start + _VALUES_A_PASS)
        # v <- beta v + mean; w <- w + eta v. Hsu et al. subtract: their update is initial - trained.
        moved = momentum_factor * momentum[part] + mean[part]
        with np.errstate(over="ignore"):  # an overflow is refused below
            new_weights[part] = weights[part].astype(np.float64) + learning_rate * moved
        if not np.isfinite(new_weights[part]).all():
            raise ValueError("apply_mean: a new weight is not finite")
        if momentum_factor:
            new_momentum[part] = moved
    return new_weights, new_momentum
