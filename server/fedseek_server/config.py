"""What an operator writes down: where the coordinator listens, and how long it keeps its record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedseek.daemon.settings import Settings, load_settings

CONFIG_FILE = "coordinator.toml"
EXAMPLE = """\
# The coordinator's own settings. Keys, certificates and the roster are beside this file; `fedseek-server keys` lists them.
version = 1

[listen]
host = "{host}"       # of all addresses of this machine; or the one that sites reach
port = {port}

[audit]
retention_days = 400   # at least 180

[limits]
largest_update_mb = 1024
"""


class ListenSettings(Settings):
    """Where sites dial."""

    host: Annotated[str, Field(min_length=1, max_length=253)]
    port: Annotated[int, Field(ge=1, le=65_535)]


class AuditSettings(Settings):
    """The coordinator's own record."""

    retention_days: Annotated[int, Field(ge=180, le=36_500)] = 400


class LimitSettings(Settings):
    """What is refused unread."""

    largest_update_mb: Annotated[int, Field(ge=1, le=2_000)] = 1024


class CoordinatorConfig(Settings):
    """``coordinator.toml``."""

    version: Literal[1]
    listen: ListenSettings
    audit: AuditSettings = AuditSettings()
    limits: LimitSettings = LimitSettings()
    greet_hours: Annotated[float, Field(gt=0, le=168)] = 24.0
    """How often sites are asked, between runs, where they stand: they get a newer roster then, and may renew keys."""
    settle_seconds: Annotated[float, Field(ge=0, le=600)] = 20.0
    """How long to wait for a site that was connected at the last look, before going on without it."""


def load_config(folder: Path) -> CoordinatorConfig:
    """The configuration of the coordinator in ``folder``.

    Raises:
        InvalidConfig: with all problems at once.
    """
    return load_settings(folder / CONFIG_FILE, CoordinatorConfig)
