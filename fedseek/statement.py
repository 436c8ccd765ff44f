"""The privacy statement: what one site says a run cost in privacy, as the bytes that it signs.

The vocabulary is that of NIST SP 800-226 (unit of privacy, neighbouring relation, epsilon, delta, accountant, trust model,
what is not covered); the same in words is made by ``statement_page``. It fails closed: no epsilon is stated where a guard did
not report, where the steps that were trained and accounted differ or are not in the ledger, or where the plan promises nothing.

Whoever has the plan can make the statement again from the few numbers in it that are the site's own
(:func:`outcome_of`), which is how ``verification`` checks every field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

import msgspec

from fedseek.dp import site_level
from fedseek.dp.composition import RunSpend
from fedseek.dp.guards import TRAINING_GUARDS
from fedseek.dp.site_guards import SITE_LEVEL_GUARDS
from fedseek.errors import Malformed, ReleaseRefused, TooLarge
from fedseek.plan import Plan

STATEMENT_VERSION: Final = 3
MAX_STATEMENT_BYTES: Final = 512 << 10  # 1024 names of at most 256 bytes, and room for the rest
NOT_COVERED: Final = (  # of version 3: other lines are another version
    "what the adapter says about groups of people: it is meant to learn that, with or without any one of them",
    "people who appear at more than one site, or under several identifiers at one site: what they spend adds up",
    "more than one record of a person where the unit is the record",
    "other runs on the same data: their costs add up and are not counted in this statement; the site's ledger adds them up",
    "that a site took part, and how many records it holds",
    "records held back for evaluation: their summed metrics, and the votes to stop that follow from them, are seen by the "
    "sites, without noise, and whether they reached the plan's floor is told to all",
    "choices made by looking at the records before training: labels, prompts, settings",
    "the base model, which was trained elsewhere",
    "noised updates where too few sites hide each other: in a sum of two sites each can subtract its own, and a round hides "
    "less than planned if more sites work with the coordinator than the plan says",
    "leaks that a canary audit does not find: its bounds say how much may leak at least, not how much at most",
    "whether a site ran this software as it was published: a statement is the signed word of the site",
)
NEIGHBORING_RELATION: Final = "add or remove one unit"
ACCOUNTANT: Final = "privacy loss distribution (dp_accounting); second opinion: Renyi"
NO_ACCOUNTANT: Final = "none"
TRUST_MODEL: Final = "noise added at the site before anything leaves it; holds against everyone else"
NO_TRUST_MODEL: Final = "no noise: updates are hidden in sums, by encryption and masks alone"
SITE_MECHANISM: Final = site_level.MECHANISM
SITE_RELATION: Final = "replace all updates of one site by zeros"
SITE_TRUST_MODEL: Final = "the noise is that of all sites; holds while no more of them collude than the plan says"

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
SiteName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Hex32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z", max_length=64)]
Figure = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One check of the release gate that held: what was wanted, and what there was. Numbers and signs, no language."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z-]{0,47}\Z")]
    wanted: Text
    got: Text


class CanaryAudit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the site found when it attacked its own training: lower bounds on epsilon at the plan's delta.

    Attributes:
        canaries: candidates, each in or out of training by the toss of a coin.
        confidence: with which each of the bounds holds.
        released_adapter: for whoever has the adapter that is released.
        every_round: for whoever saw the adapter of every round, as each site does.
    """

    canaries: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    confidence: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    released_adapter: Figure
    every_round: Figure


class SiteLevel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The second guarantee, for a whole site; stated apart from that for a unit, since others must be trusted for it."""

    epsilon: Figure
    delta: Figure
    l2_clip_norm: Figure
    neighboring_relation: Text
    mechanism: Text
    trust_model: Text


class StageStated(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stage of the run, and how much of it this site trained.

    Attributes:
        noise_multiplier: None where the plan promises nothing.
        sampling_probability: of a unit in a step.
        num_steps: trained at this site; fewer than the plan has where it rested.
    """

    noise_multiplier: Figure | None
    sampling_probability: Figure
    num_steps: Count


class PrivacyStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one site says about its part of a run. ``epsilon``, of all its stages composed, is None when none was earned.

    Attributes:
        plan_digest, roster_digest: hex SHA-256, as plan and roster have it.
        files: SHA-256 of the adapter's two files by name, so that the statement says which release it speaks of.
        tensors: digest of each scope's values.
        contributors: sites whose updates are in the adapter, in roster order.
        max_records_per_unit: a unit with more was trained on so many; None: on all.
        epsilon_second_opinion: by another proof and other code; looser.
        stages: in the order of training, also those that this site trained nothing in.
        site_level: None where the plan asks for no such guarantee.
        audit: None where the plan asks for no canaries.
        checks: of the release gate, all of which held.
    """

    version: Literal[3] = STATEMENT_VERSION
    run: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    plan_digest: Hex32
    roster_digest: Hex32
    site: SiteName
    kind: SiteName
    files: Annotated[dict[Annotated[str, msgspec.Meta(max_length=80)], Hex32], msgspec.Meta(max_length=8)]
    tensors: Annotated[dict[Annotated[str, msgspec.Meta(max_length=80)], Hex32], msgspec.Meta(max_length=256)]
    contributors: Annotated[tuple[SiteName, ...], msgspec.Meta(max_length=1024)]
    mechanism: Text
    unit: Text
    max_records_per_unit: Annotated[int, msgspec.Meta(ge=1)] | None
    neighboring_relation: Text
    epsilon: Figure | None
    epsilon_second_opinion: Figure | None
    delta: Figure | None
    accountant: Text
    stages: Annotated[tuple[StageStated, ...], msgspec.Meta(min_length=1, max_length=8)]
    l2_clip_norm: Figure | None
    site_level: SiteLevel | None
    audit: CanaryAudit | None
    guards_passed: Annotated[tuple[Text, ...], msgspec.Meta(max_length=64)]
    checks: Annotated[tuple[Check, ...], msgspec.Meta(max_length=32)]
    trust_model: Text
    not_covered: Annotated[tuple[Text, ...], msgspec.Meta(max_length=32)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run has come to at one site: what its release gate looks at, and its statement tells.

    Attributes:
        run, roster_digest, site, kind: of the run and of this site.
        files: SHA-256 of the adapter's files, hex, by name.
        digests: of the final tensors of the shared scopes.
        contributors: sites whose updates are in the adapter, in roster order.
        steps: trained at this site, by stage.
        spend: as the accountant knows it; None when the plan promises nothing.
        steps_spent: of this run, in the site's ledger, by stage; more where it was killed between spending and training.
        guards_passed: names of the checks that held while it trained.
        audit: what the canaries told; None where there were none.
        utility: over all sites of this site's kind; None where no such figure exists. It is not told to others.
        largest_value: of the adapter's lora_B; 0 where it did not move, NaN where it is not finite.
    """

    run: str
    roster_digest: str
    site: str
    kind: str
    files: Mapping[str, str]
    digests: Mapping[str, bytes] = field(repr=False)
    contributors: tuple[str, ...]
    steps: tuple[int, ...]
    spend: RunSpend | None
    steps_spent: tuple[int, ...]
    guards_passed: tuple[str, ...]
    audit: CanaryAudit | None
    utility: float | None
    largest_value: float


def privacy_statement(plan: Plan, outcome: Outcome, *, checks: Sequence[Check]) -> PrivacyStatement:
    """State what the run cost this site; ``checks`` are those of the release gate, which has let it pass.

    Raises:
        ReleaseRefused: the plan promises privacy, but a guard did not report, or the steps that were trained are not those
            that were accounted, or not all of them in the ledger.
    """
    check_earned(plan, outcome)
    privacy, spend = plan.privacy, plan.claimed(outcome.spend)
    return PrivacyStatement(
        run=outcome.run,
        plan_digest=plan.digest,
        roster_digest=outcome.roster_digest,
        site=outcome.site,
        kind=outcome.kind,
        files=dict(sorted(outcome.files.items())),
        tensors={scope: digest.hex() for scope, digest in sorted(outcome.digests.items())},
        contributors=outcome.contributors,
        mechanism=plan.spec.privacy.mechanism,
        unit=plan.spec.kinds[outcome.kind].unit,
        max_records_per_unit=plan.spec.privacy.max_records_per_unit,
        neighboring_relation=NEIGHBORING_RELATION,
        epsilon=spend.epsilon() if spend else None,
        epsilon_second_opinion=spend.epsilon_rdp() if spend else None,
        delta=privacy.delta if privacy else None,
        accountant=ACCOUNTANT if spend else NO_ACCOUNTANT,
        stages=tuple(
            StageStated(
                noise_multiplier=stage.privacy.noise_multiplier if stage.privacy else None,
                sampling_probability=stage.sampling_probability,
                num_steps=steps,
            )
            for stage, steps in zip(plan.stages, outcome.steps, strict=True)
        ),
        l2_clip_norm=privacy.l2_clip_norm if privacy else None,
        site_level=_site_level(plan),
        audit=outcome.audit,
        guards_passed=outcome.guards_passed,
        checks=tuple(checks),
        trust_model=TRUST_MODEL if privacy else NO_TRUST_MODEL,
        not_covered=NOT_COVERED,
    )


def check_earned(plan: Plan, outcome: Outcome) -> None:
    """Check that an epsilon may be stated, or that the plan promises none.

    Raises:
        ReleaseRefused: it may not.
    """
    missing = missing_guards(plan, outcome.guards_passed)
    if missing or not is_accounted(plan, outcome):
        raise ReleaseRefused(
            f"site {outcome.site!r}: steps: {describe_steps(outcome)}; guards not passed: {', '.join(missing) or 'none'}; wanted "
            "every step accounted as the plan says, and every guard passed",
            hint="no epsilon is stated that was not earned; run again",
        )


def is_accounted(plan: Plan, outcome: Outcome) -> bool:
    """Whether the steps of each stage are those accounted, by the plan's mechanism, and all of them are in the ledger.

    The ledger may have more: it is entered before training, and a site that is killed in between has spent and sent nothing.
    Where the plan promises nothing, nothing may be accounted.
    """
    spend = outcome.spend
    if not len(outcome.steps) == len(outcome.steps_spent) == len(plan.stages):
        return False
    if plan.privacy is None or spend is None:
        return plan.privacy is None and spend is None
    if spend.params != tuple(stage.privacy for stage in plan.stages) or spend.steps != outcome.steps:
        return False
    return all(steps <= spent for steps, spent in zip(outcome.steps, outcome.steps_spent, strict=True))


def describe_steps(outcome: Outcome) -> str:
    """Steps by stage: trained, accounted, and in the ledger."""
    accounted = outcome.spend.steps if outcome.spend else (0,)
    return f"{by_stage(outcome.steps)} trained, {by_stage(accounted)} accounted, {by_stage(outcome.steps_spent)} in the ledger"


def by_stage(steps: Sequence[int]) -> str:
    """Numbers of steps, one a stage.

    >>> by_stage([67]), by_stage([40, 27])
    ('67', '40 + 27')
    """
    return " + ".join(map(str, steps))


def missing_guards(plan: Plan, passed: Sequence[str]) -> list[str]:
    """Guards that must have passed and did not; none are asked for where the plan promises nothing."""
    return [guard for guard in wanted_guards(plan) if guard not in passed]


def wanted_guards(plan: Plan) -> tuple[str, ...]:
    """Guards that a site must have passed."""
    return (*(TRAINING_GUARDS if plan.privacy else ()), *(SITE_LEVEL_GUARDS if plan.site_level else ()))


def _site_level(plan: Plan) -> SiteLevel | None:
    params = plan.site_level
    if params is None:
        return None
    return SiteLevel(
        epsilon=params.epsilon(plan.rounds),
        delta=params.delta,
        l2_clip_norm=params.l2_clip_norm,
        neighboring_relation=SITE_RELATION,
        mechanism=SITE_MECHANISM,
        trust_model=SITE_TRUST_MODEL,
    )


def outcome_of(plan: Plan, statement: PrivacyStatement, *, largest_value: float) -> Outcome:
    """What the site's outcome must have been, if all of its statement is true.

    The figure of utility is not in it; that it reached the floor is.

    Raises:
        ReleaseRefused: it has another number of stages than the plan.
    """
    if len(statement.stages) != len(plan.stages):
        raise ReleaseRefused(f"stages: got {len(statement.stages)}, wanted the plan's {len(plan.stages)}")
    steps = tuple(stage.num_steps for stage in statement.stages)
    return Outcome(
        run=statement.run,
        roster_digest=statement.roster_digest,
        site=statement.site,
        kind=statement.kind,
        files=statement.files,
        digests={scope: bytes.fromhex(digest) for scope, digest in statement.tensors.items()},
        contributors=statement.contributors,
        steps=steps,
        spend=plan.spend_of(steps),
        steps_spent=steps,
        guards_passed=statement.guards_passed,
        audit=statement.audit,
        utility=plan.spec.kinds[statement.kind].min_utility,
        largest_value=largest_value,
    )


def statement_bytes(statement: PrivacyStatement) -> bytes:
    """The JSON a site signs and publishes; the one form of this statement."""
    return one_form(statement)


def one_form(document: msgspec.Struct) -> bytes:
    """The one JSON text of a document that is signed, or checked byte by byte."""
    return msgspec.json.format(msgspec.json.encode(document, order="deterministic"), indent=2) + b"\n"


def parse_statement(data: bytes) -> PrivacyStatement:
    """Read what ``statement_bytes`` wrote.

    Raises:
        TooLarge: longer than ``MAX_STATEMENT_BYTES``.
        Malformed: no statement of version 3, or not in its one form.
    """
    if len(data) > MAX_STATEMENT_BYTES:
        raise TooLarge(f"privacy statement: got {len(data)} bytes, wanted at most {MAX_STATEMENT_BYTES}")
    try:
        statement = msgspec.json.decode(data, type=PrivacyStatement)
        same = statement_bytes(statement) == data
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:  # msgspec lets the latter two through
        raise Malformed(f"privacy statement of {len(data)} bytes does not parse: {str(error)[:200]}") from None
    if not same:
        raise Malformed(f"privacy statement of {len(data)} bytes is not in the one form that it has")
    return statement
