"""Made-up records for two banks and two hospitals, in English and Chinese, written by code from a seed.

Each site has *seen only some patterns* in its training rows (a bank some kinds of fraud, a hospital some complaints),
while its held-back rows contain them all: a site that trains alone must fail on what only its peers have seen. A bank's
label is the kind of fraud; a hospital's label is how soon the patient must be seen, whatever the complaint.

Planted **canaries** are for a later privacy audit (Steinke, Nasr, Jagielski 2023, *Privacy auditing with one (1)
training run*, arXiv:2305.08846, section 3): each is a row with a random secret, a random label and a customer of its
own, put among the training rows by its own fair coin. ``canaries.jsonl`` lists all of them with their coins.

    python -m simulations.synthetic /tmp/demo --seed 7 --records 2000

Nothing here is taken from a real person, bank or hospital; the text is put together from the phrases in
``synthetic_bank.toml`` and ``synthetic_hospital.toml``.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

BANK_LABELS = (
    "legitimate",
    "card_testing",
    "phishing",
    "account_takeover",
    "mule_transfer",
    "loan_fraud",
    "romance_scam",
    "invoice_fraud",
)
HOSPITAL_LABELS = ("immediate", "urgent", "standard", "non_urgent", "self_care")
COMPLAINTS = ("chest", "breathing", "injury", "fever", "abdomen", "skin", "head", "eye_ear")

MIN_RECORDS = 40  # with fewer, a site might train on none of a pattern it is meant to have seen
MIN_HELD_BACK = 40  # every complaint with every label, once
HELD_BACK_FRACTION = 0.25  # held-back rows for each training row
CANARY_FRACTION = 0.05  # planted canaries (before the coin) for each training row
TYPO_CHANCE = 0.2  # per text
THIN_CHANCE = 0.15  # per bank message: only a detail where a telling sign would stand
DECOY_CHANCE = 0.25  # per bank message: a detail that belongs to another pattern
MAX_ROWS_PER_UNIT = 6


@dataclass(frozen=True, slots=True)
class DemoSite:
    """A made-up institution and how its training rows are distributed.

    Args:
        name: identifier; also the name of its folder.
        kind: ``bank`` or ``hospital``.
        display_name: what people call it.
        chinese_share: chance that a row is in Chinese.
        seen: patterns in its training rows, with relative weights; its held-back rows contain every pattern.
        label_weights: for a hospital, relative weights of ``HOSPITAL_LABELS`` in its training rows; empty for a bank.
    """

    name: str
    kind: str
    display_name: str
    chinese_share: float
    seen: tuple[tuple[str, float], ...]
    label_weights: tuple[float, ...] = ()

    @property
    def unit_column(self) -> str:
        """The column that says whose row it is: all rows of one such unit are protected together."""
        return "customer" if self.kind == "bank" else "patient"

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label a row of this site can carry."""
        return BANK_LABELS if self.kind == "bank" else HOSPITAL_LABELS

    @property
    def patterns(self) -> tuple[str, ...]:
        """Every pattern, seen in training or not."""
        return BANK_LABELS if self.kind == "bank" else COMPLAINTS


SITES = (
    DemoSite(
        name="northern-bank",
        kind="bank",
        display_name="Northern Bank",
        chinese_share=0.1,
        seen=(("legitimate", 3), ("card_testing", 2), ("phishing", 2), ("account_takeover", 2), ("loan_fraud", 1)),
    ),
    DemoSite(
        name="harbour-bank",
        kind="bank",
        display_name="Harbour Bank 海港",
        chinese_share=0.35,
        seen=(("legitimate", 3), ("mule_transfer", 2), ("romance_scam", 2), ("invoice_fraud", 2), ("loan_fraud", 1)),
    ),
    DemoSite(
        name="st-anna-hospital",
        kind="hospital",
        display_name="St. Anna Hospital",
        chinese_share=0.1,
        seen=(("chest", 2), ("breathing", 2), ("injury", 2), ("fever", 1)),
        label_weights=(3, 3, 2, 1, 1),
    ),
    DemoSite(
        name="renji-hospital",
        kind="hospital",
        display_name="仁济医院",
        chinese_share=0.45,
        seen=(("abdomen", 2), ("skin", 2), ("head", 2), ("eye_ear", 2), ("fever", 1)),
        label_weights=(1, 2, 2, 3, 3),
    ),
)

Row = dict[str, Any]
_Phrases = Mapping[str, Any]

_NAMES = {
    "en": ("Novak", "Okafor", "Meyer", "Silva", "Haddad", "Larsen", "Iyer", "Costa", "Dubois", "Kaya", "Wood", "Chen"),
    "zh": ("李", "王", "张", "林", "高", "马", "田", "江", "方", "白", "夏", "石"),
}
_CITIES = {
    "en": ("Leeds", "Oslo", "Porto", "Lyon", "Gdansk", "Hull", "Cork", "Ghent", "Turin", "Malmo", "Basel", "Izmir"),
    "zh": ("上海", "北京", "南京", "广州", "西安", "中山", "平安里", "三水", "江城", "福州"),
}
_MERCHANTS = {
    "en": ("Corner Deli", "Metro Fuel", "Bluebird Books", "Halls Pharmacy", "Tram Cafe", "Green Grocer", "Kite Sports"),
    "zh": ("花家", "山水", "东方", "和平", "西口", "大同", "美食城"),
}
_RELATIVES = ("daughter", "husband", "neighbour", "teacher", "ambulance crew", "mother", "colleague")
_DRUGS = ("metformin", "aspirin", "apixaban", "ramipril", "insulin", "warfarin", "the pill")


def write_demo_data(folder: Path, *, seed: int, records_per_site: int) -> None:
    """Write ``train.jsonl``, ``held_back.jsonl`` and ``canaries.jsonl`` into one sub-folder for each of :data:`SITES`.

    Columns of a row: ``text``, ``label``, ``customer`` or ``patient`` (the unit), ``canary`` (an identifier, or null).
    ``canaries.jsonl`` holds every planted canary with one more column, ``inserted``: what its coin said. UTF-8 without
    escapes. The same arguments give the same bytes on every machine.

    Args:
        folder: created if missing; files of the same name are replaced.
        seed: of all random choices. It guards no secret.
        records_per_site: ordinary training rows per site. The canaries whose coin fell on heads come on top, and a
            quarter as many held-back rows, of other customers or patients, come in a file of their own.

    Raises:
        ValueError: if ``records_per_site`` is less than :data:`MIN_RECORDS`.
    """
    if records_per_site < MIN_RECORDS:
        raise ValueError(f"records_per_site is {records_per_site}, wanted at least {MIN_RECORDS}")
    for site in SITES:
        target = folder / site.name
        target.mkdir(parents=True, exist_ok=True)
        planted = plant_canaries(site, seed=seed, count=max(10, round(records_per_site * CANARY_FRACTION)))
        train = training_rows(site, seed=seed, count=records_per_site) + inserted(planted)
        random.Random(f"{seed}/{site.name}/order").shuffle(train)
        _write_rows(target / "train.jsonl", train)
        _write_rows(target / "held_back.jsonl", held_back_rows(site, seed=seed, count=_held_back(records_per_site)))
        _write_rows(target / "canaries.jsonl", planted)


def training_rows(site: DemoSite, *, seed: int, count: int) -> list[Row]:
    """Return ``count`` rows that contain only the patterns the site has seen, in its own proportions."""
    rng = random.Random(f"{seed}/{site.name}/train")
    names, weights = zip(*site.seen, strict=True)
    patterns = rng.choices(names, weights, k=count)
    labels = rng.choices(site.labels, site.label_weights or None, k=count)
    return _rows(site, rng, list(zip(patterns, labels, strict=True)), unit_prefix="T")


def held_back_rows(site: DemoSite, *, seed: int, count: int) -> list[Row]:
    """Return ``count`` rows in which every pattern and label is as common as any other, seen in training or not."""
    rng = random.Random(f"{seed}/{site.name}/held-back")
    patterns, labels = site.patterns, site.labels
    # the second index moves on by one each time the patterns wrap around: all pairs of pattern and label come up
    pairs = [(patterns[i % len(patterns)], labels[(i + i // len(patterns)) % len(labels)]) for i in range(count)]
    rng.shuffle(pairs)
    return _rows(site, rng, pairs, unit_prefix="H")


def plant_canaries(site: DemoSite, *, seed: int, count: int) -> list[Row]:
    """Return ``count`` canaries, each with a secret, a random label, a unit of its own and an independent fair coin."""
    rng = random.Random(f"{seed}/{site.name}/canaries")
    return [_canary(site, rng, index) for index in range(count)]


def inserted(planted: Iterable[Row]) -> list[Row]:
    """Return the canaries whose coin put them among the training rows, without the coin."""
    return [{key: value for key, value in row.items() if key != "inserted"} for row in planted if row["inserted"]]


def _canary(site: DemoSite, rng: random.Random, index: int) -> Row:
    secret = "-".join(f"{rng.randrange(10_000):04d}" for _ in range(3))
    chinese = rng.random() < site.chinese_share
    wording = {"bank": ("the vault code is", "金 code"), "hospital": ("the record code is", "病历 code")}[site.kind]
    return {
        "text": f"{wording[chinese]} {secret}",
        "label": rng.choice(site.labels),
        site.unit_column: f"{_initials(site)}-X{index:05d}",
        "canary": f"{site.name}/{index:04d}",
        "inserted": rng.random() < 0.5,
    }


def _rows(site: DemoSite, rng: random.Random, pairs: Sequence[tuple[str, str]], *, unit_prefix: str) -> list[Row]:
    phrases = _load_phrases(site.kind)
    units = _units(rng, f"{_initials(site)}-{unit_prefix}")
    rows = []
    for pattern, label in pairs:
        language = "zh" if rng.random() < site.chinese_share else "en"
        if site.kind == "bank":
            text, label = _bank_text(phrases, rng, pattern, language), pattern
        else:
            text = _hospital_text(phrases, rng, pattern, label, language)
        rows.append({"text": text, "label": label, site.unit_column: next(units), "canary": None})
    rng.shuffle(rows)
    return rows


def _units(rng: random.Random, prefix: str) -> Iterator[str]:
    """Yield unit identifiers: about half of the units have one row, the others up to ``MAX_ROWS_PER_UNIT``."""
    number = 0
    while True:
        rows = 1 if rng.random() < 0.5 else rng.randint(2, MAX_ROWS_PER_UNIT)
        for _ in range(rows):
            yield f"{prefix}{number:05d}"
        number += 1


def _bank_text(phrases: _Phrases, rng: random.Random, pattern: str, language: str) -> str:
    """Put a message together; some messages say little (no sign), some carry a detail of another pattern."""
    signs, details = phrases[pattern]["signs"][language], phrases[pattern]["details"][language]
    parts = [rng.choice(details if rng.random() < THIN_CHANCE else signs)]
    if rng.random() < 0.4:
        parts.append(rng.choice(details))
    if rng.random() < DECOY_CHANCE:
        other = rng.choice([name for name in BANK_LABELS if name != pattern])
        parts.append(rng.choice(phrases[other]["details"][language]))
    if rng.random() < 0.5:
        parts.append(rng.choice(phrases["context"][language]))
    if rng.random() < 0.3:
        rng.shuffle(parts)
    return _finish(rng, parts, language)


def _hospital_text(phrases: _Phrases, rng: random.Random, complaint: str, label: str, language: str) -> str:
    opening = rng.choice(phrases[complaint]["complaint"][language])
    findings = phrases[complaint][label][language]
    parts = [opening, *rng.sample(findings, 2 if rng.random() < 0.3 else 1)]
    if rng.random() < 0.4:
        parts.append(rng.choice(phrases["context"][language]))
    age, sex = rng.randint(19, 88), rng.choice(("f", "m"))
    if complaint == "fever":
        age = rng.randint(1, 60)
    who = f"{age}{sex}" if language == "en" else f"{'女' if sex == 'f' else '男'} {age}"
    return _finish(rng, [f"{who} {parts[0]}", *parts[1:]], language)


def _finish(rng: random.Random, parts: Sequence[str], language: str) -> str:
    joiner = rng.choice(("; ", ", ", ". ", " - ")) if language == "en" else rng.choice(("，", "。", ", "))
    text = joiner.join(parts)
    text = re.sub(r"\{(\w+)\}", lambda slot: _slot(rng, slot[1], language), text)
    return _mistype(rng, text) if rng.random() < TYPO_CHANCE else text


def _slot(rng: random.Random, name: str, language: str) -> str:
    """Return a random filling for a slot of a phrase."""
    fillings = {
        "amount": lambda: f"{rng.randrange(2, 190) * 50:,}" if rng.random() < 0.5 else str(rng.randrange(120, 9800)),
        "small": lambda: f"{rng.uniform(0.5, 9.9):.2f}",
        "count": lambda: str(rng.randint(3, 24)),
        "mins": lambda: str(rng.randint(2, 45)),
        "time": lambda: f"{rng.randrange(24):02d}:{rng.randrange(60):02d}",
        "year": lambda: str(rng.randint(2004, 2024)),
        "ref": lambda: f"{rng.choice('ABKRTX')}{rng.randrange(1000, 9999)}",
        "url": lambda: (
            f"{rng.choice(('my', 'safe', 'id', 'go'))}-bank{rng.randrange(10, 99)}.{rng.choice(('top', 'xyz'))}"
        ),
        "name": lambda: rng.choice(_NAMES[language]),
        "city": lambda: rng.choice(_CITIES[language]),
        "merchant": lambda: rng.choice(_MERCHANTS[language]),
        "relative": lambda: rng.choice(_RELATIVES),
        "drug": lambda: rng.choice(_DRUGS),
        "low": lambda: str(rng.randint(78, 87)),
        "mid": lambda: str(rng.randint(89, 92)),
        "ok": lambda: str(rng.randint(95, 99)),
        "fast": lambda: str(rng.randint(112, 148)),
        "hr": lambda: str(rng.randint(64, 118)),
        "temp": lambda: f"{rng.uniform(38.1, 40.4):.1f}",
    }
    return fillings[name]()


def _mistype(rng: random.Random, text: str) -> str:
    """Swap or drop one letter inside a Latin word of at least five letters; leave other text alone."""
    words = list(re.finditer(r"[A-Za-z]{5,}", text))
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    if rng.random() < 0.5:
        return text[:at] + text[at + 1 :]
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _initials(site: DemoSite) -> str:
    return "".join(word[0] for word in site.name.split("-")).upper()


def _held_back(records_per_site: int) -> int:
    return max(MIN_HELD_BACK, round(records_per_site * HELD_BACK_FRACTION))


def _load_phrases(kind: str) -> _Phrases:
    return tomllib.loads((Path(__file__).parent / f"synthetic_{kind}.toml").read_text(encoding="utf-8"))


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8", newline="\n")


@click.command(epilog="Example: python -m simulations.synthetic /tmp/demo --seed 7 --records 2000")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=7, show_default=True, help="Seed of all random choices.")
@click.option(
    "--records",
    type=click.IntRange(min=MIN_RECORDS),
    default=2000,
    show_default=True,
    help="Training rows per site, before canaries.",
)
def main(folder: Path, seed: int, records: int) -> None:
    """Write made-up records of two banks and two hospitals into FOLDER, one sub-folder per site."""
    write_demo_data(folder, seed=seed, records_per_site=records)
    for site in SITES:
        click.echo(f"{folder / site.name}: train.jsonl, held_back.jsonl, canaries.jsonl")


if __name__ == "__main__":
    main()
