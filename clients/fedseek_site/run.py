"""One run at one site: from the plan it admits to the adapter it releases.

A round, in the order of the files of ``fedseek/``:

    previous sum -> decrypt -> apply -> evaluate -> train -> encode -> encrypt -> update

Steps come in order and once: a request for another round than the next is refused. Weights live here as float32
vectors, one a scope; the model is only a place to compute in. The group key never leaves this object but sealed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fedseek.decrypt import decrypt_sum
from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.guards import check_metrics
from fedseek.encode import SummedUpdate, encode_update, num_ciphertexts
from fedseek.encrypt import encrypt_update
from fedseek.errors import CohortTooSmall, WrongKey, WrongRound
from fedseek.evaluate import Evaluation, evaluate
from fedseek.he.ciphertext import ScopedCiphertexts
from fedseek.he.keys import SecretKey
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster, parse_roster
from fedseek.identity.sealing import SealedKey, open_sealed, seal
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PLAN, join_fields, sign
from fedseek.lora.load import load_base
from fedseek.lora.model import AdapterModel
from fedseek.lora.source import locate_model
from fedseek.messages import (
    AggregateDown,
    CloseRequest,
    KeyRequest,
    KeysSealed,
    PlanAdmitted,
    PlanOffer,
    ReleaseApproved,
    ReleaseRequest,
    RoundRequest,
    UpdateReply,
    digest_message,
)
from fedseek.plan import Plan, head_scope, plan_from_canonical
from fedseek.prepare import HELD_BACK_METRICS, prepare_model, prepare_settings
from fedseek.records import TokenisedRecords, tokenise
from fedseek.train import train_round
from fedseek_site.admission import SiteData, check_admission, check_labels, units_for
from fedseek_site.releasing import FinishedRun, write_site_release
from fedseek_site.weights import (
    ScopeWeights,
    apply_sums,
    load_weights,
    local_updates,
    start_weights,
    weights_digests,
)

EPOCH = 0  # group keys of a run are counted from 0
Observe = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class SiteRun:
    """Everything a site holds during a run; made by :func:`open_run`."""

    run_id: str
    plan: Plan
    roster: Roster
    identity: SiteIdentity = field(repr=False)
    model: AdapterModel = field(repr=False)
    train_records: TokenisedRecords = field(repr=False)
    held_back: TokenisedRecords = field(repr=False)
    scopes: dict[str, ScopeWeights] = field(repr=False)
    release_folder: Path
    observe: Observe = field(repr=False)
    key: SecretKey | None = field(default=None, repr=False)
    spend: PrivacySpend | None = None
    guards_passed: tuple[str, ...] = ()
    steps_done: int = 0
    rounds_started: int = 0
    rounds_applied: int = 0
    closed: bool = False
    approval: ReleaseApproved | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """The site's kind, which decides the head it trains."""
        return self.identity.kind

    def admit(self) -> PlanAdmitted:
        """Sign the plan with everything it is bound to."""
        signed = join_fields(self.run_id.encode(), self.plan.digest.encode(), self.roster.digest())
        num_values = {scope: state.layout.num_values for scope, state in self.scopes.items()}
        ciphertexts = {scope: num_ciphertexts(state.layout, self.plan.packing) for scope, state in self.scopes.items()}
        self.observe({"event": "layout", "num_values": num_values, "ciphertexts": ciphertexts})
        return PlanAdmitted(
            run=self.run_id,
            site=self.identity.name,
            model_sha256=self.plan.spec.model.sha256,
            num_values=num_values,
            ciphertexts=ciphertexts,
            signature=sign(self.identity, CONTEXT_PLAN, signed),
        )

    def make_group_key(self, request: KeyRequest) -> KeysSealed:
        """Generate the group key of the run and seal it to every site; run by one site, once.

        Raises:
            WrongRound: this site already holds a group key; a second one would split the cohort.
        """
        if self.key is not None or request.epoch != EPOCH:
            raise WrongRound(
                f"asked for group key of epoch {request.epoch}, this site already holds one or is at {EPOCH}"
            )
        key = SecretKey.generate(self.plan.packing.params)
        secret = key.to_bytes()
        envelopes = {
            entry.name: msgspec.msgpack.encode(
                seal(secret, sender=self.identity, receiver=entry, roster=self.roster, run=self.run_id, epoch=EPOCH)
            )
            for entry in self.roster.entries
        }
        self.key = key  # held from here on, so a second request is refused; round 1 takes it again from the envelope
        return KeysSealed(run=self.run_id, site=self.identity.name, epoch=EPOCH, envelopes=envelopes)

    def play_round(self, request: RoundRequest) -> UpdateReply:
        """Exchange A of a round: apply the last sum, evaluate, train, answer with the encrypted update.

        Raises:
            WrongRound: not the next round, or a sum of another round than the last.
            WrongKey: round 1 without an envelope that opens, or a sum under another key.
            PrivacyError: a guard tripped; nothing is sent.
        """
        self._expect_next(request)
        if request.round == 1:
            self._take_group_key(request.envelope)
        self.rounds_started = request.round
        seconds: dict[str, float] = {}
        evaluation = self._apply_and_evaluate(request.previous, request.round - 1, seconds)
        with timed(seconds, "train"):
            updates = self._train(request.round)
        with timed(seconds, "encode"):
            encoded = self._encode(updates, evaluation)
        with timed(seconds, "encrypt"):
            update = encrypt_update(self._group_key(), encoded)
        self._report_round(request.round, seconds, update)
        return self._reply(request.round, update)

    def close(self, request: CloseRequest) -> UpdateReply:
        """Apply the last sum, evaluate the final adapter, answer with its metrics, encrypted.

        Raises:
            WrongRound: the run is not at its end.
        """
        if self.closed or request.round != self.rounds_started or request.round != self.plan.spec.training.rounds:
            raise WrongRound(f"asked to close after round {request.round}, this site trained {self.rounds_started}")
        self.closed = True
        evaluation = self._apply_and_evaluate(request.previous, request.round, {})
        scope = head_scope(self.kind)
        nothing = np.zeros(self.scopes[scope].layout.num_values, np.float32)
        update = encrypt_update(self._group_key(), self._encode({scope: nothing}, evaluation))
        return self._reply(request.round, update)

    def release(self, request: ReleaseRequest) -> ReleaseApproved:
        """Read the summed metrics, write the release at this site, and sign what others may have of it.

        Raises:
            ReleaseRefused: the privacy statement cannot be earned.
            WrongRound: the run is not closed.
        """
        if not self.closed or request.metrics.round != self.rounds_applied:
            raise WrongRound("asked to release before the last sum was applied, or with the metrics of another round")
        if self.approval is None:
            scope = head_scope(self.kind)
            summed = self._decrypt(request.metrics, [scope])[scope]
            finished = self._finished(_utility_of(summed))
            self.approval = write_site_release(finished, self.release_folder, send_adapter=request.send_adapter)
            self.observe(
                {"event": "released", "utility": finished.utility, "guards_passed": list(finished.guards_passed)}
            )
        return self.approval

    def _finished(self, utility: float) -> FinishedRun:
        return FinishedRun(
            run=self.run_id,
            plan=self.plan,
            identity=self.identity,
            model=self.model,
            digests=weights_digests(self.scopes),
            spend=self.spend,
            guards_passed=self.guards_passed,
            steps=self.steps_done,
            utility=utility,
        )

    def _expect_next(self, request: RoundRequest) -> None:
        wanted = self.rounds_started + 1
        if request.round != wanted or request.round > self.plan.spec.training.rounds:
            raise WrongRound(f"got a request for round {request.round}, this site's next round is {wanted}")

    def _take_group_key(self, envelope: bytes | None) -> None:
        if envelope is None:
            raise WrongKey("round 1 came without a sealed group key")
        try:
            sealed = msgspec.msgpack.decode(envelope, type=SealedKey)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # msgspec lets the second one through
            raise WrongKey(f"the envelope with the group key does not parse: {error}") from None
        secret = open_sealed(sealed, receiver=self.identity, roster=self.roster, run=self.run_id, epoch=EPOCH)
        self.key = SecretKey.from_bytes(self.plan.packing.params, secret)

    def _group_key(self) -> SecretKey:
        if self.key is None:
            raise WrongKey("this site holds no group key yet")
        return self.key

    def _apply_and_evaluate(
        self, previous: AggregateDown | None, round_done: int, seconds: dict[str, float]
    ) -> Evaluation:
        """Decrypt and apply the sum of ``round_done`` (0: there is none yet), then evaluate what came of it."""
        got = previous.round if previous else 0
        if got != round_done or (previous is not None and got != self.rounds_applied + 1):
            raise WrongRound(f"wanted the sum of round {round_done}, got that of {got or 'none'}")
        if previous is not None:
            with timed(seconds, "decrypt"):
                summed = self._decrypt(previous, list(self.scopes))
            with timed(seconds, "apply"):
                apply_sums(self.scopes, summed, self.plan)
                self.rounds_applied = got
                load_weights(self.model, self.scopes)
            self._report_applied(previous, summed)
        with timed(seconds, "evaluate"):
            evaluation = evaluate(self.model, self.held_back, metric=self.plan.spec.kinds[self.kind].metric)
        self._report_utility(round_done, evaluation)
        return evaluation

    def _decrypt(self, down: AggregateDown, scopes: Sequence[str]) -> dict[str, SummedUpdate]:
        """Decrypt sums, and see that every site of the scope is in them: a sum of fewer says too much about each."""
        summed = decrypt_sum(
            self._group_key(),
            down.sums,
            layouts={scope: self.scopes[scope].layout for scope in scopes},
            packing=self.plan.packing,
            value_ranges={scope: self.scopes[scope].value_range for scope in scopes},
            weight_cap=self.plan.weight_cap,
        )
        for scope, update in summed.items():
            wanted = sum(scope in self.plan.scopes(entry.kind) for entry in self.roster.entries)
            if update.contributors != wanted:
                raise CohortTooSmall(f"sum of {scope!r}: holds {update.contributors} sites, wanted all {wanted}")
        return summed

    def _train(self, round_number: int) -> dict[str, npt.NDArray[np.float32]]:
        """Train one round; return the update of each scope and put the round's first weights back."""
        outcome = train_round(
            self.model,
            self.train_records,
            settings=prepare_settings(self.plan),
            privacy=self.plan.privacy,
            spend=self.spend,
            steps_before=self.steps_done,
            on_step=lambda step, of: self.observe({"event": "step", "round": round_number, "step": step, "of": of}),
        )
        self.spend = outcome.spend
        self.guards_passed = tuple(sorted({*self.guards_passed, *outcome.guards_passed}))
        self.steps_done += outcome.num_steps
        updates = local_updates(self.model, self.scopes)
        load_weights(self.model, self.scopes)
        return updates

    def _encode(
        self, updates: Mapping[str, npt.NDArray[np.float32]], evaluation: Evaluation
    ) -> dict[str, npt.NDArray[np.uint64]]:
        weight = len(self.train_records) if self.plan.spec.cohort.weighting == "records" else 1
        return {
            scope: encode_update(
                update,
                self.scopes[scope].layout,
                packing=self.plan.packing,
                value_range=self.scopes[scope].value_range,
                weight=min(weight, self.plan.weight_cap),
                weight_cap=self.plan.weight_cap,
                metrics=self._metrics(evaluation) if self.scopes[scope].layout.metrics else {},
            )
            for scope, update in updates.items()
        }

    def _metrics(self, evaluation: Evaluation) -> dict[str, float]:
        metrics = dict(
            zip(
                HELD_BACK_METRICS,
                (evaluation.score, evaluation.weight, evaluation.loss_sum, evaluation.count),
                strict=True,
            )
        )
        if self.plan.privacy is not None:
            self.guards_passed = tuple(sorted({*self.guards_passed, check_metrics(metrics, private=True)}))
        return metrics

    def _reply(self, round_number: int, update: tuple[ScopedCiphertexts, ...]) -> UpdateReply:
        digests = weights_digests(self.scopes)
        return UpdateReply(
            run=self.run_id,
            site=self.identity.name,
            round=round_number,
            digests=digests,
            signature=sign(self.identity, CONTEXT_ADAPTER, digest_message(self.run_id, round_number, digests)),
            update=update,
        )

    def _report_utility(self, round_number: int, evaluation: Evaluation) -> None:
        self.observe(
            {
                "event": "utility",
                "round": round_number,
                "utility": evaluation.utility,
                "loss": evaluation.loss_sum / max(evaluation.count, 1),
            }
        )

    def _report_applied(self, previous: AggregateDown, summed: Mapping[str, SummedUpdate]) -> None:
        self.observe(
            {
                "event": "applied",
                "round": previous.round,
                "bytes_down": sum(len(one) for total in previous.sums for one in total.ciphertexts),
                "saturated_fraction": max(update.saturated_fraction for update in summed.values()),
            }
        )

    def _report_round(self, number: int, seconds: dict[str, float], update: tuple[ScopedCiphertexts, ...]) -> None:
        self.observe(
            {
                "event": "round",
                "round": number,
                "seconds": seconds,
                "epsilon": self.spend.epsilon() if self.spend else None,
                "bytes_up": sum(len(one) for scoped in update for one in scoped.ciphertexts),
            }
        )


def open_run(
    offer: PlanOffer, identity: SiteIdentity, data: SiteData, *, observe: Observe, release_folder: Path
) -> SiteRun:
    """Check the plan against this site, load the model, and be ready for round 1.

    Raises:
        InvalidPlan: the plan does not parse or its parts do not fit.
        PlanRefused: this site will not run it; names the rule.
    """
    plan = plan_from_canonical(offer.plan)
    roster = parse_roster(offer.roster)
    check_admission(plan, roster, me=identity.public(), data=data)
    check_labels(plan, identity.kind, data)
    task, folder = plan.spec.kinds[identity.kind], locate_model(plan.spec.model.source)
    model = prepare_model(plan, identity.kind, load_base(folder))
    train_units = units_for(plan, identity.kind, data.train)
    return SiteRun(
        run_id=offer.run,
        plan=plan,
        roster=roster,
        identity=identity,
        model=model,
        train_records=tokenise(train_units, folder, labels=task.labels, max_tokens=plan.spec.model.max_tokens),
        held_back=tokenise(data.held_back, folder, labels=task.labels, max_tokens=plan.spec.model.max_tokens),
        scopes=start_weights(plan, identity.kind, model),
        release_folder=release_folder,
        observe=observe,
        spend=PrivacySpend(plan.privacy) if plan.privacy else None,
    )


def _utility_of(summed: SummedUpdate) -> float:
    """Utility over all sites of the kind: hits over rows (accuracy), or pairs ordered rightly over pairs (AUC)."""
    return summed.metrics["held_back_score"] / max(summed.metrics["held_back_weight"], 1.0)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of the block to ``seconds[phase]``."""
    started = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started
