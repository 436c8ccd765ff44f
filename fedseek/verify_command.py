"""``fedseek verify``: is this release what the sites of this roster signed? Offline, and by whoever wants to know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click

from fedseek.errors import FedseekError
from fedseek.evidence import MAX_ROSTER_BYTES, naming, read_release
from fedseek.identity.forms import parse_form
from fedseek.identity.roster import Roster, parse_roster
from fedseek.identity.secret_files import read_file
from fedseek.identity.signed_roster import SignedRoster
from fedseek.verification import Verified, verify_release

_FORM_BEGINS: Final = b"{"


@click.command(epilog="Example: fedseek verify release --roster roster.bin")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--roster",
    "roster_file",
    required=True,
    type=click.Path(path_type=Path),
    help="The sites' public keys: a roster.bin, or the roster.json of a consortium. All that you have to trust.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line on standard output.")
def verify(folder: Path, roster_file: Path, as_json: bool) -> None:
    """Check the release in DIR, or name the first thing that is wrong with it (exit code 7).

    DIR is the release that the coordinator wrote, not the folder that a site keeps for itself. Take the roster from a
    site that you trust, not from DIR: a release and a roster of somebody else fit each other, too.
    """
    try:
        verified = verify_release(read_release(folder), read_roster(roster_file))
    except FedseekError as error:
        if as_json:
            click.echo(json.dumps({"verified": False, "wrong": error.message}, ensure_ascii=False))
        raise
    if as_json:
        click.echo(json.dumps(document_of(verified), ensure_ascii=False))
        return
    for line in verified.checked:
        click.echo(f"✓ {line}")
    click.echo(f"{folder}: release of run {verified.run!r} holds. Roster {verified.roster.digest().hex()}")


def read_roster(path: Path) -> Roster:
    """A roster in canonical form, or that in a signed roster of a consortium.

    Whose signature is on the latter is not looked at: the file is what the caller trusts.

    Raises:
        ReleaseRefused: it is neither.
    """
    with naming(str(path)):
        data = read_file(path, limit=MAX_ROSTER_BYTES)
        if data[:1] == _FORM_BEGINS:
            return parse_form(data, SignedRoster, limit=MAX_ROSTER_BYTES).roster
        return parse_roster(data)


def document_of(verified: Verified) -> dict[str, Any]:
    """What holds, for machines."""
    return {
        "verified": True,
        "run": verified.run,
        "plan": verified.plan.digest,
        "roster": verified.roster.digest().hex(),
        "contributors": list(verified.contributors),
        "approved": list(verified.approved),
        "sites": {
            site: {
                "kind": statement.kind,
                "unit": statement.unit,
                "epsilon": statement.epsilon,
                "delta": statement.delta,
                "site_epsilon": statement.site_level.epsilon if statement.site_level else None,
            }
            for site, statement in verified.statements.items()
        },
        "checked": list(verified.checked),
    }
