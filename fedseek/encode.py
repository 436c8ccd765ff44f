"""Encode: a model update becomes integers that add, and a sum of such integers becomes a weighted mean.

Run by a site, before encryption and after decryption. The update is multiplied by its weight, clipped to a range that
all sites share, rounded at random to ``value_bits`` bits, and packed. In front of the payload go header slots, one
integer each:

    tags | contributors (1 a site) | weight | values saturated | one fixed-point number a metric | packed values ...

The tags are left at zero here (``fedseek.tag`` fills them in), and zeros fill the last ciphertext.

Everything adds exactly, so the decoded sum equals the integer sum; the only error is the rounding each site made
(``quantiser_bound``). What is encoded has already been made private: saturation counts and rounding are
post-processing. The rounding generator guards no secret; it need not be cryptographic.

Source of stochastic rounding: D. Alistarh et al., "QSGD", NeurIPS 2017, section 3 (unbiased quantiser), here with a
range shared by all sites instead of each vector's norm, since a range of its own would tell others about a site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from fedseek.errors import Malformed
from fedseek.he.packing import Packing, spans, unpack_span
from fedseek.secagg.mac import NUM_TAGS

Float32Vector = npt.NDArray[np.float32]
Float64Vector = npt.NDArray[np.float64]
Slots = npt.NDArray[np.uint64]

# Header, after the tags: contributors, weight, saturated.
_NUM_COUNTS = 3

# Metrics travel as round(value * 2^16): each site's rounding is off by at most 2^-17.
METRIC_SCALE = 1 << 16

# The next range: see next_value_range.
_HEADROOM = 1.5
_SATURATION_TOLERATED = 1e-4
_MAX_SHRINK = 4.0
_SMALLEST_RANGE, _LARGEST_RANGE = 2.0**-40, 2.0**40


@dataclass(frozen=True, slots=True)
class UpdateLayout:
    """Order and shapes of what one scope's update vector holds; equal at all sites of the scope.

    Attributes:
        scope: name of the group of sites whose updates are summed.
        tensors: (name, shape) in vector order; none for a kind without a head, whose metrics travel all the same.
        metrics: names of the numbers that ride along, in header order.

    Raises:
        ValueError: neither tensors nor metrics, an empty tensor, or a repeated name.
    """

    scope: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.tensors]
        for kind, given in (("tensor", names), ("metric", list(self.metrics))):
            if len(set(given)) != len(given):
                raise ValueError(f"layout {self.scope!r}: repeated {kind} names in {given}")
        if not (names or self.metrics) or any(size < 1 for _, shape in self.tensors for size in shape):
            raise ValueError(
                f"layout {self.scope!r}: wanted at least one tensor or metric, and no empty tensors, got {self.tensors}"
            )

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the vector, then the end: len(tensors) + 1 numbers."""
        return tuple(accumulate((math.prod(shape) for _, shape in self.tensors), initial=0))

    @property
    def num_values(self) -> int:
        """Length of the update vector."""
        return self.offsets[-1]

    @property
    def num_header_slots(self) -> int:
        """Slots in front of the packed values."""
        return NUM_TAGS + _NUM_COUNTS + len(self.metrics)


@dataclass(frozen=True, slots=True, eq=False)
class SummedUpdate:
    """What a decrypted sum says about one scope.

    Attributes:
        contributors: sites in the sum.
        weight: sum of their weights.
        mean: weighted mean of their updates, float64, shape (num_values,).
        metrics: sum of each metric over the sites.
        saturated_fraction: values that met the range's edge, of all values of all sites; 0 where there are none.
        weight_fraction: weight / (contributors * weight_cap): mean times this is the mean of what was quantised.
    """

    contributors: int
    weight: int
    mean: Float64Vector
    metrics: Mapping[str, float]
    saturated_fraction: float
    weight_fraction: float


def num_slots(layout: UpdateLayout, packing: Packing) -> int:
    """Slots of one encoded update, without what fills the last ciphertext."""
    return layout.num_header_slots + packing.num_slots(layout.num_values)


def num_ciphertexts(layout: UpdateLayout, packing: Packing) -> int:
    """Ciphertexts of one encrypted update."""
    return -(-num_slots(layout, packing) // packing.params.slot_count)


def flatten(tensors: Mapping[str, npt.NDArray[np.float32]], layout: UpdateLayout) -> Float32Vector:
    """Lay tensors out as one vector.

    Returns:
        float32, shape (num_values,).

    Raises:
        ValueError: names, shapes or types are not those of the layout.
    """
    if set(tensors) != {name for name, _ in layout.tensors}:
        raise ValueError(
            f"layout {layout.scope!r}: tensors do not match: {sorted(set(tensors) ^ set(dict(layout.tensors)))}"
        )
    vector = np.empty(layout.num_values, dtype=np.float32)
    for (name, shape), start, end in zip(layout.tensors, layout.offsets, layout.offsets[1:], strict=False):
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != np.float32:
            raise ValueError(
                f"tensor {name!r}: got {tensor.dtype} of shape {tensor.shape}; wanted float32 of shape {shape}"
            )
        vector[start:end] = tensor.reshape(-1)
    return vector


def unflatten(vector: npt.NDArray[np.floating], layout: UpdateLayout) -> dict[str, npt.NDArray[np.floating]]:
    """Undo ``flatten``; the tensors are views of ``vector`` and keep its type.

    Raises:
        ValueError: the vector's length is not the layout's.
    """
    if vector.shape != (layout.num_values,):
        raise ValueError(
            f"layout {layout.scope!r}: got a vector of shape {vector.shape}; wanted ({layout.num_values},)"
        )
    offsets = layout.offsets
    return {
        name: vector[start:end].reshape(shape)
        for (name, shape), start, end in zip(layout.tensors, offsets, offsets[1:], strict=False)
    }


def encode_update(
    vector: Float32Vector,
    layout: UpdateLayout,
    *,
    packing: Packing,
    value_range: float,
    weight: int,
    weight_cap: int,
    metrics: Mapping[str, float],
    rng: np.random.Generator | None = None,
) -> Slots:
    """Encode one site's update of one scope. Run by a site.

    Guarantees:
        unbiased: without saturation the expected decoded value is ``vector`` times weight / weight_cap, to within
        2^-24 of a quantiser step (the rounding draws have 24 bits). -C, 0 and C are exact.
        bounded influence: no site moves a sum by more than C a value, whatever its vector.

    Edge cases:
        value beyond C: clipped and counted as saturated; exactly C is not counted.
        NaN or infinity: ValueError, nothing is encoded.

    Args:
        vector: the update, float32, shape (num_values,).
        layout: of the scope.
        packing: of the plan.
        value_range: C > 0, the same at all sites; bounds vector * weight / weight_cap.
        weight: of this site, a number of records or 1; in [1, weight_cap].
        weight_cap: largest weight of any site, from the plan.
        metrics: exactly the layout's metrics, each in [0, packing.header_bound / METRIC_SCALE].
        rng: draws for the rounding; by default seeded by the operating system.

    Returns:
        Slots, shape (num_ciphertexts(layout, packing) * slots a ciphertext,).

    Raises:
        ValueError: an argument is out of its range.

    Cost: about 25 ns a value; memory for the slots alone.
    """
    _check_encodable(vector, layout, packing, value_range, weight, weight_cap)
    factor, draws = weight / weight_cap, rng or np.random.default_rng()
    return _fill_slots(
        lambda part: _quantise(vector[part], factor, value_range=value_range, levels=packing.levels, rng=draws),
        layout,
        packing=packing,
        weight=weight,
        metrics=metrics,
    )


def encode_integers(
    numbers: npt.NDArray[np.int64], layout: UpdateLayout, *, packing: Packing, metrics: Mapping[str, float]
) -> Slots:
    """Encode integers of one scope that are rounded and noised already, at weight 1. Run by a site.

    A number beyond ``packing.levels`` is clamped and counted as saturated: ``fedseek.dp.site_level`` has paid for that.
    The numbers are int64, shape (num_values,), in steps of value_range / packing.levels; the rest as in ``encode_update``.

    Raises:
        ValueError: an argument is out of its range.
    """
    most = packing.levels
    if numbers.shape != (layout.num_values,) or numbers.dtype != np.int64 or numbers.size > packing.header_bound:
        raise ValueError(
            f"update of {layout.scope!r}: got {numbers.dtype} of shape {numbers.shape}; wanted int64 of shape "
            f"({layout.num_values},), at most {packing.header_bound} values"
        )

    def clamp(part: slice) -> tuple[Slots, int]:
        clamped = np.clip(numbers[part], -most, most)
        return (clamped + most).astype(np.uint64), int(np.count_nonzero(clamped != numbers[part]))

    return _fill_slots(clamp, layout, packing=packing, weight=1, metrics=metrics)


def decode_sum(
    slots: Slots, layout: UpdateLayout, *, packing: Packing, value_range: float, weight_cap: int
) -> SummedUpdate:
    """Decode a sum of encoded updates. Run by a site.

    Args:
        slots: the sum, at least num_slots(layout, packing) of them; what follows is padding.
        layout: of the scope.
        packing: of the plan.
        value_range: C as it was when the updates were encoded.
        weight_cap: from the plan.

    Raises:
        Malformed: no set of sites that follows the protocol produces such a sum.
    """
    needed = num_slots(layout, packing)
    if slots.ndim != 1 or slots.size < needed:
        raise Malformed(f"sum of {layout.scope!r}: got slots of shape {slots.shape}; wanted at least {needed}")
    header = [int(slot) for slot in slots[NUM_TAGS : layout.num_header_slots]]
    contributors, weight, saturated = header[:_NUM_COUNTS]
    _check_counts(header, layout, packing=packing, weight_cap=weight_cap)
    content, most = slots[layout.num_header_slots : needed], packing.levels
    mean = np.empty(layout.num_values, dtype=np.float64)
    for span in spans(layout.num_values, packing):
        digits = unpack_span(content, span, packing)
        if int(digits.max()) > 2 * most * contributors:
            raise Malformed(f"sum of {layout.scope!r}: a value exceeds what {contributors} sites can add up to")
        part = mean[span.values]
        part[:] = digits
        part -= most * contributors
        part *= value_range / most * weight_cap / weight
    return SummedUpdate(
        contributors=contributors,
        weight=weight,
        mean=mean,
        metrics={name: total / METRIC_SCALE for name, total in zip(layout.metrics, header[_NUM_COUNTS:], strict=True)},
        saturated_fraction=saturated / max(contributors * layout.num_values, 1),
        weight_fraction=weight / (contributors * weight_cap),
    )


def quantiser_bound(packing: Packing, *, value_range: float, contributors: int, weight: int, weight_cap: int) -> float:
    """Largest error of any value of a decoded mean against the exact weighted mean, when nothing saturated.

    Each site's rounding moves a value by less than one step, C / levels; the mean divides the sum of those by
    weight / weight_cap. The second term covers float64 arithmetic: a few operations of 2^-53 each on values up to C.
    """
    steps = contributors / packing.levels + contributors * 2.0**-48
    return value_range * steps * weight_cap / weight


def next_value_range(summed: SummedUpdate, current: float) -> float:
    """The range C of the next round, from this round's aggregate alone: no site's own range is ever sent.

    Every site computes it for itself, so it is exact arithmetic and a power of two. Rule, and why:
        - 1.5 sqrt(S) times the largest mean value, as quantised: where noise dominates, S independent updates average
          to 1/sqrt(S) of one of them, so this restores the size of one site's values; 1.5 is headroom.
        - at least twice the current range when more than 1e-4 of the values saturated: clipping biases the mean
          towards zero, which also hides how far the range is short.
        - at least a quarter of the current range: one round in which updates cancel does not ruin the next.
        - within [2^-40, 2^40], never zero.
    A scope without values keeps the range it has.

    Args:
        summed: the decoded sum of this round.
        current: C of this round, > 0.
    """
    if not summed.mean.size:
        return current
    largest = float(max(summed.mean.max(), -summed.mean.min())) * summed.weight_fraction
    wanted = max(_HEADROOM * math.sqrt(summed.contributors) * largest, current / _MAX_SHRINK)
    if summed.saturated_fraction > _SATURATION_TOLERATED:
        wanted = max(wanted, 2 * current)
    mantissa, exponent = math.frexp(min(max(wanted, _SMALLEST_RANGE), _LARGEST_RANGE))
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def _fill_slots(
    digits_of: Callable[[slice], tuple[Slots, int]],
    layout: UpdateLayout,
    *,
    packing: Packing,
    weight: int,
    metrics: Mapping[str, float],
) -> Slots:
    """Header and packed values; ``digits_of`` gives those of a part of the vector, and how many saturated."""
    in_header = _encode_metrics(metrics, layout, packing)
    slots = np.zeros(num_ciphertexts(layout, packing) * packing.params.slot_count, dtype=np.uint64)
    content = slots[layout.num_header_slots : num_slots(layout, packing)]
    saturated = 0
    for span in spans(layout.num_values, packing):
        digits, beyond = digits_of(span.values)
        content[span.slots] |= digits << span.shift
        saturated += beyond
    slots[: layout.num_header_slots] = [*(0,) * NUM_TAGS, 1, weight, saturated, *in_header]
    return slots


def _check_encodable(
    vector: Float32Vector, layout: UpdateLayout, packing: Packing, value_range: float, weight: int, weight_cap: int
) -> None:
    if vector.shape != (layout.num_values,) or vector.dtype != np.float32:
        raise ValueError(
            f"update of {layout.scope!r}: got {vector.dtype} of shape {vector.shape}; "
            f"wanted float32 of shape ({layout.num_values},)"
        )
    num_finite = sum(int(np.isfinite(vector[span.values]).sum()) for span in spans(vector.size, packing))
    if num_finite < vector.size:
        raise ValueError(f"update of {layout.scope!r}: {vector.size - num_finite} values are not finite")
    if not (math.isfinite(value_range) and value_range > 0):
        raise ValueError(f"value_range: got {value_range}; wanted a finite number > 0")
    if not 1 <= weight <= weight_cap <= packing.header_bound:
        raise ValueError(
            f"weight: got {weight} of cap {weight_cap}; wanted 1 <= weight <= cap <= {packing.header_bound}"
        )
    if layout.num_values > packing.header_bound:
        raise ValueError(f"{layout.scope!r}: {layout.num_values} values; wanted at most {packing.header_bound}")


def _quantise(
    part: Float32Vector, weight_factor: float, *, value_range: float, levels: int, rng: np.random.Generator
) -> tuple[Slots, int]:
    """Round ``part * weight_factor`` to digits in [0, 2 * levels]; also count what was clipped."""
    # Divide by C before multiplying by the number of levels, so that C itself lands on a level exactly.
    scaled = part * np.float64(weight_factor)
    scaled /= value_range
    saturated = int(np.count_nonzero(np.abs(scaled) > 1))
    np.clip(scaled, -1, 1, out=scaled)
    scaled *= levels
    # floor(x) + Bernoulli(x - floor(x)) has mean x.
    low = np.floor(scaled)
    scaled -= low
    low += rng.random(scaled.size, dtype=np.float32) < scaled
    low += levels
    return low.astype(np.uint64), saturated


def _encode_metrics(metrics: Mapping[str, float], layout: UpdateLayout, packing: Packing) -> list[int]:
    if set(metrics) != set(layout.metrics):
        raise ValueError(f"metrics: got {sorted(metrics)}; wanted {sorted(layout.metrics)}")
    bound = packing.header_bound / METRIC_SCALE
    for name, value in metrics.items():
        if not 0 <= value <= bound:  # also refuses NaN
            raise ValueError(f"metric {name!r}: got {value}; wanted 0 to {bound:g}")
    return [round(metrics[name] * METRIC_SCALE) for name in layout.metrics]


def _check_counts(header: list[int], layout: UpdateLayout, *, packing: Packing, weight_cap: int) -> None:
    contributors, weight, saturated = header[:_NUM_COUNTS]
    if not 1 <= contributors <= packing.max_sites:
        raise Malformed(f"sum of {layout.scope!r}: holds {contributors} sites; wanted 1 to {packing.max_sites}")
    if not contributors <= weight <= contributors * weight_cap:
        raise Malformed(f"sum of {layout.scope!r}: {contributors} sites cannot weigh {weight} at a cap of {weight_cap}")
    if saturated > contributors * layout.num_values:
        raise Malformed(f"sum of {layout.scope!r}: counts {saturated} saturated values, more than it has")
    for name, total in zip(layout.metrics, header[_NUM_COUNTS:], strict=True):
        if total > contributors * packing.header_bound:
            raise Malformed(f"sum of {layout.scope!r}: metric {name!r} is {total}, more than its sites can add up to")
