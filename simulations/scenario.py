"""A scenario: a plan, and where each simulated site finds its records.

    [simulation]  workers, seed, baselines
    [synthetic]   (optional) make the demo data first; paths then start with ${SYNTHETIC}
    [plan...]     what all sites agree to, see fedseek.plan
    [[sites]]     name, kind, files, columns, and how a public file is shared out between simulated sites

``${FEDSEEK_DATA}`` in a path is the folder of public data sets (the environment variable, or ../shared/data beside
the checkout when that exists). Sharing out exists only here: a real site has its own file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, StringConstraints, ValidationError

from fedseek.daemon.settings import Settings
from fedseek.errors import InvalidPlan, InvalidRecords, Malformed
from fedseek.identity.roster import check_name
from fedseek.plan import Plan, check_plan, describe_problems, parse_spec, read_toml
from fedseek.records import Columns, Records, Row, read_rows, to_records
from fedseek_site.admission import SiteData

DATA_VARIABLE, SYNTHETIC_VARIABLE = "FEDSEEK_DATA", "SYNTHETIC"
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


class Part(Settings):
    """Share ``index`` of ``of`` equal shares; with ``alpha``, labels are skewed by Dirichlet(alpha)."""

    index: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)] | None = None


class SiteSpec(Settings):
    """One simulated site."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    kind: str
    display_name: str = ""
    train: str
    held_back: str
    text: str = "text"
    label: str = "label"
    unit: str | None = None
    where: dict[str, str] = Field(default_factory=dict)
    """Keep only rows whose column has this value."""
    part: Part | None = None
    held_back_part: Part | None = None
    max_records: Annotated[int, Field(ge=1)] | None = None
    max_held_back: Annotated[int, Field(ge=1)] | None = None
    away: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Rounds in which this site does not answer, to see how the others go on."""


class SimulationSpec(Settings):
    """How to run it; cannot change what the sites agreed to."""

    workers: Annotated[int, Field(ge=1, le=256)] = 2
    seed: Annotated[int, Field(ge=0)] = 0
    baselines: tuple[Literal["local_only", "centralised", "linear_probe"], ...] = (
        "local_only",
        "centralised",
        "linear_probe",
    )


class SyntheticSpec(Settings):
    """Make the demo's data: seeded text of two banks and two hospitals."""

    seed: Annotated[int, Field(ge=0)] = 0
    records_per_site: Annotated[int, Field(ge=50, le=100_000)] = 600


class ScenarioSpec(Settings):
    """A scenario file."""

    simulation: SimulationSpec = SimulationSpec()
    synthetic: SyntheticSpec | None = None
    plan: dict[str, Any]
    sites: Annotated[tuple[SiteSpec, ...], Field(min_length=2)]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A checked scenario."""

    name: str
    spec: ScenarioSpec
    plan: Plan


def load_scenario(path: Path, *, rounds: int | None = None) -> Scenario:
    """Read and check a scenario file; ``rounds`` overrides the plan's.

    Raises:
        InvalidPlan: with all problems of scenario and plan at once.
    """
    document = read_toml(path)
    problems: list[str] = []
    spec = plan = None
    try:
        spec = ScenarioSpec.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        problems += describe_problems(error)
    plan_table = document.get("plan", {})
    if rounds is not None and isinstance(plan_table, dict) and isinstance(plan_table.get("training"), dict):
        plan_table = {**plan_table, "training": {**plan_table["training"], "rounds": rounds}}
    try:
        plan = check_plan(parse_spec(plan_table, source="plan"))
    except InvalidPlan as error:
        problems += [f"plan.{problem}" for problem in error.problems]
    if spec is not None and plan is not None:
        problems += _inconsistencies(spec, plan)
    if problems or spec is None or plan is None:
        raise InvalidPlan(problems, source=str(path))
    return Scenario(path.stem, spec, plan)


def _inconsistencies(spec: ScenarioSpec, plan: Plan) -> list[str]:
    names = [site.name for site in spec.sites]
    cohort = plan.spec.cohort
    problems = [f"sites: name {name!r} is given twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for name in names:
        try:
            check_name("site name", name)
        except Malformed as error:
            problems.append(f"sites: {error.message}")
    if not cohort.min_sites <= len(names) <= cohort.max_sites:
        problems.append(
            f"sites: got {len(names)}, wanted {cohort.min_sites} to {cohort.max_sites} (plan.cohort); "
            "more sites than the packing allows would overflow the encrypted sum"
        )
    for site in spec.sites:
        if site.kind not in plan.spec.kinds:
            problems.append(f"sites.{site.name}: kind {site.kind!r} has no task in plan.kinds")
        elif plan.spec.kinds[site.kind].unit != "record" and site.unit is None:
            problems.append(
                f"sites.{site.name}: unit column missing, the plan protects a {plan.spec.kinds[site.kind].unit}"
            )
        for part in (site.part, site.held_back_part):
            if part is not None and part.index >= part.of:
                problems.append(f"sites.{site.name}: part {part.index} of {part.of} does not exist, parts count from 0")
        if site.train == site.held_back:
            problems.append(f"sites.{site.name}: train and held_back are the same file; rows would be in both")
        problems += [f"sites.{site.name}: {problem}" for problem in _path_problems(site, spec.synthetic is not None)]
    return problems


def _path_problems(site: SiteSpec, synthetic: bool) -> list[str]:
    problems = []
    for text in (site.train, site.held_back):
        if f"${{{DATA_VARIABLE}}}" in text and data_folder() is None:
            problems.append(f"{text}: {DATA_VARIABLE} is not set and there is no default; point it at the public data")
        if f"${{{SYNTHETIC_VARIABLE}}}" in text and not synthetic:
            problems.append(f"{text}: needs a [synthetic] table")
    return problems


def data_folder() -> Path | None:
    """The folder of public data sets, or None when there is none on this machine."""
    given = os.environ.get(DATA_VARIABLE)
    if given:
        return Path(given).resolve()
    return DEFAULT_DATA if DEFAULT_DATA.is_dir() else None


def read_site_data(scenario: Scenario, site: SiteSpec, *, synthetic: Path | None = None) -> SiteData:
    """Read, filter and share out the records of one simulated site.

    Raises:
        InvalidRecords: a file cannot be used, or nothing is left for this site.
    """
    seed = scenario.spec.simulation.seed
    train = _read_share(scenario, site, site.train, site.part, site.max_records, seed=seed, synthetic=synthetic)
    held_back = _read_share(
        scenario, site, site.held_back, site.held_back_part, site.max_held_back, seed=seed + 1, synthetic=synthetic
    )
    return SiteData(train=train, held_back=held_back)


def _read_share(
    scenario: Scenario,
    site: SiteSpec,
    text: str,
    part: Part | None,
    limit: int | None,
    *,
    seed: int,
    synthetic: Path | None,
) -> Records:
    path = resolve_path(text, synthetic)
    rows = [row for row in read_rows(path) if all(str(row.get(key)) == value for key, value in site.where.items())]
    if part is not None:
        rows = share_out(rows, site.label, part, seed=seed)
    if limit is not None and len(rows) > limit:
        chosen = np.random.default_rng([seed, 2]).permutation(len(rows))[:limit]
        rows = [rows[index] for index in sorted(chosen)]
    if not rows:
        raise InvalidRecords(f"{path}: no rows left for site {site.name!r}", hint="check where, part and max_records")
    labels = scenario.plan.spec.kinds[site.kind].labels
    return to_records(rows, Columns(site.text, site.label, site.unit), labels=labels, source=str(path))


def resolve_path(text: str, synthetic: Path | None = None) -> Path:
    """Replace ${FEDSEEK_DATA} and ${SYNTHETIC}; other paths are taken as they are, from the working folder."""
    folders = {DATA_VARIABLE: data_folder(), SYNTHETIC_VARIABLE: synthetic}
    for variable, folder in folders.items():
        if folder is not None:
            text = text.replace(f"${{{variable}}}", str(folder))
    return Path(text).expanduser()


def share_out(rows: Sequence[Row], label: str, part: Part, *, seed: int) -> list[Row]:
    """The rows of one part. Parts are disjoint and together hold every row.

    With ``alpha`` the shares of each label are drawn from Dirichlet(alpha) (Hsu et al. 2019, arXiv:1909.06335,
    section 3): small alpha, and a site sees only some labels.
    """
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_label.setdefault(str(row.get(label)), []).append(index)
    mine: list[int] = []
    for name in sorted(by_label):
        indices = rng.permutation(by_label[name])
        shares = np.full(part.of, 1 / part.of) if part.alpha is None else rng.dirichlet(np.full(part.of, part.alpha))
        edges = np.rint(np.concatenate([[0.0], np.cumsum(shares)]) * len(indices)).astype(int)
        mine += indices[edges[part.index] : edges[part.index + 1]].tolist()
    return [rows[index] for index in sorted(mine)]
