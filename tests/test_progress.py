"""A round that is taken up again in the middle is the round that would have been: same draws, same steps, fresh noise."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_rounds import (
    PRIVACY,
    SETTINGS,
    changed,
    everyone,
    plain_round,
    private_round,
    tiny_model,
    toy_records,
    trained_values,
)

from fedseek.dp import guards
from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.randomness import PLACE_BYTES
from fedseek.dp.sampling import PoissonUnitSampler
from fedseek.errors import GuardTripped, Malformed
from fedseek.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Full backward hook")


class Killed(Exception):
    """In place of SIGKILL: nothing of the round is left but what was kept."""


def killed_after(step: int, run, records, settings, **arguments) -> Progress:
    """How far a round had come when it was killed right after a step."""
    kept: list[Progress] = []

    def keep(number, of, snapshot):
        assert of == settings.num_steps
        kept.append(snapshot())
        if number == step:
            raise Killed

    with pytest.raises(Killed):
        run(tiny_model(), records, settings, on_progress=keep, **arguments)
    assert [progress.step for progress in kept] == list(range(1, step + 1))
    return kept[-1]


@pytest.mark.parametrize("step", [1, 3, 4])
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_a_seeded_round_ends_where_it_would_have(step, optimiser):
    settings = changed(
        SETTINGS, optimiser=optimiser, warmup_steps=3, weight_decay=0.1, max_gradient_norm=1.0, label_smoothing=0.1
    )
    whole, again = tiny_model(), tiny_model()
    outcome = plain_round(whole, toy_records(), settings, seed=5)
    progress = killed_after(step, plain_round, toy_records(), settings, seed=5)
    seen: list[int] = []
    resumed = plain_round(
        again, toy_records(), settings, seed=5, resume=progress, on_step=lambda number, of: seen.append(number)
    )
    assert seen == list(range(step + 1, 5))
    assert torch.equal(trained_values(again), trained_values(whole))
    assert (resumed.num_steps, resumed.mean_loss) == (4, pytest.approx(outcome.mean_loss))


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_private_round_goes_on_under_the_same_spend(step):
    records = toy_records()
    progress = killed_after(step, private_round, records, SETTINGS, spend=PrivacySpend(PRIVACY, 8), steps_before=8)
    assert "every_tensor_trained" in progress.guards_passed
    steps: list[int] = []
    outcome = private_round(
        tiny_model(),
        records,
        spend=PrivacySpend(PRIVACY, 8),
        steps_before=8,
        resume=progress,
        on_step=lambda number, of: steps.append(number),
    )
    assert steps == list(range(step + 1, 5))
    assert outcome.spend == PrivacySpend(PRIVACY, 12)
    assert outcome.num_steps == 4
    assert outcome.guards_passed == tuple(sorted(guards.TRAINING_GUARDS))


def test_the_same_records_are_drawn_and_the_noise_is_another(monkeypatch):
    """A step that is done again sees who it saw; from one snapshot, two processes end in different places."""
    drawn: list[list[int]] = []
    real = PoissonUnitSampler.draw

    def noted(sampler, step):
        draw = real(sampler, step)
        drawn.append(draw.record_indices.tolist())
        return draw

    monkeypatch.setattr(PoissonUnitSampler, "draw", noted)
    records = toy_records()
    kept: list[Progress] = []
    private_round(tiny_model(), records, on_progress=lambda number, of, snapshot: kept.append(snapshot()))
    first, ends = drawn[:4], []
    for _ in range(2):
        drawn.clear()
        model = tiny_model()
        private_round(model, records, resume=kept[1])
        assert drawn[:2] == first[2:]
        ends.append(trained_values(model))
    assert not torch.allclose(*ends)


def test_a_snapshot_holds_what_is_trained_and_no_noise():
    kept: list[Progress] = []
    model = tiny_model()
    private_round(model, toy_records(), on_progress=lambda number, of, snapshot: kept.append(snapshot()))
    names = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert set(kept[-1].trained) == names == set(kept[-1].optimiser)
    assert {field.name for field in dataclasses.fields(Progress)} == {
        "step", "trained", "optimiser", "num_drawn", "loss_sum", "guards_passed", "draws",
    }  # fmt: skip
    for name, tensor in model.named_parameters():
        if name in names:
            assert np.array_equal(kept[-1].trained[name], tensor.detach().numpy())
    assert not np.array_equal(kept[0].trained["head.bias"], kept[-1].trained["head.bias"]), "copies, not views"
    told = repr(kept[-1])
    assert "draws" not in told
    assert "loss" not in told


def test_an_accountant_of_another_run_is_noticed_all_the_same():
    progress = killed_after(2, private_round, toy_records(), SETTINGS)
    with pytest.raises(GuardTripped, match="composition_over_run"):
        private_round(tiny_model(), toy_records(), resume=progress, steps_before=4)


def test_draws_that_do_not_fit_their_number_trip():
    progress = killed_after(2, private_round, toy_records(), SETTINGS)
    with pytest.raises(GuardTripped, match="sampling_from_plan"):
        private_round(tiny_model(), toy_records(), resume=dataclasses.replace(progress, num_drawn=4000))


def test_a_round_that_lost_its_guards_states_nothing():
    progress = killed_after(4, private_round, toy_records(), SETTINGS)
    with pytest.raises(GuardTripped, match="was not checked"):
        private_round(tiny_model(), toy_records(), resume=dataclasses.replace(progress, guards_passed=()))


def _without(progress, name):
    return {key: value for key, value in progress.trained.items() if key != name}


@pytest.mark.parametrize(
    "alter",
    [
        lambda p: {"trained": _without(p, "head.bias")},
        lambda p: {"trained": {**p.trained, "head.bias": np.zeros(7, np.float32)}},
        lambda p: {"trained": {**p.trained, "stranger": np.zeros(1, np.float32)}},
        lambda p: {"optimiser": {**p.optimiser, "stranger": {}}},
        lambda p: {"optimiser": {**p.optimiser, "head.bias": {"exp_avg": np.zeros(7, np.float32)}}},
        lambda p: {"step": 5},
        lambda p: {"draws": p.draws[:-1]},
    ],
    ids=["tensor-missing", "shape", "tensor-unknown", "moment-unknown", "moment-shape", "steps", "draws"],
)
def test_progress_that_does_not_fit_is_refused(alter):
    progress = killed_after(2, private_round, toy_records(), SETTINGS)
    model = tiny_model()
    before = trained_values(model)
    with pytest.raises(Malformed):
        private_round(model, toy_records(), resume=dataclasses.replace(progress, **alter(progress)))
    assert torch.equal(trained_values(model), before)


def test_a_seeded_round_keeps_no_secret_stream():
    progress = killed_after(1, plain_round, toy_records(), SETTINGS, seed=1)
    assert progress.draws == b""
    unseeded = killed_after(1, plain_round, toy_records(), SETTINGS)
    assert len(unseeded.draws) == PLACE_BYTES


def test_everybody_drawn_is_a_round_like_any_other():
    settings = changed(SETTINGS, sampling_probability=1.0)
    progress = killed_after(2, private_round, toy_records(), settings, privacy=everyone(PRIVACY))
    outcome = private_round(tiny_model(), toy_records(), settings, everyone(PRIVACY), resume=progress)
    assert outcome.guards_passed == tuple(sorted(guards.TRAINING_GUARDS))
