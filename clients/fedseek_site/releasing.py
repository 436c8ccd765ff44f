"""Releasing: what a site writes when a run ends, and the part of it that it signs for others.

draft_release   apply the last sums, read the final metrics -> gate -> statement; nothing signed, nothing written
(people)        may look at the draft, and approve what would be signed
sign_release    sign, write the folder; nothing more is done in the run after that
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from fedseek.apply import ScopeState
from fedseek.encode import SummedUpdate
from fedseek.errors import ReleaseRefused, WrongRound
from fedseek.groupkey import GroupKey
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signing import CONTEXT_RELEASE, sign
from fedseek.lora.adapter_file import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, largest_value, read_adapter
from fedseek.lora.export import adapter_weights, head_files
from fedseek.messages import AggregateDown, ReleaseApproved, ReleaseRequest, release_message
from fedseek.plan import Plan
from fedseek.release import check_release, model_card, released_config, writes_words
from fedseek.statement import CanaryAudit, Outcome, PrivacyStatement, privacy_statement, statement_bytes
from fedseek.statement_page import privacy_page
from fedseek.statement_words import LANGUAGES
from fedseek_site.answering import report_answers_of_kind
from fedseek_site.canary_audit import audit_outcome
from fedseek_site.run import SiteRun
from fedseek_site.state import SiteState
from fedseek_site.sums import apply_previous, read_sum, remember, take_group_keys
from fedseek_site.training import evaluate_weights
from fedseek_site.weights import load_weights, to_values

STATEMENT_FILE: Final = "privacy.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,100}")
_AT_HOME = """
## This site's head

Too few sites of kind `{kind}` take part for a sum of their heads to hide any of them. The head in this folder was
trained on this site's records alone and never left it; so did its figure above, which is over this site's rows.
"""
_OWN_FIGURE = """
## This site's figure

The figure above is over this site's own held-back rows. There is no sum over its kind: too few of its sites take part or
were there when the run was closed, or one of them vanished then.
"""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a site would sign and write. The same request gives the same draft, to the byte.

    Attributes:
        run: its name.
        statement: the privacy statement, the very bytes.
        digests: of the final tensors of the shared scopes.
        files: of the release folder but the signature, by name.
        utility: over the sites of this site's kind, or over its own rows; stays at home.
        after: the state of the run once it is released.
    """

    run: str
    statement: bytes = field(repr=False)
    digests: dict[str, bytes] = field(repr=False)
    files: dict[str, bytes] = field(repr=False)
    utility: float
    after: SiteState = field(repr=False)

    @property
    def message(self) -> bytes:
        """What is signed; its SHA-256 is what people approve."""
        return release_message(self.run, self.digests, self.statement)


PermitDraft = Callable[[Callable[[], Draft]], Draft]
"""Given what computes a draft, returns the draft if people let it go; raises to refuse, perhaps without computing it."""


def release(
    run: SiteRun, state: SiteState, request: ReleaseRequest, permit: PermitDraft
) -> tuple[SiteState, ReleaseApproved]:
    """Draft the release, and if it is permitted sign it and write it.

    Raises:
        as ``draft_release``, ``permit`` and ``sign_release``.
    """
    draft = permit(lambda: draft_release(run, state, request))
    return sign_release(run, draft, send_adapter=request.send_adapter)


def draft_release(run: SiteRun, state: SiteState, request: ReleaseRequest) -> Draft:
    """Apply what is left to apply, read the final metrics, and let the gate decide.

    Nothing is signed or written, but for the record of the canary audit, which this site's people have in any case.

    Raises:
        WrongRound: not every round of the plan is accounted for, or the metrics are of another round.
        ReleaseRefused: the gate is closed, or the privacy statement cannot be earned.
        CohortTooSmall, WrongKey, Malformed, Tampered: as ``sums.read_sum``.
    """
    if request.metrics.round != run.closing_round:
        raise WrongRound(f"got the metrics of round {request.metrics.round}, wanted those of {run.closing_round}")
    keys = take_group_keys(run, state, request.envelopes)
    last = run.closing_round - 1
    applied = apply_previous(run, state, keys, request.previous, until=last, seconds={})
    figure = _final_figure(run, state, keys, request.metrics, scopes=applied.scopes)
    load_weights(run.model, applied.scopes)
    weights = adapter_weights(run.model, words=writes_words(run.plan))
    adapter = {CONFIG_FILE: released_config(run.plan), WEIGHTS_FILE: weights}
    after = remember(run, state, applied)
    outcome = _outcome(run, after, applied.scopes, adapter, figure)
    statement = privacy_statement(run.plan, outcome, checks=check_release(run.plan, outcome))
    document = statement_bytes(statement)
    heads = head_files(run.model, kind=run.identity.kind, labels=run.plan.spec.kinds[run.identity.kind].labels)
    told = _pages(run.plan, statement, figure)
    return Draft(
        run=run.name,
        statement=document,
        digests=dict(outcome.digests),
        files={**adapter, **heads, **told, STATEMENT_FILE: document},
        utility=figure.utility,
        after=replace(after, scopes=to_values(applied.scopes), group_keys={}, rounds={}, released=True),
    )


def sign_release(run: SiteRun, draft: Draft, *, send_adapter: bool) -> tuple[SiteState, ReleaseApproved]:
    """Sign a draft and write the release folder. The secrets that the run still holds are gone from the new state.

    Raises:
        ReleaseRefused: the folder holds something else.
    """
    signature = write_site_release(draft, run.identity, run.release_folder)
    run.observe({"event": "released", "utility": draft.utility, "guards_passed": list(draft.after.guards_passed)})
    approved = ReleaseApproved(
        run=draft.run,
        site=run.me,
        digests=draft.digests,
        statement=draft.statement,
        signature=signature,
        adapter={name: draft.files[name] for name in ADAPTER_FILES} if send_adapter else {},
    )
    return draft.after, approved


def write_site_release(draft: Draft, identity: SiteIdentity, folder: Path) -> bytes:
    """Sign a draft and write adapter, head, model card and privacy statement into ``folder``, all or nothing.

    A release of the same run that is there already is replaced: this site was stopped before it could answer.

    Returns:
        The signature, for others too.

    Raises:
        ReleaseRefused: the folder holds something else; nothing is written.
    """
    signature = sign(identity, CONTEXT_RELEASE, draft.message)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".release-", dir=folder.parent) as scratch:
        written = Path(scratch) / "release"
        written.mkdir()
        for name, data in {**draft.files, "privacy.sig": signature}.items():
            (written / name).write_bytes(data)
        runs = (draft.run, *draft.after.earlier_runs)
        _put_in_place(written, folder, runs=runs, aside=Path(scratch) / "before")
    return signature


@dataclass(frozen=True, slots=True)
class _Figure:
    """Utility at the end: what the model card says, and what the gate may go by."""

    utility: float
    is_whole: bool  # over all the head was trained on: the sites of the kind, or this one where its head stays at home
    note: str


def _outcome(
    run: SiteRun, state: SiteState, scopes: Mapping[str, ScopeState], adapter: Mapping[str, bytes], figure: _Figure
) -> Outcome:
    """``state`` and ``scopes`` once all sums are applied."""
    roster = run.federation.roster
    return Outcome(
        run=run.name,
        roster_digest=roster.digest().hex(),
        site=run.me,
        kind=run.identity.kind,
        files={name: hashlib.sha256(data).hexdigest() for name, data in adapter.items()},
        digests=state.digests,
        contributors=run.federation.names(state.contributors),
        steps=state.steps_done,
        spend=run.plan.spend_of(state.steps_accounted),
        steps_spent=run.steps_spent((run.name, *state.earlier_runs)),
        guards_passed=state.guards_passed,
        audit=_audit(run, state, scopes),
        utility=figure.utility if figure.is_whole else None,
        largest_value=largest_value(read_adapter(adapter[WEIGHTS_FILE]), seed=run.plan.seed_for("lora")),
    )


def _audit(run: SiteRun, state: SiteState, scopes: Mapping[str, ScopeState]) -> CanaryAudit | None:
    found = audit_outcome(run, state, scopes)
    return None if found is None else CanaryAudit(**asdict(found))


def _pages(plan: Plan, statement: PrivacyStatement, figure: _Figure) -> dict[str, bytes]:
    """What people read in the site's own folder: its figure too, which others are not told."""
    utility, base = {statement.kind: figure.utility}, plan.spec.model.source
    card = model_card(plan, run=statement.run, statements=[statement], utility=utility, base=base) + figure.note
    told = {words.file: privacy_page(plan, [statement], words, unsigned=()) for words in LANGUAGES}
    return {name: text.encode() for name, text in {"README.md": card, **told}.items()}


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
        statement = msgspec.json.decode((folder / STATEMENT_FILE).read_bytes(), type=dict[str, object])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):  # msgspec lets the last one through
        return None
    run = statement.get("run")
    return run if isinstance(run, str) else None


def _final_figure(
    run: SiteRun,
    state: SiteState,
    keys: Mapping[int, GroupKey],
    metrics: AggregateDown,
    *,
    scopes: Mapping[str, ScopeState],
) -> _Figure:
    """The figure of the release, and what the model card must add to it."""
    among = [scope for scope in run.shared if scope == run.head]
    summed = read_sum(run, state, keys, metrics, scopes=scopes, among=among)
    report_answers_of_kind(run, summed, number=metrics.round - 1)
    if summed:
        return _Figure(_utility_of(summed[run.head]), is_whole=True, note="")
    own = evaluate_weights(run, scopes, number=run.closing_round - 1).utility
    has_head = bool(run.layouts[run.head].tensors)
    note = _AT_HOME.format(kind=run.identity.kind) if has_head and not among else _OWN_FIGURE
    return _Figure(own, is_whole=not among, note=note)


def _utility_of(summed: SummedUpdate) -> float:
    """Utility over all sites of the kind: hits over rows (accuracy), or pairs ordered rightly over pairs (AUC)."""
    return summed.metrics["held_back_score"] / max(summed.metrics["held_back_weight"], 1.0)
