"""Canaries: what they are made of, that their seed alone decides, and what their scores see."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedseek.batches import make_batch, record_losses
from fedseek.canaries import (
    Canaries,
    Vocabulary,
    as_words,
    canary_losses,
    change_scores,
    make_canaries,
    read_vocabulary,
    with_canaries,
)
from fedseek.records import TokenisedRecords

SEED = bytes(range(32))
VOCABULARY = Vocabulary(np.arange(10, 60, dtype=np.int32), before=(2,), after=(3,), num_tokens=5)


class MeanModel(nn.Module):
    """Mean of token vectors, a linear head; in ``TokenisedRecords`` terms what a real model is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(60, 6)
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).float()
        return self.head((self.tokens(input_ids) * mask).sum(1) / mask.sum(1) * self.frozen)


def records(count=6):
    return TokenisedRecords(
        [np.array([2, 10 + n, 3], np.int32) for n in range(count)],
        np.zeros(count, np.int64),
        np.arange(count, dtype=np.int64) // 2,
    )


def made(count=40, seed=SEED, num_labels=3) -> Canaries:
    return make_canaries(seed, count, VOCABULARY, num_labels=num_labels)


def same(one: Canaries, other: Canaries) -> bool:
    return (
        np.array_equal(one.coins, other.coins)
        and np.array_equal(one.records.labels, other.records.labels)
        and all(map(np.array_equal, one.records.input_ids, other.records.input_ids))
    )


def test_the_seed_decides_and_another_seed_decides_otherwise():
    assert same(made(), made())
    other = made(seed=bytes(32))
    assert not np.array_equal(made().coins, other.coins)
    assert not np.array_equal(made().records.labels, other.records.labels)
    assert not all(map(np.array_equal, made().records.input_ids, other.records.input_ids))


def test_these_canaries_never_change():
    # a run that is taken up again with newer libraries must find the canaries it was begun with
    found = made(4)
    assert found.coins.astype(int).tolist() == [0, 0, 1, 0]
    assert found.records.input_ids[0].tolist() == [2, 19, 40, 48, 47, 31, 3]


def test_coins_are_fair_and_labels_and_tokens_are_even():
    many = made(8000)
    assert abs(many.coins.mean() - 0.5) < 5 * 0.5 / 8000**0.5
    assert np.bincount(many.records.labels, minlength=3) == pytest.approx(8000 / 3, rel=0.1)
    tokens = np.concatenate([row[1:-1] for row in many.records.input_ids])
    assert set(tokens) == set(range(10, 60))
    assert np.bincount(tokens - 10) == pytest.approx(800, rel=0.25)
    # neither the label nor the text tells the coin
    assert abs(np.corrcoef(many.coins, many.records.labels)[0, 1]) < 0.06
    assert abs(np.corrcoef(many.coins, [row[1] for row in many.records.input_ids])[0, 1]) < 0.06


def test_a_candidate_is_framed_as_a_text_is_and_each_is_its_own_unit():
    found = made()
    assert all(
        row[0] == 2 and row[-1] == 3 and len(row) == 7 and row.dtype == np.int32 for row in found.records.input_ids
    )
    assert np.array_equal(found.records.units, np.arange(40))


@pytest.mark.parametrize("seed", [b"", bytes(16), bytes(33)])
def test_a_seed_of_another_length_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        made(seed=seed)


@given(st.integers(0, 8), st.integers(0, 30))
def test_those_that_are_in_are_added_and_nothing_else_changes(count, num_canaries):
    before, canaries = records(count), made(num_canaries)
    after = with_canaries(before, canaries)
    chosen = np.flatnonzero(canaries.coins)
    assert len(after) == count + len(chosen)
    assert np.array_equal(after.units[:count], before.units)
    assert np.array_equal(after.labels[count:], canaries.records.labels[chosen])
    assert all(map(np.array_equal, after.input_ids[count:], [canaries.records.input_ids[n] for n in chosen]))
    assert after.num_units == before.num_units + len(chosen), "each a unit of its own"
    assert len(set(after.units[count:]) & set(before.units)) == 0


def test_losses_are_those_of_the_records_in_their_order():
    model, canaries = MeanModel(), made(150)
    batch = make_batch(canaries.records, np.arange(150), device=torch.device("cpu"))
    assert canary_losses(model, canaries) == pytest.approx(record_losses(model, batch).detach().numpy(), rel=1e-5)
    assert model.training


def test_a_change_scores_as_the_fall_of_the_loss_along_it():
    # oracle: central finite difference along the change, with the gradient's own length where the clip norm is above it
    model, canaries = MeanModel().double(), made(12)
    torch.manual_seed(1)
    change = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad and "head" in name}
    scores = change_scores(model, canaries, change, l2_clip_norm=1e6)
    losses, step = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            for name, tensor in change.items():
                model.get_parameter(name).add_(sign * step * tensor)
        losses.append(canary_losses(model, canaries))
        with torch.no_grad():
            for name, tensor in change.items():
                model.get_parameter(name).sub_(sign * step * tensor)
    assert scores == pytest.approx((losses[1] - losses[0]) / (2 * step), rel=1e-4)


def test_a_long_gradient_counts_as_the_mechanism_clips_it():
    model, canaries = MeanModel(), made(12)
    change = {"head.weight": torch.ones(3, 6)}
    whole = change_scores(model, canaries, change, l2_clip_norm=1e6)
    clipped = change_scores(model, canaries, change, l2_clip_norm=1e-3)
    assert np.abs(clipped).max() <= 1e-3 * torch.ones(3, 6).norm().item() + 1e-9
    assert np.array_equal(np.sign(whole), np.sign(clipped))
    assert change_scores(model, canaries, {}, l2_clip_norm=1.0) == pytest.approx(0.0)


def test_training_on_a_canary_raises_its_score():
    model, canaries = MeanModel(), made(60)
    first = canary_losses(model, canaries)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = np.flatnonzero(canaries.coins)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(20):
        optimiser.zero_grad()
        record_losses(model, make_batch(canaries.records, chosen, device=torch.device("cpu"))).sum().backward()
        optimiser.step()
    released = first - canary_losses(model, canaries)
    assert released[canaries.coins].mean() > released[~canaries.coins].mean() + 0.5
    change = {name: p.detach() - before[name] for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in before.items():
            model.get_parameter(name).copy_(value)
    seen = change_scores(model, canaries, change, l2_clip_norm=1.0)
    assert seen[canaries.coins].mean() > seen[~canaries.coins].mean()


def test_the_vocabulary_holds_no_special_token(tiny_model):
    found = read_vocabulary(tiny_model, max_tokens=16)
    assert (found.before, found.after) == ((2,), (3,))  # [CLS], [SEP]
    assert found.ordinary.min() > 4
    assert len(found.ordinary) > 50
    assert found.num_tokens == 8
    assert read_vocabulary(tiny_model, max_tokens=4).num_tokens == 2


def test_nothing_shows_a_canary():
    shown = repr(made()) + repr(made().records) + repr(VOCABULARY)
    assert "coins" not in shown
    assert "input_ids" not in shown


# --- candidates for tasks that learn words


class WordModel(nn.Module):
    """Guesses each token from the one before it; in ``fedseek.batches`` terms what a causal model is. It has a head, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(60, 60)
        self.head = nn.Linear(60, 3)
        self.frozen = nn.Parameter(torch.ones(60), requires_grad=False)
        self.largest = 0

    def forward(self, input_ids, attention_mask, counted=None):
        if counted is None:
            return self.head(self.tokens(input_ids).mean(1))
        self.largest = max(self.largest, int(counted.sum()))
        return (self.tokens(input_ids) * self.frozen)[:, :-1][counted[:, 1:]]


def test_as_words_a_candidate_has_the_same_tokens_and_the_same_coin():
    plain, words = made(), as_words(made())
    assert np.array_equal(plain.coins, words.coins)
    assert all(map(np.array_equal, plain.records.input_ids, words.records.input_ids))
    assert words.records.labels.tolist() == [0] * 40
    assert plain.records.counted is None
    for row, counted in zip(words.records.input_ids, words.records.counted, strict=True):
        assert counted.tolist() == [False] + [True] * (len(row) - 1)


def test_candidates_join_records_of_their_own_task_only():
    texts = TokenisedRecords(
        [np.array([10, 11], np.int32)], np.zeros(1, np.int64), np.zeros(1, np.int64), [np.array([False, True])]
    )
    joined = with_canaries(texts, as_words(made()))
    assert len(joined) == len(joined.counted) == 1 + made().coins.sum() == joined.num_units
    assert joined.counted[0].tolist() == [False, True]
    for mixed in ((texts, made()), (records(), as_words(made()))):
        with pytest.raises(ValueError, match="two tasks"):
            with_canaries(*mixed)


def test_losses_of_words_are_means_over_the_tokens_however_they_are_batched():
    model, canaries = WordModel().double(), as_words(made(20))
    losses = canary_losses(model, canaries)
    for number, row in enumerate(canaries.records.input_ids):
        ids = torch.from_numpy(row.astype(np.int64))
        alone = nn.functional.cross_entropy(model.tokens(ids[:-1]), ids[1:])
        assert losses[number] == pytest.approx(alone.item(), rel=1e-9)
    assert model.largest == 8 * 6, "no more than 8 candidates go through the vocabulary at once"


def test_a_change_of_words_scores_as_the_fall_of_the_loss_along_it():
    model, canaries = WordModel().double(), as_words(made(12))
    torch.manual_seed(1)
    change = {"tokens.weight": torch.randn_like(model.tokens.weight)}
    scores = change_scores(model, canaries, change, l2_clip_norm=1e6)
    losses, step = [], 1e-5
    for sign in (1, -1):
        moved = WordModel().double()
        with torch.no_grad():
            moved.tokens.weight.add_(sign * step * change["tokens.weight"])
        losses.append(canary_losses(moved, canaries))
    assert scores == pytest.approx((losses[1] - losses[0]) / (2 * step), rel=1e-4)


def test_a_head_that_has_no_part_in_a_loss_over_words_adds_nothing_to_a_score():
    model, canaries = WordModel(), as_words(made(6))
    change = {"tokens.weight": torch.ones_like(model.tokens.weight)}
    scores = change_scores(model, canaries, change, l2_clip_norm=0.1)
    assert np.isfinite(scores).all()
    both = change_scores(model, canaries, {**change, "head.weight": torch.ones(3, 60)}, l2_clip_norm=0.1)
    assert np.array_equal(scores, both)
    model.head.requires_grad_(False)
    assert np.array_equal(scores, change_scores(model, canaries, change, l2_clip_norm=0.1))


def test_what_is_not_trained_in_a_round_has_no_part_in_a_score():
    model, canaries = WordModel(), as_words(made(6))
    change = {"tokens.weight": torch.ones_like(model.tokens.weight)}
    assert np.array_equal(
        change_scores(model, canaries, change, l2_clip_norm=1.0),
        change_scores(model, canaries, {**change, "frozen": torch.ones(60)}, l2_clip_norm=1.0),
    )


@pytest.mark.parametrize(("max_tokens", "tokens"), [(64, 16), (16, 16), (6, 6), (4, 4)])
def test_candidates_of_words_are_longer_where_there_is_room(tiny_causal, max_tokens, tokens):
    vocabulary = read_vocabulary(tiny_causal, max_tokens=max_tokens, task="instruct")
    assert (vocabulary.before, vocabulary.after, vocabulary.num_tokens) == ((), (), tokens)
    assert not {0, 1, 2} & set(vocabulary.ordinary.tolist()), "special tokens are nobody's words"
    canaries = as_words(make_canaries(SEED, 8, vocabulary, num_labels=1))
    assert all(len(row) == tokens for row in canaries.records.input_ids)
    assert read_vocabulary(tiny_causal, max_tokens=max_tokens).num_tokens == min(8, tokens)
