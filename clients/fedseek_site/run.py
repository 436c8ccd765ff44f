"""One run at one site: what stays the same from the plan it admits to the adapter it releases.

What changes is in ``fedseek_site.state``; what a site does, in the order of a run, is in ``entering``, ``rounds`` and
``releasing``: functions from this, the state and a request to a new state and a reply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedseek.canaries import Vocabulary, read_vocabulary
from fedseek.cohort import Federation
from fedseek.encode import UpdateLayout, num_ciphertexts
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster, parse_roster
from fedseek.lora.compute import Compute
from fedseek.lora.model import AdapterModel, adapted_layers
from fedseek.lora.source import locate_model
from fedseek.messages import PlanOffer, encode_message
from fedseek.plan import Plan, head_scope, plan_from_canonical
from fedseek.plan_spec import Task
from fedseek.prepare import prepare_layouts
from fedseek.records import Records, TokenisedRecords
from fedseek.several import Several
from fedseek.tokenise import Prompt, prompts, tokenise
from fedseek_site.admission import (
    SiteData,
    check_admission,
    check_labels,
    check_room,
    check_roster,
    check_site_level,
    tasks_of,
    units_for,
)
from fedseek_site.canary_audit import draw_canaries
from fedseek_site.checkpoints import Checkpoints
from fedseek_site.computing import site_model
from fedseek_site.ledger import Ledger
from fedseek_site.ledger_entries import Mechanism
from fedseek_site.state import SiteState
from fedseek_site.weights import digests_of, start_scopes, to_values

Observe = Callable[[dict[str, Any]], None]
Clock = Callable[[], float]
Permit = Callable[[str, str, Plan, Roster], None]
"""Given run, phase ("plan" when a run begins, "round" before each update, "release"), plan and roster; raises to refuse."""


def permit_all(run: str, phase: str, plan: Plan, roster: Roster) -> None:
    """The policy of a simulation: its researcher owns every site."""


@dataclass(frozen=True, slots=True)
class SiteRun:
    """A run as this site sees it; made by :func:`open_run`.

    Attributes:
        federation: run, plan and roster: what every key, share and signature is bound to.
        identity: this site's private keys.
        model: a place to compute in; what it holds between steps means nothing.
        layouts: what the model trains, by scope.
        train_records: rows to train on, for each task that sites of this kind have in the plan.
        held_back: rows to evaluate on, likewise.
        prompts: those of the rows held back that ask for an answer; of a kind that instructs.
        vocabulary: what canaries are made of.
        release_folder: where the release is written.
        observe: told what happens here, for the site's own report; never sent anywhere.
        clock: Unix time in seconds.
        spend: to be called before training with the round and its steps: enters them in the privacy ledger, or raises.
        steps_spent: steps that the privacy ledger has of runs of these names, under this plan's mechanisms, by stage.
        checkpoints: where the training of a round is kept while it is under way.
        several: the other processes that train here, one a GPU; None where this one is alone.
    """

    federation: Federation
    identity: SiteIdentity = field(repr=False)
    model: AdapterModel = field(repr=False)
    layouts: dict[str, UpdateLayout] = field(repr=False)
    train_records: Mapping[Task, TokenisedRecords] = field(repr=False)
    held_back: Mapping[Task, TokenisedRecords] = field(repr=False)
    prompts: tuple[Prompt, ...] = field(repr=False)
    vocabulary: Vocabulary
    release_folder: Path
    observe: Observe = field(repr=False)
    clock: Clock = field(repr=False)
    spend: Callable[[int, int], None] = field(repr=False)
    steps_spent: Callable[[Collection[str]], tuple[int, ...]] = field(repr=False)
    checkpoints: Checkpoints = field(repr=False)
    several: Several | None = field(repr=False, default=None)

    @property
    def name(self) -> str:
        """Of the run."""
        return self.federation.run

    @property
    def plan(self) -> Plan:
        """What all sites agreed to."""
        return self.federation.plan

    @property
    def me(self) -> str:
        """This site's name."""
        return self.identity.name

    @property
    def head(self) -> str:
        """The scope of the head this site trains: that of its kind."""
        return head_scope(self.identity.kind)

    @property
    def shared(self) -> tuple[str, ...]:
        """The scopes this site sums with others; a head that too few sites share is not among them."""
        return self.federation.shared_scopes(self.identity.kind)

    @property
    def closing_round(self) -> int:
        """Number of the round after the last, in which nothing is trained and the final metrics are sent."""
        return self.plan.rounds + 1

    def task_in(self, number: int) -> Task:
        """What this site trains on in round ``number``."""
        return self.plan.task_in(self.identity.kind, number)

    def train_in(self, number: int) -> TokenisedRecords:
        """Rows to train on in round ``number``."""
        return self.train_records[self.task_in(number)]

    def held_back_in(self, number: int) -> TokenisedRecords:
        """Rows to evaluate on in round ``number``."""
        return self.held_back[self.task_in(number)]


def open_run(
    offer: PlanOffer,
    identity: SiteIdentity,
    data: SiteData,
    *,
    trusted: Roster | None,
    release_folder: Path,
    observe: Observe,
    clock: Clock,
    ledger: Ledger,
    checkpoints: Checkpoints,
    permit: Permit = permit_all,
    computes: Sequence[Compute] = (),
) -> SiteRun:
    """Check the plan against this site and its policy, and load the model; also after a restart.

    Raises:
        InvalidPlan: the plan does not parse or its parts do not fit.
        Malformed, WrongKey: the roster does not parse.
        PlanRefused: this site will not run it; names the rule.
        NotNow: it will, but not yet.
    """
    roster = parse_roster(offer.roster)
    check_roster(roster, trusted, me=identity.public())
    plan = plan_from_canonical(offer.plan)
    check_admission(plan, roster, me=identity.public(), data=data)
    check_labels(plan, identity.kind, data)
    permit(offer.run, "plan", plan, roster)
    task, folder = plan.spec.kinds[identity.kind], locate_model(plan.spec.model.source)
    computes = tuple(computes) or (Compute(),)
    model = site_model(offer.plan, identity.kind, computes, 0)
    layouts = prepare_layouts(plan, identity.kind, model)
    num_values = sum(layout.num_values for layout in layouts.values())
    check_room(plan, num_values, me=identity.name)
    check_site_level(plan, num_values, me=identity.name)
    observe({"event": "adapter", "run": offer.run, "layers": list(adapted_layers(model)), "values": num_values})
    asked = prompts(data.held_back, folder, max_tokens=plan.spec.model.max_tokens) if task.task == "instruct" else []
    return SiteRun(
        federation=Federation.of(offer.run, plan, roster),
        identity=identity,
        model=model,
        layouts=layouts,
        train_records=_by_task(plan, identity.kind, units_for(plan, identity.kind, data.train), folder),
        held_back=_by_task(plan, identity.kind, data.held_back, folder),
        prompts=tuple(asked),
        vocabulary=read_vocabulary(folder, max_tokens=plan.spec.model.max_tokens, task=task.task),
        release_folder=release_folder,
        observe=observe,
        clock=clock,
        spend=partial(_spend, offer.run, plan, ledger, observe),
        steps_spent=partial(_steps_spent, plan, ledger),
        checkpoints=checkpoints,
        several=_several(plan, identity.kind, computes),
    )


def _several(plan: Plan, kind: str, computes: Sequence[Compute]) -> Several | None:
    """The other processes, which load the base model from now on; None where this one is alone."""
    build = partial(site_model, plan.canonical(), kind, computes)
    return Several(build, len(computes)) if len(computes) > 1 else None


def _by_task(plan: Plan, kind: str, records: Records, folder: Path) -> dict[Task, TokenisedRecords]:
    labels, cut = plan.spec.kinds[kind].labels, plan.spec.model.max_tokens
    return {task: tokenise(records, folder, task=task, labels=labels, max_tokens=cut) for task in tasks_of(plan, kind)}


def _spend(run: str, plan: Plan, ledger: Ledger, observe: Observe, number: int, steps: int) -> None:
    """Enter a round in the ledger, then tell the site's record which entry that is: an older copy will lack it."""
    entered = ledger.spend(run, number, plan.stage_of(number).privacy, steps)
    observe({"event": "ledger", "run": run, "round": number, "entry": entered.number, "digest": entered.digest.hex()})


def _steps_spent(plan: Plan, ledger: Ledger, runs: Collection[str]) -> tuple[int, ...]:
    """By stage, which the number of a round tells: two stages may have the same mechanism."""
    steps = [0] * len(plan.stages)
    for spent in ledger.account().spends():
        stage = plan.stage_of(spent.round)
        if spent.run in runs and spent.mechanism == Mechanism.of(stage.privacy):
            steps[stage.index] += spent.steps
    return tuple(steps)


def begin_run(run: SiteRun, offer: PlanOffer) -> SiteState:
    """The state before anything was done. ``run`` must be fresh from :func:`open_run`: its model holds the first values."""
    first = start_scopes(run.plan, run.layouts, run.model)
    no_steps = (0,) * len(run.plan.stages)
    return SiteState(
        offer=encode_message(offer),
        scopes=to_values(first),
        steps_done=no_steps,
        steps_accounted=no_steps,
        digests=digests_of(first, run.shared),
        canaries=draw_canaries(run),
    )


def report_layout(run: SiteRun) -> None:
    """Tell the site's report what will be sent in this run, and what stays at home."""
    run.observe({"event": "layout", "num_values": values_of(run), "ciphertexts": ciphertexts_of(run)})
    if run.head not in run.shared:
        run.observe(
            {
                "event": "head-stays-home",
                "kind": run.identity.kind,
                "sites": len(run.federation.members(run.head)),
                "wanted": run.plan.spec.cohort.min_contributors,
            }
        )


def values_of(run: SiteRun) -> dict[str, int]:
    """Values of one update, by shared scope."""
    return {scope: run.layouts[scope].num_values for scope in run.shared}


def ciphertexts_of(run: SiteRun) -> dict[str, int]:
    """Ciphertexts of one update, by shared scope."""
    return {scope: num_ciphertexts(run.layouts[scope], run.plan.packing) for scope in run.shared}


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of the block to ``seconds[phase]``."""
    started = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started
