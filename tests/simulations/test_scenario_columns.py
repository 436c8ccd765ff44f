"""Columns of simulated sites, rows shared out without labels, and the files that a made-up consortium's sites get."""

import json

import pytest
from language_sites import language_changes, language_data

from fedseek.dialogues import Turn
from fedseek.records import Columns, Records
from fedseek_site.admission import SiteData
from fedseek_site.config import load_config, read_site_data
from simulations.enrolling import Member, site_settings, to_toml, write_records
from simulations.scenario import Part, SiteSpec, columns_of, share_out

ROWS = [{"问题": f"第{number}问", "答复": "是。"} for number in range(20)]


def site(kind="bank", **columns):
    return SiteSpec(name="北岸银行", kind=kind, train="a.jsonl", held_back="b.jsonl", **columns)


@pytest.fixture
def language_plan(tiny_plan, tiny_causal):
    return tiny_plan(**language_changes(tiny_causal))


def test_labels_have_a_column_only_where_they_are_learned(tiny_plan, language_plan):
    assert columns_of(site(), tiny_plan()) == Columns("text", "label")
    assert columns_of(site(text="正文", label="类", unit="客户"), tiny_plan()) == Columns("正文", "类", "客户")
    assert columns_of(site("hospital"), language_plan) == Columns("text", None)
    assert columns_of(site("hospital", text="病程", label="分诊"), language_plan) == Columns("病程", None)


def test_a_site_of_dialogues_has_texts_only_where_it_names_them(language_plan):
    named = {"instruction": "问题", "input": "摘要", "output": "答复"}
    assert columns_of(site(**named), language_plan) == Columns(None, None, **named)
    assert columns_of(site(**named, text="答复"), language_plan) == Columns("答复", None, **named)
    assert columns_of(site(messages="对话"), language_plan) == Columns(None, None, messages="对话")


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_without_labels_the_parts_are_disjoint_and_together_hold_every_row(alpha):
    parts = [share_out(ROWS, None, Part(index=index, of=3, alpha=alpha), seed=4) for index in range(3)]
    shared = [row["问题"] for part in parts for row in part]
    assert sorted(shared) == sorted(row["问题"] for row in ROWS)
    assert alpha is not None or [len(part) for part in parts] == [7, 6, 7]
    assert parts[0] != ROWS[:7]


MIXED = Records(
    ("汇款", ""), ("欺诈", ""), ("客1", "客2"), "客户", ((), (Turn("user", "余额？"), Turn("assistant", "一千元。")))
)


@pytest.mark.parametrize(
    "records",
    [language_data("仁济医院").train, Records(("病程",), ("",), ("0",)), MIXED],
    ids=["dialogues and texts", "texts", "mixed"],
)
def test_a_site_of_a_consortium_reads_the_records_it_was_given(tmp_path, records):
    (tmp_path / "data").mkdir()
    for name in ("train", "held_back"):
        write_records(tmp_path / "data" / f"{name}.jsonl", records)
    member = Member("仁济医院", "hospital", SiteData(records, records), tmp_path / "报告", tmp_path / "发布")
    (tmp_path / "site.toml").write_text(to_toml(site_settings(member)), "utf-8")
    data = read_site_data(tmp_path, load_config(tmp_path).data)
    assert (data.train.texts, data.train.labels, data.train.dialogues) == (
        records.texts,
        records.labels,
        records.dialogues,
    )
    assert (data.train.units, data.train.unit_column is None) == (records.units, records.unit_column is None)
    assert all(json.loads(line) for line in (tmp_path / "data/train.jsonl").read_text("utf-8").splitlines())
