"""The language benchmark: its figures are worked out right, and its ways are the product's code on a scenario."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny_instruct import write_tiny_instruct

from fedseek.lora.source import model_digest
from simulations.scenario import load_scenario
from simulations.small_model import build_small_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SITES = ("仁济医院", "harbour-bank")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(way, seed, after, *, epsilon=0.0, rate=0.0, trained=10, values=1000):
    losses = dict(zip(SITES, after, strict=True))
    before, lowest = dict.fromkeys(SITES, 4.0), {site: loss - 0.05 for site, loss in losses.items()}
    found = {"way": way, "seed": seed, "private": epsilon > 0, "epsilon": epsilon, "rate": rate}
    found |= {"before": before, "after": losses, "lowest": lowest if way == "local_only" else {}}
    return found | {"accuracy": losses, "epsilon_paid": epsilon and 7.9, "trained": trained, "values": values}


def figures_of(*runs):
    from language_figures import summarise

    return summarise(runs)


RUNS = (
    run("federated", 0, (3.0, 3.0)),
    run("local_only", 0, (3.1, 3.1)),
    run("federated", 1, (3.0, 3.2)),
    run("local_only", 1, (3.1, 3.3)),
    run("lora", 0, (3.0, 3.2), rate=0.01),
    run("lora", 0, (3.4, 3.6), rate=0.02),
    run("full", 0, (3.0, 3.0), rate=0.001, trained=1000),
    run("full", 0, (3.5, 3.5), rate=0.0005, trained=1000),
)


def test_perplexity_is_of_each_seed_and_the_gap_of_the_tuned_rates():
    figures = figures_of(*RUNS)
    spread = figures.perplexity["0"]["federated"]["harbour-bank"]
    assert (spread.low, spread.high, spread.seeds) == (math.exp(3.0), math.exp(3.2), 2)
    assert spread.mean == pytest.approx((math.exp(3.0) + math.exp(3.2)) / 2)
    assert figures.perplexity["0"]["local_lowest"]["仁济医院"].mean == pytest.approx(math.exp(3.05))
    assert figures.rates == {"lora": 0.01, "full": 0.001}
    assert figures.gap_closed.mean == pytest.approx(0.9)
    assert figures.trained_share == 0.01
    assert figures.below_local
    assert not figures.met, "0.9 of the gap is too little"


def test_one_site_at_one_seed_misses_the_target():
    runs = [*RUNS[:3], run("local_only", 1, (2.9, 3.3)), run("lora", 0, (2.9, 3.0), rate=0.01), RUNS[6]]
    figures = figures_of(*runs)
    assert figures.gap_closed.mean > 1
    assert not figures.below_local
    assert not figures.met


def test_private_runs_stand_in_a_table_of_their_own(tmp_path):
    from language_figures import draw, table

    figures = figures_of(
        *RUNS, run("federated", 0, (3.8, 3.9), epsilon=8.0), run("local_only", 0, (3.9, 3.9), epsilon=8.0)
    )
    assert figures.below_local, "compared without privacy alone"
    text = table(figures)
    assert "| ε = 8 |" in text
    assert "epsilon paid, the highest: 7.90" in text
    assert "closes 0.900" in text
    json.dumps(asdict(figures))
    draw(figures, tmp_path / "图.png")
    assert (tmp_path / "图.png").read_bytes().startswith(b"\x89PNG")


def test_the_queue_waits_for_the_tuned_rates():
    from language_model import FULL, LORA, RATES, queue

    jobs = queue([], seeds=2)
    assert {job.seed for job in jobs if job.way in (LORA, FULL)} == {0}
    tuned = [run(way, 0, (3.0 + rate, 3.0), rate=rate) for way, rates in RATES.items() for rate in rates]
    later = [job for job in queue(tuned, seeds=2) if job.way in (LORA, FULL)]
    assert [(job.way, job.seed, job.rate) for job in later] == [
        (LORA, 1, min(RATES[LORA])),
        (FULL, 1, min(RATES[FULL])),
    ]


def test_both_scenarios_are_of_one_small_model(monkeypatch):
    from language_model import OPEN, PRIVATE

    monkeypatch.setenv("FEDSEEK_DATA", "/nowhere")
    shared, private = load_scenario(OPEN).spec, load_scenario(PRIVATE).spec
    assert shared.small_model == private.small_model
    assert (shared.plan["privacy"]["mechanism"], private.plan["privacy"]["epsilon"]) == ("none", 8.0)


def test_each_way_trains_what_it_says(tmp_path):
    from language_ways import federated, local_only, plan_with, pooled, read_sites

    file = write_tiny_instruct(tmp_path)
    folder = build_small_model(load_scenario(file).spec.small_model, seed=3, cache=tmp_path / "cache")
    scenario = load_scenario(file, model={"source": f"path:{folder}", "sha256": model_digest(folder)})
    plan, private = scenario.plan, {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3}
    sites = read_sites(scenario, plan)
    shared, again, alone = (
        federated(plan, sites, seed=1),
        federated(plan, sites, seed=1),
        local_only(plan, sites, seed=1),
    )
    # the order of the data follows from the seed, the rounding of updates does not
    assert shared.after == pytest.approx(again.after, abs=1e-3)
    assert shared.before == alone.before
    assert set(shared.after) == {site.name for site in sites}
    assert shared.after != shared.before != alone.after != shared.after
    assert all(alone.lowest[site] <= alone.after[site] for site in alone.after)
    assert shared.lowest == {}
    adapter, whole = pooled(plan, sites, seed=1), pooled(plan, sites, seed=1, full=True)
    assert whole.trained == whole.values == adapter.values == shared.values
    assert adapter.trained == shared.trained < 0.2 * adapter.values
    paid = federated(plan_with(scenario, privacy=private, audit={"canaries": 0}), sites, seed=1)
    assert 4 < paid.epsilon_paid <= 8
    assert shared.epsilon_paid == 0
