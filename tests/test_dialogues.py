import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.dialogues import MAX_MESSAGES_BYTES, MAX_TURNS, Turn, from_instruction, from_messages
from fedseek.errors import InvalidRecords
from fedseek.records import Columns, Records, cap_records, read_rows, to_records

WHERE = "问答.csv, row 3: column '对话'"
ALPACA = Columns(None, None, "患者", "问题", "背景", "回答")
MESSAGES = Columns(None, None, messages="对话")


def message(role, content):
    return {"role": role, "content": content}


def messages(*roles):
    return [message(role, f"第{number}句") for number, role in enumerate(roles)]


def refused(call, *args, **kwargs):
    with pytest.raises(InvalidRecords) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# --- one question


def test_a_question_with_its_answer_is_two_turns():
    rows = [
        {"问题": " 胸痛怎么办？ ", "背景": "", "回答": "立即就医。", "患者": "甲"},
        {"问题": "余额是多少？", "背景": "账户 A：一千元", "回答": "一千元。", "患者": "乙"},
    ]
    records = to_records(rows, ALPACA, labels=(), source="问答.jsonl")
    assert records.dialogues == (
        (Turn("user", "胸痛怎么办？"), Turn("assistant", "立即就医。")),
        (Turn("user", "余额是多少？\n\n账户 A：一千元"), Turn("assistant", "一千元。")),
    )
    assert (records.texts, records.labels, records.units) == (("", ""), ("", ""), ("甲", "乙"))


@pytest.mark.parametrize("column", ["问题", "回答"])
@pytest.mark.parametrize("value", ["", "  ", None])
def test_a_question_without_an_answer_and_an_answer_without_a_question_are_refused(column, value):
    row = {"问题": "q", "背景": None, "回答": "a", "患者": "甲", column: value}
    assert f"s, row 1: column '{column}' is empty" in refused(to_records, [row], ALPACA, labels=(), source="s")


def test_a_question_may_have_no_column_of_input():
    columns = Columns(None, None, instruction="q", output="a")
    records = to_records([{"q": "甲", "a": "乙"}], columns, labels=(), source="s")
    assert records.dialogues == (from_instruction("甲", "", "乙"),)


# --- messages


def test_messages_are_read_from_lists_and_from_json():
    turns = messages("system", "user", "assistant", "user", "assistant")
    read = from_messages(turns, where=WHERE)
    assert (
        read
        == from_messages(json.dumps(turns), where=WHERE)
        == from_messages(json.dumps(turns, ensure_ascii=False), where=WHERE)
    )
    assert [turn.role for turn in read] == ["system", "user", "assistant", "user", "assistant"]
    assert read[1].text == "第1句"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_messages_come_in_every_kind_of_file(tmp_path, ending):
    import csv

    import pyarrow
    import pyarrow.parquet

    rows = [{"对话": messages("user", "assistant")}, {"对话": messages("system", "user", "assistant")}]
    path = tmp_path / f"对话.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["对话"])
            writer.writeheader()
            writer.writerows({"对话": json.dumps(row["对话"], ensure_ascii=False)} for row in rows)
    records = to_records(read_rows(path), MESSAGES, labels=(), source=str(path))
    assert [[turn.role for turn in dialogue] for dialogue in records.dialogues] == [
        ["user", "assistant"],
        ["system", "user", "assistant"],
    ]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ([], "got messages of nobody"),
        (messages("user"), "got messages of user"),
        (messages("assistant"), "got messages of assistant"),
        (messages("system"), "got messages of system"),
        (messages("assistant", "user"), "got messages of assistant, user"),
        (messages("user", "user", "assistant"), "got messages of user, user, assistant"),
        (messages("user", "assistant", "user"), "got messages of user, assistant, user"),
        (messages("system", "system", "user", "assistant"), "got messages of system, system, user"),
        (messages("user", "system", "assistant"), "got messages of user, system"),
        (messages(*["user", "assistant"] * (MAX_TURNS // 2 + 1)), f"wanted at most {MAX_TURNS}"),
        (messages("user", "tool"), "not messages"),
        ([message("user", "a"), {"role": "assistant"}], "not messages"),
        ([message("user", "a"), message("assistant", 1)], "not messages"),
        ([message("user", "a"), {**message("assistant", "b"), "weight": 1}], "not messages"),
        ([message("user", "a"), message("assistant", " \n")], "message 2 is empty"),
        ([message("user", "\ud83d"), message("assistant", "b")], "message 1 holds half a character"),
        ({"role": "user", "content": "a"}, "not messages"),
        (7, "not messages"),
        ("不是 JSON", "not messages"),
        ("[" * 100_000, "not messages"),
        ('[{"role": "user", "content": "\\ud83d"}]', "half a character|not messages"),
        (" " * MAX_MESSAGES_BYTES + "[]", "wanted at most"),
        ("\ud83d[]", "not messages"),
    ],
    ids=range(23),
)
def test_whatever_is_not_a_dialogue_is_refused_by_file_row_and_column(cell, said):
    with pytest.raises(InvalidRecords, match=said) as caught:
        from_messages(cell, where=WHERE)
    assert caught.value.message.startswith(WHERE)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    )
)
def test_any_cell_is_a_dialogue_or_refused(cell):
    for given_cell in (cell, json.dumps(cell)):
        try:
            dialogue = from_messages(given_cell, where=WHERE)
        except InvalidRecords:
            continue
        assert dialogue == () or dialogue[-1].role == "assistant"


# --- records of several kinds


def test_a_row_may_have_a_text_or_a_dialogue_or_both():
    columns = Columns("text", "label", messages="对话")
    talk = messages("user", "assistant")
    rows = [
        {"text": "汇款", "label": "欺诈", "对话": None},
        {"text": None, "label": None, "对话": talk},
        {"text": "转账", "label": "", "对话": talk},
    ]
    records = to_records(rows, columns, labels=["欺诈", "正常"], source="s")
    assert records.texts == ("汇款", "", "转账")
    assert [bool(dialogue) for dialogue in records.dialogues] == [False, True, True]
    assert records.of_task("classify").texts == ("汇款",)
    assert records.of_task("continue").units == ("0", "2")
    assert records.of_task("instruct").units == ("1", "2")
    assert "column 'text' is empty" in refused(
        to_records, [*rows, {"text": "", "label": "", "对话": ""}], columns, labels=["欺诈"], source="s"
    )


def test_a_row_without_a_dialogue_is_refused_where_there_is_no_text_either():
    said = refused(to_records, [{"对话": None}], MESSAGES, labels=(), source="s")
    assert "s, row 1: column '对话' is empty, wanted a dialogue" in said


def test_every_named_column_is_in_every_row():
    said = refused(to_records, [{"问题": "q", "回答": "a", "患者": "甲"}], ALPACA, labels=(), source="s")
    assert "row 1: no column '背景'" in said


def test_a_text_without_a_label_is_part_of_tasks_that_need_none():
    rows = [{"text": "汇款", "label": "欺诈"}, {"text": "转账", "label": None}]
    records = to_records(rows, Columns("text", "label"), labels=["欺诈"], source="s")
    assert len(records.of_task("classify")) == 1
    assert len(records.of_task("continue")) == 2
    assert len(records.of_task("instruct")) == 0
    assert to_records(rows, Columns("text", None), labels=(), source="s").labels == ("", "")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (Columns(None, None), "no column of texts"),
        (Columns(None, None, messages="m", instruction="i", output="o"), "messages: given beside"),
        (Columns(None, None, instruction="i"), "wanted both columns"),
        (Columns("t", "l", output="o"), "wanted both columns"),
        (Columns("t", "l", input="i"), "an input only beside"),
        (Columns("t", "l", messages="m"), None),
        (Columns("o", None, instruction="i", output="o"), None),
    ],
    ids=["nothing", "both", "no output", "no instruction", "input alone", "all", "one column twice"],
)
def test_columns_that_do_not_fit_together_are_told(columns, said):
    problems = columns.problems()
    assert (said is None) == (problems == [])
    assert said is None or said in problems[0]


def test_nothing_said_shows_in_a_repr():
    records = to_records([{"对话": messages("user", "assistant")}], MESSAGES, labels=(), source="s")
    assert "第" not in repr(records) + repr(records.dialogues)


# --- so many records of a patient


def talks(*answers, units=None):
    dialogues = tuple((Turn("user", "胸痛"), Turn("assistant", answer)) for answer in answers)
    return Records(("",) * len(answers), ("",) * len(answers), units or ("甲",) * len(answers), "患者", dialogues)


def test_dialogues_are_drawn_by_what_was_said_and_in_any_order():
    answers = [f"答{number}" for number in range(9)]
    kept = cap_records(talks(*answers), 3, seed=5)
    again = cap_records(talks(*reversed(answers)), 3, seed=5)
    assert len(kept) == 3
    assert set(kept.dialogues) == set(again.dialogues)
    assert kept.dialogues != cap_records(talks(*answers), 3, seed=6).dialogues
    assert kept.unit_column == "患者"


def test_equal_dialogues_are_each_drawn_once():
    kept = cap_records(talks("同", "同", "同", "异"), 3, seed=0)
    assert len(kept) == 3


def test_records_of_one_task_keep_whose_they_are():
    records = talks("一", "二", units=("乙", "甲"))
    assert records.of_task("instruct") == records
    assert records.of_task("instruct").as_single_records().dialogues == records.dialogues
    assert records.take([1]).units == ("甲",)
