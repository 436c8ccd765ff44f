import hashlib
import json
from datetime import UTC, datetime

import pytest

from simulations.collect import collect_rounds, collect_summary, last, write_metrics
from simulations.events import coordinator_log, site_log
from simulations.scenario import Scenario, ScenarioSpec
from simulations.summary import Baselines, load_summary, save_summary

SITES = {"北岸银行": "bank", "harbour-bank": "bank", "仁济医院": "hospital", "st-anna": "hospital"}
ROUNDS = 2
UP, DOWN = 1000, 2000  # bytes of the first site's first round; others follow from it
BEGAN = 1_800_000_000.0
GUARDS = ["clipping_applied", "noise_added"]


def site_events(number: int, kind: str, *, private: bool) -> list[dict]:
    """What site ``number`` reports of two rounds, in the order it happens."""
    head = f"kind/{kind}"
    events = [
        {"event": "data", "records": 100 + number, "held_back_records": 10 * (number + 1), "units": 50 + number},
        {"event": "layout", "num_values": {"global": 64, head: 51}, "ciphertexts": {"global": 3, head: 1}},
    ]
    for done in range(ROUNDS + 1):
        if done:
            events.append(
                {
                    "event": "applied",
                    "round": done,
                    "bytes_down": DOWN * done + number,
                    "saturated_fraction": 0.001 * done,
                }
            )
        events.append(
            {"event": "utility", "round": done, "utility": 0.1 * number + 0.2 * done, "loss": 2.0 - 0.5 * done}
        )
        if done < ROUNDS:
            seconds = {
                "train": 3.0,
                "encode": 0.25,
                "tag": 0.2,
                "mask": 0.3,
                "encrypt": 0.5,
                "shares": 0.1,
                "evaluate": 1.0,
            }
            if done:
                seconds |= {"decrypt": 0.125, "apply": 0.0625}
            events += [
                {"event": "step", "round": done + 1, "step": 1, "of": 2},
                {
                    "event": "round",
                    "round": done + 1,
                    "seconds": seconds,
                    "epsilon": 2.5 * (done + 1) if private else None,
                    "bytes_up": UP * (done + 1) + number,
                },
            ]
    return [*events, {"event": "released", "utility": 0.5, "guards_passed": GUARDS if private else []}]


def coordinator_events() -> list[dict]:
    """What the coordinator reports of the same run; requests of round r carry the sum of round r - 1."""
    events: list[dict] = [{"event": "phase", "phase": "plan", "round": 0, "sites": 4, "t": BEGAN}]
    for number in range(1, ROUNDS + 1):
        start = BEGAN + 10 * number
        events.append({"event": "phase", "phase": "round", "round": number, "sites": 4, "t": start})
        for site in SITES:
            reply = {"event": "reply", "phase": "round", "round": number, "site": site, "answer": "UpdateReply"}
            events.append({**reply, "bytes_in": 1500 * number, "bytes_out": 300 * number, "t": start + 4})
        events.append(
            {"event": "aggregated", "phase": "round", "round": number, "seconds": 0.75, "t": start + 4 + number}
        )
        reply = {"event": "reply", "phase": "unmask", "round": number, "site": "st-anna"}
        events.append({**reply, "bytes_in": 20, "bytes_out": 10, "t": start + 4.5 + number})
        events.append({"event": "unmasked", "round": number, "seconds": 0.125, "t": start + 5 + number})
    close = {"phase": "close", "round": ROUNDS + 1, "t": BEGAN + 40}
    events += [
        {"event": "phase", **close},
        {"event": "reply", "site": "st-anna", "bytes_in": 7, "bytes_out": 9, **close},
    ]
    events.append({"event": "aggregated", "seconds": 0.25, **close})
    finished = {"event": "finished", "coordinator_rss_mb": 210.5, "site_rss_mb": 900.0, "t": BEGAN + 50}
    return [*events, finished]


@pytest.fixture
def make_scenario(tiny_plan, tiny_plan_document):
    """A scenario of four sites; nothing of it is read from files."""

    def make(*, private: bool = True) -> Scenario:
        sites = [{"name": name, "kind": kind, "train": "t", "held_back": "h"} for name, kind in SITES.items()]
        sites[0]["display_name"] = "北岸银行 North Bank"
        document = {"plan": tiny_plan_document(private=private), "sites": sites}
        spec = ScenarioSpec.model_validate_json(json.dumps(document))
        return Scenario("four-sites", spec, tiny_plan(private=private))

    return make


@pytest.fixture
def finished_run(tmp_path):
    """A run folder whose processes have left their events and the adapter."""

    def make(*, private: bool = True):
        folder = tmp_path / "four-sites-20270115"
        for number, (name, kind) in enumerate(SITES.items()):
            write_events(site_log(folder, name), site_events(number, kind, private=private))
        write_events(coordinator_log(folder), coordinator_events())
        (folder / "release").mkdir()
        (folder / "release" / "adapter_model.safetensors").write_bytes(b"adapter")
        return folder

    return make


def write_events(path, events) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"t": BEGAN, **event}, ensure_ascii=False) + "\n" for event in events]
    path.write_text("".join(lines), "utf-8")


@pytest.fixture
def summary(make_scenario, finished_run):
    return collect_summary(finished_run(), make_scenario(), Baselines())


def site_rounds(summary, name: str) -> list:
    return [next(site for site in entry.sites if site.site == name) for entry in summary.rounds]


def test_who_what_and_when(summary, make_scenario):
    plan = make_scenario().plan
    assert (summary.run, summary.scenario, summary.plan_digest) == ("four-sites-20270115", "four-sites", plan.digest)
    assert summary.started_at == datetime.fromtimestamp(BEGAN, UTC)
    assert (summary.finished_at - summary.started_at).total_seconds() == 50
    assert summary.totals.seconds == 50
    assert (summary.model.name, summary.model.sha256) == (plan.spec.model.source, plan.spec.model.sha256)
    assert summary.versions.keys() >= {"python", "fedseek", "flwr", "torch", "peft", "opacus", "tenseal"}
    assert (summary.peak_rss_mb.coordinator, summary.peak_rss_mb.site_max) == (210.5, 900.0)


def test_sites_bring_what_they_reported(summary):
    first, *_, last_site = summary.sites
    assert (first.name, first.display_name) == ("北岸银行", "北岸银行 North Bank")
    assert (last_site.name, last_site.display_name) == ("st-anna", "st-anna")
    assert [site.kind for site in summary.sites] == list(SITES.values())
    assert [(site.records, site.held_back_records, site.units) for site in summary.sites] == [
        (100, 10, 50),
        (101, 20, 51),
        (102, 30, 52),
        (103, 40, 53),
    ]


def test_round_0_is_the_state_before_training_and_moved_no_byte(summary):
    before = summary.rounds[0]
    assert (before.round, before.seconds, before.coordinator) == (0, 0.0, None)
    for number, site in enumerate(before.sites):
        assert (site.bytes_up, site.bytes_down, site.saturated_fraction) == (0, 0, None)
        assert site.utility == pytest.approx(0.1 * number)
        assert site.epsilon == 0.0
        assert set(site.seconds.model_dump().values()) == {0.0}


def test_a_round_has_its_own_bytes_utility_and_epsilon_the_last_ones_down_included(summary):
    for number, name in enumerate(SITES):
        rounds = site_rounds(summary, name)
        assert [site.bytes_up for site in rounds] == [0, UP + number, 2 * UP + number]
        assert [site.bytes_down for site in rounds] == [0, DOWN + number, 2 * DOWN + number]
        assert [site.epsilon for site in rounds] == [0.0, 2.5, 5.0]
        assert [site.loss for site in rounds] == [2.0, 1.5, 1.0]
        assert [site.saturated_fraction for site in rounds] == [None, 0.001, 0.002]
        assert {site.metric for site in rounds} == {"accuracy"}


def test_seconds_of_a_round_are_the_sites_phases_and_the_coordinators_wall_time(summary):
    assert [entry.seconds for entry in summary.rounds] == [0.0, 6.0, 7.0]
    first = site_rounds(summary, "st-anna")[1].seconds
    second = site_rounds(summary, "st-anna")[2].seconds
    assert (first.train, first.encode, first.encrypt, first.evaluate) == (3.0, 0.25, 0.5, 1.0)
    assert (first.tag, first.mask, first.shares) == (0.2, 0.3, 0.1)
    assert (first.decrypt, first.apply) == (0.0, 0.0)
    assert (second.decrypt, second.apply) == (0.125, 0.0625)


def test_the_coordinators_bytes_of_a_round_are_its_four_replies_and_not_those_of_the_close(summary):
    assert [(entry.coordinator.bytes_in, entry.coordinator.bytes_out) for entry in summary.rounds[1:]] == [
        (4 * 1500 + 20, 4 * 300 + 10),
        (4 * 3000 + 20, 4 * 600 + 10),
    ]
    assert [entry.coordinator.aggregate_s for entry in summary.rounds[1:]] == [0.75, 0.75]
    assert [entry.coordinator.unmask_s for entry in summary.rounds[1:]] == [0.125, 0.125]
    assert [entry.coordinator.survivors for entry in summary.rounds[1:]] == [4, 4]


def test_federated_utility_weighs_the_sites_of_a_kind_by_their_held_back_records(summary):
    for done, entry in enumerate(summary.rounds):
        assert entry.federated_utility["bank"] == pytest.approx((10 * 0.0 + 20 * 0.1) / 30 + 0.2 * done)
        assert entry.federated_utility["hospital"] == pytest.approx((30 * 0.2 + 40 * 0.3) / 70 + 0.2 * done)


def test_totals_add_up_over_sites_and_rounds(summary):
    totals = summary.totals
    assert totals.bytes_up == 4 * (UP + 2 * UP) + 2 * (0 + 1 + 2 + 3)
    assert totals.bytes_down == 4 * (DOWN + 2 * DOWN) + 2 * (0 + 1 + 2 + 3)
    assert totals.plain_float32_bytes == 4 * ROUNDS * 4 * (64 + 51)
    assert (totals.phase_seconds.train, totals.phase_seconds.decrypt) == (4 * 2 * 3.0, 4 * 0.125)
    assert totals.phase_seconds.aggregate == 0.75 + 0.75 + 0.25
    assert totals.phase_seconds.unmask == 2 * 0.125


def test_encryption_privacy_and_release_are_the_plans_and_the_sites(summary, make_scenario):
    plan = make_scenario().plan
    assert summary.encryption.ciphertexts == {"global": 3, "kind/bank": 1, "kind/hospital": 1}
    assert (summary.encryption.value_bits, summary.encryption.max_sites) == (13, 4)
    assert summary.encryption.noise_budget_bits_left >= 1
    assert summary.privacy.epsilon_target == 8.0
    assert summary.privacy.noise_multiplier == plan.privacy.noise_multiplier
    assert summary.privacy.unit == "patient or record"
    assert summary.release.adapter_sha256 == hashlib.sha256(b"adapter").hexdigest()
    assert summary.release.trainable_values == 64 + 51 + 51
    assert summary.release.guards_passed == dict.fromkeys(SITES, tuple(GUARDS))


def test_verdicts_are_drawn_from_the_figures(summary):
    by_claim = {verdict.claim: verdict for verdict in summary.verdicts}
    assert by_claim["Highest epsilon at any site"].figure == 5.0
    assert by_claim["Largest share of values cut off by the quantiser"].figure == 0.002


def test_a_run_without_privacy_has_no_epsilon_anywhere(make_scenario, finished_run):
    summary = collect_summary(finished_run(private=False), make_scenario(private=False), Baselines())
    assert summary.privacy is None
    assert {site.epsilon for entry in summary.rounds for site in entry.sites} == {None}
    assert "epsilon" not in " ".join(verdict.claim for verdict in summary.verdicts).lower()


def test_the_summary_is_written_and_read_back_the_same(summary, tmp_path):
    save_summary(summary, tmp_path / "summary.json")
    assert load_summary(tmp_path / "summary.json") == summary


def test_metrics_are_one_line_a_site_and_round(summary, tmp_path):
    lines = (tmp_path / summary.run / "metrics.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == len(SITES) * (ROUNDS + 1)
    rows = [json.loads(line) for line in lines]
    assert [(row["round"], row["site"]) for row in rows] == [(done, name) for done in range(3) for name in SITES]
    assert rows[-1]["bytes_down"] == 2 * DOWN + 3
    assert "北岸银行" in lines[0]


def test_metrics_of_no_rounds_are_an_empty_file(tmp_path):
    write_metrics(tmp_path / "m.jsonl", [])
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_rounds_are_those_of_the_plan_whatever_else_was_reported(make_scenario):
    reports = {name: site_events(n, kind, private=True) for n, (name, kind) in enumerate(SITES.items())}
    reports["st-anna"].append({"event": "utility", "round": 9, "utility": 1.0, "loss": 0.0})
    rounds = collect_rounds(make_scenario(), reports, coordinator_events())
    assert [entry.round for entry in rounds] == [0, 1, 2]


def test_the_last_event_of_a_name_counts():
    events = [{"event": "data", "records": 1}, {"event": "data", "records": 2}, {"event": "other"}]
    assert last(events, "data")["records"] == 2
