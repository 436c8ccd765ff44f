"""``fedseek-site budget``: what the data has cost, what is left of it, and what a plan would cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedseek.daemon.asking import json_option
from fedseek.errors import Unreachable
from fedseek_site.people_commands import ask_daemon, folder_option

if TYPE_CHECKING:  # commands import what they need: a help page should not wait for the accountant
    from fedseek_site.budget import Budget, BudgetAsked

PATIENCE = 600.0  # seconds: many runs of different noise take the accountant a while


@click.command(epilog="Example: fedseek-site budget --plan 3f2a9c01b7de --json")
@folder_option
@json_option
@click.option(
    "--plan",
    help="What this plan would cost: a plan file, or the first 12 digits of one announced here.",
    metavar="PLAN",
)
@click.option("--end", "ended", help="Say that this RUN trains no more here: frees what it set aside.", metavar="RUN")
def budget(folder: Path, as_json: bool, plan: str | None, ended: str | None) -> None:
    """Privacy spent on this site's data, what is left, and what the next planned run would cost.

    Asks the daemon; where none runs, reads the site's folder. --end is for a privacy officer, and cannot be undone.
    """
    import msgspec

    from fedseek_site.budget import Budget, RunEnded, as_document, describe_budget

    if ended is not None:
        told = ask_daemon(folder, "end_run", RunEnded(run=ended), timeout=PATIENCE)
        click.echo(json.dumps(told, ensure_ascii=False) if as_json else f"run {ended} trains no more at this site")
        return
    asked = _asked(plan)
    try:
        shown = msgspec.convert(ask_daemon(folder, "budget", asked, timeout=PATIENCE), Budget)
    except Unreachable:
        shown = _read(folder, asked)
    if as_json:
        click.echo(json.dumps(as_document(shown), ensure_ascii=False))
        return
    for word, text in describe_budget(shown):
        click.echo(f"{word + ':':<20}{text}")


def _asked(plan: str | None) -> BudgetAsked:
    import msgspec

    from fedseek.plan import load_plan
    from fedseek_site.budget import BudgetAsked, Planned

    if plan is None:
        return BudgetAsked()
    if Path(plan).is_file():
        return BudgetAsked(planned=Planned.of(load_plan(Path(plan))))
    try:
        return msgspec.convert({"plan": plan.lower()}, BudgetAsked)
    except msgspec.ValidationError:
        raise click.UsageError(
            f"got {plan!r}, wanted a plan file or the first 12 or more hexadecimal digits of a plan"
        ) from None


def _read(folder: Path, asked: BudgetAsked) -> Budget:
    """The same from the folder, by an account that may read it."""
    from fedseek_site.approvals import Approvals
    from fedseek_site.budget import budget_of, data_named
    from fedseek_site.config import POLICY_FILE, load_config
    from fedseek_site.ledger import read_ledger
    from fedseek_site.ledger_opening import limit_of
    from fedseek_site.local_answers import planned_of
    from fedseek_site.paths import Paths
    from fedseek_site.policy import load_policy

    paths = Paths(folder)
    entries = read_ledger(paths.ledger) if paths.ledger.exists() else []
    if not (data := data_named(entries, load_config(folder).data.name)):
        raise Unreachable(
            f"{folder}: no daemon answers, and no ledger here knows the data set of its site.toml",
            hint="is this the site's folder, and has fedseek-site serve ever run in it?",
        )
    approvals = Approvals(paths.approvals)
    try:
        planned = planned_of(approvals, asked)
    finally:
        approvals.close()
    return budget_of(entries, data, limit_of(load_policy(folder / POLICY_FILE)), planned)
