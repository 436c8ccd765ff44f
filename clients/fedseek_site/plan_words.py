"""A plan in plain words, for somebody who is asked to approve it."""

from __future__ import annotations

from fedseek.identity.roster import Roster
from fedseek.plan import Plan
from fedseek.plan_spec import KindSpec
from fedseek.plan_stages import Stage

Row = tuple[str, str]


def describe(plan: Plan, roster: Roster) -> list[Row]:
    """What will run, among whom, and what it costs: pairs of a word and what is to be said of it.

    Characters that a terminal would obey or hide are written out, so that a plan cannot paint over what it says.
    """
    spec = plan.spec
    cohort = spec.cohort
    return [
        ("plan", f"{spec.name}, digest {plan.digest}"),
        ("privacy", _privacy(plan)),
        *_site_level(plan),
        *((f"task of a {kind}", _task(task)) for kind, task in spec.kinds.items()),
        ("base model", f"{visible(spec.model.source)}, SHA-256 {spec.model.sha256}{_files(plan)}"),
        *(
            ("training" if len(plan.stages) == 1 else f"stage {stage.index + 1}", _stage(stage))
            for stage in plan.stages
        ),
        *_early_stopping(plan),
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


def _files(plan: Plan) -> str:
    named = plan.spec.model.files_sha256
    return f", with configuration and tokenizer of SHA-256 {named}" if named else ""


def _privacy(plan: Plan) -> str:
    privacy = plan.spec.privacy
    if privacy.epsilon is None or privacy.delta is None:
        return "NONE: nothing bounds what the adapter tells of a record"
    cap = privacy.max_records_per_unit
    used = f"; at most {cap} records of a customer or patient are used" if cap else ""
    whole = "" if len(plan.stages) == 1 else ", its stages together"
    return f"ε {privacy.epsilon:g} at δ {privacy.delta:g} when the run ends{whole}, for each site ({privacy.mechanism}){used}"


def _stage(stage: Stage) -> str:
    what = (
        "all sites learn the next token of their own texts, and disclose its accuracy, before the tasks above begin; "
        if stage.task
        else ""
    )
    rates = f"learning rate {stage.learning_rate:g}"
    if stage.head_learning_rate != stage.learning_rate:
        rates += f", of heads {stage.head_learning_rate:g}"
    if stage.warmup_steps:
        rates += f", reached after {stage.warmup_steps} steps"
    return f"{what}{stage.rounds} rounds of {stage.steps_per_round} steps, {stage.num_steps} steps in all; {rates}"


def _early_stopping(plan: Plan) -> list[Row]:
    stopping = plan.spec.training.early_stopping
    if stopping is None:
        return []
    return [
        (
            "may end early",
            f"when more than half of the sites in a sum vote for it; a site does after {stopping.patience} rounds in a row "
            "without a lower loss on rows held back, and the sites see how many did",
        )
    ]


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
    if task.task == "continue":
        return f"learns the next token of texts; {_disclosed(task, 'accuracy of the next token')}"
    if task.task == "instruct":
        rows = task.generation.rows
        answers = f", and how {rows} written answers compare with the true ones" if rows else ""
        return f"learns to answer instructions; {_disclosed(task, f'accuracy of the next token{answers}')}"
    shown = ", ".join(map(visible, task.labels[:10])) + (
        f" and {len(task.labels) - 10} more" if len(task.labels) > 10 else ""
    )
    return f"learns labels; {_disclosed(task, task.metric)}; labels {shown}"


def _disclosed(task: KindSpec, figures: str) -> str:
    return f"protects a {task.unit}; discloses {figures}, summed with other sites'"
