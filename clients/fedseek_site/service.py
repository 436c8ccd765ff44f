"""The site service: it owns the data, the keys and the word "no".

One method, :meth:`SiteService.handle`: bytes of a request in, bytes of a reply out. In production it stands behind a
socket in a process of its own; in a simulation behind a process of the engine.

    parse -> done before? the same bytes again -> step -> answer and new state to the disk, together -> answer

It never lets an exception's text out: a refusal is a code and a rule, the rest goes to the site's own log. A refusal is
nothing done: the state is as before, and a right request may follow.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from fedseek.errors import BudgetExceeded, FedseekError, NotNow, PlanRefused, Tampered, WrongRound
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.vault import StorageKey
from fedseek.lora.compute import Compute
from fedseek.messages import (
    KeyRequest,
    PlanOffer,
    Refused,
    ReleaseRequest,
    Reply,
    Request,
    RoundRequest,
    ShareRequest,
    Standing,
    UnmaskRequest,
    decode_request,
    encode_message,
)
from fedseek_site.admission import SiteData
from fedseek_site.checkpoints import CHECKPOINT_FILE, SECONDS_BETWEEN, Checkpoints
from fedseek_site.continuing import continue_run, offer_of, standing_of
from fedseek_site.entering import admit, deal, make_key
from fedseek_site.journal import Journal, Step
from fedseek_site.ledger import Ledger
from fedseek_site.releasing import Draft, PermitDraft, release
from fedseek_site.rounds import play_round, unmask
from fedseek_site.run import Clock, Observe, Permit, SiteRun, begin_run, open_run, permit_all, report_layout
from fedseek_site.state import SiteState

PermitRelease = Callable[[str, bytes, Callable[[], Draft]], Draft]
"""Given the plan's digest, the request and what computes a draft; see ``release_permission``."""

_MAX_EPOCHS: Final = 1_000_000  # keys last days, so no run gets there
log = logging.getLogger(__name__)


def permit_every_release(plan: str, request: bytes, draft: Callable[[], Draft]) -> Draft:
    """As ``permit_all``, for releases."""
    return draft()


class SiteService:
    """One institution. A process that is killed at any moment goes on where its journal says it was.

    A site is in one run at a time: the one that it last did a step of.

    Args:
        identity: the site's private keys.
        data: its records.
        roster: the sites whose fingerprints people here compared; None: every offer is refused until ``trust``.
        state_folder: of the journal, on a local disk; made if it is missing.
        storage_key: seals what is in it; the same after a restart.
        ledger: what the records have cost in privacy; entered before each training. Its owner closes it.
        release_folder: where a released adapter and its evidence are written.
        observe: told what happens here, for the site's own report; never sent anywhere.
        clock: Unix time in seconds; says how old a group key is.
        permit: the site's policy.
        permit_release: the word of the site's people on a release.
        computes: what each process that trains computes on, the first being this one; none: what there is, alone.
        checkpoint_seconds: least time between two checkpoints of a round's training.

    Raises:
        FedseekError: the journal cannot be opened: see :class:`fedseek_site.journal.Journal`.
    """

    def __init__(
        self,
        identity: SiteIdentity,
        data: SiteData,
        *,
        roster: Roster | None,
        state_folder: Path,
        storage_key: StorageKey,
        ledger: Ledger,
        release_folder: Path,
        observe: Observe,
        clock: Clock = time.time,
        permit: Permit = permit_all,
        permit_release: PermitRelease = permit_every_release,
        computes: Sequence[Compute] = (),
        checkpoint_seconds: float = SECONDS_BETWEEN,
    ) -> None:
        self.identity = identity
        self.data = data
        self._roster = roster
        self._release_folder = release_folder
        self._observe = observe
        self._clock = clock
        self._permit = permit
        self._permit_release = permit_release
        self._computes = tuple(computes)
        self._told_refusal = ("", b"", "")  # the last one, told once: a wait for people's approvals may take weeks
        self._turn = threading.Lock()
        self._held: tuple[SiteRun, SiteState] | None = None  # what the journal has, opened
        self._standing: Standing | None = None  # as far as the journal has it; None: not known yet, or none
        state_folder.parent.mkdir(parents=True, exist_ok=True)
        self._ledger = ledger
        ledger.take_data(data.train)
        self._journal = Journal(state_folder, storage_key)
        self._checkpoints = Checkpoints(
            state_folder / CHECKPOINT_FILE, storage_key, observe=observe, seconds=checkpoint_seconds
        )
        if (latest := self._journal.latest_run()) is not None:
            ledger.end_earlier(latest)  # killed between beginning it and saying so

    def trust(self, roster: Roster | None) -> None:
        """Take this roster for the true one, from now on: people compared the fingerprint of every entry.

        A run with another roster is refused from here on, also one that has begun; with None every run.
        """
        with self._turn:
            self._roster = roster
            self._held = None  # opened again on the next request, and checked against the new roster

    def replace_data(self, data: SiteData) -> None:
        """Use these records from the next run on; one that has begun here goes on with those that it began with.

        Raises:
            NotNow: a run is being played here; its model and rows are loaded.
        """
        with self._turn:
            if self._held is not None and not (self._held[1].released or self._held[1].stopped):
                raise NotNow(self.identity.name, "a run is being played", hint="wait for its end, or stop it")
            self._ledger.take_data(data.train)
            self.data, self._held = data, None

    def close(self) -> None:
        """Let go of the journal, so that another process may open it; nothing is answered any more."""
        with self._turn:
            self._let_go()
            self._journal.close()

    def standing(self) -> Standing | None:
        """What this site could go on from if the coordinator were lost; None: nothing. Does not wait for training.

        Raises:
            Malformed, WrongKey, JournalUnusable: what the journal holds cannot be read.
        """
        known = self._standing
        if known is not None:
            return known
        with self._turn:
            run, state = self._latest()
            self._standing = None if run is None or state is None else standing_of(self.identity.name, run, state)
            return self._standing

    def handle(self, request: bytes) -> bytes:
        """Answer one request of the coordinator.

        Guarantee: a request that was answered gets the same bytes again, also after a restart; another request for the
        same step is refused. What is answered is on the disk first, together with the state that belongs to it.

        Returns:
            An encoded reply; a ``Refused`` when anything in the request or at the site forbids an answer.
        """
        run = "unknown"
        try:
            try:
                message = decode_request(request)
                run = message.run
                with self._turn:
                    return self._answer_once(message, request)
            except FedseekError as error:
                log.warning("site %s refuses a request of run %s: %s", self.identity.name, run, error)
                self._tell_refused(run, request, error)
                rule = error.rule if isinstance(error, PlanRefused | NotNow | BudgetExceeded) else error.code
                return self._refused(run, error.code, rule)
        except Exception:
            # Outer edge of the site: Flower would carry the exception's text, which may quote data, to the coordinator.
            log.exception("site %s failed on a request of run %s", self.identity.name, run)
            return self._refused(run, "InternalError", "internal error")

    def _refused(self, run: str, code: str, rule: str) -> bytes:
        return encode_message(Refused(run=run, site=self.identity.name, code=code, rule=rule[:200]))

    def _answer_once(self, message: Request, request: bytes) -> bytes:
        step = step_of(message)
        done = self._journal.recall(step, request)
        if done is not None:
            self._tell_answered(step, request, done, again=True)
            return done
        run, state = self._enter(message) if isinstance(message, PlanOffer) else self._resume(message.run)
        if isinstance(message, RoundRequest | ReleaseRequest):
            self._permit(run.name, step.phase, run.plan, run.federation.roster)
        try:
            permit_release = partial(self._permit_release, run.plan.digest, request)
            after, reply = take_step(run, state, message, permit_release)
        except Tampered as error:
            # One try in a run: asked again and again, what passes and what does not would tell about the group key.
            self._record(step, request, self._refused(run.name, error.code, error.code), run, stop(state))
            raise
        answer = encode_message(reply)
        self._record(step, request, answer, run, after)
        self._tell_answered(step, request, answer, again=False)
        return answer

    def _tell_refused(self, run: str, request: bytes, error: FedseekError) -> None:
        """To the site's own record. Of one that is put off, the same word on the same request is told once."""
        told = (run, sha256(request).digest(), str(error))
        if not isinstance(error, NotNow) or told != self._told_refusal:
            self._observe({"event": "refused", "code": error.code, "text": str(error)})
        self._told_refusal = told

    def _tell_answered(self, step: Step, request: bytes, answer: bytes, *, again: bool) -> None:
        """What is about to leave the building, for the site's own record."""
        sizes = {"bytes_in": len(request), "bytes_out": len(answer)}
        digests = {"request": sha256(request).hexdigest(), "answer": sha256(answer).hexdigest()}
        told = {"run": step.run, "phase": step.phase, "round": step.round, "again": again}
        self._observe({"event": "answered", **told, **sizes, **digests})

    def _record(self, step: Step, request: bytes, answer: bytes, run: SiteRun, after: SiteState) -> None:
        self._held = None  # should the next line fail half-way, the journal alone knows how far it got
        self._journal.record(step, request, answer, after.to_bytes())
        self._held = run, after
        self._standing = standing_of(run.me, run.name, after)
        if step.phase in ("plan", "round", "release"):  # of the round that is answered now, or of a run that was left
            self._checkpoints.remove()
        if step.phase == "plan":  # the first step of a run: this site is in one at a time, and in none that it has left
            self._ledger.end_earlier(run.name)
        if after.released or after.stopped:
            self._ledger.end(run.name)
            if run.several is not None:
                run.several.close()

    def _enter(self, offer: PlanOffer) -> tuple[SiteRun, SiteState]:
        """The run this plan is offered for: begun here before, or to begin now."""
        if self._journal.latest_run() == offer.run or self._journal.state(offer.run) is not None:
            return self._resume(offer.run)
        name, state = self._latest()
        taken_over = continue_run(self.identity.name, offer, name, state) if offer.continues else None
        if name is not None and taken_over is not None:
            self._ledger.follow(offer.run, name, steps=taken_over.steps_accounted)
        if state is None or state.released or state.stopped:
            self._let_go()  # before another base model is loaded: two may not fit on a GPU
        run = self._open(offer, self._permit)
        report_layout(run)
        return run, taken_over or begin_run(run, offer)

    def _latest(self) -> tuple[str | None, SiteState | None]:
        """The run that this site is in, and its state."""
        name = self._journal.latest_run()
        if self._held is not None and self._held[0].name == name:
            return name, self._held[1]
        stored = None if name is None else self._journal.state(name)
        return name, None if stored is None else SiteState.from_bytes(stored)

    def _resume(self, name: str) -> tuple[SiteRun, SiteState]:
        """The run and its state; from the journal where they are not in memory.

        Raises:
            WrongRound: this site is not in that run, or no longer.
        """
        if self._held is not None and self._held[0].name == name:
            return self._held
        stored = self._journal.state(name) if self._journal.latest_run() == name else None
        if stored is None:
            raise WrongRound(f"got a request for run {name!r}, this site is in {self._journal.latest_run()!r}")
        state = SiteState.from_bytes(stored)
        self._held = self._open(offer_of(state), permit_all), state  # it was permitted when it began
        return self._held

    def _let_go(self) -> None:
        """Of the run in memory, its model and the other processes that train it; the journal has all that lasts."""
        if self._held is not None and self._held[0].several is not None:
            self._held[0].several.close()
        self._held = None

    def _open(self, offer: PlanOffer, permit: Permit) -> SiteRun:
        return open_run(
            offer,
            self.identity,
            self.data,
            trusted=self._roster,
            release_folder=self._release_folder,
            observe=self._observe,
            clock=self._clock,
            ledger=self._ledger,
            checkpoints=self._checkpoints,
            permit=permit,
            computes=self._computes,
        )


def step_of(message: Request) -> Step:
    """What is done once: one step a phase and round; for group keys, an epoch.

    Raises:
        WrongRound: an epoch that no run reaches.
    """
    match message:
        case PlanOffer():
            return Step(message.run, "plan", message.round)
        case KeyRequest():
            if message.epoch > _MAX_EPOCHS:
                raise WrongRound(f"asked for the group key of epoch {message.epoch}, wanted at most {_MAX_EPOCHS}")
            return Step(message.run, "key", message.epoch)
        case ShareRequest():
            return Step(message.run, "shares", message.round)
        case RoundRequest():
            return Step(message.run, "round", message.round)
        case UnmaskRequest():
            return Step(message.run, "unmask", message.round)
        case ReleaseRequest():
            return Step(message.run, "release", message.metrics.round + 1)


def stop(state: SiteState) -> SiteState:
    """The same run, in which nothing more is done; its secrets are gone."""
    return replace(state, stopped=True, rounds={}, group_keys={})


def take_step(run: SiteRun, state: SiteState, message: Request, permit_release: PermitDraft) -> tuple[SiteState, Reply]:
    """Do what a request asks for; an error means that nothing was done.

    Raises:
        WrongRound: the run is over at this site; else as the step says.
    """
    if state.stopped:
        raise WrongRound(
            f"run {run.name!r} was stopped at this site: a sum did not pass",
            hint="find out why, then begin another run",
        )
    if state.released:
        raise WrongRound(f"run {run.name!r} is released at this site; nothing more is done in it")
    match message:
        case PlanOffer():
            return admit(run, state, message)
        case KeyRequest():
            return make_key(run, state, message)
        case ShareRequest():
            return deal(run, state, message)
        case RoundRequest():
            return play_round(run, state, message)
        case UnmaskRequest():
            return unmask(run, state, message)
        case ReleaseRequest():
            return release(run, state, message, permit_release)
