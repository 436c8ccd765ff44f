"""A site's policy: what it says no to, by which key; what a file of it may look like."""

import copy
import dataclasses
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.errors import InvalidConfig, NotNow, PlanRefused
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.plan import check_plan, parse_spec
from fedseek.plan_spec import PlanSpec
from fedseek_site import policy as policy_module
from fedseek_site.policy import Policy, check_hours, check_policy, load_policy

EXAMPLE = Path(__file__).resolve().parents[2] / "clients" / "policy.example.toml"
ME = "北岸银行"
SITES = ((ME, "bank"), ("harbour-bank", "bank"), ("仁济医院", "hospital"))
ROSTER = Roster.of(SiteIdentity.generate(name, kind).public() for name, kind in SITES)
KEYS = [f"{number:02x}" * 32 for number in range(1, 5)]

PLAN = {
    "name": "demo",
    "model": {"source": "package:some-model", "sha256": "ab" * 32},
    "kinds": {
        "bank": {"labels": ["欺诈", "正常"], "metric": "auc", "unit": "customer"},
        "hospital": {"labels": ["急诊", "普通"], "unit": "patient"},
    },
    "lora": {"target_modules": ["query"]},
    "training": {
        "rounds": 2,
        "steps_per_round": 4,
        "sampling_probability": 0.25,
        "learning_rate": 0.002,
        "head_learning_rate": 0.01,
    },
    "privacy": {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-5},
    "cohort": {"min_sites": 3, "max_sites": 8},
}
CHECKED = check_plan(parse_spec(PLAN))
ALLOWING = {
    "version": 1,
    "limits": {"max_epsilon": 8.0, "max_delta": 1e-5, "max_epsilon_total": 8.0, "max_rounds": 2, "max_steps": 8},
    "models": {"allowed": ["ab" * 32]},
    "tasks": {
        "kinds": ["bank", "hospital"],
        "labels": ["欺诈", "正常"],
        "units": ["customer"],
        "metrics": ["auc"],
    },
    "approval": {"required": 0},
}
Document = dict


def changed(document: Document, **changes: object) -> Document:
    """``limits__max_epsilon=2`` changes one entry of one table."""
    document = copy.deepcopy(document)
    for path, value in changes.items():
        *tables, key = path.split("__")
        table = document
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return document


def plan(**changes: object):
    """The plan with changes, without working out its noise again: no rule looks at that."""
    spec = PlanSpec.model_validate_json(json.dumps(changed(CHECKED.spec.model_dump(), **changes)))
    return dataclasses.replace(CHECKED, spec=spec)


def policy(**changes: object) -> Policy:
    return Policy.model_validate_json(json.dumps(changed(ALLOWING, **changes)))


def refusals(rules: Policy, asked=CHECKED, *, roster=ROSTER, after=0.0) -> list[str]:
    """Every rule that says no; the first is what others are told."""
    try:
        check_policy(rules, asked, roster, site=ME, total_epsilon_after=after)
    except PlanRefused as error:
        rest = error.hint.removeprefix("this policy also says no by: ")
        return [error.rule, *(rest.split("; ") if rest else [])]
    return []


def test_a_plan_at_the_edge_of_every_rule_is_admitted():
    assert refusals(policy(), after=8.0) == []


TRIPS = [
    ("limits.max_epsilon: plan asks 8, allowed 2", {"limits__max_epsilon": 2}, {}),
    ("limits.max_delta: plan asks 1e-05, allowed 1e-06", {"limits__max_delta": 1e-6}, {}),
    ("limits.max_epsilon_total", {"limits__max_epsilon_total": 7.99}, {}),
    ("limits.max_rounds: plan asks 2, allowed 1", {"limits__max_rounds": 1}, {}),
    ("limits.max_steps: plan asks 8, allowed 7", {"limits__max_steps": 7}, {}),
    (
        "limits.allow_without_privacy: the plan promises no privacy",
        {},
        {"privacy__mechanism": "none", "privacy__epsilon": None, "privacy__delta": None},
    ),
    ("required.min_sites: plan has 3, wanted 4", {"required__min_sites": 4}, {}),
    ("required.min_sites: plan has 2, wanted 3", {}, {"cohort__min_sites": 2}),
    ("required.min_contributors: plan has 3, wanted 4", {"required__min_contributors": 4}, {}),
    ("required.min_colluders: plan withstands 1, wanted 2", {"required__min_colluders": 2}, {}),
    ("required.max_key_days: plan asks 90, allowed 30", {"required__max_key_days": 30}, {}),
    ("models.allowed: the plan's base model is not among those allowed", {"models__allowed": ["cd" * 32]}, {}),
    ("tasks.kinds: the plan has tasks for hospital", {"tasks__kinds": ["bank"]}, {}),
    ("tasks.labels: the plan has labels that are not allowed", {"tasks__labels": ["欺诈"]}, {}),
    (
        "tasks.language: the plan asks to instruct, allowed none",
        {"tasks__metrics": ["accuracy", "answers"]},
        {"kinds__bank": {"task": "instruct", "unit": "customer"}},
    ),
    (
        "tasks.metrics: the plan discloses answers, allowed accuracy",
        {"tasks__language": ["instruct"], "tasks__metrics": ["accuracy"]},
        {"kinds__bank": {"task": "instruct", "unit": "customer"}},
    ),
    ("tasks.units: the plan protects a customer, allowed patient", {"tasks__units": ["patient"]}, {}),
    ("tasks.metrics: the plan discloses auc, allowed accuracy", {"tasks__metrics": ["accuracy"]}, {}),
]


@pytest.mark.parametrize(
    ("rule", "rules", "asked"), TRIPS, ids=[f"{n}-{r.split(':')[0]}" for n, (r, *_) in enumerate(TRIPS)]
)
def test_each_rule_says_no_by_the_key_it_has_in_the_file(rule, rules, asked):
    assert refusals(policy(**rules), plan(**asked), after=8.0) == [rule]
    table, key = rule.split(":")[0].split(".")
    assert hasattr(getattr(Policy(version=1), table), key)


def test_a_plan_without_a_lock_would_be_refused(monkeypatch):
    monkeypatch.setattr(policy_module, "LOCKS", {1: frozenset({"masks"})})
    assert refusals(policy()) == ["required.locks: the plan goes without encryption"]


def test_a_plan_without_a_task_for_this_site_is_refused():
    hospital_only = {"hospital": PLAN["kinds"]["hospital"]}
    assert refusals(policy(), plan(kinds=hospital_only)) == ["tasks.kinds: the plan has no task for this site"]
    others = Roster.of(entry for entry in ROSTER.entries if entry.name != ME)
    assert "tasks.kinds: the plan has no task for this site" in refusals(policy(), roster=others)


def test_what_the_data_would_have_cost_counts_and_is_not_told():
    assert refusals(policy(limits__max_epsilon_total=10), after=10.0) == []
    for after in (10.001, float("inf"), float("nan")):
        assert refusals(policy(limits__max_epsilon_total=10), after=after) == ["limits.max_epsilon_total"]
    assert refusals(policy(limits__max_epsilon_total=0.3), plan(privacy__epsilon=0.1), after=0.1 + 0.1 + 0.1) == []


def test_a_plan_without_privacy_runs_where_that_is_written_down():
    none = plan(privacy__mechanism="none", privacy__epsilon=None, privacy__delta=None)
    assert refusals(policy(limits__allow_without_privacy=True), none) == []


def test_every_rule_that_says_no_is_in_the_hint_and_the_first_is_told():
    found = refusals(policy(limits__max_epsilon=2, tasks__metrics=[], required__min_sites=9, models__allowed=[]))
    assert [rule.split(":")[0] for rule in found] == [
        "limits.max_epsilon",
        "required.min_sites",
        "models.allowed",
        "tasks.metrics",
    ]


def test_a_policy_of_defaults_allows_no_model_and_no_task():
    found = refusals(Policy(version=1), plan(privacy__epsilon=1.0))
    assert {rule.split(":")[0] for rule in found} == {
        "models.allowed",
        "tasks.kinds",
        "tasks.labels",
        "tasks.units",
        "tasks.metrics",
    }


def test_any_has_to_be_written_out():
    assert refusals(policy(models__allowed=["any"], tasks__kinds=["any"], tasks__labels=["any"])) == []


@given(st.data())
def test_tightening_a_rule_never_admits_more(data):
    tables = {
        "limits__max_epsilon": st.sampled_from([1.0, 4.0, 8.0, 20.0]),
        "limits__max_delta": st.sampled_from([1e-6, 1e-5, 1e-4]),
        "limits__max_epsilon_total": st.sampled_from([1.0, 8.0, 30.0]),
        "limits__max_rounds": st.integers(1, 4),
        "limits__max_steps": st.integers(1, 16),
        "limits__allow_without_privacy": st.booleans(),
        "required__min_sites": st.integers(2, 5),
        "required__min_contributors": st.integers(2, 5),
        "required__min_colluders": st.integers(0, 3),
        "required__max_key_days": st.integers(1, 90),
        "models__allowed": st.lists(st.sampled_from(["ab" * 32, "cd" * 32])),
        "tasks__kinds": st.lists(st.sampled_from(["bank", "hospital"])),
        "tasks__labels": st.lists(st.sampled_from(["欺诈", "正常"])),
        "tasks__units": st.lists(st.sampled_from(["record", "customer"])),
        "tasks__metrics": st.lists(st.sampled_from(["auc", "accuracy"])),
    }
    rules = {path: data.draw(values, label=path) for path, values in tables.items() if data.draw(st.booleans())}
    path = data.draw(st.sampled_from(sorted(tables)), label="tightened")
    loose, other = data.draw(tables[path]), data.draw(tables[path])
    tight = stricter(path, loose, other)
    after = data.draw(st.sampled_from([0.0, 9.0, float("inf")]))
    asked = plan(
        training__rounds=data.draw(st.integers(1, 3)),
        privacy__epsilon=data.draw(st.sampled_from([0.5, 4.0, 8.0])),
        cohort__colluders=data.draw(st.integers(0, 2)),
    )
    if not refusals(policy(**{**rules, path: tight}), asked, after=after):
        assert not refusals(policy(**{**rules, path: loose}), asked, after=after)


def stricter(path: str, one, other):
    """The stricter of two values of a rule; of two lists, what is on both."""
    if isinstance(one, list):
        return [each for each in one if each in other]
    return max(one, other) if "__min_" in path else min(one, other)


# hours


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def is_open(rules: Policy, now: float) -> bool:
    try:
        check_hours(rules, site=ME, now=now)
    except NotNow:
        return False
    return True


def test_an_hour_that_is_none_of_the_sites_is_told_by_its_key():
    with pytest.raises(NotNow) as caught:
        check_hours(policy(hours__windows=[{"from": "09:00", "to": "10:00"}]), site=ME, now=at("2026-11-23T10:00"))
    assert (caught.value.site, caught.value.rule) == (ME, "hours.windows: this site takes part at other hours")


NIGHTS = {"days": ["Mon", "Fri"], "from": "20:00", "to": "06:00"}  # 2026-11-23 is a Monday


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("2026-11-23T19:59", False),
        ("2026-11-23T20:00", True),
        ("2026-11-24T05:59", True),  # Tuesday morning belongs to Monday's night
        ("2026-11-24T06:00", False),
        ("2026-11-24T20:00", False),
        ("2026-11-23T03:00", False),  # Sunday night is no window
        ("2026-11-28T03:00", True),  # Saturday morning
    ],
)
def test_a_window_over_midnight_belongs_to_the_day_it_begins_on(when, expected):
    rules = policy(hours__windows=[NIGHTS], hours__timezone="Asia/Shanghai")
    assert is_open(rules, at(when, "Asia/Shanghai")) is expected


def test_hours_are_those_of_the_zone_daylight_saving_included():
    rules = policy(hours__windows=[{"from": "09:00", "to": "10:00"}], hours__timezone="Europe/Stockholm")
    assert is_open(rules, at("2026-01-15T08:30"))  # 09:30 in winter
    assert not is_open(rules, at("2026-07-15T08:30"))  # 10:30 in summer
    assert is_open(rules, at("2026-07-15T07:30"))


def test_no_windows_is_any_hour_and_a_whole_day_is_one():
    assert is_open(policy(), at("2026-11-23T03:00"))
    weekend = policy(hours__windows=[{"days": ["Sun"], "from": "00:00", "to": "24:00"}])
    hours = [datetime(2026, 11, day, hour, 59, tzinfo=UTC).timestamp() for day in (21, 22, 23) for hour in (0, 12, 23)]
    assert [is_open(weekend, hour) for hour in hours] == [False] * 3 + [True] * 3 + [False] * 3


def test_any_of_several_windows_will_do():
    rules = policy(hours__windows=[{"from": "01:00", "to": "02:00"}, {"from": "03:00", "to": "04:00"}])
    assert [is_open(rules, at(f"2026-11-23T0{hour}:30")) for hour in range(5)] == [False, True, False, True, False]


# the file


@pytest.fixture
def write(tmp_path):
    tmp_path.chmod(0o755)

    def write(text: str, mode: int = 0o644) -> Path:
        path = tmp_path / "策略.toml"
        path.write_text(text, "utf-8")
        path.chmod(mode)
        return path

    return write


def problems(path: Path) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        load_policy(path)
    return caught.value


def test_the_example_is_a_policy(write):
    rules = load_policy(write(EXAMPLE.read_text("utf-8")))
    assert set(rules.officers()) == {"张伟", "Anna Lindqvist"}
    assert rules.approval.people["王芳"].public_key.hex().startswith("fc51cd8e6218a1a3")
    assert rules.audit.retention_days == 400
    assert rules.hours.windows[0].start == "20:00"
    defaults = {"limits", "required", "roster", "audit"}
    assert {name: getattr(rules, name) for name in defaults} == {
        name: getattr(Policy(version=1), name) for name in defaults
    }


def test_the_example_names_every_key_there_is():
    text = EXAMPLE.read_text("utf-8")
    for name, field in Policy.model_fields.items():
        keys = getattr(type(field.default), "model_fields", {})
        assert not keys or f"[{name}]" in text
        for key in keys.keys() - {"people"}:
            assert re.search(rf"^{key} =", text, re.MULTILINE), f"{name}.{key}"


def test_a_missing_policy_says_what_to_do(tmp_path):
    error = problems(tmp_path / "policy.toml")
    assert "refuses every plan" in error.hint
    assert "policy.example.toml" in error.hint


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o602, 0o620])
def test_a_policy_that_others_may_write_is_none(write, mode):
    error = problems(write("version = 1\n[approval]\nrequired = 0\nreleases = 0\n", mode))
    assert f"mode {mode:04o}" in error.message
    assert "chmod go-w" in error.hint


def test_nor_one_that_others_may_put_another_in_place_of(write):
    path = write("version = 1\n[approval]\nrequired = 0\nreleases = 0\n")
    path.parent.chmod(0o777)
    assert "group or others may write it" in problems(path).message


def test_a_link_is_judged_by_what_it_leads_to(write, tmp_path):
    path = write("version = 1\n[approval]\nrequired = 0\nreleases = 0\n", 0o666)
    link = tmp_path / "policy.toml"
    link.symlink_to(path)
    assert "mode 0666" in problems(link).message
    path.chmod(0o600)
    assert load_policy(link).approval.required == 0


def test_a_folder_is_no_policy(tmp_path):
    folder = tmp_path / "policy.toml"
    folder.mkdir(mode=0o700)
    assert "not a plain file" in problems(folder).message


def person(key: str, role: str = "privacy officer") -> str:
    return f'role = "{role}"\nkey = "{key}"\n'


OFFICER = f'[approval.people."张伟"]\n{person(KEYS[0])}'
BREAKS = [
    ("", ["version: field required"]),
    ("version = 2", ["version: input should be 1"]),
    (
        "version = 1\nextra = 1\n[limits]\nmax_epsilon = 51.0\nmax_round = 3\n",
        ["extra:", "limits.max_epsilon:", "limits.max_round:"],
    ),
    (
        'version = 1\n[limits]\nallow_without_privacy = "yes"\nmax_rounds = 2.5',
        ["allow_without_privacy:", "max_rounds:"],
    ),
    ("version = 1\n[limits]\nmax_epsilon = nan\nmax_delta = inf", ["limits.max_epsilon:", "limits.max_delta:"]),
    ('version = 1\n[models]\nallowed = ["AB"]\n[required]\nlocks = ["hope"]', ["models.allowed.0", "required.locks.0"]),
    ('version = 1\n[hours]\ntimezone = "Mars/Olympus"', ["hours.timezone:"]),
    ('version = 1\n[hours]\ntimezone = "../etc/passwd"', ["hours.timezone:"]),
    ('version = 1\n[hours]\nwindows = [{ from = "8:00", to = "25:00", days = ["Mo"] }]', ["from:", "to:", "days.0:"]),
    ("version = 1\n[hours]\nwindows = [{ }]", ["hours.windows.0.from: field required"]),
    ("version = 1\n[audit]\nretention_days = 179", ["audit.retention_days:"]),
    (
        f'version = 1\n[approval]\nrequired = 3\n[approval.people."x"]\n{person("zz")}',
        ["approval.required:", "people.x.key:"],
    ),
    (f'version = 1\n[approval.people."x"]\n{person(KEYS[0], "ceo")}', ["approval.people.x.role:"]),
    # what belongs together
    ("version = 1", ["1 privacy officer(s) have to agree, got 0"]),
    (f"version = 1\n[approval]\nrequired = 2\n{OFFICER}", ["2 privacy officer(s) have to agree, got 1"]),
    ("version = 1\n[approval]\nrequired = 0", ["1 privacy officer(s) have to agree, got 0"]),
    (f"version = 1\n[approval]\nreleases = 2\n{OFFICER}", ["2 privacy officer(s) have to agree, got 1"]),
    (f"version = 1\n[approval]\nreleases = 3\n{OFFICER}", ["approval.releases:"]),
    (
        f'version = 1\n[approval.people."x"]\n{person(KEYS[0], "operator")}',
        ["1 privacy officer(s) have to agree, got 0"],
    ),
    ('version = 1\n[approval]\nrequired = 0\nreleases = 0\n[roster]\nchanges = "approve"', ["1 privacy officer(s)"]),
    (
        f'version = 1\n[approval]\nrequired = 2\n{OFFICER}[approval.people."x"]\n{person(KEYS[0].upper())}',
        ["'张伟' and 'x' have one key"],
    ),
    (f'version = 1\n[approval.people." x"]\n{person(KEYS[0])}', ["approval.people: name ' x'"]),
    (f'version = 1\n[models]\nallowed = ["any", "{KEYS[0]}"]\n{OFFICER}', ['models.allowed: "any" and digests']),
    (
        f'version = 1\n[hours]\nwindows = [{{ from = "08:00", to = "08:00" }}]\n{OFFICER}',
        ["hours.windows.0: from 08:00 to 08:00"],
    ),
    (
        f'version = 1\n[hours]\nwindows = [{{ from = "24:00", to = "08:00" }}]\n{OFFICER}',
        ["hours.windows.0: from 24:00"],
    ),
]


@pytest.mark.parametrize(("text", "expected"), BREAKS, ids=range(len(BREAKS)))
def test_every_problem_is_told_at_once(write, text, expected):
    error = problems(write(text))
    for words in expected:
        assert words in error.message
    assert len(error.problems) >= len(expected)


def test_the_digest_is_that_of_what_it_says(write):
    one = load_policy(write("version = 1\n[approval]\nrequired = 0\nreleases = 0\n"))
    same = load_policy(
        write("# 注释\nversion = 1\n[limits]\nmax_rounds = 100\n[approval]\nrequired = 0\nreleases = 0\n")
    )
    other = load_policy(write("version = 1\n[limits]\nmax_rounds = 101\n[approval]\nrequired = 0\nreleases = 0\n"))
    assert one.digest() == same.digest() != other.digest()


def test_utc_needs_no_database_of_zones(monkeypatch):
    monkeypatch.setattr(policy_module, "ZoneInfo", None)
    assert policy_module.zone("UTC") is UTC


def test_rules_tell_nothing_of_the_data():
    strict = policy(
        limits__max_epsilon=1, limits__max_epsilon_total=1, tasks__labels=[], tasks__units=[], tasks__metrics=[]
    )
    told = "".join(refusals(strict, after=3.25))
    for secret in ("3.25", "欺诈", "正常", ME):
        assert secret not in told
