"""Metrics: the numbers of a site that ride beside its update and are summed with it. All are of rows held back.

    held_back_...   utility and loss, each round
    answers_...     scores of answers, before the first round and after the last
    stop_votes      1 for a vote to stop, else 0

The first two ride in the kind's scope: its sites see their sums; the votes beside the adapter: all sites see how many.
"""

from __future__ import annotations

import math
from typing import Final

from fedseek.encode import METRIC_SCALE
from fedseek.evaluate import Evaluation
from fedseek.generate import Answers
from fedseek.he.packing import Packing
from fedseek.prepare import ANSWER_METRICS, HELD_BACK_METRICS, STOP_METRICS

_NO_ANSWERS: Final = Answers(())


def metrics_of(evaluation: Evaluation, answers: Answers | None, *, votes: bool, packing: Packing) -> dict[str, float]:
    """Every metric by name; a scope takes those of its layout.

    A figure that would outgrow its slot is scaled down together with what it is out of, and a loss that is no number is
    the largest there is: a round must not fail in its middle on account of a model that diverged.
    """
    largest = float(packing.header_bound // METRIC_SCALE)
    loss = evaluation.loss_sum if math.isfinite(evaluation.loss_sum) else largest
    values = (
        *_fitting(evaluation.score, float(evaluation.weight), largest=largest),
        *_fitting(loss, float(evaluation.count), largest=largest),
    )
    told = answers or _NO_ANSWERS
    scores = (told.exact, told.f1, told.rouge_l, float(told.count))
    return {
        **dict(zip(HELD_BACK_METRICS, values, strict=True)),
        **dict(zip(ANSWER_METRICS, scores, strict=True)),
        **dict.fromkeys(STOP_METRICS, float(votes)),
    }


def _fitting(part: float, whole: float, *, largest: float) -> tuple[float, float]:
    scale = min(1.0, largest / max(part, whole, 1.0))
    return min(part * scale, largest), min(whole * scale, largest)
