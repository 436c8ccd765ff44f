"""The coordinator's state at the start of a round, as a value for the disk.

Between rounds no sum is open, and what ended before lies elsewhere (``history.py``). What is left is small: who is in,
sealed keys, and what was sent ahead for the next two rounds. While sites are asked to approve the release: who has, with
the adapter that came with it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fedseek.cohort import round_graph
from fedseek.errors import JournalUnusable
from fedseek.messages import ReleaseApproved, RoundKeys, SharesDealt
from fedseek_server.admission import ScopeSize
from fedseek_server.rounds import keep_digests
from fedseek_server.state import RunState


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``RunState`` between two rounds. The fields are named as there; ``listed`` stands for the graphs."""

    version: Literal[1] = 1
    next_round: int
    rotation_wanted: bool
    sites: dict[int, str]
    sizes: dict[str, ScopeSize]
    sealed: dict[int, dict[str, bytes]]
    held: dict[str, int]
    taken_at: float
    keys: dict[int, dict[str, RoundKeys]]
    dealt: dict[int, dict[str, SharesDealt]]
    listed: dict[int, tuple[str, ...]]
    contributors: tuple[str, ...]
    last_update: dict[str, int]
    approvals: tuple[ReleaseApproved, ...] = ()
    asked_since: float = 0.0
    asked_until: float = 0.0

    def to_bytes(self) -> bytes:
        """About 35 KB a site and group key, 1 KB a site and neighbour for shares."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """Read what ``to_bytes`` wrote.

        Raises:
            JournalUnusable: the bytes are anything else.
        """
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the last two through
            raise JournalUnusable(f"{len(data)} bytes are no snapshot of version 1: {error}") from None


def take_snapshot(state: RunState) -> Snapshot:
    """The state, to be gone on from; taken between two rounds."""
    envelopes, pipeline = state.envelopes, state.pipeline
    return Snapshot(
        next_round=state.next_round,
        rotation_wanted=state.rotation_wanted,
        sites=state.admissions.sites,
        sizes=state.admissions.sizes,
        sealed=envelopes.sealed,
        held=envelopes.held,
        taken_at=envelopes.taken_at,
        keys=pipeline.keys,
        dealt=pipeline.dealt,
        listed={number: graph.listed for number, graph in pipeline.graphs.items()},
        contributors=tuple(sorted(state.history.contributors)),
        last_update=state.history.last_update,
        approvals=tuple(state.approvals.values()),
        asked_since=state.asked_since,
        asked_until=state.asked_until,
    )


def put_back(state: RunState, snapshot: Snapshot) -> None:
    """Bring a fresh state to where the snapshot was taken. Graphs are worked out again: they follow from the lists."""
    state.next_round, state.rotation_wanted = snapshot.next_round, snapshot.rotation_wanted
    state.admissions.sites, state.admissions.sizes = snapshot.sites, snapshot.sizes
    envelopes, pipeline, history = state.envelopes, state.pipeline, state.history
    envelopes.sealed, envelopes.held, envelopes.taken_at = snapshot.sealed, snapshot.held, snapshot.taken_at
    pipeline.keys, pipeline.dealt = snapshot.keys, snapshot.dealt
    pipeline.graphs = {
        number: round_graph(state.federation, number, names) for number, names in snapshot.listed.items()
    }
    history.contributors, history.last_update = set(snapshot.contributors), snapshot.last_update
    state.asked_since, state.asked_until = snapshot.asked_since, snapshot.asked_until
    for reply in snapshot.approvals:
        state.approvals[reply.site] = reply
        keep_digests(state.final_digests, reply.site, reply.digests)
