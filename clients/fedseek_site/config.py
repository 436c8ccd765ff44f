"""What a site engineer writes down: where the data is, where results go, who may talk to the daemon.

What the site permits is not here but in its policy (``policy.toml``), which has another owner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedseek.daemon.settings import Settings, load_settings
from fedseek.errors import InvalidRecords
from fedseek.records import Columns, Records, read_rows, to_records
from fedseek_site.admission import SiteData
from fedseek_site.local_api import Role

CONFIG_FILE, POLICY_FILE = "site.toml", "policy.toml"
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]  # no file has a name with a NUL in it


class DataSettings(Settings):
    """The records of this site: JSON lines, CSV or Parquet."""

    name: Text
    """What people here call the data set; stays at the site."""
    train: Text
    held_back: Text
    """Rows to evaluate on, in a file of their own; none of them is trained on."""
    text: Text = "text"
    label: Text = "label"
    unit: Text | None = None
    """Column that says whose record a row is. Without one, every record counts as a person of its own."""


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


class SiteConfig(Settings):
    """``site.toml``."""

    version: Literal[1]
    data: DataSettings
    folders: FolderSettings = FolderSettings()
    sockets: SocketSettings = SocketSettings()
    courier: CourierSettings = CourierSettings()
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
    columns = Columns(data.text, data.label, data.unit)
    return SiteData(train=_read(folder / data.train, columns), held_back=_read(folder / data.held_back, columns))


def _read(path: Path, columns: Columns) -> Records:
    rows = read_rows(path)
    if any(columns.label not in row for row in rows):
        raise InvalidRecords(
            f"{path}: no column {columns.label!r} in every row", hint="name the label column in site.toml, [data] label"
        )
    return to_records(rows, columns, labels=sorted({str(row[columns.label]) for row in rows}), source=str(path))
