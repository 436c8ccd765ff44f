"""How good a model is on rows it was not trained on: accuracy, and the area under the ROC curve.

The parts of an evaluation are sums, so those of several sites add up; the area is of one site's rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedseek.records import TokenisedRecords
from fedseek.train import Allowed, by_length, make_batch, masked_logits


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result on some rows.

    Attributes:
        loss_sum: cross-entropy summed over the rows, nats.
        correct: rows whose largest logit is the label's.
        count: rows.
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
        """Fraction of rows that are correct; 0 for no rows."""
        return self.correct / self.count if self.count else 0.0

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
) -> Evaluation:
    """Evaluate ``model`` on ``records``, which it is left unchanged by.

    Args:
        model: maps input_ids and attention_mask, both (B, T), to logits (B, num_labels).
        records: rows held back from training.
        batch_size: records on the device at once; does not change the result beyond rounding.
        metric: ``auc`` adds the area under the ROC curve; wants exactly two labels, the second is the positive one.
        allowed: shape (num_records, num_labels), labels each record may have; None for all.

    Raises:
        ValueError: ``auc`` for other than two labels.
    """
    if len(records) == 0:
        return Evaluation(loss_sum=0.0, correct=0, count=0)
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
    return torch.cat(parts).double().cpu()


def _auc_of(logits: torch.Tensor, labels: torch.Tensor) -> float | None:
    if logits.shape[1] != 2:
        raise ValueError(f"auc was asked for {logits.shape[1]} labels, wanted 2")
    return area_under_roc((logits[:, 1] - logits[:, 0]).numpy(), labels.numpy() == 1)
