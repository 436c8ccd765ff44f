"""A plan in plain words, for somebody who is asked to approve it."""

from __future__ import annotations

from fedseek.identity.roster import Roster
from fedseek.plan import Plan
from fedseek.plan_spec import KindSpec

Row = tuple[str, str]


def describe(plan: Plan, roster: Roster) -> list[Row]:
    """What will run, among whom, and what it costs: pairs of a word and what is to be said of it.

    Characters that a terminal would obey or hide are written out, so that a plan cannot paint over what it says.
    """
    spec = plan.spec
    training, cohort = spec.training, spec.cohort
    return [
        ("plan", f"{spec.name}, digest {plan.digest}"),
        ("privacy", _privacy(plan)),
        *_site_level(plan),
        *((f"task of a {kind}", _task(task)) for kind, task in spec.kinds.items()),
        ("base model", f"{visible(spec.model.source)}, SHA-256 {spec.model.sha256}"),
        ("training", f"{training.rounds} rounds of {training.steps_per_round} steps, {plan.total_steps} steps in all"),
        ("locks", f"encryption and masks; no group key older than {spec.encryption.key_days} days"),
        (
            "sums",
            f"of at least {cohort.min_sites} sites ({cohort.min_contributors} for any head); up to {cohort.colluders} "
            "of them may tell the coordinator all they know",
        ),
        ("roster", f"{len(roster.entries)} sites, digest {roster.digest().hex()}"),
        *(("site", f"{entry.name} ({entry.kind}), fingerprint {entry.fingerprint()}") for entry in roster.entries),
    ]


def visible(text: str) -> str:
    r"""The text with control characters, line ends and characters that turn the direction of writing as escapes.

    >>> print(visible("欺诈\x1b[2J"))
    欺诈\x1b[2J
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _privacy(plan: Plan) -> str:
    privacy = plan.spec.privacy
    if privacy.epsilon is None or privacy.delta is None:
        return "NONE: nothing bounds what the adapter tells of a record"
    cap = privacy.max_records_per_unit
    used = f"; at most {cap} records of a customer or patient are used" if cap else ""
    return f"ε {privacy.epsilon:g} at δ {privacy.delta:g} when the run ends, for each site ({privacy.mechanism}){used}"


def _site_level(plan: Plan) -> list[Row]:
    site, params = plan.spec.privacy.site, plan.site_level
    if site is None or params is None:
        return []
    return [
        (
            "privacy of a site",
            f"ε {site.epsilon:g} at δ {site.delta:g} when the run ends, for all that a site sends but its metrics on rows "
            f"held back; as long as no more than {params.tolerated} of the others tell what noise they added",
        )
    ]


def _task(task: KindSpec) -> str:
    shown = ", ".join(map(visible, task.labels[:10])) + (
        f" and {len(task.labels) - 10} more" if len(task.labels) > 10 else ""
    )
    return f"protects a {task.unit}; discloses {task.metric}, summed with other sites'; labels {shown}"
