"""The release: adapter folder, model card, and each site's statement of what it cost in privacy.

The statement uses the vocabulary of NIST SP 800-226 (unit, neighbouring relation, epsilon, delta, trust model, what is
not covered). It fails closed: where a guard did not report, or the plan promises nothing, no epsilon is stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.guards import TRAINING_GUARDS
from fedseek.errors import ReleaseRefused
from fedseek.plan import Plan

STATEMENT_VERSION: Final = 1
NOT_COVERED: Final = (
    "what the adapter says about groups of people: it is meant to learn that, with or without any one of them",
    "people who appear at more than one site, or under several identifiers at one site: what they spend adds up",
    "more than one record of a person where the unit is the record",
    "other runs on the same data: their costs add up and are not counted in this statement",
    "that a site took part, and how many records it holds",
    "records held back for evaluation: their summed metrics are seen by the sites, without noise",
    "choices made by looking at the records before training: labels, prompts, settings",
    "the base model, which was trained elsewhere",
    "noised updates where too few sites hide each other: in a sum of two sites each can subtract its own, and a round hides "
    "less than planned if more sites work with the coordinator than the plan says",
)


class PrivacyStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one site says about its part of a run. ``epsilon`` is None when none was earned.

    ``adapter_sha256`` is of the file ``adapter_model.safetensors`` and ``tensors`` holds the hex digest of each scope's
    values, so that the signed statement says which release it speaks of.
    """

    version: int = STATEMENT_VERSION
    run: str
    plan_digest: str
    site: str
    kind: str
    adapter_sha256: str
    tensors: dict[str, str]
    mechanism: str
    unit: str
    neighboring_relation: str
    epsilon: float | None
    epsilon_second_opinion: float | None
    delta: float | None
    accountant: str
    noise_multiplier: float | None
    sampling_probability: float
    num_steps: int
    l2_clip_norm: float | None
    guards_passed: tuple[str, ...]
    trust_model: str
    not_covered: tuple[str, ...] = NOT_COVERED


def privacy_statement(
    plan: Plan,
    *,
    run: str,
    site: str,
    kind: str,
    spend: PrivacySpend | None,
    guards_passed: Sequence[str],
    steps: int,
    adapter_sha256: str,
    digests: Mapping[str, bytes],
) -> PrivacyStatement:
    """State what ``steps`` steps of training cost one site.

    Raises:
        ReleaseRefused: the plan promises privacy, but no guard reported or steps and spend disagree.
    """
    missing = sorted(set(TRAINING_GUARDS) - set(guards_passed)) if plan.privacy else []
    accounted = (spend.params, spend.num_steps) if spend else None
    if missing or accounted != ((plan.privacy, steps) if plan.privacy else None):
        raise ReleaseRefused(
            f"site {site!r}: {steps} steps trained, {spend.num_steps if spend else 0} accounted, guards not passed: "
            f"{', '.join(missing) or 'none'}; wanted every step accounted as the plan says and every guard passed",
            hint="no epsilon is stated that was not earned; run again",
        )
    privacy = plan.privacy
    return PrivacyStatement(
        run=run,
        plan_digest=plan.digest,
        site=site,
        kind=kind,
        adapter_sha256=adapter_sha256,
        tensors={scope: digest.hex() for scope, digest in sorted(digests.items())},
        mechanism=plan.spec.privacy.mechanism,
        unit=plan.spec.kinds[kind].unit,
        neighboring_relation="add or remove one unit",
        epsilon=spend.epsilon() if spend else None,
        epsilon_second_opinion=spend.epsilon_rdp() if spend else None,
        delta=privacy.delta if privacy else None,
        accountant="privacy loss distribution (dp_accounting); second opinion: Renyi" if spend else "none",
        noise_multiplier=privacy.noise_multiplier if privacy else None,
        sampling_probability=plan.spec.training.sampling_probability,
        num_steps=steps,
        l2_clip_norm=privacy.l2_clip_norm if privacy else None,
        guards_passed=tuple(guards_passed),
        trust_model="noise added at the site before anything leaves it; holds against everyone else",
    )


def statement_bytes(statement: PrivacyStatement) -> bytes:
    """The JSON a site signs and publishes."""
    return msgspec.json.format(msgspec.json.encode(statement), indent=2) + b"\n"


def describe_statement(statement: PrivacyStatement) -> str:
    """The statement in words, as Markdown."""
    if statement.epsilon is None or statement.delta is None:
        guarantee = "**No privacy guarantee.** The plan asked for none; treat the adapter like the training data."
    else:
        guarantee = (
            f"**({statement.epsilon:.2f}, {statement.delta:g})-differential privacy** for one {statement.unit} "
            f"({statement.neighboring_relation}), by {statement.mechanism} over {statement.num_steps} steps, "
            f"noise multiplier {statement.noise_multiplier:.3f}, clip norm {statement.l2_clip_norm:g}, "
            f"sampling probability {statement.sampling_probability:g}."
        )
    lines = [f"### {statement.site} ({statement.kind})", "", guarantee, ""]
    if statement.guards_passed:
        lines += [f"Checked while it ran: {', '.join(statement.guards_passed)}.", ""]
    return "\n".join(lines)


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
    covered = "\n".join(f"- {line}" for line in NOT_COVERED)
    private = bool(statements) and all(statement.epsilon is not None for statement in statements)
    tags = ["lora", "federated-learning", *(["differential-privacy"] if private else [])]
    told = "\n".join(describe_statement(statement) for statement in statements)
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
Not covered:

{covered}

## Use

```python
from peft import PeftModel
from transformers import AutoModel
model = PeftModel.from_pretrained(AutoModel.from_pretrained("<base model>"), "<this folder>")
```
"""
