"""``fedseek-site budget``: the figures, from the daemon and from the folder."""

import json
import math

import click
import pytest
from click.testing import CliRunner
from people_of_a_site import DOCUMENT, PLAN, ROSTER, House, make_plan

from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.composition import composed_epsilon, composed_epsilon_rdp
from fedseek.errors import InvalidPlan, LocalRefused, Unreachable
from fedseek.plan import check_plan
from fedseek.plan_spec import DomainSpec
from fedseek_site.budget import Planned, budget_of, describe_budget
from fedseek_site.budget_command import budget as command
from fedseek_site.ledger_entries import Limit, Mechanism, parts_of
from fedseek_site.local_answers import answer_from
from fedseek_site.local_api import serve_local

LIMIT = Limit(4.0, 1e-5)
SITE_TOML = """version = 1
[data]
name = "账户"
train = "账户.jsonl"
held_back = "留出.jsonl"
"""


def cost(steps):
    return composed_epsilon([PrivacySpend(PLAN.privacy, steps)], 1e-5)


@pytest.fixture
def house(tmp_path):
    """A site that has trained one round of an admitted run, and a round of one that has ended."""
    folder = tmp_path / "站点"
    folder.mkdir()
    made = House(folder)
    (folder / "site.toml").write_text(SITE_TOML, "utf-8")
    for run in ("旧-1", "试运行-2"):
        made.permission.permit(run, "plan", PLAN, ROSTER)
        made.ledger.spend(run, 1, PLAN.privacy, 4)
    made.ledger.end("旧-1")
    yield made
    made.approvals.close()
    made.ledger.close()


@pytest.fixture
def daemon(house):
    api = answer_from(
        house.permission,
        more_status=dict,
        data=dict,
        reload_data=dict,
        audit_head=dict,
        accept_record=lambda asked: {},
    )
    stop = serve_local(api, house.folder / "run", record=house.record)
    yield house
    stop(0.2)


def run(house, *arguments):
    result = CliRunner().invoke(command, ["--folder", str(house.folder), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def figures(house, *arguments):
    return json.loads(run(house, "--json", *arguments).output)


def test_what_was_spent_what_is_set_aside_and_what_is_left(daemon):
    told = figures(daemon)
    assert (told["dataset"], told["delta"], told["limit"], told["units"]) == ("账户", 1e-5, 4.0, ["customer"])
    assert (told["spent"], told["total"]) == (cost(8), cost(12))
    assert told["spent_rdp"] == composed_epsilon_rdp([PrivacySpend(PLAN.privacy, 8)], 1e-5) > told["spent"]
    assert told["left"] == 4.0 - cost(12)
    assert [(run["run"], run["state"], run["rounds"], run["set_aside_steps"]) for run in told["runs"]] == [
        ("旧-1", "ended", 1, 0),
        ("试运行-2", "open", 1, 4),
    ]
    assert told["runs"][0]["epsilon"] == cost(4)
    assert told["planned"] is None, "every plan announced was used by a run"


def test_the_next_plan_is_the_one_announced_last_that_no_run_used(daemon):
    daemon.permission.notice(make_plan(1), ROSTER)
    planned = figures(daemon)["planned"]
    assert (planned["digest"], planned["epsilon"]) == (make_plan(1).digest, cost(8))
    assert (planned["total_after"], planned["fits"]) == (cost(20), True)
    daemon.write_policy(limits={"max_epsilon_total": 3})
    assert figures(daemon, "--plan", make_plan(1).digest[:12].upper())["planned"]["fits"] is False


def test_a_plan_file_of_ones_own(daemon, tmp_path):
    path = tmp_path / "计划.toml"
    tables = [f"[{name}]\n{_toml(entries)}" for name, entries in DOCUMENT.items() if isinstance(entries, dict)]
    path.write_text("\n".join(['name = "fraud"', *tables]), "utf-8")
    planned = figures(daemon, "--plan", str(path))["planned"]
    assert (planned["digest"], planned["total_after"]) == (PLAN.digest, cost(20))


def _toml(entries):
    return "\n".join(
        f"{key} = " + ("{ " + ", ".join(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()) + " }")
        if isinstance(value, dict)
        else f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in entries.items()
    )


def test_in_words(daemon):
    told = run(daemon).output
    assert f"spent:              epsilon {cost(8):.3f} at delta 1e-05" in told
    assert "run 试运行-2:" in told
    assert "1 rounds, 4 steps, 4 set aside, per customer" in told


def test_where_no_daemon_runs_the_folder_says_the_same(house):
    from_folder = figures(house)
    entries, data = house.ledger.entries()
    assert from_folder["spent"] == budget_of(entries, data, LIMIT, None).spent == cost(8)
    assert figures(house, "--plan", PLAN.digest[:12])["planned"]["total_after"] == cost(20)


def test_a_folder_without_a_ledger_says_so(house):
    house.ledger.close()
    (house.folder / "ledger.sqlite3").unlink()
    with pytest.raises(Unreachable, match="no ledger here"):
        figures(house)


@pytest.mark.parametrize("plan", ["abc", "0123456789xyz", "计划.toml"])
def test_what_is_no_plan_is_refused(daemon, plan):
    result = run(daemon, "--plan", plan)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (click.UsageError.exit_code, True)
    with pytest.raises((LocalRefused, InvalidPlan), match="no plan announced"):
        run(daemon, "--plan", "0" * 12)


def test_an_officer_ends_a_run_for_good(daemon):
    assert json.loads(run(daemon, "--end", "试运行-2", "--json").output) == {"run": "试运行-2", "ended": True}
    assert figures(daemon)["total"] == cost(8)
    assert daemon.recorded[-1] == (
        "local-call",
        {"role": "operator", "method": "budget", "plan": "", "outcome": "asked"},
    )
    assert ("run-ended", {"run": "试运行-2", "ended": True}) in daemon.recorded
    assert json.loads(run(daemon, "--end", "试运行-2", "--json").output)["ended"] is False


def test_after_a_run_without_privacy_there_is_no_bound(house):
    house.ledger.spend("frei", 1, None, 4)
    entries, data = house.ledger.entries()
    told = budget_of(entries, data, LIMIT, Planned.of(PLAN))
    assert (told.spent, told.spent_rdp, told.total, told.left) == (None, None, None, 0.0)
    assert told.planned is not None
    assert (told.planned.total_after, told.planned.fits) == (None, False)
    assert "without bound" in dict(describe_budget(told))["spent"]
    assert not math.isnan(told.left)


def test_sums_over_different_units_say_so(house):
    house.ledger.reserve("run-9", [(Mechanism.of(PLAN.privacy), 4)], plan="cd" * 32, unit="record")
    entries, data = house.ledger.entries()
    assert "customer, record" in dict(describe_budget(budget_of(entries, data, LIMIT, None)))["note"]


# --- two stages

DOMAIN = {"rounds": 1, "steps_per_round": 4, "sampling_probability": 1.0, "learning_rate": 0.001, "budget_share": 0.25}


def test_a_plan_of_two_stages_costs_what_both_cost_together(house):
    spec = PLAN.spec.model_copy(update={"domain": DomainSpec.model_validate(DOMAIN), "name": "two"})
    plan = check_plan(spec)
    planned = Planned.of(plan)
    house.ledger.reserve("两-3", parts_of(plan), plan=plan.digest, unit="customer")
    house.ledger.spend("两-3", 1, plan.stages[0].privacy, 4)
    entries, data = house.ledger.entries()
    told = budget_of(entries, data, LIMIT, planned)
    assert told.planned.epsilon == composed_epsilon(plan.spend_of(plan.steps_after(plan.rounds)).stages, 1e-5)
    run = next(each for each in told.runs if each.run == "两-3")
    assert (run.rounds, run.steps, run.set_aside_steps) == (1, 4, plan.stages[1].num_steps)
    assert [(each.noise_multiplier, each.steps, each.set_aside_steps) for each in run.mechanisms] == [
        (plan.stages[0].privacy.noise_multiplier, 4, 0),
        (plan.stages[1].privacy.noise_multiplier, 0, plan.stages[1].num_steps),
    ]
    assert run.epsilon == plan.spend_after(1).epsilon()
