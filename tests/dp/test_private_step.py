import itertools

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import nn

from fedseek.dp.private_step import SecretNoiseOptimizer, private_step
from fedseek.dp.sampling import Draw

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:.*is_gradient_checkpointing")


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def losses_of(model, batch, rows=slice(None)):
    ids, mask, labels = (part[rows] for part in batch)
    return nn.functional.cross_entropy(model(ids, mask), labels, reduction="none")


def draw_of(num_records):
    return Draw(0, np.arange(num_records), np.arange(num_records))


def clipped_sum_by_loop(model, batch, l2_clip_norm):
    """Abadi et al. 2016, algorithm 1, one record at a time by plain autograd."""
    tensors = trainable(model)
    total = {name: torch.zeros_like(p) for name, p in tensors.items()}
    norms = []
    for row in range(len(batch[0])):
        grads = torch.autograd.grad(losses_of(model, batch, slice(row, row + 1)).sum(), list(tensors.values()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
        for name, grad in zip(tensors, grads, strict=True):
            total[name] += grad / max(1.0, float(norms[-1]) / l2_clip_norm)
    return total, torch.stack(norms)


@pytest.mark.parametrize("cuts", [[0, 9], [0, 4, 8, 9], [0, 1, 2, 9]])
def test_without_noise_a_step_is_exactly_the_clipped_sum(model, make_batch, cuts):
    batch = make_batch(9)
    _, norms = clipped_sum_by_loop(model, batch, 1.0)
    clip = float(norms.median())  # some records are clipped, some are not
    expected, _ = clipped_sum_by_loop(model, batch, clip)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}

    wrapped = GradSampleModule(model, loss_reduction="sum")
    sgd = torch.optim.SGD(trainable(model).values(), lr=1.0)
    optimizer = SecretNoiseOptimizer(sgd, noise_multiplier=0.0, l2_clip_norm=clip, expected_batch_size=5.0)
    for first, last in itertools.pairwise(cuts):
        losses_of(wrapped, batch, slice(first, last)).sum().backward()
        optimizer.clip_and_accumulate()
        for p in optimizer.params:
            p.grad_sample = None
    assert optimizer.num_accumulated == 9
    optimizer.step()

    for name, p in trainable(model).items():
        torch.testing.assert_close(before[name] - p.detach(), expected[name] / 5.0, rtol=1e-4, atol=1e-6)


def test_noise_is_added_once_a_step_whatever_the_micro_batches(model, make_batch, privacy):
    batch = make_batch(6)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    expected, _ = clipped_sum_by_loop(model, batch, privacy.l2_clip_norm)
    sgd = torch.optim.SGD(trainable(model).values(), lr=1.0)
    with private_step(model, sgd, privacy=privacy, expected_batch_size=1.0) as step:
        for row in range(6):
            step.accumulate(losses_of(step.model, batch, slice(row, row + 1)), np.array([row]))
        step.apply(draw_of(6))
    noise = torch.cat([(before[n] - p.detach() - expected[n]).flatten() for n, p in trainable(model).items()])
    std = privacy.noise_multiplier * privacy.l2_clip_norm
    assert float(noise.std()) == pytest.approx(std, rel=5 / (2 * len(noise)) ** 0.5)


def test_an_empty_draw_is_a_step_of_noise_alone(model, privacy):
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    sgd = torch.optim.SGD(trainable(model).values(), lr=1.0)
    with private_step(model, sgd, privacy=privacy, expected_batch_size=2.0) as step:
        step.apply(draw_of(0))
        assert step.num_steps == 1
    moved = torch.cat([(before[n] - p.detach()).flatten() for n, p in trainable(model).items()])
    std = privacy.noise_multiplier * privacy.l2_clip_norm / 2.0
    assert float(moved.std()) == pytest.approx(std, rel=5 / (2 * len(moved)) ** 0.5)


def test_a_step_after_an_empty_one_holds_its_own_records_only(model, make_batch, privacy):
    batch = make_batch(4)
    sgd = torch.optim.SGD(trainable(model).values(), lr=0.1)
    with private_step(model, sgd, privacy=privacy, expected_batch_size=2.0) as step:
        for size in (4, 0, 2, 0):
            if size:
                step.accumulate(losses_of(step.model, batch, slice(0, size)), np.arange(size))
            step.apply(draw_of(size))
        assert step.num_steps == 4


def test_no_gradient_is_kept_between_micro_batches(model, make_batch, privacy):
    batch = make_batch(4)
    sgd = torch.optim.SGD(trainable(model).values(), lr=0.1)
    with private_step(model, sgd, privacy=privacy, expected_batch_size=4.0) as step:
        step.accumulate(losses_of(step.model, batch), np.arange(4))
        assert all(p.grad is None and p.grad_sample is None for p in trainable(model).values())
        step.apply(draw_of(4))
        assert all(p.grad is None and p.summed_grad is None for p in trainable(model).values())


def traces_of_wrapping(model):
    on_tensors = [key for p in model.parameters() for key in vars(p)]
    on_modules = [
        name for m in model.modules() for name in ("activations", "max_batch_len", "autograd_grad_sample_hooks")
        if hasattr(m, name)
    ]  # fmt: skip
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._backward_hooks.values())]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return on_tensors + on_modules + hooks + gradients


def test_nothing_of_the_wrapping_is_left_behind(model, make_batch, privacy):
    batch = make_batch(4)
    hooks_before = traces_of_wrapping(model)
    names = list(model.state_dict())
    sgd = torch.optim.SGD(trainable(model).values(), lr=0.1)
    with private_step(model, sgd, privacy=privacy, expected_batch_size=4.0) as step:
        step.accumulate(losses_of(step.model, batch), np.arange(4))
        step.apply(draw_of(4))
    assert traces_of_wrapping(model) == hooks_before == []
    assert list(model.state_dict()) == names
    losses_of(model, batch).sum().backward()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_nothing_is_left_behind_when_training_fails(model, make_batch, privacy):
    sgd = torch.optim.SGD(trainable(model).values(), lr=0.1)

    def train():
        with private_step(model, sgd, privacy=privacy, expected_batch_size=4.0) as step:
            step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4))
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        train()
    assert traces_of_wrapping(model) == []


def test_a_model_can_be_wrapped_again(model, make_batch, privacy):
    for _ in range(2):
        sgd = torch.optim.SGD(trainable(model).values(), lr=0.1)
        with private_step(model, sgd, privacy=privacy, expected_batch_size=4.0) as step:
            step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4))
            step.apply(draw_of(4))
            step.finish()


def test_a_loss_that_is_already_a_mean_is_refused(model, make_batch, privacy):
    sgd = torch.optim.SGD(trainable(model).values(), lr=0.1)
    with (
        private_step(model, sgd, privacy=privacy, expected_batch_size=4.0) as step,
        pytest.raises(ValueError, match="one for each record"),
    ):
        step.accumulate(losses_of(step.model, make_batch(4)).mean(), np.arange(4))


def test_a_closure_is_refused(model):
    sgd = torch.optim.SGD(trainable(model).values(), lr=0.1)
    optimizer = SecretNoiseOptimizer(sgd, noise_multiplier=1.0, l2_clip_norm=1.0, expected_batch_size=1.0)
    with pytest.raises(ValueError, match="would not be clipped"):
        optimizer.step(lambda: 0.0)


def test_dropout_is_back_after_a_probe(model, make_batch, privacy):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    batch = make_batch(3)
    sgd = torch.optim.SGD(trainable(model).values(), lr=0.1)
    with private_step(model, sgd, privacy=privacy, expected_batch_size=4.0) as step:
        step.probe(lambda rows: losses_of(step.model, batch, rows), np.arange(3))
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}
