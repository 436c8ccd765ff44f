"""The picture of a plan's privacy: epsilon for each noise, and epsilon round by round, by both accountants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fedseek.predict_privacy import PrivacyPrediction
from fedseek.svg import GRID, INK, QUIET, document, text

Points = Sequence[tuple[float, float | None]]
Line = tuple[Points, bool]  # dashed or not
Scale = tuple[Callable[[float], float], float, float]  # how a value becomes a length; least and largest value

_WIDTH, _HEIGHT, _GAP, _LEFT, _TOP = 320, 240, 110, 70, 70  # of a chart and around it; pixels
_MARK = "#1d5fbf"


def privacy_picture(name: str, prediction: PrivacyPrediction) -> str:
    """Draw both charts as a stand-alone SVG document; the same figures give the same text.

    Args:
        name: of the plan.
        prediction: what to draw.
    """
    levels, rounds, own = prediction.levels, prediction.by_round, prediction.plan
    by_noise: list[Line] = [
        ([(each.noise_multiplier, each.epsilon) for each in levels], False),
        ([(each.noise_multiplier, each.epsilon_rdp) for each in levels], True),
    ]
    start: list[tuple[float, float | None]] = [(0.0, 0.0)]
    by_round: list[Line] = [
        (start + [(each.round, each.epsilon) for each in rounds], False),
        (start + [(each.round, each.epsilon_rdp) for each in rounds], True),
    ]
    right = _LEFT + _WIDTH + _GAP
    about = f"{describe_stages(prediction)}, δ {prediction.delta:g}; dot: this plan"
    across = "noise multiplier" if len(prediction.stages) == 1 else "noise multiplier of the last stage"
    parts = [
        text(16, 24, f"Privacy of plan {name}", INK),
        text(16, 44, f"{about}; line: PLD, which is stated; dashed: RDP", QUIET),
        _chart(_LEFT, across, "ε", by_noise, (own.noise_multiplier, own.epsilon), logarithmic=True),
        _chart(right, "round", "ε so far", by_round, (rounds[-1].round, rounds[-1].epsilon), logarithmic=False),
    ]
    title = f"Privacy of plan {name}: epsilon for each noise multiplier, and round by round"
    return document(right + _WIDTH + 30, _TOP + _HEIGHT + 56, title=title, body="\n".join(parts))


def describe_stages(prediction: PrivacyPrediction) -> str:
    """How often a unit is drawn, stage by stage."""
    return ", then ".join(
        f"sampling probability {stage.sampling_probability:g}, {stage.num_steps:,} steps" for stage in prediction.stages
    )


def _chart(
    left: int, across: str, up: str, lines: Sequence[Line], mark: tuple[float, float | None], *, logarithmic: bool
) -> str:
    found = [(x, y) for points, _ in lines for x, y in points if y is not None]
    if not found:
        return text(left, _TOP + 20, "no bound on ε is found", QUIET)
    xs, ys = [x for x, _ in found], [y for _, y in found]
    x_scale, y_scale = (_scale(values, _log if logarithmic else float) for values in (xs, ys))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + _WIDTH * _part(x, x_scale), _TOP + _HEIGHT * (1 - _part(y, y_scale))

    parts = [_axes(left, across, up, x_scale, y_scale, logarithmic=logarithmic)]
    for points, dashed in lines:
        drawn = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points if y is not None)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{_MARK}" stroke-width="2"{dashes}/>')
    if mark[1] is not None:
        x, y = place(mark[0], mark[1])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{_MARK}"/>')
        parts.append(text(x - 8, y + 18, f"{mark[1]:.3g}", INK, anchor="end"))
    return "\n".join(parts)


def _axes(left: int, across: str, up: str, x_scale: Scale, y_scale: Scale, *, logarithmic: bool) -> str:
    floor, parts = _TOP + _HEIGHT, [text(left + _WIDTH / 2, _TOP + _HEIGHT + 42, across, QUIET, anchor="middle")]
    for tick in _ticks(x_scale, logarithmic=logarithmic):
        x = left + _WIDTH * _part(tick, x_scale)
        parts.append(text(x, floor + 20, f"{tick:g}", QUIET, anchor="middle"))
        parts.append(f'<path d="M{x:.1f} {floor}v4" stroke="{QUIET}"/>')
    for tick in _ticks(y_scale, logarithmic=logarithmic):
        y = floor - _HEIGHT * _part(tick, y_scale)
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH}" stroke="{GRID}"/>')
        parts.append(text(left - 8, y + 4, f"{tick:g}", QUIET, anchor="end"))
    parts.append(text(left - 40, _TOP - 8, up, QUIET))
    return "\n".join(parts)


def _scale(values: Sequence[float], bend: Callable[[float], float]) -> Scale:
    low, high = min(values), max(values)
    return bend, low, high if high > low else low * 1.1 + 1e-9


def _part(value: float, scale: Scale) -> float:
    bend, low, high = scale
    return (bend(value) - bend(low)) / (bend(high) - bend(low))


def _log(value: float) -> float:
    return math.log(max(value, 1e-9))


def _ticks(scale: Scale, *, logarithmic: bool) -> list[float]:
    """Round numbers within the scale: 1, 2 and 5 times powers of ten, or every so many of one of them.

    >>> _ticks((float, 0.0, 11.0), logarithmic=False), _ticks((_log, 0.6, 7.0), logarithmic=True)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 2.0, 5.0])
    """
    _, low, high = scale
    rounded = [factor * 10.0**power for power in range(-6, 7) for factor in (1, 2, 5)]
    if logarithmic:
        return [tick for tick in rounded if low <= tick <= high]
    step = next((tick for tick in rounded if (high - low) / tick <= 6), high - low)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
