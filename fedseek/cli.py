"""The ``fedseek`` command: check a plan, predict what it costs, and (from a checkout) simulate it.

Results go to standard output, everything else to standard error. With ``--json`` standard output is one JSON line.

Exit codes: 0 done; 1 unexpected failure; 2 wrong use of a command; 3 the plan or scenario is wrong or was refused;
4 data or model cannot be used; 5 a privacy guarantee cannot be given; 6 keys or messages are wrong, or too few sites
answered; 7 the release was refused; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fedseek.daemon.console import run
from fedseek.plan import Plan, load_plan

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


@plan.command("predict", epilog="Example: fedseek plan predict simulations/scenarios/bank_hospital.toml")
@click.argument("plan_file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON line on standard output.")
def predict(plan_file: Path, as_json: bool) -> None:
    """Bytes, ciphertexts, noise budget, seconds of cryptography here, and epsilon of PLAN_FILE."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about its own attributes
    from fedseek.predict import predict_plan, prediction_document  # brings torch, which takes seconds to import

    checked = load_plan(plan_file)
    document = prediction_document(predict_plan(checked))
    if as_json:
        click.echo(json.dumps(document))
        return
    _show_prediction(checked, document)


def _show_prediction(checked: Plan, document: dict[str, Any]) -> None:
    rows = {name: figure for name, figure in document.items() if name != "kinds"}
    for kind, predicted in document["kinds"].items():
        rows |= {f"{kind}: {name}": figure for name, figure in predicted.items()}
    table = Table(title=f"plan {checked.spec.name}", title_justify="left")
    table.add_column("what")
    table.add_column("predicted", justify="right")
    for name, figure in rows.items():
        shown = f"{figure:,.4g}" if isinstance(figure, float) else f"{figure:,}" if isinstance(figure, int) else "-"
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)


def main() -> None:
    """Run the command."""
    run(cli, "fedseek")


if __name__ == "__main__":
    main()
