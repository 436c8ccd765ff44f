"""The release: the gate in front of it, which fails closed, and what a reader of the adapter is told.

    outcome of a run at a site --check_release--> checks, all of which hold --privacy_statement--> what the site signs

The same function that lets a site release is run once more by everybody who verifies: the checks of a statement are
those that the gate makes of it, or the statement is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from fedseek.dp.guards import NO_UNNOISED_METRICS, TRAINING_GUARDS
from fedseek.dp.site_guards import SITE_LEVEL_GUARDS
from fedseek.errors import ReleaseRefused
from fedseek.lora.adapter_file import adapter_config
from fedseek.plan import Plan
from fedseek.statement import Check, Outcome, PrivacyStatement, missing_guards, wanted_guards
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
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=lora.target_modules,
        layers=lora.layers,
        base_name=plan.spec.model.source,
    )


def _check_budget(plan: Plan, outcome: Outcome) -> _Checked:
    """Steps trained = accounted, all of them in the site's ledger, and no more than epsilon was computed for.

    The ledger may have more: it is entered before training, and a site that is killed in between has spent and sent nothing.
    A plan that promises nothing has no budget: a run that goes on from a lost one trains some of its rounds again.
    """
    spend, wanted = outcome.spend, f"<= {plan.total_steps}"
    if plan.privacy is None:
        return Check(name=BUDGET, wanted=NOT_ASKED, got=str(outcome.steps)), spend is None
    accounted = spend.num_steps if spend else 0
    same = spend is not None and spend.params == plan.privacy and outcome.steps == accounted
    holds = same and accounted <= outcome.steps_spent <= plan.total_steps
    told = f"{outcome.steps} trained, {accounted} accounted, {outcome.steps_spent} in the ledger"
    return Check(name=BUDGET, wanted=wanted, got=str(outcome.steps) if holds else told), holds


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
    """The epsilon that is about to be stated; NaN, which passes no check, for more steps than the plan has."""
    spend = outcome.spend
    return spend.epsilon() if spend and spend.num_steps <= plan.total_steps else math.nan


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
    heads = "\n".join(
        f"- `{kind}`: {len(task.labels)} labels, {task.metric} on held-back rows "
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
- {spec.training.rounds} rounds of {spec.training.steps_per_round} steps

## Heads

{heads}

## Privacy

{told}

What this means, how it was checked, and what it does not cover: [PRIVACY.md](PRIVACY.md), [PRIVACY.zh.md](PRIVACY.zh.md).

## Use

```python
from peft import PeftModel
from transformers import AutoModel
model = PeftModel.from_pretrained(AutoModel.from_pretrained("<base model>"), "<this folder>")
```
"""
