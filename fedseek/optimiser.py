"""What moves the tensors, and how fast: groups with rates of their own, weight decay, a linear warm-up.

Nothing here reads a record. Under DP-SGD all of it works on noised gradients and on weights that came of them, so it
is post-processing: it costs no privacy (Dwork and Roth 2014, proposition 2.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedseek.dp import guards
from fedseek.train_settings import TrainingSettings

_HEAD = "head."


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Groups of the tensors that are trained now: the adapter, and the head with a learning rate of its own.

    Weight decay is for matrices. Biases and norms, which have one dimension, are left out: pulled towards zero they would
    lose what they are there for and not overfit less (Loshchilov and Hutter 2019, as commonly applied).

    Raises:
        GuardTripped: no tensor requires a gradient.
    """
    trained = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    guards.check_something_to_train(bool(trained))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, tensor in trained:
        groups.setdefault((name.startswith(_HEAD), tensor.dim() > 1), []).append(tensor)
    arguments: list[dict[str, Any]] = [
        {
            "params": tensors,
            "lr": settings.head_learning_rate if of_head else settings.learning_rate,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
        }
        for (of_head, is_matrix), tensors in groups.items()
    ]
    # plain SGD adds the decay to the gradient; without momentum that is decoupled decay too
    kind = torch.optim.SGD if settings.optimiser == "sgd" else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = kind(arguments)
    for group in optimizer.param_groups:
        group["full_lr"] = group["lr"]
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, settings: TrainingSettings, step: int) -> None:
    """Set the rates of step ``step`` of the round, from 0.

    Over the first ``warmup_steps`` of the stage they rise in a line, from the first step's ``1 / warmup_steps`` of the
    full rate on: a rate of zero would waste a step that is paid for.
    """
    share = min(1.0, (settings.first_step + step + 1) / max(settings.warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * share
