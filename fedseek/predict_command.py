"""``fedseek plan predict``: what a plan costs, in bytes, seconds and privacy, before anyone trains."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedseek.errors import UnsupportedMechanism
from fedseek.plan import Plan, load_plan
from fedseek.predict_picture import describe_stages, privacy_picture
from fedseek.predict_privacy import (
    MIN_NOISE_MULTIPLIER,
    NoiseLevel,
    OnProgress,
    PrivacyPrediction,
    predict_privacy,
    privacy_document,
)

_MAX_EPSILON = 50.0  # as in a plan


@click.command(epilog="Example: fedseek plan predict simulations/scenarios/demo.toml --epsilon 4 --noise 1.5")
@click.argument("plan_file", type=click.Path(path_type=Path))
@click.option(
    "--epsilon",
    "epsilons",
    type=click.FloatRange(0, _MAX_EPSILON, min_open=True),
    multiple=True,
    help="Find the least noise for this epsilon; may be repeated.  [default: some]",
)
@click.option(
    "--noise",
    "noises",
    type=click.FloatRange(MIN_NOISE_MULTIPLIER),
    multiple=True,
    help="Find the epsilon of this noise multiplier, of the last stage; the other's is scaled alike. May be repeated.  "
    "[default: some around the plan's]",
)
@click.option("--privacy-only", is_flag=True, help="Noise and epsilon alone: needs no model, measures nothing.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw epsilon by noise and by round to this SVG file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on standard output.")
def predict(
    plan_file: Path,
    epsilons: tuple[float, ...],
    noises: tuple[float, ...],
    privacy_only: bool,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Bytes, ciphertexts, noise budget, seconds of cryptography here, and privacy of PLAN_FILE.

    Privacy: the noise that an epsilon takes, the epsilon that a noise gives, and epsilon round by round, for the plan's
    stages (sampling probability, steps) and delta, by two accountants (PLD is stated, RDP a second opinion).
    """
    checked = load_plan(plan_file)
    with _progress() as on_progress:
        privacy = predict_privacy(checked, epsilons=epsilons, noises=noises, on_progress=on_progress)
    cost = {} if privacy_only else _predict_cost(checked)
    if picture is not None:
        _draw(checked, privacy, picture)
    if as_json:
        click.echo(json.dumps({**cost, "privacy": privacy_document(privacy)}))
        return
    if cost:
        _show_cost(checked, cost)
    _show_privacy(checked, privacy)


def _predict_cost(plan: Plan) -> dict[str, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about its own attributes
    from fedseek.predict import predict_plan, prediction_document  # brings torch, which takes seconds to import

    return prediction_document(predict_plan(plan))


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A bar on standard error while figures are found; nothing where that is no terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("noise and epsilon", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _draw(plan: Plan, privacy: PrivacyPrediction | None, picture: Path) -> None:
    if privacy is None:
        raise UnsupportedMechanism('the plan\'s mechanism is "none": there is no epsilon to draw')
    try:
        picture.write_text(privacy_picture(plan.spec.name, privacy), "utf-8")
    except OSError as error:
        raise click.ClickException(f"{picture}: cannot be written: {error.strerror}") from None


def _show_cost(plan: Plan, cost: Mapping[str, Any]) -> None:
    rows = {name: figure for name, figure in cost.items() if name != "kinds"}
    for kind, predicted in cost["kinds"].items():
        rows |= {f"{kind}: {name}": figure for name, figure in predicted.items()}
    table = _table(f"plan {plan.spec.name}", "what", "predicted")
    for name, figure in rows.items():
        table.add_row(name.replace("_", " "), _shown(figure))
    Console().print(table)


def _show_privacy(plan: Plan, privacy: PrivacyPrediction | None) -> None:
    if privacy is None:
        click.echo('privacy: none; the plan\'s mechanism is "none"')
        return
    click.echo(f"privacy at {describe_stages(privacy)}, δ {privacy.delta:g}")
    several = len(privacy.stages) > 1
    of_stage = [f" of stage {number}" for number in range(1, len(privacy.stages) + 1)] if several else [""]
    noises = _table("noise and ε", "", *(f"noise multiplier{stage}" for stage in of_stage), "ε (PLD)", "ε (RDP)")
    for level in privacy.levels:
        noises.add_row(_why(privacy, level), *map(_shown, (*level.noise_multipliers, level.epsilon, level.epsilon_rdp)))
    rounds = _table(
        "ε by round",
        *("round", *(["stage"] if several else []), "steps", "ε (PLD)", "ε (RDP)"),
        *(["site-level ε"] if plan.site_level else []),
    )
    for each in privacy.by_round:
        of_round = (each.round, *([each.stage] if several else []), each.steps, each.epsilon, each.epsilon_rdp)
        rounds.add_row(*map(_shown, (*of_round, *([each.site_level_epsilon] if plan.site_level else []))))
    Console().print(noises, rounds, sep="\n")
    if privacy.site_level:
        site = privacy.site_level
        click.echo(f"for a whole site besides: ε {_shown(site.epsilon)}, δ {site.delta:g} ({site.mechanism})")


def _why(privacy: PrivacyPrediction, level: NoiseLevel) -> str:
    if level == privacy.plan:
        return "this plan"
    return "" if level.target_epsilon is None else f"for ε {level.target_epsilon:g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _shown(figure: float | int | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:,.4g}" if isinstance(figure, float) else f"{figure:,}"
