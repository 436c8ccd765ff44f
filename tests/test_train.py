import math

import numpy as np
import pytest
import torch
from tiny_rounds import (
    NUM_LABELS,
    PRIVACY,
    SETTINGS,
    changed,
    everyone,
    language_model,
    language_records,
    plain_round,
    private_round,
    tiny_model,
    toy_records,
    trained_values,
)
from torch import nn

from fedseek import train
from fedseek.batches import make_batch, record_losses
from fedseek.dp import guards, private_step
from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.noise import SecretGaussian
from fedseek.dp.sampling import Draw
from fedseek.errors import GuardTripped, InvalidRecords
from fedseek.records import TokenisedRecords

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

# private rounds


def test_an_intact_round_passes_every_guard():
    model = tiny_model()
    before = trained_values(model)
    outcome = private_round(model, toy_records())
    assert outcome.guards_passed == tuple(sorted(guards.TRAINING_GUARDS))
    assert outcome.spend == PrivacySpend(PRIVACY, 4)
    assert outcome.num_steps == 4
    assert outcome.seconds > 0
    assert math.isfinite(outcome.mean_loss)
    assert not torch.equal(trained_values(model), before)


def test_rounds_compose():
    model, records = tiny_model(), toy_records()
    spend = None
    for number in range(3):
        outcome = private_round(model, records, spend=spend, steps_before=4 * number)
        spend = outcome.spend
    assert spend is not None
    assert spend.num_steps == 12
    assert spend.epsilon() > PrivacySpend(PRIVACY, 4).epsilon()


def test_a_fresh_accountant_in_the_second_round_trips():
    model, records = tiny_model(), toy_records()
    private_round(model, records)
    with pytest.raises(GuardTripped, match="composition_over_run"):
        private_round(model, records, spend=None, steps_before=4)


def test_the_probability_of_a_loader_instead_of_the_plans_trips():
    batches = torch.utils.data.DataLoader(range(40), batch_size=16, drop_last=True)
    settings = changed(SETTINGS, sampling_probability=1 / len(batches))  # 1/2, where the plan says 16/40
    privacy = PrivacyParams(noise_multiplier=1.0, sampling_probability=16 / 40, delta=1e-5, l2_clip_norm=0.5)
    with pytest.raises(GuardTripped, match="sampling_from_plan"):
        private_round(tiny_model(), toy_records(), settings, privacy)


class OfOneSize(train.PoissonUnitSampler):
    """As many units as Poisson sampling has on average, without replacement."""

    def draw(self, step):
        chosen = np.sort(self._generator.choice(self.num_units, round(self.expected_batch_size), replace=False))
        return Draw(step, chosen, chosen)


def test_a_swapped_sampler_trips(monkeypatch):
    monkeypatch.setattr(train, "PoissonUnitSampler", OfOneSize)
    with pytest.raises(GuardTripped, match="draws_independent"):
        private_round(tiny_model(), toy_records())


def test_a_statistical_generator_behind_the_draws_trips(monkeypatch):
    monkeypatch.setattr(train, "secret_generator", np.random.default_rng)
    with pytest.raises(GuardTripped, match=r"cryptographic_randomness.*draws"):
        private_round(tiny_model(), toy_records())


class StatisticalNoise(SecretGaussian):
    """Seeded by the operating system, but by a generator that whoever has seen enough of it can continue."""

    def __init__(self):
        self._generators = (np.random.default_rng(),)


def test_a_statistical_generator_behind_the_noise_trips(monkeypatch):
    monkeypatch.setattr(private_step, "SecretGaussian", StatisticalNoise)
    with pytest.raises(GuardTripped, match=r"cryptographic_randomness.*noise"):
        private_round(tiny_model(), toy_records())


class CoupledModel(nn.Module):
    """Divides by the number of tokens of the batch, as a token mean over the batch does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids, attention_mask) * len(input_ids) * 5 / attention_mask.sum()


def test_a_model_that_couples_records_trips():
    with pytest.raises(GuardTripped, match="records_uncoupled"):
        private_round(CoupledModel(), toy_records())


def test_a_frozen_model_trips():
    with pytest.raises(GuardTripped, match=r"every_tensor_trained.*no tensor"):
        private_round(tiny_model().requires_grad_(False), toy_records())


def test_a_model_of_which_only_what_is_not_used_can_be_trained_trips():
    model = tiny_model().requires_grad_(False)
    model.encoder.unused = nn.Linear(2, 2)
    with pytest.raises(GuardTripped, match=r"every_tensor_trained.*no tensor"):
        private_round(model, toy_records())


def test_a_learning_rate_of_zero_trips():
    with pytest.raises(GuardTripped, match=r"every_tensor_trained.*did not move"):
        private_round(tiny_model(), toy_records(), changed(SETTINGS, learning_rate=0.0))


def test_a_round_in_which_nobody_is_drawn_is_noise_and_is_paid_for():
    model = tiny_model()
    before = trained_values(model)
    privacy = PrivacyParams(noise_multiplier=1.0, sampling_probability=1e-6, delta=1e-5, l2_clip_norm=0.5)
    outcome = private_round(model, toy_records(), changed(SETTINGS, sampling_probability=1e-6), privacy)
    assert math.isnan(outcome.mean_loss)
    assert outcome.spend == PrivacySpend(privacy, 4)
    assert outcome.guards_passed == tuple(sorted(guards.TRAINING_GUARDS))
    assert not torch.equal(trained_values(model), before)


def test_a_site_with_one_record_can_train():
    outcome = private_round(tiny_model(), toy_records(1))
    assert outcome.guards_passed == tuple(sorted(guards.TRAINING_GUARDS))


def test_equal_seeds_do_not_make_equal_private_rounds():
    moved = []
    for _ in range(2):
        model = tiny_model()
        torch.manual_seed(3), np.random.seed(3)
        private_round(model, toy_records(), changed(SETTINGS, sampling_probability=1.0), everyone(PRIVACY))
        moved.append(trained_values(model))
    assert not torch.allclose(*moved)


def test_a_private_round_takes_no_seed():
    with pytest.raises(ValueError, match="must stay unknown"):
        private_round(tiny_model(), toy_records(), seed=1)


def test_a_spend_of_another_mechanism_is_refused():
    with pytest.raises(ValueError, match="another mechanism"):
        private_round(tiny_model(), toy_records(), spend=PrivacySpend(everyone(PRIVACY), 4), steps_before=4)


def test_a_customer_with_many_records_moves_the_step_by_one_clipped_gradient():
    """50 records of one customer, one of each of two others: never more than three gradients in a step."""
    records = toy_records(52)
    records = TokenisedRecords(records.input_ids, records.labels, np.array([0] * 50 + [1, 2]))
    settings = changed(SETTINGS, sampling_probability=1.0, num_steps=3, optimiser="sgd", learning_rate=1.0)
    privacy = PrivacyParams(noise_multiplier=1e-3, sampling_probability=1.0, delta=1e-5, l2_clip_norm=1e-3)
    model = tiny_model()
    before = trained_values(model)
    private_round(model, records, changed(settings, head_learning_rate=1.0), privacy)
    # 3 steps of at most 3 gradients of norm 1e-3, divided by 3 units
    assert float((trained_values(model) - before).norm()) <= 3 * 1e-3 * 1.1


def test_no_trace_is_left_and_the_mode_is_restored():
    model = tiny_model().eval()
    private_round(model, toy_records())
    assert not model.training
    assert not any(vars(p) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_training_loss_does_not_show_in_the_outcome():
    assert "loss" not in repr(private_round(tiny_model(), toy_records()))


# language tasks


def language_round(model=None, records=None, **fields):
    records = records or language_records(np.random.default_rng(3).integers(2, 12, 40))
    return private_round(model or language_model(), records, changed(SETTINGS, **fields))


@pytest.mark.parametrize("family", ["qwen2", "llama", "deepseek_v3"])
def test_a_language_round_passes_every_guard(family):
    outcome = language_round(language_model(family), label_smoothing=0.1)
    assert outcome.guards_passed == tuple(sorted(guards.TRAINING_GUARDS))
    assert math.isfinite(outcome.mean_loss)


class TokenMean(nn.Module):
    """The loss of Hugging Face's causal models: a mean over the tokens of the batch, so neighbours weigh each other."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask, counted):
        logits = self.inner(input_ids, attention_mask, counted)
        return logits * len(input_ids) * 5 / counted.sum()


def test_a_mean_over_the_tokens_of_the_batch_trips():
    with pytest.raises(GuardTripped, match="records_uncoupled"):
        language_round(TokenMean(language_model()))


# rounds without privacy


def test_without_privacy_nothing_is_stated():
    outcome = plain_round(tiny_model(), toy_records())
    assert (outcome.spend, outcome.guards_passed, outcome.num_steps) == (None, (), 4)


def test_a_seeded_round_can_be_repeated_number_by_number():
    moved = []
    for global_seed in range(2):
        model = tiny_model(dropout=0.1)
        torch.manual_seed(global_seed)
        plain_round(model, toy_records(), seed=5)
        moved.append(trained_values(model))
    assert torch.equal(*moved)


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_the_physical_batch_size_does_not_change_the_result(optimiser):
    moved = []
    for size in (3, 100):
        model = tiny_model()
        plain_round(
            model, toy_records(), changed(SETTINGS, physical_batch_size=size, optimiser=optimiser, num_steps=2), seed=5
        )
        moved.append(trained_values(model))
    torch.testing.assert_close(*moved, rtol=1e-3, atol=1e-4)


def test_training_learns():
    model, records = tiny_model(), toy_records()
    settings = changed(SETTINGS, num_steps=60, learning_rate=0.01, head_learning_rate=0.02)
    first = plain_round(model, records, changed(settings, num_steps=1), seed=1).mean_loss
    plain_round(model, records, settings, seed=2)
    assert plain_round(model, records, changed(settings, num_steps=1), seed=3).mean_loss < 0.6 * first


def test_the_private_path_without_noise_to_speak_of_is_the_plain_path():
    """Clip norm above every gradient, next to no noise (still enough to outlive float32), all units drawn: the paths agree."""
    settings = changed(SETTINGS, sampling_probability=1.0, optimiser="sgd", num_steps=3)
    privacy = PrivacyParams(noise_multiplier=1e-6, sampling_probability=1.0, delta=1e-5, l2_clip_norm=100.0)
    plain, private = tiny_model(), tiny_model()
    plain_round(plain, toy_records(), settings)
    private_round(private, toy_records(), settings, privacy)
    torch.testing.assert_close(trained_values(private), trained_values(plain), rtol=1e-4, atol=1e-5)


def test_the_head_has_a_learning_rate_of_its_own():
    model = tiny_model()
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "head." not in n}
    head = model.head.weight.detach().clone()
    plain_round(model, toy_records(), changed(SETTINGS, learning_rate=0.0))
    tensors = dict(model.named_parameters())
    assert all(torch.equal(tensors[name], value) for name, value in adapter.items())
    assert not torch.equal(model.head.weight, head)


def test_steps_are_reported_in_order():
    seen: list[tuple[int, int]] = []
    plain_round(tiny_model(), toy_records(), on_step=lambda step, of: seen.append((step, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_labels_that_are_not_allowed_take_no_part_in_the_loss():
    records, model = toy_records(), tiny_model().eval()
    allowed = np.ones((len(records), NUM_LABELS), dtype=np.bool_)
    allowed[:, 2] = records.labels == 2
    rows = np.flatnonzero(records.labels != 2)
    batch = make_batch(records, rows, device=torch.device("cpu"), allowed=allowed)
    logits = model(batch.input_ids, batch.attention_mask)
    expected = nn.functional.cross_entropy(logits[:, :2], batch.labels, reduction="none")
    torch.testing.assert_close(record_losses(model, batch), expected)
    private_round(tiny_model(), records, allowed=allowed)


def test_a_batch_is_padded_to_its_longest_record():
    records = TokenisedRecords(
        [np.array([5, 6], dtype=np.int32), np.array([7, 8, 9], dtype=np.int32), np.arange(1, 20, dtype=np.int32)],
        np.array([0, 1, 2]),
        np.array([0, 1, 2]),
    )
    batch = make_batch(records, np.array([1, 0]), device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[7, 8, 9], [5, 6, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "records",
    [
        TokenisedRecords([], np.array([], dtype=np.int64), np.array([], dtype=np.int64)),
        TokenisedRecords([np.array([1], dtype=np.int32)], np.array([0, 1]), np.array([0])),
        TokenisedRecords([np.array([1], dtype=np.int32)], np.array([0]), np.array([0, 1])),
    ],
)
def test_records_that_do_not_fit_together_are_refused(records):
    with pytest.raises(InvalidRecords, match="same number of each"):
        plain_round(tiny_model(), records)
