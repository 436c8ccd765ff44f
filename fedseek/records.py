"""Records: read an institution's files, refuse what does not fit the plan, tokenise.

    JSONL | CSV | Parquet --read_rows--> rows --to_records--> Records --tokenise--> TokenisedRecords

Texts and labels never appear in what leaves the site; errors name file, line and column and stay in the local log.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from fedseek.errors import InvalidRecords

Row = Mapping[str, Any]
MAX_LISTED = 5  # offending values named in an error; the rest is counted


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what. ``unit`` None: every record is its own privacy unit."""

    text: str
    label: str
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Records:
    """Labelled texts of one site; ``units[i]`` says whose record it is. All three have the same length.

    ``unit_column`` is None when no column named the units and every record is its own.
    """

    texts: tuple[str, ...] = field(repr=False)
    labels: tuple[str, ...] = field(repr=False)
    units: tuple[str, ...] = field(repr=False)
    unit_column: str | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def as_single_records(self) -> Records:
        """The same records, each its own unit: what a record-level guarantee protects."""
        return Records(self.texts, self.labels, tuple(str(number) for number in range(len(self))))

    @property
    def num_units(self) -> int:
        """Distinct customers or patients (or records, when the unit is the record)."""
        return len(set(self.units))


@dataclass(frozen=True, slots=True)
class TokenisedRecords:
    """What training reads.

    Attributes:
        input_ids: one int32 array of token ids a record, ragged.
        labels: index into the plan's label list, int64, shape (num_records,).
        units: dense unit number of each record, int64, shape (num_records,).
    """

    input_ids: list[npt.NDArray[np.int32]] = field(repr=False)
    labels: npt.NDArray[np.int64] = field(repr=False)
    units: npt.NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_units(self) -> int:
        """Number of privacy units."""
        return int(self.units.max()) + 1 if len(self.units) else 0


def read_rows(path: Path) -> list[Row]:
    """Read a ``.jsonl``, ``.csv`` or ``.parquet`` file as rows.

    Raises:
        InvalidRecords: missing file, unknown extension, not UTF-8, a broken line (named), no rows.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InvalidRecords(f"{path}: got extension {path.suffix!r}, wanted one of {', '.join(readers)}")
    try:
        rows = list(reader(path))
    except FileNotFoundError:
        raise InvalidRecords(
            f"{path}: no such file", hint="check the path; shared public data is found through FEDSEEK_DATA"
        ) from None
    except IsADirectoryError:
        raise InvalidRecords(f"{path}: got a folder, wanted a file") from None
    except PermissionError:
        raise InvalidRecords(f"{path}: this account may not read it", hint="check the owner and mode") from None
    except UnicodeDecodeError as error:
        raise InvalidRecords(
            f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start})",
            hint="convert it, for example: iconv -f GB18030 -t UTF-8 old.csv > new.csv",
        ) from None
    if not rows:
        raise InvalidRecords(f"{path}: the file has no rows", hint="a site with no records cannot take part")
    return rows


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidRecords(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise InvalidRecords(f"{path}, line {number}: got {type(row).__name__}, wanted one JSON object a line")
        yield row


def _read_csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)  # lines end as in a file
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InvalidRecords(f"{path}, line {reader.line_num}: wanted {len(reader.fieldnames or [])} fields")
            yield row
    except csv.Error as error:
        raise InvalidRecords(f"{path}, line {reader.reader.line_num}: not CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        table = pyarrow.parquet.read_table(path)
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowInvalid, OSError) as error:  # OSError: its metadata does not parse
        raise InvalidRecords(f"{path}: not Parquet: {error}") from None
    yield from table.to_pylist()


def to_records(rows: Sequence[Row], columns: Columns, *, labels: Sequence[str], source: str) -> Records:
    """Pick text, label and unit out of rows and check them against the plan's labels.

    Raises:
        InvalidRecords: a column is missing, a text or unit is empty, a label is not in the plan.
    """
    wanted = [column for column in (columns.text, columns.label, columns.unit) if column is not None]
    _check_columns(rows, wanted, source)
    texts = tuple(_text_of(row, columns.text, number, source) for number, row in enumerate(rows, start=1))
    found = tuple(str(row[columns.label]) for row in rows)
    _check_labels(found, labels, source)
    if columns.unit is None:
        units = tuple(str(number) for number in range(len(rows)))
    else:
        units = tuple(_text_of(row, columns.unit, number, source) for number, row in enumerate(rows, start=1))
    return Records(texts, found, units, columns.unit)


def cap_records(records: Records, cap: int, *, seed: int) -> Records:
    """At most ``cap`` records of each unit, in the order they came in.

    Which ones is read off a hash of each record, as by lot: not the first in the file, which may be the oldest.

    Args:
        records: of one site, with the units the plan protects.
        cap: records kept of a unit that has more.
        seed: of the plan, public; the same records are kept after a restart.

    Guarantees:
        What is kept of a unit depends on that unit's records alone, and not on their order: adding or removing one unit
        changes nothing for another, so the guarantee stays one for the unit.
    """
    lots = _lots(records, seed)
    rows_of: dict[str, list[int]] = {}
    for row, unit in enumerate(records.units):
        rows_of.setdefault(unit, []).append(row)
    kept = sorted(row for rows in rows_of.values() for row in sorted(rows, key=lots.__getitem__)[:cap])
    texts, labels, units = (
        tuple(map(column.__getitem__, kept)) for column in (records.texts, records.labels, records.units)
    )
    return Records(texts, labels, units, records.unit_column)


def _lots(records: Records, seed: int) -> list[bytes]:
    """A SHA-256 for each record. Records that are equal in all are told apart by a number, whichever comes first."""
    seen: Counter[tuple[str, str, str]] = Counter()
    lots = []
    for record in zip(records.units, records.texts, records.labels, strict=True):
        seen[record] += 1
        # JSON, so that no text can move over into another field
        document = json.dumps(["fedseek/cap/v1", seed, *record, seen[record]])
        lots.append(hashlib.sha256(document.encode()).digest())
    return lots


def _check_columns(rows: Sequence[Row], wanted: Sequence[str], source: str) -> None:
    for number, row in enumerate(rows, start=1):
        missing = [column for column in wanted if column not in row]
        if missing:
            raise InvalidRecords(
                f"{source}, row {number}: no column {', '.join(map(repr, missing))}; got {', '.join(map(repr, row))}",
                hint="name the text, label and unit columns of your file",
            )


def _text_of(row: Row, column: str, number: int, source: str) -> str:
    value = row[column]
    text = "" if value is None else str(value).strip()
    if not text:
        raise InvalidRecords(f"{source}, row {number}: column {column!r} is empty, wanted text")
    if any("\ud800" <= char <= "\udfff" for char in text):  # JSON may escape half a character; tokenizers refuse it
        raise InvalidRecords(f"{source}, row {number}: column {column!r} holds half a character (a lone surrogate)")
    return text


def _check_labels(found: Sequence[str], labels: Sequence[str], source: str) -> None:
    known = set(labels)
    unseen = sorted({label for label in found if label not in known})
    if unseen:
        more = f" and {len(unseen) - MAX_LISTED} more" if len(unseen) > MAX_LISTED else ""
        raise InvalidRecords(
            f"{source}: {len(unseen)} label(s) not in the plan: {', '.join(map(repr, unseen[:MAX_LISTED]))}{more}",
            hint=f"the plan names {len(known)} labels for this kind; correct the file or the plan",
        )


def tokenise(records: Records, model_dir: Path, *, labels: Sequence[str], max_tokens: int) -> TokenisedRecords:
    """Turn texts into token ids with the base model's own tokenizer, cut at ``max_tokens``."""
    from transformers import AutoTokenizer  # takes seconds to import; only sites and simulations need it

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    encoded = tokenizer(list(records.texts), truncation=True, max_length=max_tokens)["input_ids"]
    index = {label: number for number, label in enumerate(labels)}
    dense = {unit: number for number, unit in enumerate(dict.fromkeys(records.units))}
    return TokenisedRecords(
        input_ids=[np.asarray(ids, dtype=np.int32) for ids in encoded],
        labels=np.asarray([index[label] for label in records.labels], dtype=np.int64),
        units=np.asarray([dense[unit] for unit in records.units], dtype=np.int64),
    )
