import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.errors import InvalidRecords
from fedseek.records import Columns, Records, read_rows, to_records
from fedseek.tokenise import tokenise

ROWS = [
    {"text": "转账 to 张三", "label": "欺诈", "customer": "客一"},
    {"text": "balance?", "label": "正常", "customer": "客二"},
    {"text": "再转一次", "label": "欺诈", "customer": "客一"},
]
LABELS = ("欺诈", "正常")
COLUMNS = Columns("text", "label", "customer")


def refused(call, *arguments, **options) -> str:
    with pytest.raises(InvalidRecords) as caught:
        call(*arguments, **options)
    return str(caught.value)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def as_jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows) -> str:
    quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows]
    return "\n".join([",".join(rows[0]), *quoted]) + "\n"


def write_all(folder: Path, rows) -> list[Path]:
    """The same rows in each format."""
    parquet = folder / "记录.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    return [write(folder, "记录.jsonl", as_jsonl(rows)), write(folder, "记录.csv", as_csv(rows)), parquet]


# --- reading


def test_every_format_gives_the_same_rows_with_chinese_text_and_file_names(tmp_path):
    for path in write_all(tmp_path, ROWS):
        assert [dict(row) for row in read_rows(path)] == ROWS, path


AWKWARD = '两行\n第二行, "引号" and \u2028 \u2029 \x85 \x0b \x0c \x1c then more'


def test_line_breaks_quotes_and_unicode_separators_inside_a_text_survive_every_format(tmp_path):
    rows = [{"text": AWKWARD, "label": "欺诈", "customer": "客一"}, ROWS[1]]
    for path in write_all(tmp_path, rows):
        assert [dict(row) for row in read_rows(path)] == rows, path


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_an_unquoted_separator_does_not_split_a_csv_row(tmp_path, character):
    path = write(tmp_path, "a.csv", f"text,label\n前{character}后,欺诈\n")
    assert read_rows(path) == [{"text": f"前{character}后", "label": "欺诈"}]


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_text_survives_jsonl_and_quoted_csv(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"text": text, "label": "x"}]
    assert read_rows(write(folder, "a.jsonl", as_jsonl(rows))) == rows
    assert read_rows(write(folder, "a.csv", as_csv(rows))) == rows


@pytest.mark.parametrize(("name", "dump"), [("a.jsonl", as_jsonl), ("a.csv", as_csv)])
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path, name, dump):
    content = b"\xef\xbb\xbf" + dump(ROWS).replace("\n", "\r\n").encode()
    assert read_rows(write(tmp_path, name, content)) == ROWS


def test_blank_lines_are_no_rows_and_do_not_shift_line_numbers(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert read_rows(path) == [{"text": "a"}, {"text": "b"}]
    write(tmp_path, "a.jsonl", '{"text": "a"}\n\n{"text": \n')
    assert "line 3" in refused(read_rows, path)


def test_an_upper_case_extension_is_read_too(tmp_path):
    assert read_rows(write(tmp_path, "A.JSONL", as_jsonl(ROWS))) == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_missing_file_is_named(tmp_path, suffix):
    text = refused(read_rows, tmp_path / f"没有{suffix}")
    assert f"没有{suffix}: no such file" in text
    assert "FEDSEEK_DATA" in text


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_folder_is_no_file(tmp_path, suffix):
    (tmp_path / f"a{suffix}").mkdir()
    assert f"a{suffix}: " in refused(read_rows, tmp_path / f"a{suffix}")


@pytest.mark.parametrize("name", ["a.xlsx", "a.txt", "a", "a.jsonl.gz"])
def test_another_extension_is_refused_and_the_known_ones_are_named(tmp_path, name):
    text = refused(read_rows, write(tmp_path, name, as_jsonl(ROWS)))
    assert repr(Path(name).suffix) in text
    assert ".jsonl, .csv, .parquet" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", ""), ("a.csv", "text,label\n"), ("a.jsonl", b"\xef\xbb\xbf")],
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    assert "no rows" in refused(read_rows, write(tmp_path, name, content))


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "no rows" in refused(read_rows, tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "dump"), [("a.jsonl", as_jsonl), ("a.csv", as_csv)])
def test_gb18030_bytes_are_refused_with_the_byte_and_the_way_out(tmp_path, name, dump):
    content = dump([{"text": "账户异常", "label": "欺诈"}]).encode("gb18030")
    text = refused(read_rows, write(tmp_path, name, content))
    assert f"not UTF-8 (byte 0xd5 at offset {content.index(0xD5)})" in text  # GB18030 of the first character: d5 cb
    assert "iconv -f GB18030" in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "未完', "line 2: not JSON: Unterminated string"),
        ("text,label", "line 2: not JSON"),
        ('["text"]', "line 2: got list, wanted one JSON object"),
        ('"text"', "line 2: got str"),
        ("null", "line 2: got NoneType"),
        ("3", "line 2: got int"),
        ('{"a": 1} {"a": 2}', "line 2: not JSON: Extra data at column 10"),
    ],
)
def test_a_broken_json_line_is_named_by_number(tmp_path, line, words):
    assert words in refused(read_rows, write(tmp_path, "a.jsonl", as_jsonl(ROWS[:1]) + line + "\n"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,label\na,x\nb\n", "line 3: wanted 2 fields"),
        ("text,label\na,x\nb,y,z\n", "line 3: wanted 2 fields"),
        ('text,label\nb,y\n"a,x\n', "line 3: not CSV"),
        ('text,label\n"a"b,x\n', "line 2: not CSV"),
    ],
)
def test_a_ragged_or_broken_csv_row_is_named_by_line(tmp_path, content, words):
    assert words in refused(read_rows, write(tmp_path, "a.csv", content))


def parquet_bytes(tmp_path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 100), tmp_path / "good.parquet")
    return (tmp_path / "good.parquet").read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: b"",
        lambda good: b"not parquet at all",
        lambda good: good[:-10],
        lambda good: good[:60] + good[-30:],
        lambda good: b"PAR1" + b"x" * 100 + b"\x40\0\0\0PAR1",
        lambda good: good[:4] + b"\xff" * 40 + good[44:],
        lambda good: good[:-60] + b"\xff" * 20 + good[-40:],
    ],
    ids=["empty", "text", "cut", "middle-gone", "footer-garbage", "page-garbage", "metadata-garbage"],
)
def test_a_broken_parquet_file_is_refused_whatever_is_broken(tmp_path, spoil):
    text = refused(read_rows, write(tmp_path, "坏.parquet", spoil(parquet_bytes(tmp_path))))
    assert "坏.parquet: not Parquet" in text


# --- rows to records


def test_records_keep_text_label_and_unit_in_order():
    records = to_records(ROWS, COLUMNS, labels=LABELS, source="s")
    assert records.texts == ("转账 to 张三", "balance?", "再转一次")
    assert records.labels == ("欺诈", "正常", "欺诈")
    assert records.units == ("客一", "客二", "客一")
    assert (len(records), records.num_units, records.unit_column) == (3, 2, "customer")


def test_without_a_unit_column_every_record_is_its_own_unit():
    records = to_records(ROWS, Columns("text", "label"), labels=LABELS, source="s")
    assert (records.num_units, records.unit_column) == (3, None)
    assert to_records(ROWS, COLUMNS, labels=LABELS, source="s").as_single_records().num_units == 3


def test_columns_of_any_name_and_numbers_as_labels_are_taken_as_text():
    records = to_records([{"正文": " 你好 ", "类": 1}], Columns("正文", "类"), labels=["0", "1"], source="s")
    assert (records.texts, records.labels) == (("你好",), ("1",))


def test_a_missing_column_is_named_with_the_row_and_the_columns_there_are():
    text = refused(to_records, ROWS, Columns("正文", "label", "patient"), labels=LABELS, source="甲.csv")
    assert "甲.csv, row 1: no column '正文', 'patient'; got 'text', 'label', 'customer'" in text


def test_a_column_missing_in_a_later_row_only_is_found():
    assert "row 4: no column 'label'" in refused(
        to_records, [*ROWS, {"text": "x", "customer": "c"}], COLUMNS, labels=LABELS, source="s"
    )


@pytest.mark.parametrize("value", ["", "  \t\n", "\u3000", None])
@pytest.mark.parametrize("column", ["text", "customer"])
def test_a_blank_text_or_unit_is_refused_by_row_and_column(column, value):
    rows = [ROWS[0], {**ROWS[1], column: value}]
    assert f"row 2: column '{column}' is empty" in refused(to_records, rows, COLUMNS, labels=LABELS, source="s")


def test_half_a_character_is_refused_here_and_not_by_a_tokenizer(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "\\ud83d 截断的表情", "label": "欺诈"}\n')
    text = refused(to_records, read_rows(path), Columns("text", "label"), labels=LABELS, source="s")
    assert "row 1: column 'text' holds half a character" in text


def test_labels_that_are_not_in_the_plan_are_counted_and_at_most_five_named():
    rows = [{**ROWS[0], "label": f"新{number}"} for number in (3, 1, 1, 2, 7, 6, 5, 4)]
    text = refused(to_records, [*ROWS, *rows], COLUMNS, labels=LABELS, source="乙.csv")
    assert "乙.csv: 7 label(s) not in the plan: '新1', '新2', '新3', '新4', '新5' and 2 more" in text
    assert "新6" not in text
    assert "2 labels" in text
    few = refused(to_records, rows[:1], COLUMNS, labels=LABELS, source="s")
    assert "1 label(s) not in the plan: '新3'\n" in few


def test_no_text_label_or_unit_shows_in_a_repr(tiny_model):
    records = to_records(ROWS, COLUMNS, labels=LABELS, source="s")
    tokenised = tokenise(records, tiny_model, labels=LABELS, max_tokens=8)
    shown = repr(records) + repr(tokenised)
    for secret in ("张三", "欺诈", "客一", "array"):
        assert secret not in shown


# --- tokens


def test_tokens_are_cut_at_max_tokens_and_keep_their_end(tiny_model):
    records = Records(("汇款" * 40, "余额"), ("欺诈", "正常"), ("0", "1"))
    tokenised = tokenise(records, tiny_model, labels=LABELS, max_tokens=10)
    assert [len(ids) for ids in tokenised.input_ids] == [10, 4]
    long, short = tokenised.input_ids
    assert (long[0], long[-1]) == (short[0], short[-1])  # [CLS] ... [SEP], also of a text that was cut
    assert long.dtype == np.int32
    whole = tokenise(records, tiny_model, labels=LABELS, max_tokens=64)
    assert [len(ids) for ids in whole.input_ids] == [64, 4]


def test_chinese_characters_are_tokens_of_their_own(tiny_model):
    records = Records(("汇款", "款汇"), ("欺诈", "正常"), ("0", "1"))
    one, other = tokenise(records, tiny_model, labels=LABELS, max_tokens=8).input_ids
    assert one.tolist() != other.tolist()
    assert sorted(one) == sorted(other)


def test_labels_are_numbered_as_in_the_plan_and_units_densely_in_order_of_appearance(tiny_model):
    records = Records(("汇款",) * 4, ("正常", "欺诈", "正常", "正常"), ("丁", "甲", "丁", "丙"))
    tokenised = tokenise(records, tiny_model, labels=LABELS, max_tokens=8)
    assert tokenised.labels.tolist() == [1, 0, 1, 1]
    assert tokenised.units.tolist() == [0, 1, 0, 2]
    assert (tokenised.labels.dtype, tokenised.units.dtype) == (np.int64, np.int64)
    assert (len(tokenised), tokenised.num_units) == (4, 3)


@settings(max_examples=25, deadline=None)
@given(units=st.lists(st.sampled_from("甲乙丙丁abc"), min_size=1, max_size=20))
def test_units_are_dense_and_two_records_share_one_only_if_they_did(tiny_model, units):
    records = Records(("x",) * len(units), ("欺诈",) * len(units), tuple(units))
    tokenised = tokenise(records, tiny_model, labels=LABELS, max_tokens=4)
    assert set(tokenised.units.tolist()) == set(range(tokenised.num_units))
    assert len(set(zip(units, tokenised.units.tolist(), strict=True))) == len(set(units)) == tokenised.num_units
