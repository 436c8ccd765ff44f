"""The audit catches a broken mechanism: noise halved, or clipping off, with the guards that would stop both out of the way.

The training is real (``fedseek.train.train_round``: sampling, Opacus' clipping, our noise); the model is built so that a
canary is easy to see: one weight a token, and each candidate a token of its own, so their gradients are orthogonal.
"""

import secrets

import numpy as np
import pytest
import torch
from torch import nn

from fedseek.canaries import Canaries, change_scores, with_canaries
from fedseek.dp import guards, private_step
from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.auditing import epsilon_lower_bound
from fedseek.errors import GuardTripped
from fedseek.records import TokenisedRecords
from fedseek.train import train_round
from fedseek.train_settings import TrainingSettings

CANARIES, REAL, STEPS = 16_000, 50, 64
CLIP, RATE = 0.25, 0.1
PRIVACY = PrivacyParams(noise_multiplier=1.0, sampling_probability=0.02, delta=1e-5, l2_clip_norm=CLIP)
SETTINGS = TrainingSettings(
    sampling_probability=PRIVACY.sampling_probability,
    num_steps=STEPS,
    learning_rate=RATE,
    head_learning_rate=RATE,
    optimiser="sgd",
)
UNITS = REAL + CANARIES / 2  # what a step's divisor counts, whatever the coins say
CONFIDENCE = 0.95


class TokenWeights(nn.Module):
    """Logits (w, -w), w the weight of the only token; the gradient of a record is -1 there, four times the clip norm."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.weights = nn.Embedding(num_tokens, 1)
        nn.init.zeros_(self.weights.weight)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        weight = (self.weights(input_ids).squeeze(-1) * attention_mask).sum(1)
        return torch.stack([weight, -weight], dim=1)


def one_token_each(count: int, first: int) -> TokenisedRecords:
    rows = [np.array([first + number], np.int32) for number in range(count)]
    return TokenisedRecords(rows, np.zeros(count, np.int64), np.arange(count))


def audited_training(num_canaries: int = CANARIES, steps: int = STEPS):
    """Train once; returns coins, weights after each step (steps + 1, m), and what was spent."""
    coins = np.unpackbits(np.frombuffer(secrets.token_bytes(num_canaries // 8), np.uint8)).astype(bool)
    canaries = Canaries(coins, one_token_each(num_canaries, 0))
    model = TokenWeights(num_canaries + REAL)
    path = [np.zeros(num_canaries)]
    outcome = train_round(
        model,
        with_canaries(one_token_each(REAL, num_canaries), canaries),
        settings=TrainingSettings(**{**{n: getattr(SETTINGS, n) for n in SETTINGS.__slots__}, "num_steps": steps}),
        privacy=PRIVACY,
        expected_units=REAL + num_canaries / 2,
        on_step=lambda step, of: path.append(model.weights.weight.detach()[:num_canaries, 0].double().numpy().copy()),
    )
    return coins, np.array(path), outcome.spend


def scores_of_every_step(path: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of "drawn with the plan's probability" against "never drawn", over the steps."""
    seen = np.diff(path, axis=0) * PRIVACY.sampling_probability * UNITS / RATE / CLIP  # 1 where drawn, plus noise
    # The auditor measures the noise instead of believing in it: most candidates are not in a step.
    noise = 1.4826 * np.median(np.abs(seen - np.median(seen)))
    odds = np.exp((seen - 0.5) / noise**2)
    return np.log1p(PRIVACY.sampling_probability * (odds - 1)).sum(0)


def bounds(coins: np.ndarray, path: np.ndarray) -> tuple[float, float]:
    """For who sees the released weights, and for who sees every step."""
    each = (path[-1], scores_of_every_step(path))
    released, every = (epsilon_lower_bound(s, coins, delta=PRIVACY.delta, confidence=CONFIDENCE) for s in each)
    return released, every


def halve_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = private_step.SecretGaussian.normal
    monkeypatch.setattr(private_step.SecretGaussian, "normal", lambda self, shape, std: normal(self, shape, std / 2))


def switch_clipping_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = private_step.DPOptimizer.clip_and_accumulate

    def unclipped(self) -> None:
        bound, self.max_grad_norm = self.max_grad_norm, 1e9
        clipped(self)
        self.max_grad_norm = bound

    monkeypatch.setattr(private_step.DPOptimizer, "clip_and_accumulate", unclipped)


BREAKS = {
    guards.NOISE_ADDED: (halve_noise, "check_noise_added"),
    guards.CLIPPING_APPLIED: (switch_clipping_off, "check_clipping_applied"),
}
CLAIM = PrivacySpend(PRIVACY, STEPS)


def test_an_honest_mechanism_stays_below_its_claim():
    coins, path, spend = audited_training()
    assert spend == CLAIM
    released, every = bounds(coins, path)
    assert 0.5 < CLAIM.epsilon() < 1.5, "small enough for so many canaries to refute"
    assert max(released, every) <= CLAIM.epsilon()


@pytest.mark.parametrize("guard", list(BREAKS))
def test_a_broken_mechanism_is_refuted(monkeypatch, guard):
    break_it, check = BREAKS[guard]
    break_it(monkeypatch)
    monkeypatch.setattr(guards, check, lambda *args, **kwargs: guard)
    coins, path, spend = audited_training()
    assert spend == CLAIM, "the accountant notices nothing"
    _, every = bounds(coins, path)
    assert every > CLAIM.epsilon()


@pytest.mark.parametrize("guard", list(BREAKS))
def test_the_guards_alone_would_have_stopped_it(monkeypatch, guard):
    break_it, _ = BREAKS[guard]
    break_it(monkeypatch)
    with pytest.raises(GuardTripped) as caught:
        audited_training(num_canaries=1024, steps=2)
    assert caught.value.guard == guard


def test_the_score_of_a_change_is_the_weight_that_the_change_gave_the_canary():
    # what the tests above read off the weights is what change_scores works out from gradients
    model = TokenWeights(8)
    canaries = Canaries(np.ones(8, bool), one_token_each(8, 0))
    change = torch.arange(8.0).unsqueeze(1)
    scores = change_scores(model, canaries, {"weights.weight": change}, l2_clip_norm=CLIP)
    assert scores == pytest.approx(CLIP * np.arange(8), abs=1e-6)
    assert change_scores(model, canaries, {"weights.weight": change}, l2_clip_norm=2.0) == pytest.approx(np.arange(8.0))
