import pytest
from rich.console import Console

from simulations.baseline_runs import run_baselines, wanted_baselines
from simulations.scenario import Scenario, ScenarioSpec, SimulationSpec, SiteSpec
from simulations.summary import Baselines

ALL = ("local_only", "centralised", "linear_probe")


@pytest.fixture
def scenario(tiny_plan):
    """A scenario of two sites that asks for some baselines, or says nothing of them."""

    def make(*asked: str, private: bool, default: bool = False) -> Scenario:
        simulation = SimulationSpec() if default else SimulationSpec(baselines=asked)
        sites = tuple(SiteSpec(name=name, kind="bank", train="a.csv", held_back="b.csv") for name in ("甲行", "b"))
        return Scenario("small", ScenarioSpec(simulation=simulation, plan={}, sites=sites), tiny_plan(private=private))

    return make


@pytest.mark.parametrize("private", [False, True])
def test_a_scenario_that_says_nothing_gets_every_baseline(scenario, private):
    assert wanted_baselines(scenario(private=private, default=True)) == ALL


@pytest.mark.parametrize("asked", [("local_only",), ("centralised",), ("local_only", "centralised")])
def test_with_privacy_no_baseline_stands_without_the_dp_linear_probe(scenario, asked):
    assert wanted_baselines(scenario(*asked, private=True)) == (*asked, "linear_probe")
    assert wanted_baselines(scenario(*asked, private=False)) == asked


def test_a_probe_that_was_asked_for_is_run_once(scenario):
    assert wanted_baselines(scenario("linear_probe", "local_only", private=True)) == ("linear_probe", "local_only")


def test_a_private_scenario_that_wants_no_baseline_at_all_gets_none(scenario, tmp_path):
    assert run_baselines(tmp_path, scenario(private=True), Console(quiet=True)) == Baselines()


def test_the_probe_of_a_private_run_is_called_private(scenario, tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from simulations import baseline_runs, baselines

    monkeypatch.setattr(baseline_runs, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    line = baselines.Line((0.25, 0.5), (2.0, 1.0))
    monkeypatch.setattr(baselines, "local_only", lambda folder, site: {site: line})
    monkeypatch.setattr(baselines, "linear_probe", lambda folder: {"甲行": 0.75, "b": 0.5})
    local, losses = {"甲行": (0.25, 0.5), "b": (0.25, 0.5)}, {"甲行": (2.0, 1.0), "b": (2.0, 1.0)}
    private = run_baselines(tmp_path, scenario("local_only", private=True), Console(quiet=True))
    assert private == Baselines(local_only=local, local_only_loss=losses, dp_linear_probe={"甲行": 0.75, "b": 0.5})
    plain = run_baselines(tmp_path, scenario("local_only", "linear_probe", private=False), Console(quiet=True))
    assert plain == Baselines(local_only=local, local_only_loss=losses, linear_probe={"甲行": 0.75, "b": 0.5})


def test_a_run_of_daemons_is_concluded_as_a_simulation_is():
    from simulations import cli, consortium_cli

    assert consortium_cli.conclude is cli.conclude
