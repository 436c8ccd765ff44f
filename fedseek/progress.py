"""How far a round of training has come, so that a process that is killed in it loses minutes and not the round.

What is taken up again is the round that the privacy ledger has paid for: the steps that were done stay done, and those
that were lost are done once more. Of the randomness, the place in the stream that draws records is taken up, so that a
lost step sees the same records again (why: `fedseek.dp.randomness.SecretBits.place`). The noise is not: a step done
again gets fresh noise. The lost step was seen by nobody, so what leaves the site holds each step once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedseek.errors import Malformed

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Progress:
    """A round of training between two of its steps. All of it is secret but the number of steps: kept sealed, or not at all.

    Attributes:
        step: steps taken.
        trained: values of the tensors that are trained in this round, by name.
        optimiser: what the optimiser keeps of each of them, by name and then by its own name for it.
        num_drawn: records drawn in these steps.
        loss_sum: of their losses.
        guards_passed: guards that held so far.
        draws: `fedseek.dp.randomness.place_of` the draws; empty in a seeded round, which draws again from its beginning.
    """

    step: int
    trained: Mapping[str, Float32] = field(repr=False)
    optimiser: Mapping[str, Mapping[str, Float32]] = field(repr=False)
    num_drawn: int = field(repr=False)
    loss_sum: float = field(repr=False)
    guards_passed: tuple[str, ...]
    draws: bytes = field(repr=False)


OnProgress = Callable[[int, int, Callable[[], Progress]], None]
"""Called after each step with its number, from 1, the number of steps, and a function that takes a snapshot."""


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained now, by name."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def take_values(tensors: Mapping[str, torch.Tensor]) -> dict[str, Float32]:
    """Copies in main memory; float32, which holds the values of every narrower type."""
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
        for name, tensor in tensors.items()
    }


def take_optimiser(
    tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Float32]]:
    """What the optimiser keeps of each tensor; nothing of one that it has not moved yet."""
    return {name: take_values(optimizer.state[tensor]) for name, tensor in tensors.items() if optimizer.state[tensor]}


def put_back(
    progress: Progress, tensors: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, num_steps: int
) -> None:
    """Set tensors and optimiser to where ``progress`` was.

    Raises:
        Malformed: it is of other tensors, or of a longer round; nothing was changed.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    moments = {name: {kind: value.shape for kind, value in kept.items()} for name, kept in progress.optimiser.items()}
    fits = {name: value.shape for name, value in progress.trained.items()} == shapes and moments.keys() <= shapes.keys()
    fits &= all(shape in ((), shapes[name]) for name, kept in moments.items() if fits for shape in kept.values())
    if not (fits and 0 <= progress.step <= num_steps):
        raise Malformed(
            f"progress of {len(progress.trained)} tensors after {progress.step} steps does not fit a round of "
            f"{num_steps} steps on {len(shapes)} tensors"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(progress.trained[name]))
            # Adam counts its steps in a number on the CPU; what has the tensor's shape lies where the tensor does
            optimizer.state[tensor] = {
                kind: torch.tensor(value) if value.shape == () else torch.tensor(value).to(tensor.device, tensor.dtype)
                for kind, value in progress.optimiser.get(name, {}).items()
            }
