"""Generate: the answers that a model gives to prompts of rows held back, compared with those in the records.

Greedy decoding: the likeliest token each time, up to the end of the answer. Nothing is drawn, so the same weights give the
same answers, and base model and adapter are compared on the same prompts. Run by a site, on a bounded sample; what comes
out is text made of records, for the site's own people.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from fedseek.answers import score_answer
from fedseek.batches import Indices
from fedseek.errors import UnsupportedMechanism
from fedseek.lora.model import AdapterModel
from fedseek.physical_batch import PhysicalBatch, in_pieces
from fedseek.tokenise import Prompt

_PROMPTS_AT_ONCE: Final = 8
_TOKENS_AT_ONCE: Final = 1 << 14  # of prompts and answers, padding included


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model wrote to some prompts, and how good that was.

    Attributes:
        texts: one a prompt.
        exact, f1, rouge_l: of ``fedseek.answers``, summed over the prompts.
    """

    texts: tuple[str, ...] = field(repr=False)
    exact: float = 0.0
    f1: float = 0.0
    rouge_l: float = 0.0

    @property
    def count(self) -> int:
        """Prompts."""
        return len(self.texts)


def choose_prompts(prompts: Sequence[Prompt], rows: int) -> tuple[Prompt, ...]:
    """The first ``rows`` by a hash of the record: as by lot, and the same ones each time."""
    return tuple(sorted(prompts, key=_lot)[:rows])


def generate_answers(model: AdapterModel, prompts: Sequence[Prompt], folder: Path, *, max_new_tokens: int) -> Answers:
    """Let the model answer, with the adapter as it is.

    Args:
        model: with a head of words; left unchanged.
        prompts: any number; they are answered a few at a time, padded on the left, or one by one behind vectors.
        folder: of the base model, whose tokenizer turns tokens into text.
        max_new_tokens: an answer that has not ended by then is cut.

    Raises:
        UnsupportedMechanism: the model has no head of words.
        OutOfMemory: one prompt alone does not fit; more at once are tried again in halves.
    """
    if model.causal is None:
        raise UnsupportedMechanism("the model has no head of words: it cannot answer")
    from transformers import AutoTokenizer  # takes seconds to import; only sites and simulations need it

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ends = _ends(model, tokenizer)
    texts: list[str] = []

    def take(some: Indices) -> None:
        for tokens in _generate(model, [prompts[number] for number in some], ends, max_new_tokens):
            texts.append(str(tokenizer.decode(_until_end(tokens, ends), skip_special_tokens=True)).strip())

    # peft puts a prompt's vectors in front of the padding, and counts the text's positions from there
    batch = PhysicalBatch(1 if _has_vectors(model) else _at_once(prompts, max_new_tokens))
    with _evaluation_mode(model), torch.inference_mode():
        in_pieces(np.arange(len(prompts)), batch, take=take, forget=lambda: None)
    scores = [score_answer(text, prompt.reference) for text, prompt in zip(texts, prompts, strict=True)]
    return Answers(
        texts=tuple(texts),
        exact=sum(each.exact for each in scores),
        f1=sum(each.f1 for each in scores),
        rouge_l=sum(each.rouge_l for each in scores),
    )


@contextmanager
def base_model(model: AdapterModel) -> Iterator[None]:
    """The model without its adapter, for the block; of vectors, only what it generates is without them."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # matrices are in the encoder's layers, which the writer shares; vectors are put in front by the writer itself
    holder = model.causal if model.causal is not None and _has_vectors(model) else model.encoder
    try:
        with holder.disable_adapter():
            yield
    finally:
        for name, parameter in model.named_parameters():
            if (
                parameter.requires_grad != trained[name]
            ):  # switched on again, PEFT trains all of an adapter, a frozen A too
                parameter.requires_grad_(trained[name])


def _has_vectors(model: AdapterModel) -> bool:
    return any(config.is_prompt_learning for config in model.encoder.peft_config.values())


def _generate(model: AdapterModel, prompts: Sequence[Prompt], ends: Sequence[int], max_new_tokens: int) -> list[Any]:
    """Tokens written to each of the prompts, what follows the end included."""
    causal, device = model.causal, next(model.parameters()).device
    longest = max(len(prompt.input_ids) for prompt in prompts)
    ids, mask = np.zeros((len(prompts), longest), np.int64), np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.input_ids) :] = prompt.input_ids
        mask[row, longest - len(prompt.input_ids) :] = 1
    # what the model's own generation_config.json says of sampling and penalties is not wanted: greedy is what is compared
    written = causal.generate(  # type: ignore[union-attr]
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        max_new_tokens=max_new_tokens,
        max_length=None,
        min_length=0,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    return list(written[:, longest:].tolist())


def _at_once(prompts: Sequence[Prompt], max_new_tokens: int) -> int:
    """As many prompts as their tokens permit, and at least one."""
    longest = max((len(prompt.input_ids) for prompt in prompts), default=0)
    return max(1, min(_PROMPTS_AT_ONCE, _TOKENS_AT_ONCE // (longest + max_new_tokens)))


def _ends(model: AdapterModel, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: any special one, as in the answers that a site trains on (``fedseek.tokenise``)."""
    named = getattr(model.causal, "generation_config", None)
    ids = named.eos_token_id if named is not None else None
    ends = {*(ids if isinstance(ids, list | tuple) else [ids]), tokenizer.eos_token_id, *tokenizer.all_special_ids}
    ends |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted(ends - {None}))


def _until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends the answer."""
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:first])


def _lot(prompt: Prompt) -> bytes:
    # JSON, so that no text can move over into the tokens
    document = json.dumps(["fedseek/answers/v1", prompt.input_ids.tolist(), prompt.reference])
    return sha256(document.encode()).digest()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
