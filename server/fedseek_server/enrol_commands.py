"""``fedseek-server init | admit | revoke | roster | keys``: who is in the consortium."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fedseek.daemon.asking import (
    fingerprint_option,
    json_option,
    passphrase_option,
    read_passphrase,
    require_compared,
    show_ages,
    show_fingerprint,
)
from fedseek.identity.authority import CERTIFICATE_DAYS
from fedseek.identity.enrolment import MAX_REQUEST_BYTES, parse_request
from fedseek.identity.forms import DAY_SECONDS
from fedseek.identity.secret_files import read_file, write_secret_file
from fedseek.identity.signed_roster import authority_digest
from fedseek.identity.words import fingerprint_words, words_of
from fedseek_server.config import CONFIG_FILE, EXAMPLE
from fedseek_server.consortium import create_consortium, open_consortium

folder_option = click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("consortium"),
    show_default=True,
    help="The consortium's folder.",
)


@click.command(epilog="Example: fedseek-server init --name 华东联合 --host fl.example.org --port 9443")
@folder_option
@click.option("--name", required=True, help="Of the consortium, in any script.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    required=True,
    help="DNS name or IP address of the coordinator; repeat it for more. Sites dial the first.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=9443, show_default=True, help="That sites dial.")
@click.option("--days", type=click.IntRange(1, 825), default=CERTIFICATE_DAYS, show_default=True, help="Keys live.")
@passphrase_option
@json_option
def init(
    folder: Path,
    name: str,
    hosts: tuple[str, ...],
    port: int,
    days: int,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Make a consortium: CA, server certificate, the authority's keys, an empty roster."""
    host = f"[{hosts[0]}]" if ":" in hosts[0] else hosts[0]
    passphrase = read_passphrase(passphrase_file)
    made = create_consortium(
        folder,
        name=name,
        hosts=hosts,
        address=f"{host}:{port}",
        passphrase=passphrase,
        days=days,
        now=time.time(),
    )
    if not (folder / CONFIG_FILE).exists():
        write_secret_file(folder / CONFIG_FILE, EXAMPLE.format(host="0.0.0.0", port=port).encode())  # noqa: S104
    digest = authority_digest(made.about.authority)
    if as_json:
        told = {"name": name, "address": made.about.address, "authority": digest.hex()}
        click.echo(json.dumps({**told, "words": fingerprint_words(digest)}, ensure_ascii=False))
        return
    click.echo(f"consortium {name!r} in {folder}, at {made.about.address}")
    if passphrase is None:
        click.echo(
            "the authority's keys have no passphrase: keep the folder 'authority' in it elsewhere when not in use"
        )
    click.echo("fingerprint of its authority, to be read to every site that joins:")
    show_fingerprint(digest)


@click.command(epilog="Example: fedseek-server admit 北岸银行-request.json --out 北岸银行-join.json")
@click.argument("request_file", metavar="REQUEST", type=click.Path(path_type=Path))
@folder_option
@click.option("--out", type=click.Path(path_type=Path), help="Join file to write; by default NAME-join.json.")
@fingerprint_option
@passphrase_option
def admit(
    request_file: Path, folder: Path, out: Path | None, fingerprint: str | None, passphrase_file: Path | None
) -> None:
    """Put the site of REQUEST on the roster, and write its join file. The other sites take the roster by themselves."""
    consortium = open_consortium(folder, passphrase=read_passphrase(passphrase_file))
    request = parse_request(read_file(request_file, limit=MAX_REQUEST_BYTES))
    entry = request.entry
    click.echo(f"site {entry.name!r} ({entry.kind}) asks to join {consortium.name!r}")
    require_compared(entry.digest(), whose=entry.name, given=fingerprint)
    join = consortium.admit(request, time.time())
    target = out or Path(f"{entry.name}-join.json")
    write_secret_file(target, join.to_bytes())
    click.echo(f"admitted: roster {consortium.signed_roster.number}; send {target} to the site")
    click.echo("and read it the fingerprint of the authority over another channel:")
    show_fingerprint(authority_digest(join.authority))


@click.command(epilog="Example: fedseek-server revoke 北岸银行")
@click.argument("name")
@folder_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@passphrase_option
def revoke(name: str, folder: Path, yes: bool, passphrase_file: Path | None) -> None:
    """Take the site NAME off the roster. Its keys never come back; with new ones it may."""
    consortium = open_consortium(folder, passphrase=read_passphrase(passphrase_file))
    if not yes:
        click.confirm(f"Take {name!r} off the roster of {consortium.name!r}, for good with these keys?", abort=True)
    roster = consortium.revoke(name, time.time())
    click.echo(f"revoked: roster {roster.number} without {name!r}")


@click.command(epilog="Example: fedseek-server roster --json")
@folder_option
@json_option
def roster(folder: Path, as_json: bool) -> None:
    """Who is on the roster, with fingerprints and the days that keys are good for."""
    held = open_consortium(folder).signed_roster
    now = time.time()
    rows = [(each.entry, int((each.expires_at - now) // DAY_SECONDS)) for each in held.members]
    if as_json:
        sites = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "days_left": left,
                "fingerprint": entry.fingerprint(),
                "words": words_of(entry),
            }
            for entry, left in rows
        ]
        told = {"consortium": held.consortium, "number": held.number, "digest": held.digest().hex(), "sites": sites}
        click.echo(json.dumps(told, ensure_ascii=False))
        return
    table = Table("site", "kind", "days left", "words", title=f"roster {held.number} of {held.consortium}")
    for entry, left in rows:
        table.add_row(entry.name, entry.kind, "expired" if left < 0 else str(left), words_of(entry).replace(" ", "\n"))
    Console().print(table)


@click.command(epilog="Example: fedseek-server keys --json")
@folder_option
@json_option
def keys(folder: Path, as_json: bool) -> None:
    """How old keys and certificates are, and how long they are good for."""
    show_ages(open_consortium(folder).ages(time.time()), as_json=as_json)
