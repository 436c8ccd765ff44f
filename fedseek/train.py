"""One round of local training: the same number of Poisson steps at every site, private or not.

    records --draw--> units of this step --cut--> micro-batches --model--> losses (B,) --accumulate--> step --apply--> model

The sampling probability and the number of steps come from the plan and not from the size of the data, so what a round
costs in privacy is the same at every site and known before it begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fedseek.batches import Allowed, Indices, by_length, make_batch, record_losses
from fedseek.dp import guards
from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.private_step import PrivateStep, private_step
from fedseek.dp.randomness import generator_at, place_of, secret_generator
from fedseek.dp.sampling import PoissonUnitSampler
from fedseek.dp.workers import Workers
from fedseek.errors import InvalidRecords
from fedseek.optimiser import make_optimizer, set_rates
from fedseek.physical_batch import PhysicalBatch, bytes_per_record, fits, fitting, free_memory, in_pieces
from fedseek.plain_step import PlainStep
from fedseek.progress import OnProgress, Progress, put_back, take_optimiser, take_values, trained_tensors
from fedseek.records import TokenisedRecords
from fedseek.train_settings import TrainingSettings

_NUM_PROBED = 4

LossesOf = Callable[[Indices], torch.Tensor]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """What a round of training gives back besides the moved model.

    Attributes:
        spend: privacy spent over the run so far; None when not private.
        guards_passed: names for the privacy statement, sorted; empty when not private.
        num_steps: steps of this round, those of a process that was killed in it included.
        seconds: wall time of this round, as far as this process played it.
        physical_batch_size: records that were on the device at once at the end.
        mean_loss: over the records trained on, nan if none was drawn. Un-noised: never leaves the site of a private run.
    """

    spend: PrivacySpend | None
    guards_passed: tuple[str, ...]
    num_steps: int
    seconds: float
    physical_batch_size: int
    mean_loss: float = field(repr=False)


def train_round(
    model: nn.Module,
    records: TokenisedRecords,
    *,
    settings: TrainingSettings,
    privacy: PrivacyParams | None,
    spend: PrivacySpend | None = None,
    steps_before: int = 0,
    seed: int | None = None,
    allowed: Allowed | None = None,
    expected_units: float | None = None,
    on_step: OnStep | None = None,
    workers: Workers | None = None,
    resume: Progress | None = None,
    on_progress: OnProgress | None = None,
) -> TrainingOutcome:
    """Train ``model`` in place for one round.

    Run by a site.

    Args:
        model: maps input_ids and attention_mask, both (B, T), to logits (B, num_labels), or with the counted tokens
            (B, T) to their logits (n, vocabulary); what is to be trained requires a gradient.
        records: of the site.
        settings: from the plan.
        privacy: from the plan; None trains by the same sampler without clipping and noise, and states nothing.
        spend: what the run has spent in earlier rounds; None before the first.
        steps_before: private steps the run has taken in earlier rounds, counted by the caller apart from ``spend``.
        seed: order of the data and dropout; only when not private, so that two runs can be compared number by number.
        allowed: shape (num_records, num_labels), labels each record may have; None for all.
        expected_units: units that the step's divisor counts; None for those in ``records``. Given where their number
            depends on what must not show, as on coins.
        on_step: called after each step with its number, from 1, and the number of steps.
        workers: the processes that take the steps of this round together; None for this process alone.
        resume: how far a process that was killed had come in this very round, from the weights that ``model`` has now;
            the steps it took are not taken again.
        on_progress: called after each step, to keep what ``resume`` takes.

    Guarantees:
        When private, each privacy unit is protected by ``(outcome.spend.epsilon(), privacy.delta)`` over the run, under
        addition or removal of the unit, given the number of units. All guards of `fedseek.dp.guards` for training held.

    Raises:
        GuardTripped: the guarantee does not hold; the model must be thrown away.
        InvalidRecords: there are no records, or not a label for each.
        Malformed: ``resume`` does not fit the model or the round.
        OutOfMemory: not even one record at a time fits.
        ValueError: a seed or a bound on the gradient for a private run, or a spend without privacy.
    """
    _check_arguments(records, settings, privacy, spend, seed)
    began = time.perf_counter()
    generator = _draws(seed, resume)
    sampler = PoissonUnitSampler(records.units, settings.sampling_probability, generator=generator)
    divisor = settings.sampling_probability * (sampler.num_units if expected_units is None else expected_units)
    optimizer = make_optimizer(model, settings)
    opened = _open_step(model, optimizer, settings, privacy, divisor, workers)
    with _training_mode(model), _dropout_seed(seed), opened as step:
        losses_of = _losses_of(step.model, records, settings, allowed)
        batch = _prepare(step, model, records, settings, losses_of, divisor)
        round_ = _Round(model, step, optimizer, sampler, losses_of, batch, workers, seeded=seed is not None)
        round_.begin(resume, settings.num_steps)
        _take_steps(round_, records, settings, on_step, on_progress)
        if isinstance(step, PrivateStep) and privacy is not None:
            step.finish()
            spend = (spend or PrivacySpend(privacy)).after(settings.num_steps)
            _check_round(step, privacy, spend, sampler, num_drawn=round_.num_drawn, steps_before=steps_before)
    return TrainingOutcome(
        spend=spend,
        guards_passed=tuple(sorted(step.passed)),
        num_steps=step.num_steps,
        seconds=time.perf_counter() - began,
        physical_batch_size=batch.size,
        mean_loss=round_.loss_sum / round_.num_drawn if round_.num_drawn else math.nan,
    )


@dataclass(slots=True)
class _Round:
    """A round under way; ``step.model`` is ``model``, wrapped when private."""

    model: nn.Module
    step: PrivateStep | PlainStep
    optimizer: torch.optim.Optimizer
    sampler: PoissonUnitSampler
    losses_of: LossesOf
    batch: PhysicalBatch
    workers: Workers | None
    seeded: bool
    num_drawn: int = 0
    loss_sum: float = 0.0

    def begin(self, resume: Progress | None, num_steps: int) -> None:
        """Go on where another process came to; the draws have been set to there already, if they are not seeded."""
        if resume is None:
            return
        put_back(resume, trained_tensors(self.model), self.optimizer, num_steps=num_steps)
        self.step.resume(resume.step, resume.guards_passed)
        self.num_drawn, self.loss_sum = resume.num_drawn, resume.loss_sum
        for number in range(resume.step if self.seeded else 0):
            self.sampler.draw(number)

    def take(self, records: TokenisedRecords, number: int) -> None:
        """Take step ``number``."""
        draw = self.sampler.draw(number)
        mine = draw.record_indices
        if self.workers is not None:
            draw = self.workers.agree(draw)
            mine = self.workers.share(draw.record_indices)
        losses = [torch.zeros((), device=next(self.model.parameters()).device)]

        def take(indices: Indices) -> None:
            of_records = self.losses_of(indices)
            loss = of_records.detach().sum()  # before it counts: nothing after may run out of memory
            self.step.accumulate(of_records, indices)
            losses.append(loss)

        in_pieces(by_length(records, mine), self.batch, take=take, forget=self.forget)
        self.step.apply(draw)
        loss = torch.stack(losses).sum()
        if self.workers is not None:
            self.workers.add([loss])
        self.num_drawn += len(draw.record_indices)
        self.loss_sum += float(loss)

    def forget(self) -> None:
        """Free what a micro-batch left behind that did not fit."""
        self.step.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # its blocks are of sizes that the smaller batch will not ask for

    def snapshot(self) -> Progress:
        """How far the round has come."""
        trained = trained_tensors(self.model)
        return Progress(
            step=self.step.num_steps,
            trained=take_values(trained),
            optimiser=take_optimiser(trained, self.optimizer),
            num_drawn=self.num_drawn,
            loss_sum=self.loss_sum,
            guards_passed=tuple(sorted(self.step.passed)),
            draws=b"" if self.seeded else place_of(self.sampler.generator),
        )


def _check_arguments(
    records: TokenisedRecords,
    settings: TrainingSettings,
    privacy: PrivacyParams | None,
    spend: PrivacySpend | None,
    seed: int | None,
) -> None:
    if len(records) == 0 or not len(records.input_ids) == len(records.labels) == len(records.units):
        raise InvalidRecords(
            f"got {len(records.input_ids)} records, {len(records.labels)} labels and {len(records.units)} units, "
            "wanted the same number of each, and at least one"
        )
    if privacy is not None and seed is not None:
        raise ValueError("a seed was given for a private run: who is drawn must stay unknown")
    if privacy is not None and settings.max_gradient_norm is not None:
        raise ValueError("max_gradient_norm was given for a private run, which clips the gradient of each record")
    if spend is not None and privacy != spend.params:
        raise ValueError("the spend is of another mechanism than this round's")


def _draws(seed: int | None, resume: Progress | None) -> np.random.Generator:
    if seed is not None:
        return np.random.default_rng(seed)
    return secret_generator() if resume is None else generator_at(resume.draws)


def _losses_of(
    model: nn.Module, records: TokenisedRecords, settings: TrainingSettings, allowed: Allowed | None
) -> LossesOf:
    device = next(model.parameters()).device

    def losses_of(indices: Indices) -> torch.Tensor:
        batch = make_batch(records, indices, device=device, allowed=allowed)
        return record_losses(model, batch, label_smoothing=settings.label_smoothing)

    return losses_of


def _prepare(
    step: PrivateStep | PlainStep,
    model: nn.Module,
    records: TokenisedRecords,
    settings: TrainingSettings,
    losses_of: LossesOf,
    expected: float,
) -> PhysicalBatch:
    """Check that records are not coupled, and find how many fit on the device; nothing is trained."""
    batch = PhysicalBatch(settings.physical_batch_size or max(1, math.ceil(expected)))
    ordered = by_length(records, np.arange(len(records), dtype=np.int64))
    if isinstance(step, PrivateStep):
        # from the longest to the shortest: where padding or a mean over tokens would show most
        probed = ordered[np.unique(np.linspace(0, len(ordered) - 1, _NUM_PROBED).astype(np.int64))]
        while not fits(probed, lambda indices: step.probe(losses_of, indices)):
            step.forget()
            batch.halve(len(probed))  # down to 1: records that never meet in a batch are not coupled by it
            probed = probed[: batch.size]
    if settings.physical_batch_size is None:
        longest = ordered[:1]
        needed = bytes_per_record(
            model,
            losses_of,
            longest,
            num_logits=_num_logits(model, records, longest),
            private=isinstance(step, PrivateStep),
        )
        step.forget()
        batch.size = min(batch.size, fitting(free_memory(next(model.parameters()).device), needed, expected=expected))
    return batch


def _num_logits(model: nn.Module, records: TokenisedRecords, longest: Indices) -> int:
    vocabulary = int(getattr(getattr(model, "lm_head", None), "out_features", 0))
    return 0 if records.counted is None else int(records.counted[longest[0]].sum()) * vocabulary


def _take_steps(
    round_: _Round,
    records: TokenisedRecords,
    settings: TrainingSettings,
    on_step: OnStep | None,
    on_progress: OnProgress | None,
) -> None:
    """Take the steps of the round that are left."""
    for number in range(round_.step.num_steps, settings.num_steps):
        set_rates(round_.optimizer, settings, number)
        round_.take(records, number)
        if on_step is not None:
            on_step(number + 1, settings.num_steps)
        if on_progress is not None:
            on_progress(number + 1, settings.num_steps, round_.snapshot)


def _check_round(
    step: PrivateStep,
    privacy: PrivacyParams,
    spend: PrivacySpend,
    sampler: PoissonUnitSampler,
    *,
    num_drawn: int,
    steps_before: int,
) -> None:
    """Guards that look at the round as a whole; after them, every guard of training has held."""
    trials = [sampler.draw(number).unit_indices for number in range(guards.NUM_TRIAL_DRAWS)]
    step.passed |= {
        guards.check_sampling_from_plan(
            sampler.sampling_probability,
            planned=privacy.sampling_probability,
            num_drawn=num_drawn,
            num_chances=sampler.num_units * step.num_steps,
        ),
        guards.check_draws_independent(trials, num_units=sampler.num_units, planned=privacy.sampling_probability),
        guards.check_cryptographic_randomness({"noise": step.is_secret, "draws": sampler.is_secret}),
        guards.check_composition_over_run(spend.num_steps, steps_before + step.num_steps),
    }
    guards.check_all_passed(step.passed)


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _dropout_seed(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _open_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    privacy: PrivacyParams | None,
    divisor: float,
    workers: Workers | None,
) -> AbstractContextManager[PrivateStep | PlainStep]:
    if privacy is not None:
        return private_step(model, optimizer, privacy=privacy, expected_batch_size=divisor, workers=workers)
    bound = settings.max_gradient_norm
    return nullcontext(
        PlainStep(model, optimizer, expected_batch_size=divisor, max_gradient_norm=bound, workers=workers)
    )
