"""What rides beside an update: that it fits its slots whatever the model came to, and keeps its ratios."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.encode import METRIC_SCALE
from fedseek.evaluate import Evaluation
from fedseek.generate import Answers
from fedseek.he.packing import choose_packing
from fedseek.prepare import ANSWER_METRICS, HELD_BACK_METRICS, STOP_METRICS
from fedseek_site.metrics import metrics_of

PACKING = choose_packing(13, 1024)
LARGEST = PACKING.header_bound / METRIC_SCALE


def told(evaluation, answers=None, *, votes=False):
    return metrics_of(evaluation, answers, votes=votes, packing=PACKING)


def test_every_metric_is_there_under_its_name():
    answers = Answers(("a", "b", "c"), exact=1.0, f1=2.5, rouge_l=1.25)
    got = told(Evaluation(loss_sum=7.5, correct=3, count=5), answers, votes=True)
    assert tuple(got) == HELD_BACK_METRICS + ANSWER_METRICS + STOP_METRICS
    assert list(got.values()) == [3, 5, 7.5, 5, 1.0, 2.5, 1.25, 3, 1]


def test_in_rounds_without_answers_and_votes_they_are_zeros():
    got = told(Evaluation(loss_sum=0.0, correct=0, count=0))
    assert not any(got.values())


@given(
    loss=st.one_of(st.floats(min_value=0), st.just(math.nan)),
    count=st.integers(0, 2**62),
    hits=st.floats(0, 1),
    pairs=st.one_of(st.none(), st.integers(0, 2**62)),
)
def test_no_figure_outgrows_its_slot_whatever_the_model(loss, count, hits, pairs):
    evaluation = Evaluation(loss, correct=int(hits * count), count=count, auc=hits, num_pairs=pairs)
    got = told(evaluation)
    assert all(0 <= value <= LARGEST for value in got.values())
    if evaluation.weight:
        assert got["held_back_score"] / got["held_back_weight"] == pytest.approx(evaluation.utility, abs=1e-6)


def test_pairs_of_many_rows_keep_their_ratio():
    got = told(Evaluation(loss_sum=1.0, correct=1, count=20_000, auc=0.75, num_pairs=10**8))
    assert got["held_back_weight"] == pytest.approx(LARGEST, abs=1)
    assert got["held_back_score"] == pytest.approx(0.75 * LARGEST, abs=1)
    assert got["held_back_count"] == 20_000


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_the_largest_there_is(loss):
    assert told(Evaluation(loss, correct=0, count=10))["held_back_loss"] == pytest.approx(LARGEST, abs=1)
