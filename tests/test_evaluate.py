import numpy as np
import pytest
import torch
from torch import nn

from fedseek.evaluate import area_under_roc, evaluate
from fedseek.records import TokenisedRecords


class FirstToken(nn.Module):
    """Logits are looked up by the first token; in training mode they are noise."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table, dtype=torch.float32))

    def forward(self, input_ids, attention_mask):
        logits = self.table[input_ids[:, 0]]
        return logits + torch.randn_like(logits) * 100 if self.training else logits


def records_of(tokens, labels):
    rows = [np.array([token] + [9] * (position % 4), dtype=np.int32) for position, token in enumerate(tokens)]
    return TokenisedRecords(rows, np.array(labels), np.arange(len(rows)))


TABLE = [[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.0, 3.0, 1.0]]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_sums_are_over_all_rows_whatever_the_batches(batch_size):
    tokens, labels = [0, 1, 2, 0, 2], [0, 2, 1, 1, 1]
    result = evaluate(FirstToken(TABLE), records_of(tokens, labels), batch_size=batch_size)
    expected = sum(np.log(np.exp(TABLE[t]).sum()) - TABLE[t][label] for t, label in zip(tokens, labels, strict=True))
    assert result.loss_sum == pytest.approx(expected)
    assert (result.correct, result.count, result.auc) == (3, 5, None)
    assert result.accuracy == 0.6


def test_labels_that_are_not_allowed_are_never_predicted():
    allowed = np.array([[True, False, True], [True, False, True]])
    result = evaluate(FirstToken(TABLE), records_of([1, 2], [2, 2]), allowed=allowed)
    assert result.correct == 2
    assert np.isfinite(result.loss_sum)


def test_the_mode_of_the_model_is_restored_and_not_used():
    model = FirstToken(TABLE).train()
    assert evaluate(model, records_of([0, 2], [0, 1])).correct == 2
    assert model.training


def test_no_rows():
    result = evaluate(FirstToken(TABLE), records_of([], []))
    assert (result.loss_sum, result.correct, result.count, result.accuracy) == (0.0, 0, 0, 0.0)


def test_area_of_two_labels():
    model = FirstToken([[0.0, 3.0], [0.0, 1.0], [0.0, -1.0]])
    result = evaluate(model, records_of([0, 1, 2, 1], [1, 0, 0, 1]), metric="auc")
    assert result.auc == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_area_of_three_labels_is_refused():
    with pytest.raises(ValueError, match="wanted 2"):
        evaluate(FirstToken(TABLE), records_of([0, 1], [0, 1]), metric="auc")


@pytest.mark.parametrize("seed", range(5))
def test_area_is_the_chance_that_a_positive_scores_above_a_negative(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 60).astype(np.float64)  # many ties
    positive = rng.random(60) < 0.3
    pairs = scores[positive][:, None] - scores[~positive][None, :]
    assert area_under_roc(scores, positive) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_area_of_one_label_alone_is_unknown():
    assert area_under_roc(np.array([1.0, 2.0]), np.array([True, True])) is None
    assert area_under_roc(np.array([1.0, 2.0]), np.array([False, False])) is None
