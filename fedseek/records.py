"""Records: read an institution's files and refuse what does not fit the plan.

    JSONL | CSV | Parquet --read_rows--> rows --to_records--> Records --fedseek.tokenise--> TokenisedRecords

A record may have a text, a label and a dialogue; each task takes those records that have what it needs. Texts and labels
never appear in what leaves the site; errors name file, line and column and stay in the local log.
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
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from fedseek.dialogues import Dialogue, cell_text, from_instruction, from_messages, is_blank
from fedseek.errors import InvalidRecords
from fedseek.plan_spec import Task

Row = Mapping[str, Any]
MAX_LISTED = 5  # offending values named in an error; the rest is counted
# what a record has to have to be part of a task, in words
NEEDED: Final[Mapping[Task, str]] = {
    "classify": "a text and a label",
    "continue": "a text",
    "instruct": "an instruction with its answer, or messages",
}


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what; None: the file has none of it.

    Attributes:
        text, label: of a record; a row with a dialogue may leave them empty.
        unit: whose record it is. None: every record is its own privacy unit.
        instruction, input, output: of a dialogue of one question; the input may be named or empty, or neither.
        messages: of a dialogue of any length, instead of those three.
    """

    text: str | None
    label: str | None
    unit: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    messages: str | None = None

    @property
    def of_dialogue(self) -> tuple[str, ...]:
        """Those that dialogues are read from."""
        found = (self.messages, self.instruction, self.input, self.output)
        return tuple(column for column in found if column is not None)

    def problems(self) -> list[str]:
        """What does not fit together, a line each."""
        if self.messages is not None and (self.instruction or self.input or self.output):
            return ["messages: given beside instruction, input or output; a dialogue is in one or in the others"]
        if (self.instruction is None) != (self.output is None) or (self.input is not None and self.instruction is None):
            return ["instruction, output: wanted both columns or neither, and an input only beside them"]
        if self.text is None and not self.of_dialogue:
            return ["text: no column of texts, nor of dialogues"]
        return []


@dataclass(frozen=True, slots=True)
class Records:
    """What one site's rows say; ``units[i]`` says whose record it is. All but ``dialogues`` have the same length.

    Attributes:
        texts: "" where a record has none.
        labels: "" where a record has none.
        units: whose record it is.
        unit_column: None when no column named the units and every record is its own.
        dialogues: one a record, an empty one where it has none; or nothing at all, where no record has one.
    """

    texts: tuple[str, ...] = field(repr=False)
    labels: tuple[str, ...] = field(repr=False)
    units: tuple[str, ...] = field(repr=False)
    unit_column: str | None = None
    dialogues: tuple[Dialogue, ...] = field(repr=False, default=())

    def __len__(self) -> int:
        return len(self.texts)

    def as_single_records(self) -> Records:
        """The same records, each its own unit: what a record-level guarantee protects."""
        units = tuple(str(number) for number in range(len(self)))
        return Records(self.texts, self.labels, units, dialogues=self.dialogues)

    def of_task(self, task: Task) -> Records:
        """Those that have what ``task`` needs (:data:`NEEDED`), in their order."""
        if task == "instruct":
            fit = [bool(dialogue) for dialogue in self.dialogues]
        elif task == "continue":
            fit = [bool(text) for text in self.texts]
        else:
            fit = [bool(text and label) for text, label in zip(self.texts, self.labels, strict=True)]
        return self.take([row for row, fits in enumerate(fit) if fits])

    def take(self, rows: Sequence[int]) -> Records:
        """The records of these rows, in this order."""
        return Records(
            tuple(self.texts[row] for row in rows),
            tuple(self.labels[row] for row in rows),
            tuple(self.units[row] for row in rows),
            self.unit_column,
            tuple(self.dialogues[row] for row in rows) if self.dialogues else (),
        )

    @property
    def num_units(self) -> int:
        """Distinct customers or patients (or records, when the unit is the record)."""
        return len(set(self.units))


@dataclass(frozen=True, slots=True)
class TokenisedRecords:
    """What training reads.

    Attributes:
        input_ids: one int32 array of token ids a record, ragged.
        labels: index into the plan's label list, int64, shape (num_records,); zeros for language tasks.
        units: dense unit number of each record, int64, shape (num_records,).
        counted: for language tasks, which tokens the loss is over, bool, in the shapes of ``input_ids``; such a token is
            predicted from those before it, so the first never counts, and at least one does. None when labels are learned.
    """

    input_ids: list[npt.NDArray[np.int32]] = field(repr=False)
    labels: npt.NDArray[np.int64] = field(repr=False)
    units: npt.NDArray[np.int64] = field(repr=False)
    counted: list[npt.NDArray[np.bool_]] | None = field(repr=False, default=None)

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
    """Pick text, label, unit and dialogue out of rows and check them against the plan's labels.

    Every named column is in every row. Where dialogues are read too, a row may have a text, a dialogue, or both; a text
    without a label is part of tasks that need none.

    Raises:
        InvalidRecords: a column is missing, a text, dialogue or unit is empty or broken, a label is not in the plan.
    """
    named = (columns.text, columns.label, columns.unit, *columns.of_dialogue)
    _check_columns(rows, [column for column in named if column is not None], source)
    dialogues = tuple(_dialogue_of(row, columns, _where(source, number)) for number, row in enumerate(rows, start=1))
    texts = tuple(
        _text_of(row, columns, _where(source, number), optional=bool(dialogue))
        for number, (row, dialogue) in enumerate(zip(rows, dialogues, strict=True), start=1)
    )
    found = tuple(_label_of(row, columns.label) for row in rows)
    _check_labels(found, labels, source)
    if columns.unit is None:
        units = tuple(str(number) for number in range(len(rows)))
    else:
        units = tuple(_cell_of(row, columns.unit, _where(source, number)) for number, row in enumerate(rows, start=1))
    return Records(texts, found, units, columns.unit, dialogues if any(dialogues) else ())


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
    return records.take(sorted(row for rows in rows_of.values() for row in sorted(rows, key=lots.__getitem__)[:cap]))


def _lots(records: Records, seed: int) -> list[bytes]:
    """A SHA-256 for each record. Records that are equal in all are told apart by a number, whichever comes first."""
    seen: Counter[tuple[str | Dialogue, ...]] = Counter()
    lots = []
    for row, plain in enumerate(zip(records.units, records.texts, records.labels, strict=True)):
        dialogue = records.dialogues[row] if records.dialogues else ()
        said = [[[turn.role, turn.text] for turn in dialogue]] if dialogue else []  # no field more for a record without
        seen[*plain, dialogue] += 1
        # JSON, so that no text can move over into another field
        document = json.dumps(["fedseek/cap/v1", seed, *plain, *said, seen[*plain, dialogue]])
        lots.append(hashlib.sha256(document.encode()).digest())
    return lots


def _check_columns(rows: Sequence[Row], wanted: Sequence[str], source: str) -> None:
    for number, row in enumerate(rows, start=1):
        missing = [column for column in wanted if column not in row]
        if missing:
            raise InvalidRecords(
                f"{source}, row {number}: no column {', '.join(map(repr, missing))}; got {', '.join(map(repr, row))}",
                hint="name the columns of your file; a cell with nothing in it is null, or empty",
            )


def _where(source: str, number: int) -> str:
    return f"{source}, row {number}"


def _cell_of(row: Row, column: str, where: str) -> str:
    return cell_text(row[column], f"{where}: column {column!r}")


def _text_of(row: Row, columns: Columns, where: str, *, optional: bool) -> str:
    """The text of a row; "" where it has a dialogue instead."""
    if columns.text is not None and not (optional and is_blank(row[columns.text])):
        return _cell_of(row, columns.text, where)
    if not optional:
        raise InvalidRecords(f"{where}: column {', '.join(map(repr, columns.of_dialogue))} is empty, wanted a dialogue")
    return ""


def _label_of(row: Row, column: str | None) -> str:
    return "" if column is None or is_blank(row[column]) else str(row[column])


def _dialogue_of(row: Row, columns: Columns, where: str) -> Dialogue:
    """The dialogue of a row; empty where all of its cells are."""
    if columns.messages is not None:
        return from_messages(row[columns.messages], where=f"{where}: column {columns.messages!r}")
    if columns.instruction is None or columns.output is None:
        return ()
    if all(is_blank(row[column]) for column in columns.of_dialogue):
        return ()
    given = "" if columns.input is None or is_blank(row[columns.input]) else _cell_of(row, columns.input, where)
    return from_instruction(_cell_of(row, columns.instruction, where), given, _cell_of(row, columns.output, where))


def _check_labels(found: Sequence[str], labels: Sequence[str], source: str) -> None:
    known = {*labels, ""}
    unseen = sorted({label for label in found if label not in known})
    if unseen:
        more = f" and {len(unseen) - MAX_LISTED} more" if len(unseen) > MAX_LISTED else ""
        raise InvalidRecords(
            f"{source}: {len(unseen)} label(s) not in the plan: {', '.join(map(repr, unseen[:MAX_LISTED]))}{more}",
            hint=f"the plan names {len(labels)} labels for this kind; correct the file or the plan",
        )
