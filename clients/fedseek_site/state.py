"""What a site must remember between two requests of a run, as one value that goes to the disk with every answer.

A step takes the state and gives a new one; nothing here changes in place. Secrets live as short as they can:

    of a round          drawn with its keys, gone as soon as its update is made
    held for others     from the round's boxes until this site revealed its half
    group keys          until every sum made under them is applied
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from fedseek.deal import HeldShares, RoundSecrets
from fedseek.errors import Malformed
from fedseek.messages import RoundKeys


class ScopeValues(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``fedseek.apply.ScopeState`` without its layout; ``repr`` is redacted.

    Attributes:
        weights: little-endian float32, 4 bytes a value.
        momentum: little-endian float64, 8 bytes a value; empty for zeros, as without server momentum.
        value_range: C of the quantiser.
    """

    weights: bytes
    momentum: bytes
    value_range: float

    def __repr__(self) -> str:
        return f"ScopeValues(<{len(self.weights) // 4} values, redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:  # msgspec's own, which rich tracebacks use, shows every field
        return []


class EarlierAdapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The shared scopes before the last sum was applied; ``repr`` is redacted.

    Should the coordinator be lost with its disk, other sites may not have applied that sum: this is what all still have.

    Attributes:
        round: the last one that is in it.
        scopes: weights by shared scope.
        digests: of their tensors.
        contributors: positions on the roster of the sites whose updates are in it, ascending.
    """

    round: int
    scopes: dict[str, ScopeValues]
    digests: dict[str, bytes]
    contributors: tuple[int, ...]

    def __repr__(self) -> str:
        return f"EarlierAdapter(<after round {self.round}, redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class CanaryState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The canaries of a run and what was seen of them so far; ``repr`` is redacted.

    Attributes:
        seed: 32 bytes of the operating system, which candidates and coins follow from.
        first_losses: of each candidate under the first weights; little-endian float64, 8 bytes a candidate.
        round_scores: of each candidate, summed over the rounds; as the losses.
        rounds: sums that are in the scores.
    """

    seed: bytes
    first_losses: bytes
    round_scores: bytes
    rounds: int = 0

    def __repr__(self) -> str:
        return f"CanaryState(<{len(self.first_losses) // 8} canaries, redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class LossWatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a site's vote to stop goes by; ``repr`` is redacted.

    Attributes:
        stage: index of the stage that the losses are of.
        round: the last one whose first weights were evaluated.
        best: the lowest loss, nats.
        worse: rounds in a row whose loss was above it.
    """

    stage: int
    round: int
    best: float
    worse: int = 0

    def __repr__(self) -> str:
        return f"LossWatch(<up to round {self.round}, redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class RoundState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One round at one site: keys drawn, shares dealt, update sent, shares revealed; ``repr`` is redacted.

    Attributes:
        keys: this site's public keys of the round.
        secrets: their private halves and the self mask; None once the update is made.
        listed: the round's key list, in roster order; empty until shares are dealt.
        peers: checked keys of this site's neighbours and kind, from dealing until the update is made.
        held: shares by dealer: this site's own from dealing on, its neighbours' from the update until it revealed them.
        participants: whom this site masked with; empty until its update is made.
        epoch: of the group key that the update is encrypted under; None until it is made.
        vouched: what this site signed as its presence; empty until its update is made.
        survivors: for whom this site revealed shares; empty until then.
    """

    keys: RoundKeys
    secrets: RoundSecrets | None
    listed: tuple[str, ...] = ()
    peers: dict[str, RoundKeys] = {}
    held: dict[str, HeldShares] = {}
    participants: tuple[str, ...] = ()
    epoch: int | None = None
    vouched: bytes = b""
    survivors: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"RoundState(<round {self.keys.round}, redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class SiteState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a run needs at a site besides the plan's model and the site's data and identity; ``repr`` is redacted.

    Attributes:
        offer: the encoded ``PlanOffer`` that began the run here: plan and roster.
        scopes: weights by scope, a head that stays at home among them.
        steps_done: steps trained, counted one by one; by stage of the plan, as the next.
        steps_accounted: steps the privacy accountant knows of; the release compares the two.
        guards_passed: names of the checks that held, sorted.
        last_sent: round of the last update sent, 0 for none; one more than the plan's rounds once the run is closed.
        last_applied: last round whose sum was applied, or which was given up; 0 for none.
        digests: of the tensors of the shared scopes.
        contributors: positions on the roster of the sites whose updates are in them, ascending.
        before: the shared scopes before the last sum was applied; None before the first.
        earlier_runs: those that this run goes on from, newest first.
        group_keys: by epoch, ``GroupKey.to_bytes``.
        canaries: of this site; None when the plan asks for none.
        watch: of this site's losses; None when the plan lets nobody vote to stop.
        resting_since: the round whose sum ended its stage before its time; 0 for none.
        rounds: by number: those to come, and the last one sent until its sum is applied.
        released: the release was written; nothing more is done in this run.
        stopped: a sum did not pass; nothing more is done in this run.
    """

    version: Literal[2] = 2
    offer: bytes
    scopes: dict[str, ScopeValues]
    steps_done: tuple[int, ...]
    steps_accounted: tuple[int, ...]
    guards_passed: tuple[str, ...] = ()
    last_sent: int = 0
    last_applied: int = 0
    digests: dict[str, bytes] = {}
    contributors: tuple[int, ...] = ()
    before: EarlierAdapter | None = None
    earlier_runs: tuple[str, ...] = ()
    group_keys: dict[int, bytes] = {}
    canaries: CanaryState | None = None
    watch: LossWatch | None = None
    resting_since: int = 0
    rounds: dict[int, RoundState] = {}
    released: bool = False
    stopped: bool = False

    def to_bytes(self) -> bytes:
        """The state with all its secrets: to be sealed before it is stored. 8 bytes a value, 24 with server momentum."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> SiteState:
        """Read what ``to_bytes`` wrote.

        Raises:
            Malformed: the bytes are anything else; the message quotes none of them.
        """
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError):  # msgspec lets the second one through
            raise Malformed(f"{len(data)} bytes are not the state of a site of version 2") from None

    def __repr__(self) -> str:
        return f"SiteState(<sent up to round {self.last_sent}, applied up to {self.last_applied}, redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []
