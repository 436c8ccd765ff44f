"""Run the baselines of a scenario side by side, in worker processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from simulations.scenario import Scenario
from simulations.summary import Baselines

if TYPE_CHECKING:
    from simulations.baselines import Line


def run_baselines(folder: Path, scenario: Scenario, console: Console) -> Baselines:
    """Run what `wanted_baselines` names; longest first, so that the workers end together."""
    if not wanted_baselines(scenario):
        return Baselines()
    private = scenario.plan.privacy is not None
    local: dict[str, Line] = {}
    pooled: dict[str, Line] = {}
    probe: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(scenario.spec.simulation.workers, mp_context=context, initializer=single_thread) as pool,
        _display(console) as progress,
    ):
        jobs = _submit(pool, folder, scenario)
        task = progress.add_task("baselines", total=len(jobs))
        for job in as_completed(jobs):
            name, result = jobs[job], job.result()
            into: dict[str, Any] = {"local_only": local, "centralised": pooled, "linear_probe": probe}[name]
            into |= result
            progress.update(task, advance=1, description=f"baselines: {name.replace('_', ' ')} done")
    return Baselines(
        local_only=_by_site(local, "utilities"),
        centralised=_by_site(pooled, "utilities"),
        linear_probe=None if private else probe or None,
        dp_linear_probe=probe or None if private else None,
        local_only_loss=_by_site(local, "losses"),
        centralised_loss=_by_site(pooled, "losses"),
        base_loss=_by_site(pooled | local, "base_loss"),
    )


def _by_site(lines: Mapping[str, Line], field: str) -> dict[str, Any] | None:
    """One field of each line that has it; None of none."""
    found = {site: getattr(line, field) for site, line in lines.items() if getattr(line, field) is not None}
    return found or None


def wanted_baselines(scenario: Scenario) -> tuple[str, ...]:
    """What the scenario asks for; with privacy, any baseline brings the DP linear probe along.

    That is of kinds that classify: a probe is one of labels. A head on the frozen model is hard to beat under noise, so a
    private figure beside others but not beside it would say too much for the adapter. A scenario that wants no baseline
    at all gets none, and its report says what is missing.
    """
    asked = scenario.spec.simulation.baselines
    if all(kind.task != "classify" for kind in scenario.plan.spec.kinds.values()):
        return tuple(name for name in asked if name != "linear_probe")  # nothing here has a head
    if not asked or scenario.plan.privacy is None or "linear_probe" in asked:
        return asked
    return (*asked, "linear_probe")


def single_thread() -> None:
    """One core a worker: the workers share the machine."""
    import torch

    torch.set_num_threads(1)


def _submit(pool: ProcessPoolExecutor, folder: Path, scenario: Scenario) -> dict[Future[Any], str]:
    from simulations.baselines import centralised, linear_probe, local_only

    wanted = wanted_baselines(scenario)
    jobs: dict[Future[Any], str] = {}
    if "centralised" in wanted:
        jobs[pool.submit(centralised, folder)] = "centralised"
    if "linear_probe" in wanted:
        jobs[pool.submit(linear_probe, folder)] = "linear_probe"
    if "local_only" in wanted:
        jobs |= {pool.submit(local_only, folder, site.name): "local_only" for site in scenario.spec.sites}
    return jobs


def _display(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description} {task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
