"""What the report's sections are made of: tables, charts, and figures in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulations.summary import Summary


@dataclass(frozen=True, slots=True)
class Table:
    """A table as text: a header and rows; the first column names the row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with its caption and its numbers."""

    caption: str
    drawing: str
    numbers: Table


def by_round(summary: Summary, site: str, field: str) -> list[float | None]:
    """Return one field of one site for each round, None where the site took no part."""
    found = [{entry.site: getattr(entry, field) for entry in turn.sites} for turn in summary.rounds]
    return [values.get(site) for values in found]


def round_table(series: Sequence[tuple[str, Sequence[float | None]]]) -> Table:
    """A row for each round, a column for each series."""
    turns = range(max((len(values) for _, values in series), default=0))
    rows = (
        (str(turn), *(number_words(values[turn] if turn < len(values) else None) for _, values in series))
        for turn in turns
    )
    return Table(("round", *(name for name, _ in series)), tuple(rows))


def number_words(value: float | None) -> str:
    """Three decimals below 10, three significant figures above, two if tiny; a dash where nothing was measured.

    >>> number_words(0.8614), number_words(123.4), number_words(0.00042), number_words(None)
    ('0.861', '123', '0.00042', '–')
    """
    if value is None:
        return "–"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}"
