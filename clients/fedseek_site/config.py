"""What a site engineer writes down: where the data is, where results go, who may talk to the daemon.

What the site permits is not here but in its policy (``policy.toml``), which has another owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedseek.daemon.settings import Settings, load_settings
from fedseek.errors import InvalidRecords
from fedseek.records import Columns, Records, Row, read_rows, to_records
from fedseek_site.admission import SiteData
from fedseek_site.local_api import Role

CONFIG_FILE, POLICY_FILE = "site.toml", "policy.toml"
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]  # no file has a name with a NUL in it


class DataSettings(Settings):
    """The records of this site: JSON lines, CSV or Parquet.

    Which columns there are says what the records are good for: a text and a label to classify, a text to go on with,
    an instruction with its output, or messages, to instruct.
    """

    name: Text
    """What people here call the data set; stays at the site."""
    train: Text
    held_back: Text
    """Rows to evaluate on, in a file of their own; none of them is trained on."""
    text: Text | None = None
    """Column of texts; ``text`` where nothing is said, unless a column of dialogues is named."""
    label: Text | None = None
    """Column of labels; where nothing is said ``label``, if the files have it and no column of dialogues is named."""
    unit: Text | None = None
    """Column that says whose record a row is. Without one, every record counts as a person of its own."""
    instruction: Text | None = None
    """Column of what is asked for."""
    input: Text | None = None
    """Column of what it is about; its cells may be empty."""
    output: Text | None = None
    """Column of the answer."""
    messages: Text | None = None
    """Column of whole dialogues, instead of those three: a list of role and content, in CSV as JSON."""

    @property
    def columns(self) -> Columns:
        """The columns that the files have to have."""
        named = Columns(self.text, self.label, self.unit, self.instruction, self.input, self.output, self.messages)
        return named if named.of_dialogue or named.text else replace(named, text="text")

    @model_validator(mode="after")
    def _fit(self) -> DataSettings:
        if problems := self.columns.problems():
            raise ValueError("; ".join(problems))
        return self


class FolderSettings(Settings):
    """Where results go; relative to the site's folder."""

    release: Text = "release"
    report: Text = "report.jsonl"


class SocketSettings(Settings):
    """Operating system groups that may open the sockets in ``run/``; empty: only the daemon's own account."""

    courier_group: str = ""
    operator_group: str = ""
    steward_group: str = ""
    officer_group: str = ""

    @property
    def by_role(self) -> dict[Role, str]:
        """The groups of the site's people."""
        return {"operator": self.operator_group, "steward": self.steward_group, "officer": self.officer_group}


class CourierSettings(Settings):
    """The process that talks to the network."""

    separate: bool = False
    """Started by somebody else (``fedseek-site courier``, under an account of its own), not by this daemon."""


class ComputeSettings(Settings):
    """What the model is trained on. No plan has a say in it, and no result depends on it but by rounding."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$")] = "auto"
    """``auto``: CUDA, else MPS, else the CPU; one of them; or one GPU by its number, ``cuda:1``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base model; ``auto``: bfloat16 on CUDA, else float32. The adapter is float32."""
    quantise: Literal["none", "8bit", "4bit"] = "none"
    """Hold the base model in fewer bits; only on CUDA, with bitsandbytes."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: slower, in less memory."""
    gpus: Annotated[int, Field(ge=1, le=64)] | Literal["all"] = 1
    """How many to train on, one process and one copy of the base model each."""


class SiteConfig(Settings):
    """``site.toml``."""

    version: Literal[1]
    data: DataSettings
    folders: FolderSettings = FolderSettings()
    sockets: SocketSettings = SocketSettings()
    courier: CourierSettings = CourierSettings()
    compute: ComputeSettings = ComputeSettings()
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of training; None: as many as there are cores."""


def load_config(folder: Path) -> SiteConfig:
    """The configuration of the site in ``folder``.

    Raises:
        InvalidConfig: with all problems at once.
    """
    return load_settings(folder / CONFIG_FILE, SiteConfig)


def read_site_data(folder: Path, data: DataSettings) -> SiteData:
    """Read both files of records; labels are checked against a plan when one comes.

    Raises:
        InvalidRecords: a file cannot be used; names line and column.
    """
    columns, paths = data.columns, (folder / data.train, folder / data.held_back)
    train, held_back = (read_rows(path) for path in paths)
    if columns.label is None and not columns.of_dialogue and any("label" in row for row in (*train, *held_back)):
        columns = replace(columns, label="label")
    return SiteData(_records(train, columns, paths[0]), _records(held_back, columns, paths[1]))


def _records(rows: Sequence[Row], columns: Columns, path: Path) -> Records:
    label = columns.label
    if label is None:
        return to_records(rows, columns, labels=(), source=str(path))
    if any(label not in row for row in rows):
        raise InvalidRecords(
            f"{path}: no column {label!r} in every row", hint="name the label column in site.toml, [data] label"
        )
    return to_records(rows, columns, labels=sorted({str(row[label]) for row in rows}), source=str(path))
