"""Tokenise: records as numbers, with the base model's own tokenizer.

    task       of each record                 what the loss is over
    classify   its text                       its label
    continue   its text, end of text          every token but the first
    instruct   its dialogue, as the model's   the answers, each with the token that ends it
               own chat template writes it

A record stays one record: none is packed into a row with others and none is cut into several, so that its gradient is its
own. What is longer than ``max_tokens`` is cut: a text at its end; a dialogue so that half of the tokens, if need be, are left
to its last answer, and before it stands the end of what was said. A record that lacks what its task needs is left out.

In texts and dialogues a word that looks like a special token (``<|im_end|>``) is letters like any other: nobody ends a turn
from within it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedseek.dialogues import Dialogue, Turn
from fedseek.errors import InvalidRecords, WrongModel
from fedseek.plan_spec import Task
from fedseek.records import Records, TokenisedRecords

TokenIds = npt.NDArray[np.int32]
Counted = npt.NDArray[np.bool_]
Span = tuple[int, int]  # of tokens: first, and one after the last

# for a model without a chat template: a line that says who speaks, what is said, a blank line
PLAIN_TEMPLATE: Final = (
    "{{ begin }}{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
# some templates (Llama 3) write today's date, and the sites of a run do not all begin it on one day
_DATE: Final = "26 Jul 2024"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A dialogue up to its last answer, for a model to answer.

    Attributes:
        input_ids: token ids up to where the answer begins, int32, shape (num_tokens,).
        reference: the answer in the records.
        text: what the user said last.
    """

    input_ids: TokenIds = field(repr=False)
    reference: str = field(repr=False)
    text: str = field(repr=False)


def tokenise(
    records: Records, model_dir: Path, *, task: Task = "classify", labels: Sequence[str] = (), max_tokens: int
) -> TokenisedRecords:
    """Those records that have what ``task`` needs, as token ids; the others are left out.

    Args:
        records: of one site.
        model_dir: folder of the base model.
        task: what is learned from them.
        labels: of the plan, for ``classify``.
        max_tokens: of the plan.

    Returns:
        In the order of ``records``; units are numbered anew, densely. In language tasks each has a token that counts.

    Raises:
        WrongModel: the tokenizer has no end of text, or its chat template does not show where an answer begins and ends.
        InvalidRecords: the chat template refuses a dialogue.
    """
    tokenizer = _load_tokenizer(model_dir)
    chosen = records.of_task(task)
    if task == "classify":
        encoded = tokenizer(list(chosen.texts), truncation=True, max_length=max_tokens)["input_ids"] if chosen else []
        rows = [(np.asarray(ids, dtype=np.int32), np.ones(len(ids), np.bool_)) for ids in encoded]
    elif task == "continue":
        rows = _continued(tokenizer, chosen.texts, max_tokens)
    else:
        written = _written_out(tokenizer, chosen.dialogues)
        rows = [_cut(ids, answers, max_tokens) for ids, answers in written]
    # a text of characters that the tokenizer drops has nothing to learn from
    fit = [row for row, (_, counted) in enumerate(rows) if counted.any()]
    return _numbered(chosen.take(fit), [rows[row] for row in fit], labels if task == "classify" else None)


def prompts(records: Records, model_dir: Path, *, max_tokens: int) -> list[Prompt]:
    """What comes before the last answer of each dialogue, as a model is asked for it; of more than ``max_tokens`` the last.

    Raises:
        WrongModel, InvalidRecords: as :func:`tokenise`.
    """
    dialogues = records.of_task("instruct").dialogues
    written = _written_out(_load_tokenizer(model_dir), dialogues)
    return [
        Prompt(ids[: answers[-1][0]][-max_tokens:], reference=dialogue[-1].text, text=dialogue[-2].text)
        for dialogue, (ids, answers) in zip(dialogues, written, strict=True)
    ]


def _load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        model_dir, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _numbered(
    records: Records, rows: Sequence[tuple[TokenIds, Counted]], labels: Sequence[str] | None
) -> TokenisedRecords:
    index = {label: number for number, label in enumerate(labels or ())}
    dense = {unit: number for number, unit in enumerate(dict.fromkeys(records.units))}
    learned = [0] * len(rows) if labels is None else [index[label] for label in records.labels]
    return TokenisedRecords(
        input_ids=[ids for ids, _ in rows],
        labels=np.asarray(learned, dtype=np.int64),
        units=np.asarray([dense[unit] for unit in records.units], dtype=np.int64),
        counted=[counted for _, counted in rows] if labels is None else None,
    )


# --- continue


def _continued(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> list[tuple[TokenIds, Counted]]:
    """Each text with the token that ends it, if it is not cut before; all tokens count but the first."""
    end = _end_of_text(tokenizer)
    encoded = tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"] if texts else []
    rows = []
    for ids in encoded:
        whole = ids if ids[-1:] == [end] else [*ids, end]
        row = np.asarray(whole[:max_tokens], dtype=np.int32)
        rows.append((row, np.arange(len(row)) > 0))
    return rows


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise WrongModel(
            "the base model's tokenizer names no token that ends a text",
            hint="without one a model that writes would not stop; name eos_token in its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


# --- instruct


def _written_out(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue]
) -> list[tuple[TokenIds, list[Span]]]:
    """Each dialogue as token ids to the end of its last answer, and where its answers are.

    An answer begins where the model would be asked for it: the tokens of what was said before, with the opening of an
    answer, have to be the first tokens of the dialogue. It ends with the first special token after that.
    """
    if not dialogues:
        return []
    _end_of_text(tokenizer)
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    _check_turns_end(tokenizer, special)
    places = [
        (row, place)
        for row, dialogue in enumerate(dialogues)
        for place, turn in enumerate(dialogue)
        if turn.role == "assistant"
    ]
    before = _render(tokenizer, [dialogues[row][:place] for row, place in places], ask=True)
    whole = _render(tokenizer, dialogues)
    spans: list[list[Span]] = [[] for _ in dialogues]
    for (row, _), asked in zip(places, before, strict=True):
        spans[row].append((len(asked), _end_of_answer(whole[row], asked, special)))
    return [(np.asarray(ids[: s[-1][1]], dtype=np.int32), s) for ids, s in zip(whole, spans, strict=True)]


def _end_of_answer(ids: list[int], asked: list[int], special: set[int]) -> int:
    """One after the token that ends the answer to ``asked``, in the tokens of the dialogue."""
    if ids[: len(asked)] != asked:
        raise WrongModel(
            "the base model's chat template writes what comes before an answer otherwise once the answer is there",
            hint="such a template cannot say which tokens are the answer; use a model, or a chat_template, without that",
        )
    end = next((place for place in range(len(asked), len(ids)) if ids[place] in special), None)
    if end is None:
        raise WrongModel(
            "the base model's chat template ends an answer without a special token",
            hint="a model trained on such answers would not stop; let the chat_template write the end-of-text token",
        )
    return end + 1


def _check_turns_end(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> None:
    """Does an answer end before the user speaks again? Seen on two dialogues that differ from there on."""
    first = (Turn("user", "0"), Turn("assistant", "1"))
    one, other = _render(tokenizer, [(*first, Turn("user", said), Turn("assistant", "1")) for said in ("2", "3")])
    asked = _render(tokenizer, [first[:1]], ask=True)[0]
    alike = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    if _end_of_answer(one, asked, special) > alike:
        raise WrongModel(
            "the base model's chat template ends only the last answer with a special token",
            hint="the user's next words would count as part of the answer; let the chat_template end every answer",
        )


def _render(tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue], *, ask: bool = False) -> list[list[int]]:
    """Token ids as the chat template writes them; with ``ask``, and the opening of an answer.

    Special tokens that a text spells out are taken as letters. The tokenizer does that one dialogue at a time, so those
    without any, which are nearly all, go apart, in one batch.
    """
    spelt = re.compile("|".join(map(re.escape, tokenizer.added_tokens_encoder)) or "(?!)")
    odd = [any(spelt.search(turn.text) for turn in dialogue) for dialogue in dialogues]
    rendered: list[list[int]] = [[] for _ in dialogues]
    for is_odd in (False, True):
        rows = [row for row, each in enumerate(odd) if each == is_odd]
        for row, ids in zip(rows, _apply(tokenizer, [dialogues[row] for row in rows], ask, is_odd), strict=True):
            rendered[row] = ids
    return rendered


def _apply(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue], ask: bool, sanitise: bool
) -> list[list[int]]:
    if not dialogues:
        return []
    messages = [[{"role": turn.role, "content": turn.text} for turn in dialogue] for dialogue in dialogues]
    own = tokenizer.chat_template is not None
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            chat_template=None if own else PLAIN_TEMPLATE,
            add_generation_prompt=ask,
            sanitize_control_tokens=sanitise,
            tokenizer_kwargs={"verbose": False},
            date_string=_DATE,
            **({} if own else {"begin": _beginning(tokenizer)}),
        )
    except (TemplateError, ValueError) as error:
        raise InvalidRecords(f"the base model's chat template refuses a dialogue: {error}") from None
    rendered: list[list[int]] = encoded["input_ids"]
    return rendered


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the tokenizer puts before every text, which a chat template has to write by itself; or nothing."""
    starts = tokenizer.bos_token_id is not None and tokenizer("0")["input_ids"][0] == tokenizer.bos_token_id
    return str(tokenizer.bos_token) if starts else ""


def _cut(ids: TokenIds, answers: Sequence[Span], max_tokens: int) -> tuple[TokenIds, Counted]:
    """At most ``max_tokens`` of a dialogue, and which of them count: those of answers.

    The last answer is kept as far as it fits after all that was said before, and at least half of ``max_tokens`` of it;
    what was said before is cut at its beginning. Other answers count as far as they are still there.
    """
    counted = np.zeros(len(ids), np.bool_)
    for first, end in answers:
        counted[first:end] = True
    begin, end = answers[-1]
    end = min(end, begin + max(max_tokens - begin, max_tokens // 2))
    start = max(0, end - max_tokens)
    counted[start] = False  # nothing is left before it to predict it from
    return ids[start:end], counted[start:end]
