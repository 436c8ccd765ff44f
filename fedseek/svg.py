"""The few pieces of SVG that pictures are made of here, written by hand: who checks a plan or an audit has no drawing library."""

from __future__ import annotations

from html import escape
from typing import Final

INK: Final = "#10203a"
QUIET: Final = "#6a7383"
GRID: Final = "#e2e5ea"

_STYLE: Final = "font-family: system-ui, sans-serif; font-size: 13px"


def document(width: float, height: float, *, title: str, body: str) -> str:
    """A stand-alone document on white; ``body`` is markup, ``title`` is text."""
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" style="{_STYLE}">
<title>{escape(title)}</title>
<rect width="100%" height="100%" fill="#ffffff"/>
{body}
</svg>
"""


def text(x: float, y: float, words: str, colour: str, *, anchor: str = "start") -> str:
    """One line of text; nothing in ``words`` is markup."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'
