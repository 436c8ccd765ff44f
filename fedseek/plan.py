"""What all sites agree to: an unchecked ``PlanSpec`` becomes a checked, frozen ``Plan`` with a digest.

Two steps, so that nothing downstream has to validate again:

    TOML or canonical JSON --parse_spec--> PlanSpec (types and ranges) --check_plan--> Plan (what belongs together fits)

Every problem is collected and reported at once. A ``Plan`` derives what must agree between parties from one place: the
sampling probability, clip norm and noise multiplier of DP-SGD, the packing and the BFV parameters, the seeds of the
frozen ``lora_A``. Nothing in it is secret; no noise, key or mask is ever derived from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedseek.dp.accounting import PrivacyParams, PrivacySpend, calibrate_noise_multiplier
from fedseek.dp.site_level import SiteLevelParams, site_level_params
from fedseek.errors import FedseekError, InvalidPlan, UnsupportedMechanism
from fedseek.he.packing import Packing, choose_packing
from fedseek.plan_spec import PlanSpec
from fedseek.secagg.graph import FULL_GRAPH_SITES, SECURITY_BITS, choose_graph, honest_in_sum

PLAN_VERSION = 1
MAX_STEPS = 100_000  # of a run; a plan from outside must not keep a site's accountant busy for hours
MAX_PLAN_BYTES = 256 * 1024  # bytes of canonical JSON a site is willing to parse
GLOBAL_SCOPE = "global"
DEFAULT_CANARIES = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked plan: only ever valid. Made by :func:`check_plan`.

    Attributes:
        spec: the plan as written.
        digest: hex SHA-256 of the canonical form; what sites approve and sign.
        packing: digits per slot, bits per digit, and the BFV parameters that decrypt ``cohort.max_sites`` updates.
        privacy: DP-SGD parameters, or None when the plan promises nothing.
        site_level: what a guarantee for whole sites needs, or None when the plan has none.
    """

    spec: PlanSpec
    digest: str
    packing: Packing
    privacy: PrivacyParams | None
    site_level: SiteLevelParams | None = None

    @property
    def total_steps(self) -> int:
        """Steps of local training over the whole run."""
        return self.spec.training.rounds * self.spec.training.steps_per_round

    @property
    def weight_cap(self) -> int:
        """The weight that counts as 1 when an update is scaled before the sum."""
        return self.spec.cohort.record_cap if self.spec.cohort.weighting == "records" else 1

    @property
    def num_canaries(self) -> int:
        """Canary candidates of each site."""
        asked = self.spec.audit.canaries
        return (DEFAULT_CANARIES if self.privacy else 0) if asked is None else asked

    def canonical(self) -> bytes:
        """The one byte string that stands for this plan."""
        return canonical_bytes(self.spec)

    def scopes(self, kind: str) -> tuple[str, str]:
        """The scopes a site of ``kind`` contributes to: the adapter of all, the head of its kind."""
        return GLOBAL_SCOPE, head_scope(kind)

    def initial_range(self, scope: str) -> float:
        """Clip range of the quantiser in round 1, when there is no aggregate yet to derive it from.

        Adam moves a value by about its learning rate a step (Kingma and Ba 2015, section 2.1), and in the first steps by
        just that much: a quarter more keeps those values off the edge.

        With a guarantee for whole sites it is the same in all rounds and scopes: the grid on which their noise was sized.
        """
        if self.site_level is not None:
            return self.site_level.value_range
        training = self.spec.training
        rate = training.learning_rate if scope == GLOBAL_SCOPE else training.head_learning_rate
        return 1.25 * rate * training.steps_per_round

    def seed_for(self, purpose: str) -> int:
        """A public 64-bit seed for ``purpose``. Never for noise, masks, keys or private sampling."""
        text = f"fedseek/seed/v1\0{self.spec.name}\0{self.spec.seed}\0{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    def spend_after(self, rounds: int) -> PrivacySpend | None:
        """What a site has spent after ``rounds`` rounds; None when the plan promises nothing."""
        if self.privacy is None:
            return None
        return PrivacySpend(self.privacy).after(rounds * self.spec.training.steps_per_round)


def head_scope(kind: str) -> str:
    """Name of the scope shared by the sites of one kind."""
    return f"kind/{kind}"


def canonical_bytes(spec: PlanSpec) -> bytes:
    """Canonical JSON: UTF-8, keys sorted, no blanks, every default written out."""
    document = spec.model_dump(mode="json")
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def plan_digest(canonical: bytes) -> str:
    """Hex SHA-256 of a canonical plan, with domain separation."""
    return hashlib.sha256(b"fedseek/plan/v1\0" + canonical).hexdigest()


def parse_spec(document: Mapping[str, Any], *, source: str = "plan") -> PlanSpec:
    """Check types and ranges of every field.

    Raises:
        InvalidPlan: with all problems at once.
    """
    try:
        return PlanSpec.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        raise InvalidPlan(describe_problems(error), source=source) from None


def describe_problems(error: ValidationError) -> list[str]:
    """One line a problem: which field, what is wanted, what was got."""
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"]) or "the document"
        got = "" if problem["type"] == "missing" else f", got {_short(problem['input'])}"
        lines.append(f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{got}")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_plan(spec: PlanSpec, *, source: str = "plan") -> Plan:
    """Check that the parts fit each other and derive what follows from them.

    Raises:
        InvalidPlan: with all problems at once: more sites than the packing allows, a noise budget that would run
            out, an epsilon that no noise reaches, an AUC over more than two labels, missing epsilon or delta.
    """
    problems = _inconsistencies(spec)
    packing = privacy = None
    try:
        packing = choose_packing(spec.encryption.value_bits, spec.cohort.max_sites)
    except InvalidPlan as error:
        problems += [f"encryption, cohort: {problem}" for problem in error.problems]
    if not problems:
        try:
            privacy = _privacy_params(spec)
        except FedseekError as error:
            problems.append(f"privacy: {error.message}")
    site_level = None
    if packing is not None:
        try:
            site_level = _site_level_params(spec, packing)
        except UnsupportedMechanism as error:
            problems.append(f"privacy.site, encryption.value_bits, cohort: {error.message}; {error.hint}")
    if problems or packing is None:
        raise InvalidPlan(problems, source=source)
    return Plan(spec, plan_digest(canonical_bytes(spec)), packing, privacy, site_level)


def _inconsistencies(spec: PlanSpec) -> list[str]:
    problems = []
    for kind, task in spec.kinds.items():
        if task.metric == "auc" and len(task.labels) != 2:
            problems.append(f"kinds.{kind}: metric auc wants exactly 2 labels, got {len(task.labels)}")
    steps = spec.training.rounds * spec.training.steps_per_round
    if steps > MAX_STEPS:
        problems.append(f"training: rounds x steps_per_round is {steps}, wanted at most {MAX_STEPS}")
    if spec.cohort.min_sites > spec.cohort.max_sites:
        problems.append(f"cohort: min_sites {spec.cohort.min_sites} is above max_sites {spec.cohort.max_sites}")
    if spec.cohort.min_sites < spec.cohort.colluders + 2:
        problems.append(
            f"cohort: min_sites {spec.cohort.min_sites} with {spec.cohort.colluders} colluders leaves fewer than 2 honest "
            f"sites in a sum; wanted min_sites of at least colluders + 2"
        )
    private = spec.privacy.mechanism != "none"
    for field in ("epsilon", "delta"):
        given = getattr(spec.privacy, field) is not None
        if private and not given:
            problems.append(f"privacy.{field}: missing, but mechanism {spec.privacy.mechanism} needs it")
        if given and not private:
            problems.append(f'privacy.{field}: given, but mechanism "none" earns no guarantee; remove it')
    problems += _site_problems(spec)
    if spec.privacy.max_records_per_unit is not None and all(task.unit == "record" for task in spec.kinds.values()):
        problems.append(
            'privacy.max_records_per_unit: given, but every kind\'s unit is "record", which has one; remove it, or protect '
            "a customer or patient"
        )
    approvals = spec.release.min_approvals
    if approvals is not None and not spec.cohort.min_sites <= approvals <= spec.cohort.max_sites:
        problems.append(
            f"release.min_approvals: {approvals}, wanted min_sites {spec.cohort.min_sites} to max_sites {spec.cohort.max_sites}"
        )
    if private and spec.privacy.delta is not None:
        # With this delta, publishing whatever was drawn would do: no noise is called for, and none would be added.
        drawn = -math.expm1(steps * math.log1p(-min(spec.training.sampling_probability, 1 - 2**-53)))
        if spec.privacy.delta >= drawn:
            problems.append(
                f"privacy.delta: {spec.privacy.delta:g} is not below the chance {drawn:.3g} that a unit is drawn at all "
                "in the run; such a plan asks for no noise"
            )
    return problems


def _site_problems(spec: PlanSpec) -> list[str]:
    """What speaks against the guarantee for whole sites, besides its noise."""
    site, cohort, problems = spec.privacy.site, spec.cohort, list[str]()
    if site is None:
        return problems
    if spec.privacy.mechanism == "none":
        problems.append(
            'privacy.site: given, but mechanism "none" protects no record; wanted mechanism "dp-sgd" beside it'
        )
    if cohort.weighting != "equal":
        problems.append(
            f'cohort.weighting: "{cohort.weighting}" sends what each site weighs, without noise; wanted "equal" with '
            "privacy.site"
        )
    if cohort.min_contributors <= cohort.colluders:
        problems.append(
            f"cohort.min_contributors: {cohort.min_contributors} with {cohort.colluders} colluders leaves a head without "
            "noise that nobody knows; wanted at least colluders + 1 with privacy.site"
        )
    if site.delta * cohort.max_sites >= 1:
        problems.append(
            f"privacy.site.delta: {site.delta:g} is not below 1 / max_sites, which would permit publishing one site outright"
        )
    return problems


def _site_level_params(spec: PlanSpec, packing: Packing) -> SiteLevelParams | None:
    """Sized for the fewest honest sites that a sum may hold."""
    site, cohort = spec.privacy.site, spec.cohort
    smallest, largest = max(cohort.min_sites, cohort.min_contributors), cohort.max_sites
    if site is None or _site_problems(spec) or not cohort.colluders + 2 <= smallest <= largest:
        return None
    in_adapter = _fewest_honest(smallest, largest, cohort.colluders, cohort.dropout_fraction)
    return site_level_params(
        site.epsilon,
        site.delta,
        l2_clip_norm=site.l2_clip_norm,
        rounds=spec.training.rounds,
        levels=packing.levels,
        max_sites=largest,
        honest=(in_adapter, cohort.min_contributors - cohort.colluders),
        tolerated=cohort.colluders,
        graph_chance=2.0**-SECURITY_BITS if largest > FULL_GRAPH_SITES else 0.0,
    )


@lru_cache(maxsize=16)
def _fewest_honest(smallest: int, largest: int, colluders: int, dropout_fraction: float) -> int:
    """Honest updates in any sum of the adapter, whomever a coordinator lists and whatever it tells each site (ADR 11).

    Cost: some 10 ms a hundred sites; 8 s for 3 to 1024.
    """
    graphs = (
        choose_graph(listed, colluders=colluders, dropout_fraction=dropout_fraction)
        for listed in range(smallest, largest + 1)
    )
    return min(honest_in_sum(graph, min_survivors=smallest) for graph in graphs)


def _privacy_params(spec: PlanSpec) -> PrivacyParams | None:
    privacy, training = spec.privacy, spec.training
    if privacy.epsilon is None or privacy.delta is None:
        return None
    noise_multiplier = calibrate_noise_multiplier(
        privacy.epsilon,
        delta=privacy.delta,
        sampling_probability=training.sampling_probability,
        num_steps=training.rounds * training.steps_per_round,
    )
    return PrivacyParams(
        noise_multiplier=noise_multiplier,
        sampling_probability=training.sampling_probability,
        delta=privacy.delta,
        l2_clip_norm=privacy.l2_clip_norm,
    )


def plan_from_canonical(data: bytes) -> Plan:
    """Parse a plan received from the coordinator: bounded, strict, and canonical or refused.

    Raises:
        InvalidPlan: too large, not UTF-8 JSON, any field wrong, or not in canonical form.
    """
    if len(data) > MAX_PLAN_BYTES:
        raise InvalidPlan([f"got {len(data)} bytes, wanted at most {MAX_PLAN_BYTES}"], source="received plan")
    try:
        spec = PlanSpec.model_validate_json(data)
    except ValidationError as error:
        raise InvalidPlan(describe_problems(error), source="received plan") from None
    if canonical_bytes(spec) != data:
        raise InvalidPlan(["not in canonical form, so its digest is ambiguous"], source="received plan")
    return check_plan(spec, source="received plan")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InvalidPlan: the file is missing, not UTF-8, or not TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InvalidPlan(["no such file"], source=str(path), hint="check the path") from None
    except IsADirectoryError:
        raise InvalidPlan(["got a folder, wanted a TOML file"], source=str(path)) from None
    except UnicodeDecodeError as error:
        raise InvalidPlan([f"not UTF-8 at byte {error.start}"], source=str(path), hint="save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidPlan([f"not TOML: {error}"], source=str(path)) from None


def load_plan(path: Path) -> Plan:
    """Read and check a plan file, or the ``[plan]`` table of a scenario file.

    Raises:
        InvalidPlan: with all problems at once.
    """
    document = read_toml(path)
    inner = document.get("plan", document)
    return check_plan(parse_spec(inner, source=str(path)), source=str(path))
