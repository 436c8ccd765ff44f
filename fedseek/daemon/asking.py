"""What the commands of both sides ask and show people: a passphrase, a fingerprint to compare, the ages of keys."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from fedseek.errors import CustodyError, InvalidConfig, WrongKey
from fedseek.identity.enrolment import Age
from fedseek.identity.secret_files import read_secret_file
from fedseek.identity.words import fingerprint_words, parse_fingerprint

PASSPHRASE_VARIABLE: Final = "FEDSEEK_PASSPHRASE"  # noqa: S105
_MAX_PASSPHRASE_FILE_BYTES: Final = 4096

passphrase_option = click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path),
    help=f"A file of mode 0600 whose first line is the passphrase; else the environment's {PASSPHRASE_VARIABLE}.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON line on standard output.")
fingerprint_option = click.option(
    "--fingerprint",
    help="The fingerprint you were told over another channel, in words or hexadecimal; else you are asked.",
)


def read_passphrase(path: Path | None) -> str | None:
    """The passphrase in the file, else in the environment, else None. The environment is rid of it: children inherit it.

    Raises:
        CustodyError: the file is missing, open to others, or empty.
        InvalidConfig: it is not UTF-8.
    """
    given = os.environ.pop(PASSPHRASE_VARIABLE, None)
    if path is None:
        return given or None
    try:
        lines = read_secret_file(path, limit=_MAX_PASSPHRASE_FILE_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError:  # its own text would quote the passphrase
        raise InvalidConfig(["not UTF-8"], source=str(path)) from None
    if not lines or not lines[0]:
        raise CustodyError(f"{path}: the first line is empty, wanted a passphrase")
    return lines[0]


def show_fingerprint(digest: bytes) -> None:
    """Print the words, four a line, and the same in hexadecimal."""
    for group in fingerprint_words(digest).split():
        click.echo(f"    {group.replace('-', ' ')}")
    click.echo(f"    {digest.hex()}")


def require_compared(digest: bytes, *, whose: str, given: str | None) -> None:
    """Show a fingerprint, and go on only if it is the one that was ``given``, or if a person says it was compared.

    Raises:
        WrongKey: it is not the one given.
        Malformed: what was given is no fingerprint.
        click.Abort: nobody said yes.
    """
    click.echo(f"fingerprint of {whose}:")
    show_fingerprint(digest)
    if given is None:
        click.confirm(
            f"Did somebody whom you know at {whose} read you these words, over another channel than this file came by?",
            abort=True,
        )
    elif parse_fingerprint(given) != digest:
        raise WrongKey(
            f"fingerprint of {whose} is not the one given",
            hint="somebody may be standing in between: ask over another channel, and do not go on",
        )


def show_ages(ages: Sequence[Age], *, as_json: bool) -> None:
    """Print how old keys and certificates are: a table, or one JSON line."""
    if as_json:
        click.echo(json.dumps([asdict(age) for age in ages], ensure_ascii=False))
        return
    table = Table("key or certificate", "days old", "days left")
    for age in ages:
        left = "-" if age.days_left is None else "expired" if age.days_left < 0 else str(age.days_left)
        table.add_row(age.what, str(age.days_old), left)
    Console().print(table)
