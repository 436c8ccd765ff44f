"""Evaluation of language: against transformers' own loss, in any batches, within a budget of tokens that fits its slots."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedseek.evaluate as module
from fedseek.encode import METRIC_SCALE
from fedseek.evaluate import MAX_EVALUATED_TOKENS, evaluate, token_budget, vocabulary_of
from fedseek.he.packing import choose_packing
from fedseek.lora.load import load_base
from fedseek.lora.model import LoraParams, build_model
from fedseek.records import TokenisedRecords

VOCABULARY = 304


@pytest.fixture(scope="module")
def model(tiny_causal):
    params = LoraParams("ffa", rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"), layers=None, seed=1)
    built = build_model(load_base(tiny_causal, words=True), params, num_labels=None, head_seed=0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    return built


def language(lengths, seed=0, counted=0.5):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]
    masks = [rng.random(length) < counted for length in lengths]
    for mask in masks:
        mask[0], mask[-1] = False, True
    return TokenisedRecords(rows, np.zeros(len(rows), np.int64), np.arange(len(rows)), masks)


RECORDS = language([5, 30, 2, 17, 17, 9, 40])


def by_transformers(model, records):
    """Loss and hits, a record at a time, through the causal model and its own labels."""
    loss = hits = 0
    with torch.no_grad():
        for ids, counted in zip(records.input_ids, records.counted, strict=True):
            tokens = torch.from_numpy(ids.astype(np.int64))[None]
            labels = torch.where(torch.from_numpy(counted)[None], tokens, -100)
            out = model.causal(input_ids=tokens, labels=labels)
            loss += float(out.loss) * counted.sum()
            hits += int((out.logits[0, :-1].argmax(1) == tokens[0, 1:])[counted[1:]].sum())
    return loss, hits


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_loss_and_hits_are_those_of_transformers(model, batch_size):
    loss, hits = by_transformers(model, RECORDS)
    result = evaluate(model, RECORDS, batch_size=batch_size)
    assert result.count == sum(int(mask.sum()) for mask in RECORDS.counted)
    assert result.loss_sum == pytest.approx(loss, rel=1e-4)
    assert result.correct == hits
    assert result.perplexity == pytest.approx(math.exp(loss / result.count), rel=1e-4)
    assert (result.score, result.weight, result.utility) == (hits, result.count, hits / result.count)


def test_few_logits_and_tokens_at_once_change_nothing(model, monkeypatch):
    expected, largest, shapes = evaluate(model, RECORDS), 7, []
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", largest * VOCABULARY)
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 34)
    real = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *given: shapes.append((given[0].shape, real(*given).shape)) or real(*given)
    )
    result = evaluate(model, RECORDS)
    assert result.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    assert (result.correct, result.count) == (expected.correct, expected.count)
    assert max(logits[0] for _, logits in shapes) == largest
    assert all(ids.numel() <= 34 or ids[0] == 1 for ids, _ in shapes), "a record alone may be longer"


def test_records_that_do_not_fit_the_memory_are_tried_again_in_halves(model, monkeypatch):
    expected, real, sizes = evaluate(model, RECORDS), model.forward, []

    def forward(ids, *rest):
        sizes.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(ids, *rest)

    monkeypatch.setattr(model, "forward", forward)
    result = evaluate(model, RECORDS)
    assert result.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    assert (result.correct, result.count) == (expected.correct, expected.count)
    assert sizes == [7, 3, 3, 1]


def test_whole_records_are_evaluated_until_the_budget_is_used_up(model):
    counts = [evaluate(model, RECORDS, max_tokens=budget).count for budget in range(0, 125, 1)]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == evaluate(model, RECORDS).count
    assert len(set(counts)) == 8, "one more record at a time"


def test_what_is_evaluated_does_not_depend_on_the_order_in_the_file(model):
    backwards = TokenisedRecords(RECORDS.input_ids[::-1], RECORDS.labels, RECORDS.units, RECORDS.counted[::-1])
    first, second = (evaluate(model, records, max_tokens=60) for records in (RECORDS, backwards))
    assert 0 < first.count < evaluate(model, RECORDS).count
    assert (first.count, first.correct) == (second.count, second.correct)
    assert first.loss_sum == pytest.approx(second.loss_sum)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_model_that_diverged_is_twice_as_bad_as_guessing(model, value):
    parameter = next(each for name, each in model.named_parameters() if "lora_B" in name)
    before = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.fill_(value)
        result = evaluate(model, RECORDS)
    finally:
        with torch.no_grad():
            parameter.copy_(before)
    assert 0 < result.loss_sum <= result.count * 2 * math.log(VOCABULARY)
    assert math.isfinite(result.perplexity)
    if not math.isfinite(value):
        assert result.perplexity == pytest.approx(VOCABULARY**2)


def test_the_model_is_left_as_it_was(model):
    model.train()
    evaluate(model, RECORDS)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_a_head_of_words_is_refused(tiny_model):
    params = LoraParams("ffa", rank=2, alpha=4.0, target_modules=("query",), layers=None, seed=1)
    encoder = build_model(load_base(tiny_model), params, num_labels=2, head_seed=0)
    with pytest.raises(ValueError, match="head of words"):
        evaluate(encoder, RECORDS)
    with pytest.raises(ValueError, match="head of words"):
        vocabulary_of(torch.nn.Linear(1, 1))


@given(st.integers(2, 24), st.integers(1, 1024), st.integers(2, 300_000))
def test_no_metric_of_a_budget_outgrows_its_slot_at_any_plan(value_bits, max_sites, vocabulary):
    packing = choose_packing(value_bits, max_sites)
    budget = token_budget(packing, vocabulary)
    largest = packing.header_bound / METRIC_SCALE
    assert budget * 2 * math.log(vocabulary) <= largest
    assert 8192 < budget <= MAX_EVALUATED_TOKENS, "the longest record a plan permits is always evaluated"


def test_at_most_sites_and_a_large_vocabulary_thousands_of_tokens_are_left():
    assert token_budget(choose_packing(13, 1024), 151_936) == 10_985
    assert token_budget(choose_packing(13, 8), 151_936) == MAX_EVALUATED_TOKENS
