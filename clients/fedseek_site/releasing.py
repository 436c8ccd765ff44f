"""Releasing: what a site writes when a run ends, and the part of it that it signs for others."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec.structs import replace

from fedseek.apply import ScopeState
from fedseek.dp.accounting import PrivacySpend
from fedseek.encode import SummedUpdate
from fedseek.errors import ReleaseRefused, WrongRound
from fedseek.groupkey import GroupKey
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signing import CONTEXT_RELEASE, sign
from fedseek.lora.export import ADAPTER_FILES, WEIGHTS_FILE, save_adapter, save_head
from fedseek.lora.model import AdapterModel
from fedseek.messages import AggregateDown, ReleaseApproved, ReleaseRequest, release_message
from fedseek.plan import Plan
from fedseek.release import model_card, privacy_statement, statement_bytes
from fedseek_site.run import SiteRun
from fedseek_site.state import SiteState
from fedseek_site.sums import apply_previous, read_sum, remember, take_group_keys
from fedseek_site.training import evaluate_weights, spend_of
from fedseek_site.weights import digests_of, load_weights, to_values

_STATEMENT = "privacy.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,100}")
_AT_HOME = """
## This site's head

Too few sites of kind `{kind}` take part for a sum of their heads to hide any of them. The head in this folder was
trained on this site's records alone and never left it; so did its figure above, which is over this site's rows.
"""
_OWN_FIGURE = """
## This site's figure

The figure above is over this site's own held-back rows. There is no sum over its kind: too few of its sites were there
when the run was closed, or one of them vanished then.
"""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a run has come to at this site.

    Attributes:
        run: its name.
        plan: of the run.
        identity: signs the statement.
        model: holds the final weights.
        digests: of the final tensors of the shared scopes.
        spend: privacy spent; None when the plan promises nothing.
        guards_passed: names of the checks that held.
        steps: trained at this site.
        utility: over the sites of this site's kind, or over its own rows.
        note: what the model card says about head and figure beyond the usual; may be empty.
        earlier_runs: those that this one goes on from; a release of theirs is replaced.
    """

    run: str
    plan: Plan
    identity: SiteIdentity = field(repr=False)
    model: AdapterModel = field(repr=False)
    digests: dict[str, bytes]
    spend: PrivacySpend | None
    guards_passed: tuple[str, ...]
    steps: int
    utility: float
    note: str = ""
    earlier_runs: tuple[str, ...] = ()


def release(run: SiteRun, state: SiteState, request: ReleaseRequest) -> tuple[SiteState, ReleaseApproved]:
    """Apply what is left to apply, read the final metrics, write the release, and sign what others may have of it.

    The secrets that the run still holds are gone from the new state.

    Raises:
        WrongRound: not every round of the plan is accounted for, or the metrics are of another round.
        ReleaseRefused: the privacy statement cannot be earned, or the folder holds another run's release.
        CohortTooSmall, WrongKey, Malformed, Tampered: as ``sums.read_sum``.
    """
    if request.metrics.round != run.closing_round:
        raise WrongRound(f"got the metrics of round {request.metrics.round}, wanted those of {run.closing_round}")
    keys = take_group_keys(run, state, request.envelopes)
    last = run.closing_round - 1
    applied = apply_previous(run, state, keys, request.previous, until=last, seconds={})
    scopes = applied.scopes
    utility, note = _final_utility(run, state, keys, request.metrics, scopes=scopes)
    load_weights(run.model, scopes)
    finished = FinishedRun(
        run=run.name,
        plan=run.plan,
        identity=run.identity,
        model=run.model,
        digests=digests_of(scopes, run.shared),
        spend=spend_of(run, state.steps_accounted),
        guards_passed=state.guards_passed,
        steps=state.steps_done,
        utility=utility,
        note=note,
        earlier_runs=state.earlier_runs,
    )
    approval = write_site_release(finished, run.release_folder, send_adapter=request.send_adapter)
    run.observe({"event": "released", "utility": utility, "guards_passed": list(state.guards_passed)})
    after = remember(run, state, applied)
    return replace(after, scopes=to_values(scopes), group_keys={}, rounds={}, released=True), approval


def write_site_release(finished: FinishedRun, folder: Path, *, send_adapter: bool) -> ReleaseApproved:
    """Write adapter, head, model card and privacy statement into ``folder``, all or nothing.

    A release of the same run that is there already is replaced: this site was stopped before it could answer.

    Returns:
        What the site signs for others, with the adapter if it is to be sent.

    Raises:
        ReleaseRefused: the privacy statement cannot be earned, or the folder holds something else; nothing is written.
    """
    plan, identity, digests = finished.plan, finished.identity, finished.digests
    base = plan.spec.model.source
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".release-", dir=folder.parent) as scratch:
        draft = Path(scratch) / "release"
        save_adapter(finished.model, draft, base_name=base)
        save_head(finished.model, draft, kind=identity.kind, labels=plan.spec.kinds[identity.kind].labels)
        files = {name: (draft / name).read_bytes() for name in ADAPTER_FILES}
        statement = privacy_statement(
            plan,
            run=finished.run,
            site=identity.name,
            kind=identity.kind,
            spend=finished.spend,
            guards_passed=finished.guards_passed,
            steps=finished.steps,
            adapter_sha256=hashlib.sha256(files[WEIGHTS_FILE]).hexdigest(),
            digests=digests,
        )
        document = statement_bytes(statement)
        signature = sign(identity, CONTEXT_RELEASE, release_message(finished.run, digests, document))
        utility = {identity.kind: finished.utility}
        card = model_card(plan, run=finished.run, statements=[statement], utility=utility, base=base)
        (draft / "README.md").write_text(card + finished.note, "utf-8")
        (draft / _STATEMENT).write_bytes(document)
        (draft / "privacy.sig").write_bytes(signature)
        runs = (finished.run, *finished.earlier_runs)
        _put_in_place(draft, folder, runs=runs, aside=Path(scratch) / "before")
    return ReleaseApproved(
        run=finished.run,
        site=identity.name,
        digests=digests,
        statement=document,
        signature=signature,
        adapter=files if send_adapter else {},
    )


def _put_in_place(draft: Path, folder: Path, *, runs: Sequence[str], aside: Path) -> None:
    if folder.exists():
        held = _run_of(folder)
        if held is None:
            raise ReleaseRefused(f"{folder} exists and holds no release", hint="move it away, or name another folder")
        folder.rename(aside if held in runs else _shelf(folder, held))
    for path in (*draft.rglob("*"), draft):
        _sync(path)  # the step is done once: what it wrote must outlast a power failure as its answer does
    os.replace(draft, folder)
    _sync(folder.parent)


def _shelf(folder: Path, run: str) -> Path:
    """Where the release of an earlier run is kept, beside the newest one."""
    name = run if _PLAIN_NAME.fullmatch(run) else hashlib.sha256(run.encode()).hexdigest()[:16]
    shelf, number = folder.with_name(f"{folder.name}-{name}"), 1
    while shelf.exists():
        number += 1
        shelf = folder.with_name(f"{folder.name}-{name}-{number}")
    return shelf


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _run_of(folder: Path) -> str | None:
    """The run whose release this folder holds; None if it holds none."""
    try:
        statement = msgspec.json.decode((folder / _STATEMENT).read_bytes(), type=dict[str, object])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):  # msgspec lets the last one through
        return None
    run = statement.get("run")
    return run if isinstance(run, str) else None


def _final_utility(
    run: SiteRun,
    state: SiteState,
    keys: Mapping[int, GroupKey],
    metrics: AggregateDown,
    *,
    scopes: Mapping[str, ScopeState],
) -> tuple[float, str]:
    """The figure of the release, and what the model card must add to it."""
    among = [scope for scope in run.shared if scope == run.head]
    summed = read_sum(run, state, keys, metrics, scopes=scopes, among=among)
    if summed:
        return _utility_of(summed[run.head]), ""
    own = evaluate_weights(run, scopes, number=run.closing_round - 1).utility
    return own, _OWN_FIGURE if among else _AT_HOME.format(kind=run.identity.kind)


def _utility_of(summed: SummedUpdate) -> float:
    """Utility over all sites of the kind: hits over rows (accuracy), or pairs ordered rightly over pairs (AUC)."""
    return summed.metrics["held_back_score"] / max(summed.metrics["held_back_weight"], 1.0)
