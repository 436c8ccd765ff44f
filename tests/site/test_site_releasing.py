"""The end of a run at one site: what is written, what is signed, and when nothing is."""

import json

import pytest
from msgspec.structs import replace

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.dp.auditing import AuditOutcome
from fedseek.errors import ReleaseRefused
from fedseek.he.ciphertext import ScopedSum
from fedseek.identity.signing import CONTEXT_RELEASE, verify
from fedseek.messages import AggregateDown, ReleaseApproved, ReleaseRequest, release_message
from fedseek.statement import parse_statement
from fedseek_site import releasing
from fedseek_site.releasing import Draft, draft_release, write_site_release

ME, PEER, OTHER, LAST_SITE = "仁济医院", "北岸银行", "harbour-bank", "st-anna"


@pytest.fixture(scope="module")
def at_release(make_desk):
    desk = make_desk()
    return desk, desk.play(until=("release", 3))[ME]


def folder_of(desk, site=ME):
    return desk.folder / site / "release"


def refused(desk, request):
    before = desk.state(ME).to_bytes()
    code = desk.code(ME, request)
    assert desk.state(ME).to_bytes() == before
    assert not folder_of(desk).exists(), "nothing is written"
    return code, desk.text(ME)


def names(desk, *wanted):
    return desk.federation.positions(wanted)


def metrics(request, **changes):
    return replace(request, metrics=replace(request.metrics, **changes))


def head_sum(desk, *sites, contributors=None):
    """A sum of these sites' metrics, as a coordinator can make it without anybody's help."""
    aggregate = agg_init(desk.plan.packing.params, {"kind/hospital": 1}, max_sites=4)
    for site in sites:
        agg_update(aggregate, desk.updates[3][site].update)
    (total,) = agg_finish(aggregate, min_sites=1)
    return ScopedSum(total.scope, contributors or total.contributors, total.ciphertexts)


RELEASE = {
    "no-metrics": (lambda d, r: metrics(r, sums=()), "Malformed", "wanted ['kind/hospital']"),
    "metrics-of-a-round": (lambda d, r: replace(r, metrics=d.down(ME, 2)), "WrongRound", "wanted those of 3"),
    "metrics-given-up": (
        lambda d, r: metrics(r, survivors=(), sums=()),
        "CohortTooSmall",
        "0 sites are in it",
    ),
    "metrics-of-too-few": (lambda d, r: metrics(r, survivors=names(d, ME, PEER)), "CohortTooSmall", "2 sites"),
    "metrics-of-a-kind-that-is-not-whole": (
        lambda d, r: metrics(r, survivors=names(d, ME, PEER, OTHER)),
        "Malformed",
        "got scopes ['kind/hospital'], wanted []",
    ),
    "metrics-without-this-site": (
        lambda d, r: metrics(r, survivors=names(d, PEER, OTHER, LAST_SITE)),
        "Malformed",
        "got scopes ['kind/hospital'], wanted []",
    ),
    "metrics-of-this-site-alone": (
        lambda d, r: metrics(r, sums=(head_sum(d, ME, contributors=2),)),
        "Tampered",
        "its tags",
    ),
    "metrics-of-this-site-twice": (lambda d, r: metrics(r, sums=(head_sum(d, ME, ME),)), "Tampered", "its tags"),
    "metrics-with-an-adapter": (
        lambda d, r: metrics(r, sums=(*r.metrics.sums, replace(r.metrics.sums[0], scope="global"))),
        "Malformed",
        "got scopes ['global', 'kind/hospital']",
    ),
    "metrics-beyond-the-participants": (lambda d, r: metrics(r, survivors=(0, 1, 2, 4)), "Malformed", "positions"),
    "metrics-under-another-key": (lambda d, r: metrics(r, epoch=1), "WrongKey", "under that of epoch 0"),
    "a-sum-after-the-last": (lambda d, r: replace(r, previous=(d.down(ME, 3),)), "WrongRound", "wanted those of []"),
}


@pytest.mark.parametrize(("alter", "code", "text"), RELEASE.values(), ids=RELEASE)
def test_what_a_site_does_not_release_on(at_release, alter, code, text):
    desk, request = at_release
    asked = alter(desk, request)
    got, words = desk.stops(ME, asked) if code == "Tampered" else refused(desk, asked)
    assert (got, text in words) == (code, True), words
    assert not folder_of(desk).exists(), "nothing is written"


def test_a_release_is_written_once_and_signed(at_release):
    desk, request = at_release
    sent = replace(request, send_adapter=True)
    first = desk.send(ME, sent)
    answer = desk.ask(ME, sent)
    assert isinstance(answer, ReleaseApproved)
    folder = folder_of(desk)
    assert answer.statement == (folder / "privacy.json").read_bytes()
    assert answer.signature == (folder / "privacy.sig").read_bytes()
    signed = release_message(desk.federation.run, answer.digests, answer.statement)
    verify(desk.federation.roster.entry(ME), CONTEXT_RELEASE, signed, answer.signature)
    assert answer.adapter == {name: (folder / name).read_bytes() for name in answer.adapter}
    assert len(answer.adapter) == 2
    assert {path.name for path in folder.iterdir()} == {
        *answer.adapter,
        "head-hospital.safetensors",
        "head-hospital.json",
        "README.md",
        "PRIVACY.md",
        "PRIVACY.zh.md",
        "privacy.json",
        "privacy.sig",
    }
    assert desk.send(ME, sent) == first
    assert desk.code(ME, replace(sent, send_adapter=False)) == "WrongRound"


def test_once_a_run_is_released_nothing_more_is_done_in_it(at_release):
    desk, request = at_release
    desk.send(ME, replace(request, send_adapter=True))
    for asked in (desk.offer(2), desk.offer(3), metrics(request, round=2)):
        assert desk.code(ME, asked) == "WrongRound"
        assert "is released at this site" in desk.text(ME)


@pytest.mark.parametrize("until", [("shares", 1), ("round", 2), ("round", 3)])
def test_a_release_before_every_round_is_accounted_for_is_refused(make_desk, until):
    desk = make_desk()
    desk.play(until=until)
    asked = ReleaseRequest(
        run=desk.federation.run,
        previous=(),
        metrics=AggregateDown(round=3, epoch=0, survivors=(0, 1, 2, 3), sums=()),
        envelopes={},
        send_adapter=False,
    )
    code, words = refused(desk, asked)
    assert (code, "got the sums of rounds []" in words) == ("WrongRound", True)


FOUR_CLINICS = ((ME, "hospital"), ("b", "hospital"), ("c", "hospital"), ("d", "hospital"))


def figures(desk, site, event):
    return [each["utility"] for each in desk.events[site] if each["event"] == event]


def says_own_figure(desk, site):
    return "over this site's own held-back rows" in (folder_of(desk, site) / "README.md").read_text("utf-8")


def test_a_site_that_was_away_in_the_closing_round_still_reads_the_metrics(make_desk):
    """Away since the round before, so the others knew that they would close the run without it."""
    desk = make_desk(sites=FOUR_CLINICS)
    desk.play(away=lambda phase, number, site: (phase, number, site) == ("round", 2, ME))
    assert desk.taking_part[3] == desk.in_order(("b", "c", "d"))
    assert len({reply.digests["kind/hospital"] for reply in desk.approved.values()}) == 1
    told = {tuple(figures(desk, site, "released")) for site in desk.services}
    assert len(told) == 1, "the same figure at each, of the three that were there"
    assert not any(says_own_figure(desk, site) for site in desk.services)


def test_where_one_of_a_kind_vanished_when_the_run_was_closed_each_figure_is_the_sites_own(make_desk):
    """Three are left, whose sum does not open; the one that vanished is told no more than they are."""
    desk = make_desk(sites=FOUR_CLINICS)
    desk.play(away=lambda phase, number, site: (phase, number, site) == ("round", 3, ME))
    assert set(desk.updates[3]) == {"b", "c", "d"}
    assert desk.downs[3].sums == ()
    assert set(desk.approved) == set(desk.services)
    for site in desk.services:
        assert figures(desk, site, "released") == figures(desk, site, "utility")[-1:]
        assert says_own_figure(desk, site)


@pytest.mark.parametrize("since", [("round", 3), ("round", 2)])
def test_where_too_few_of_a_kind_closed_the_run_the_figure_is_the_sites_own(make_desk, since):
    desk = make_desk()
    desk.play(away=lambda phase, number, site: (phase, number, site) == (*since, LAST_SITE))
    assert set(desk.approved) == set(desk.services)
    assert figures(desk, ME, "released") == figures(desk, ME, "utility")[-1:]
    assert says_own_figure(desk, ME)
    assert not says_own_figure(desk, PEER), "the banks were whole"


def finished(desk, *, run=None):
    """What a run has come to, as far as its folder goes."""
    held, state = desk.services[ME]._held
    name = run or desk.federation.run
    document = json.dumps({"run": name}).encode()
    return Draft(name, document, {"global": bytes(32)}, {"privacy.json": document}, 0.5, state), held.identity


def put(desk, folder, **changes):
    return write_site_release(*finished(desk, **changes), folder)


def test_a_process_that_died_after_writing_its_release_writes_it_again(make_desk, tmp_path):
    desk = make_desk()
    desk.ask(ME, desk.offer(1))
    folder = tmp_path / "发布"
    first = put(desk, folder)
    assert put(desk, folder) == first == (folder / "privacy.sig").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["发布"], "no draft is left"


@pytest.mark.parametrize(
    ("run", "kept"), [("last-year", "发布-last-year"), ("../去年", "发布-")], ids=["plain", "other"]
)
def test_another_runs_release_is_kept_beside_the_new_one(make_desk, tmp_path, run, kept):
    desk = make_desk()
    desk.ask(ME, desk.offer(1))
    folder = tmp_path / "发布"
    for _ in range(2):
        put(desk, folder, run=run)
        before = (folder / "privacy.json").read_bytes()
        put(desk, folder)
    assert json.loads((folder / "privacy.json").read_bytes())["run"] == desk.federation.run
    shelves = sorted(path for path in tmp_path.iterdir() if path != folder)
    assert len(shelves) == 3, "two of the earlier run, one of the run between them"
    assert sum((path / "privacy.json").read_bytes() == before for path in shelves) >= 1
    assert any(path.name.startswith(kept) for path in shelves)
    assert all(path.parent == tmp_path for path in shelves)


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"run": 1}', b"\xff"])
def test_a_folder_that_holds_something_else_is_left_alone(make_desk, tmp_path, content):
    desk = make_desk()
    desk.ask(ME, desk.offer(1))
    folder = tmp_path / "发布"
    folder.mkdir()
    if content is not None:
        (folder / "privacy.json").write_bytes(content)
    with pytest.raises(ReleaseRefused):
        put(desk, folder)


@pytest.fixture(scope="module")
def at_private_release(make_desk):
    desk = make_desk(private=True)
    return desk, desk.play(until=("release", 3))[ME]


EARNED_NOT = {
    "a step that the accountant does not know": (
        {"steps_done": (5,)},
        "budget: got 5 trained, 4 accounted, 4 in the ledger",
    ),
    "steps that the ledger does not know": (
        {"steps_done": (6,), "steps_accounted": (6,)},
        "budget: got 6 trained, 6 accounted, 4 in the ledger",
    ),
    "a guard that did not report": ({"guards_passed": ("noise_added",)}, "guards: got 1, without clipping_applied"),
    "no canaries": ({"canaries": None}, "canaries"),
}


@pytest.mark.parametrize(("changes", "said"), EARNED_NOT.values(), ids=list(EARNED_NOT))
def test_a_site_that_cannot_earn_its_statement_does_not_release(at_private_release, changes, said):
    desk, request = at_private_release
    service = desk.services[ME]
    run, state = service._held
    assert (state.steps_done, state.steps_accounted) == ((4,), (4,))
    service._held = run, replace(state, **changes)
    try:
        assert desk.code(ME, request) == "ReleaseRefused"
        assert said in desk.text(ME)
    finally:
        service._held = run, state
    assert list((desk.folder / ME).glob("*release*")) == [], "neither a release nor a draft of one"


def test_an_audit_above_the_claim_closes_the_gate(at_private_release, monkeypatch):
    desk, request = at_private_release
    found = AuditOutcome(canaries=64, confidence=0.95, released_adapter=0.0, every_round=8.5)
    monkeypatch.setattr(releasing, "audit_outcome", lambda run, state, scopes: found)
    assert desk.code(ME, request) == "ReleaseRefused"
    assert "canary-audit: got 0.0000, 8.5000, wanted <= 7.9" in desk.text(ME)


def test_a_draft_is_the_same_whenever_it_is_made_and_changes_nothing(at_private_release):
    """People approve its digest, perhaps weeks before it is signed."""
    desk, request = at_private_release
    run, state = desk.services[ME]._held
    before = state.to_bytes()
    one, two = (draft_release(run, state, request) for _ in range(2))
    assert (one.message, one.files) == (two.message, two.files)
    assert state.to_bytes() == before
    assert not folder_of(desk).exists()
    assert one.after.canaries == state.canaries, "a run that goes on from this one needs them"
    assert "privacy.sig" not in one.files


def test_a_floor_that_the_kind_reached_is_told_and_the_figure_is_not(make_desk):
    desk = make_desk(kinds=floors(0.0))
    answer = desk.ask(ME, desk.play(until=("release", 3))[ME])
    told = {check.name: check.got for check in parse_statement(answer.statement).checks}
    assert told["utility"] == ">= 0"


def test_an_adapter_below_the_plans_floor_is_not_released(make_desk):
    desk = make_desk(kinds=floors(1.0))
    request = desk.play(until=("release", 3))[ME]
    assert refused(desk, request)[0] == "ReleaseRefused"
    assert "utility: got 0." in desk.text(ME)


def test_a_floor_is_not_reached_by_a_sites_own_figure(make_desk):
    """One of the kind vanished, so there is no sum over it; this site's rows alone are not what the plan asks of."""
    desk = make_desk(kinds=floors(0.0))
    with pytest.raises(AssertionError, match="utility: got no figure over the sites of this kind, wanted >= 0"):
        desk.play(away=lambda phase, number, site: (phase, number, site) == ("round", 3, LAST_SITE))


def floors(floor):
    return {"hospital": {"labels": ["急诊", "普通", "自理"], "unit": "patient", "min_utility": floor}}
