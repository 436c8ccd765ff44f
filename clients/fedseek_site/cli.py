"""The ``fedseek-site`` command: make a site, join a consortium, serve; say yes or no to plans; read the record.

Exit codes are those of ``fedseek``; 8: disk, socket, network or audit chain cannot be used.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from fedseek.daemon.asking import passphrase_option, read_passphrase
from fedseek.daemon.audit_commands import AuditSource, audit_group
from fedseek.daemon.console import run
from fedseek.daemon.process import start_log, stop_on_signals
from fedseek_site import enrol_commands, people_commands
from fedseek_site.budget_command import budget
from fedseek_site.enrol_commands import folder_option


@click.group(epilog="Example: fedseek-site init --name 北岸银行 --kind bank")
@click.version_option(package_name="fedseek")
def cli() -> None:
    """An institution's side of a consortium: its data, its keys, its word."""


@cli.command(epilog="Example: fedseek-site serve --folder /var/lib/fedseek/site")
@folder_option
@passphrase_option
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def serve(folder: Path, passphrase_file: Path | None, verbose: bool) -> None:
    """Serve until SIGTERM. Only dials out; restarts what dies; asks nobody at night."""
    os.umask(0o077)  # what the daemon writes is its account's alone
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stop = stop_on_signals()  # before the imports below, which take seconds
    start_log(verbose=verbose)
    from fedseek_site.daemon import run_daemon

    run_daemon(folder, stop, passphrase=read_passphrase(passphrase_file))


@cli.command(epilog="Example: fedseek-site courier --folder /var/lib/fedseek/site --state /var/lib/fedseek-courier")
@people_commands.folder_option
@click.option(
    "--state", type=click.Path(path_type=Path), help="A folder of its own; by default courier/ in the site's."
)
def courier(folder: Path, state: Path | None) -> None:
    """The network process alone ([courier] separate = true).

    With --state under an account of its own: it copies what the site lends in run/courier, and needs nothing else of
    the site's folder but the socket beside it.
    """
    start_log()
    from fedseek_site.courier import run_courier
    from fedseek_site.enrol import open_public
    from fedseek_site.lending import borrow, end_when_changed
    from fedseek_site.paths import Paths, courier_settings

    paths = Paths(folder)
    if state is None:
        run_courier(courier_settings(open_public(folder), paths))
    end_when_changed(paths.lent)
    run_courier(courier_settings(borrow(paths.lent, state), paths, state=state))


def _audit_source(folder: Path) -> AuditSource:
    from fedseek_site.enrol import open_site
    from fedseek_site.paths import Paths

    site = open_site(folder, passphrase=read_passphrase(None))
    return AuditSource(Paths(folder).audit, site.identity.name, site.identity.public().signing_key, site.record_keys)


for command in (*enrol_commands.COMMANDS, *people_commands.COMMANDS, budget):
    cli.add_command(command)
cli.add_command(audit_group(_audit_source, program="fedseek-site", folder=Path("site")))


def main() -> None:
    """Run the command."""
    run(cli, "fedseek-site")


if __name__ == "__main__":
    main()
