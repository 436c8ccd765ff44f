"""The picture of a canary audit: for each site two bounds on epsilon, its claim, and what so many canaries could refute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedseek.svg import GRID, INK, QUIET, document, text

_LEFT, _WIDTH, _RIGHT = 240, 420, 220  # names, bars, words; pixels
_ROW, _TOP = 30, 54
_HOLDS, _REFUTED = "#1d5fbf", "#b3261e"


@dataclass(frozen=True, slots=True)
class AuditBar:
    """One bar.

    Attributes:
        site: its name.
        seen: what the guesses were made from.
        bound: lower bound on epsilon.
        right: guesses that were right, of those the bound is from.
        made: guesses.
        claim: epsilon claimed; None for none.
        could_refute: the bound if all guesses were right.
    """

    site: str
    seen: str
    bound: float
    right: int
    made: int
    claim: float | None
    could_refute: float


def audit_picture(bars: Sequence[AuditBar]) -> str:
    """Draw the bars as a stand-alone SVG document; the same bars give the same text."""
    longest = max((max(bar.bound, bar.could_refute, bar.claim or 0.0) for bar in bars), default=0.0) or 1.0
    height = _TOP + _ROW * len(bars) + 34
    body = "\n".join(_row(bar, _TOP + _ROW * number, longest) for number, bar in enumerate(bars))
    parts = [
        text(16, 24, "Canary audit: epsilon is at least the bar; the line is what the site claims", INK),
        body,
        text(_LEFT, height - 12, f"0 to {longest:.3g}; light: what so many canaries could refute", QUIET),
    ]
    title = "Lower bounds on epsilon from canaries, against the epsilon claimed"
    return document(_LEFT + _WIDTH + _RIGHT, height, title=title, body="\n".join(parts))


def _row(bar: AuditBar, top: int, longest: float) -> str:
    def across(value: float) -> float:
        return round(_WIDTH * value / longest, 1)

    refuted = bar.claim is not None and bar.bound > bar.claim
    parts = [
        text(16, top + 15, f"{bar.site}, {bar.seen}", INK),
        f'<rect x="{_LEFT}" y="{top}" width="{across(bar.could_refute)}" height="20" fill="{GRID}"/>',
        f'<rect x="{_LEFT}" y="{top + 4}" width="{across(bar.bound)}" height="12" fill="{_REFUTED if refuted else _HOLDS}"/>',
    ]
    if bar.claim is not None:
        at = _LEFT + across(bar.claim)
        parts.append(f'<line x1="{at}" y1="{top - 3}" x2="{at}" y2="{top + 23}" stroke="{INK}" stroke-width="2"/>')
    words = f"{bar.bound:.2f}; {bar.right} of {bar.made} guesses right"
    return "\n".join([*parts, text(_LEFT + _WIDTH + 12, top + 15, words, _REFUTED if refuted else QUIET)])
