"""The ``fedseek-server`` command: make a consortium, admit sites, serve; ask for runs and see how far they are.

``run``, ``status``, ``stop`` and ``release`` read and write files in the consortium's folder: they need its account, not
a running daemon. Exit codes are those of ``fedseek``; 8: disk, socket or network cannot be used.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from fedseek.daemon.asking import json_option, passphrase_option, read_passphrase
from fedseek.daemon.audit_commands import AuditSource, audit_group
from fedseek.daemon.audit_lines import COORDINATOR
from fedseek.daemon.console import run as run_program
from fedseek.daemon.process import start_log, stop_on_signals
from fedseek.errors import ReleaseRefused, exit_code_of
from fedseek.plan import load_plan
from fedseek_server.accepting import ask_to_accept
from fedseek_server.approving import APPROVED
from fedseek_server.consortium import AUDIT
from fedseek_server.consortium_files import ConsortiumFiles, read_about
from fedseek_server.enrol_commands import admit, folder_option, init, keys, revoke, roster
from fedseek_server.orders import OPEN_STATES, RunFolder, Status, all_runs, run_folder, submit

FOLLOW_SECONDS = 1.0


@click.group(epilog="Example: fedseek-server init --name 华东联合 --host fl.example.org")
@click.version_option(package_name="fedseek")
def cli() -> None:
    """The coordinator of a consortium: it adds what it cannot read."""


@cli.command(epilog="Example: fedseek-server serve --folder /var/lib/fedseek/consortium")
@folder_option
@passphrase_option
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def serve(folder: Path, passphrase_file: Path | None, verbose: bool) -> None:
    """Serve until SIGTERM: sites over TLS, runs one after another."""
    os.umask(0o077)  # what the daemon writes is its account's alone
    stop = stop_on_signals()  # before the import below, which takes seconds
    start_log(verbose=verbose)
    from fedseek_server.daemon import run_daemon

    run_daemon(folder, stop, passphrase=read_passphrase(passphrase_file))


@cli.command(epilog="Example: fedseek-server run plan.toml --wait 3600 --follow")
@click.argument("plan", type=click.Path(path_type=Path))
@folder_option
@click.option("--name", help="Of the run; by default the plan's name and the time.")
@click.option(
    "--wait",
    "wait_seconds",
    type=click.FloatRange(0, 30 * 86_400),
    default=86_400.0,
    show_default=True,
    help="Seconds to wait until every site is ready; then it begins with those that are.",
)
@click.option(
    "--continues", help="Take up this run of a coordinator that lost its disk, from what its sites last had in common."
)
@click.option("--follow", is_flag=True, help="Stay and show how far it is.")
@json_option
def run(
    plan: Path, folder: Path, name: str | None, wait_seconds: float, continues: str | None, follow: bool, as_json: bool
) -> None:
    """Ask for a run of PLAN. The daemon announces it to the sites and begins when they are ready."""
    checked = load_plan(plan)
    read_about(folder)  # in another folder nobody would ever look for it
    made = submit(folder, checked, wait_seconds=wait_seconds, run=name, continues=continues)
    if as_json:
        click.echo(json.dumps({"run": made.path.name, "plan_digest": checked.digest}))
    else:
        click.echo(f"run {made.path.name}")
        click.echo(f"plan digest {checked.digest}: what people at the sites approve")
    if follow:
        sys.exit(_follow(made))


@cli.command(epilog="Example: fedseek-server status demo-20261122-180000 --json")
@click.argument("name", required=False)
@folder_option
@json_option
def status(name: str | None, folder: Path, as_json: bool) -> None:
    """How far a run is (NAME or its beginning), or every run."""
    found = [run_folder(folder, name)] if name else all_runs(folder)
    told = [each.status() for each in found]
    if as_json:
        click.echo(msgspec.json.encode(told[0] if name else told).decode())
        return
    if name:
        _show(told[0])
        return
    table = Table("run", "state", "round", "since")
    for each in told:
        table.add_row(each.run, each.state, f"{each.round} of {each.rounds}", _ago(each.updated_at))
    Console().print(table)


@cli.command(epilog="Example: fedseek-server stop demo-20261122-180000")
@click.argument("name")
@folder_option
def stop(name: str, folder: Path) -> None:
    """End the run NAME. What sites spent stays spent; nothing is released."""
    found = run_folder(folder, name)
    found.ask_to_stop()
    click.echo(f"run {found.path.name} ends within seconds if the daemon runs, else at its next start")


@cli.command(epilog="Example: fedseek-server release demo-20261122-180000 --out ./adapter")
@click.argument("name")
@folder_option
@click.option("--out", type=click.Path(path_type=Path), help="A new folder.")
@click.option("--ask-again", is_flag=True, help="Instead: wait once more for sites that did not approve in time.")
def release(name: str, folder: Path, out: Path | None, ask_again: bool) -> None:
    """Copy the adapter of run NAME to --out, with the signed statements of the sites that approved its release."""
    if (out is None) != ask_again:
        raise click.UsageError("wanted one of --out FOLDER and --ask-again")
    found = run_folder(folder, name)
    if out is None:
        found.ask_again()
        click.echo(f"sites are asked for approvals of run {found.path.name} as soon as the daemon has read this")
        return
    told = found.status()
    if told.state != "released":
        raise ReleaseRefused(
            f"run {found.path.name} is {told.state}{': ' + told.text if told.text else ''}",
            hint="an adapter leaves only when the sites in it have approved",
        )
    if out.exists():
        raise click.BadParameter(f"{out} exists; wanted a new folder", param_hint="--out")
    shutil.copytree(found.release, out)
    click.echo(f"adapter and statements in {out}")


def _follow(folder: RunFolder) -> int:
    """Print a line whenever something changes, until the run is over; returns the exit code."""
    before = None
    while True:
        told = folder.status()
        line = _line(told)
        if line != before:
            click.echo(line)
            before = line
        if told.state not in OPEN_STATES:
            return 0 if told.state == "released" else exit_code_of(told.code)
        time.sleep(FOLLOW_SECONDS)


def _line(told: Status) -> str:
    if told.state == "waiting":
        return "waiting: " + "; ".join(f"{site}: {word}" for site, word in sorted(told.sites.items()))
    if told.state == "running":
        where = (
            f"round {told.round} of {told.rounds}"
            if told.round <= told.rounds
            else f"all {told.rounds} rounds are done"
        )
        return _waited_for(told) if told.approvals_wanted else f"running: {told.phase or 'begins'}, {where}"
    return f"{told.state}{': ' + told.text if told.text else ''}{chr(10) + '  hint: ' + told.hint if told.hint else ''}"


def _waited_for(told: Status) -> str:
    missing = {site: word for site, word in sorted(told.sites.items()) if word != APPROVED}
    words = "; ".join(f"{site}: {word}" for site, word in missing.items())
    fewer = f", {told.approvals_wanted} are enough" if told.approvals_wanted < len(told.sites) else ""
    return f"waiting for approvals: {len(told.sites) - len(missing)} of {len(told.sites)}{fewer}" + (
        f" ({words})" if words else ""
    )


def _show(told: Status) -> None:
    click.echo(f"run {told.run}, {_ago(told.updated_at)}")
    click.echo(_line(told))


def _ago(at: float) -> str:
    return "not begun" if not at else f"{max(time.time() - at, 0):,.0f} s ago"


@cli.command("accept-record", epilog='Example: fedseek-server accept-record 仁济医院 --why "disk lost on 3 May"')
@click.argument("name")
@click.option("--why", required=True, help="Goes into the coordinator's own record.")
@folder_option
def accept_record(name: str, why: str, folder: Path) -> None:
    """Let the audit record of the site NAME begin anew. Ask it first, over another channel, what became of the old one."""
    ask_to_accept(folder, name, why)
    click.echo(f"the record of {name!r} may begin anew, as soon as the daemon has read this")


def _audit_source(folder: Path) -> AuditSource:
    about = read_about(folder)
    roster = ConsortiumFiles(folder, about.name, about.authority).signed_roster()
    return AuditSource(folder / AUDIT, COORDINATOR, about.coordinator_key, roster.signing_keys)


for command in (init, admit, revoke, roster, keys):
    cli.add_command(command)
cli.add_command(audit_group(_audit_source, program="fedseek-server", folder=Path("consortium")))


def main() -> None:
    """Run the command."""
    run_program(cli, "fedseek-server")


if __name__ == "__main__":
    main()
