"""A scenario: a plan, and where each simulated site finds its records.

    [simulation]  workers, seed, baselines
    [synthetic]   (optional) make the demo data first; paths then start with ${SYNTHETIC}
    [small_model] (optional) build a language model first; the plan's model is then ${SMALL_MODEL}
    [plan...]     what all sites agree to, see fedseek.plan
    [[sites]]     name, kind, files, columns, and how a public file is shared out between simulated sites

``${FEDSEEK_DATA}`` in a path is the folder of public data sets (the environment variable, or ../shared/data beside
the checkout when that exists). Sharing out exists only here: a real site has its own file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
SMALL_MODEL = "${SMALL_MODEL}"
NOT_BUILT = {"source": f"path:{SMALL_MODEL}", "sha256": "0" * 64}
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
    text: str | None = None
    """Column of texts; ``text`` where nothing is said, unless a column of dialogues is named."""
    label: str | None = None
    """Column of labels, for a kind that classifies; ``label`` where nothing is said."""
    unit: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    messages: str | None = None
    """These four are as in a real site's ``site.toml``."""
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


class TextSource(Settings):
    """Public texts a small model is pretrained on: some columns of a file, or a share of its rows."""

    file: str
    columns: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    """Joined with a line break in between; empty ones are left out."""
    part: Part | None = None
    """Sites take other parts of the same ``of``, so that no row of theirs is in the pretraining."""
    max_rows: Annotated[int, Field(ge=1)] | None = None


class SmallModelSpec(Settings):
    """A language model built on the spot: a real architecture, a tokenizer of its own, pretrained on public texts.

    The plan then says ``[plan.model] source = "${SMALL_MODEL}"`` and no sha256; both are filled in once it is there.
    """

    family: Literal["qwen2", "llama", "deepseek_v3"] = "qwen2"
    layers: Annotated[int, Field(ge=1, le=48)] = 4
    hidden: Annotated[int, Field(ge=16, le=2048)] = 256
    intermediate: Annotated[int, Field(ge=16, le=8192)] = 640
    heads: Annotated[int, Field(ge=1, le=64)] = 4
    key_value_heads: Annotated[int, Field(ge=1, le=64)] = 2
    vocabulary: Annotated[int, Field(ge=264, le=65_536)] = 2048
    """Of the byte-level BPE tokenizer, special tokens included."""
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=0, le=100_000)] = 300
    batch: Annotated[int, Field(ge=1, le=1024)] = 8
    tokens: Annotated[int, Field(ge=16, le=2048)] = 128
    """Of one packed sequence."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """The weights' last bits depend on it, so it is a setting and not the machine's."""
    texts: Annotated[tuple[TextSource, ...], Field(min_length=1)]


class ScenarioSpec(Settings):
    """A scenario file."""

    simulation: SimulationSpec = SimulationSpec()
    synthetic: SyntheticSpec | None = None
    small_model: SmallModelSpec | None = None
    plan: dict[str, Any]
    sites: Annotated[tuple[SiteSpec, ...], Field(min_length=2)]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A checked scenario."""

    name: str
    spec: ScenarioSpec
    plan: Plan


def load_scenario(path: Path, *, rounds: int | None = None, model: Mapping[str, Any] | None = None) -> Scenario:
    """Read and check a scenario file.

    Args:
        path: TOML.
        rounds: overrides the plan's.
        model: ``source`` and ``sha256`` of the small model, once it is built. Until then the plan names a model that is
            nowhere, and no site admits it.

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
    try:
        plan = check_plan(parse_spec(_plan_table(document, rounds, model), source="plan"))
    except InvalidPlan as error:
        problems += [f"plan.{problem}" for problem in error.problems]
    if spec is not None and plan is not None:
        problems += _inconsistencies(spec, plan)
    if problems or spec is None or plan is None:
        raise InvalidPlan(problems, source=str(path))
    return Scenario(path.stem, spec, plan)


def _plan_table(document: Mapping[str, Any], rounds: int | None, model: Mapping[str, Any] | None) -> Any:
    """The plan as it is read, with what the caller decides put in its place."""
    table = document.get("plan", {})
    if not isinstance(table, dict):
        return table
    if rounds is not None and isinstance(table.get("training"), dict):
        table = {**table, "training": {**table["training"], "rounds": rounds}}
    named = table.get("model")
    if isinstance(named, dict) and named.get("source") == SMALL_MODEL and "sha256" not in named:
        table = {**table, "model": {**named, **(model or NOT_BUILT)}}
    return table


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
        if site.kind in plan.spec.kinds:
            problems += [f"sites.{site.name}: {problem}" for problem in columns_of(site, plan).problems()]
        if site.train == site.held_back:
            problems.append(f"sites.{site.name}: train and held_back are the same file; rows would be in both")
        problems += [
            f"sites.{site.name}: {problem}"
            for problem in _path_problems((site.train, site.held_back), spec.synthetic is not None)
        ]
    return [*problems, *_baseline_problems(spec, plan), *_small_model_problems(spec, plan)]


def _baseline_problems(spec: ScenarioSpec, plan: Plan) -> Iterator[str]:
    """One model for all kinds is only defined where they all learn labels, or all words."""
    classify = [kind.task == "classify" for kind in plan.spec.kinds.values()]
    alike = (all(classify) and plan.spec.domain is None) or not any(classify)
    if "centralised" in spec.simulation.baselines and not alike:
        yield "simulation.baselines: centralised wants kinds that all classify, in one stage, or that all write"


def _small_model_problems(spec: ScenarioSpec, plan: Plan) -> Iterator[str]:
    """What speaks against the model that is built on the spot, and what is pretrained on."""
    named, built = spec.plan.get("model"), spec.small_model
    if (isinstance(named, dict) and named.get("source") == SMALL_MODEL) != (built is not None):
        yield f"plan.model.source: wanted {SMALL_MODEL} with a [small_model] table, and something else without one"
    if built is None:
        return
    if plan.spec.model.family not in (None, built.family):
        yield f"plan.model.family: {plan.spec.model.family!r}, but small_model.family is {built.family!r}"
    if built.hidden % built.heads or built.heads % built.key_value_heads:
        yield (
            f"small_model: hidden {built.hidden}, heads {built.heads}, key_value_heads {built.key_value_heads}: wanted "
            "each to divide the one before"
        )
    held_back = {site.held_back for site in spec.sites}
    for source in built.texts:
        yield from (f"small_model.texts: {problem}" for problem in _path_problems([source.file], True))
        if f"${{{SYNTHETIC_VARIABLE}}}" in source.file:
            yield f"small_model.texts: {source.file}: made with the run folder, after the model"
        if source.part is not None and source.part.index >= source.part.of:
            yield f"small_model.texts: {source.file}: part {source.part.index} of {source.part.of} does not exist"
        if source.file in held_back:
            yield f"small_model.texts: {source.file}: a site's held-back rows; a model that has seen them proves nothing"
        for site in (site for site in spec.sites if site.kind in plan.spec.kinds):
            if source.file == site.train and not _disjoint(source.part, site, columns_of(site, plan)):
                yield (
                    f"small_model.texts: {source.file}: rows of {site.name!r} may be among them; wanted a part of one "
                    "split, shared out without labels, for each"
                )


def _disjoint(part: Part | None, site: SiteSpec, columns: Columns) -> bool:
    """Whether two shares of one file have no row in common: other parts of the same split of all its rows."""
    other = site.part
    if part is None or other is None or site.where or columns.label is not None:
        return False
    return part.alpha is None and other.alpha is None and part.of == other.of and part.index != other.index


def _path_problems(texts: Sequence[str], synthetic: bool) -> list[str]:
    problems = []
    for text in texts:
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
    columns = columns_of(site, scenario.plan)
    if part is not None:
        rows = share_out(rows, columns.label, part, seed=seed)
    if limit is not None and len(rows) > limit:
        chosen = np.random.default_rng([seed, 2]).permutation(len(rows))[:limit]
        rows = [rows[index] for index in sorted(chosen)]
    if not rows:
        raise InvalidRecords(f"{path}: no rows left for site {site.name!r}", hint="check where, part and max_records")
    labels = scenario.plan.spec.kinds[site.kind].labels
    return to_records(rows, columns, labels=labels, source=str(path))


def columns_of(site: SiteSpec, plan: Plan) -> Columns:
    """The columns that a site's files have to have: of labels one only where its kind classifies."""
    classifies = plan.spec.kinds[site.kind].task == "classify"
    named = Columns(
        site.text,
        (site.label or "label") if classifies else None,
        site.unit,
        *(site.instruction, site.input, site.output),
        site.messages,
    )
    return named if named.of_dialogue or named.text else replace(named, text="text")


def resolve_path(text: str, synthetic: Path | None = None) -> Path:
    """Replace ${FEDSEEK_DATA} and ${SYNTHETIC}; other paths are taken as they are, from the working folder."""
    folders = {DATA_VARIABLE: data_folder(), SYNTHETIC_VARIABLE: synthetic}
    for variable, folder in folders.items():
        if folder is not None:
            text = text.replace(f"${{{variable}}}", str(folder))
    return Path(text).expanduser()


def share_out(rows: Sequence[Row], label: str | None, part: Part, *, seed: int) -> list[Row]:
    """The rows of one part. Parts are disjoint and together hold every row; without labels they are shared out as one.

    With ``alpha`` the shares of each label are drawn from Dirichlet(alpha) (Hsu et al. 2019, arXiv:1909.06335,
    section 3): small alpha, and a site sees only some labels.
    """
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_label.setdefault("" if label is None else str(row.get(label)), []).append(index)
    mine: list[int] = []
    for name in sorted(by_label):
        indices = rng.permutation(by_label[name])
        shares = np.full(part.of, 1 / part.of) if part.alpha is None else rng.dirichlet(np.full(part.of, part.alpha))
        edges = np.rint(np.concatenate([[0.0], np.cumsum(shares)]) * len(indices)).astype(int)
        mine += indices[edges[part.index] : edges[part.index + 1]].tolist()
    return [rows[index] for index in sorted(mine)]
