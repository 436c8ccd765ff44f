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
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.composition import RunSpend
from fedseek.dp.site_level import SiteLevelParams, site_level_params
from fedseek.errors import FedseekError, InvalidPlan, UnsupportedMechanism
from fedseek.he.packing import Packing, choose_packing
from fedseek.lora.targets import targets_of
from fedseek.plan_problems import problems_between, site_problems
from fedseek.plan_spec import PlanSpec, Task
from fedseek.plan_stages import Stage, sections, stages_of
from fedseek.secagg.graph import FULL_GRAPH_SITES, SECURITY_BITS, choose_graph, honest_in_sum

PLAN_VERSION = 1
MAX_PLAN_BYTES = 256 * 1024  # bytes of canonical JSON a site is willing to parse
GLOBAL_SCOPE = "global"
DEFAULT_CANARIES = 64
_ALTERNATIVE = re.compile(r"(literal|tuple)\[.*|constrained-int")  # how pydantic names one of the types of a field


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked plan: only ever valid. Made by :func:`check_plan`.

    Attributes:
        spec: the plan as written.
        digest: hex SHA-256 of the canonical form; what sites approve and sign.
        packing: digits per slot, bits per digit, and the BFV parameters that decrypt ``cohort.max_sites`` updates.
        stages: one, or with ``spec.domain`` two.
        site_level: what a guarantee for whole sites needs, or None when the plan has none.
    """

    spec: PlanSpec
    digest: str
    packing: Packing
    stages: tuple[Stage, ...]
    site_level: SiteLevelParams | None = None

    @property
    def privacy(self) -> PrivacyParams | None:
        """DP-SGD parameters of the last stage, or None when the plan promises nothing; delta and clip norm are those of all."""
        return self.stages[-1].privacy

    @property
    def rounds(self) -> int:
        """Rounds of training, over all stages."""
        return sum(stage.rounds for stage in self.stages)

    @property
    def total_steps(self) -> int:
        """Steps of local training over the whole run."""
        return sum(stage.num_steps for stage in self.stages)

    def stage_of(self, number: int) -> Stage:
        """The stage of round ``number``, from 1; the last one for a round after it, as the closing round is."""
        return next((stage for stage in self.stages if number < stage.first_round + stage.rounds), self.stages[-1])

    def task_in(self, kind: str, number: int) -> Task:
        """What a site of ``kind`` trains on in round ``number``."""
        return self.stage_of(number).task or self.spec.kinds[kind].task

    def writes(self, kind: str) -> bool:
        """Whether sites of ``kind`` learn words in any stage, and need the base model with its head of words."""
        return any(self.task_in(kind, stage.first_round) != "classify" for stage in self.stages)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Linear layers that get an adapter; with "auto", those of the model's family."""
        asked = self.spec.lora.target_modules
        return targets_of(self.spec.model.family) if asked == "auto" else asked

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

    def initial_range(self, scope: str, number: int = 1) -> float:
        """Clip range of the quantiser in the first round of a stage, when there is no aggregate yet to derive it from.

        Adam moves a value by about its learning rate a step (Kingma and Ba 2015, section 2.1), and in the first steps by
        just that much: a quarter more keeps those values off the edge.

        With a guarantee for whole sites it is the same in all rounds and scopes: the grid on which their noise was sized.
        """
        if self.site_level is not None:
            return self.site_level.value_range
        stage = self.stage_of(number)
        rate = stage.learning_rate if scope == GLOBAL_SCOPE else stage.head_learning_rate
        return 1.25 * rate * stage.steps_per_round

    def seed_for(self, purpose: str) -> int:
        """A public 64-bit seed for ``purpose``. Never for noise, masks, keys or private sampling."""
        text = f"fedseek/seed/v1\0{self.spec.name}\0{self.spec.seed}\0{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    def steps_after(self, rounds: int) -> tuple[int, ...]:
        """Steps of each stage that a site has trained after ``rounds`` rounds."""
        return tuple(stage.rounds_until(rounds) * stage.steps_per_round for stage in self.stages)

    def spend_of(self, steps: Sequence[int]) -> RunSpend | None:
        """What so many steps of each stage cost; None when the plan promises nothing.

        Raises:
            ValueError: not one number a stage.
        """
        pairs = list(zip(self.stages, steps, strict=True))
        spends = tuple(PrivacySpend(stage.privacy, count) for stage, count in pairs if stage.privacy is not None)
        return RunSpend(spends) if spends else None

    def spend_after(self, rounds: int) -> RunSpend | None:
        """What a site has spent after ``rounds`` rounds; None when the plan promises nothing."""
        return self.spend_of(self.steps_after(rounds))

    def claimed(self, spend: RunSpend | None) -> RunSpend | None:
        """The spend whose epsilon may be stated for a run that has come to ``spend``.

        Where training may end early, that of all steps of the plan: when it ends follows from what earlier steps gave out,
        and then an epsilon of no more than the steps that were trained does not hold as one that was fixed beforehand does
        (Rogers, Roth, Ullman, Vadhan 2016, arXiv:1605.08294, section 1). That of the plan does: to rest is to throw away
        what a step would have given out.
        """
        return spend if spend is None or self.spec.training.early_stopping is None else self.spend_after(self.rounds)


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
    """One line a field: which, what is wanted (one thing or another, where it may be either), what was got."""
    wanted: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        named = (str(part) for part in problem["loc"])
        where = ".".join(part for part in named if not _ALTERNATIVE.fullmatch(part)) or "the document"
        wanted.setdefault(where, []).append(problem["msg"][0].lower() + problem["msg"][1:])
        got[where] = "" if problem["type"] == "missing" else f", got {_short(problem['input'])}"
    return [f"{where}: {', or '.join(each)}{got[where]}" for where, each in wanted.items()]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_plan(spec: PlanSpec, *, source: str = "plan") -> Plan:
    """Check that the parts fit each other and derive what follows from them.

    Raises:
        InvalidPlan: with all problems at once: more sites than the packing allows, a noise budget that would run
            out, an epsilon that no noise reaches, an AUC over more than two labels, missing epsilon or delta.
    """
    problems = problems_between(spec)
    packing = None
    stages: tuple[Stage, ...] = ()
    try:
        packing = choose_packing(spec.encryption.value_bits, spec.cohort.max_sites)
    except InvalidPlan as error:
        problems += [f"encryption, cohort: {problem}" for problem in error.problems]
    if not problems:
        try:
            stages = stages_of(spec)
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
    return Plan(spec, plan_digest(canonical_bytes(spec)), packing, stages, site_level)


def _site_level_params(spec: PlanSpec, packing: Packing) -> SiteLevelParams | None:
    """Sized for the fewest honest sites that a sum may hold."""
    site, cohort = spec.privacy.site, spec.cohort
    smallest, largest = max(cohort.min_sites, cohort.min_contributors), cohort.max_sites
    if site is None or any(site_problems(spec)) or not cohort.colluders + 2 <= smallest <= largest:
        return None
    in_adapter = _fewest_honest(smallest, largest, cohort.colluders, cohort.dropout_fraction)
    return site_level_params(
        site.epsilon,
        site.delta,
        l2_clip_norm=site.l2_clip_norm,
        rounds=sum(section.rounds for section in sections(spec).values()),
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
