"""Where a site keeps things."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedseek_site.courier import CourierSettings
from fedseek_site.enrol import JoinedFolder


@dataclass(frozen=True, slots=True)
class Paths:
    """Inside the site's folder."""

    folder: Path

    @property
    def run(self) -> Path:
        """Sockets."""
        return self.folder / "run"

    @property
    def service_socket(self) -> Path:
        """What the courier calls."""
        return self.run / "service.sock"

    @property
    def lent(self) -> Path:
        """What a courier under an account of its own is lent."""
        return self.run / "courier"

    @property
    def state(self) -> Path:
        """The journal."""
        return self.folder / "state"

    @property
    def audit(self) -> Path:
        """The audit chain."""
        return self.folder / "audit"

    @property
    def approvals(self) -> Path:
        """Plans announced, and who approved them."""
        return self.folder / "approvals.sqlite3"

    @property
    def release_approvals(self) -> Path:
        """Releases that were drafted, and who approved them."""
        return self.folder / "releases.sqlite3"

    @property
    def ledger(self) -> Path:
        """What the data has cost in privacy; the one file that may never be lost."""
        return self.folder / "ledger.sqlite3"

    @property
    def courier(self) -> Path:
        """The courier's own folder; nothing in it is worth a backup."""
        return self.folder / "courier"


def courier_settings(site: JoinedFolder, paths: Paths, *, state: Path | None = None) -> CourierSettings:
    """What the courier is given. ``state``: its own folder, where it runs under an account of its own."""
    return CourierSettings(
        state=state or paths.courier,
        coordinator=site.join.coordinator,
        ca=site.ca_path,
        node_key=site.node_key,
        service=paths.service_socket,
    )
