"""The outer edge of a command line: our own errors become one clear text and the exit code of their family."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from fedseek.errors import FedseekError


def run(command: click.Command, program: str) -> NoReturn:
    """Run a click command as a program; does not return."""
    try:
        command.main(prog_name=program, standalone_mode=False)
    except FedseekError as error:
        click.echo(f"{program}: error: {error.message}", err=True)
        if error.hint:
            click.echo(f"{program}: hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{program}: interrupted", err=True)
        sys.exit(130)
    sys.exit(0)
