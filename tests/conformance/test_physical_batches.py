"""Our step against Opacus' own: DPOptimizer under BatchMemoryManager, on the same Poisson batch.

Opacus cuts a logical batch with a loader of its own; we cut it in ``fedseek.train`` (docs/adr/0024-physical-batches.md).
Both must add up the same clipped gradients and add noise of one scale, once.
"""

import itertools

import numpy as np
import opacus.optimizers.optimizer as opacus_optimizer
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedseek import train
from fedseek.dp.accounting import PrivacyParams
from fedseek.dp.noise import SecretGaussian
from fedseek.dp.sampling import PoissonUnitSampler
from fedseek.records import TokenisedRecords
from fedseek.train import train_round
from fedseek.train_settings import TrainingSettings

NUM_UNITS, NUM_LABELS, STEPS, PROBABILITY, RATE = 60, 3, 3, 0.4, 1.0
PRIVACY = PrivacyParams(noise_multiplier=1.25, sampling_probability=PROBABILITY, delta=1e-5, l2_clip_norm=2.4)

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


class Reader(nn.Module):
    """Mean of word vectors, a hidden layer, a head: records of different lengths, gradients of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = nn.Embedding(50, 8).requires_grad_(False)
            self.hidden = nn.Linear(8, 16)
            self.head = nn.Linear(16, NUM_LABELS)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask.unsqueeze(-1)
        pooled = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        return self.head(torch.tanh(self.hidden(3 * pooled)))


def records() -> TokenisedRecords:
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, 50, rng.integers(2, 12)).astype(np.int32) for _ in range(NUM_UNITS)]
    return TokenisedRecords(rows, rng.integers(0, NUM_LABELS, NUM_UNITS), np.arange(NUM_UNITS))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [tensor for tensor in model.parameters() if tensor.requires_grad]


def moved(model: nn.Module) -> torch.Tensor:
    """What steps at learning rate 1 have taken away: the sums, divided by the expected batch size."""
    pairs = zip(trainable(Reader()), trainable(model), strict=True)
    return torch.cat([(before - after).detach().flatten() for before, after in pairs])


@pytest.fixture
def draws() -> list[np.ndarray]:
    """The records of each step: of Poisson batches that both are to train on."""
    sampler = PoissonUnitSampler(records().units, PROBABILITY, generator=np.random.default_rng(3))
    return [sampler.draw(step).record_indices for step in range(STEPS)]


def ours(draws, physical: int, monkeypatch) -> tuple[torch.Tensor, list[tuple[int, float]]]:
    """A private round of ``fedseek.train`` on these draws, its noise taken out; what it moved, and the noise asked for."""
    asked: list[tuple[int, float]] = []
    monkeypatch.setattr(train, "secret_generator", lambda: np.random.default_rng(3))  # draws as in the fixture
    monkeypatch.setattr(train.PrivateStep, "_check_noise", lambda step: None)
    monkeypatch.setattr(train, "_check_round", lambda *arguments, **options: None)

    def silenced(source, shapes, std):
        asked.extend((shape.numel(), std) for shape in shapes)
        return [torch.zeros(shape, dtype=torch.float64) for shape in shapes]

    monkeypatch.setattr(SecretGaussian, "normals", silenced)
    settings = TrainingSettings(PROBABILITY, STEPS, RATE, RATE, physical_batch_size=physical, optimiser="sgd")
    model = Reader()
    train_round(model, records(), settings=settings, privacy=PRIVACY)
    return moved(model), asked


def opacus(draws, physical: int, monkeypatch) -> tuple[torch.Tensor, list[tuple[int, float]]]:
    """The same by Opacus, which cuts the batches itself."""
    asked: list[tuple[int, float]] = []

    def noted(std, reference, generator=None, secure_mode=False):
        asked.append((reference.numel(), std))
        return torch.zeros_like(reference)

    monkeypatch.setattr(opacus_optimizer, "_generate_noise", noted)
    batch = train.make_batch(records(), np.arange(NUM_UNITS), device=torch.device("cpu"))
    model = GradSampleModule(Reader(), loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(trainable(model), lr=RATE),
        noise_multiplier=PRIVACY.noise_multiplier,
        max_grad_norm=PRIVACY.l2_clip_norm,
        expected_batch_size=PROBABILITY * NUM_UNITS,
    )
    loader = DataLoader(TensorDataset(batch.input_ids, batch.attention_mask, batch.labels), batch_sampler=draws)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as cut:
        for ids, mask, labels in cut:
            assert len(ids) <= physical
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(ids, mask), labels).backward()
            optimizer.step()
    return moved(model), asked


@pytest.mark.parametrize("physical", [1, 3, 64])
def test_our_step_is_that_of_opacus_with_a_batch_memory_manager(draws, physical, monkeypatch):
    mine, my_noise = ours(draws, physical, monkeypatch)
    theirs, their_noise = opacus(draws, physical, monkeypatch)
    assert float(theirs.norm()) > 0.05
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    # noise of one scale, once a logical step for each tensor, however many physical batches there were
    sizes = [tensor.numel() for tensor in trainable(Reader())]
    std = PRIVACY.noise_multiplier * PRIVACY.l2_clip_norm
    assert my_noise == their_noise == [(size, pytest.approx(std)) for _ in range(STEPS) for size in sizes]


def test_some_records_are_clipped_and_some_are_not():
    """Else the comparison above would say little."""
    batch = train.make_batch(records(), np.arange(NUM_UNITS), device=torch.device("cpu"))
    model = GradSampleModule(Reader(), loss_reduction="sum")
    train.record_losses(model, batch).sum().backward()
    norms = torch.cat([tensor.grad_sample.flatten(1) for tensor in trainable(model)], dim=1).norm(dim=1)
    clipped = int((norms > PRIVACY.l2_clip_norm).sum())
    assert 10 < clipped < NUM_UNITS - 10


def test_the_physical_batch_size_changes_nothing(draws, monkeypatch):
    results = [ours(draws, physical, monkeypatch)[0] for physical in (1, 3, 64)]
    for one, other in itertools.pairwise(results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_step_in_which_nobody_is_drawn_is_where_a_batch_memory_manager_stops(monkeypatch):
    """A plain loader has nothing to put together; for us such a step is noise alone (tests/dp/test_private_step.py)."""
    with pytest.raises(IndexError):
        opacus([np.array([], dtype=np.int64)], 3, monkeypatch)
