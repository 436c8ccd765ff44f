"""Plans and data of sites that learn words: dialogues and texts in which the name of the site is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedseek.dialogues import Turn
from fedseek.lora.source import model_digest
from fedseek.records import Records
from fedseek_site.admission import SiteData


def language_changes(folder: Path, *, hospital: str = "continue", **changes: Any) -> dict[str, Any]:
    """What to change of a tiny plan: banks answer instructions, hospitals do ``hospital``."""
    generation = {"rows": 4, "max_new_tokens": 8}
    document: dict[str, Any] = {
        "model": {"source": f"path:{folder}", "sha256": model_digest(folder), "family": "qwen2", "max_tokens": 40},
        "kinds": {"bank": {"task": "instruct", "generation": generation}, "hospital": {"task": hospital}},
        "lora": {"rank": 2, "alpha": 4.0, "target_modules": "auto"},
    }
    for key, value in changes.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    return document


def language_data(name: str, *, train: int = 12, held_back: int = 6) -> SiteData:
    """Records with a text and a dialogue each."""
    return SiteData(_records(name, "训练", train), _records(name, "保留", held_back))


def _records(name: str, part: str, count: int) -> Records:
    said = [f"{part} {name} 问题 {number}" for number in range(count)]
    answered = [f"{part} {name} 答复 {number}" for number in range(count)]
    return Records(
        texts=tuple(f"{question}。{answer}。" for question, answer in zip(said, answered, strict=True)),
        labels=("",) * count,
        units=tuple(str(number) for number in range(count)),
        dialogues=tuple(
            (Turn("user", question), Turn("assistant", answer)) for question, answer in zip(said, answered, strict=True)
        ),
    )
