"""Verifying a release: everything that can be checked with the folder and the roster alone, offline.

Checked in the order of what rests on what, so that the first thing that is wrong is the one that is named:

    roster -> plan -> signatures -> who said what of which release -> files and tensors -> every figure of every
    statement, made again from the plan -> approvals -> heads of the audit records -> pages for people

What it cannot check is what only the site can know: its data, its ledger, its held-back records. There it has the site's
signed word (``statement.NOT_COVERED`` says so).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec.structs import fields, replace

from fedseek.cohort import Federation
from fedseek.daemon.audit_lines import COORDINATOR, heads_digest, verify_head
from fedseek.errors import ReleaseRefused
from fedseek.evidence import (
    HEADS_FILE,
    PLAN_FILE,
    ROSTER_FILE,
    AuditHeads,
    Release,
    naming,
    pages,
    signature_file,
    statement_file,
)
from fedseek.identity.roster import Roster
from fedseek.identity.signing import CONTEXT_HEADS_SEEN, CONTEXT_RELEASE, verify, verify_with
from fedseek.lora.adapter_file import (
    ADAPTER_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    largest_value,
    read_adapter,
)
from fedseek.lora.digest import tensors_digest
from fedseek.messages import release_message
from fedseek.plan import GLOBAL_SCOPE, Plan
from fedseek.release import approvals_wanted, check_release, released_config, released_tensors
from fedseek.statement import PrivacyStatement, outcome_of, privacy_statement

# Epsilon is worked out by FFT, whose last bits differ between machines and versions. Nobody's privacy hangs on this much.
_EPSILON_SLACK: Final = 1e-6
_ACCOUNTED: Final = ("epsilon", "epsilon_second_opinion")
# in one release these are the same in every statement
_COMMON: Final = ("run", "plan_digest", "roster_digest", "files", "contributors")


@dataclass(frozen=True, slots=True)
class Verified:
    """A release of which everything holds.

    Attributes:
        run: its name.
        plan: of the run.
        roster: of the run.
        statements: by site.
        approved, contributors: sites in the adapter that signed, of all that are in it.
        checked: what was looked at, in order, in words.
    """

    run: str
    plan: Plan = field(repr=False)
    roster: Roster = field(repr=False)
    statements: Mapping[str, PrivacyStatement] = field(repr=False)
    approved: tuple[str, ...]
    contributors: tuple[str, ...]
    checked: tuple[str, ...]


def verify_release(release: Release, roster: Roster) -> Verified:
    """Check a release against the roster that whoever asks holds to be true.

    Raises:
        ReleaseRefused: something does not hold; the message begins with the file in which it shows.
    """
    plan, statements = release.plan, release.statements
    checked = ["folder: every file is there, within its bound, and no other"]
    _check_roster(release.roster, roster)
    checked.append(f"{ROSTER_FILE}: the roster that was given, {len(roster.entries)} sites")
    for site, statement in statements.items():
        _check_signature(release, site, statement, roster)
    checked.append(f"privacy-*.sig: signed by {', '.join(statements)}")
    first = next(iter(statements.values()))
    for site, statement in statements.items():
        _check_common(site, statement, first)
        _check_speaks_of(release, statement)
    checked.append(f"{PLAN_FILE}: the plan of every statement, {plan.digest}")
    largest = _check_adapter(release, first)
    checked.append(f"{WEIGHTS_FILE}, {CONFIG_FILE}: what every site signed, and what the plan says")
    for site, statement in statements.items():
        with naming(statement_file(site)):
            _check_statement(Federation.of(first.run, plan, roster), statement, largest)
    _check_scopes(statements)
    checked.append(
        "privacy-*.json: every figure follows from the plan, epsilon worked out again; every check of the gate held"
    )
    approved = _check_approvals(plan, first, statements)
    checked.append(f"approvals: {len(approved)} of the {len(first.contributors)} sites in the adapter")
    if release.heads is not None:
        with naming(HEADS_FILE):
            checked.append(f"{HEADS_FILE}: {check_heads(release.heads, roster)}")
    _check_pages(release)
    checked.append("README.md, PRIVACY.md, PRIVACY.zh.md: say what the statements say")
    return Verified(first.run, plan, roster, statements, approved, first.contributors, tuple(checked))


def _check_roster(held: Roster, given: Roster) -> None:
    if held.digest() != given.digest():
        raise ReleaseRefused(
            f"{ROSTER_FILE}: has digest {held.digest().hex()}, the roster that was given has {given.digest().hex()}",
            hint="give the roster that was in force when the run was played; if this is it, do not believe the release",
        )


def _check_signature(release: Release, site: str, statement: PrivacyStatement, roster: Roster) -> None:
    """The site whose name the file has signed these very bytes, with the key that the roster has of it."""
    file = f"{statement_file(site)}, {signature_file(site)}"
    digests = {scope: bytes.fromhex(digest) for scope, digest in statement.tensors.items()}
    message = release_message(statement.run, digests, release.files[statement_file(site)])
    with naming(file):
        entry = roster.entry(site)
        verify(entry, CONTEXT_RELEASE, message, release.files[signature_file(site)])
    if (statement.site, statement.kind) != (entry.name, entry.kind):
        raise ReleaseRefused(
            f"{file}: speaks for {statement.site!r} of kind {statement.kind!r}, wanted {entry.name!r} of kind {entry.kind!r}"
        )


def _check_common(site: str, statement: PrivacyStatement, first: PrivacyStatement) -> None:
    for name in _COMMON:
        got, wanted = getattr(statement, name), getattr(first, name)
        if got != wanted:
            raise ReleaseRefused(
                f"{statement_file(site)}: {name} is {got}, in {statement_file(first.site)} it is {wanted}",
                hint="the sites did not sign the same release",
            )


def _check_speaks_of(release: Release, statement: PrivacyStatement) -> None:
    """Plan and roster are those that the site signed for."""
    said = statement_file(statement.site)
    if release.plan.digest != statement.plan_digest:
        raise ReleaseRefused(f"{PLAN_FILE}: has digest {release.plan.digest}, {said} is of {statement.plan_digest}")
    if release.roster.digest().hex() != statement.roster_digest:
        raise ReleaseRefused(
            f"{ROSTER_FILE}: has digest {release.roster.digest().hex()}, {said} is of {statement.roster_digest}"
        )
    if set(statement.files) != set(ADAPTER_FILES):
        raise ReleaseRefused(f"{said}: is of files {sorted(statement.files)}, wanted {sorted(ADAPTER_FILES)}")
    for name in ADAPTER_FILES:
        got = hashlib.sha256(release.files[name]).hexdigest()
        if got != statement.files[name]:
            raise ReleaseRefused(f"{name}: has sha256 {got}, {said} is of {statement.files[name]}")


def _check_adapter(release: Release, statement: PrivacyStatement) -> float:
    """The configuration is the plan's, the trained tensors are those signed for. Returns the largest value in them."""
    if release.files[CONFIG_FILE] != released_config(release.plan):
        raise ReleaseRefused(f"{CONFIG_FILE}: is not the configuration that follows from {PLAN_FILE}")
    with naming(WEIGHTS_FILE):
        tensors = read_adapter(release.files[WEIGHTS_FILE])
        got = tensors_digest(released_tensors(release.plan, tensors)).hex()
    wanted = statement.tensors.get(GLOBAL_SCOPE)
    if got != wanted:
        raise ReleaseRefused(
            f"{WEIGHTS_FILE}: its trained tensors have digest {got}, {statement_file(statement.site)} is of {wanted}"
        )
    return largest_value(tensors, seed=release.plan.seed_for("lora"))


def _check_statement(federation: Federation, statement: PrivacyStatement, largest: float) -> None:
    """The statement is the one that the gate lets pass for the few numbers in it that are the site's own."""
    plan = federation.plan
    if statement.kind not in plan.spec.kinds:
        raise ReleaseRefused(f"kind is {statement.kind!r}, wanted one of the plan: {', '.join(plan.spec.kinds)}")
    contributors = tuple(name for name in federation.roster.names if name in statement.contributors)
    if contributors != statement.contributors:
        raise ReleaseRefused(f"contributors are {statement.contributors}, wanted sites of the roster, in its order")
    if set(statement.tensors) != set(federation.shared_scopes(statement.kind)):
        raise ReleaseRefused(
            f"tensors are of {sorted(statement.tensors)}, wanted {sorted(federation.shared_scopes(statement.kind))}"
        )
    outcome = outcome_of(plan, statement, largest_value=largest)
    made = privacy_statement(plan, outcome, checks=check_release(plan, outcome))
    for name in _ACCOUNTED:
        got, wanted = getattr(statement, name), getattr(made, name)
        if not _is_the_same_epsilon(got, wanted):
            raise ReleaseRefused(f"{name} is {got}, worked out again it is {wanted}", hint="do not believe this site")
    made = replace(made, **{name: getattr(statement, name) for name in _ACCOUNTED})
    said, worked_out = statement.site_level, made.site_level
    if said and worked_out and _is_the_same_epsilon(said.epsilon, worked_out.epsilon):
        made = replace(made, site_level=replace(worked_out, epsilon=said.epsilon))
    for each in fields(PrivacyStatement):
        got, wanted = getattr(statement, each.name), getattr(made, each.name)
        if got != wanted:
            raise ReleaseRefused(f"{each.name} is {_shown(got, wanted)}, wanted {_shown(wanted, got)}")


def _is_the_same_epsilon(got: float | None, wanted: float | None) -> bool:
    if got is None or wanted is None:
        return got is wanted
    return math.isclose(got, wanted, rel_tol=_EPSILON_SLACK, abs_tol=_EPSILON_SLACK)


def _shown(value: Any, other: Any) -> str:
    """What is told of a field; of a list, only what the other one has not."""
    if isinstance(value, tuple) and isinstance(other, tuple):
        value = tuple(each for each in value if each not in other) or f"{len(value)} of them, in another order"
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _check_scopes(statements: Mapping[str, PrivacyStatement]) -> None:
    """Sites that share a scope signed the same values of it. The heads are not in the folder."""
    seen: dict[str, tuple[str, str]] = {}
    for site, statement in statements.items():
        for scope, digest in statement.tensors.items():
            other, wanted = seen.setdefault(scope, (site, digest))
            if digest != wanted:
                raise ReleaseRefused(
                    f"{statement_file(site)}: is of {scope!r} with digest {digest}, {statement_file(other)} of {wanted}"
                )


def _check_approvals(
    plan: Plan, first: PrivacyStatement, statements: Mapping[str, PrivacyStatement]
) -> tuple[str, ...]:
    approved = tuple(name for name in first.contributors if name in statements)
    wanted = approvals_wanted(plan, first.contributors)
    if len(approved) < wanted:
        absent = [statement_file(name) for name in first.contributors if name not in statements]
        raise ReleaseRefused(
            f"{', '.join(absent) or 'privacy-*.json'}: missing; {len(approved)} of the {len(first.contributors)} sites in "
            f"the adapter have signed, wanted {wanted}"
        )
    return approved


def check_heads(heads: AuditHeads, roster: Roster) -> str:
    """Each site signed the head of its own record; the list is what the countersigning sites have seen and keep.

    Returns:
        What was found, in words.

    Raises:
        ReleaseRefused: nobody has countersigned the list.
        WrongKey, Malformed: a head or countersignature is not of a site of the roster.
    """
    listed = heads.listed()
    for head in listed:
        if head.name != COORDINATOR:
            verify_head(head, roster.entry(head.name).signing_key)
    if not heads.countersignatures:
        raise ReleaseRefused("no site has countersigned the list")
    noted = heads_digest(listed)
    for name, signature in heads.countersignatures.items():
        key = roster.entry(name).signing_key
        verify_with(key, CONTEXT_HEADS_SEEN, noted, bytes.fromhex(signature), who=f"site {name!r}")
    return f"heads of {len(listed)} audit records, countersigned by {', '.join(heads.countersignatures)}"


def _check_pages(release: Release) -> None:
    for name, wanted in pages(release.plan, list(release.statements.values())).items():
        if release.files[name] != wanted:
            raise ReleaseRefused(
                f"{name}: does not say what plan and statements say", hint="read the JSON files instead"
            )
