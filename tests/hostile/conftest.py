"""For the tests with hostile parties: a small cohort of real sites around the real coordinator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of this size only get slower when they are shared out."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def begin(make_cohort: Callable[..., Any]) -> Callable[..., Any]:
    """A cohort that trains one step a round; takes what ``make_cohort`` takes."""
    return lambda rounds=2, **changes: make_cohort(training={"rounds": rounds, "steps_per_round": 1}, **changes)
