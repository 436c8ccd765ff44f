"""A site in a process of its own that is asked for one round, and stands still in the middle of it, to be killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any


def play_until(
    wanted: dict[str, Any],
    *,
    folder: str,
    key: bytes,
    identity: bytes,
    roster: bytes,
    data: Any,
    clock: float,
    request: bytes,
) -> None:
    """Answer ``request``, keeping a checkpoint after every step, up to the first event that holds what is ``wanted``.

    Events go to ``events.jsonl`` of ``folder``; after the last one there is ``still``.
    """
    from fedseek.identity.keys import SiteIdentity
    from fedseek.identity.roster import parse_roster
    from fedseek.identity.vault import StorageKey
    from fedseek_site.ledger import Ledger
    from fedseek_site.service import SiteService

    here, storage_key = Path(folder), StorageKey(key)

    def observe(event: dict[str, Any]) -> None:
        with (here / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        if wanted.items() <= event.items():
            (here / "still").touch()
            signal.pause()

    service = SiteService(
        SiteIdentity.from_bytes(identity),
        data,
        roster=parse_roster(roster),
        state_folder=here / "state",
        storage_key=storage_key,
        ledger=Ledger(here / "ledger.sqlite3", storage_key, dataset="记录"),
        release_folder=here / "release",
        observe=observe,
        clock=lambda: clock,
        checkpoint_seconds=0.0,
    )
    service.handle(request)
