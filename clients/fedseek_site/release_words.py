"""A release in plain words, for somebody who is asked to approve it: the privacy statement that the site would sign."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from fedseek.errors import Malformed
from fedseek.statement import parse_statement
from fedseek.statement_page import describe_statement
from fedseek.statement_words import CHINESE, ENGLISH, Words
from fedseek_site.local_releases import ReleaseShown
from fedseek_site.plan_words import visible

LANGUAGES: Final[Mapping[str, Words]] = {"en": ENGLISH, "zh": CHINESE}


def describe_release(shown: ReleaseShown, language: str) -> Iterator[str]:
    """Line by line, what is signed for. Characters that a terminal would obey or hide are written out.

    Raises:
        Malformed, TooLarge: the statement does not parse, or speaks of another run, plan, site or weights than the
            release that it comes with.
    """
    words, statement = LANGUAGES[language], parse_statement(shown.statement)
    told = (statement.run, statement.plan_digest, statement.site, statement.tensors)
    wanted = (shown.run, shown.plan, shown.site, {scope: digest.hex() for scope, digest in shown.digests.items()})
    if told != wanted:
        raise Malformed(f"release {shown.digest[:12]}: its statement speaks of {told}, wanted {wanted}")
    text = describe_statement(statement, words).splitlines()
    lines = [
        *text,
        "",
        f"### {words.not_covered_title}",
        "",
        *(f"- {words.term(each)}" for each in statement.not_covered),
    ]
    yield from map(visible, lines)
