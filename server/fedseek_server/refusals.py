"""What the fleet gate turns away, in the log: at once, then counted, so that nobody can fill a disk by knocking."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

QUIET_SECONDS: Final = 60.0  # between two lines about the same address and reason
MOST_REMEMBERED: Final = 1000  # addresses and reasons

_log = logging.getLogger(__name__)


class Refusals:
    """Says who was refused and why; of many alike, the first at once and then how many there were, once a minute.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._quiet_until: dict[tuple[str, str], float] = {}
        self._unsaid: dict[tuple[str, str], int] = {}

    def note(self, address: str, reason: str) -> None:
        """Somebody was refused. ``reason`` is the gate's own text, never the caller's."""
        key, now = (address, reason), self._clock()
        if now < self._quiet_until.get(key, now):
            self._unsaid[key] = self._unsaid.get(key, 0) + 1
            return
        more = self._unsaid.pop(key, 0)
        if len(self._quiet_until) >= MOST_REMEMBERED:
            self._quiet_until = {each: until for each, until in self._quiet_until.items() if until > now}
        if len(self._quiet_until) >= MOST_REMEMBERED:
            return
        self._quiet_until[key] = now + QUIET_SECONDS
        _log.warning("refused %s: %s%s", address, reason, f" ({more} more since)" if more else "")
