"""Two processes that take a step together, on the CPU: what they add up, what noise is on it, and what happens when one dies."""

import gc
import multiprocessing
import os
import signal
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fedseek.dp import guards, private_step
from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.noise import SecretGaussian
from fedseek.dp.sampling import Draw
from fedseek.errors import GuardTripped, ProcessLost, WrongModel
from fedseek.lora.model import LoraParams, build_model
from fedseek.records import TokenisedRecords
from fedseek.several import Several, Together, _follow
from fedseek.train import train_round
from fedseek.train_settings import TrainingSettings

LORA = LoraParams(method="both", rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"), layers=None, seed=1)
SETTINGS = TrainingSettings(
    sampling_probability=1.0,
    num_steps=2,
    learning_rate=1.0,
    head_learning_rate=1.0,
    physical_batch_size=3,
    optimiser="sgd",
)
PRIVACY = PrivacyParams(noise_multiplier=1e-6, sampling_probability=1.0, delta=1e-5, l2_clip_norm=0.05)


def tiny_model(rank=0):
    """A Qwen2 of two layers; the same at every process."""
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = build_model(Qwen2ForCausalLM(config), LORA, num_labels=None, head_seed=0)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            if "lora_B" in name and not rank:  # a follower begins with others, and must take these over
                tensor.normal_(std=0.2)
    return model


def records(number=7):
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 40, rng.integers(3, 9), dtype=np.int32) for _ in range(number)]
    counted = [np.arange(len(row)) > 0 for row in rows]
    return TokenisedRecords(rows, np.zeros(number, np.int64), np.arange(number), counted)


def moved(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


def followers():
    return [child for child in multiprocessing.active_children() if "fedseek" in child.name]


@pytest.fixture(scope="module")
def two():
    with closing(Several(tiny_model, 2)) as several:
        yield several
    assert not followers()


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [None, PRIVACY], ids=["plain", "private"])
def test_two_processes_take_the_steps_of_one(two, privacy):
    """Next to no noise: what is left is the sum of the clipped gradients, which far more records than are clipped move."""
    alone, together = tiny_model(), tiny_model()
    train_round(alone, records(), settings=SETTINGS, privacy=privacy)
    outcome = two.train_round(together, records(), settings=SETTINGS, privacy=privacy)
    before = moved(tiny_model())
    for name, value in moved(together).items():
        torch.testing.assert_close(value, moved(alone)[name], rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.equal(value, before[name])
    if privacy:
        assert outcome.guards_passed == tuple(sorted(guards.TRAINING_GUARDS))
        assert outcome.spend == PrivacySpend(PRIVACY, 2)


@pytest.mark.slow
def test_a_second_round_goes_on_with_the_same_processes_from_other_weights(two):
    before = [child.pid for child in followers()]
    model = tiny_model()
    first = two.train_round(model, records(), settings=SETTINGS, privacy=PRIVACY)
    with torch.no_grad():  # as if a sum had been applied
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.mul_(0.5)
    alone = tiny_model()
    alone.load_state_dict(model.state_dict())
    train_round(alone, records(5), settings=SETTINGS, privacy=None)
    second = two.train_round(model, records(5), settings=SETTINGS, privacy=None)
    assert [child.pid for child in followers()] == before
    assert (first.num_steps, second.num_steps) == (2, 2)
    for name, value in moved(model).items():
        torch.testing.assert_close(value, moved(alone)[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_what_a_round_does_not_train_is_frozen_at_the_followers_too(two):
    model = tiny_model()
    for name, tensor in model.named_parameters():
        tensor.requires_grad_("lora_B" in name)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    two.train_round(model, records(), settings=SETTINGS, privacy=PRIVACY)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]) == ("lora_B" not in name), name


@pytest.mark.slow
def test_a_round_in_which_nobody_is_drawn_is_noise(two):
    privacy = PrivacyParams(noise_multiplier=1.0, sampling_probability=1e-6, delta=1e-5, l2_clip_norm=0.05)
    settings = TrainingSettings(1e-6, 2, 1e-9, 1e-9, 3, "sgd")
    outcome = two.train_round(tiny_model(), records(), settings=settings, privacy=privacy)
    assert outcome.guards_passed == tuple(sorted(guards.TRAINING_GUARDS))


@pytest.mark.slow
def test_noise_is_added_once(two, monkeypatch):
    """Both processes add up; were both to add noise, its variance would be twice the plan's."""
    privacy = PrivacyParams(noise_multiplier=50.0, sampling_probability=1.0, delta=1e-5, l2_clip_norm=0.05)
    settings = TrainingSettings(1.0, 1, 1.0, 1.0, 3, "sgd")
    sources = []

    class Seen(SecretGaussian):
        def normal(self, shape, std):
            sources.append(int(np.prod(shape)))
            return super().normal(shape, std)

    monkeypatch.setattr(private_step, "SecretGaussian", Seen)
    differences = []
    for _ in range(8):
        noisy, exact = tiny_model(), tiny_model()
        two.train_round(noisy, records(), settings=settings, privacy=privacy)
        train_round(exact, records(), settings=settings, privacy=None)  # the gradients drown
        pairs = zip(moved(noisy).values(), moved(exact).values(), strict=True)
        differences += [(noised - plain).flatten() for noised, plain in pairs]
    values = torch.cat(differences)
    std = 50.0 * 0.05 / 7  # over the expected number of records
    assert float(values.std()) == pytest.approx(std, rel=6 / (2 * len(values)) ** 0.5 + 0.02)
    assert sources, "the lead drew it"


@pytest.mark.slow
def test_a_round_is_resumed_by_all_processes(two):
    settings = TrainingSettings(1.0, 3, 0.1, 0.1, 3, "adam")
    kept = []
    alone, together = tiny_model(), tiny_model()
    train_round(
        alone, records(), settings=settings, privacy=None, on_progress=lambda step, of, take: kept.append(take())
    )
    outcome = two.train_round(together, records(), settings=settings, privacy=None, resume=kept[0])
    assert outcome.num_steps == 3
    for name, value in moved(together).items():
        torch.testing.assert_close(value, moved(alone)[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_round_that_fails_leaves_no_process_and_the_next_one_starts_them_again(two):
    other = PrivacySpend(PrivacyParams(2.0, 1.0, 1e-5, 0.05), 1)
    with pytest.raises(ValueError, match="another mechanism"):
        two.train_round(tiny_model(), records(), settings=SETTINGS, privacy=PRIVACY, spend=other, steps_before=1)
    assert not followers()

    def kill(step, of):
        (follower,) = followers()
        os.kill(follower.pid, signal.SIGKILL)

    with pytest.raises(ProcessLost, match="is gone"):
        two.train_round(tiny_model(), records(), settings=SETTINGS, privacy=PRIVACY, on_step=kill)
    assert not followers()


@pytest.mark.slow
def test_a_follower_that_dies_while_it_loads_fails_the_round():
    with closing(Several(tiny_model, 2)) as several:
        os.kill(max(child.pid for child in followers()), signal.SIGKILL)
        with pytest.raises(ProcessLost, match="the round came to nothing"):
            several.train_round(tiny_model(), records(), settings=SETTINGS, privacy=PRIVACY)
    assert not followers()


def test_a_lead_that_forgets_its_followers_ends_them():
    several = Several(tiny_model, 2)
    assert followers()
    del several
    gc.collect()
    assert not followers()


def test_one_process_is_no_several():
    with pytest.raises(ValueError, match="2 or more"):
        Several(tiny_model, 1)


# the exchange by itself, in threads: the same code, without the time that processes take to start


def ends(number, row_bytes=64):
    rows = torch.zeros((number, row_bytes), dtype=torch.uint8)
    pairs = [multiprocessing.Pipe() for _ in range(number - 1)]
    lead = Together(0, rows, tuple(near for near, _ in pairs))
    return [lead, *(Together(rank + 1, rows, (far,)) for rank, (_, far) in enumerate(pairs))]


def at_once(ends, work):
    results = [None] * len(ends)

    def run(rank):
        results[rank] = work(ends[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ends))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_sums_are_exact_for_tensors_of_any_type_and_longer_than_the_shared_row():
    def work(end):
        tensors = [
            torch.arange(50, dtype=torch.float32).view(5, 10) * (end.rank + 1),
            torch.full((3,), end.rank, dtype=torch.int64),
            torch.tensor(0.1 * 3**end.rank),
            torch.zeros(0),
        ]
        end.add(tensors)
        return tensors

    first, *others = at_once(ends(3), work)
    assert torch.equal(first[0], torch.arange(50, dtype=torch.float32).view(5, 10) * 6)
    assert first[1].tolist() == [3, 3, 3]
    assert float(first[2]) == pytest.approx(0.1 + 0.3 + 0.9)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), "the same to the bit"


def test_the_leads_values_and_draw_reach_all():
    def work(end):
        values = torch.full((40,), float(end.rank + 5))
        end.follow([values])
        mine = Draw(end.rank, np.array([end.rank]), np.array([end.rank]))
        if end.leads:
            mine = Draw(3, np.array([9, 4, 7, 2, 1]), np.array([8, 3, 6, 1, 0]))
        draw = end.agree(mine)
        return values, draw, end.share(draw.record_indices)

    results = at_once(ends(3), work)
    assert all((values == 5).all() for values, _, _ in results)
    assert all(draw.record_indices.tolist() == [9, 4, 7, 2, 1] and draw.step == 3 for _, draw, _ in results)
    assert all(draw.unit_indices.tolist() == [8, 3, 6, 1, 0] for _, draw, _ in results)
    assert sorted(np.concatenate([share for _, _, share in results])) == [1, 2, 4, 7, 9]


def test_a_closed_pipe_is_an_error_at_both_ends():
    lead, follower = ends(2)
    follower.pipes[0].close()
    with pytest.raises(ProcessLost, match="a process that was training"):
        lead.meet()
    lead, follower = ends(2)
    lead.pipes[0].close()
    with pytest.raises(ProcessLost, match="the site service is gone"):
        follower.meet()


@pytest.mark.parametrize(
    ("error", "told"),
    [(GuardTripped("clipping_applied", "seen there"), GuardTripped), (WrongModel("not that one"), ProcessLost)],
    ids=["guard", "other"],
)
def test_what_trips_at_a_follower_trips_at_the_lead(error, told):
    def refuse(rank):
        raise error

    lead, follower = ends(2)
    _follow(follower, refuse)
    with pytest.raises(told, match=r"another process.*(seen there|WrongModel.*not that one)") as raised:
        lead.meet()
    assert getattr(raised.value, "guard", "clipping_applied") == "clipping_applied"


def test_nothing_secret_is_printed():
    lead, _ = ends(2)
    assert repr(lead) == "Together(rank=0)"
