"""``site.toml`` and the records that it names."""

import csv
import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedseek.dialogues import Turn
from fedseek.errors import InvalidConfig, InvalidRecords
from fedseek.records import Columns
from fedseek_site.config import CONFIG_FILE, SiteConfig, load_config, read_site_data

CLIENTS = Path(__file__).resolve().parents[2] / "clients"
SMALLEST = 'version = 1\n[data]\nname = "账户"\ntrain = "训练.jsonl"\nheld_back = "保留.csv"\n'


def load(folder, text) -> SiteConfig:
    (folder / CONFIG_FILE).write_text(text, "utf-8")
    return load_config(folder)


def problems(folder, text) -> list[str]:
    with pytest.raises(InvalidConfig) as refused:
        load(folder, text)
    return sorted(problem.split(":")[0] for problem in refused.value.problems)


def write_rows(folder, *rows, held_back="text,label,unit\na,正常,c1\n"):
    (folder / "训练.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    (folder / "保留.csv").write_text(held_back, "utf-8")


def test_the_least_that_must_be_said_and_what_holds_then(tmp_path):
    config = load(tmp_path, SMALLEST)
    assert config.data.columns == Columns("text", None)
    assert (config.folders.release, config.folders.report) == ("release", "report.jsonl")
    assert config.sockets.by_role == {"operator": "", "steward": "", "officer": ""}
    assert (config.courier.separate, config.threads) == (False, None)


@pytest.mark.parametrize("name", ["bank.example.toml", "hospital.example.toml", "instruct.example.toml"])
def test_the_examples_are_taken(tmp_path, name):
    config = load(tmp_path, (CLIENTS / name).read_text("utf-8"))
    assert config.data.unit
    assert config.sockets.by_role.keys() == {"operator", "steward", "officer"}


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("", ["data", "version"]),
        (SMALLEST.replace("version = 1", "version = 2"), ["version"]),
        (SMALLEST.replace("version = 1", 'version = "1"'), ["version"]),
        (SMALLEST + 'uint = "x"\n', ["data.uint"]),
        (SMALLEST + "[sockets]\noperator_group = 7\n[courier]\nseparate = 1\n[folders]\nrelease = ''\n", [
            "courier.separate", "folders.release", "sockets.operator_group",
        ]),
        ("threads = 1025\n" + SMALLEST.replace('"账户"', '""'), ["data.name", "threads"]),
        (SMALLEST.replace("训练.jsonl", "训练\\u0000.jsonl"), ["data.train"]),
    ],
    ids=["nothing", "version", "text", "misspelt", "types", "bounds", "no file's name"],
)  # fmt: skip
def test_everything_that_is_wrong_is_told_at_once(tmp_path, text, keys):
    assert problems(tmp_path, text) == keys


def test_a_configuration_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidConfig, match=r"site\.toml"):
        load_config(tmp_path)


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: (SMALLEST + text).encode()))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_any_file_is_a_configuration_or_refused(tmp_path, data):
    (tmp_path / CONFIG_FILE).write_bytes(data)
    with suppress(InvalidConfig):
        load_config(tmp_path)


# records


def test_labels_are_those_of_the_file_and_units_of_the_column(tmp_path):
    write_rows(
        tmp_path,
        {"text": "余额", "label": "正常", "unit": "c1"},
        {"text": "汇款", "label": "欺诈", "unit": "c1"},
        {"text": "转账", "label": 3, "unit": "c2"},
    )
    data = read_site_data(tmp_path, load(tmp_path, SMALLEST + 'unit = "unit"\n').data)
    assert data.train.labels == ("正常", "欺诈", "3")
    assert (len(data.train), data.train.num_units) == (3, 2)
    assert (len(data.held_back), data.held_back.labels) == (1, ("正常",))


def test_without_a_unit_column_every_record_is_a_person_of_its_own(tmp_path):
    write_rows(tmp_path, *({"text": "余额", "label": "正常", "unit": "c1"} for _ in range(3)))
    data = read_site_data(tmp_path, load(tmp_path, SMALLEST).data)
    assert data.train.num_units == 3
    assert data.train.unit_column is None


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"text": "a", "kind": "x"}], "", "no column 'label' in every row"),
        ([{"text": "a", "label": "x"}, {"text": "a"}], "", "no column 'label' in every row"),
        ([{"label": "x", "body": "a"}], "", "no column 'text'"),
        ([{"text": "a", "label": "x"}], 'unit = "customer"\n', "no column 'customer'"),
        ([{"text": " ", "label": "x"}], "", "column 'text' is empty"),
        ([], "", "the file has no rows"),
    ],
    ids=["label", "label of one row", "text", "unit", "empty text", "no rows"],
)
def test_records_that_cannot_be_used_are_refused_by_file_and_column(tmp_path, rows, more, said):
    write_rows(tmp_path, *rows)
    with pytest.raises(InvalidRecords, match=said) as refused:
        read_site_data(tmp_path, load(tmp_path, SMALLEST + more).data)
    assert "训练.jsonl" in refused.value.message


def test_the_label_column_may_have_another_name(tmp_path):
    write_rows(tmp_path, {"text": "a", "结果": "x"}, held_back="text,结果\na,y\n")
    data = read_site_data(tmp_path, load(tmp_path, SMALLEST + 'label = "结果"\n').data)
    assert (data.train.labels, data.held_back.labels) == (("x",), ("y",))


def test_files_without_labels_have_texts_alone(tmp_path):
    write_rows(tmp_path, {"text": "病程记录"}, held_back="text\na\n")
    data = read_site_data(tmp_path, load(tmp_path, SMALLEST).data)
    assert (data.train.texts, data.train.labels, data.held_back.labels) == (("病程记录",), ("",), ("",))
    with pytest.raises(InvalidRecords, match="no column '结果' in every row"):
        read_site_data(tmp_path, load(tmp_path, SMALLEST + 'label = "结果"\n').data)


TALK = [{"role": "user", "content": "胸痛三天？"}, {"role": "assistant", "content": "立即就医。"}]


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ('instruction = "问题"\noutput = "答复"\n', {"问题": "胸痛三天？", "答复": "立即就医。"}),
        (
            'instruction = "问题"\ninput = "摘要"\noutput = "答复"\n',
            {"问题": "胸痛三天？", "摘要": "", "答复": "立即就医。"},
        ),
        ('messages = "对话"\n', {"对话": TALK}),
    ],
    ids=["instruction", "input", "messages"],
)
def test_a_site_of_dialogues_needs_neither_texts_nor_labels(tmp_path, columns, row):
    (tmp_path / "训练.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
    with (tmp_path / "保留.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(cells))
        writer.writeheader()
        writer.writerow(cells)
    data = read_site_data(tmp_path, load(tmp_path, SMALLEST + columns).data)
    assert data.train == data.held_back
    assert data.train.dialogues == ((Turn("user", "胸痛三天？"), Turn("assistant", "立即就医。")),)
    assert (data.train.texts, data.train.labels) == (("",), ("",))


def test_a_site_of_dialogues_may_name_texts_and_labels_besides(tmp_path):
    columns = 'messages = "对话"\ntext = "病程"\nlabel = "分诊"\n'
    rows = [{"对话": TALK, "病程": "", "分诊": ""}, {"对话": None, "病程": "胸痛", "分诊": "急诊"}]
    (tmp_path / "训练.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "保留.csv").write_text("对话,病程,分诊\n,胸痛,普通\n", "utf-8")
    data = read_site_data(tmp_path, load(tmp_path, SMALLEST + columns).data)
    assert (data.train.texts, data.train.labels) == (("", "胸痛"), ("", "急诊"))
    assert (bool(data.train.dialogues[0]), data.held_back.dialogues) == (True, ())


@pytest.mark.parametrize(
    "columns",
    ['instruction = "q"\n', 'input = "q"\n', 'messages = "m"\ninstruction = "q"\noutput = "a"\n', 'messages = ""\n'],
    ids=["no output", "input alone", "two ways", "empty"],
)
def test_columns_of_dialogues_that_do_not_fit_are_refused(tmp_path, columns):
    assert problems(tmp_path, SMALLEST + columns)[0].startswith("data")


def test_the_held_back_file_is_checked_too(tmp_path):
    write_rows(tmp_path, {"text": "a", "label": "x"}, held_back="text\na\n")
    with pytest.raises(InvalidRecords, match=r"保留\.csv"):
        read_site_data(tmp_path, load(tmp_path, SMALLEST).data)


def test_a_path_may_be_absolute_or_relative_to_the_sites_folder(tmp_path):
    (tmp_path / "站点").mkdir()
    write_rows(tmp_path, {"text": "a", "label": "x"})
    text = SMALLEST.replace("训练.jsonl", str(tmp_path / "训练.jsonl")).replace("保留.csv", "../保留.csv")
    assert len(read_site_data(tmp_path / "站点", load(tmp_path / "站点", text).data).train) == 1
