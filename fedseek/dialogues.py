"""Dialogues: who said what, read from the cells of a row.

    instruction, input, output   one question with its answer; the user says the instruction, a blank line, the input
    messages                     [{"role": "system" | "user" | "assistant", "content": TEXT}, ...]

A dialogue begins with the user, or with one system turn before; then user and assistant take turns, and the assistant has
the last word. Cells that hold anything else are refused, and named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from fedseek.errors import InvalidRecords

Role = Literal["system", "user", "assistant"]
MAX_TURNS: Final = 128  # of a dialogue
MAX_MESSAGES_BYTES: Final = 1 << 20  # of a cell that holds messages as JSON


@dataclass(frozen=True, slots=True)
class Turn:
    """What one of them said, without blanks at the ends."""

    role: Role
    text: str = field(repr=False)


Dialogue = tuple[Turn, ...]
"""Empty where a record has none."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Role
    content: str


def from_instruction(instruction: str, context: str, answer: str) -> Dialogue:
    r"""One question and its answer, in the form of Alpaca's data (Taori et al. 2023); ``context`` may be empty.

    >>> from_instruction("Is it due?", "Invoice 7: 1 May", "Yes.")[0].text
    'Is it due?\n\nInvoice 7: 1 May'
    """
    return Turn("user", f"{instruction}\n\n{context}" if context else instruction), Turn("assistant", answer)


def from_messages(cell: object, *, where: str) -> Dialogue:
    """The dialogue in a cell: a list of messages, or the JSON of one; nothing in it is no dialogue.

    Args:
        cell: as read from the file.
        where: file, row and column, for errors.

    Raises:
        InvalidRecords: not messages, an empty one, too many, or not in turns.
    """
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return ()
    turns = tuple(
        Turn(message.role, cell_text(message.content, f"{where}, message {number}"))
        for number, message in enumerate(_messages(cell, where), start=1)
    )
    _check_turns(turns, where)
    return turns


def cell_text(value: object, where: str) -> str:
    """The text of a cell, without blanks at the ends.

    Raises:
        InvalidRecords: it is empty, or no tokenizer would take it.
    """
    text = "" if value is None else str(value).strip()
    if not text:
        raise InvalidRecords(f"{where} is empty, wanted text")
    if any("\ud800" <= char <= "\udfff" for char in text):  # JSON may escape half a character; tokenizers refuse it
        raise InvalidRecords(f"{where} holds half a character (a lone surrogate)")
    return text


def is_blank(value: object) -> bool:
    """Whether a cell has nothing in it."""
    return value is None or not str(value).strip()


def _messages(cell: object, where: str) -> list[_Message]:
    try:
        if isinstance(cell, str):
            if len(cell) > MAX_MESSAGES_BYTES:
                raise InvalidRecords(f"{where}: got {len(cell)} characters, wanted at most {MAX_MESSAGES_BYTES}")
            return msgspec.json.decode(cell, type=list[_Message])
        return msgspec.convert(cell, type=list[_Message])
    # RecursionError: brackets without end; UnicodeEncodeError: half a character
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidRecords(
            f"{where}: not messages: {type(error).__name__ if isinstance(error, UnicodeEncodeError) else error}",
            hint='wanted [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], in CSV as JSON',
        ) from None


def _check_turns(turns: Dialogue, where: str) -> None:
    if len(turns) > MAX_TURNS:
        raise InvalidRecords(f"{where}: got {len(turns)} messages, wanted at most {MAX_TURNS}")
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        raise InvalidRecords(
            f"{where}: got messages of {shown or 'nobody'}",
            hint="wanted user and assistant in turns, the assistant last; at most one system message, before them",
        )
