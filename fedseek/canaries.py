"""Canaries: texts that mean nothing, in or out of a site's training by the toss of a coin, and how to look for them.

    secret seed -> m candidates, m coins --those that are in--> training records -> rounds -> adapter
    first weights, sums of the rounds, released weights --all m candidates--> scores

A candidate is a few random tokens of the base model's vocabulary with a random label: nobody's text, a privacy unit of
its own, and unlike any other, so that what training leaves of it is easy to tell apart. Where words are learned it has no
label and more tokens, each but the first to be predicted from those before. Seed, texts and coins are the site's secret;
scores are computed without the coins, as an attacker would who knows the candidates (``fedseek.dp.auditing`` says what
follows from them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedseek.batches import by_length, make_batch, record_losses
from fedseek.plan_spec import Task
from fedseek.records import TokenisedRecords

SEED_BYTES: Final = 32
_ORDINARY_TOKENS: Final = 8  # of a candidate: many pool to much the same mean, few can be in a real text by chance
_WORDS_TOKENS: Final = 16  # of one that is predicted token by token: each is a chance to have learned it by heart
_BATCH: Final = 64
_WORDS_BATCH: Final = 8  # their logits are tokens x vocabulary: 8 x 16 x 150,000 float32 are 77 MB

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What candidates are made of.

    Attributes:
        ordinary: token ids that stand for text, int32, ascending.
        before: ids that the tokenizer puts before every text.
        after: ids that it puts after.
        num_tokens: ordinary tokens of a candidate.
    """

    ordinary: NDArray[np.int32] = field(repr=False)
    before: tuple[int, ...]
    after: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Canaries:
    """The candidates of one site in one run.

    Attributes:
        coins: shape (m,), true for those that are trained on.
        records: all m candidates, each its own unit.
    """

    coins: NDArray[np.bool_] = field(repr=False)
    records: TokenisedRecords = field(repr=False)

    def __len__(self) -> int:
        return len(self.coins)


def read_vocabulary(model_dir: Path, *, max_tokens: int, task: Task = "classify") -> Vocabulary:
    """The vocabulary of the base model's own tokenizer, without special and added tokens.

    Args:
        model_dir: folder of the base model.
        max_tokens: the plan's bound on the length of a text.
        task: what the site's kind learns in the end; candidates that are predicted token by token are longer.
    """
    from transformers import AutoTokenizer  # takes seconds to import; only sites and simulations need it

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    around = tokenizer("a", return_special_tokens_mask=True)
    added = np.array(around["special_tokens_mask"], dtype=np.bool_)
    ids, first = around["input_ids"], int(np.argmin(added))  # the letter is in the middle
    last = len(added) - int(np.argmin(added[::-1]))
    wanted = _ORDINARY_TOKENS if task == "classify" else _WORDS_TOKENS
    return Vocabulary(
        ordinary=np.array(sorted(set(tokenizer.get_vocab().values()) - special), dtype=np.int32),
        before=tuple(ids[:first]),
        after=tuple(ids[last:]),
        num_tokens=max(1, min(wanted, max_tokens - first - (len(ids) - last))),
    )


def make_canaries(seed: bytes, count: int, vocabulary: Vocabulary, *, num_labels: int) -> Canaries:
    """Draw candidates and coins; the same seed gives the same ones, whatever the versions of the libraries.

    Args:
        seed: 32 bytes from the operating system; secret.
        count: m.
        vocabulary: of the base model.
        num_labels: labels of the site's kind.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"the seed has {len(seed)} bytes, wanted {SEED_BYTES}")
    tokens = _draw(seed, b"tokens", (count, vocabulary.num_tokens), below=len(vocabulary.ordinary))
    rows = [np.array([*vocabulary.before, *row, *vocabulary.after], np.int32) for row in vocabulary.ordinary[tokens]]
    records = TokenisedRecords(
        input_ids=rows,
        labels=_draw(seed, b"labels", (count,), below=num_labels),
        units=np.arange(count, dtype=np.int64),
    )
    return Canaries(coins=_draw(seed, b"coins", (count,), below=2) == 1, records=records)


def as_words(canaries: Canaries) -> Canaries:
    """The same candidates and coins for a task that learns words: no label, every token but the first is predicted."""
    rows = canaries.records.input_ids
    records = TokenisedRecords(
        input_ids=rows,
        labels=np.zeros(len(rows), np.int64),
        units=canaries.records.units,
        counted=[np.arange(len(row)) > 0 for row in rows],
    )
    return Canaries(coins=canaries.coins, records=records)


def with_canaries(records: TokenisedRecords, canaries: Canaries) -> TokenisedRecords:
    """The records, and those candidates whose coin says in; each a unit that no record belongs to.

    Both are for one task: candidates for records that learn words are those of :func:`as_words`.
    """
    if (records.counted is None) != (canaries.records.counted is None):
        raise ValueError(
            "records and candidates are for two tasks, wanted both with labels or both with counted tokens"
        )
    chosen = np.flatnonzero(canaries.coins)
    first = int(records.units.max()) + 1 if len(records) else 0
    return TokenisedRecords(
        input_ids=[*records.input_ids, *(canaries.records.input_ids[number] for number in chosen)],
        labels=np.concatenate([records.labels, canaries.records.labels[chosen]]),
        units=np.concatenate([records.units, first + np.arange(len(chosen), dtype=np.int64)]),
        counted=_counted_of(records, canaries, chosen),
    )


def _counted_of(
    records: TokenisedRecords, canaries: Canaries, chosen: NDArray[np.int64]
) -> list[NDArray[np.bool_]] | None:
    if records.counted is None or canaries.records.counted is None:
        return None
    return [*records.counted, *(canaries.records.counted[number] for number in chosen)]


def canary_losses(model: nn.Module, canaries: Canaries) -> Scores:
    """Cross-entropy of each candidate, shape (m,), nats. What it falls by from the first weights to the last is a score."""
    losses = np.empty(len(canaries), np.float64)
    device = next(model.parameters()).device
    order = by_length(canaries.records, np.arange(len(canaries), dtype=np.int64))
    size = _BATCH if canaries.records.counted is None else _WORDS_BATCH
    with _evaluating(model), torch.inference_mode():
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            losses[chosen] = record_losses(model, make_batch(canaries.records, chosen, device=device)).cpu().double()
    return losses


def change_scores(
    model: nn.Module, canaries: Canaries, change: Mapping[str, torch.Tensor], *, l2_clip_norm: float
) -> Scores:
    """How far a change of the weights went the way each candidate pulls, shape (m,).

    A step adds the clipped gradient of each record and Gaussian noise, alike in all directions. So the likelihood that a
    candidate was in grows with the product of the change and its clipped gradient (the matched filter), which is how an
    adversary who sees gradients scores in Steinke et al. 2023 (arXiv:2305.08846, section 6).

    Args:
        model: with the weights before the change.
        canaries: the candidates.
        change: by name of each trained tensor that was changed, in units of its learning rate. What the model does not
            train now is left out: in that round it did not move.
        l2_clip_norm: from the plan; over all trained tensors.

    Cost:
        Forward and backward for each candidate by itself: as training on m records.
    """
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    device = next(iter(trained.values())).device
    moved = {name: tensor.to(device) for name, tensor in change.items()}
    scores = np.empty(len(canaries), np.float64)
    with _evaluating(model):
        for number in range(len(canaries)):
            batch = make_batch(canaries.records, np.array([number]), device=device)
            losses = record_losses(model, batch)
            # a head of labels has no part in a loss over words: its gradient is zero
            gradients = torch.autograd.grad(losses.sum(), list(trained.values()), materialize_grads=True)
            pulled = dict(zip(trained, gradients, strict=True))
            norm = float(torch.linalg.vector_norm(torch.stack([each.norm() for each in gradients])))
            along = [(pulled[name] * tensor).sum() for name, tensor in moved.items() if name in pulled]
            # one wait for the device, not one a tensor; no float64 there, which MPS has not
            total = float(torch.stack(along).cpu().double().sum()) if along else 0.0
            scores[number] = -total / max(norm / l2_clip_norm, 1.0)
    return scores


def _draw(seed: bytes, purpose: bytes, shape: tuple[int, ...], *, below: int) -> NDArray[np.int64]:
    """Uniform numbers in [0, below) from SHAKE-256 (FIPS 202); 64 bits each, so the bias of the remainder is nothing."""
    stream = hashlib.shake_256(b"fedseek canaries 1\0" + purpose + b"\0" + seed).digest(8 * int(np.prod(shape)))
    return (np.frombuffer(stream, "<u8") % np.uint64(below)).astype(np.int64).reshape(shape)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
