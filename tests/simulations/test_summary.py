from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from fedseek.errors import DataError
from simulations import summary as module
from simulations.summary import Part, Summary, load_summary, save_summary
from simulations.verdicts import verdicts, with_verdicts

SCHEMA_PAGE = Path(__file__).parents[2] / "docs" / "summary-schema.md"
Figures = Callable[..., dict[str, Any]]
Summaries = Callable[..., Summary]


def parse(figures: dict[str, Any]) -> Summary:
    return Summary.model_validate_json(json.dumps(figures))


def by_claim(summary: Summary, start: str) -> module.Verdict:
    return next(verdict for verdict in verdicts(summary) if verdict.claim.startswith(start))


def test_a_summary_survives_being_saved_and_loaded(made_up_summary: Summaries, tmp_path: Path) -> None:
    whole = made_up_summary()
    save_summary(whole, tmp_path / "summary.json")
    assert load_summary(tmp_path / "summary.json") == whole
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    assert "仁济医院" in text
    assert json.loads(text)["started_at"] == "2026-03-02T08:15:30Z"


def test_saving_replaces_the_old_file_whole_and_leaves_no_other(made_up_summary: Summaries, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old", encoding="utf-8")
    save_summary(made_up_summary(), path)
    assert load_summary(path).run == "two-banks-two-hospitals-7"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    made_up_summary: Summaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old", encoding="utf-8")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_summary(made_up_summary(), path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_saved_summary_can_be_read_by_others(made_up_summary: Summaries, tmp_path: Path) -> None:
    save_summary(made_up_summary(), tmp_path / "summary.json")
    assert stat.S_IMODE((tmp_path / "summary.json").stat().st_mode) == 0o644


def test_loading_a_broken_file_names_every_wrong_field(made_up_figures: Figures, tmp_path: Path) -> None:
    figures = made_up_figures()
    figures["surprise"] = 1
    figures["rounds"][0]["seconds"] = -1
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(figures), encoding="utf-8")
    with pytest.raises(DataError, match=r"(?s)rounds\.0\.seconds: .*surprise: ") as caught:
        load_summary(path)
    assert "schema version 1" in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_loading_what_is_no_summary_is_an_error_of_ours(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="wanted a run summary"):
        load_summary(path)


def test_loading_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_summary(tmp_path / "summary.json")


def test_a_newer_schema_version_is_refused(made_up_figures: Figures) -> None:
    with pytest.raises(ValidationError, match="schema_version"):
        parse(made_up_figures() | {"schema_version": 2})


def test_rounds_must_count_up_from_zero(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    del figures["rounds"][1]
    with pytest.raises(ValidationError, match=r"rounds are numbered \[0, 2, 3\]"):
        parse(figures)


@pytest.mark.parametrize("where", ["rounds", "baselines", "release"])
def test_figures_for_a_site_that_is_not_in_the_run_are_refused(made_up_figures: Figures, where: str) -> None:
    figures = made_up_figures()
    if where == "rounds":
        figures["rounds"][2]["sites"][0]["site"] = "stranger"
    elif where == "baselines":
        figures["baselines"]["centralised"]["stranger"] = [0.5]
    else:
        figures["release"]["guards_passed"]["stranger"] = []
    with pytest.raises(ValidationError, match=r"figures for \['stranger'\]"):
        parse(figures)


def test_a_site_listed_twice_is_refused(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    figures["sites"][1] = figures["sites"][0]
    with pytest.raises(ValidationError, match="a site is listed twice"):
        parse(figures)


@pytest.mark.parametrize("moment", ["2026-03-02T08:15:30", "2026-03-02T08:15:30+08:00"])
def test_times_must_be_utc(made_up_figures: Figures, moment: str) -> None:
    with pytest.raises(ValidationError, match="started_at"):
        parse(made_up_figures() | {"started_at": moment})


def test_a_run_cannot_end_before_it_starts(made_up_figures: Figures) -> None:
    with pytest.raises(ValidationError, match="is before started_at"):
        parse(made_up_figures() | {"finished_at": "2026-03-02T08:15:29Z"})


def test_infinities_are_refused_because_json_has_none(made_up_summary: Summaries) -> None:
    entry = made_up_summary().final.sites[0]
    with pytest.raises(ValidationError, match="finite"):
        module.SiteRound.model_validate(entry.model_dump() | {"loss": float("nan")})


def test_parts_cannot_be_changed(made_up_summary: Summaries) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        made_up_summary().run = "another"


def test_verdicts_of_a_good_run_are_all_met(made_up_summary: Summaries) -> None:
    found = made_up_summary().verdicts
    assert [verdict.met for verdict in found] == [True] * 5
    assert [round(verdict.figure, 3) for verdict in found] == [0.17, 0.941, 7.86, 0.651, 0.0]


def test_one_site_below_its_local_training_fails_the_first_claim(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    figures["rounds"][-1]["sites"][2]["utility"] = 0.5
    verdict = by_claim(parse(figures), "Federated above local-only")
    assert not verdict.met
    assert verdict.figure == pytest.approx(-0.01)


def test_a_tie_with_local_training_does_not_count_as_above(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    figures["rounds"][-1]["sites"][2]["utility"] = figures["baselines"]["local_only"]["st-anna-hospital"][-1]
    assert not by_claim(parse(figures), "Federated above local-only").met


def test_far_below_centralised_fails_the_second_claim(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    figures["baselines"]["centralised"] = {site["name"]: [0.1, 0.99] for site in figures["sites"]}
    verdict = by_claim(parse(figures), "Federated utility as a share")
    assert verdict.figure == pytest.approx((0.86 + 0.88 + 0.72 + 0.75) / (4 * 0.99))
    assert not verdict.met


def test_more_epsilon_than_the_target_at_one_site_fails_its_claim(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    figures["rounds"][-1]["sites"][3]["epsilon"] = 8.01
    assert not by_claim(parse(figures), "Highest epsilon").met


def test_more_bytes_than_plain_fails_its_claim(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    figures["totals"]["plain_float32_bytes"] = figures["totals"]["bytes_up"] - 1
    assert not by_claim(parse(figures), "Encrypted bytes up").met


def test_saturation_in_any_round_fails_its_claim(made_up_figures: Figures) -> None:
    figures = made_up_figures()
    figures["rounds"][1]["sites"][0]["saturated_fraction"] = 0.02
    assert not by_claim(parse(figures), "Largest share of values").met


def test_claims_without_figures_are_left_out(made_up_figures: Figures) -> None:
    figures = made_up_figures(private=False, baselines=False)
    claims = [verdict.claim for verdict in with_verdicts(parse(figures)).verdicts]
    assert len(claims) == 2
    assert not [claim for claim in claims if "epsilon" in claim or "local-only" in claim or "centralised" in claim]


def test_the_schema_page_names_every_field() -> None:
    named = set(re.findall(r"`([a-z0-9_]+)`", SCHEMA_PAGE.read_text(encoding="utf-8")))
    parts = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, BaseModel)]
    fields = {name for part in parts if part not in (BaseModel, Part) for name in part.model_fields}
    assert len(fields) > 60
    assert fields - named == set()
