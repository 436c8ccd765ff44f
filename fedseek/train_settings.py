"""How a round trains: what follows from the plan, equal at every site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How a round trains; equal at every site.

    Attributes:
        sampling_probability: chance of each privacy unit to be in a step.
        num_steps: steps of the round.
        learning_rate: of the adapter.
        head_learning_rate: of tensors whose name begins with ``head.``.
        physical_batch_size: records on the device at once; does not change the result. None: as many as memory takes.
        optimiser: ``adam`` (AdamW when weight decay is set) or ``sgd``.
        weight_decay: of matrices, not of biases and norms; decoupled from the gradient.
        warmup_steps: over the first so many steps of the stage the rates rise in a line.
        first_step: of this round within its stage, from 0.
        max_gradient_norm: a step's gradient is scaled down to this; only without privacy.
        label_smoothing: of the cross-entropy, in [0, 1).
    """

    sampling_probability: float
    num_steps: int
    learning_rate: float
    head_learning_rate: float
    physical_batch_size: int | None = 64
    optimiser: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    warmup_steps: int = 0
    first_step: int = 0
    max_gradient_norm: float | None = None
    label_smoothing: float = 0.0
