from __future__ import annotations

import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fedseek.statement import NOT_COVERED
from simulations.charts import COLOURS, PHASES, lines_by_round, spread, stacked_bars
from simulations.report import headline, render_report, write_report
from simulations.summary import Summary
from simulations.verdicts import with_verdicts

Figures = Callable[..., dict[str, Any]]
Summaries = Callable[..., Summary]

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects what a page consists of, and that its elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def drawing(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))  # noqa: S314


def test_the_report_holds_the_outcome_in_words_and_figures(made_up_summary: Summaries) -> None:
    text = Page(render_report(made_up_summary())).text
    assert "At all 4 sites, the shared adapter beats training alone." in text
    assert "ε = 7.86" in text
    assert "δ = 1e-5" in text
    assert "0.65 × plain float32 (7.08 MB)" in text
    assert re.search(r"仁济医院 0\.580 0\.750 0\.800 0\.570 0\.500", text)
    assert all(line[1:] in text for line in NOT_COVERED)
    assert text.count("✓ met") == 5


def test_the_report_needs_nothing_from_outside_and_runs_nothing(made_up_summary: Summaries) -> None:
    html = render_report(made_up_summary())
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    references = [
        value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "xlink:href")
    ]
    assert references
    assert all(value and value.startswith("#") for value in references)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_identifiers_are_unique_and_every_reference_has_its_target(made_up_summary: Summaries) -> None:
    html = render_report(made_up_summary())
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", html)) == set(identifiers)


def test_every_chart_has_a_text_alternative_a_caption_and_its_numbers(made_up_summary: Summaries) -> None:
    page = Page(render_report(made_up_summary()))
    charts = [found for tag, found in page.tags if tag == "svg"]
    assert len(charts) == 4 + 3
    assert all(found["role"] == "img" and found["aria-label"] for found in charts)
    assert page.count("figcaption") == page.count("figure") == page.count("details") == len(charts)
    assert "仁济医院: accuracy by round" in [found["aria-label"] for found in charts]


def test_the_same_summary_gives_the_same_bytes(made_up_summary: Summaries, tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        write_report(made_up_summary(), tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.html", "two.html"]


def test_a_write_that_fails_leaves_the_old_report(
    made_up_summary: Summaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def refuse(source: str, target: Path) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        write_report(made_up_summary(), path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_run_that_was_not_private_says_so_and_states_no_epsilon(made_up_summary: Summaries) -> None:
    page = Page(render_report(made_up_summary(private=False)))
    assert "This run was not private" in re.sub(r"\s+", " ", page.text)
    assert "ε =" not in page.text
    assert "What this statement does not cover" not in page.text
    assert page.count("svg") == 4 + 2


def test_a_run_without_baselines_claims_nothing_about_them(made_up_summary: Summaries) -> None:
    page = Page(render_report(made_up_summary(baselines=False)))
    assert "One adapter, trained by 4 sites in 3 rounds." in page.text
    assert "no baseline was run" in page.text
    assert "federated" in page.text
    assert "local only" not in page.text.replace("Local only is the site", "")


def test_a_private_run_has_its_private_probe_beside_it_or_the_report_says_that_it_is_missing(
    made_up_summary: Summaries, made_up_figures: Figures
) -> None:
    missing = "No private linear probe was run."
    beside = Page(render_report(made_up_summary())).text
    assert "private linear probe" in beside
    assert missing not in beside
    assert missing in Page(render_report(made_up_summary(baselines=False))).text
    figures = made_up_figures()
    figures["baselines"]["dp_linear_probe"] = None  # the one without noise does not stand in for it
    assert missing in Page(render_report(Summary.model_validate(figures))).text
    assert missing not in Page(render_report(made_up_summary(private=False, baselines=False))).text


def test_a_site_that_measured_nothing_is_shown_as_a_dash(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    for turn in figures["rounds"]:
        turn["sites"][0] |= {"utility": None, "loss": None, "epsilon": None}
    text = Page(render_report(Summary.model_validate(figures))).text
    assert re.search(r"Northern Bank 0\.620 – 0\.910", text)
    assert "At all 3 sites" in text


@pytest.mark.parametrize(
    ("finals", "sentence"),
    [
        ((0.9, 0.9, 0.9, 0.1), "The shared adapter beats training alone at 3 of 4 sites."),
        ((0.1, 0.1, 0.1, 0.1), "The shared adapter beats training alone at none of 4 sites."),
    ],
)
def test_the_headline_does_not_flatter(made_up_figures: Figures, finals: tuple[float, ...], sentence: str) -> None:
    figures = made_up_figures()
    for entry, utility in zip(figures["rounds"][-1]["sites"], finals, strict=True):
        entry["utility"] = utility
    summary = with_verdicts(Summary.model_validate(figures))
    assert headline(summary) == sentence
    assert "✗ not met" in Page(render_report(summary)).text


def test_units_that_differ_by_kind_are_both_named(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    figures["privacy"]["unit"] = "customer or patient"
    text = Page(render_report(Summary.model_validate(figures))).text
    assert "customers or patients" in text
    assert "Privacy of one customer or patient" in text


def test_names_are_text_and_never_markup(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    figures["sites"][0]["display_name"] = '<script>"&'
    figures["run"] = "<b>run</b>"
    html = render_report(Summary.model_validate(figures))
    page = Page(html)
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert page.text.count('<script>"&') >= 4


def test_a_run_with_only_the_round_before_training_can_be_shown(made_up_figures: Figures) -> None:
    figures = made_up_figures(baselines=False)
    figures["rounds"] = figures["rounds"][:1]
    figures["totals"] |= {"bytes_up": 0, "bytes_down": 0, "plain_float32_bytes": 0}
    assert "0 rounds, 4 sites" in Page(render_report(Summary.model_validate(figures))).text


def test_every_colour_of_a_chart_is_defined_by_the_page_for_light_and_dark(made_up_summary: Summaries) -> None:
    html = render_report(made_up_summary())
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert used <= set(re.findall(r"--([\w-]+):", html))
    assert all(html.count(f"--{name}: #") == 2 for name in COLOURS)
    assert not re.findall(r"style=\"[^\"]*#[0-9a-f]{6}", html)


def test_a_line_passes_through_its_values_at_their_heights() -> None:
    svg = lines_by_round("c", "title", [("federated", "federated", [0.0, 0.5, 1.0])], top=1.0)
    path = next(p for p in drawing(svg).iter() if p.tag.endswith("path") and "--federated" in p.get("style", ""))
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d", ""))]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert y0 > y1 > y2


def test_a_stacked_bar_is_as_long_as_its_phases_together() -> None:
    svg = stacked_bars("c", "title", [("仁济", {"train": 3.0, "encrypt": 1.0}, "4 s"), ("B", {"train": 2.0}, "2 s")])
    spans = []
    for path in drawing(svg).iter():
        if "fill: var(--" in path.get("style", "") and path.tag.endswith("path"):
            edges = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path.get("d", ""))]
            spans.append(max(edges) - min(edges))
    assert [span / spans[2] for span in spans] == pytest.approx([1.5, 0.5, 1.0])


def test_a_chart_keeps_its_text_as_text_in_the_fonts_of_the_page() -> None:
    svg = stacked_bars("c", "title", [("仁济医院", {"train": 1.0}, "1 s")])
    assert "仁济医院" in "".join(drawing(svg).itertext())
    assert "font-family" not in svg
    assert "DejaVu" not in svg


@pytest.mark.parametrize("heights", [[1.0, 1.0, 1.0, 1.0], [0.0, 0.02, 0.99, 1.0], [0.5]])
def test_labels_never_overlap_nor_leave_the_chart(heights: list[float]) -> None:
    placed = spread(heights, low=0.0, high=1.0, gap=0.1)
    assert all(upper - lower >= 0.1 - 1e-12 for lower, upper in pairwise(placed))
    assert min(placed) >= 0
    assert max(placed) <= 1


def test_phases_of_the_charts_are_those_of_the_summary() -> None:
    assert set(PHASES) == set(
        Summary.model_fields["totals"].annotation.model_fields["phase_seconds"].annotation.model_fields
    )
