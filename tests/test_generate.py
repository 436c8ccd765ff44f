"""Greedy answers: as transformers writes them one by one, with the adapter or without it, stopped where an answer ends."""

import numpy as np
import pytest
import torch

import fedseek.generate as module
from fedseek.errors import UnsupportedMechanism
from fedseek.generate import base_model, choose_prompts, generate_answers
from fedseek.lora.load import load_base
from fedseek.lora.model import LoraParams, build_model
from fedseek.tokenise import Prompt

SPECIAL, END_OF_TURN = (0, 1, 2), 2  # <|im_end|>
MOST = 12


def made(folder, *, method="ffa", seed=3):
    params = LoraParams(
        method, rank=4, alpha=32.0, target_modules=("q_proj", "v_proj", "down_proj"), layers=None, seed=1
    )
    built = build_model(load_base(folder, words=True), params, num_labels=None, head_seed=0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name or "prompt_encoder" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return built


@pytest.fixture(scope="module")
def model(tiny_causal):
    return made(tiny_causal)


@pytest.fixture(scope="module")
def tokenizer(tiny_causal):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_causal)


def prompts_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Prompt(rng.integers(3, 300, 3 + 2 * number).astype(np.int32), f"answer {number}", f"提问 {number}")
        for number in range(count)
    ]


def one_by_one(model, tokenizer, prompt):
    """The likeliest token of the model's own forward pass, again and again."""
    ids = torch.from_numpy(prompt.input_ids.astype(np.int64))[None]
    written = []
    with torch.no_grad():
        while len(written) < MOST:
            counted = torch.zeros(1, ids.shape[1] + 1, dtype=torch.bool)
            counted[0, -1] = True  # the token to come
            longer = torch.cat([ids, torch.zeros(1, 1, dtype=torch.int64)], 1)
            token = int(model(longer, torch.ones_like(longer), counted).argmax())
            if token in SPECIAL:
                break
            written.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return tokenizer.decode(written, skip_special_tokens=True).strip()


def texts(model, tiny_causal, prompts):
    return generate_answers(model, prompts, tiny_causal, max_new_tokens=MOST).texts


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_batches_padded_on_the_left_write_what_the_trained_model_finds_likeliest(
    model, tokenizer, tiny_causal, monkeypatch, at_once
):
    monkeypatch.setattr(module, "_PROMPTS_AT_ONCE", at_once)
    prompts = prompts_of(6)
    expected = tuple(one_by_one(model, tokenizer, prompt) for prompt in prompts)
    assert any(expected)
    assert texts(model, tiny_causal, prompts) == expected


def test_few_tokens_at_once_change_nothing(model, tiny_causal, monkeypatch):
    expected = texts(model, tiny_causal, prompts_of(5))
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 1)
    assert texts(model, tiny_causal, prompts_of(5)) == expected


def test_prompts_that_do_not_fit_the_memory_are_tried_again_in_halves(model, tiny_causal, monkeypatch):
    expected, real, sizes = texts(model, tiny_causal, prompts_of(5)), model.causal.generate, []

    def generate(**given):
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(**given)

    monkeypatch.setattr(model.causal, "generate", generate)
    assert texts(model, tiny_causal, prompts_of(5)) == expected
    assert sizes == [5, 2, 2, 1]


def test_what_is_written_is_the_adapters_and_without_it_the_base_models(model, tiny_causal, tokenizer):
    prompts = prompts_of(6)
    plain = load_base(tiny_causal, words=True)
    base = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.input_ids.astype(np.int64))[None]
        out = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MOST,
            do_sample=False,
            eos_token_id=[0, 1, 2],
            pad_token_id=0,
        )
        base.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    with base_model(model):
        assert texts(model, tiny_causal, prompts) == tuple(base)
    assert texts(model, tiny_causal, prompts) != tuple(base)


@pytest.mark.parametrize("method", ["ffa", "both"])
def test_the_block_without_the_adapter_leaves_everything_as_it_was(tiny_causal, method):
    model = made(tiny_causal, method=method)
    model.train()
    before = {name: (each.requires_grad, each.detach().clone()) for name, each in model.named_parameters()}
    with base_model(model):
        texts(model, tiny_causal, prompts_of(1))
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0], name
        assert torch.equal(parameter, before[name][1]), name


def test_an_error_in_the_block_brings_the_adapter_back(model, tiny_causal):
    expected = texts(model, tiny_causal, prompts_of(3))
    with pytest.raises(RuntimeError, match="on purpose"), base_model(model):
        raise RuntimeError("on purpose")
    assert texts(model, tiny_causal, prompts_of(3)) == expected
    assert not any(each.requires_grad for name, each in model.named_parameters() if "lora_A" in name)


def test_an_answer_ends_at_the_end_of_a_turn_and_at_the_most(model, tiny_causal, monkeypatch):
    prompt = prompts_of(1)[0]

    def write(*, eos_token_id, max_new_tokens, input_ids, **rest):
        assert END_OF_TURN in eos_token_id
        row = [70, 71, END_OF_TURN, 72, 73][:max_new_tokens]
        return torch.cat([input_ids, torch.tensor([row])], 1)

    monkeypatch.setattr(model.causal, "generate", write)
    long, short = (generate_answers(model, [prompt], tiny_causal, max_new_tokens=n).texts[0] for n in (5, 1))
    assert len(long) == 2, "both tokens are of one character here"
    assert long[0] == short


def test_any_special_token_ends_an_answer_and_what_the_models_own_settings_name(model, tokenizer, monkeypatch):
    for named, ends in ((None, SPECIAL), (2, SPECIAL), ([2, 77], (*SPECIAL, 77))):
        monkeypatch.setattr(model.causal.generation_config, "eos_token_id", named)
        assert module._ends(model, tokenizer) == ends


def test_sampling_and_penalties_in_the_models_own_settings_change_nothing(model, tiny_causal, monkeypatch):
    expected = texts(model, tiny_causal, prompts_of(4))
    for name, value in {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0}.items():
        monkeypatch.setattr(model.causal.generation_config, name, value)
    monkeypatch.setattr(model.causal.generation_config, "no_repeat_ngram_size", 1)
    assert texts(model, tiny_causal, prompts_of(4)) == expected


def test_scores_are_summed(model, tiny_causal):
    prompts = prompts_of(4)
    written = texts(model, tiny_causal, prompts)
    right = [Prompt(prompt.input_ids, text, "") for prompt, text in zip(prompts, written, strict=True)]
    answers = generate_answers(model, right, tiny_causal, max_new_tokens=MOST)
    assert (answers.exact, answers.f1, answers.rouge_l, answers.count) == (4, 4, 4, 4)


def test_no_prompts(model, tiny_causal):
    assert generate_answers(model, [], tiny_causal, max_new_tokens=MOST).count == 0


def test_rows_are_chosen_by_a_hash_and_not_by_their_place():
    prompts = prompts_of(20)
    chosen = choose_prompts(prompts, 6)
    assert len(chosen) == 6
    assert chosen == choose_prompts(prompts[::-1], 6) == choose_prompts(prompts, 20)[:6]
    assert set(map(id, chosen)) != set(map(id, prompts[:6]))
    assert choose_prompts(prompts, 0) == ()


def test_texts_do_not_show_in_what_is_printed(model, tiny_causal):
    answers = generate_answers(model, prompts_of(2), tiny_causal, max_new_tokens=MOST)
    assert not any(text and text in repr(answers) for text in answers.texts)
    assert "提问" not in repr(prompts_of(1)[0])


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_answers_show_vectors_in_front_as_the_models_own_forward_pass_does(tiny_causal, tokenizer, method):
    adapted, prompts = made(tiny_causal, method=method), prompts_of(4)
    with base_model(adapted):
        without = generate_answers(adapted, prompts, tiny_causal, max_new_tokens=MOST).texts
    shown = generate_answers(adapted, prompts, tiny_causal, max_new_tokens=MOST).texts
    assert shown == tuple(one_by_one(adapted, tokenizer, prompt) for prompt in prompts)
    untouched = made(tiny_causal)  # LoRA with its adapter off is the base model
    with base_model(untouched):
        assert without == generate_answers(untouched, prompts, tiny_causal, max_new_tokens=MOST).texts
    assert without != shown


def test_an_encoder_cannot_answer(tiny_model, tiny_causal):
    params = LoraParams("ffa", rank=2, alpha=4.0, target_modules=("query",), layers=None, seed=1)
    encoder = build_model(load_base(tiny_model), params, num_labels=2, head_seed=0)
    with pytest.raises(UnsupportedMechanism, match="no head of words"):
        generate_answers(encoder, prompts_of(1), tiny_causal, max_new_tokens=MOST)
