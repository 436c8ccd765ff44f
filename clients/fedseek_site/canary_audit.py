"""The canary audit at a site: what its own training gives away, tested with texts that are nobody's.

    begin_run    secret seed -> candidates and coins, losses under the first weights
    training     the site's records and the candidates whose coin says in
    each sum     scores of all candidates, as a curious site that sees the sums would work them out
    release      losses under the last weights -> two lower bounds on epsilon, and a record for the site's own people

Scores know nothing of the coins. A lower bound above the stated epsilon means that the statement is wrong.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from msgspec.structs import replace

from fedseek.apply import ScopeState
from fedseek.canaries import (
    SEED_BYTES,
    Canaries,
    Scores,
    as_words,
    canary_losses,
    change_scores,
    make_canaries,
    with_canaries,
)
from fedseek.canary_record import RECORD_FILE, CanaryRecord, read_canary_record, work_out, write_canary_record
from fedseek.dp.auditing import AuditOutcome
from fedseek.encode import unflatten
from fedseek.errors import FedseekError, Malformed, ReleaseRefused
from fedseek.lora.model import set_trainable
from fedseek.plan import GLOBAL_SCOPE
from fedseek.plan_spec import Task
from fedseek.records import TokenisedRecords
from fedseek_site.state import CanaryState, SiteState
from fedseek_site.weights import load_weights

if TYPE_CHECKING:  # fedseek_site.run draws the canaries when it begins a run
    from fedseek_site.run import SiteRun


def draw_canaries(run: SiteRun) -> CanaryState | None:
    """Canaries for a run that begins, from the entropy of this site alone; None when the plan asks for none.

    The model must hold the first values.
    """
    if run.plan.num_canaries == 0:
        return None
    seed = secrets.token_bytes(SEED_BYTES)
    losses = canary_losses(run.model, _canaries(run, seed))
    return CanaryState(seed=seed, first_losses=_to_bytes(losses), round_scores=_to_bytes(np.zeros_like(losses)))


def training_records(run: SiteRun, state: SiteState, *, number: int) -> TokenisedRecords:
    """What round ``number`` trains on: the site's records for its task, and the canaries whose coin says in."""
    records = run.train_in(number)
    if state.canaries is None:
        return records
    return with_canaries(records, _canaries(run, state.canaries.seed, run.task_in(number)))


def expected_units(run: SiteRun, state: SiteState, *, number: int) -> float:
    """What a step's divisor counts: the site's units in the round's task and half of the canaries, whatever the coins say.

    Were those counted that are in, the size of an update would tell how many: no coin may be in anything but the gradients.
    """
    expected = 0.0 if state.canaries is None else run.plan.num_canaries / 2
    return run.train_in(number).num_units + expected


def watch_sum(
    run: SiteRun,
    seen: CanaryState | None,
    before: Mapping[str, ScopeState],
    after: Mapping[str, ScopeState],
    *,
    number: int,
) -> CanaryState | None:
    """Add to the scores what the sum of round ``number``, with this site in it, says of each candidate."""
    if seen is None:
        return None
    stage = run.plan.stage_of(number)
    change: dict[str, torch.Tensor] = {}
    for scope in run.shared:
        # noise and gradients alike are scaled by the learning rate: undone, no scope drowns the other
        rate = stage.learning_rate if scope == GLOBAL_SCOPE else stage.head_learning_rate
        moved = (after[scope].weights - before[scope].weights) / np.float32(rate)
        change |= {name: torch.from_numpy(value) for name, value in unflatten(moved, before[scope].layout).items()}
    load_weights(run.model, before)
    task = run.task_in(number)
    set_trainable(run.model, method=run.plan.spec.lora.method, task=task, number=number)
    canaries = _canaries(run, seen.seed, task)
    scores = change_scores(run.model, canaries, change, l2_clip_norm=run.plan.spec.privacy.l2_clip_norm)
    return replace(seen, round_scores=_to_bytes(_from_bytes(seen.round_scores) + scores), rounds=seen.rounds + 1)


def audit_outcome(run: SiteRun, state: SiteState, scopes: Mapping[str, ScopeState]) -> AuditOutcome | None:
    """The bounds on epsilon that the run's canaries give; None without canaries.

    Beside the release folder a record for this site's own people is written first, so that they have it too when the
    release is refused for what it says. Run by the site, at release.

    Args:
        run: of this site.
        state: in which the sums of all rounds are applied.
        scopes: the final weights.

    Raises:
        ReleaseRefused: the plan asks for canaries and the run has none, or a score is not finite.
        CustodyError: the record cannot be written.
    """
    if state.canaries is None:
        if run.plan.num_canaries:
            raise ReleaseRefused("the plan asks for canaries, this run was begun here without any", hint="run again")
        return None
    canaries = _canaries(run, state.canaries.seed)
    load_weights(run.model, scopes)
    # how far a loss fell: what the model makes of the text by itself does not count
    released = _from_bytes(state.canaries.first_losses) - canary_losses(run.model, canaries)
    every_round = _from_bytes(state.canaries.round_scores)
    if not (np.isfinite(released).all() and np.isfinite(every_round).all()):
        raise ReleaseRefused("the canary audit has a score that is not finite", hint="training diverged; run again")
    record = _record(run, state, canaries, released, every_round)
    found = work_out(record)
    record = replace(record, released_adapter=found.released_adapter, every_round=found.every_round)
    _keep(record, run.release_folder.with_name(RECORD_FILE))
    run.observe({"event": "audited", "canaries": found.canaries, "confidence": found.confidence})
    return found


def _record(run: SiteRun, state: SiteState, canaries: Canaries, released: Scores, every_round: Scores) -> CanaryRecord:
    spend = run.plan.claimed(run.plan.spend_of(state.steps_accounted))
    return CanaryRecord(
        run=run.name,
        site=run.me,
        kind=run.identity.kind,
        plan_digest=run.plan.digest,
        claim=spend.epsilon() if spend else None,
        delta=spend.delta if spend else 0.0,
        confidence=run.plan.spec.audit.confidence,
        rounds=state.canaries.rounds if state.canaries else 0,
        coins=tuple(canaries.coins.tolist()),
        released_scores=tuple(released.tolist()),
        round_scores=tuple(every_round.tolist()),
        released_adapter=0.0,
        every_round=0.0,
    )


def _keep(record: CanaryRecord, path: Path) -> None:
    """Write the record; that of another run, which is there already, is moved aside."""
    if path.exists():
        try:
            held = read_canary_record(path).run
        except FedseekError:
            held = None
        if held != record.run:
            os.replace(path, _free_name(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_canary_record(path, record)


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return aside


def _canaries(run: SiteRun, seed: bytes, task: Task | None = None) -> Canaries:
    """The candidates in the form they have in ``task``: by default that of the site's kind, which the run ends with."""
    spec = run.plan.spec.kinds[run.identity.kind]
    canaries = make_canaries(seed, run.plan.num_canaries, run.vocabulary, num_labels=max(1, len(spec.labels)))
    return canaries if (task or spec.task) == "classify" else as_words(canaries)


def _to_bytes(values: Scores) -> bytes:
    return values.astype("<f8").tobytes()


def _from_bytes(data: bytes) -> Scores:
    """Undo ``_to_bytes``."""
    if len(data) % 8:
        raise Malformed(f"stored scores have {len(data)} bytes, wanted 8 for each candidate")
    return np.frombuffer(data, "<f8").astype(np.float64)
