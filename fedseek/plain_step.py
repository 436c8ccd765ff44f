"""One step without privacy: the gradient of the same sum, neither clipped record by record nor noised."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fedseek.batches import Indices
from fedseek.dp.sampling import Draw
from fedseek.dp.workers import Workers


class PlainStep:
    """What `fedseek.dp.private_step.PrivateStep` is for a private round.

    Args:
        model: as it is.
        optimizer: holds what is trained.
        expected_batch_size: the sum is divided by this.
        max_gradient_norm: the gradient of a step is scaled down to this norm over all tensors; None leaves it.
        workers: the processes that take each step together; None for this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        expected_batch_size: float,
        max_gradient_norm: float | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.model = model
        self._optimizer = optimizer
        self._expected_batch_size = expected_batch_size
        self._max_gradient_norm = max_gradient_norm
        self._workers = workers
        self._held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        self._sums: list[torch.Tensor | None] = [None] * len(self._held)
        self.passed: set[str] = set()
        self.num_steps = 0

    def resume(self, num_steps: int, passed: Iterable[str]) -> None:
        """Go on in a round whose first steps another process took; these guards held in it."""
        self.num_steps, self.passed = num_steps, set(passed)

    def accumulate(self, losses: torch.Tensor, record_indices: Indices) -> None:
        """Add the gradients of a micro-batch to the step: all of them, or, raising, none."""
        (losses.sum() / self._expected_batch_size).backward()  # type: ignore[no-untyped-call]
        self._sums = [_added(total, tensor.grad) for total, tensor in zip(self._sums, self._held, strict=True)]
        self.forget()

    def forget(self) -> None:
        """Free what a micro-batch left behind that came to nothing; the sum so far stays."""
        for tensor in self._held:
            tensor.grad = None

    def apply(self, draw: Draw) -> None:
        """Move the tensors; nothing moves if nothing was drawn."""
        if self._workers is not None and len(draw.record_indices):
            pairs = zip(self._sums, self._held, strict=True)
            sums = [torch.zeros_like(tensor) if total is None else total for total, tensor in pairs]
            self._workers.add(sums)
            self._sums = [*sums]
        for tensor, total in zip(self._held, self._sums, strict=True):
            tensor.grad = total
        if self._max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self._held, self._max_gradient_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._sums = [None] * len(self._held)
        self.num_steps += 1


def _added(total: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total.add_(gradient)
