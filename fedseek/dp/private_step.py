r"""One step of DP-SGD on any model: per-record gradients, clipped, added up, noised once, applied.

    losses (B,) --backward--> gradients (B, ...) --clip each to C--> sum --> + N(0, (sigma C)^2) --> / (q units) --> move
          \____________ for each micro-batch _________________/              \__________ once a step _____________/

Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1, with Opacus (hooks mode) for per-record gradients and clipping, and
our own noise. What a record is, and how its loss is computed, the caller knows; this module sees a vector of losses.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.gsm_base import OPACUS_PARAM_MONKEYPATCH_ATTRS
from opacus.optimizers import DPOptimizer
from torch import nn

from fedseek.dp import guards
from fedseek.dp.accounting import PrivacyParams
from fedseek.dp.noise import SecretGaussian, draws_under_equal_seeds
from fedseek.dp.sampling import Draw
from fedseek.dp.workers import Workers

_NOISE_CHECK_SIZE = 4096
_LEFT_ON_TENSORS = (*OPACUS_PARAM_MONKEYPATCH_ATTRS, "summed_grad")
_LEFT_ON_MODULES = ("activations", "max_batch_len")
_HALF_DONE = "_current_grad_sample"  # of Opacus, on a tensor whose gradients are still being added up


class SecretNoiseOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus is untyped
    """Opacus' optimiser with noise that no seed reaches, micro-batches of any number, and steps without records.

    Args:
        optimizer: what is to be moved, and how.
        noise_multiplier: standard deviation of the noise divided by ``l2_clip_norm``.
        l2_clip_norm: bound on each record's gradient over all tensors.
        expected_batch_size: the sum is divided by this, never by the number of records that were drawn.
        workers: the processes that take each step together; None for this one alone.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        l2_clip_norm: float,
        expected_batch_size: float,
        workers: Workers | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=l2_clip_norm,
            expected_batch_size=expected_batch_size,
        )
        self._noise = SecretGaussian()
        self._workers = workers
        self.num_accumulated = 0
        self.num_noised_steps = 0
        self.noise_squares: list[float] = []

    def clip_and_accumulate(self) -> None:
        """Add the clipped per-record gradients of one micro-batch to the sum: to all tensors of it, or, raising, to none."""
        with ExitStack() as undo:
            earlier = [tensor.summed_grad for tensor in self.params]
            undo.callback(self._set_sums, earlier)
            self._set_sums([None] * len(earlier))
            super().clip_and_accumulate()
            undo.pop_all()
        for tensor, before in zip(self.params, earlier, strict=True):
            if before is not None:
                tensor.summed_grad += before
        self.num_accumulated = len(self.grad_samples[0]) + (self.num_accumulated if earlier[0] is not None else 0)

    def add_up(self) -> None:
        """Make the sum that of all processes, whose records are in the step; before it is looked at and noised."""
        self._fill_sums()
        if self._workers is not None:
            self._workers.add([tensor.summed_grad for tensor in self.params])

    def add_noise(self) -> None:
        """Set each gradient to the clipped sum plus noise; an empty Poisson batch is noise alone."""
        std = self.noise_multiplier * self.max_grad_norm
        self._fill_sums()
        if self._workers is None or self._workers.leads:
            noises = self._noise.normals([tensor.shape for tensor in self.params], std)
            for tensor, noise in zip(self.params, noises, strict=True):
                tensor.grad = tensor.summed_grad + noise.to(tensor.device, tensor.dtype)
        else:
            for tensor in self.params:
                tensor.grad = torch.full_like(tensor, torch.nan)  # nothing that could be used, until it is the lead's
        if self._workers is not None:
            self._workers.follow([tensor.grad for tensor in self.params])
        squares = [(tensor.grad - tensor.summed_grad).square().sum() for tensor in self.params]
        self.noise_squares = torch.stack(squares).tolist()

    def scale_grad(self) -> None:
        """Divide by the expected batch size."""
        for tensor in self.params:
            tensor.grad /= self.expected_batch_size

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Noise what was accumulated, and apply it. Takes no closure: it would compute gradients past the clipping."""
        if closure is not None:
            raise ValueError("a closure was given, wanted none: its gradients would not be clipped")
        self.add_noise()
        self.scale_grad()
        self.original_optimizer.step()
        self.num_noised_steps += 1

    def summed_norm(self) -> float:
        """Norm of the clipped sum over all tensors; 0 when nothing was accumulated."""
        sums = [tensor.summed_grad for tensor in self.params if tensor.summed_grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([s.norm() for s in sums]))) if sums else 0.0

    def _fill_sums(self) -> None:
        self._set_sums([torch.zeros_like(p) if p.summed_grad is None else p.summed_grad for p in self.params])

    def _set_sums(self, sums: Sequence[torch.Tensor | None]) -> None:
        for tensor, total in zip(self.params, sums, strict=True):
            tensor.summed_grad = total

    @property
    def noise_is_secret(self) -> bool:
        """Whether the noise comes from a cryptographic generator under a key of the operating system."""
        return self._noise.is_secret

    def probe_noise(self) -> str:
        """Check that the noise of this optimiser is out of reach of every global seed.

        Raises:
            GuardTripped: it is not.
        """
        draws = draws_under_equal_seeds(self._noise, type(self._noise)(), size=_NOISE_CHECK_SIZE)
        return guards.check_noise_not_seeded(draws)


class PrivateStep:
    """The private way to take a step: micro-batches are accumulated, then applied; guards watch each of them.

    Args:
        model: wrapped for per-record gradients.
        optimizer: holds the trainable tensors of the model.
        privacy: from the plan.
        workers: the processes that take each step together; None for this one alone.
    """

    def __init__(
        self,
        model: GradSampleModule,
        optimizer: SecretNoiseOptimizer,
        privacy: PrivacyParams,
        workers: Workers | None = None,
    ) -> None:
        self.model = model
        self._optimizer = optimizer
        self._privacy = privacy
        self._workers = workers
        self._steps_before = 0
        # Not optimizer.params: that list leaves a tensor out as soon as it is frozen.
        self._held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        self._trained_on: list[NDArray[np.int64]] = []
        self._before = {name: tensor.detach().clone() for name, tensor in self._trainable().items()}
        self.passed = {optimizer.probe_noise()}

    @property
    def is_secret(self) -> bool:
        """Whether the noise comes from a cryptographic generator under a key of the operating system."""
        return self._optimizer.noise_is_secret

    @property
    def num_steps(self) -> int:
        """Steps of the round in which noise was added and applied."""
        return self._steps_before + int(self._optimizer.num_noised_steps)

    def resume(self, num_steps: int, passed: Iterable[str]) -> None:
        """Go on in a round whose first steps another process took; these guards held in it."""
        self._steps_before = num_steps
        self.passed |= set(passed)

    def accumulate(self, losses: torch.Tensor, record_indices: NDArray[np.int64]) -> None:
        """Clip the gradient of each record of a micro-batch and add it to the step; of all of them, or, raising, of none.

        Args:
            losses: shape (num_records,), one loss for each record, of that record alone.
            record_indices: shape (num_records,), which records they are.

        Raises:
            GuardTripped: a trainable tensor has no gradient for each record.
        """
        self._backward(losses)
        self._optimizer.clip_and_accumulate()
        self._clear_gradients()
        self._trained_on.append(record_indices)

    def apply(self, draw: Draw) -> None:
        """Check that the step holds exactly the draw, clipped; add noise once; move the tensors.

        Raises:
            GuardTripped: the step is not what the accountant counts.
        """
        trained_on, num_accumulated = self._trained_on_by_all(draw)
        self._optimizer.add_up()
        self.passed |= {
            guards.check_no_record_lost(num_accumulated, len(draw.record_indices)),
            guards.check_poisson_batches_used(trained_on, draw.record_indices, draw.unit_indices),
            guards.check_clipping_applied(
                self._optimizer.summed_norm(), num_accumulated, l2_clip_norm=self._privacy.l2_clip_norm
            ),
        }
        self._optimizer.step()
        self._check_noise()
        self._optimizer.zero_grad(set_to_none=True)
        self._trained_on.clear()

    def forget(self) -> None:
        """Free what a micro-batch left behind that came to nothing; the sum so far stays."""
        self._clear_gradients()
        for tensor in self._held:
            _remove(tensor, (_HALF_DONE,))
            tensor._forward_counter = 0
        for module in self.model.modules():
            _remove(module, _LEFT_ON_MODULES)

    def probe(self, losses_of: Callable[[NDArray[np.int64]], torch.Tensor], record_indices: NDArray[np.int64]) -> None:
        """Check on a few records, before a step, that they are not coupled and that each is clipped.

        Args:
            losses_of: losses of some records taken as one batch, shape (num_records,).
            record_indices: the records to look at.

        Raises:
            GuardTripped: a gradient changes with the neighbours, or one record's share of the sum is over the clip norm.
        """

        def gradients_of(indices: NDArray[np.int64]) -> torch.Tensor:
            with ExitStack() as last:
                last.callback(self._optimizer.zero_grad, set_to_none=True)  # nothing of it may get into a step
                self._backward(losses_of(indices))
                gradients = torch.cat([g.flatten(1).detach() for g in self._optimizer.grad_samples], dim=1)
                self._optimizer.clip_and_accumulate()
                guards.check_clipping_applied(self._optimizer.summed_norm(), len(indices), l2_clip_norm=clip)
                return gradients

        clip = self._privacy.l2_clip_norm
        with _dropout_off(self.model):
            self.passed.add(guards.check_records_uncoupled(gradients_of, record_indices, l2_clip_norm=clip))

    def finish(self) -> None:
        """Check that the round moved every tensor that was trainable at its start.

        Raises:
            GuardTripped: one stayed, disappeared or is not finite.
        """
        self.passed.add(guards.check_tensors_moved(self._before, self._trainable()))

    def _check_noise(self) -> None:
        """Noise was added to each tensor that moved, and to all of them together as much as the plan wants."""
        std = self._privacy.noise_multiplier * self._privacy.l2_clip_norm
        squares, sizes = self._optimizer.noise_squares, [tensor.numel() for tensor in self._optimizer.params]
        for of_tensor, size in [*zip(squares, sizes, strict=True), (sum(squares), sum(sizes))]:
            self.passed.add(guards.check_noise_added(of_tensor, size, std=std))

    def _trained_on_by_all(self, draw: Draw) -> tuple[NDArray[np.int64], int]:
        """Records in the step, as often as they are in it, and the number of gradients in it; over all processes."""
        mine = np.concatenate([np.empty(0, dtype=np.int64), *self._trained_on])
        num_accumulated = self._optimizer.num_accumulated if self._trained_on else 0
        if self._workers is None:
            return mine, num_accumulated
        often = Counter(mine.tolist())
        times = [often.pop(record, 0) for record in draw.record_indices.tolist()]
        counts = torch.tensor([*times, often.total(), num_accumulated], device=self._held[0].device)
        self._workers.add([counts])
        *times, strangers, num_accumulated = counts.tolist()
        return np.append(np.repeat(draw.record_indices, times), np.full(strangers, -1)), num_accumulated

    def _trainable(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    def _backward(self, losses: torch.Tensor) -> None:
        if losses.dim() != 1:
            raise ValueError(f"losses have shape {tuple(losses.shape)}, wanted (num_records,): one for each record")
        guards.check_something_to_train(losses.requires_grad)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        self.passed.add(guards.check_per_record_gradients(self._trainable(), self._held, num_records=len(losses)))

    def _clear_gradients(self) -> None:
        """Free the per-record gradients and the un-noised sum that autograd left; keep the clipped sum."""
        for tensor in self._optimizer.params:
            tensor.grad_sample = None
            tensor.grad = None


@contextmanager
def private_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    privacy: PrivacyParams,
    expected_batch_size: float,
    workers: Workers | None = None,
) -> Iterator[PrivateStep]:
    """Wrap a model for private steps; unwrap it without a trace, whatever happens.

    Args:
        model: in training mode, its trainable tensors already chosen and on their device.
        optimizer: holds exactly these tensors.
        privacy: from the plan.
        expected_batch_size: sampling probability times number of units.
        workers: the processes that take each step together; None for this one alone.
    """
    # "sum": the loss that is differentiated is a sum over records, so no factor of the batch size is to be undone.
    wrapped = GradSampleModule(model, loss_reduction="sum")
    try:
        noised = SecretNoiseOptimizer(
            optimizer,
            noise_multiplier=privacy.noise_multiplier,
            l2_clip_norm=privacy.l2_clip_norm,
            expected_batch_size=expected_batch_size,
            workers=workers,
        )
        with warnings.catch_warnings():
            # Frozen layers below the first adapter: its inputs require no gradient, which is as it should be.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield PrivateStep(wrapped, noised, privacy, workers)
    finally:
        _unwrap(wrapped, model)


def _unwrap(wrapped: GradSampleModule, model: nn.Module) -> None:
    wrapped.remove_hooks()
    for tensor in model.parameters():
        tensor.grad = None
        _remove(tensor, _LEFT_ON_TENSORS)
    for module in model.modules():
        _remove(module, _LEFT_ON_MODULES)


def _remove(holder: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if name in vars(holder):
            delattr(holder, name)


@contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    """Training mode without dropout: evaluation mode would switch the per-record gradients off too."""
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    rates = [module.p for module in dropouts]
    for module in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, rate in zip(dropouts, rates, strict=True):
            module.p = rate
