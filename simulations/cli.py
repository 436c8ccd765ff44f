"""``fedseek simulate``: play a scenario on this machine, show it live, and leave a run folder behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console

from fedseek.errors import FedseekError
from simulations.engine import QUIET
from simulations.progress import follow
from simulations.run_folder import create_run_folder
from simulations.scenario import Scenario, load_scenario, read_site_data
from simulations.summary import Summary


@click.command(epilog="Example: fedseek simulate simulations/scenarios/demo.toml --rounds 2 --out /tmp/runs")
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), help="Play this many rounds instead of the plan's.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where run folders go."
)
@click.option("--json", "as_json", is_flag=True, help="Print summary.json as one line on standard output.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the libraries log.")
def simulate(scenario: Path, rounds: int | None, out: Path, as_json: bool, verbose: bool) -> None:
    """Play SCENARIO: every site trains, encrypts and decrypts for real; the coordinator adds what it cannot read."""
    os.environ.update(QUIET)
    checked = load_scenario(scenario, rounds=rounds)
    if checked.spec.synthetic is None:
        for site in checked.spec.sites:  # a wrong file is named before anything is written or started
            read_site_data(checked, site)
    console = Console(stderr=True)
    checked = with_small_model(scenario, checked, console, rounds=rounds)
    folder = create_run_folder(scenario, checked, out, rounds=rounds)
    console.print(f"[bold]{checked.plan.spec.name}[/bold]: {len(checked.spec.sites)} sites, run folder {folder}")
    play_engine(folder, checked, console, verbose=verbose)
    conclude(folder, checked, console, as_json=as_json)


def with_small_model(file: Path, scenario: Scenario, console: Console, *, rounds: int | None) -> Scenario:
    """The scenario with its small model built, if it has one: the plan then names the model by folder and digest.

    Raises:
        InvalidRecords: texts to pretrain on are missing or too few.
    """
    if scenario.spec.small_model is None:
        return scenario
    from simulations.small_model import build_with_progress

    return load_scenario(file, rounds=rounds, model=build_with_progress(scenario, console))


def conclude(folder: Path, scenario: Scenario, console: Console, *, as_json: bool) -> None:
    """Run the baselines; write and show what came of the run that has left its reports in ``folder``."""
    from simulations.baseline_runs import run_baselines
    from simulations.collect import collect_summary
    from simulations.report import write_report
    from simulations.summary import save_summary

    baselines = run_baselines(folder, scenario, console)
    summary = collect_summary(folder, scenario, baselines)
    save_summary(summary, folder / "summary.json")
    write_report(summary, folder / "report.html")
    if as_json:
        click.echo(summary.model_dump_json())
    show_outcome(console, folder, summary)
    if sys.stdin.isatty() and console.is_terminal and not as_json and click.confirm("Open the report?", default=False):
        click.launch(str(folder / "report.html"))


def play_engine(folder: Path, scenario: Scenario, console: Console, *, verbose: bool) -> None:
    """Run the engine in a process group of its own and end all of it, whatever happens.

    Raises:
        FedseekError: the run failed, with the engine's own error.
        KeyboardInterrupt: after the group has been ended.
    """
    # The scratch folder is ours and not the engine's: an engine that is killed removes nothing.
    scratch_folder = tempfile.TemporaryDirectory(prefix="fs-", ignore_cleanup_errors=True)
    with (folder / "engine.log").open("wb") as log, scratch_folder as scratch:
        process = subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, "-m", "simulations.engine", str(folder), scratch],
            stdin=subprocess.DEVNULL,
            stdout=None if verbose else log,
            stderr=None if verbose else log,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            follow(lambda: process.poll() is None, folder, scenario, console)
        finally:
            end_group(process)
    if process.returncode != 0:
        raise failure_of(folder, process.returncode)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End every process of the engine's group: politely, then not."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def failure_of(folder: Path, returncode: int) -> FedseekError:
    """The engine's failure as an error of this process, with the same exit code and text."""
    path = folder / "failure.json"
    if not path.exists():
        return FedseekError(f"the engine ended with code {returncode}", hint=f"see {folder / 'engine.log'}")
    told = json.loads(path.read_text("utf-8"))
    error = FedseekError(told["message"], hint=told["hint"])
    error.exit_code = told["exit_code"]  # of this one instance: the class travelled as a code
    return error


def show_outcome(console: Console, folder: Path, summary: Summary) -> None:
    """Where to look, and what was found, in a few lines."""
    for verdict in summary.verdicts:
        console.print(
            f"  {'[green]yes[/green]' if verdict.met else '[red]no[/red] '} {verdict.claim}: {verdict.figure:.3g}"
        )
    console.print(f"adapter  {folder / 'release'}", soft_wrap=True)
    console.print(f"report   [bold]{folder / 'report.html'}[/bold]", soft_wrap=True)
