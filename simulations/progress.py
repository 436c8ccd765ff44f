"""Show a run while it goes on: rounds, phases, a bar for each site, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedseek.daemon.reports import Event
from fedseek.errors import PlanRefused
from simulations.events import EventTail, coordinator_log, site_log
from simulations.scenario import Scenario

POLL_SECONDS = 0.2


class RunDisplay:
    """Turns events into bars; on something that is no terminal, into one line a phase."""

    def __init__(self, scenario: Scenario, console: Console) -> None:
        self._console = console
        self._plan = scenario.plan
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        total = scenario.plan.total_steps
        self._overall = self.progress.add_task("steps, all sites", total=total * len(scenario.spec.sites))
        self._sites: dict[str, TaskID] = {
            site.name: self.progress.add_task(site.display_name or site.name, total=total)
            for site in scenario.spec.sites
        }
        self._done: dict[str, int] = dict.fromkeys(self._sites, 0)

    def site_event(self, site: str, event: Event) -> None:
        """A site took steps, or said how well its adapter does."""
        if event["event"] == "step":
            self._done[site] = sum(self._plan.steps_after(event["round"] - 1)) + event["step"]
            self.progress.update(self._sites[site], completed=self._done[site])
            self.progress.update(self._overall, completed=sum(self._done.values()))

    def coordinator_event(self, event: Event) -> None:
        """A phase began or ended."""
        if event["event"] != "phase":
            return
        words = {
            "plan": "sites check the plan",
            "key": "one site makes the group key and seals it to the others",
            "shares": "sites share out the secrets of their masks",
            "round": f"round {event['round']} of {self._plan.rounds}: apply, train, mask, encrypt, add",
            "unmask": f"round {event['round']} of {self._plan.rounds}: take the mask off the sum",
            "close": "sites apply the last sum and evaluate",
            "release": "sites approve the release",
        }[event["phase"]]
        self.progress.update(self._overall, description=words)
        if not self._console.is_terminal:
            self._console.print(words, highlight=False)


def follow(
    is_going: Callable[[], bool], folder: Path, scenario: Scenario, console: Console, *, coordinator: Path | None = None
) -> None:
    """Show the run while it is going on; ``coordinator`` is that party's report, where it is not in the run folder yet.

    Raises:
        PlanRefused: a site stays out of the run. Others could go on without it, but a scenario is all of its sites.
    """
    display = RunDisplay(scenario, console)
    tails = {site.name: EventTail(site_log(folder, site.name)) for site in scenario.spec.sites}
    told = EventTail(coordinator or coordinator_log(folder))
    with display.progress:
        running = True
        while running:
            running = is_going()
            for event in told.read_new():
                if event["event"] == "declined" and event["code"] == PlanRefused.__name__:
                    raise PlanRefused(event["site"], event["rule"], hint="the site's own log says more")
                display.coordinator_event(event)
            for site, tail in tails.items():
                for event in tail.read_new():
                    display.site_event(site, event)
            time.sleep(POLL_SECONDS if running else 0)
