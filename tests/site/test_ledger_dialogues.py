"""Dialogues by which a ledger knows data again, and that data without any is known as it always was."""

import hashlib
import hmac

import pytest

from fedseek.dialogues import Turn
from fedseek.dp.accounting import PrivacyParams
from fedseek.identity.vault import StorageKey
from fedseek.records import Records
from fedseek_site.ledger import Ledger
from fedseek_site.ledger_data import Hasher

HASHER = Hasher(bytes(32))
PARAMS = PrivacyParams(noise_multiplier=2.0, sampling_probability=0.2, delta=1e-5, l2_clip_norm=1.0)


def talk(*turns: str, system: str = "", text: str = "", unit: str | None = None) -> Records:
    """One record: a dialogue, and perhaps a text and whose it is."""
    said = tuple(Turn("assistant" if number % 2 else "user", turn) for number, turn in enumerate(turns))
    dialogue = (Turn("system", system), *said) if system else said
    return Records((text,), ("",), (unit or "0",), "患者" if unit else None, (dialogue,))


FIRST = talk("疼吗？", "疼。")
SAME = {
    "itself": FIRST,
    "under a system prompt": talk("疼吗？", "疼。", system="你是医生。"),
    "written otherwise": talk("疼吗？ ", "疼。\n"),
    "beside others": Records(("汇款", ""), ("", ""), ("0", "1"), None, ((), FIRST.dialogues[0])),
}
OTHER = {
    "another answer": talk("疼吗？", "不疼。"),
    "longer": talk("疼吗？", "疼。", "哪里？", "胸。"),
    "the same words in one turn": talk("疼吗？疼。", "疼。"),
    "the words of it as a text": Records(("疼。",), ("",), ("0",)),
    "no dialogue and no text": Records(("",), ("",), ("0",), None, ((),)),
}


@pytest.mark.parametrize("records", SAME.values(), ids=SAME)
def test_a_dialogue_is_known_again_by_what_was_said(records):
    assert HASHER.of_records(FIRST) & HASHER.of_records(records)


@pytest.mark.parametrize("records", OTHER.values(), ids=OTHER)
def test_other_words_are_another_dialogue(records):
    assert not HASHER.of_records(FIRST) & HASHER.of_records(records)


def test_texts_people_and_dialogues_all_count():
    records = talk("疼吗？", "疼。", text="胸痛三天", unit="张三")
    assert len(HASHER.of_records(records)) == 3
    assert HASHER.of_records(talk("谁？", "我。", unit="张三")) & HASHER.of_records(records)
    assert HASHER.of_records(Records(("胸痛三天",), ("急诊",), ("0",))) & HASHER.of_records(records)


def test_what_older_ledgers_hold_of_texts_and_people_is_still_found():
    found = HASHER.of_records(Records(("转账 张三",), ("欺诈",), ("张三",), "客户"))
    wanted = (b"text\0" + "转账 张三".encode(), b"unit\0" + "张三".encode())
    assert found == {hmac.digest(bytes(32), each, hashlib.sha256)[:16] for each in wanted}


def test_an_account_goes_on_with_the_dialogues_it_was_opened_with(tmp_path):
    key, path = StorageKey.generate(), tmp_path / "账.sqlite3"

    def taken(records: Records, dataset: str) -> Ledger:
        ledger = Ledger(path, key, dataset=dataset)
        ledger.take_data(records)
        return ledger

    with_history = taken(FIRST, "问答")
    with_history.spend("run-1", 1, PARAMS, 40)
    with_history.close()
    known = taken(SAME["under a system prompt"], "renamed")
    assert [spend.steps for spend in known.account().spends()] == [40]
    known.close()
    fresh = taken(OTHER["another answer"], "another")
    assert list(fresh.account().spends()) == []
    fresh.close()
