"""Run-time guards: each looks at what really happened in training and stops it if the guarantee does not hold.

Ways to believe in an epsilon that was never earned, none of which raises an error by itself:

    clipping_applied          the gradient went past the per-record clipping
    records_uncoupled         a record's loss depends on its neighbours in the batch
    no_record_lost            a micro-batch was dropped on the way to the step
    noise_not_seeded_by_plan  noise that a seed repeats, here or at another site
    noise_added               noise that is missing or too small, in one tensor or in all
    cryptographic_randomness  noise or draws of a statistical generator, which whoever has seen enough can continue
    sampling_from_plan        a loader's batch size changed the sampling probability
    draws_independent         a sampler that shuffles, or draws batches of one size
    every_tensor_trained      the optimiser holds other tensors than the model
    poisson_batches_used      trained on other records than were drawn
    composition_over_run      one round's epsilon stated for the whole run
    no_unnoised_metrics       a number computed on training rows leaves the site

A guard that holds returns its name, to be listed in the privacy statement; one that does not raises `GuardTripped`, and
no epsilon is stated. This module imports no torch, so that a coordinator can read the names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Never

import numpy as np
from numpy.typing import NDArray

from fedseek.errors import GuardTripped

if TYPE_CHECKING:
    from torch import Tensor

CLIPPING_APPLIED = "clipping_applied"
RECORDS_UNCOUPLED = "records_uncoupled"
NO_RECORD_LOST = "no_record_lost"
NOISE_NOT_SEEDED_BY_PLAN = "noise_not_seeded_by_plan"
NOISE_ADDED = "noise_added"
CRYPTOGRAPHIC_RANDOMNESS = "cryptographic_randomness"
SAMPLING_FROM_PLAN = "sampling_from_plan"
DRAWS_INDEPENDENT = "draws_independent"
EVERY_TENSOR_TRAINED = "every_tensor_trained"
POISSON_BATCHES_USED = "poisson_batches_used"
COMPOSITION_OVER_RUN = "composition_over_run"
NO_UNNOISED_METRICS = "no_unnoised_metrics"

TRAINING_GUARDS = (
    CLIPPING_APPLIED,
    RECORDS_UNCOUPLED,
    NO_RECORD_LOST,
    NOISE_NOT_SEEDED_BY_PLAN,
    NOISE_ADDED,
    CRYPTOGRAPHIC_RANDOMNESS,
    SAMPLING_FROM_PLAN,
    DRAWS_INDEPENDENT,
    EVERY_TENSOR_TRAINED,
    POISSON_BATCHES_USED,
    COMPOSITION_OVER_RUN,
)
"""What a round of training must pass; `NO_UNNOISED_METRICS` is checked where metrics are sent."""

HELD_BACK_PREFIXES = ("held_back_", "answers_", "stop_votes")
"""What metrics of rows held back are called: utility and loss, scores of answers, a vote that goes by that loss."""

_FLOAT32_SLACK = 1e-3
# A record alone and in a batch goes through other kernels: under 1e-6 in float32, about 1 % in bfloat16. Coupling
# through a batch mean changes it by half or more.
_UNCOUPLED_SLACK = 0.02
# Gradients below this fraction of the clip norm are rounding and drown in the noise.
_NEGLIGIBLE = 1e-3
# Below this a draw's size is too coarse for its spread to tell anything.
_ENOUGH_VARIANCE = 2.0
NUM_TRIAL_DRAWS = 256
"""Draws that `check_draws_independent` needs to tell batches of one size from coins."""
# One false alarm in a billion rounds.
_LOG_FALSE_ALARM = math.log(2e9)


def check_clipping_applied(summed_norm: float, num_records: int, *, l2_clip_norm: float) -> str:
    """The sum of n clipped gradients is at most n clip norms long (triangle inequality). Every step.

    Args:
        summed_norm: norm of the sum that is about to be noised, over all trained tensors.
        num_records: records in the sum.
        l2_clip_norm: from the plan.
    """
    bound = num_records * l2_clip_norm
    # "not <=" also catches a sum that is not a number.
    if not summed_norm <= bound * (1 + _FLOAT32_SLACK):
        raise GuardTripped(
            CLIPPING_APPLIED,
            f"the summed gradient of {num_records} records has norm {summed_norm:.4g}, wanted at most {bound:.4g}",
            hint="per-record gradients must go through the clipping step; loss.backward() in ghost mode does not",
        )
    return CLIPPING_APPLIED


def check_records_uncoupled(
    gradients_of: Callable[[NDArray[np.int64]], Tensor], record_indices: NDArray[np.int64], *, l2_clip_norm: float
) -> str:
    """A record's gradient alone is its gradient among others.

    Args:
        gradients_of: per-record gradients of some records taken as one batch, shape (num_records, num_values).
        record_indices: a few records, of different lengths if there are any.
        l2_clip_norm: gradients far below it are not compared.
    """
    together = gradients_of(record_indices)
    for row in range(len(record_indices)):
        alone = gradients_of(record_indices[row : row + 1])[0]
        change = float((together[row] - alone).norm())
        size = max(float(alone.norm()), _NEGLIGIBLE * l2_clip_norm)
        if not change <= _UNCOUPLED_SLACK * size:
            raise GuardTripped(
                RECORDS_UNCOUPLED,
                f"a record's gradient changes by {change / size:.0%} with the other records of its batch",
                hint="take the loss of each record by itself: no mean over tokens of the batch, no batch norm",
            )
    return RECORDS_UNCOUPLED


def check_no_record_lost(num_accumulated: int, num_drawn: int) -> str:
    """As many per-record gradients are in the sum as records were drawn. Every step."""
    if num_accumulated != num_drawn:
        raise GuardTripped(
            NO_RECORD_LOST,
            f"{num_accumulated} per-record gradients are in the step, wanted the {num_drawn} that were drawn",
            hint="clip and add up every micro-batch before the gradients are cleared",
        )
    return NO_RECORD_LOST


def check_noise_not_seeded(draws: Sequence[NDArray[np.float64]]) -> str:
    """No two of the draws are alike, though all global seeds were.

    Args:
        draws: what a source and others made like it gave after torch, numpy and Python were seeded alike.
    """
    for i, first in enumerate(draws):
        for second in draws[:i]:
            # 1 for equal noise, -1 for noise that cancels; independent noise is within 8 / sqrt(size) of 0.
            likeness = abs(float(first @ second)) / float(np.linalg.norm(first) * np.linalg.norm(second))
            if not likeness <= 8 / math.sqrt(len(first)):
                raise GuardTripped(
                    NOISE_NOT_SEEDED_BY_PLAN,
                    "the same seed gave the same noise again",
                    hint="noise must come from the entropy of the site, never from a seed of the plan",
                )
    return NOISE_NOT_SEEDED_BY_PLAN


def check_noise_added(sum_of_squares: float, num_values: int, *, std: float) -> str:
    """What the step added to the clipped sum has the standard deviation of the plan, up to chance. Every step.

    Args:
        sum_of_squares: of the difference between the noised and the clipped sum, over the values of one tensor or of all.
        num_values: number of these values.
        std: ``noise_multiplier * l2_clip_norm``.
    """
    # Laurent and Massart 2000, lemma 1: P(X <= k - 2 sqrt(k x)) <= exp(-x) for X chi-squared with k degrees of freedom.
    least = std**2 * (num_values - 2 * math.sqrt(num_values * _LOG_FALSE_ALARM)) * (1 - _FLOAT32_SLACK)
    if not sum_of_squares > max(least, 0.0):
        got = math.sqrt(sum_of_squares / num_values) if sum_of_squares >= 0 else math.nan
        raise GuardTripped(NOISE_ADDED, f"the noise has standard deviation {got:.4g}, wanted {std:.4g}")
    return NOISE_ADDED


def check_cryptographic_randomness(secret: Mapping[str, bool]) -> str:
    """What must stay unknown comes from a cryptographic generator that the operating system keyed.

    Args:
        secret: for each use, ``noise`` and ``draws``, whether its source is one.
    """
    statistical = sorted(use for use, holds in secret.items() if not holds)
    if statistical or not secret:
        raise GuardTripped(
            CRYPTOGRAPHIC_RANDOMNESS,
            f"{' and '.join(statistical) or 'nothing'} came from a statistical generator, wanted a cryptographic one",
            hint="take it from fedseek.dp.randomness.secret_generator",
        )
    return CRYPTOGRAPHIC_RANDOMNESS


def check_sampling_from_plan(sampling_probability: float, *, planned: float, num_drawn: int, num_chances: int) -> str:
    """The sampler's probability is the plan's, and the number of draws in the round fits it.

    Args:
        sampling_probability: of the sampler that was used.
        planned: of the plan, the one the accountant knows.
        num_drawn: units drawn over the round.
        num_chances: units times steps of the round.
    """
    if sampling_probability != planned:
        raise GuardTripped(
            SAMPLING_FROM_PLAN,
            f"units were sampled with probability {sampling_probability:.6g}, wanted the plan's {planned:.6g}",
            hint="take the probability from the plan, not from the length of a loader",
        )
    if not _is_binomial(num_drawn, num_chances, planned):
        raise GuardTripped(
            SAMPLING_FROM_PLAN,
            f"{num_drawn} of {num_chances} chances were drawn, wanted about {num_chances * planned:.0f}",
            hint="the accountant assumes that each unit is drawn by a coin of its own in each step",
        )
    return SAMPLING_FROM_PLAN


def check_draws_independent(draws: Sequence[NDArray[np.int64]], *, num_units: int, planned: float) -> str:
    """Trial draws look like coins: their sizes vary, and two of them share as many units as chance wants.

    A sampler that shuffles gives a unit once an epoch, and one of batches of fixed size always as many; neither has the
    privacy cost that the accountant counts, though both draw the right number of units. What a site is too small to
    show is not held against it.

    Args:
        draws: units of independent trial draws that nothing is trained on, each shape (num_drawn,); an even number.
        num_units: of the site.
        planned: chance of a unit to be drawn, from the plan.
    """
    variance = num_units * planned * (1 - planned)
    sizes = np.array([len(draw) for draw in draws], dtype=np.float64)
    if variance >= _ENOUGH_VARIANCE:
        spread = float(np.square(sizes - num_units * planned).sum() / variance)
        # Maurer 2003 (JIPAM 4, art. 15), theorem 2.1: a sum S of non-negative X_i stays below E S - t with probability at
        # most exp(-t^2 / (2 sum E X_i^2)). Of the squared, standardised size of a binomial E X = 1, E X^2 < 3 + 1 / variance.
        least = len(draws) - math.sqrt(2 * len(draws) * (3 + 1 / variance) * _LOG_FALSE_ALARM)
        if spread < least:
            _refuse_draws(
                f"the sizes of {len(draws)} draws vary {spread / len(draws):.2f} times as much as coins would"
            )
    # Disjoint pairs of draws: each unit is in both with probability q^2, by a coin of its own.
    shared = sum(
        len(np.intersect1d(one, other, assume_unique=True)) for one, other in zip(draws[::2], draws[1::2], strict=True)
    )
    chances = num_units * (len(draws) // 2)
    if not _is_binomial(shared, chances, planned**2):
        _refuse_draws(f"pairs of draws share {shared} units, wanted about {chances * planned**2:.0f}")
    return DRAWS_INDEPENDENT


def _refuse_draws(what: str) -> Never:
    hint = "each unit is drawn by a coin of its own in each step: no shuffling, no batches of one size"
    raise GuardTripped(DRAWS_INDEPENDENT, what, hint=hint)


def _is_binomial(count: int, chances: int, probability: float) -> bool:
    """Whether so many of that many coins are within reach of chance (Bernstein's inequality)."""
    variance = chances * probability * (1 - probability)
    slack = math.sqrt(2 * variance * _LOG_FALSE_ALARM) + 2 / 3 * _LOG_FALSE_ALARM
    return abs(count - chances * probability) <= slack


def check_something_to_train(depends_on_trainable: bool) -> str:
    """The losses depend on a tensor that is trained: a frozen adapter would spend privacy and learn nothing."""
    if not depends_on_trainable:
        raise GuardTripped(
            EVERY_TENSOR_TRAINED,
            "no tensor that the losses depend on requires a gradient",
            hint="set what is trainable before training",
        )
    return EVERY_TENSOR_TRAINED


def check_per_record_gradients(trainable: Mapping[str, Tensor], held: Iterable[Tensor], *, num_records: int) -> str:
    """The model's trainable tensors are those the optimiser holds, each with a gradient for every record.

    Args:
        trainable: the tensors of the model that require a gradient now, by name.
        held: the tensors the optimiser moves.
        num_records: records in the micro-batch.
    """
    held_ids = {id(tensor) for tensor in held}
    if {id(tensor) for tensor in trainable.values()} != held_ids or not held_ids:
        raise GuardTripped(
            EVERY_TENSOR_TRAINED,
            f"the model has {len(trainable)} trainable tensors, the optimiser holds {len(held_ids)}, not the same ones",
            hint="move the model to its device and set what is trainable before training, not after",
        )
    for name, tensor in trainable.items():
        gradients = getattr(tensor, "grad_sample", None)
        if getattr(gradients, "shape", None) != (num_records, *tensor.shape):
            raise GuardTripped(
                EVERY_TENSOR_TRAINED,
                f"{name} has no gradient for each of the {num_records} records",
                hint="only the hooks mode of Opacus is supported, on a forward pass that uses every trained tensor",
            )
    return EVERY_TENSOR_TRAINED


def check_tensors_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """Every trainable tensor of the start is there at the end, finite, and is no longer what it was."""
    if not before or before.keys() != after.keys():
        raise GuardTripped(
            EVERY_TENSOR_TRAINED, f"{len(before)} tensors were trainable at the start, {len(after)} at the end"
        )
    for name, tensor in after.items():
        if not bool(tensor.isfinite().all()):
            raise GuardTripped(EVERY_TENSOR_TRAINED, f"{name} is no longer finite", hint="lower the learning rate")
        if bool((tensor == before[name]).all()):
            raise GuardTripped(
                EVERY_TENSOR_TRAINED,
                f"{name} did not move in a round that is paid for",
                hint="the optimiser must hold the tensors of the model itself",
            )
    return EVERY_TENSOR_TRAINED


def check_poisson_batches_used(
    trained_on: NDArray[np.int64], drawn: NDArray[np.int64], unit_indices: NDArray[np.int64]
) -> str:
    """A step was trained on exactly the records drawn, at most one for each unit. Every step.

    Args:
        trained_on: records whose gradients were taken, in any order.
        drawn: records the sampler drew.
        unit_indices: the units they belong to.
    """
    if not np.array_equal(np.sort(trained_on), np.sort(drawn)):
        raise GuardTripped(
            POISSON_BATCHES_USED,
            f"the step was trained on {len(trained_on)} records that are not the {len(drawn)} drawn",
            hint="train on the draw itself: a shuffled loader has another privacy cost than a Poisson sample",
        )
    if len(np.unique(unit_indices)) != len(drawn):
        raise GuardTripped(POISSON_BATCHES_USED, "a unit has more than one record in the step")
    return POISSON_BATCHES_USED


def check_composition_over_run(accounted_steps: int, steps_taken: int) -> str:
    """The accountant knows every step of the run, not only those of this round."""
    if accounted_steps != steps_taken:
        raise GuardTripped(
            COMPOSITION_OVER_RUN,
            f"the accountant knows {accounted_steps} steps, the run has taken {steps_taken}",
            hint="hand the spend of one round to the next; a fresh one each round states one round's epsilon",
        )
    return COMPOSITION_OVER_RUN


def check_all_passed(passed: Collection[str]) -> None:
    """Every guard of training has passed in this round: none was left out on some path through the code."""
    for guard in TRAINING_GUARDS:
        if guard not in passed:
            raise GuardTripped(guard, "it was not checked in this round, so no epsilon can be stated")


def check_metrics(names: Iterable[str], private: bool) -> str:
    """No metric of training rows leaves a private site.

    Metrics on held-back rows may: those rows are never trained on, and the stated epsilon does not cover them.

    Args:
        names: names of the metrics about to be sent.
        private: whether the run states an epsilon; if not, any metric may be sent.
    """
    refused = sorted(name for name in names if private and not name.startswith(HELD_BACK_PREFIXES))
    if refused:
        raise GuardTripped(
            NO_UNNOISED_METRICS,
            f"computed on training rows without noise: {', '.join(refused)}",
            hint=f"send only metrics of rows that were not trained on, named {' or '.join(HELD_BACK_PREFIXES)}...",
        )
    return NO_UNNOISED_METRICS
