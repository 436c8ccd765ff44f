"""A plan as its author writes it: every field with its type, range and default. What belongs together is checked in ``plan``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Task = Literal["classify", "instruct", "continue"]


class _Section(BaseModel):
    """One table of the plan: unknown keys, wrong types and non-finite numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSpec(_Section):
    """The frozen base model every site must hold."""

    source: Annotated[str, StringConstraints(pattern=r"^(package|path|hub):.+$")]
    """``package:<distribution>`` (weights carried by an installed package), ``path:<folder>``, or
    ``hub:<owner>/<name>@<commit>`` (fetched beforehand with ``fedseek model fetch``)."""
    sha256: Digest
    """SHA-256 of the weights; a site that holds others refuses the plan."""
    files_sha256: Digest | None = None
    """SHA-256 over config.json and the tokenizer's files; where it is given, a site that holds others refuses the plan.
    ``fedseek model show`` tells both."""
    family: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,40}$")] | None = None
    """``model_type`` of the model's config.json, such as "qwen2"; needed by ``lora.target_modules = "auto"``."""
    max_tokens: Annotated[int, Field(ge=4, le=8192)] = 64
    """Longer texts are cut; tokens."""


class GenerationSpec(_Section):
    """Answers written out on a sample of held-back rows, before the first round and after the last."""

    rows: Annotated[int, Field(ge=0, le=1_000)] = 16
    """A site's rows that are answered; 0 for none."""
    max_new_tokens: Annotated[int, Field(ge=1, le=1024)] = 48


class KindSpec(_Section):
    """What the sites of one kind (banks, hospitals) learn on the shared adapter.

    ``classify`` has labels, and a head of the kind's own. ``instruct`` (answers to instructions) and ``continue`` (the
    next token of a text) have neither: the base model's own head of words is used, and stays as it is.
    """

    task: Task = "classify"
    labels: Annotated[tuple[Label, ...], Field(max_length=10_000, validate_default=True)] = ()
    metric: Literal["accuracy", "auc"] = "accuracy"
    """Utility on held-back rows: of labels, or of the next token; ``auc`` wants exactly two labels, the second positive."""
    unit: Literal["record", "customer", "patient"] = "record"
    """What the guarantee protects: one record, or all records of a customer or patient (a column names them)."""
    min_utility: Annotated[float, Field(ge=0, le=1)] | None = None
    """An adapter below this, over the held-back rows of all sites of the kind, is not released."""
    generation: GenerationSpec = GenerationSpec()
    """For ``instruct``."""

    @field_validator("labels")
    @classmethod
    def _fit_the_task(cls, labels: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.data.get("task") == "classify" and len(labels) < 2:
            raise ValueError(f"task classify wants at least 2 labels, got {len(labels)}")
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"labels must be unique, repeated: {', '.join(repeated)}")
        return labels


class LoraSpec(_Section):
    """The adapter. ``ffa`` freezes lora_A at a value derived from the plan: averaging lora_B is then exact.

    ``alternating`` trains lora_B in odd rounds and lora_A in even ones, so that each average is exact as well. ``prefix``
    and ``prompt`` train vectors in front of the keys or the text instead of LoRA matrices; ``full`` all of a small model.
    """

    method: Literal["ffa", "both", "alternating", "dora", "prefix", "prompt", "full"] = "ffa"
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)."""
    target_modules: (
        Literal["auto"] | Annotated[tuple[Annotated[str, StringConstraints(min_length=1)], ...], Field(min_length=1)]
    ) = "auto"
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Encoder layers to adapt; all when absent. Top layers only is faster: nothing below them is differentiated."""
    virtual_tokens: Annotated[int, Field(ge=1, le=512)] = 20
    """For ``prefix`` and ``prompt``."""


class DomainSpec(_Section):
    """A first stage: every site goes on with the next token of its own texts, before the kinds' own tasks begin."""

    rounds: Annotated[int, Field(ge=1, le=10_000)]
    steps_per_round: Annotated[int, Field(ge=1, le=100_000)]
    sampling_probability: Annotated[float, Field(ge=0.001, le=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    budget_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """How much of epsilon this stage would take by itself, relative to the other."""


class EarlyStoppingSpec(_Section):
    """When more than half of the sites in a sum say that their held-back rows got no better, training ends."""

    patience: Annotated[int, Field(ge=1, le=1_000)]
    """A site votes to stop when its loss is above its best for so many rounds in a row, within the stage it is in."""


class TrainingSpec(_Section):
    """Local training and the server step. The same sampling probability and steps at every site."""

    rounds: Annotated[int, Field(ge=1, le=10_000)]
    steps_per_round: Annotated[int, Field(ge=1, le=100_000)]
    sampling_probability: Annotated[float, Field(ge=0.001, le=1)]
    """Chance that a privacy unit is in a step's batch (Poisson). One epoch is 1 / sampling_probability steps."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Of the adapter."""
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of the heads; the adapter's when absent."""
    optimiser: Literal["adam", "sgd"] = "adam"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Over the stage's first steps the learning rates rise from near zero, in a line."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decoupled from the gradient with adam."""
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = None
    """A step's gradient is scaled down to this norm; only without privacy, which clips each unit's by itself."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    physical_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 64
    """Records on the device at once; cannot change the result. "auto": from each site's free memory."""
    early_stopping: EarlyStoppingSpec | None = None
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0


class SiteLevelSpec(_Section):
    """A second guarantee, for a whole site: its update is clipped, and all sites together add noise to the sum.

    The noise is made of shares, a discrete Gaussian at each site (Kairouz, Liu, Steinke 2021, arXiv:2102.06387), so it
    protects from whoever sees the sums, as long as no more sites collude than the plan says.
    """

    epsilon: Annotated[float, Field(gt=0, le=50)]
    """At the end of the run, for one site's whole part in it."""
    delta: Annotated[float, Field(gt=0, le=0.01)]
    l2_clip_norm: Annotated[float, Field(gt=0)]
    """A site's update of one round is scaled down to this norm; over all values that it sends."""


class PrivacySpec(_Section):
    """The guarantee. ``mechanism = "none"`` states no epsilon anywhere."""

    mechanism: Literal["dp-sgd", "none"]
    epsilon: Annotated[float, Field(gt=0, le=50)] | None = None
    """At the end of the run, for every site. Above 50 the figure promises nothing."""
    delta: Annotated[float, Field(gt=0, le=0.01)] | None = None
    """Must be below 1 / number of units of each site; each site checks that against its own data."""
    l2_clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """A unit's gradient is scaled down to this norm; dimensionless, over all trained values."""
    max_records_per_unit: Annotated[int, Field(ge=1)] | None = None
    """A customer or patient with more records is trained on so many of them; no limit when absent."""
    site: SiteLevelSpec | None = None
    """A guarantee for whole sites besides; none when absent."""


class AuditSpec(_Section):
    """Canaries: texts that mean nothing, trained on by the toss of a coin, by which each site tests its own guarantee."""

    canaries: Annotated[int, Field(ge=0, le=10_000)] | None = None
    """Candidates a site; each is in or out of its training by a coin. When absent, 64 with dp-sgd and none without."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the lower bound on epsilon."""


class ReleaseSpec(_Section):
    """What a release needs besides privacy."""

    min_approvals: Annotated[int, Field(ge=2)] | None = None
    """Sites that must sign, of those whose updates are in the adapter; all of them when absent."""
    wait_hours: Annotated[int, Field(ge=0, le=2_160)] = 168
    """How long the coordinator waits for sites whose people have not approved yet."""


class EncryptionSpec(_Section):
    """The outer lock."""

    value_bits: Annotated[int, Field(ge=2, le=24)] = 13
    """Bits of the stochastic quantiser."""
    key_days: Annotated[int, Field(ge=1, le=90)] = 90
    """Oldest group key a site encrypts under; days."""


class CohortSpec(_Section):
    """Who takes part, whom nobody has to trust, and how much each counts."""

    min_sites: Annotated[int, Field(ge=2)] = 3
    """Sites a run needs, and a round's sum: fewer, and the round is given up."""
    max_sites: Annotated[int, Field(ge=2, le=1024)]
    colluders: Annotated[int, Field(ge=0)] = 1
    """Sites that may tell the coordinator all they know, and still no update of an honest site is exposed."""
    min_contributors: Annotated[int, Field(ge=2)] = 3
    """Fewest sites in the sum of any scope; a kind with fewer keeps its head at home. Below colluders + 2, a colluder
    of the kind can subtract its own head and be left with another's."""
    dropout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Of more than 20 sites: how many may be missing from a round before it is given up. Fewer sites: see threshold."""
    weighting: Literal["equal", "records"] = "equal"
    record_cap: Annotated[int, Field(ge=1, le=100_000_000)] = 1
    """With ``records``: a site counts by its number of records (of customers or patients, where those are the unit), at
    most this many."""
    deadline_seconds: Annotated[int, Field(ge=10, le=604_800)] = 3600
    """How long an exchange waits for its slowest site; who has not answered by then is missing from it. At most a week."""


class PlanSpec(_Section):
    """The unchecked plan, as its author writes it."""

    version: Literal[1] = 1
    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds lora_A and the heads' first values. Public."""
    model: ModelSpec
    kinds: Annotated[dict[Name, KindSpec], Field(min_length=1)]
    lora: LoraSpec
    domain: DomainSpec | None = None
    training: TrainingSpec
    privacy: PrivacySpec
    audit: AuditSpec = AuditSpec()
    release: ReleaseSpec = ReleaseSpec()
    encryption: EncryptionSpec = EncryptionSpec()
    cohort: CohortSpec

    @field_validator("kinds")
    @classmethod
    def _in_order(cls, kinds: dict[str, KindSpec]) -> dict[str, KindSpec]:
        """By name, as in the canonical form: what is written from the one plan and from the other has to be the same."""
        return dict(sorted(kinds.items()))
