"""The private record of a canary audit at one site: coins, scores and bounds, so that its people can work them out again.

It never leaves the site: who was in it is what the audit tests.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np

from fedseek.dp.auditing import AuditOutcome, epsilon_lower_bound
from fedseek.errors import Malformed
from fedseek.identity.secret_files import read_secret_file, write_secret_file

RECORD_FILE: Final = "canary-audit.json"
MAX_RECORD_BYTES: Final = 4 * 1024 * 1024
_MAX_CANARIES: Final = 10_000
_TOLERANCE: Final = 1e-4  # another version of scipy may differ in the last bits

Scores = Annotated[tuple[float, ...], msgspec.Meta(max_length=_MAX_CANARIES)]


class CanaryRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a site keeps of its audit; ``repr`` is redacted.

    Attributes:
        run: its name.
        site: its name.
        kind: of the site.
        plan_digest: of the plan, hex.
        claim: epsilon that the site states for the run; None when the plan promises none.
        delta: at which the bounds hold; that of the plan, 0 when it promises nothing.
        confidence: of each bound.
        rounds: sums that this site was in, which a curious site saw.
        coins: true for the candidates that were trained on.
        released_scores: from the released adapter, higher for candidates that look trained on.
        round_scores: from the sums of all rounds.
        released_adapter: lower bound on epsilon from the first.
        every_round: lower bound on epsilon from the second.
    """

    version: Literal[1] = 1
    run: str
    site: str
    kind: str
    plan_digest: str
    claim: float | None
    delta: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    confidence: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    rounds: Annotated[int, msgspec.Meta(ge=0)]
    coins: Annotated[tuple[bool, ...], msgspec.Meta(max_length=_MAX_CANARIES)]
    released_scores: Scores
    round_scores: Scores
    released_adapter: float
    every_round: float

    @property
    def outcome(self) -> AuditOutcome:
        """The bounds as they were stated."""
        return AuditOutcome(
            canaries=len(self.coins),
            confidence=self.confidence,
            released_adapter=self.released_adapter,
            every_round=self.every_round,
        )

    def __repr__(self) -> str:
        return f"CanaryRecord(<{len(self.coins)} canaries of {self.site!r}, redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:  # msgspec's own, which rich tracebacks use, shows every field
        return []


def work_out(record: CanaryRecord) -> AuditOutcome:
    """The bounds anew, from coins and scores."""
    coins = np.array(record.coins, dtype=np.bool_)

    def bound(scores: tuple[float, ...]) -> float:
        told = np.array(scores, dtype=np.float64)
        return epsilon_lower_bound(told, coins, delta=record.delta, confidence=record.confidence)

    return AuditOutcome(
        canaries=len(coins),
        confidence=record.confidence,
        released_adapter=bound(record.released_scores),
        every_round=bound(record.round_scores),
    )


def write_canary_record(path: Path, record: CanaryRecord) -> None:
    """Write the record for its owner alone, mode 0600, whole or not at all.

    Raises:
        CustodyError: it cannot be written.
    """
    write_secret_file(path, msgspec.json.format(msgspec.json.encode(record), indent=0) + b"\n")


def read_canary_record(path: Path) -> CanaryRecord:
    """Read a record, and check that its bounds are those of its coins and scores.

    Raises:
        CustodyError: missing, or open to others than its owner.
        TooLarge: longer than any record.
        Malformed: anything else than a record, or bounds that do not follow from it; quotes nothing of it.
    """
    data = read_secret_file(path, limit=MAX_RECORD_BYTES)
    try:
        record = msgspec.json.decode(data, type=CanaryRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # msgspec lets the last two through
        raise Malformed(f"{path}: {len(data)} bytes are not the record of a canary audit of version 1") from None
    if not len(record.coins) == len(record.released_scores) == len(record.round_scores):
        raise Malformed(f"{path}: coins and scores are not of the same candidates")
    if not all(map(math.isfinite, (*record.released_scores, *record.round_scores, record.claim or 0.0))):
        raise Malformed(f"{path}: a number is not finite")  # JSON has 1e999
    found = work_out(record)
    stated = (record.released_adapter, record.every_round)
    if not np.allclose(stated, (found.released_adapter, found.every_round), rtol=0, atol=_TOLERANCE):
        raise Malformed(f"{path}: the bounds do not follow from the coins and scores", hint="the file was altered")
    return record
