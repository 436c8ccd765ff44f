"""Records on a device as padded batches, and the loss of each record by itself.

    records --cut--> batch (B, T) --model--> logits --> losses (B,)

The loss of a record is that of its label, or the mean over those of its own tokens that count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedseek.records import TokenisedRecords

Indices = NDArray[np.int64]
Allowed = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some records on the model's device, padded to the longest of them.

    Attributes:
        record_indices: shape (B,), which records they are.
        input_ids: shape (B, T), int64, 0 where padded.
        attention_mask: shape (B, T), int64, 1 for tokens and 0 for padding.
        labels: shape (B,), int64.
        allowed: shape (B, num_labels), labels the record may have; None for all.
        counted: shape (B, T), bool, tokens whose prediction counts, never the first; None when labels are learned.
    """

    record_indices: Indices = field(repr=False)
    input_ids: torch.Tensor = field(repr=False)
    attention_mask: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)
    allowed: torch.Tensor | None = field(repr=False)
    counted: torch.Tensor | None = field(repr=False, default=None)


def make_batch(
    records: TokenisedRecords, record_indices: Indices, *, device: torch.device, allowed: Allowed | None = None
) -> Batch:
    """Put some records on a device as one padded batch, in the order given."""
    rows = [records.input_ids[i] for i in record_indices]
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    counted = None
    if records.counted is not None:
        counted = np.zeros(mask.shape, dtype=np.bool_)
        counted[mask] = np.concatenate([records.counted[i] for i in record_indices])
        counted[:, 0] = False  # nothing stands before it to predict it from
    return Batch(
        record_indices=record_indices,
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
        labels=torch.from_numpy(records.labels[record_indices]).to(device),
        allowed=None if allowed is None else torch.from_numpy(allowed[record_indices]).to(device),
        counted=None if counted is None else torch.from_numpy(counted).to(device),
    )


def by_length(records: TokenisedRecords, record_indices: Indices) -> Indices:
    """The same records, longest first, so that batches cut from them carry little padding."""
    lengths = np.array([len(records.input_ids[i]) for i in record_indices], dtype=np.int64)
    return record_indices[np.argsort(-lengths, kind="stable")]


def masked_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits, shape (B, num_labels), minus infinity where a label is not allowed."""
    logits: torch.Tensor = model(batch.input_ids, batch.attention_mask)
    return logits if batch.allowed is None else logits.masked_fill(~batch.allowed, -math.inf)


def record_losses(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of each record by itself, shape (B,), float32: no mean over records, so that no record's gradient
    depends on another. In a language task it is the mean over the record's own counted tokens, never over the batch's.
    """
    if batch.counted is None:
        return _cross_entropy(masked_logits(model, batch), batch.labels, label_smoothing)
    losses = token_losses(model, batch, label_smoothing=label_smoothing)
    sums = losses.new_zeros(len(batch.labels)).index_add(0, batch.counted.nonzero()[:, 0], losses)
    # a record without counted tokens has loss 0 and moves nothing
    return sums / batch.counted.sum(1).clamp(min=1)


def token_losses(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of each counted token, shape (n,), float32, record after record; for language tasks."""
    counted = batch.counted
    if counted is None:
        raise ValueError("the batch is one of labels, wanted one of a language task")
    logits: torch.Tensor = model(batch.input_ids, batch.attention_mask, counted)
    return _cross_entropy(logits, batch.input_ids[counted], label_smoothing)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Of each row; smoothed as by Szegedy et al. 2016 (arXiv:1512.00567), section 7, over the classes that may be.

    Torch's own smoothing would give infinity where a class may not be.
    """
    # bfloat16 would round the sum over the classes
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    if label_smoothing == 0:
        return losses
    possible = logits.isfinite()
    log_probabilities = logits.log_softmax(-1).masked_fill(~possible, 0.0)
    uniform = -log_probabilities.sum(-1) / possible.sum(-1)
    return (1 - label_smoothing) * losses + label_smoothing * uniform
