"""A step that several processes take together holds each record of the draw once, and is noised once."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import nn

from fedseek.dp.private_step import private_step
from fedseek.dp.sampling import Draw
from fedseek.errors import GuardTripped

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:.*is_gradient_checkpointing")

NUM_RECORDS = 6


class Together:
    """Two threads in place of two processes; ``parts`` says who trains on what."""

    def __init__(self, rank, parts, table, barrier):
        self.rank, self.parts, self.table, self.barrier = rank, parts, table, barrier

    @property
    def leads(self):
        return self.rank == 0

    def agree(self, draw):
        return draw

    def share(self, record_indices):
        return np.array(self.parts[self.rank], dtype=np.int64)

    def add(self, tensors):
        for total, tensor in zip(self._of_all(tensors, sum), tensors, strict=True):
            tensor.copy_(total)

    def follow(self, tensors):
        for theirs, tensor in zip(self._of_all(tensors, lambda every: every[0]), tensors, strict=True):
            tensor.copy_(theirs)

    def _of_all(self, tensors, join):
        self.table[self.rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait(30)
        joined = [join(every) for every in zip(*self.table, strict=True)]
        self.barrier.wait(30)
        return joined


def losses_of(model, batch, rows):
    ids, mask, labels = (part[rows] for part in batch)
    return nn.functional.cross_entropy(model(ids, mask), labels, reduction="none")


def values_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def step_together(model, make_batch, privacy, parts):
    """The models of all after one step on records 0 to 5."""
    batch, table, barrier = make_batch(NUM_RECORDS), [None] * len(parts), Barrier(len(parts))
    models = [copy.deepcopy(model) for _ in parts]

    def play(rank):
        workers = Together(rank, parts, table, barrier)
        mine = models[rank]
        sgd = torch.optim.SGD([p for p in mine.parameters() if p.requires_grad], lr=1.0)
        with private_step(mine, sgd, privacy=privacy, expected_batch_size=1.0, workers=workers) as step:
            rows = workers.share(np.arange(NUM_RECORDS))
            if len(rows):
                step.accumulate(losses_of(step.model, batch, rows), rows)
            step.apply(Draw(0, np.arange(NUM_RECORDS), np.arange(NUM_RECORDS)))
            step.finish()
        return step.passed

    with ThreadPoolExecutor(len(parts)) as threads:
        passed = list(threads.map(play, range(len(parts))))
    return models, passed


@pytest.mark.parametrize(
    "parts", [([0, 1, 2], [3, 4, 5]), ([5, 0], [2, 1, 3, 4]), (range(6), [])], ids=["halves", "mixed", "one"]
)
def test_all_move_alike_by_the_sum_over_all(model, make_batch, privacy, parts):
    quiet = replace(privacy, noise_multiplier=1e-5)
    (lead, follower), passed = step_together(model, make_batch, quiet, [list(part) for part in parts])
    assert torch.equal(values_of(lead), values_of(follower))
    assert passed[0] == passed[1]
    (alone,), _ = step_together(model, make_batch, quiet, [list(range(NUM_RECORDS))])
    torch.testing.assert_close(values_of(lead), values_of(alone), rtol=1e-4, atol=1e-4)


def test_there_is_the_noise_of_one(model, make_batch, privacy):
    before = values_of(model)
    (lead, follower), _ = step_together(model, make_batch, privacy, [[0, 1, 2], [3, 4, 5]])
    assert torch.equal(values_of(lead), values_of(follower))
    std = privacy.noise_multiplier * privacy.l2_clip_norm
    (quiet, _), _ = step_together(model, make_batch, replace(privacy, noise_multiplier=1e-5), [[0, 1, 2], [3, 4, 5]])
    noise = values_of(lead) - values_of(quiet)
    assert float(noise.std()) == pytest.approx(std, rel=5 / (2 * len(noise)) ** 0.5)
    assert not torch.equal(values_of(lead), before)


@pytest.mark.parametrize(
    ("parts", "guard"),
    [
        (([0, 1, 2], [3, 4]), "no_record_lost"),
        (([0, 1, 2, 3], [3, 4, 5]), "no_record_lost"),
        (([0, 1, 2], [2, 3, 4]), "poisson_batches_used"),
    ],
    ids=["one-is-lost", "one-is-in-two", "one-is-in-two-and-one-is-lost"],
)
def test_every_process_notices_a_share_that_is_not_one(model, make_batch, privacy, parts, guard):
    with pytest.raises(GuardTripped, match=guard):
        step_together(model, make_batch, privacy, parts)


def test_a_record_that_was_not_drawn_is_noticed_by_all(model, make_batch, privacy):
    batch = make_batch(NUM_RECORDS)
    table, barrier = [None], Barrier(1)
    workers = Together(0, [[0]], table, barrier)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with private_step(model, sgd, privacy=privacy, expected_batch_size=1.0, workers=workers) as step:
        step.accumulate(losses_of(step.model, batch, np.array([4])), np.array([4]))
        with pytest.raises(GuardTripped, match="poisson_batches_used"):
            step.apply(Draw(0, np.array([5]), np.array([5])))
