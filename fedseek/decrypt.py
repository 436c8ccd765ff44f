"""Decrypt: the encrypted sum becomes a weighted mean, and the mean becomes new weights. Run by each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedseek.encode import Float32Vector, Float64Vector, SummedUpdate, UpdateLayout, decode_sum, num_ciphertexts
from fedseek.errors import Malformed
from fedseek.he.ciphertext import ScopedSum
from fedseek.he.keys import SecretKey, decrypt_slots
from fedseek.he.packing import Packing


def decrypt_sum(
    key: SecretKey,
    sums: Sequence[ScopedSum],
    *,
    layouts: Mapping[str, UpdateLayout],
    packing: Packing,
    value_ranges: Mapping[str, float],
    weight_cap: int,
) -> dict[str, SummedUpdate]:
    """Decrypt and decode the sum of a round.

    Guarantee: every returned sum holds exactly as many sites as the coordinator announced, counted under encryption.

    Args:
        key: the group key.
        sums: from the coordinator, untrusted; scopes this site is no member of are ignored.
        layouts: the scopes this site is a member of; each must be in ``sums``.
        packing: of the plan.
        value_ranges: C by scope, as they were when the updates were encoded.
        weight_cap: from the plan.

    Raises:
        Malformed: a scope is missing or repeated, a count is wrong, or the content is no sum of updates.
        WrongKey: made under another key.
    """
    by_scope = {each.scope: each for each in sums}
    if len(by_scope) != len(sums) or not set(layouts) <= set(by_scope):
        raise Malformed(f"sum: got scopes {[each.scope for each in sums]}; wanted {sorted(layouts)}, each once")
    decoded = {}
    for scope, layout in layouts.items():
        each = by_scope[scope]
        wanted = num_ciphertexts(layout, packing)
        if len(each.ciphertexts) != wanted:
            raise Malformed(f"sum of {scope!r}: got {len(each.ciphertexts)} ciphertexts; wanted {wanted}")
        slots = decrypt_slots(key, each.ciphertexts)
        summed = decode_sum(slots, layout, packing=packing, value_range=value_ranges[scope], weight_cap=weight_cap)
        if summed.contributors != each.contributors:
            raise Malformed(
                f"sum of {scope!r}: coordinator announced {each.contributors} sites, it holds {summed.contributors}"
            )
        decoded[scope] = summed
    return decoded


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
        New weights and new momentum; the arguments are not changed.

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
    # v <- beta v + mean; w <- w + eta v. Hsu et al. subtract: their update is initial - trained.
    new_momentum = momentum_factor * momentum + mean
    with np.errstate(over="ignore"):  # an overflow is refused below
        new_weights = (weights.astype(np.float64) + learning_rate * new_momentum).astype(np.float32)
    if not np.isfinite(new_weights).all():
        raise ValueError("apply_mean: a new weight is not finite")
    return new_weights, new_momentum
