import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.errors import InvalidPlan, InvalidRecords
from simulations import scenario as module
from simulations.scenario import Part, load_scenario, read_site_data, resolve_path, share_out

SCENARIO = """
[simulation]
seed = 4
workers = 1

[plan]
name = "small"
[plan.model]
source = "package:some-model"
sha256 = "abababababababababababababababababababababababababababababababab"
[plan.kinds.bank]
labels = ["欺诈", "正常"]
[plan.kinds.hospital]
labels = ["急诊", "普通", "自理"]
unit = "patient"
[plan.lora]
target_modules = ["query"]
[plan.training]
rounds = 2
steps_per_round = 2
sampling_probability = 0.5
learning_rate = 0.01
head_learning_rate = 0.05
[plan.privacy]
mechanism = "none"
[plan.cohort]
max_sites = 4

[[sites]]
name = "北岸银行"
kind = "bank"
train = "bank.jsonl"
held_back = "bank-test.jsonl"
[[sites]]
name = "harbour-bank"
kind = "bank"
train = "bank.jsonl"
held_back = "bank-test.jsonl"
[[sites]]
name = "仁济医院"
kind = "hospital"
train = "hospital.jsonl"
held_back = "hospital-test.jsonl"
unit = "patient"
[[sites]]
name = "st-anna"
kind = "hospital"
train = "hospital.jsonl"
held_back = "hospital-test.jsonl"
unit = "patient"
"""
LABELS = {"bank": ("欺诈", "正常"), "hospital": ("急诊", "普通", "自理")}


@pytest.fixture
def load(tmp_path):
    """Load the scenario with ``(old, new)`` replaced in its text, once each."""

    def run(*changes: tuple[str, str], rounds: int | None = None):
        text = SCENARIO
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "小场景.toml"
        path.write_text(text, "utf-8")
        return load_scenario(path, rounds=rounds)

    return run


@pytest.fixture
def problems(load):
    """The problems of the changed scenario."""

    def run(*changes: tuple[str, str], rounds: int | None = None) -> tuple[str, ...]:
        with pytest.raises(InvalidPlan) as caught:
            load(*changes, rounds=rounds)
        assert "小场景.toml" in caught.value.message
        return caught.value.problems

    return run


def test_a_scenario_has_the_name_of_its_file_its_sites_and_its_plan(load):
    scenario = load()
    assert scenario.name == "小场景"
    assert [site.name for site in scenario.spec.sites] == ["北岸银行", "harbour-bank", "仁济医院", "st-anna"]
    assert scenario.spec.simulation.seed == 4
    assert scenario.plan.spec.kinds["hospital"].labels == LABELS["hospital"]


def test_rounds_may_be_overridden_and_change_the_plan(load):
    assert load(rounds=5).plan.spec.training.rounds == 5
    assert load(rounds=2).plan.digest == load().plan.digest != load(rounds=5).plan.digest


def test_all_problems_of_sites_and_plan_are_told_at_once(problems):
    found = problems(
        ('name = "harbour-bank"', 'name = ""\ncolour = "red"'),
        ("workers = 1", "workers = 0"),
        ("rounds = 2", "rounds = 0"),
        ("max_sites = 4", "max_sites = 1"),
    )
    assert sorted(problem.split(":")[0] for problem in found) == [
        "plan.cohort.max_sites",
        "plan.training.rounds",
        "simulation.workers",
        "sites.1.colour",
        "sites.1.name",
    ]


def test_all_problems_between_sites_and_plan_are_told_at_once(problems):
    found = problems(
        ('name = "harbour-bank"', 'name = "北岸银行"\npart = {index = 3, of = 3}'),
        ("max_sites = 4", "max_sites = 3"),
        ('held_back = "hospital-test.jsonl"\nunit = "patient"', 'held_back = "${SYNTHETIC}/x.jsonl"'),
        ('name = "st-anna"\nkind = "hospital"', 'name = "st-anna"\nkind = "clinic"'),
    )
    text = "\n".join(found)
    for words in (
        "sites: name '北岸银行' is given twice",
        "sites: got 4, wanted 3 to 3",
        "sites.北岸银行: part 3 of 3 does not exist",
        "sites.仁济医院: unit column missing, the plan protects a patient",
        "sites.仁济医院: ${SYNTHETIC}/x.jsonl: needs a [synthetic] table",
        "sites.st-anna: kind 'clinic' has no task",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('name = "harbour-bank"', 'name = "北岸银行"'), ["'北岸银行' is given twice"]),
        (('name = "harbour-bank"', 'name = "../../etc"'), ["'../../etc'", "dot or holds a slash"]),
        (('name = "harbour-bank"', 'name = "a/b"'), ["'a/b'", "slash"]),
        (('name = "harbour-bank"', 'name = " a"'), ["' a'", "spaces at an end"]),
        (("max_sites = 4", "max_sites = 3"), ["got 4, wanted 3 to 3", "overflow"]),
        (("max_sites = 4", "min_sites = 5\nmax_sites = 6"), ["got 4, wanted 5 to 6"]),
        (('test.jsonl"', 'test.jsonl"\npart = {index = 2, of = 2}'), ["part 2 of 2", "count from 0"]),
        (('test.jsonl"', 'test.jsonl"\nheld_back_part = {index = 9, of = 2}'), ["part 9 of 2"]),
        (('test.jsonl"', 'test.jsonl"\npart = {index = -1, of = 2}'), ["sites.0.part.index", "got -1"]),
        (('test.jsonl"', 'test.jsonl"\npart = {index = 0, of = 2, alpha = 0.0}'), ["part.alpha", "greater than 0"]),
        (('train = "bank.jsonl"', 'train = "${SYNTHETIC}/a.jsonl"'), ["needs a [synthetic] table"]),
        (('kind = "bank"', "kind = 3"), ["sites.0.kind", "got 3"]),
        (("seed = 4", "seed = 4\nbaselines = ['magic']"), ["baselines.0", "'magic'"]),
        (("workers = 1", "workers = 1\n[synthetic]\nrecords_per_site = 3"), ["synthetic.records_per_site"]),
    ],
)
def test_a_problem_names_its_place_and_what_was_got(problems, change, words):
    (problem,) = problems(change)
    for word in words:
        assert word in problem


def test_a_kind_may_have_one_site_only_whose_head_then_stays_at_home(load):
    kinds = [
        site.kind
        for site in load(('name = "st-anna"\nkind = "hospital"', 'name = "st-anna"\nkind = "bank"')).spec.sites
    ]
    assert kinds.count("hospital") == 1


@pytest.mark.parametrize("text", ["plan = 3", "plan = {training = 5}", "sites = 1", "plan = []\nsites = []", ""])
@pytest.mark.parametrize("rounds", [None, 3])
def test_tables_that_are_none_are_problems_and_no_crash(tmp_path, text, rounds):
    path = tmp_path / "坏.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(InvalidPlan) as caught:
        load_scenario(path, rounds=rounds)
    assert any(problem.startswith("sites") for problem in caught.value.problems)
    assert any(problem.startswith("plan") for problem in caught.value.problems)


# --- paths


def test_path_variables_are_replaced_and_other_paths_are_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDSEEK_DATA", str(tmp_path / "公开"))
    assert resolve_path("${FEDSEEK_DATA}/a/b.csv") == tmp_path / "公开" / "a" / "b.csv"
    assert resolve_path("${SYNTHETIC}/x.jsonl", tmp_path / "made") == tmp_path / "made" / "x.jsonl"
    assert resolve_path("data/x.jsonl") == Path("data/x.jsonl")
    assert resolve_path("~/x.jsonl") == Path.home() / "x.jsonl"


def test_the_data_folder_of_the_environment_goes_before_the_default(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "DEFAULT_DATA", tmp_path)
    monkeypatch.delenv("FEDSEEK_DATA", raising=False)
    assert module.data_folder() == tmp_path
    monkeypatch.setenv("FEDSEEK_DATA", str(tmp_path / "other"))
    assert module.data_folder() == tmp_path / "other"
    monkeypatch.setenv("FEDSEEK_DATA", "")
    assert module.data_folder() == tmp_path


def test_without_a_data_folder_the_reason_is_told(load, problems, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "DEFAULT_DATA", tmp_path / "none")
    monkeypatch.delenv("FEDSEEK_DATA", raising=False)
    (problem,) = problems(('train = "bank.jsonl"', 'train = "${FEDSEEK_DATA}/bank.jsonl"'))
    assert problem.startswith("sites.北岸银行: ${FEDSEEK_DATA}/bank.jsonl: FEDSEEK_DATA is not set")
    monkeypatch.setenv("FEDSEEK_DATA", str(tmp_path))
    load(('train = "bank.jsonl"', 'train = "${FEDSEEK_DATA}/bank.jsonl"'))


# --- reading a site's data


def write_rows(folder: Path, name: str, rows) -> None:
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def bank_rows(count: int) -> list[dict[str, str]]:
    return [
        {"text": f"文 {number}", "label": LABELS["bank"][number % 2], "branch": "南" if number % 4 < 2 else "北"}
        for number in range(count)
    ]


@pytest.fixture
def read_first(load, tmp_path, monkeypatch):
    """Data of the first bank, whose table got the lines ``extra``, from files of 40 and 12 rows."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, "bank.jsonl", bank_rows(40))
    write_rows(tmp_path, "bank-test.jsonl", bank_rows(12))

    def run(extra: str = ""):
        scenario = load(('held_back = "bank-test.jsonl"', f'held_back = "bank-test.jsonl"\n{extra}'))
        return read_site_data(scenario, scenario.spec.sites[0])

    return run


def test_a_site_gets_its_files_and_each_record_is_a_unit_without_a_column(read_first):
    data = read_first()
    assert (len(data.train), len(data.held_back)) == (40, 12)
    assert data.train.unit_column is None
    assert data.train.num_units == 40


def test_where_keeps_only_rows_with_that_value(read_first):
    data = read_first('where = {branch = "南"}')
    assert data.train.texts == tuple(f"文 {number}" for number in range(40) if number % 4 < 2)
    assert len(data.held_back) == 6
    both = read_first('where = {branch = "南", label = "欺诈"}')
    assert both.train.texts == tuple(f"文 {number}" for number in range(0, 40, 4))


@pytest.mark.parametrize("where", ['where = {branch = "东"}', 'where = {no_such_column = "南"}'])
def test_a_filter_that_leaves_nothing_names_file_and_site(read_first, where):
    with pytest.raises(InvalidRecords, match=r"bank\.jsonl: no rows left for site '北岸银行'"):
        read_first(where)


def test_parts_and_limits_are_taken_after_the_filter_and_the_same_each_time(read_first):
    extra = 'where = {branch = "南"}\npart = {index = 0, of = 2}\nmax_records = 4\nmax_held_back = 3'
    data = read_first(extra)
    assert (len(data.train), len(data.held_back)) == (4, 3)
    assert data == read_first(extra)
    assert list(data.train.texts) == sorted(data.train.texts, key=lambda text: int(text.split()[1]))
    assert len(read_first("max_records = 99").train) == 40


def test_held_back_rows_are_shared_out_by_their_own_part(read_first):
    data = read_first("held_back_part = {index = 1, of = 3}")
    assert (len(data.train), len(data.held_back)) == (40, 4)


def test_a_label_that_is_not_in_the_plan_is_refused(read_first, tmp_path):
    write_rows(tmp_path, "bank.jsonl", [*bank_rows(4), {"text": "x", "label": "急诊"}])
    with pytest.raises(InvalidRecords, match="not in the plan: '急诊'"):
        read_first()


# --- sharing out


def labelled(counts: list[int]) -> list[dict[str, object]]:
    return [{"类": f"L{label}", "id": (label, number)} for label, count in enumerate(counts) for number in range(count)]


def parts_of(rows, of: int, alpha: float | None, seed: int) -> list[list]:
    return [share_out(rows, "类", Part(index=index, of=of, alpha=alpha), seed=seed) for index in range(of)]


@settings(deadline=None, max_examples=200)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    of=st.integers(1, 7),
    alpha=st.none() | st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**32),
)
def test_parts_are_disjoint_complete_and_in_order(counts, of, alpha, seed):
    rows = labelled(counts)
    parts = parts_of(rows, of, alpha, seed)
    shared = [row["id"] for part in parts for row in part]
    assert sorted(shared) == [row["id"] for row in rows]
    for part in parts:
        assert [row["id"] for row in part] == sorted(row["id"] for row in part)
    assert parts == parts_of(rows, of, alpha, seed)


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=6), of=st.integers(1, 7), seed=st.integers(0, 2**32))
def test_without_alpha_every_part_gets_its_equal_share_of_each_label(counts, of, seed):
    for part in parts_of(labelled(counts), of, None, seed):
        found = Counter(row["类"] for row in part)
        for label, count in enumerate(counts):
            assert abs(found[f"L{label}"] - count / of) <= 1


def test_another_seed_shares_out_otherwise():
    rows = labelled([50, 50])
    assert parts_of(rows, 2, None, 0) != parts_of(rows, 2, None, 1)
    assert parts_of(rows, 2, 0.3, 0) != parts_of(rows, 2, 0.3, 1)


def skew(alpha: float | None) -> float:
    """Mean distance of a part's label shares from the whole's, over some seeds; 0 is even."""
    rows = labelled([100] * 5)
    distances = []
    for seed in range(20):
        for part in parts_of(rows, 4, alpha, seed):
            found = Counter(row["类"] for row in part)
            shares = np.array([found[f"L{label}"] for label in range(5)]) / 100
            distances.append(np.abs(shares - 0.25).mean())
    return float(np.mean(distances))


def test_labels_are_the_more_skewed_the_smaller_alpha_is():
    skews = [skew(alpha) for alpha in (None, 100.0, 1.0, 0.3, 0.05)]
    assert skews == sorted(skews)
    assert skews[0] < 0.01
    assert skews[1] < 0.05
    assert skews[-1] > 0.3


def test_one_file_for_training_and_for_holding_back_is_refused(load):
    with pytest.raises(InvalidPlan, match="train and held_back are the same file") as caught:
        load(('held_back = "bank-test.jsonl"', 'held_back = "bank.jsonl"'))
    assert "rows would be in both" in caught.value.message
