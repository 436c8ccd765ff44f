"""For each guard, the broken thing it exists for, built for real."""

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import nn
from torch.utils.data import DataLoader
from transformers import Qwen2Config, Qwen2ForCausalLM

from fedseek.dp import guards
from fedseek.dp.noise import SecretGaussian, draws_under_equal_seeds
from fedseek.dp.private_step import PrivateStep, SecretNoiseOptimizer, private_step
from fedseek.dp.randomness import secret_generator
from fedseek.dp.sampling import Draw, PoissonUnitSampler
from fedseek.errors import GuardTripped

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:.*is_gradient_checkpointing")


def tripped(guard):
    return pytest.raises(GuardTripped, match=guard)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sgd_of(model, lr=0.1):
    return torch.optim.SGD(trainable(model).values(), lr=lr)


def losses_of(model, batch, rows=slice(None)):
    ids, mask, labels = (part[rows] for part in batch)
    return nn.functional.cross_entropy(model(ids, mask), labels, reduction="none")


def draw_of(num_records):
    return Draw(0, np.arange(num_records), np.arange(num_records))


def noised(model, privacy, **changed):
    numbers = {
        "noise_multiplier": privacy.noise_multiplier,
        "l2_clip_norm": privacy.l2_clip_norm,
        "expected_batch_size": 4.0,
    }
    return SecretNoiseOptimizer(sgd_of(model), **(numbers | changed))


def open_step(model, privacy, lr=0.1):
    return private_step(model, sgd_of(model, lr), privacy=privacy, expected_batch_size=4.0)


# 1 clipping


def test_ghost_mode_with_a_plain_backward_is_not_clipped(model, make_batch, privacy):
    ghost = GradSampleModuleFastGradientClipping(model, max_grad_norm=0.1, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        sgd_of(model), noise_multiplier=1.0, max_grad_norm=0.1, expected_batch_size=4
    )
    losses_of(ghost, make_batch(4)).sum().backward()
    optimizer.accumulate()
    norm = float(torch.cat([p.summed_grad.flatten() for p in optimizer.params]).norm())
    with tripped("clipping_applied"):
        guards.check_clipping_applied(norm, 4, l2_clip_norm=0.1)


def test_ghost_mode_is_refused_by_the_step(model, make_batch, privacy):
    ghost = GradSampleModuleFastGradientClipping(model, max_grad_norm=0.1, use_ghost_clipping=True)
    step = PrivateStep(ghost, noised(model, privacy), privacy)
    with tripped("every_tensor_trained"):
        step.accumulate(losses_of(ghost, make_batch(4)), np.arange(4))


def test_a_clip_norm_above_the_plans_trips(model, make_batch, privacy):
    wrapped = GradSampleModule(model, loss_reduction="sum")
    step = PrivateStep(wrapped, noised(model, privacy, l2_clip_norm=100.0), privacy)
    step.accumulate(losses_of(wrapped, make_batch(4)), np.arange(4))
    with tripped("clipping_applied"):
        step.apply(draw_of(4))


def test_one_unclipped_record_trips_the_probe(model, make_batch, privacy):
    wrapped = GradSampleModule(model, loss_reduction="sum")
    step = PrivateStep(wrapped, noised(model, privacy, l2_clip_norm=100.0), privacy)
    with tripped("clipping_applied"):
        step.probe(lambda rows: losses_of(wrapped, make_batch(4), rows), np.arange(1))


def test_a_gradient_that_is_not_a_number_trips():
    with tripped("clipping_applied"):
        guards.check_clipping_applied(float("nan"), 4, l2_clip_norm=1.0)


# 2 coupling


def causal_model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).train()
    for name, p in model.named_parameters():
        p.requires_grad_("lm_head" in name or "q_proj.weight" in name)
    return GradSampleModule(model, loss_reduction="sum")


def causal_batch():
    ids = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(12) < torch.tensor([12, 9, 5, 3])[:, None]).long()
    return ids, mask, ids.masked_fill(mask == 0, -100)


def per_record_gradients(model, loss):
    loss.backward()
    tensors = trainable(model).values()
    gradients = torch.cat([p.grad_sample.flatten(1) for p in tensors], dim=1)
    for p in tensors:
        p.grad_sample = p.grad = None
    return gradients


def test_a_mean_over_the_tokens_of_a_batch_couples_records():
    model, (ids, mask, labels) = causal_model(), causal_batch()

    def gradients_of(rows):
        return per_record_gradients(
            model, model(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
        )

    with tripped("records_uncoupled"):
        guards.check_records_uncoupled(gradients_of, np.arange(4), l2_clip_norm=1.0)


def test_a_mean_over_the_tokens_of_each_record_does_not():
    model, (ids, mask, labels) = causal_model(), causal_batch()

    def gradients_of(rows):
        logits = model(input_ids=ids[rows], attention_mask=mask[rows]).logits[:, :-1]
        tokens = nn.functional.cross_entropy(logits.transpose(1, 2), labels[rows][:, 1:], reduction="none")
        return per_record_gradients(model, (tokens.sum(1) / (labels[rows][:, 1:] >= 0).sum(1)).sum())

    passed = guards.check_records_uncoupled(gradients_of, np.arange(4), l2_clip_norm=1.0)
    assert passed == "records_uncoupled"


# 3 lost records


def test_a_micro_batch_cleared_before_the_step_is_missed(model, make_batch, privacy):
    wrapped = GradSampleModule(model, loss_reduction="sum")
    optimizer = noised(model, privacy)
    step = PrivateStep(wrapped, optimizer, privacy)
    batch = make_batch(6)
    step.accumulate(losses_of(wrapped, batch, slice(0, 4)), np.arange(4))
    optimizer.zero_grad(set_to_none=True)
    step.accumulate(losses_of(wrapped, batch, slice(4, 6)), np.arange(4, 6))
    with tripped("no_record_lost"):
        step.apply(draw_of(6))


def test_a_micro_batch_taken_twice_is_noticed(model, make_batch, privacy):
    with open_step(model, privacy) as step:
        for _ in range(2):
            step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4))
        with tripped("no_record_lost"):
            step.apply(draw_of(4))


# 4 noise


class TorchNoise:
    """What Opacus does by default: torch's global generator, which anyone can seed."""

    def normal(self, shape, std):
        return torch.randn(shape, dtype=torch.float64) * std


class PlanNoise:
    """A generator of its own, but seeded from the plan: every site has the same noise."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(2024)

    def normal(self, shape, std):
        return torch.randn(shape, dtype=torch.float64, generator=self._generator) * std


@pytest.mark.parametrize("source", [TorchNoise, PlanNoise])
def test_noise_that_a_seed_repeats_trips(source):
    with tripped("noise_not_seeded_by_plan"):
        guards.check_noise_not_seeded(draws_under_equal_seeds(source(), source(), size=1000))


def test_noise_that_cancels_trips():
    noise = SecretGaussian().normal(torch.Size([1000]), 1.0).numpy()
    with tripped("noise_not_seeded_by_plan"):
        guards.check_noise_not_seeded([noise, -noise])


def test_secret_noise_passes():
    draws = draws_under_equal_seeds(SecretGaussian(), SecretGaussian(), size=1000)
    assert guards.check_noise_not_seeded(draws) == "noise_not_seeded_by_plan"


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.5])
def test_less_noise_than_the_plans_trips(model, make_batch, privacy, noise_multiplier):
    wrapped = GradSampleModule(model, loss_reduction="sum")
    step = PrivateStep(wrapped, noised(model, privacy, noise_multiplier=noise_multiplier), privacy)
    step.accumulate(losses_of(wrapped, make_batch(4)), np.arange(4))
    with tripped("noise_added"):
        step.apply(draw_of(4))


def test_one_tensor_without_noise_trips_though_it_is_small(model, make_batch, privacy):
    class Forgetful(SecretGaussian):
        """Leaves out the smallest tensor, as a parameter group that was forgotten would be."""

        def normals(self, shapes, std):
            drawn = super().normals(shapes, std)
            return [noise * (noise.shape != model.head.bias.shape) for noise in drawn]

    optimizer = noised(model, privacy)
    optimizer._noise = Forgetful()
    wrapped = GradSampleModule(model, loss_reduction="sum")
    step = PrivateStep(wrapped, optimizer, privacy)
    step.accumulate(losses_of(wrapped, make_batch(4)), np.arange(4))
    with tripped("noise_added"):
        step.apply(draw_of(4))


# 9 cryptographic randomness


class PhiloxNoise(SecretGaussian):
    """Seeded by the operating system, so no seed repeats it; but a statistical generator."""

    def __init__(self):
        self._generators = (np.random.default_rng(),)


def test_noise_of_a_statistical_generator_is_told_from_ours(model, privacy):
    optimizer = noised(model, privacy)
    assert optimizer.noise_is_secret
    optimizer._noise = PhiloxNoise()
    assert not optimizer.noise_is_secret
    assert optimizer.probe_noise() == "noise_not_seeded_by_plan", "which is why there is a guard of its own"


@pytest.mark.parametrize("statistical", ["noise", "draws"])
def test_randomness_of_a_statistical_generator_trips(statistical):
    with tripped(f"cryptographic_randomness.*{statistical}"):
        guards.check_cryptographic_randomness({"noise": True, "draws": True, statistical: False})


def test_randomness_that_nobody_looked_at_trips():
    with tripped("cryptographic_randomness"):
        guards.check_cryptographic_randomness({})


# 5 sampling probability


def test_a_probability_from_the_length_of_a_loader_trips():
    loader = DataLoader(range(10), batch_size=4, drop_last=True)
    sampler = PoissonUnitSampler(np.arange(10), 1 / len(loader), generator=secret_generator())
    with tripped("sampling_from_plan"):
        guards.check_sampling_from_plan(sampler.sampling_probability, planned=0.4, num_drawn=4, num_chances=10)


def test_a_sampler_that_draws_more_than_it_says_trips():
    sampler = PoissonUnitSampler(np.arange(400), 0.5, generator=secret_generator())
    num_drawn = sum(len(sampler.draw(step).record_indices) for step in range(30))
    with tripped("sampling_from_plan"):
        guards.check_sampling_from_plan(0.4, planned=0.4, num_drawn=num_drawn, num_chances=400 * 30)


@pytest.mark.parametrize(("probability", "num_units"), [(0.01, 20), (0.4, 400), (1.0, 30)])
def test_an_honest_sampler_passes(probability, num_units):
    sampler = PoissonUnitSampler(np.arange(num_units), probability, generator=secret_generator())
    num_drawn = sum(len(sampler.draw(step).record_indices) for step in range(30))
    guards.check_sampling_from_plan(probability, planned=probability, num_drawn=num_drawn, num_chances=num_units * 30)


class Shuffled(PoissonUnitSampler):
    """Each unit once an epoch, in batches of the size that Poisson sampling has on average: the usual loader."""

    def draw(self, step):
        size = round(self.expected_batch_size)
        if not len(getattr(self, "left", ())) >= size:
            self.left = self._generator.permutation(self.num_units)
        chosen, self.left = np.sort(self.left[:size]), self.left[size:]
        return Draw(step, chosen, chosen)


class OfOneSize(PoissonUnitSampler):
    """As many units as Poisson sampling has on average, without replacement; each step anew."""

    def draw(self, step):
        chosen = np.sort(self._generator.choice(self.num_units, round(self.expected_batch_size), replace=False))
        return Draw(step, chosen, chosen)


class Repeated(PoissonUnitSampler):
    """A generator that starts again with each step."""

    def draw(self, step):
        self._generator = np.random.default_rng(7)
        return super().draw(step)


def trial(sampler):
    draws = [sampler.draw(step).unit_indices for step in range(guards.NUM_TRIAL_DRAWS)]
    return guards.check_draws_independent(draws, num_units=sampler.num_units, planned=sampler.sampling_probability)


@pytest.mark.parametrize(("num_units", "probability"), [(1000, 0.05), (100, 0.1), (13, 0.5), (2500, 0.02)])
@pytest.mark.parametrize("swapped", [Shuffled, OfOneSize, Repeated], ids=lambda sampler: sampler.__name__)
def test_a_swapped_sampler_trips(swapped, num_units, probability):
    with tripped("draws_independent"):
        trial(swapped(np.arange(num_units), probability, generator=secret_generator()))


def test_batches_of_one_size_pass_the_guard_on_their_number():
    sampler = OfOneSize(np.arange(1000), 0.05, generator=secret_generator())
    num_drawn = sum(len(sampler.draw(step).record_indices) for step in range(30))
    guards.check_sampling_from_plan(0.05, planned=0.05, num_drawn=num_drawn, num_chances=30_000)


@pytest.mark.parametrize(
    ("num_units", "probability"), [(1, 0.5), (1, 1.0), (3, 1e-6), (20, 0.1), (1000, 0.05), (1000, 1.0), (5000, 0.9)]
)
def test_coins_pass(num_units, probability):
    for _ in range(5):
        assert trial(PoissonUnitSampler(np.arange(num_units), probability, generator=secret_generator()))


# 6 every tensor


@pytest.fixture
def moving_makes_new_tensors():
    """As on some devices: the model has other tensors after it has moved, and the optimiser keeps the old ones."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.usefixtures("moving_makes_new_tensors")
def test_a_model_moved_after_its_optimiser_was_made_trips(model, make_batch, privacy):
    stale = sgd_of(model)
    model.encoder.to(torch.float64)
    with private_step(model, stale, privacy=privacy, expected_batch_size=4.0) as step, tripped("every_tensor_trained"):
        step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4))


@pytest.mark.usefixtures("moving_makes_new_tensors")
def test_a_model_moved_after_wrapping_trips_where_no_gradient_shows_it(model, make_batch, privacy):
    with open_step(model, privacy) as step:
        model.to(torch.float64)
        with pytest.raises(AttributeError):  # Opacus' own hooks stumble over the new tensors
            losses_of(step.model, make_batch(4))
        step.apply(draw_of(0))
        with tripped(r"every_tensor_trained.*did not move"):
            step.finish()


def test_a_tensor_swapped_after_wrapping_trips(model, make_batch, privacy):
    with open_step(model, privacy) as step:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        model.head.weight.grad_sample, model.head.weight._forward_counter = None, 0
        with tripped("every_tensor_trained"):
            step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4))


def test_a_tensor_frozen_after_wrapping_trips(model, make_batch, privacy):
    with open_step(model, privacy) as step:
        model.head.bias.requires_grad_(False)
        with tripped("every_tensor_trained"):
            step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4))


def test_a_tensor_frozen_before_a_step_without_records_trips(model, privacy):
    with open_step(model, privacy) as step:
        model.head.bias.requires_grad_(False)
        step.apply(draw_of(0))
        with tripped("every_tensor_trained"):
            step.finish()


def test_an_optimiser_of_other_tensors_trips(model, make_batch, privacy):
    stale = torch.optim.SGD([nn.Parameter(p.detach().clone()) for p in trainable(model).values()], lr=0.1)
    with private_step(model, stale, privacy=privacy, expected_batch_size=4.0) as step, tripped("every_tensor_trained"):
        step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4))


def test_a_tensor_the_forward_pass_leaves_out_trips(model, make_batch, privacy):
    model.unused = nn.Linear(3, 3)
    with open_step(model, privacy) as step, tripped(r"every_tensor_trained.*unused"):
        step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4))


def test_a_model_in_evaluation_mode_does_not_train(model, make_batch, privacy):
    model.eval()
    with open_step(model, privacy) as step, pytest.raises(ValueError, match="No activations"):
        step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4))


def test_a_round_that_moves_nothing_trips(model, make_batch, privacy):
    with open_step(model, privacy, lr=0.0) as step:
        step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4))
        step.apply(draw_of(4))
        with tripped(r"every_tensor_trained.*did not move"):
            step.finish()


def test_a_tensor_that_left_the_finite_numbers_trips(model, privacy):
    with open_step(model, privacy) as step:
        step.apply(draw_of(0))
        with torch.no_grad():
            model.head.bias[0] = torch.inf
        with tripped(r"every_tensor_trained.*finite"):
            step.finish()


def test_a_model_with_nothing_to_train_trips():
    with tripped("every_tensor_trained"):
        guards.check_tensors_moved({}, {})


# 7 batches


def test_training_on_a_shuffled_loader_trips(model, make_batch, privacy):
    batch = make_batch(20)
    sampler = PoissonUnitSampler(np.arange(20), 0.5, generator=secret_generator())
    loader = DataLoader(range(20), batch_size=4, shuffle=True)
    with open_step(model, privacy) as step, tripped("poisson_batches_used|no_record_lost"):
        for number, rows in enumerate(loader):
            step.accumulate(losses_of(step.model, batch, rows), rows.numpy())
            step.apply(sampler.draw(number))


def test_as_many_records_but_others_trips(model, make_batch, privacy):
    with open_step(model, privacy) as step:
        step.accumulate(losses_of(step.model, make_batch(4)), np.arange(4) + 1)
        with tripped("poisson_batches_used"):
            step.apply(draw_of(4))


def test_two_records_of_one_customer_trip():
    with tripped("poisson_batches_used"):
        guards.check_poisson_batches_used(np.array([5, 6]), np.array([5, 6]), np.array([9, 9]))


# 8 composition


def test_a_fresh_accountant_each_round_trips():
    with tripped("composition_over_run"):
        guards.check_composition_over_run(accounted_steps=10, steps_taken=20)


# 10 metrics


@pytest.mark.parametrize("name", ["train_loss", "loss", "accuracy", "gradient_norm", "Held_back_accuracy"])
def test_a_metric_of_training_rows_trips(name):
    with tripped(rf"no_unnoised_metrics.*{name}"):
        guards.check_metrics(["held_back_accuracy", name], True)


def test_metrics_of_held_back_rows_pass():
    assert guards.check_metrics(["held_back_accuracy", "held_back_auc"], True) == "no_unnoised_metrics"
    assert guards.check_metrics([], True) == "no_unnoised_metrics"


def test_without_privacy_any_metric_may_be_sent():
    guards.check_metrics(["train_loss"], False)


# the list


@pytest.mark.parametrize("left_out", guards.TRAINING_GUARDS)
def test_a_guard_that_was_left_out_trips(left_out):
    with tripped(left_out):
        guards.check_all_passed(set(guards.TRAINING_GUARDS) - {left_out})


def test_the_page_of_guards_lists_each_of_them():
    for name in (*guards.TRAINING_GUARDS, guards.NO_UNNOISED_METRICS):
        assert name in guards.__doc__
