"""What this site permits, as its own people wrote it down in ``policy.toml``; nobody outside can change it.

    [limits]    how much privacy a run and a data set's whole life may cost, how long a run may be
    [required]  locks, sizes of sums, age of keys
    [models]    which base models;  [tasks] which kinds, labels, units, metrics
    [hours]     when;  [approval] which people have to agree;  [roster], [audit]

Defaults are strict: a list that is left out allows nothing, and a site without a policy refuses every plan. The rule
that decides is named by its key, such as ``limits.max_epsilon``. Its text may go to the coordinator, so it holds what
the plan asks and what the policy allows, and nothing of the data: no count, no label, nothing of what was spent before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated, Final, Literal
from zoneinfo import ZoneInfo

from pydantic import ConfigDict, Field, StringConstraints, field_validator

from fedseek.daemon.settings import Settings, load_settings
from fedseek.errors import InvalidConfig, Malformed, NotNow, PlanRefused
from fedseek.identity.roster import SIGNING_PUBLIC_KEY_BYTES, Roster, check_name
from fedseek.plan import Plan
from fedseek.plan_spec import Digest, Label, Name
from fedseek_site.ledger_entries import Limit

OFFICER: Final = "privacy officer"
ANY: Final = "any"
DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
LOCKS: Final = {1: frozenset({"encryption", "masks"})}  # by version of the plan: it has no switch to leave one out

Lock = Literal["encryption", "masks"]
Unit = Literal["record", "customer", "patient"]
Metric = Literal["accuracy", "auc", "answers"]
LanguageTask = Literal["instruct", "continue"]
TimeOfDay = Annotated[str, StringConstraints(pattern=r"^(([01]\d|2[0-3]):[0-5]\d|24:00)$")]
PersonRole = Literal["privacy officer", "data steward", "operator"]


class Limits(Settings):
    """What a run may cost."""

    max_epsilon: Annotated[float, Field(gt=0, le=50)] = 2.0
    """Of one run, at its end."""
    max_delta: Annotated[float, Field(gt=0, le=0.01)] = 1e-5
    max_epsilon_total: Annotated[float, Field(gt=0, le=1000)] = 4.0
    """Over the life of the data: all runs that ever trained on any of it, composed, at delta ``max_delta``."""
    max_rounds: Annotated[int, Field(ge=1)] = 100
    max_steps: Annotated[int, Field(ge=1)] = 10_000
    """Of local training over the whole run."""
    allow_without_privacy: bool = False
    """Whether a plan with ``mechanism = "none"`` may run: its adapter may give records away."""


class Required(Settings):
    """What a plan must have."""

    locks: tuple[Lock, ...] = ("encryption", "masks")
    min_sites: Annotated[int, Field(ge=2)] = 3
    """In every round's sum, and on the roster."""
    min_contributors: Annotated[int, Field(ge=2)] = 3
    """In the sum of any scope, such as the head of one kind."""
    min_colluders: Annotated[int, Field(ge=0)] = 1
    """Sites that may tell the coordinator all they know without harm to this one."""
    max_key_days: Annotated[int, Field(ge=1, le=90)] = 90
    """Oldest group key to encrypt under."""


class Models(Settings):
    """Base models this site loads."""

    allowed: tuple[Digest | Literal["any"], ...] = ()
    """SHA-256 of the weights; ``any`` must be written out."""


class Tasks(Settings):
    """What may be learnt from this site's records, and what may be told of it."""

    kinds: tuple[Name, ...] = ()
    """Kinds of institution to learn with. ``any`` allows all, here and in ``labels``."""
    labels: tuple[Label, ...] = ()
    """Of this site's own task."""
    language: tuple[LanguageTask, ...] = ()
    """Learning of words: a model that learnt to write like this site's text says more of it than labels do."""
    units: tuple[Unit, ...] = ()
    """Whom the guarantee must protect."""
    metrics: tuple[Metric, ...] = ()
    """Figures on rows held back that may be disclosed, summed with other sites' and without noise. ``accuracy`` is of
    labels or of the next token, and brings the loss with it; ``answers`` compares written answers with the true ones."""


class Window(Settings):
    """Hours of the day; ``to`` before ``from`` runs over midnight and belongs to the day it begins on."""

    model_config = ConfigDict(populate_by_name=True)

    days: Annotated[tuple[Literal["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"], ...], Field(min_length=1)] = DAYS
    start: Annotated[TimeOfDay, Field(alias="from")]
    end: Annotated[TimeOfDay, Field(alias="to")]


class Hours(Settings):
    """When this site takes part. No windows: at any hour."""

    timezone: str = "UTC"
    """Such as ``Asia/Shanghai``; wall-clock time there, daylight saving included."""
    windows: tuple[Window, ...] = ()

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        zone(name)
        return name


class Person(Settings):
    """Somebody who may have a say."""

    role: PersonRole
    key: str
    """Ed25519 public key, 32 bytes in hexadecimal or base64; ``fedseek-site person`` makes one."""

    @field_validator("key")
    @classmethod
    def _readable(cls, text: str) -> str:
        _read_key(text)
        return text

    @property
    def public_key(self) -> bytes:
        """The key, 32 bytes."""
        return _read_key(self.key)


class Approval(Settings):
    """Which people have to agree to each plan, and to each release."""

    required: Literal[0, 1, 2] = 1
    """How many different privacy officers agree to a plan before it runs."""
    releases: Literal[0, 1, 2] = 1
    """How many agree to a release before this site signs it; they see its privacy statement first."""
    people: dict[str, Person] = Field(default_factory=dict)


class RosterRule(Settings):
    """Who may change the list of sites."""

    changes: Literal["authority", "approve"] = "authority"
    """``authority``: its signature is enough. ``approve``: a privacy officer has to approve a plan with a new roster."""


class AuditRule(Settings):
    """How long the record is kept."""

    retention_days: Annotated[int, Field(ge=180, le=36_500)] = 400


class Policy(Settings):
    """A site's policy; made by :func:`load_policy`."""

    version: Literal[1]
    limits: Limits = Limits()
    required: Required = Required()
    models: Models = Models()
    tasks: Tasks = Tasks()
    hours: Hours = Hours()
    approval: Approval = Approval()
    roster: RosterRule = RosterRule()
    audit: AuditRule = AuditRule()

    def digest(self) -> str:
        """Hex SHA-256 of what it says, defaults written out: the same policy written otherwise has the same."""
        document = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(b"fedseek/policy/v1\0" + document.encode()).hexdigest()

    def officers(self) -> dict[str, Person]:
        """The people whose approval counts, by name."""
        return {name: person for name, person in self.approval.people.items() if person.role == OFFICER}


def load_policy(path: Path) -> Policy:
    """Read and check a site's policy.

    Raises:
        InvalidConfig: it is missing, others may write it, or anything in it is wrong: all problems at once.
    """
    _check_writers(path)
    policy = load_settings(path, Policy)
    problems = _inconsistencies(policy)
    if problems:
        raise InvalidConfig(problems, source=str(path))
    return policy


def policy_in_force(
    read: Callable[[], Policy], *, site: str, refusal: type[PlanRefused] | type[NotNow] = NotNow
) -> Policy:
    """The policy of the moment, for a decision: one that cannot be read permits nothing.

    Raises:
        PlanRefused, NotNow: ``refusal``, where ``read`` raises InvalidConfig. NotNow unless said otherwise: somebody may
            be at work on the file, which is no reason to end a run of all sites.
    """
    try:
        return read()
    except InvalidConfig as error:
        raise refusal(site, "policy: this site's policy cannot be used", hint=str(error)) from error


def check_policy(policy: Policy, plan: Plan, roster: Roster, *, site: str, total_epsilon_after: float) -> None:
    """Run by a site on a plan it is offered.

    Args:
        policy: of this site.
        plan: what is asked.
        roster: who takes part.
        site: this site's name.
        total_epsilon_after: over the life of the site's data at ``limits.max_delta``, were the plan played to its end;
            infinite where a run without privacy is among what it was trained on.

    Raises:
        PlanRefused: ``rule`` is the first rule that says no, the hint names the others.
    """
    refusals = [
        *_limit_refusals(policy.limits, plan, total_epsilon_after),
        *_required_refusals(policy.required, plan, roster),
        *_task_refusals(policy, plan, roster, site),
    ]
    if refusals:
        others = f"this policy also says no by: {'; '.join(refusals[1:])}" if refusals[1:] else ""
        raise PlanRefused(site, refusals[0], hint=others)


def check_hours(policy: Policy, *, site: str, now: float) -> None:
    """Is this an hour at which the site takes part? ``now`` in Unix seconds.

    Raises:
        NotNow: it is not.
    """
    hours = policy.hours
    if hours.windows and not any(
        _is_in(window, datetime.fromtimestamp(now, zone(hours.timezone))) for window in hours.windows
    ):
        raise NotNow(site, "hours.windows: this site takes part at other hours")


def zone(name: str) -> tzinfo:
    """The time zone of this name. ``UTC`` needs no database of zones.

    Raises:
        ValueError: none is known by that name.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # OSError: the name of a folder of zones
        raise ValueError("no such time zone here; wanted one like Asia/Shanghai (is tzdata installed?)") from None


def _limit_refusals(limits: Limits, plan: Plan, total_epsilon_after: float) -> Iterator[str]:
    privacy = plan.spec.privacy
    if privacy.epsilon is None or privacy.delta is None:
        if not limits.allow_without_privacy:
            yield "limits.allow_without_privacy: the plan promises no privacy"
    else:
        if privacy.epsilon > limits.max_epsilon:
            yield f"limits.max_epsilon: plan asks {privacy.epsilon:g}, allowed {limits.max_epsilon:g}"
        if privacy.delta > limits.max_delta:
            yield f"limits.max_delta: plan asks {privacy.delta:g}, allowed {limits.max_delta:g}"
        if not Limit(limits.max_epsilon_total, limits.max_delta).allows(total_epsilon_after):
            yield "limits.max_epsilon_total"
    if plan.rounds > limits.max_rounds:
        yield f"limits.max_rounds: plan asks {plan.rounds}, allowed {limits.max_rounds}"
    if plan.total_steps > limits.max_steps:
        yield f"limits.max_steps: plan asks {plan.total_steps}, allowed {limits.max_steps}"


def _required_refusals(required: Required, plan: Plan, roster: Roster) -> Iterator[str]:
    cohort = plan.spec.cohort
    missing = sorted(set(required.locks) - LOCKS[plan.spec.version])
    if missing:
        yield f"required.locks: the plan goes without {', '.join(missing)}"
    sites = min(cohort.min_sites, len(roster.entries))
    if sites < required.min_sites:
        yield f"required.min_sites: plan has {sites}, wanted {required.min_sites}"
    if cohort.min_contributors < required.min_contributors:
        yield f"required.min_contributors: plan has {cohort.min_contributors}, wanted {required.min_contributors}"
    if cohort.colluders < required.min_colluders:
        yield f"required.min_colluders: plan withstands {cohort.colluders}, wanted {required.min_colluders}"
    if plan.spec.encryption.key_days > required.max_key_days:
        yield f"required.max_key_days: plan asks {plan.spec.encryption.key_days}, allowed {required.max_key_days}"


def _task_refusals(policy: Policy, plan: Plan, roster: Roster, site: str) -> Iterator[str]:
    tasks = policy.tasks
    if ANY not in policy.models.allowed and plan.spec.model.sha256 not in policy.models.allowed:
        yield "models.allowed: the plan's base model is not among those allowed"
    kinds = sorted(set(plan.spec.kinds) - set(tasks.kinds))
    if ANY not in tasks.kinds and kinds:
        yield f"tasks.kinds: the plan has tasks for {', '.join(kinds)}"
    kind = next((entry.kind for entry in roster.entries if entry.name == site), "")
    own = plan.spec.kinds.get(kind)
    if own is None:
        yield "tasks.kinds: the plan has no task for this site"
        return
    written = {plan.task_in(kind, stage.first_round) for stage in plan.stages} - {"classify"}
    if unwanted := sorted(written - set(tasks.language)):
        yield f"tasks.language: the plan asks to {', '.join(unwanted)}, allowed {', '.join(tasks.language) or 'none'}"
    if ANY not in tasks.labels and not set(own.labels) <= set(tasks.labels):
        yield "tasks.labels: the plan has labels that are not allowed"
    if own.unit not in tasks.units:
        yield f"tasks.units: the plan protects a {own.unit}, allowed {', '.join(tasks.units) or 'none'}"
    disclosed = [own.metric, *(["answers"] if own.task == "instruct" and own.generation.rows else [])]
    if told := [metric for metric in disclosed if metric not in tasks.metrics]:
        yield f"tasks.metrics: the plan discloses {', '.join(told)}, allowed {', '.join(tasks.metrics) or 'none'}"


def _is_in(window: Window, now: datetime) -> bool:
    minute = 60 * now.hour + now.minute
    start, end = _minutes(window.start), _minutes(window.end)
    today, yesterday = DAYS[now.weekday()], DAYS[now.weekday() - 1]
    if start < end:
        return today in window.days and start <= minute < end
    return (today in window.days and minute >= start) or (yesterday in window.days and minute < end)


def _minutes(time: str) -> int:
    return 60 * int(time[:2]) + int(time[3:])


def _read_key(text: str) -> bytes:
    try:
        key = (
            bytes.fromhex(text) if len(text) == 2 * SIGNING_PUBLIC_KEY_BYTES else base64.b64decode(text, validate=True)
        )
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != SIGNING_PUBLIC_KEY_BYTES:
        raise ValueError(f"wanted an Ed25519 public key, {SIGNING_PUBLIC_KEY_BYTES} bytes in hexadecimal or base64")
    return key


def _check_writers(path: Path) -> None:
    """Whoever may write the file, or put another in its place, would be the one who decides."""
    try:
        file = path.resolve(strict=True)
        modes = {each: each.stat().st_mode for each in (file, file.parent)}
    except OSError as error:
        raise InvalidConfig(
            [f"cannot be read: {error.strerror}"],
            source=str(path),
            hint="without a policy this site refuses every plan; clients/policy.example.toml is one to start from",
        ) from error
    open_to = [each for each, mode in modes.items() if mode & (stat.S_IWGRP | stat.S_IWOTH)]
    if open_to:
        raise InvalidConfig(
            [f"{each}: group or others may write it (mode {stat.S_IMODE(modes[each]):04o})" for each in open_to],
            source=str(path),
            hint=f"look at what it says, then: chmod go-w {' '.join(map(str, open_to))}",
        )
    if not stat.S_ISREG(modes[file]):
        raise InvalidConfig(["is not a plain file"], source=str(path))


def _inconsistencies(policy: Policy) -> list[str]:
    problems = []
    if ANY in policy.models.allowed and len(policy.models.allowed) > 1:
        problems.append('models.allowed: "any" and digests; wanted one or the other')
    for number, window in enumerate(policy.hours.windows):
        if window.start == window.end or window.start == "24:00":
            problems.append(
                f"hours.windows.{number}: from {window.start} to {window.end} is no window; a day is 00:00 to 24:00"
            )
    owners: dict[bytes, str] = {}
    for name, person in policy.approval.people.items():
        try:
            check_name("name", name)
        except Malformed as error:
            problems.append(f"approval.people: {error.message}")
        if person.public_key in owners:
            problems.append(f"approval.people: {owners[person.public_key]!r} and {name!r} have one key")
        owners[person.public_key] = name
    needed, officers = max(policy.approval.required, policy.approval.releases), len(policy.officers())
    if policy.roster.changes == "approve":
        needed = max(needed, 1)
    if officers < needed:
        problems.append(
            f"approval.people: {needed} privacy officer(s) have to agree, got {officers}; name them with their keys"
        )
    return problems
