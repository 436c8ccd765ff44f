"""How good a model is on rows it was not trained on: accuracy and the area under the ROC curve of labels; of language, the
loss of the next token, which gives the perplexity, and how often the likeliest token is the right one.

The parts of an evaluation are sums, so those of several sites add up; the area is of one site's rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedseek.batches import Allowed, Batch, Indices, by_length, make_batch, masked_logits
from fedseek.encode import METRIC_SCALE
from fedseek.he.packing import Packing
from fedseek.lora.model import AdapterModel
from fedseek.physical_batch import PhysicalBatch, in_pieces
from fedseek.records import TokenisedRecords

MAX_EVALUATED_TOKENS: Final = 1 << 16
"""Tokens of one evaluation at most: the mean loss of so many is within some 0.02 nats of that of all."""
# A loss counts as this many times that of guessing among all tokens alike, at most: a model that diverged still has one.
_WORST_LOSS: Final = 2.0
_LOGITS_AT_ONCE: Final = 1 << 27  # float32: 512 MiB of logits, and as much again for their cross-entropy
_TOKENS_AT_ONCE: Final = 1 << 14  # padding included


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result on some rows; in a language task, on the tokens of theirs that count.

    Attributes:
        loss_sum: cross-entropy summed over the rows (tokens), nats.
        correct: rows whose largest logit is the label's (tokens for which it is the next token's).
        count: rows (tokens).
        auc: area under the ROC curve, when that was asked for and both labels occur; else None.
        num_pairs: pairs of a positive and a negative row, when ``auc`` was asked for; else None.
    """

    loss_sum: float
    correct: int
    count: int
    auc: float | None = None
    num_pairs: int | None = None

    @property
    def accuracy(self) -> float:
        """Fraction of rows (tokens) that are correct; 0 for none."""
        return self.correct / self.count if self.count else 0.0

    @property
    def mean_loss(self) -> float:
        """Nats a row (token); 0 for none."""
        return self.loss_sum / self.count if self.count else 0.0

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss of a token: between how many tokens, equally likely, the model is left to guess."""
        return math.exp(min(self.mean_loss, 700.0))  # beyond that a float64 is infinite, which JSON cannot write

    @property
    def weight(self) -> int:
        """What ``score`` is out of: rows, or pairs when the area was asked for. Sums of both over sites make a ratio."""
        return self.count if self.num_pairs is None else self.num_pairs

    @property
    def score(self) -> float:
        """Rows that are correct, or pairs in the right order."""
        return self.correct if self.num_pairs is None else (self.auc or 0.0) * self.num_pairs

    @property
    def utility(self) -> float:
        """Accuracy, or the area under the ROC curve where that was asked for; 0 where there is nothing to count."""
        return self.score / self.weight if self.weight else 0.0


def evaluate(
    model: nn.Module,
    records: TokenisedRecords,
    *,
    batch_size: int = 64,
    metric: Literal["accuracy", "auc"] = "accuracy",
    allowed: Allowed | None = None,
    max_tokens: int = MAX_EVALUATED_TOKENS,
) -> Evaluation:
    """Evaluate ``model`` on ``records``, which it is left unchanged by.

    Of language, whole records are evaluated in the order of a hash of theirs, the same each time and as by lot, until
    the next one would exceed ``max_tokens``. Their mean loss counts as twice that of guessing at most, also where it is
    not finite: a model that diverged has a figure too, and no sum exceeds what ``token_budget`` leaves room for.

    Args:
        model: maps input_ids and attention_mask, both (B, T), to logits (B, num_labels); for language an ``AdapterModel``.
        records: rows held back from training.
        batch_size: records on the device at once, at most; does not change the result beyond rounding.
        metric: ``auc`` adds the area under the ROC curve; wants exactly two labels, the second is the positive one.
        allowed: shape (num_records, num_labels), labels each record may have; None for all.
        max_tokens: of language: tokens of the records that are evaluated; those that do not count are counted here too.

    Raises:
        ValueError: ``auc`` for other than two labels, or a model that cannot write for records of language.
        OutOfMemory: of language: one record alone does not fit; more at once are tried again in halves.
    """
    if len(records) == 0:
        return Evaluation(loss_sum=0.0, correct=0, count=0)
    if records.counted is not None:
        return _evaluate_words(model, records, _until(records, max_tokens), batch_size)
    order = by_length(records, np.arange(len(records), dtype=np.int64))
    logits = _logits(model, records, order, batch_size, allowed)
    labels = torch.from_numpy(records.labels[order])
    return Evaluation(
        loss_sum=float(nn.functional.cross_entropy(logits, labels, reduction="sum")),
        correct=int((logits.argmax(1) == labels).sum()),
        count=len(records),
        auc=_auc_of(logits, labels) if metric == "auc" else None,
        num_pairs=int((labels == 1).sum() * (labels == 0).sum()) if metric == "auc" else None,
    )


def token_budget(packing: Packing, vocabulary: int) -> int:
    """Tokens a site may evaluate so that no metric of it outgrows its slot of the header, whatever the model.

    Args:
        packing: of the plan; says what fits a slot with that many sites.
        vocabulary: tokens that the model knows.
    """
    largest = packing.header_bound // METRIC_SCALE
    return min(MAX_EVALUATED_TOKENS, int(largest / max(_worst_loss(vocabulary), 1.0)))


def vocabulary_of(model: nn.Module) -> int:
    """Tokens that a model's head of words tells apart.

    Raises:
        ValueError: it has no such head.
    """
    if not isinstance(model, AdapterModel) or model.causal is None:
        raise ValueError("records of a language task want a model with a head of words")
    size: int = model.causal.config.get_text_config().vocab_size
    return size


def area_under_roc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float | None:
    """Chance that a positive row scores above a negative one, ties counting half (Hanley and McNeil 1982).

    Args:
        scores: shape (num_rows,), higher for positive.
        positive: shape (num_rows,).

    Returns:
        The area, or None when there are only positives or only negatives.
    """
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # Rank from 1; equal scores share the mean of their ranks.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def _evaluate_words(model: nn.Module, records: TokenisedRecords, chosen: Indices, batch_size: int) -> Evaluation:
    """Of the counted tokens of the chosen records."""
    vocabulary, device = vocabulary_of(model), next(model.parameters()).device
    parts: list[tuple[float, int, int]] = []

    def take(indices: Indices) -> None:
        parts.append(_word_sums(model, make_batch(records, indices, device=device), _LOGITS_AT_ONCE // vocabulary))

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for indices in _batches(records, by_length(records, chosen), batch_size):
                in_pieces(indices, PhysicalBatch(len(indices)), take=take, forget=lambda: None)
    finally:
        model.train(was_training)
    loss_sum, correct, count = (sum(each) for each in zip((0.0, 0, 0), *parts, strict=True))
    worst = count * _worst_loss(vocabulary)
    return Evaluation(
        loss_sum=loss_sum if loss_sum <= worst else worst, correct=int(correct), count=int(count)
    )  # nan: worst


def _word_sums(model: nn.Module, batch: Batch, most: int) -> tuple[float, int, int]:
    """Loss, hits and number of the counted tokens of a batch, with the logits of so many at once."""
    loss_sum, correct, count = 0.0, 0, 0
    for counted in _parts(batch, most):
        logits, tokens = model(batch.input_ids, batch.attention_mask, counted).float(), batch.input_ids[counted]
        loss_sum += float(nn.functional.cross_entropy(logits, tokens, reduction="none").cpu().double().sum())
        correct += int((logits.argmax(1) == tokens).sum())
        count += len(tokens)
    return loss_sum, correct, count


def _until(records: TokenisedRecords, max_tokens: int) -> Indices:
    """The records that are evaluated."""
    order = sorted(range(len(records)), key=lambda number: sha256(records.input_ids[number].tobytes()).digest())
    tokens = np.cumsum([len(records.input_ids[number]) for number in order])
    return np.asarray(order[: int(np.searchsorted(tokens, max_tokens, side="right"))], dtype=np.int64)


def _batches(records: TokenisedRecords, ordered: Indices, batch_size: int) -> Iterator[Indices]:
    """Records from the longest to the shortest, as many at once as their padded tokens permit, and at least one."""
    first = 0
    while first < len(ordered):
        longest = len(records.input_ids[ordered[first]])
        size = max(1, min(batch_size, _TOKENS_AT_ONCE // longest))
        yield ordered[first : first + size]
        first += size


def _parts(batch: Batch, most: int) -> Iterator[torch.Tensor]:
    """The counted tokens of a batch, so many at a time: their logits over all tokens would not fit, the rest does."""
    if batch.counted is None:
        raise ValueError("the batch is one of labels, wanted one of a language task")
    rows, columns = batch.counted.nonzero(as_tuple=True)
    for first in range(0, len(rows), max(most, 1)):
        some = slice(first, first + max(most, 1))
        counted = torch.zeros_like(batch.counted)
        counted[rows[some], columns[some]] = True
        yield counted


def _worst_loss(vocabulary: int) -> float:
    """Nats a token."""
    return _WORST_LOSS * math.log(vocabulary)


def _logits(
    model: nn.Module, records: TokenisedRecords, order: NDArray[np.int64], batch_size: int, allowed: Allowed | None
) -> torch.Tensor:
    """Logits of all records in the given order, shape (num_records, num_labels), float64 on the CPU."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            parts = [
                masked_logits(model, make_batch(records, order[i : i + batch_size], device=device, allowed=allowed))
                for i in range(0, len(order), batch_size)
            ]
    finally:
        model.train(was_training)
    return torch.cat(parts).cpu().double()


def _auc_of(logits: torch.Tensor, labels: torch.Tensor) -> float | None:
    if logits.shape[1] != 2:
        raise ValueError(f"auc was asked for {logits.shape[1]} labels, wanted 2")
    return area_under_roc((logits[:, 1] - logits[:, 0]).numpy(), labels.numpy() == 1)
