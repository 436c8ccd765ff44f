"""What a site says to a plan, a run and a round, and what it writes down of it."""

from functools import partial

import pytest
from msgspec.structs import replace
from people_of_a_site import ANNA, NOON, OTHER_ROSTER, PLAN, ROSTER, SITE, ZHANG, House, make_plan, sign

from fedseek.daemon.audit import AuditChain
from fedseek.errors import AuditBroken, InvalidConfig, NotNow, PlanRefused, WrongKey, WrongRound
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signing import sign as sign_as
from fedseek_site.ledger_entries import epsilon_of

NIGHT = {"windows": [{"from": "20:00", "to": "06:00"}]}


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    yield made
    made.approvals.close()
    made.ledger.close()


def set_aside(house) -> float:
    """Epsilon of what was trained and of what may be, in runs that were admitted."""
    account = house.ledger.account()
    return epsilon_of(account.spent() + account.reserved(), 1e-5)


def permit(house, phase="plan", *, run="run-1", plan=PLAN, roster=ROSTER) -> str:
    """Empty, or the rule that says no after the class of the error."""
    try:
        house.permission.permit(run, phase, plan, roster)
    except (PlanRefused, NotNow) as error:
        return f"{error.code} {error.rule}"
    return ""


def test_a_run_is_written_down_with_what_it_may_spend_before_it_begins(house):
    assert permit(house) == ""
    assert set_aside(house) == pytest.approx(2.0, rel=1e-3)
    [(kind, facts)] = house.recorded
    assert kind == "permitted"
    assert facts == {
        "asked_by": "coordinator",
        "run": "run-1",
        "phase": "plan",
        "plan": PLAN.digest,
        "roster": ROSTER.digest().hex(),
        "rule": "",
        "policy": house.permission.policy().digest(),
        "dataset": "账户",
        "epsilon": 2.0,
        "delta": 1e-5,
    }


def test_the_same_run_again_spends_nothing_and_another_one_finds_less(house):
    assert [permit(house), permit(house)] == ["", ""]
    assert [permit(house, run=f"run-{number}") for number in (2, 3, 4)] == ["", "", ""]
    assert set_aside(house) == pytest.approx(3.84, abs=0.01)  # four runs of epsilon 2, composed
    assert permit(house, run="run-5") == "PlanRefused limits.max_epsilon_total"
    assert permit(house, run="run-2") == ""  # it began: killed before it could answer
    assert set_aside(house) == pytest.approx(3.84, abs=0.01)


def test_a_run_that_ended_gives_back_what_it_did_not_train(house):
    house.write_policy(limits={"max_epsilon_total": 2.2})
    assert permit(house) == ""
    house.ledger.spend("run-1", 1, PLAN.privacy, 1)
    assert permit(house, run="run-2") == "PlanRefused limits.max_epsilon_total"
    assert house.ledger.end("run-1")
    assert permit(house, run="run-2") == ""
    with pytest.raises(WrongRound):
        house.ledger.spend("run-1", 2, PLAN.privacy, 1)


def test_killed_between_ledger_and_approvals_a_run_is_set_aside_once(house, monkeypatch):
    house.write_policy(limits={"max_epsilon_total": 2})

    def die(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(house.approvals, "admit", die)
    with pytest.raises(KeyboardInterrupt):
        permit(house)
    monkeypatch.undo()
    assert permit(house) == ""
    assert set_aside(house) == pytest.approx(2.0, rel=1e-3)


def test_a_run_does_not_change_its_plan_or_roster(house):
    assert permit(house) == ""
    for changes in ({"plan": make_plan(1)}, {"roster": OTHER_ROSTER}):
        assert permit(house, **changes) == "PlanRefused the run began at this site with another plan or roster"


def test_a_refused_run_is_not_written_down_as_admitted_nor_shown_to_people(house):
    house.write_policy(limits={"max_epsilon": 1})
    assert permit(house) == "PlanRefused limits.max_epsilon: plan asks 2, allowed 1"
    assert set_aside(house) == 0
    assert house.approvals.noticed() == ()
    assert house.kinds() == ["refused-by-policy"]
    assert house.recorded[0][1]["rule"].startswith("limits.max_epsilon")


# hours and pause


def test_hours_put_off_runs_and_rounds(house):
    assert permit(house) == ""
    house.write_policy(hours=NIGHT)
    late = "NotNow hours.windows: this site takes part at other hours"
    assert permit(house, run="run-2") == permit(house, "round") == late
    assert house.approvals.begun("run-2") is None
    house.now = NOON + 12 * 3600
    assert permit(house, "round") == ""


def test_a_pause_puts_off_runs_and_rounds_also_after_a_restart(house, tmp_path):
    assert permit(house) == ""
    house.permission.pause()
    house.approvals.close()
    again = House(tmp_path)
    assert permit(again, "round") == permit(again, run="run-2") == "NotNow paused by the operator"
    again.permission.resume()
    assert permit(again, "round") == ""
    assert house.kinds() == ["permitted", "paused"]
    assert again.kinds() == ["put-off", "put-off", "resumed", "permitted"]
    again.approvals.close()


# approvals


def test_a_run_waits_for_as_many_people_as_the_policy_says(house):
    house.write_policy(approval={"required": 2})
    assert permit(house) == "NotNow approval.required: 0 of 2 people have approved"
    assert [each.plan.digest for each in house.approvals.noticed()] == [PLAN.digest]
    house.permission.approve(sign(ZHANG))
    house.permission.approve(sign(ZHANG, at=NOON + 1))
    assert permit(house) == "NotNow approval.required: 1 of 2 people have approved"
    house.permission.approve(sign(ANNA))
    assert house.approvals.begun("run-1") is None
    assert permit(house) == ""
    assert house.kinds() == ["put-off", "approved", "approved", "put-off", "approved", "permitted"]
    assert house.recorded[1][1] == {
        "plan": PLAN.digest,
        "roster": ROSTER.digest().hex(),
        "person": ZHANG,
        "signed_at": int(NOON),
        "signature": sign(ZHANG).signature.hex(),
    }


def test_an_approval_of_one_plan_among_one_set_of_sites_is_none_of_another(house):
    house.write_policy(approval={"required": 1})
    permit(house)
    house.permission.approve(sign(ZHANG))
    assert permit(house, plan=make_plan(1)).startswith("NotNow approval.required")
    assert permit(house, roster=OTHER_ROSTER).startswith("NotNow approval.required")
    assert permit(house) == ""


def test_a_withdrawal_puts_a_run_off_until_it_is_approved_again(house):
    house.write_policy(approval={"required": 1})
    permit(house)
    house.permission.approve(sign(ZHANG))
    assert permit(house) == permit(house, "round") == ""
    house.now += 60
    assert house.permission.withdraw(PLAN.digest, ZHANG) == 1
    assert permit(house, "round") == "NotNow approval.required: 0 of 1 people have approved"
    house.now += 60
    house.permission.approve(sign(ZHANG, at=house.now))
    assert permit(house, "round") == ""
    assert house.recorded[-3][0] == "put-off"


def test_a_bad_approval_is_refused_and_not_recorded(house):
    house.write_policy(approval={"required": 1})
    permit(house)
    before = list(house.recorded)
    with pytest.raises(WrongKey):
        house.permission.approve(replace(sign(ZHANG), signature=bytes(64)))
    assert house.recorded == before


def test_new_sites_want_an_approval_where_the_policy_says_so(house):
    house.write_policy(roster={"changes": "approve"})
    assert permit(house) == "NotNow roster.changes: 0 of 1 people have approved"
    house.permission.approve(sign(ZHANG))
    assert permit(house) == ""
    house.write_policy(roster={"changes": "approve"}, limits={"max_epsilon_total": 50})
    assert permit(house, run="run-2", plan=make_plan(1)) == ""  # among sites that are known by now
    other = permit(house, run="run-3", plan=make_plan(1), roster=OTHER_ROSTER)
    assert other == "NotNow roster.changes: 0 of 1 people have approved"


# the policy on the disk


def test_a_changed_policy_holds_from_the_next_question_on(house):
    assert house.permission.verdict(PLAN, ROSTER) == ("ready", "")
    house.write_policy(limits={"max_epsilon": 1})
    assert house.permission.verdict(PLAN, ROSTER) == ("refused", "limits.max_epsilon: plan asks 2, allowed 1")
    house.write_policy()
    assert permit(house) == ""


@pytest.mark.parametrize("broken", ["version = 1\nnonsense = 1", "version =", "", None])
def test_a_policy_that_cannot_be_read_permits_nothing_and_says_so(house, broken):
    assert permit(house) == ""
    if broken is None:
        (house.folder / "policy.toml").unlink()
    else:
        house.write(broken)
    with pytest.raises(PlanRefused) as caught:
        house.permission.permit("run-2", "plan", PLAN, ROSTER)
    assert caught.value.rule == "policy: this site's policy cannot be used"
    assert "policy.toml" in caught.value.hint
    assert permit(house, "round") == "NotNow policy: this site's policy cannot be used"  # no reason to end the run
    assert house.permission.verdict(PLAN, ROSTER)[0] == "refused"
    assert house.recorded[-1][1]["policy"] == "unusable"
    with pytest.raises(InvalidConfig):
        house.permission.approve(sign(ZHANG))
    house.write_policy()
    assert permit(house, "round") == ""


def test_a_policy_that_others_may_write_permits_nothing(house):
    (house.folder / "policy.toml").chmod(0o666)
    assert permit(house) == "PlanRefused policy: this site's policy cannot be used"


# announcing


def test_a_verdict_changes_nothing_and_a_notice_remembers(house):
    house.write_policy(approval={"required": 1}, hours=NIGHT)
    assert house.permission.verdict(PLAN, ROSTER)[0] == "waiting"
    assert house.approvals.noticed() == ()
    assert house.permission.notice(PLAN, ROSTER) == house.permission.verdict(PLAN, ROSTER)
    assert len(house.approvals.noticed()) == 1
    house.permission.approve(sign(ZHANG))
    assert house.permission.verdict(PLAN, ROSTER) == ("waiting", "hours.windows: this site takes part at other hours")
    house.now = NOON + 12 * 3600
    assert house.permission.verdict(PLAN, ROSTER) == ("ready", "")
    assert house.kinds() == ["approved"]
    assert set_aside(house) == 0


def test_a_run_that_began_is_not_judged_by_what_it_spends_itself(house):
    house.write_policy(limits={"max_epsilon_total": 2})
    assert permit(house) == ""
    assert house.permission.notice(PLAN, ROSTER, run="run-1") == ("ready", "")
    for run, plan in (("", PLAN), ("run-2", PLAN), ("run-1", make_plan(1))):
        assert house.permission.notice(plan, ROSTER, run=run) == ("refused", "limits.max_epsilon_total")


def test_a_notice_that_is_refused_is_not_kept(house):
    house.write_policy(limits={"max_rounds": 1})
    assert house.permission.notice(PLAN, ROSTER)[0] == "refused"
    assert house.approvals.noticed() == ()


# the record


def test_a_question_that_is_only_repeated_is_written_down_once(house):
    house.permission.pause()
    for _ in range(50):
        permit(house, "round")
    house.permission.resume()
    for _ in range(50):
        permit(house, "round")
    house.write_policy(hours=NIGHT)
    permit(house, "round")
    assert house.kinds() == ["paused", "put-off", "resumed", "permitted", "put-off"]


def test_where_nothing_can_be_written_down_nothing_is_permitted(house):
    def fail(kind, /, **facts):
        raise AuditBroken("disk full")

    house.permission._record = fail
    for phase in ("plan", "round"):
        with pytest.raises(AuditBroken):
            house.permission.permit("run-1", phase, PLAN, ROSTER)
    house.permission._record = house.record
    assert permit(house) == ""  # it was set aside; that is counted once
    assert set_aside(house) == pytest.approx(2.0, rel=1e-3)
    assert house.kinds() == ["permitted"]


def test_every_decision_fits_the_audit_chain(house, tmp_path):
    identity = SiteIdentity.generate(SITE, "bank")
    with AuditChain(
        tmp_path / "audit", name=SITE, sign=partial(sign_as, identity), public_key=identity.public().signing_key
    ) as chain:
        house.permission._record = chain.record
        house.write_policy(approval={"required": 1})
        permit(house)
        house.permission.approve(sign(ZHANG))
        permit(house)
        house.permission.withdraw(PLAN.digest, ZHANG)
        house.permission.pause()
        house.permission.resume()
        house.write_policy(models={"allowed": []})
        permit(house, run="run-2")
        text = "".join(path.read_text("utf-8") for path in sorted((tmp_path / "audit").glob("*.jsonl")))
    for kind in ("put-off", "approved", "permitted", "withdrawn", "paused", "resumed", "refused-by-policy"):
        assert f'"kind":"{kind}"' in text


def test_rules_name_the_site(house):
    house.permission.pause()
    with pytest.raises(NotNow) as caught:
        house.permission.permit("run-1", "plan", PLAN, ROSTER)
    assert caught.value.site == SITE
