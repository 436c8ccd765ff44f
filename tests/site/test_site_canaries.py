"""Canaries at real sites in a real run: drawn apart, kept over a restart, counted once, told at the release."""

import json
import stat

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from fedseek.apply import ScopeState
from fedseek.batches import make_batch, record_losses
from fedseek.canary_record import read_canary_record, work_out
from fedseek.encode import UpdateLayout
from fedseek.errors import ReleaseRefused
from fedseek.messages import Continuation, UpdateReply, decode_reply
from fedseek_site import canary_audit
from fedseek_site.continuing import continue_run, offer_of
from fedseek_site.state import CanaryState, SiteState
from fedseek_site.weights import load_weights, model_vectors, to_scopes, to_values

RUN = "试运行-1"
AWAY = "st-anna"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def state_of(service) -> SiteState:
    return SiteState.from_bytes(service._journal.state(RUN))


def run_of(service):
    return service._resume(RUN)[0]


@pytest.fixture
def begun(make_cohort):
    """A private cohort in which every site has begun the run, and none has trained."""
    cohort = make_cohort(private=True, audit={"canaries": 32})
    cohort.play(until=("shares", 1))
    return cohort


@pytest.mark.slow
def test_a_run_with_canaries_from_its_beginning_to_its_release(make_cohort):
    cohort = make_cohort(private=True, audit={"canaries": 32}, training={"rounds": 3, "steps_per_round": 1})
    drawn: dict[str, CanaryState] = {}
    sent: dict[str, int] = {}
    asked: dict[tuple[str, int, str], bytes] = {}

    def listen(phase, number, site, request):
        asked[phase, number, site] = request
        return request

    def look(phase, number, site, answer):
        if number <= 3 and isinstance(decode_reply(answer), UpdateReply):
            seen, before = state_of(cohort.site(site)).canaries, drawn.get(site)
            assert before is None or (seen.seed, seen.first_losses) == (before.seed, before.first_losses)
            assert seen.rounds == sent.get(site, 0), "the sum of each earlier round that it was in, once"
            drawn[site], sent[site] = seen, sent.get(site, 0) + 1
        if (phase, number, site) == ("round", 2, "北岸银行"):
            # killed after it had answered, and asked again: the same bytes, and no sum counted twice
            cohort.restart(site)
            assert cohort.site(site).handle(asked[phase, number, site]) == answer
            assert state_of(cohort.site(site)).canaries == drawn[site]
        return answer

    cohort.play(request=listen, reply=look, away=lambda *where: where == ("round", 2, AWAY))
    assert sent[AWAY] < 3 == sent["harbour-bank"]
    assert len({each.seed for each in drawn.values()}) == 4, "drawn by each site for itself"

    coins = set()
    for service in cohort.services.values():
        name, kept = service.identity.name, cohort.folder / service.identity.name / "canary-audit.json"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        record = read_canary_record(kept)
        assert (record.run, record.site, len(record.coins), record.delta) == (RUN, name, 32, 1e-3)
        assert record.rounds == sent[name] > 0, "a sum that a site is not in says nothing of it"
        coins.add(record.coins)
        statement = json.loads((cohort.folder / name / "release" / "privacy.json").read_text("utf-8"))
        assert record.claim == statement["epsilon"]
        assert statement["audit"]["canaries"] == 32
        found = work_out(record)
        assert statement["audit"]["every_round"] == pytest.approx(found.every_round, abs=1e-4)
        assert statement["audit"]["released_adapter"] == pytest.approx(found.released_adapter, abs=1e-4)
        # seed and coins are for the site's own people: not in the release, not on the wire, not in the report
        assert not list((cohort.folder / name / "release").glob("*canar*"))
        assert all(drawn[name].seed not in message for message in cohort.seen)
        assert "coins" not in json.dumps(cohort.events[name], default=str)
    assert len(coins) == 4
    assert drawn[AWAY].seed.hex() not in repr(state_of(cohort.site(AWAY))) + repr(drawn[AWAY])


def test_what_the_canaries_change_and_what_they_do_not(begun):
    service = begun.site("harbour-bank")
    run, state = run_of(service), state_of(service)
    canaries = canary_audit._canaries(run, state.canaries.seed)
    trained_on = canary_audit.training_records(run, state, number=1)
    assert len(run.train_in(1)) == 12, "what the site weighs, and what delta is held against"
    assert trained_on.num_units == run.train_in(1).num_units + canaries.coins.sum()
    # the divisor of a step may not depend on the coins
    assert canary_audit.expected_units(run, state, number=1) == run.train_in(1).num_units + 16
    other = replace(state, canaries=replace(state.canaries, seed=bytes(32)))
    assert canary_audit.expected_units(run, other, number=1) == canary_audit.expected_units(run, state, number=1)
    without = replace(state, canaries=None)
    assert canary_audit.training_records(run, without, number=1) is run.train_in(1)
    assert canary_audit.expected_units(run, without, number=1) == run.train_in(1).num_units


def test_a_run_that_goes_on_from_another_keeps_the_canaries(begun):
    state = state_of(begun.site("harbour-bank"))
    seen = replace(state.canaries, rounds=3)
    offer = replace(offer_of(state), run="neu", continues=Continuation(run=RUN, round=state.last_applied))
    taken = continue_run("harbour-bank", offer, RUN, replace(state, canaries=seen))
    assert taken.canaries == seen


def test_the_release_is_refused_without_the_audit_that_the_plan_asks_for(begun):
    service = begun.site("harbour-bank")
    run, state = run_of(service), state_of(service)
    scopes = to_scopes(state.scopes, run.layouts)
    with pytest.raises(ReleaseRefused, match="canaries"):
        canary_audit.audit_outcome(run, replace(state, canaries=None), scopes)
    broken = replace(state.canaries, round_scores=np.full(32, np.nan).tobytes())
    with pytest.raises(ReleaseRefused, match="not finite"):
        canary_audit.audit_outcome(run, replace(state, canaries=broken), scopes)

    # and the record of another run is moved aside, not lost
    found = canary_audit.audit_outcome(run, state, scopes)
    kept = run.release_folder.with_name("canary-audit.json")
    first = read_canary_record(kept)
    assert (first.outcome, found.canaries) == (found, 32)
    canary_audit._keep(replace(first, run="another"), kept)
    assert read_canary_record(kept.with_name("canary-audit-1.json")) == first
    assert read_canary_record(kept).run == "another"


def test_a_sum_that_went_the_way_of_a_canary_raises_its_score(begun):
    service = begun.site("harbour-bank")
    run, state = run_of(service), state_of(service)
    before = to_scopes(state.scopes, run.layouts)
    after = _pulled_by_first_canary(run, state, before)
    seen = canary_audit.watch_sum(run, state.canaries, before, after, number=1)
    assert (seen.seed, seen.first_losses, seen.rounds) == (state.canaries.seed, state.canaries.first_losses, 1)
    once = np.frombuffer(seen.round_scores, "<f8")
    assert once[0] > 0
    twice = np.frombuffer(canary_audit.watch_sum(run, seen, before, after, number=1).round_scores, "<f8")
    assert twice == pytest.approx(2 * once), "summed over the rounds"
    back = np.frombuffer(canary_audit.watch_sum(run, state.canaries, after, before, number=1).round_scores, "<f8")
    assert back[0] < 0
    assert canary_audit.watch_sum(run, None, before, after, number=1) is None


def test_a_scope_without_tensors_says_nothing_of_a_canary(begun):
    service = begun.site("harbour-bank")
    run, state = run_of(service), state_of(service)
    before = to_scopes(state.scopes, run.layouts)
    after = _pulled_by_first_canary(run, state, before)
    bank = UpdateLayout("kind/bank", (), ("held_back_count",))
    headless = ScopeState(bank, np.zeros(0, np.float32), np.zeros(0), 1.0)
    stored = to_values({"kind/bank": headless})
    assert to_scopes(stored, {"kind/bank": bank})["kind/bank"].digest() == headless.digest()
    still = {**after, "kind/bank": before["kind/bank"]}  # the adapter moved, the head did not
    wanted = canary_audit.watch_sum(run, state.canaries, before, still, number=1)
    seen = canary_audit.watch_sum(
        run, state.canaries, {**before, "kind/bank": headless}, {**after, "kind/bank": headless}, number=1
    )
    assert seen == wanted


def _pulled_by_first_canary(run, state, before):
    """The weights after a small step down the loss of the first candidate."""
    canaries = canary_audit._canaries(run, state.canaries.seed)
    load_weights(run.model, before)
    batch = make_batch(canaries.records, np.array([0]), device=torch.device("cpu"))
    trained = [tensor for tensor in run.model.parameters() if tensor.requires_grad]
    gradients = torch.autograd.grad(record_losses(run.model, batch).sum(), trained)
    with torch.no_grad():
        for tensor, gradient in zip(trained, gradients, strict=True):
            tensor.sub_(0.01 * gradient)
    vectors = model_vectors(run.model, run.layouts)
    return {
        scope: ScopeState(held.layout, vectors[scope], held.momentum, held.value_range)
        for scope, held in before.items()
    }


def test_a_plan_without_canaries_has_none(make_cohort):
    cohort = make_cohort()
    cohort.play(until=("shares", 1))
    service = cohort.site("st-anna")
    state = state_of(service)
    assert state.canaries is None
    assert canary_audit.audit_outcome(run_of(service), state, {}) is None
