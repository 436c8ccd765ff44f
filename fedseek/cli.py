"""The ``fedseek`` command: check a plan, predict what it costs, and (from a checkout) simulate it.

Results go to standard output, everything else to standard error. With ``--json`` standard output is one JSON line.

Exit codes: 0 done; 1 unexpected failure; 2 wrong use of a command; 3 the plan or scenario is wrong or was refused;
4 data or model cannot be used; 5 a privacy guarantee cannot be given; 6 keys or messages are wrong, or too few sites
answered; 7 the release was refused; 130 interrupted.
"""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import click

from fedseek.audit_command import audit
from fedseek.daemon.console import run
from fedseek.model_command import model
from fedseek.plan import load_plan
from fedseek.predict_command import predict
from fedseek.verify_command import verify

COMMANDS = "fedseek.commands"  # entry-point group: what a checkout adds, such as `simulate`


class Commands(click.Group):
    """Sub-commands of this file and those installed under the entry-point group."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in alphabetical order."""
        return sorted({*super().list_commands(ctx), *(entry.name for entry in entry_points(group=COMMANDS))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command of this file, else of the entry points."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in entry_points(group=COMMANDS, name=cmd_name):
            try:
                command: click.Command = entry.load()
            except ModuleNotFoundError as error:
                raise click.ClickException(
                    f"{cmd_name}: {error.name} is missing. Simulations run from a checkout: clone the project and "
                    "pip install -e '.[demo]'"
                ) from None
            return command
        return None


@click.group(cls=Commands, epilog="Example: fedseek simulate simulations/scenarios/demo.toml")
@click.version_option(package_name="fedseek")
def cli() -> None:
    """Banks and hospitals fine-tune one LoRA adapter together; text and updates stay secret."""


cli.add_command(audit)
cli.add_command(model)
cli.add_command(verify)


@cli.group(epilog="Example: fedseek plan check simulations/scenarios/bank_hospital.toml")
def plan() -> None:
    """Check a plan, and predict what it costs, before anyone trains."""


@plan.command("check", epilog="Example: fedseek plan check simulations/scenarios/demo.toml --json")
@click.argument("plan_file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON line on standard output.")
def check(plan_file: Path, as_json: bool) -> None:
    """Check PLAN_FILE (a plan, or a scenario with a [plan] table); print its digest."""
    checked = load_plan(plan_file)
    if as_json:
        click.echo(json.dumps({"name": checked.spec.name, "digest": checked.digest}))
        return
    click.echo(f"{plan_file}: plan {checked.spec.name!r} is valid")
    click.echo(f"digest {checked.digest}")


plan.add_command(predict)


def main() -> None:
    """Run the command."""
    run(cli, "fedseek")


if __name__ == "__main__":
    main()
