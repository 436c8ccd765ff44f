"""The privacy ledger: whose history data has, what is entered, what is refused, and what shows when somebody alters it."""

import dataclasses
import math
import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.composition import composed_epsilon
from fedseek.errors import AuditBroken, BudgetExceeded, CustodyError, JournalUnusable, WrongKey, WrongRound
from fedseek.identity.vault import StorageKey
from fedseek.records import Records
from fedseek_site.ledger import Ledger, read_ledger
from fedseek_site.ledger_entries import DataTaken, Limit, Mechanism, Noted, Spent, epsilon_of

KEY = StorageKey.generate()
PARAMS = PrivacyParams(noise_multiplier=2.0, sampling_probability=0.2, delta=1e-5, l2_clip_norm=1.0)
OTHER = dataclasses.replace(PARAMS, noise_multiplier=3.0)
DELTA, PLAN = 1e-5, "ab" * 32


def records(*people: str, column: str | None = "客户", text: str = "转账 {}") -> Records:
    return Records(tuple(text.format(person) for person in people), ("欺诈",) * len(people), people, column)


PEOPLE = records("张三", "李四", "Åse")


def cost(*steps: int, params: PrivacyParams = PARAMS) -> float:
    return composed_epsilon([PrivacySpend(params, sum(steps))], DELTA)


def spent(ledger: Ledger) -> float:
    return epsilon_of(ledger.account().spent(), DELTA)


def after(ledger: Ledger, run: str, steps: int, privacy: PrivacyParams | None = PARAMS, plan: str = PLAN) -> float:
    return ledger.total_after(run, [(Mechanism.of(privacy), steps)], plan=plan, delta=DELTA)


def reserve(ledger: Ledger, run: str, steps: int, privacy: PrivacyParams | None = PARAMS, plan: str = PLAN) -> None:
    ledger.reserve(run, [(Mechanism.of(privacy), steps)], plan=plan, unit="customer")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "账.sqlite3"


@pytest.fixture
def open_ledger(path):
    opened = []

    def make(data=PEOPLE, *, dataset="账户", key=KEY, limit=None, place=path):
        while opened:
            opened.pop().close()
        opened.append(Ledger(place, key, dataset=dataset, limit=lambda: limit))
        if data is not None:
            opened[0].take_data(data)
        return opened[0]

    yield make
    for ledger in opened:
        ledger.close()


# spending


def test_a_round_is_entered_once_also_after_a_restart(open_ledger, path):
    ledger = open_ledger()
    first = ledger.spend("试运行-1", 1, PARAMS, 40)
    assert ledger.spend("试运行-1", 1, PARAMS, 40) == first
    ledger = open_ledger()
    assert ledger.spend("试运行-1", 1, PARAMS, 40) == first
    ledger.spend("试运行-1", 2, PARAMS, 27)
    assert spent(ledger) == cost(40, 27)
    assert [noted.number for noted in read_ledger(path)] == [1, 2, 3]


@pytest.mark.parametrize(("privacy", "steps"), [(PARAMS, 41), (OTHER, 40), (None, 40)], ids=["steps", "noise", "none"])
def test_the_same_round_with_other_numbers_is_refused(open_ledger, privacy, steps):
    ledger = open_ledger()
    ledger.spend("run-1", 1, PARAMS, 40)
    with pytest.raises(WrongRound, match="with other numbers"):
        ledger.spend("run-1", 1, privacy, steps)
    assert spent(ledger) == cost(40)


def test_the_same_round_on_other_data_is_refused(open_ledger):
    open_ledger().spend("run-1", 1, PARAMS, 40)
    ledger = open_ledger(records("王五", text="别的 {}"), dataset="other")
    with pytest.raises(WrongRound, match="on other data"):
        ledger.spend("run-1", 1, PARAMS, 40)


def test_it_refuses_before_overspending_with_the_figures(open_ledger):
    ledger = open_ledger(limit=Limit(cost(50), DELTA))
    ledger.spend("run-1", 1, PARAMS, 40)
    with pytest.raises(BudgetExceeded) as caught:
        ledger.spend("run-1", 2, PARAMS, 11)
    assert (caught.value.spent, caught.value.asked, caught.value.limit) == (cost(40), cost(51), cost(50))
    assert f"{cost(40):.4g}" in caught.value.message
    assert not set("0123456789") & set(caught.value.rule), "what others are told holds no figure"
    assert spent(ledger) == cost(40)
    ledger.spend("run-1", 2, PARAMS, 10)


def test_a_lowered_limit_ends_an_admitted_run_where_it_would_be_overspent(open_ledger):
    reserve(open_ledger(limit=Limit(100, DELTA)), "run-1", 100)
    ledger = open_ledger(limit=Limit(cost(60), DELTA))
    ledger.spend("run-1", 1, PARAMS, 50)
    with pytest.raises(BudgetExceeded):
        ledger.spend("run-1", 2, PARAMS, 50)


def test_a_run_without_privacy_is_infinite_and_leaves_nothing_for_others(open_ledger):
    ledger = open_ledger(limit=Limit(1000, DELTA))
    reserve(ledger, "free", 10, None)
    assert math.isinf(after(ledger, "next", 10))
    ledger.end("free")
    assert after(ledger, "next", 10) == cost(10)  # it trained nothing
    ledger.spend("other", 1, None, 10)  # that such a run is allowed at all, its policy decided before
    assert math.isinf(spent(ledger))
    with pytest.raises(BudgetExceeded):
        ledger.spend("run-1", 1, PARAMS, 1)


def test_nothing_is_spent_before_it_is_known_whose_data_it_is(open_ledger):
    ledger = open_ledger(data=None)
    for ask in (lambda: ledger.spend("run-1", 1, PARAMS, 1), lambda: reserve(ledger, "run-1", 1), ledger.account):
        with pytest.raises(JournalUnusable, match="no data set"):
            ask()


# runs


def test_a_run_is_set_aside_whole_and_counted_once(open_ledger):
    ledger = open_ledger()
    assert after(ledger, "run-1", 100) == cost(100)
    for _ in range(2):
        reserve(ledger, "run-1", 100)
    assert after(ledger, "run-1", 100) == cost(100)
    assert after(ledger, "run-2", 50) == cost(150)
    ledger.spend("run-1", 1, PARAMS, 40)
    assert after(ledger, "run-2", 50) == cost(150)
    with pytest.raises(WrongRound, match="another plan"):
        reserve(ledger, "run-1", 100, plan="cd" * 32)
    with pytest.raises(WrongRound, match="another mechanism"):
        ledger.spend("run-1", 2, OTHER, 40)
    assert after(ledger, "run-1", 100, plan="cd" * 32) == cost(200)


def test_a_run_that_ended_gives_back_the_rest_and_trains_no_more(open_ledger):
    ledger = open_ledger()
    reserve(ledger, "run-1", 100)
    ledger.spend("run-1", 1, PARAMS, 40)
    assert [ledger.end("run-1"), ledger.end("run-1"), ledger.end("nobody")] == [True, False, False]
    assert after(ledger, "run-2", 50) == cost(90)
    ledger = open_ledger()
    assert ledger.spend("run-1", 1, PARAMS, 40).entry.round == 1  # done before: no second spend
    with pytest.raises(WrongRound, match="was ended"):
        ledger.spend("run-1", 2, PARAMS, 40)


def test_beginning_a_run_ends_those_admitted_before_it_and_none_after(open_ledger):
    ledger = open_ledger()
    for run in ("run-1", "run-2", "run-3"):
        reserve(ledger, run, 100)
    ledger.end_earlier("run-2")
    ledger.end_earlier("unknown")
    assert ledger.account().ended == {"run-1"}
    assert after(ledger, "run-4", 50) == cost(250)


def test_a_run_that_goes_on_from_another_is_charged_the_rest(open_ledger):
    ledger = open_ledger()
    reserve(ledger, "run-1", 100)
    ledger.spend("run-1", 1, PARAMS, 40)
    ledger.follow("run-2", "run-1", steps=[40])
    assert after(ledger, "run-2", 100) == cost(100)
    reserve(ledger, "run-2", 100)
    ledger.end_earlier("run-2")
    assert after(ledger, "run-3", 1) == cost(101)


# stages


TWO_STAGES = [(Mechanism.of(PARAMS), 60), (Mechanism.of(OTHER), 40)]


def composed(first: int, second: int) -> float:
    return composed_epsilon([PrivacySpend(PARAMS, first), PrivacySpend(OTHER, second)], DELTA)


def total_of_two(ledger: Ledger, run: str) -> float:
    return ledger.total_after(run, TWO_STAGES, plan=PLAN, delta=DELTA)


def test_stages_of_a_run_are_set_aside_each_with_its_own_noise(open_ledger):
    ledger = open_ledger()
    assert total_of_two(ledger, "run-1") == composed(60, 40) < cost(60) + cost(40, params=OTHER)
    for _ in range(2):
        ledger.reserve("run-1", TWO_STAGES, plan=PLAN, unit="customer")
    assert ledger.head()[0] == 3, "the data set, and one entry a mechanism"
    assert total_of_two(ledger, "run-1") == composed(60, 40)
    ledger.spend("run-1", 1, PARAMS, 60)
    ledger.spend("run-1", 2, OTHER, 10)
    ledger = open_ledger()
    assert (spent(ledger), total_of_two(ledger, "run-1")) == (composed(60, 10), composed(60, 40))
    assert after(ledger, "run-2", 50) == composed(110, 40)
    with pytest.raises(WrongRound, match="another mechanism"):
        ledger.spend("run-1", 3, dataclasses.replace(PARAMS, noise_multiplier=9.0), 10)
    assert ledger.end("run-1")
    assert after(ledger, "run-2", 50) == composed(110, 10), "what the second stage did not train is free again"


def test_stages_of_one_noise_are_one_entry(open_ledger):
    ledger = open_ledger()
    ledger.reserve("run-1", [TWO_STAGES[0], TWO_STAGES[0]], plan=PLAN, unit="customer")
    assert (ledger.head()[0], after(ledger, "run-2", 1)) == (2, cost(121))


def test_steps_of_one_stage_are_not_set_aside_for_another(open_ledger):
    limit = Limit(composed(60, 40), DELTA)
    ledger = open_ledger(limit=limit)
    ledger.reserve("run-1", TWO_STAGES, plan=PLAN, unit="customer")
    ledger.spend("run-1", 1, PARAMS, 60)
    with pytest.raises(BudgetExceeded):
        ledger.spend("run-1", 2, PARAMS, 40)  # a stage that trains too long: 40 steps are left, of the other
    ledger.spend("run-1", 2, OTHER, 40)
    assert spent(ledger) == limit.epsilon


def test_a_run_that_goes_on_from_another_is_charged_the_rest_of_each_stage(open_ledger):
    ledger = open_ledger()
    ledger.reserve("run-1", TWO_STAGES, plan=PLAN, unit="customer")
    ledger.spend("run-1", 1, PARAMS, 60)
    ledger.spend("run-1", 2, OTHER, 10)
    ledger.follow("run-2", "run-1", steps=[60, 10])
    assert total_of_two(ledger, "run-2") == composed(60, 40)
    ledger.reserve("run-2", TWO_STAGES, plan=PLAN, unit="customer")
    ledger.end_earlier("run-2")
    assert ledger.account().ended == {"run-1"}
    assert ledger.entries()[0][-1].entry.run == "run-1", "a run of two entries is ended once"
    assert after(ledger, "run-3", 1) == composed(61, 40)


# whose data


SAME = {
    "grown": (records("张三", "李四", "Åse", "王五"), "账户"),
    "corrected": (records("张三", "李四", text="更正 {}"), "账户"),
    "renamed": (PEOPLE, "renamed"),
    "one person in common": (records("李四", "赵六", text="别的 {}"), "renamed"),
    "one text in common": (records("甲", "乙", text="转账 李四"), "renamed"),
    "no unit column any more": (records("张三", column=None), "renamed"),
    "another label": (Records(("转账 张三",), ("正常",), ("甲",), "id"), "renamed"),
    "written otherwise": (records(" 李四", "A\u030ase", text="x {}"), "renamed"),
    "the name alone": (records("甲", text="全新 {}"), "账户"),
}


@pytest.mark.parametrize(("data", "dataset"), SAME.values(), ids=SAME)
def test_data_that_was_seen_keeps_its_history(open_ledger, data, dataset):
    open_ledger().spend("run-1", 1, PARAMS, 40)
    assert spent(open_ledger(data, dataset=dataset)) == cost(40)


def test_only_data_with_a_new_name_and_nobody_in_common_begins_at_zero(open_ledger):
    open_ledger().spend("run-1", 1, PARAMS, 40)
    assert spent(open_ledger(records("王五", text="别的 {}"), dataset="other")) == 0


def test_accounts_that_turn_out_to_share_a_person_are_joined(open_ledger):
    open_ledger(records("张三", text="甲 {}"), dataset="a").spend("run-1", 1, PARAMS, 10)
    open_ledger(records("李四", text="乙 {}"), dataset="b").spend("run-2", 1, OTHER, 20)
    joined = open_ledger(records("张三", "李四", text="丙 {}"), dataset="c")
    joined.spend("run-3", 1, PARAMS, 30)
    whole = composed_epsilon([PrivacySpend(PARAMS, 40), PrivacySpend(OTHER, 20)], DELTA)
    assert spent(joined) == whole
    assert spent(open_ledger(records("张三", text="甲 {}"), dataset="a")) == whole


def test_data_that_was_deleted_and_comes_back_is_known(open_ledger, path):
    open_ledger().spend("run-1", 1, PARAMS, 40)
    open_ledger(records("张三"))
    open_ledger(PEOPLE)
    assert spent(open_ledger(records("Åse", text="x {}"), dataset="other")) == cost(40)
    assert len([noted for noted in read_ledger(path) if isinstance(noted.entry, DataTaken)]) == 3


def test_the_fingerprint_is_that_of_the_content(open_ledger):
    ledger = open_ledger(data=None)
    order = records("李四", "Åse", "张三")
    assert ledger.take_data(PEOPLE) == ledger.take_data(order) != ledger.take_data(records("张三"))


def test_the_file_alone_tells_nobody_who_is_in_the_data(open_ledger, path, tmp_path):
    open_ledger()
    held = path.read_bytes()
    for secret in ("张三", "李四", "转账"):
        assert secret.encode() not in held
    with sqlite3.connect(path) as db:
        ours = {row[0] for row in db.execute("SELECT hash FROM seen")}
    open_ledger(place=tmp_path / "other.sqlite3")
    with sqlite3.connect(tmp_path / "other.sqlite3") as db:
        assert not ours & {row[0] for row in db.execute("SELECT hash FROM seen")}, "another key, other hashes"


# the file


def test_another_key_opens_nothing(open_ledger):
    open_ledger()
    with pytest.raises(WrongKey):
        open_ledger(key=StorageKey.generate())


def test_it_is_its_owners_alone(open_ledger, path):
    open_ledger().close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(CustodyError):
        open_ledger()


def fill(open_ledger) -> None:
    ledger = open_ledger()
    reserve(ledger, "run-1", 100)
    for number in (1, 2, 3):
        ledger.spend("run-1", number, PARAMS, 10)
    ledger.close()


ALTERED = {
    "lowered": (
        "UPDATE entries SET entry = replace(entry, '\"steps\":10', '\"steps\":1') WHERE number = 4",
        "entry 4 .*round 2",
    ),
    "removed": ("DELETE FROM entries WHERE number = 3", "entry 3 is missing"),
    "first removed": ("DELETE FROM entries WHERE number = 1", "entry 1 is missing"),
    "not JSON": ("UPDATE entries SET entry = x'ff00' WHERE number = 5", "entry 5 was changed"),
    "digest": ("UPDATE entries SET digest = zeroblob(32) WHERE number = 2", "entry 2"),
    "person removed": ("DELETE FROM seen WHERE rowid_of", "people and texts of entry 1"),
    "person added": ("INSERT INTO seen VALUES (zeroblob(16), 9)", "people and texts of entry 9"),
}


@pytest.mark.parametrize(("statement", "named"), ALTERED.values(), ids=ALTERED)
def test_what_was_altered_is_found_and_named(open_ledger, path, statement, named):
    fill(open_ledger)
    statement = statement.replace("rowid_of", "hash = (SELECT min(hash) FROM seen)")
    with sqlite3.connect(path) as db:
        db.execute(
            statement.replace("replace(entry,", "CAST(replace(CAST(entry AS TEXT),").replace(
                "') WHERE", "') AS BLOB) WHERE"
            )
        )
    db.close()
    for read in (lambda: open_ledger(), lambda: read_ledger(path)):
        with pytest.raises(AuditBroken, match=named):
            read()


COLUMNS = [
    ("SELECT entry FROM entries WHERE number = ?", "UPDATE entries SET entry = ? WHERE number = ?"),
    ("SELECT digest FROM entries WHERE number = ?", "UPDATE entries SET digest = ? WHERE number = ?"),
]


@given(data=st.data())
@settings(max_examples=40)
def test_one_byte_altered_anywhere_in_an_entry_is_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("l") / "ledger.sqlite3"
    ledger = Ledger(path, KEY, dataset="账户")
    ledger.take_data(PEOPLE)
    ledger.spend("run-1", 1, PARAMS, 10)
    ledger.close()
    number, (read, write) = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from(COLUMNS))
    with sqlite3.connect(path) as db:
        (held,) = db.execute(read, (number,)).fetchone()
        altered = bytearray(held)
        altered[data.draw(st.integers(0, 10_000)) % len(held)] ^= data.draw(st.integers(1, 255))
        db.execute(write, (bytes(altered), number))
    db.close()
    with pytest.raises(AuditBroken):
        read_ledger(path)


def test_an_older_copy_put_back_is_refused(open_ledger, path, tmp_path):
    ledger = open_ledger()
    ledger.check_holds(0, bytes(32))
    ledger.close()
    older = path.read_bytes()
    ledger = open_ledger()
    entered = ledger.spend("run-1", 1, PARAMS, 10)
    ledger.check_holds(entered.number, entered.digest)
    ledger.close()
    path.write_bytes(older)
    ledger = open_ledger()
    with pytest.raises(AuditBroken, match="ends with entry 1") as caught:
        ledger.check_holds(entered.number, entered.digest)
    assert "older copy" in caught.value.hint
    ledger.spend("run-1", 1, PARAMS, 11)
    with pytest.raises(AuditBroken, match="another one in its place"):
        ledger.check_holds(entered.number, entered.digest)


def test_two_processes_at_once_are_found_out(open_ledger, path):
    ledger = open_ledger()
    other = Ledger(path, KEY, dataset="账户")
    other.take_data(PEOPLE)
    other.spend("run-1", 1, PARAMS, 10)
    other.close()
    with pytest.raises(JournalUnusable, match="another process"):
        ledger.spend("run-1", 2, PARAMS, 10)
    assert spent(open_ledger()) == cost(10)


def test_a_disk_that_fails_enters_nothing(open_ledger, monkeypatch):
    ledger = open_ledger()

    def fail(*args):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("fedseek_site.ledger.encode_entry", fail)
    with pytest.raises(JournalUnusable, match="disk"):
        ledger.spend("run-1", 1, PARAMS, 10)
    monkeypatch.undo()
    assert spent(ledger) == 0
    ledger.spend("run-1", 1, PARAMS, 10)
    assert spent(open_ledger()) == cost(10)


def test_another_database_is_no_ledger(path, open_ledger):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE x (y)")
    db.close()
    path.chmod(0o600)
    for read in (open_ledger, lambda: read_ledger(path)):
        with pytest.raises(JournalUnusable):
            read()


def test_a_ledger_that_was_never_begun_has_no_entries(path):
    assert read_ledger(path) == []


def test_threads_spend_once_each(open_ledger, path):
    ledger = open_ledger()
    found: list[Noted] = []

    def work() -> None:
        found.extend(ledger.spend("run-1", number, PARAMS, 1) for number in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert sum(isinstance(noted.entry, Spent) for noted in read_ledger(path)) == 5


def test_the_paths_of_a_site_hold_it():
    from fedseek_site.paths import Paths

    assert Paths(Path("site")).ledger == Path("site/ledger.sqlite3")
