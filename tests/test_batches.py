"""Losses of a language task: a record's own tokens and no others."""

import math

import numpy as np
import pytest
import torch
from tiny_rounds import language_model, language_records
from torch import nn

from fedseek.batches import make_batch, masked_logits, record_losses, token_losses
from fedseek.lora.model import AdapterModel
from fedseek.records import TokenisedRecords

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Full backward hook")

CPU = torch.device("cpu")


def batch_of(records: TokenisedRecords, *rows: int):
    return make_batch(records, np.array(rows, dtype=np.int64), device=CPU)


def loss_by_hand(model: AdapterModel, records: TokenisedRecords, row: int, smoothing: float = 0.0) -> float:
    """One record alone, token by token: log probability of each counted token given those before it."""
    ids = torch.from_numpy(records.input_ids[row].astype(np.int64))
    every = torch.ones(1, len(ids), dtype=torch.bool)
    logits = model(ids[None], torch.ones(1, len(ids), dtype=torch.int64), every)  # of tokens 1, 2, ...
    surprise = []
    for place in np.flatnonzero(records.counted[row]):
        log_probabilities = logits[place - 1].log_softmax(-1)
        uniform = -float(log_probabilities.detach().mean())
        surprise.append(-(1 - smoothing) * float(log_probabilities.detach()[ids[place]]) + smoothing * uniform)
    return math.fsum(surprise) / len(surprise)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_record_is_the_mean_over_its_own_counted_tokens(smoothing):
    model, records = language_model(), language_records()
    losses = record_losses(model, batch_of(records, 0, 1, 2, 3), label_smoothing=smoothing)
    by_hand = [loss_by_hand(model, records, row, smoothing) for row in range(4)]
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_a_neighbour_of_any_length_changes_nothing():
    model = language_model()
    long, short = language_records((4, 40)), language_records((4, 2))
    first = [record_losses(model, batch_of(records, *rows))[0] for records, rows in ((long, (0, 1)), (short, (0, 1)))]
    alone = record_losses(model, batch_of(long, 0))[0]
    torch.testing.assert_close(torch.stack(first), alone.expand(2), rtol=1e-5, atol=1e-6)


def test_padding_never_counts():
    records = language_records()
    batch = batch_of(records, 0, 1, 3)
    assert batch.counted.sum(1).tolist() == [records.counted[row].sum() for row in (0, 1, 3)]
    assert not (batch.counted & (batch.attention_mask == 0)).any()
    assert len(token_losses(language_model(), batch)) == batch.counted.sum()


def test_the_first_token_never_counts():
    records = language_records((5, 5))
    records.counted[0][:] = True
    assert batch_of(records, 0, 1).counted[:, 0].tolist() == [False, False]
    token_losses(language_model(), batch_of(records, 0))


def test_a_record_of_which_nothing_counts_moves_nothing():
    records = language_records((5, 4))
    records.counted[1][:] = False
    model = language_model()
    losses = record_losses(model, batch_of(records, 0, 1))
    assert losses[1].item() == 0.0
    losses[1].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_token_losses_are_of_language_batches_only():
    records = TokenisedRecords([np.array([5, 6], dtype=np.int32)], np.array([0]), np.array([0]))
    with pytest.raises(ValueError, match="one of labels"):
        token_losses(nn.Identity(), batch_of(records, 0))


class Shown(nn.Module):
    """Gives the logits it was given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.logits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_is_over_the_labels_that_may_be(smoothing):
    torch.manual_seed(0)
    model = Shown(torch.randn(3, 4))
    records = TokenisedRecords([np.array([5], dtype=np.int32)] * 3, np.array([0, 1, 0]), np.arange(3))
    allowed = np.array([[True] * 4, [True, True, False, False], [True, False, True, False]])
    batch = make_batch(records, np.arange(3), device=CPU, allowed=allowed)
    losses = record_losses(model, batch, label_smoothing=smoothing)
    expected = [
        nn.functional.cross_entropy(
            model.logits[row][allowed[row]], torch.tensor(allowed[row][: records.labels[row]].sum()),
            label_smoothing=smoothing,
        )
        for row in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(losses, torch.stack(expected))
    losses.sum().backward()
    assert bool(model.logits.grad.isfinite().all())
    assert not model.logits.grad[~torch.from_numpy(allowed)].any()
    assert masked_logits(model, batch)[1].tolist()[2:] == [-math.inf, -math.inf]
