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
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedseek.dp import guards
from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.private_step import PrivateStep, private_step
from fedseek.dp.randomness import secret_generator
from fedseek.dp.sampling import Draw, PoissonUnitSampler
from fedseek.errors import InvalidRecords
from fedseek.records import TokenisedRecords

Indices = NDArray[np.int64]
Allowed = NDArray[np.bool_]

_HEAD = "head."
_NUM_PROBED = 4


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How a round trains; equal at every site.

    Attributes:
        sampling_probability: chance of each privacy unit to be in a step.
        num_steps: steps of the round.
        learning_rate: of the adapter.
        head_learning_rate: of tensors whose name contains ``head.``.
        physical_batch_size: records on the device at once; does not change the result.
        optimiser: ``adam`` (AdamW when weight decay is set) or ``sgd``.
        weight_decay: decoupled for adam.
    """

    sampling_probability: float
    num_steps: int
    learning_rate: float
    head_learning_rate: float
    physical_batch_size: int = 64
    optimiser: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """What a round of training gives back besides the moved model.

    Attributes:
        spend: privacy spent over the run so far; None when not private.
        guards_passed: names for the privacy statement, sorted; empty when not private.
        num_steps: steps of this round.
        seconds: wall time of this round.
        mean_loss: over the records trained on, nan if none was drawn. Un-noised: never leaves the site of a private run.
    """

    spend: PrivacySpend | None
    guards_passed: tuple[str, ...]
    num_steps: int
    seconds: float
    mean_loss: float = field(repr=False)


@dataclass(frozen=True, slots=True)
class Batch:
    """Some records on the model's device, padded to the longest of them.

    Attributes:
        record_indices: shape (B,), which records they are.
        input_ids: shape (B, T), int64, 0 where padded.
        attention_mask: shape (B, T), int64, 1 for tokens and 0 for padding.
        labels: shape (B,), int64.
        allowed: shape (B, num_labels), labels the record may have; None for all.
    """

    record_indices: Indices = field(repr=False)
    input_ids: torch.Tensor = field(repr=False)
    attention_mask: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)
    allowed: torch.Tensor | None = field(repr=False)


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
    on_step: Callable[[int, int], None] | None = None,
) -> TrainingOutcome:
    """Train ``model`` in place for one round.

    Run by a site.

    Args:
        model: maps input_ids and attention_mask, both (B, T), to logits (B, num_labels); what is to be trained requires
            a gradient.
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

    Guarantees:
        When private, each privacy unit is protected by ``(outcome.spend.epsilon(), privacy.delta)`` over the run, under
        addition or removal of the unit, given the number of units. All guards of `fedseek.dp.guards` for training held.

    Raises:
        GuardTripped: the guarantee does not hold; the model must be thrown away.
        InvalidRecords: there are no records, or not a label for each.
        ValueError: a seed for a private run, or a spend without privacy.
    """
    _check_arguments(records, privacy, spend, seed)
    began = time.perf_counter()
    generator = secret_generator() if seed is None else np.random.default_rng(seed)
    sampler = PoissonUnitSampler(records.units, settings.sampling_probability, generator=generator)
    divisor = sampler.expected_batch_size
    if expected_units is not None:
        divisor = settings.sampling_probability * expected_units
    with _training_mode(model), _dropout_seed(seed), _open_step(model, settings, privacy, divisor) as step:
        num_drawn, mean_loss = _take_steps(step, records, sampler, settings, allowed, on_step)
        if isinstance(step, PrivateStep) and privacy is not None:
            step.finish()
            spend = (spend or PrivacySpend(privacy)).after(settings.num_steps)
            _check_round(step, privacy, spend, sampler, num_drawn=num_drawn, steps_before=steps_before)
    return TrainingOutcome(
        spend=spend,
        guards_passed=tuple(sorted(step.passed)),
        num_steps=step.num_steps,
        seconds=time.perf_counter() - began,
        mean_loss=mean_loss,
    )


class PlainStep:
    """The way to take a step without privacy: the gradient of the same sum, neither clipped nor noised."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, expected_batch_size: float) -> None:
        self.model = model
        self._optimizer = optimizer
        self._expected_batch_size = expected_batch_size
        self.passed: set[str] = set()
        self.num_steps = 0

    def accumulate(self, losses: torch.Tensor, record_indices: Indices) -> None:
        """Add the gradients of a micro-batch to the step."""
        (losses.sum() / self._expected_batch_size).backward()  # type: ignore[no-untyped-call]

    def apply(self, draw: Draw) -> None:
        """Move the tensors; nothing moves if nothing was drawn."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1


def make_batch(
    records: TokenisedRecords, record_indices: Indices, *, device: torch.device, allowed: Allowed | None = None
) -> Batch:
    """Put some records on a device as one padded batch, in the order given."""
    rows = [records.input_ids[i] for i in record_indices]
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return Batch(
        record_indices=record_indices,
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
        labels=torch.from_numpy(records.labels[record_indices]).to(device),
        allowed=None if allowed is None else torch.from_numpy(allowed[record_indices]).to(device),
    )


def by_length(records: TokenisedRecords, record_indices: Indices) -> Indices:
    """The same records, longest first, so that batches cut from them carry little padding."""
    lengths = np.array([len(records.input_ids[i]) for i in record_indices], dtype=np.int64)
    return record_indices[np.argsort(-lengths, kind="stable")]


def masked_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits, shape (B, num_labels), minus infinity where a label is not allowed."""
    logits: torch.Tensor = model(batch.input_ids, batch.attention_mask)
    return logits if batch.allowed is None else logits.masked_fill(~batch.allowed, -math.inf)


def record_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each record by itself, shape (B,): no mean, so that no record's gradient depends on another."""
    return nn.functional.cross_entropy(masked_logits(model, batch), batch.labels, reduction="none")


def _check_arguments(
    records: TokenisedRecords, privacy: PrivacyParams | None, spend: PrivacySpend | None, seed: int | None
) -> None:
    if len(records) == 0 or not len(records.input_ids) == len(records.labels) == len(records.units):
        raise InvalidRecords(
            f"got {len(records.input_ids)} records, {len(records.labels)} labels and {len(records.units)} units, "
            "wanted the same number of each, and at least one"
        )
    if privacy is not None and seed is not None:
        raise ValueError("a seed was given for a private run: who is drawn must stay unknown")
    if spend is not None and privacy != spend.params:
        raise ValueError("the spend is of another mechanism than this round's")


def _take_steps(
    step: PrivateStep | PlainStep,
    records: TokenisedRecords,
    sampler: PoissonUnitSampler,
    settings: TrainingSettings,
    allowed: Allowed | None,
    on_step: Callable[[int, int], None] | None,
) -> tuple[int, float]:
    """Take the steps of a round; return the number of records drawn and their mean loss."""
    device = next(step.model.parameters()).device
    num_drawn, total_loss = 0, torch.zeros((), dtype=torch.float64, device=device)

    def losses_of(indices: Indices) -> torch.Tensor:
        return record_losses(step.model, make_batch(records, indices, device=device, allowed=allowed))

    if isinstance(step, PrivateStep):
        step.probe(losses_of, _spread(records))
    for number in range(settings.num_steps):
        draw = sampler.draw(number)
        ordered = by_length(records, draw.record_indices)
        for first in range(0, len(ordered), settings.physical_batch_size):
            indices = ordered[first : first + settings.physical_batch_size]
            losses = losses_of(indices)
            step.accumulate(losses, indices)
            total_loss += losses.detach().sum()
        step.apply(draw)
        num_drawn += len(ordered)
        if on_step is not None:
            on_step(number + 1, settings.num_steps)
    return num_drawn, float(total_loss) / num_drawn if num_drawn else math.nan


def _spread(records: TokenisedRecords) -> Indices:
    """A few records, from the longest to the shortest: where padding or a mean over tokens would show most."""
    ordered = by_length(records, np.arange(len(records), dtype=np.int64))
    return ordered[np.unique(np.linspace(0, len(ordered) - 1, _NUM_PROBED).astype(np.int64))]


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
    model: nn.Module, settings: TrainingSettings, privacy: PrivacyParams | None, divisor: float
) -> AbstractContextManager[PrivateStep | PlainStep]:
    optimizer = _make_optimizer(model, settings)
    if privacy is None:
        return nullcontext(PlainStep(model, optimizer, expected_batch_size=divisor))
    return private_step(model, optimizer, privacy=privacy, expected_batch_size=divisor)


def _make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Two groups: the adapter, and the head with a learning rate of its own."""
    trainable = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    guards.check_something_to_train(bool(trainable))
    groups = [
        {"params": [tensor for name, tensor in trainable if _HEAD not in name], "lr": settings.learning_rate},
        {"params": [tensor for name, tensor in trainable if _HEAD in name], "lr": settings.head_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimiser == "sgd":
        return torch.optim.SGD(groups, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
