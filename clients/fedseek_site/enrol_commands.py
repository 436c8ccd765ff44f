"""``fedseek-site init | request | join | keys``: a site's keys, and its way into a consortium."""

from __future__ import annotations

import time
from pathlib import Path

import click

from fedseek.daemon.asking import (
    fingerprint_option,
    json_option,
    passphrase_option,
    read_passphrase,
    require_compared,
    show_ages,
    show_fingerprint,
)
from fedseek.identity.enrolment import MAX_JOIN_FILE_BYTES, parse_join_file
from fedseek.identity.roster import RosterEntry
from fedseek.identity.secret_files import read_file, write_secret_file
from fedseek.identity.signed_roster import authority_digest
from fedseek_site import enrol

folder_option = click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("site"), show_default=True, help="The site's folder."
)


@click.command(epilog="Example: fedseek-site init --name 北岸银行 --kind bank")
@folder_option
@click.option("--name", required=True, help="Of the site, in any script; no other in the consortium has it.")
@click.option("--kind", required=True, help="What sort of institution: a kind of the plans, such as bank or hospital.")
@passphrase_option
def init(folder: Path, name: str, kind: str, passphrase_file: Path | None) -> None:
    """Make this site's keys. They never leave the folder."""
    entry = enrol.create_site(folder, name=name, kind=kind, passphrase=read_passphrase(passphrase_file))
    click.echo(f"keys of {name!r} ({kind}) in {folder}")
    _show_own(entry)


@click.command(epilog="Example: fedseek-site request --out 北岸银行-request.json")
@folder_option
@click.option("--out", type=click.Path(path_type=Path), help="File to write; by default NAME-request.json.")
@passphrase_option
def request(folder: Path, out: Path | None, passphrase_file: Path | None) -> None:
    """Write a file that asks the consortium's operator to admit this site. There is no secret in it."""
    made = enrol.make_join_request(folder, now=time.time(), passphrase=read_passphrase(passphrase_file))
    target = out or Path(f"{made.entry.name}-request.json")
    write_secret_file(target, made.to_bytes())
    click.echo(f"send {target} to the operator of the consortium")
    _show_own(made.entry)


@click.command(epilog="Example: fedseek-site join 北岸银行-join.json")
@click.argument("file", type=click.Path(path_type=Path))
@folder_option
@fingerprint_option
@passphrase_option
def join(file: Path, folder: Path, fingerprint: str | None, passphrase_file: Path | None) -> None:
    """Take part in the consortium of FILE, once its authority's fingerprint was compared."""
    data = read_file(file, limit=MAX_JOIN_FILE_BYTES)
    offered = parse_join_file(data)
    names = ", ".join(member.entry.name for member in offered.signed_roster().members)
    click.echo(f"consortium {offered.consortium!r} at {offered.coordinator}; on its roster: {names or 'nobody'}")
    require_compared(
        authority_digest(offered.authority), whose=f"the authority of {offered.consortium}", given=fingerprint
    )
    site = enrol.join(folder, data, now=time.time(), passphrase=read_passphrase(passphrase_file))
    click.echo(f"{site.identity.name!r} has joined {offered.consortium!r}: roster {site.signed_roster.number}")


@click.command(epilog="Example: fedseek-site keys --json")
@folder_option
@json_option
@passphrase_option
def keys(folder: Path, as_json: bool, passphrase_file: Path | None) -> None:
    """How old this site's keys are, and how long they are good for. The daemon renews them."""
    site = enrol.open_site(folder, passphrase=read_passphrase(passphrase_file))
    show_ages(enrol.site_ages(site, time.time()), as_json=as_json)
    if not as_json:
        _show_own(site.identity.public())


COMMANDS: tuple[click.Command, ...] = (init, request, join, keys)


def _show_own(entry: RosterEntry) -> None:
    click.echo("fingerprint of this site, to be read to the operator over another channel:")
    show_fingerprint(entry.digest())
