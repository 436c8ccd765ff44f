import itertools

import pytest
import torch
from tiny_rounds import PRIVACY, SETTINGS, changed, everyone, plain_round, private_round, tiny_model, toy_records
from torch import nn

from fedseek import train
from fedseek.errors import GuardTripped
from fedseek.optimiser import make_optimizer, set_rates

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Full backward hook")


def rates_of(settings):
    """The rates of each step of a round, adapter and head."""
    optimizer = make_optimizer(tiny_model(), settings)
    seen = []
    for step in range(settings.num_steps):
        set_rates(optimizer, settings, step)
        seen.append(tuple(sorted({group["lr"] for group in optimizer.param_groups})))
    return seen


def test_rates_rise_in_a_line_and_go_on_in_the_next_round():
    settings = changed(SETTINGS, num_steps=3, warmup_steps=5, learning_rate=0.1, head_learning_rate=1.0)
    rounds = [rates_of(changed(settings, first_step=first)) for first in (0, 3, 6)]
    shares = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]
    for seen, share in zip(itertools.chain(*rounds), shares, strict=True):
        assert seen == (pytest.approx(0.1 * share), pytest.approx(share))


def test_without_warm_up_every_step_has_the_full_rate():
    assert rates_of(changed(SETTINGS, learning_rate=0.1, head_learning_rate=0.2)) == [(0.1, 0.2)] * 4


def test_a_round_trains_at_the_rates_of_its_steps(monkeypatch):
    """Plain SGD on one and the same gradient: the way is as long as the rate is high."""
    moved = []

    def note(optimizer, settings, step):
        set_rates(optimizer, settings, step)
        moved.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(train, "set_rates", note)
    settings = changed(SETTINGS, warmup_steps=4, first_step=2, learning_rate=0.4)
    plain_round(tiny_model(), toy_records(), settings)
    private_round(tiny_model(), toy_records(), settings)
    assert moved == [pytest.approx(rate) for rate in (0.3, 0.4, 0.4, 0.4)] * 2


def settings_of(**fields):
    return changed(
        SETTINGS, sampling_probability=1e-9, num_steps=1, learning_rate=0.1, head_learning_rate=0.5, **fields
    )


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_weight_decay_shrinks_matrices_and_leaves_biases(optimiser):
    """On a gradient of zero nothing but the decay moves a tensor: decoupled, times the rate of its group."""
    model = tiny_model()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.fill_(1.0)
                tensor.grad = torch.zeros_like(tensor)
    settings = settings_of(weight_decay=0.2, optimiser=optimiser)
    make_optimizer(model, settings).step()
    wanted = {"encoder": 1 - 0.1 * 0.2, "head.weight": 1 - 0.5 * 0.2, "head.bias": 1.0}
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            value = wanted.get(name, wanted["encoder"])
            torch.testing.assert_close(tensor.detach(), torch.full_like(tensor, value))


def test_a_name_that_holds_head_somewhere_else_is_not_the_head():
    model = nn.Module()
    model.encoder, model.head = nn.ModuleDict({"head": nn.Linear(2, 2)}), nn.Linear(2, 3)
    groups = make_optimizer(model, changed(SETTINGS, learning_rate=0.1, head_learning_rate=0.5)).param_groups
    rates = {id(tensor): group["lr"] for group in groups for tensor in group["params"]}
    assert rates[id(model.encoder["head"].weight)] == 0.1
    assert rates[id(model.head.weight)] == 0.5


def test_nothing_to_train_is_refused():
    with pytest.raises(GuardTripped, match="no tensor"):
        make_optimizer(tiny_model().requires_grad_(False), SETTINGS)


def moved_in_one_step(**fields):
    settings = changed(
        SETTINGS, sampling_probability=1.0, num_steps=1, optimiser="sgd", learning_rate=1.0, head_learning_rate=1.0
    )
    model = tiny_model()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    plain_round(model, toy_records(), changed(settings, **fields))
    return torch.cat([(before[name] - tensor.detach()).flatten() for name, tensor in model.named_parameters()])


def test_the_gradient_of_a_step_is_scaled_down_to_its_bound():
    free = moved_in_one_step()
    norm = float(free.norm())
    torch.testing.assert_close(moved_in_one_step(max_gradient_norm=norm / 4), free / 4, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved_in_one_step(max_gradient_norm=norm * 2), free)


def test_a_private_round_has_no_other_bound_than_its_clip_norm():
    with pytest.raises(ValueError, match="clips the gradient of each record"):
        private_round(tiny_model(), toy_records(), changed(SETTINGS, max_gradient_norm=1.0))


def test_label_smoothing_changes_what_is_learned():
    assert not torch.equal(moved_in_one_step(), moved_in_one_step(label_smoothing=0.3))


def test_warm_up_and_decay_leave_every_guard_standing():
    settings = changed(SETTINGS, sampling_probability=1.0, warmup_steps=3, weight_decay=0.01, label_smoothing=0.1)
    private_round(tiny_model(), toy_records(), settings, everyone(PRIVACY))
