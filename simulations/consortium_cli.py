"""``fedseek consortium up``: a scenario on real daemons of this machine, over TLS, with one command."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
from rich.console import Console

from simulations.cli import conclude, with_small_model
from simulations.consortium import (
    ask_for_run,
    check_released,
    collect,
    keep_logs,
    prepare,
    running,
    still_going,
)
from simulations.engine import QUIET
from simulations.progress import follow
from simulations.run_folder import create_run_folder
from simulations.scenario import Scenario, load_scenario


@click.group(epilog="Example: fedseek consortium up simulations/scenarios/demo.toml --rounds 2")
def consortium() -> None:
    """A coordinator and its sites as real daemons, all on this machine."""


@consortium.command(epilog="Example: fedseek consortium up simulations/scenarios/demo.toml --rounds 2 --out /tmp/runs")
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), help="Play this many rounds instead of the plan's.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where run folders go."
)
@click.option("--keep", is_flag=True, help="Leave the daemons' folders, keys and all, and say where.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json as one line on standard output.")
@click.option("-v", "--verbose", is_flag=True, help="Have the daemons log more.")
def up(scenario: Path, rounds: int | None, out: Path, keep: bool, as_json: bool, verbose: bool) -> None:
    """Play SCENARIO on daemons: keys are made, sites admitted, the plan is run over TLS; then all of it is taken down.

    The run folder is that of `fedseek simulate`. What needs a consortium of people, comparing fingerprints and approving
    plans, is left out: whoever runs this is all of them.
    """
    os.environ.update(QUIET)
    console = Console(stderr=True)
    checked = with_small_model(scenario, load_scenario(scenario, rounds=rounds), console, rounds=rounds)
    folder = create_run_folder(scenario, checked, out, rounds=rounds)
    console.print(
        f"[bold]{checked.plan.spec.name}[/bold]: coordinator and {len(checked.spec.sites)} sites, run folder {folder}",
        soft_wrap=True,
    )
    with interrupted_by_signals(), _scratch(console, keep=keep) as scratch:
        play(scratch, folder, checked, console, verbose=verbose)
    conclude(folder, checked, console, as_json=as_json)


def play(scratch: Path, run_folder: Path, scenario: Scenario, console: Console, *, verbose: bool) -> None:
    """Enrol, start, run, collect, end.

    Raises:
        FedseekError: the run failed, or a daemon did: with its own words.
        KeyboardInterrupt: after every process has ended.
    """
    made = prepare(scratch, run_folder, scenario, verbose=verbose)
    try:
        with running(made):
            run = ask_for_run(made, scenario)
            follow(still_going(made, run), run_folder, scenario, console, coordinator=run.report)
            check_released(run.status())
            collect(made, run, run_folder)
    finally:
        keep_logs(made, run_folder)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """For the block, SIGTERM and the end of the terminal do what Ctrl-C does: everything is taken down first."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@contextmanager
def _scratch(console: Console, *, keep: bool) -> Iterator[Path]:
    """A folder of our own with a short path: sockets lie in it."""
    scratch = Path(tempfile.mkdtemp(prefix="fs-"))
    try:
        yield scratch
    finally:
        if keep:
            console.print(f"daemons' folders, with keys: {scratch}", soft_wrap=True)
        else:
            shutil.rmtree(scratch, ignore_errors=True)
