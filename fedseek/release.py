"""The release: the gate in front of it, which fails closed, and what a reader of the adapter is told.

    outcome of a run at a site --check_release--> checks, all of which hold --privacy_statement--> what the site signs

The same function that lets a site release is run once more by everybody who verifies: the checks of a statement are
those that the gate makes of it, or the statement is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedseek.dp.guards import NO_UNNOISED_METRICS, TRAINING_GUARDS
from fedseek.dp.site_guards import SITE_LEVEL_GUARDS
from fedseek.errors import ReleaseRefused
from fedseek.lora.adapter_file import AdapterForm, Tensors, adapter_config, trained_tensors
from fedseek.plan import Plan
from fedseek.plan_spec import KindSpec
from fedseek.statement import (
    Check,
    Outcome,
    PrivacyStatement,
    by_stage,
    describe_steps,
    is_accounted,
    missing_guards,
    wanted_guards,
)
from fedseek.statement_page import describe_guarantee
from fedseek.statement_words import ENGLISH

BUDGET: Final = "budget"
GUARDS: Final = "guards"
EPSILON: Final = "epsilon"
CANARY_AUDIT: Final = "canary-audit"
UTILITY: Final = "utility"
CONTRIBUTORS: Final = "contributors"
ADAPTER: Final = "adapter"
NOT_ASKED: Final = "-"  # wanted and got of a check that the plan does not ask for

_Checked = tuple[Check, bool]
_KNOWN_GUARDS: Final = frozenset({*TRAINING_GUARDS, *SITE_LEVEL_GUARDS, NO_UNNOISED_METRICS})


def check_release(plan: Plan, outcome: Outcome) -> tuple[Check, ...]:
    """The gate: every check of a release, all of which hold.

    Nothing that is told of them says more about the held-back records than that the plan's floor was reached.

    Raises:
        ReleaseRefused: one does not; names the first, and in its hint the others.
    """
    checked = [check(plan, outcome) for check in _GATE]
    failed = [check for check, holds in checked if not holds]
    if failed:
        first, *others = (f"{check.name}: got {check.got}, wanted {check.wanted}" for check in failed)
        raise ReleaseRefused(
            f"site {outcome.site!r} does not release run {outcome.run!r}: {first}",
            hint="; ".join(["no epsilon is stated that was not earned, and nothing is released", *others]),
        )
    return tuple(check for check, _ in checked)


def approvals_wanted(plan: Plan, contributors: Sequence[str]) -> int:
    """How many of the sites whose updates are in the adapter must approve its release."""
    asked = plan.spec.release.min_approvals
    return len(contributors) if asked is None else asked


def released_config(plan: Plan) -> bytes:
    """The bytes of ``adapter_config.json``: they follow from the plan."""
    lora = plan.spec.lora
    return adapter_config(
        AdapterForm(
            method=lora.method,
            rank=lora.rank,
            alpha=lora.alpha,
            rank_stabilised=lora.rank_stabilised,
            target_modules=plan.target_modules,
            layers=lora.layers,
            virtual_tokens=lora.virtual_tokens,
            words=writes_words(plan),
            base_name=plan.spec.model.source,
        )
    )


def released_tensors(plan: Plan, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
    """The trained ones of a released adapter, by the names that sites sign digests under.

    Raises:
        Malformed: names that no adapter of the plan has.
    """
    return trained_tensors(tensors, method=plan.spec.lora.method, words=writes_words(plan))


def writes_words(plan: Plan) -> bool:
    """Whether any site learns words in any stage: the released adapter is then one for a causal language model."""
    return any(map(plan.writes, plan.spec.kinds))


def _check_budget(plan: Plan, outcome: Outcome) -> _Checked:
    """Steps trained = accounted, all of them in the site's ledger, and no more of any stage than epsilon was computed for.

    They may be fewer: a site that rests, as all do once training has stopped early, spends nothing.
    A plan that promises nothing has no budget: a run that goes on from a lost one trains some of its rounds again.
    """
    planned, trained = [stage.num_steps for stage in plan.stages], by_stage(outcome.steps)
    if plan.privacy is None:
        return Check(name=BUDGET, wanted=NOT_ASKED, got=trained), outcome.spend is None
    holds = is_accounted(plan, outcome) and all(
        spent <= most for spent, most in zip(outcome.steps_spent, planned, strict=True)
    )
    got = trained if holds else describe_steps(outcome)
    return Check(name=BUDGET, wanted=f"<= {by_stage(planned)}", got=got), holds


def _check_guards(plan: Plan, outcome: Outcome) -> _Checked:
    """Every guard that the plan asks for, and no name that is none; each once, in order."""
    passed, missing = outcome.guards_passed, missing_guards(plan, outcome.guards_passed)
    wanted = f">= {len(wanted_guards(plan))}"
    strange = sorted(set(passed) - _KNOWN_GUARDS)
    if missing or strange or list(passed) != sorted(set(passed)):
        got = f"{len(passed)}, without {', '.join(missing) or 'none'}, with unknown {', '.join(strange) or 'none'}"
        return Check(name=GUARDS, wanted=wanted, got=got[:400]), False
    return Check(name=GUARDS, wanted=wanted, got=str(len(passed))), True


def _check_epsilon(plan: Plan, outcome: Outcome) -> _Checked:
    promised = plan.spec.privacy.epsilon
    if plan.privacy is None or promised is None:
        return Check(name=EPSILON, wanted=NOT_ASKED, got=NOT_ASKED), outcome.spend is None
    claimed = _claimed(plan, outcome)
    return Check(name=EPSILON, wanted=f"<= {promised:g}", got=f"{claimed:.4f}"), claimed <= promised


def _check_canary_audit(plan: Plan, outcome: Outcome) -> _Checked:
    """A lower bound above the claim shows that the claim is false, up to the confidence of the audit."""
    audit = outcome.audit
    if plan.num_canaries == 0:
        return Check(name=CANARY_AUDIT, wanted=NOT_ASKED, got=NOT_ASKED), audit is None
    claimed = _claimed(plan, outcome) if plan.privacy else math.inf
    wanted = f"<= {claimed:.4f}"
    if audit is None:
        return Check(name=CANARY_AUDIT, wanted=wanted, got="no outcome"), False
    asked = (plan.num_canaries, plan.spec.audit.confidence)
    if (audit.canaries, audit.confidence) != asked:
        got = f"{audit.canaries} canaries at confidence {audit.confidence}, not {asked[0]} at {asked[1]}"
        return Check(name=CANARY_AUDIT, wanted=wanted, got=got), False
    # "<=" of each: a comparison with NaN is false, while max() may pass over it
    holds = audit.released_adapter <= claimed and audit.every_round <= claimed
    bounds = f"{audit.released_adapter:.4f}, {audit.every_round:.4f}"
    return Check(name=CANARY_AUDIT, wanted=wanted, got=bounds), holds


def _check_utility(plan: Plan, outcome: Outcome) -> _Checked:
    """The figure itself is told to nobody: it was computed on held-back records, without noise."""
    floor = plan.spec.kinds[outcome.kind].min_utility
    if floor is None:
        return Check(name=UTILITY, wanted=NOT_ASKED, got=NOT_ASKED), True
    wanted = f">= {floor:g}"
    if outcome.utility is not None and outcome.utility >= floor:
        return Check(name=UTILITY, wanted=wanted, got=wanted), True
    got = "no figure over the sites of this kind" if outcome.utility is None else f"{outcome.utility:.4f}"
    return Check(name=UTILITY, wanted=wanted, got=got), False


def _check_contributors(plan: Plan, outcome: Outcome) -> _Checked:
    floor, count = max(plan.spec.cohort.min_sites, plan.spec.cohort.min_contributors), len(outcome.contributors)
    return Check(name=CONTRIBUTORS, wanted=f">= {floor}", got=str(count)), count >= floor


def _check_adapter(plan: Plan, outcome: Outcome) -> _Checked:
    """Finite, and no longer where the plan's seed put it."""
    largest = outcome.largest_value
    return Check(name=ADAPTER, wanted="> 0, < inf", got=f"{largest:.6g}"), 0 < largest < math.inf


def _claimed(plan: Plan, outcome: Outcome) -> float:
    """The epsilon that is about to be stated; NaN, which passes no check, for more steps of a stage than the plan has."""
    spend, planned = outcome.spend, tuple(stage.num_steps for stage in plan.stages)
    if spend is None or len(spend.steps) != len(planned):
        return math.nan
    within = all(steps <= most for steps, most in zip(spend.steps, planned, strict=True))
    claimed = plan.claimed(spend) if within else None
    return math.nan if claimed is None else claimed.epsilon()


_GATE: Final[tuple[Callable[[Plan, Outcome], _Checked], ...]] = (
    _check_budget,
    _check_guards,
    _check_epsilon,
    _check_canary_audit,
    _check_utility,
    _check_contributors,
    _check_adapter,
)


def model_card(
    plan: Plan, *, run: str, statements: Sequence[PrivacyStatement], utility: Mapping[str, float], base: str
) -> str:
    """The README.md of a release, with the metadata block model hubs read. ``utility`` is by kind."""
    spec = plan.spec
    tasks = "\n".join(
        f"- `{kind}`: {_task(task)} on held-back rows "
        + (f"{utility[kind]:.3f}" if kind in utility else "not disclosed")
        for kind, task in spec.kinds.items()
    )
    private = bool(statements) and all(statement.epsilon is not None for statement in statements)
    tags = ["lora", "federated-learning", *(["differential-privacy"] if private else [])]
    told = "\n".join(f"- {describe_guarantee(statement, ENGLISH)}" for statement in statements)
    return f"""---
library_name: peft
base_model: {base}
tags: [{", ".join(tags)}]
---

# {spec.name}

A LoRA adapter (method `{spec.lora.method}`, rank {spec.lora.rank}, alpha {spec.lora.alpha:g}) that institutions
fine-tuned together without showing each other, or the coordinator, their text or their updates.

- run `{run}`, plan `{plan.digest}`
- base model `{base}`, weights sha256 `{spec.model.sha256}`
{_stages(plan)}

## Tasks

{tasks}

## Privacy

{told}

What this means, how it was checked, and what it does not cover: [PRIVACY.md](PRIVACY.md), [PRIVACY.zh.md](PRIVACY.zh.md).

## Use

{_how_to_load(plan)}
"""


def _task(task: KindSpec) -> str:
    if task.task == "classify":
        return f"{len(task.labels)} labels, {task.metric}"
    return f"task {task.task}, no head of its own; accuracy of the next token"


def _stages(plan: Plan) -> str:
    return "\n".join(
        f"- {stage.rounds} rounds of {stage.steps_per_round} steps"
        + (f" on text of the sites' domains (`{stage.task}`)" if stage.task else "")
        for stage in plan.stages
    )


def _how_to_load(plan: Plan) -> str:
    """Where a kind learned words, as a language model."""
    loader = "AutoModelForCausalLM" if writes_words(plan) else "AutoModel"
    return f"""```python
from peft import PeftModel
from transformers import {loader}
model = PeftModel.from_pretrained({loader}.from_pretrained("<base model>"), "<this folder>")
```"""
