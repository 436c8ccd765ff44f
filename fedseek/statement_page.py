"""The privacy statement in words, as Markdown, in any language that there is a table of words for.

One piece of code renders them all, so that no language says more or less than another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

from fedseek.plan import Plan
from fedseek.statement import CanaryAudit, PrivacyStatement, SiteLevel
from fedseek.statement_words import Words

_MARKDOWN: Final = re.compile(r"([\\`*_\[\]<>|#])")
# told in a place of their own
_APART: Final = frozenset({"stages", "site_level", "audit", "guards_passed", "checks", "not_covered"})


def describe_guarantee(statement: PrivacyStatement, words: Words) -> str:
    """What the site guarantees, in one sentence that begins with its name."""
    name = f"{_plain(statement.site)} ({_plain(statement.kind)}){words.colon}"
    if statement.epsilon is None or statement.delta is None:
        return name + words.nothing
    told = words.guarantee.format(
        epsilon=_rounded_up(statement.epsilon),
        delta=f"{statement.delta:g}",
        unit=words.term(statement.unit),
        relation=words.term(statement.neighboring_relation),
    )
    return name + told


def describe_statement(statement: PrivacyStatement, words: Words) -> str:
    """Everything that one site states, but for what is not covered, which is the same for all."""
    parts = [f"## {_plain(statement.site)} ({_plain(statement.kind)})", describe_guarantee(statement, words)]
    if statement.site not in statement.contributors:
        parts.append(words.not_in_adapter)
    shown = {name: _value(getattr(statement, name), words) for name in words.fields if name not in _APART}
    if statement.max_records_per_unit is None:
        shown["max_records_per_unit"] = words.unlimited
    parts.append(
        _table(words.columns[0], [(label, shown[name]) for name, label in words.fields.items() if name in shown])
    )
    stages = [
        (str(number), *(_value(getattr(stage, name), words) for name in words.stage))
        for number, stage in enumerate(statement.stages, 1)
    ]
    parts += [f"### {words.fields['stages']}", _table(("#", *words.stage.values()), stages)]
    parts += _part(words.fields["site_level"], statement.site_level, words.site_level, words)
    parts += _part(words.fields["audit"], statement.audit, words.audit, words)
    guards = [(f"`{name}`", words.guards.get(name, "")) for name in statement.guards_passed]
    parts += [f"### {words.fields['guards_passed']}", _table(words.columns[1], guards) if guards else words.none]
    checks = [
        (words.checks.get(check.name, f"`{check.name}`"), f"`{check.wanted}`", f"`{check.got}`")
        for check in statement.checks
    ]
    parts += [f"### {words.fields['checks']}", _table(words.columns[2], checks)]
    return "\n\n".join(parts)


def privacy_page(plan: Plan, statements: Sequence[PrivacyStatement], words: Words, *, unsigned: Sequence[str]) -> str:
    """The page of a release: every site's statement, and what none of them covers.

    Args:
        plan: of the run.
        statements: of one run, at least one.
        words: of a language.
        unsigned: sites whose updates are in the adapter and that state nothing.
    """
    first = statements[0]
    intro = words.intro.format(
        name=_plain(plan.spec.name), run=_plain(first.run), plan=first.plan_digest, roster=first.roster_digest
    )
    parts = [f"# {words.title}", intro]
    if unsigned:
        parts.append(words.unsigned.format(sites=words.comma.join(_plain(name) for name in unsigned)))
    parts += [describe_statement(statement, words) for statement in statements]
    lines = dict.fromkeys(line for statement in statements for line in statement.not_covered)
    parts += [f"## {words.not_covered_title}", "\n".join(f"- {words.term(line)}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _part(title: str, part: SiteLevel | CanaryAudit | None, labels: Mapping[str, str], words: Words) -> list[str]:
    if part is None:
        return [f"### {title}", words.none]
    rows = [(label, _value(getattr(part, name), words)) for name, label in labels.items()]
    return [f"### {title}", _table(words.columns[0], rows)]


def _value(value: object, words: Words) -> str:
    if value is None:
        return words.none
    if isinstance(value, str):
        return _plain(words.term(value))
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "<br>".join(f"{_plain(name)} `{digest}`" for name, digest in value.items()) or words.none
    if isinstance(value, tuple):
        return words.comma.join(_plain(str(each)) for each in value) or words.none
    return str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Text on one line that Markdown shows as it is: a site may have any name, and a run too."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _rounded_up(epsilon: float) -> str:
    """Two decimals, never less than it is: it is an upper bound."""
    return f"{math.ceil(round(epsilon * 100, 6)) / 100:.2f}"
