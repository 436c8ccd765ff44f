"""How many records are on the device at once: found from its memory, halved when that does not do, and never seen in
the result."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_rounds import (
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

from fedseek import physical_batch, train
from fedseek.dp import guards
from fedseek.dp.noise import SecretGaussian
from fedseek.errors import OutOfMemory
from fedseek.physical_batch import (
    FRACTION,
    PhysicalBatch,
    bytes_per_record,
    fitting,
    free_memory,
    in_pieces,
    is_out_of_memory,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing", "ignore:.*gradient_checkpointing_enable", "ignore:Full backward hook"
)

CPU = torch.device("cpu")
SIZES = st.integers(0, 2**44)
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
)


# how many fit


@given(SIZES, SIZES, st.integers(0, 2**32), st.floats(0.01, 1e5))
def test_less_free_memory_never_gives_a_larger_batch(free, less, per_record, expected):
    size = fitting(max(free, less), per_record, expected=expected)
    assert fitting(min(free, less), per_record, expected=expected) <= size
    assert 1 <= size <= max(1, math.ceil(expected))
    assert size == 1 or size * per_record <= FRACTION * max(free, less)


def needed(model, records, row, *, private=False, num_logits=0):
    losses_of = train._losses_of(model, records, SETTINGS, None)
    size = bytes_per_record(model, losses_of, np.array([row]), num_logits=num_logits, private=private)
    model.zero_grad()
    return size


def test_a_longer_record_needs_more_bytes_and_two_need_twice_as_many():
    model, records = language_model(), language_records((64, 16, 64))
    long, short = needed(model, records, 0), needed(model, records, 1)
    assert 2 * short < long < 8 * short
    losses_of = train._losses_of(model, records, SETTINGS, None)
    both = bytes_per_record(model, losses_of, np.array([0, 2]), num_logits=0, private=False)
    assert both == pytest.approx(2 * long, rel=0.1), "what is counted belongs to the records and not to the model"


def test_what_is_counted_is_about_what_is_kept():
    """One wide linear layer under a square: its input is the model's own, its output is kept once."""

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000, 1000))

        def forward(self):
            return (torch.ones(1, 1000) @ self.weight).square().sum(1)

    model = Squared()
    size = bytes_per_record(model, lambda indices: model(), np.array([0]), num_logits=0, private=False)
    assert 8_000 <= size <= 9_000, "the ones, the product; not the four million bytes of the weight"


def test_gradients_of_each_record_and_logits_are_counted():
    model, records = language_model(), language_records()
    trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    plain = needed(model, records, 0)
    assert needed(model, records, 0, private=True) == plain + 4 * trained
    assert needed(model, records, 0, num_logits=1000) == plain + 3 * 4 * 1000


def test_layers_that_are_done_twice_count_once():
    model, records = language_model(), language_records((64,))
    model.encoder.enable_input_require_grads()
    plain = needed(model, records, 0)
    model.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert needed(model, records, 0) < 0.9 * plain


def sizes_in_a_round(monkeypatch, free, private, *, records=None, **fields):
    """Records in each micro-batch of a round whose size is found from so many free bytes."""
    monkeypatch.setattr(train, "free_memory", lambda device: free)
    seen = []
    real = train.make_batch

    def noted(records, indices, **options):
        seen.append(len(indices))
        return real(records, indices, **options)

    records = records or language_records([12] * 40)
    settings = changed(SETTINGS, sampling_probability=1.0, num_steps=1, physical_batch_size=None, **fields)
    model = language_model()
    with monkeypatch.context() as watched:
        watched.setattr(train, "make_batch", noted)
        privacy = everyone(PRIVACY) if private else None
        outcome = train.train_round(model, records, settings=settings, privacy=privacy)
    return outcome.physical_batch_size, seen


@pytest.mark.parametrize("private", [False, True])
def test_a_round_finds_its_batch_from_the_free_memory(monkeypatch, private):
    sizes = [sizes_in_a_round(monkeypatch, free, private)[0] for free in (1, 2**21, 2**22, 2**40)]
    assert sizes[0] == 1
    assert sizes[-1] == 40, "never more than a step is expected to hold"
    assert sizes == sorted(sizes)
    assert 1 < sizes[1] < sizes[2] < 40
    _, seen = sizes_in_a_round(monkeypatch, 2**21, private)
    assert max(seen[-(40 // sizes[1]) :]) == sizes[1]


def test_free_memory_is_that_of_the_machine():
    assert 2**20 < free_memory(CPU) < 2**50


def test_the_limit_of_a_control_group_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\nfile 900000\n")
    monkeypatch.setattr(physical_batch, "_CGROUP", tmp_path)
    monkeypatch.setattr(physical_batch.Path, "read_text", _own_group_at_the_top(physical_batch.Path.read_text))
    assert free_memory(CPU) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 2**20


def _own_group_at_the_top(real):
    return lambda path, *given: "0::/\n" if str(path) == "/proc/self/cgroup" else real(path, *given)


# what does not fit is taken again in halves


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "mps", "cublas", "python"])
def test_the_words_of_every_allocator_are_known(error):
    assert is_out_of_memory(error)


def test_other_errors_are_not_taken_for_it():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
    batch = PhysicalBatch(4)

    def take(indices):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        in_pieces(np.arange(4), batch, take=take, forget=lambda: None)
    assert batch.size == 4


@given(st.integers(0, 50), st.integers(1, 64), st.integers(1, 64))
def test_every_record_is_taken_once_and_in_order(count, size, most):
    taken: list[int] = []
    forgot: list[int] = []

    def take(indices):
        if len(indices) > most:
            raise OUT_OF_MEMORY[len(indices) % len(OUT_OF_MEMORY)]
        taken.extend(indices.tolist())

    batch = PhysicalBatch(size)
    in_pieces(np.arange(count), batch, take=take, forget=lambda: forgot.append(1))
    assert taken == list(range(count))
    assert batch.size <= max(size, 1)
    assert len(forgot) <= 7, "halved each time: no more than log2 of the size"


def test_one_record_that_does_not_fit_says_what_to_do():
    def take(indices):
        raise OUT_OF_MEMORY[0]

    with pytest.raises(OutOfMemory, match="one record at a time") as told:
        in_pieces(np.arange(9), PhysicalBatch(8), take=take, forget=lambda: None)
    assert "max_tokens" in told.value.hint


class Small(nn.Module):
    """A model on a device that takes only so many records; where it runs out, ``place`` says."""

    def __init__(self, inner: nn.Module, most: int, place: str) -> None:
        super().__init__()
        self.inner, self.most, self.place = inner, most, place
        self.failures = 0

    def forward(self, input_ids, attention_mask):
        logits = self.inner(input_ids, attention_mask)
        if len(input_ids) <= self.most:
            return logits
        if self.place == "forward":
            self.fail()
        return logits

    def fail(self, *given):
        self.failures += 1
        raise OUT_OF_MEMORY[self.failures % len(OUT_OF_MEMORY)]


def failing_layer(model: Small) -> None:
    """Backward fails in the first layer: the head and the last layer have their gradients by then."""
    first = next(module for name, module in model.inner.named_modules() if name.endswith("query.lora_B.default"))

    def look(module, given, output):
        if len(output) > model.most and output.requires_grad:
            output.register_hook(model.fail)

    first.register_forward_hook(look)


def one_round(place, private, most, monkeypatch):
    model = Small(tiny_model(), most, place)
    if place == "layer":
        failing_layer(model)
    settings = changed(SETTINGS, sampling_probability=1.0, num_steps=3, physical_batch_size=16, optimiser="sgd")
    if not private:
        return model, plain_round(model, toy_records(), settings)
    if place == "clip":
        _clipping_that_fails(model, monkeypatch)
    privacy = everyone(PRIVACY, noise_multiplier=1e-4)
    return model, private_round(model, toy_records(), settings, privacy)


def _clipping_that_fails(model, monkeypatch):
    """Opacus' clipping gives up when it has added to half of the tensors."""
    from fedseek.dp.private_step import DPOptimizer

    real = DPOptimizer.clip_and_accumulate

    def clip(optimizer):
        real(optimizer)
        if len(optimizer.grad_samples[0]) > model.most:
            for tensor in optimizer.params[::2]:
                tensor.summed_grad = None
            model.fail()

    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", clip)


class NoNoise(SecretGaussian):
    """Next to none, the same in both rounds; the guard of each step looks at another number."""

    def normal(self, shape, std):
        return super().normal(shape, std) if std == 1.0 else 0 * super().normal(shape, std)


@pytest.mark.parametrize(
    ("place", "private"),
    [("forward", False), ("layer", False), ("forward", True), ("layer", True), ("clip", True)],
)
def test_running_out_of_memory_does_not_show_in_the_result(place, private, monkeypatch):
    if private:
        monkeypatch.setattr("fedseek.dp.private_step.SecretGaussian", NoNoise)
        monkeypatch.setattr(train.PrivateStep, "_check_noise", lambda step: step.passed.add(guards.NOISE_ADDED))
    roomy, untroubled = one_round(place, private, 100, monkeypatch)
    tight, outcome = one_round(place, private, 4, monkeypatch)
    assert (roomy.failures, tight.failures) == (0, 2)
    assert (untroubled.physical_batch_size, outcome.physical_batch_size) == (16, 4)
    torch.testing.assert_close(trained_values(tight), trained_values(roomy), rtol=1e-5, atol=1e-6)
    assert outcome.guards_passed == (tuple(sorted(guards.TRAINING_GUARDS)) if private else ())
    assert outcome.mean_loss == pytest.approx(untroubled.mean_loss, rel=1e-5)
    assert not any(vars(tensor) for tensor in tight.parameters()), "nothing of a failed micro-batch stays"
    assert not any(hasattr(module, "activations") for module in tight.modules())


@pytest.mark.parametrize("private", [False, True])
def test_a_device_for_one_record_at_a_time_will_do(private, monkeypatch):
    """Also where the guard looks at several records at once."""
    _, outcome = one_round("layer", private, 1, monkeypatch)
    assert outcome.physical_batch_size == 1


@pytest.mark.parametrize("private", [False, True])
def test_a_device_for_no_record_is_an_error_that_leaves_nothing_behind(private, monkeypatch):
    model = Small(tiny_model(), 0, "forward")
    run = private_round if private else plain_round
    with pytest.raises(OutOfMemory, match="too small"):
        run(model, toy_records())
    assert not any(vars(tensor) for tensor in model.parameters())
