"""Voting: whether a run goes on, by what each site's rows held back say (``[plan.training.early_stopping]``).

A site votes to stop once its loss has been above its best for ``patience`` rounds in a row, within the stage it is in. The
votes ride in the header of the adapter's update, and are summed under encryption with it: sites see how many there were, the
coordinator sees nothing. Once more than half of the sites in a sum voted, every site rests for the remaining rounds of that
stage: it trains nothing and spends nothing, and what the sums hold is not applied. In a stage before the last this ends
the stage; in the last one it ends the training. Everybody decides alike, since everybody goes by the same sums in the same
order, also a site that was away and gets them later.

What the adapter was when the sum came is what it stays: it is not taken back to the round in which the loss was lowest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from fedseek.encode import SummedUpdate
from fedseek.plan import GLOBAL_SCOPE, Plan
from fedseek.prepare import STOP_METRICS
from fedseek_site.state import LossWatch

_VOTES: Final = STOP_METRICS[0]


def watch_loss(plan: Plan, watch: LossWatch | None, loss: float, *, number: int) -> LossWatch | None:
    """What a site remembers of its losses once it knows that of the weights which round ``number`` begins with.

    The first round of a stage starts over: its loss may be of another task. A round that is played again, in a run that
    goes on from a lost one, is counted once. None where the plan lets nobody vote.
    """
    if plan.spec.training.early_stopping is None:
        return None
    stage = plan.stage_of(number).index
    if watch is None or watch.stage != stage:
        return LossWatch(stage=stage, round=number, best=loss if math.isfinite(loss) else math.inf)
    if number <= watch.round:
        return watch
    is_worse = not loss <= watch.best  # true of a loss that is no number, too
    best = watch.best if is_worse else loss
    return LossWatch(stage=stage, round=number, best=best, worse=watch.worse + 1 if is_worse else 0)


def votes_to_stop(plan: Plan, watch: LossWatch | None) -> bool:
    """Whether a site votes to stop."""
    patience = plan.spec.training.early_stopping
    return patience is not None and watch is not None and watch.worse >= patience.patience


def is_resting(plan: Plan, resting_since: int, number: int) -> bool:
    """Whether all sites rest in round ``number``, as the sum of round ``resting_since`` decided; 0 if none did."""
    return 0 < resting_since < number and plan.stage_of(number).index == plan.stage_of(resting_since).index


def count_votes(plan: Plan, resting_since: int, number: int, summed: Mapping[str, SummedUpdate]) -> int:
    """``resting_since`` once the sums of round ``number`` are known: the round itself, if its sites voted to stop."""
    update = summed.get(GLOBAL_SCOPE)
    if update is None or is_resting(plan, resting_since, number):
        return resting_since
    return number if 2 * update.metrics.get(_VOTES, 0.0) > update.contributors else resting_since
