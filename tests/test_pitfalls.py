"""The table of traps, guards and tests in docs/pitfalls.md is complete, and what it names is there."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedseek.dp import guards

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "pitfalls.md").read_text("utf-8")
HEADING = "### Traps, guards, tests"
EVERY_GUARD = (*guards.TRAINING_GUARDS, guards.NO_UNNOISED_METRICS)


@dataclass(frozen=True)
class Row:
    trap: str
    guards: tuple[str, ...]
    places: tuple[str, ...]
    tests: tuple[str, ...]


def table() -> list[Row]:
    section = PAGE[PAGE.index(HEADING) :]
    section = section[: section.index("\n## ")]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [Row(trap.strip(), *(tuple(re.findall(r"`([^`]+)`", cell)) for cell in rest)) for trap, *rest in lines[1:]]


def source_of(reference: str) -> str:
    """The text of ``path.py:name`` or ``path.py:Class.name``."""
    path, _, name = reference.partition(":")
    text = (ROOT / path).read_text("utf-8")
    body = ast.parse(text).body
    for part in name.split("."):
        node = next(each for each in body if getattr(each, "name", None) == part)
        body = getattr(node, "body", [])
    decorators = "\n".join(ast.unparse(each) for each in node.decorator_list)
    return f"{decorators}\n{ast.get_source_segment(text, node)}"


ROWS = table()
GUARDED = [row for row in ROWS if row.guards]


def test_each_silent_trap_is_in_the_table():
    numbers = {int(number) for row in ROWS for number in re.findall(r"^(\d+)\.", row.trap)}
    assert numbers == set(range(1, 11))


def test_each_guard_is_in_the_table_and_no_other():
    named = {guard for row in ROWS for guard in row.guards}
    assert named == set(EVERY_GUARD)


@pytest.mark.parametrize("row", GUARDED, ids=[row.guards[0] for row in GUARDED])
def test_a_guard_looks_where_the_table_says(row):
    checks = [line for line in guards.__dict__ if line.startswith("check_")]
    assert row.places
    for place in row.places:
        calls = re.findall(r"\b(check_\w+)\(", source_of(place))
        assert set(calls) & set(checks), place


@pytest.mark.parametrize("row", GUARDED, ids=[row.guards[0] for row in GUARDED])
def test_the_tests_named_see_the_guard_of_their_trap_trip(row):
    assert row.tests
    for test in row.tests:
        assert test.partition(":")[2].startswith("test_")
        assert any(guard in source_of(test) for guard in row.guards), f"{test} does not name {row.guards}"


@pytest.mark.parametrize("row", [row for row in ROWS if not row.guards], ids=lambda row: row.trap[:30])
def test_what_needs_no_guard_has_a_test_too(row):
    assert row.places
    assert row.tests
    assert all(source_of(reference) for reference in (*row.places, *row.tests))
