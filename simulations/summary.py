"""The record of a simulated run: ``summary.json``, versioned and strictly parsed.

``docs/summary-schema.md`` documents every field with its unit. The file holds figures only: no record, no update, no
key. ``simulations.verdicts`` turns the figures into a short list of claims that the run met or did not meet.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedseek.errors import DataError

SCHEMA_VERSION: Literal[1] = 1


def _in_utc(value: AwareDatetime) -> AwareDatetime:
    if value.utcoffset() != timedelta(0):
        raise ValueError(f"time zone offset is {value.utcoffset()}, wanted UTC")
    return value


UtcTime = Annotated[AwareDatetime, AfterValidator(_in_utc)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Epsilon = Annotated[float, Field(ge=0)]


class Part(BaseModel):
    """What all parts of a summary share: unchangeable, no unknown fields, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelFacts(Part):
    """The base model, by name and by the SHA-256 of its weights."""

    name: Name
    sha256: Sha256


class SiteFacts(Part):
    """An institution and how much data it brought."""

    name: Name
    kind: Name
    display_name: Name
    records: Count
    held_back_records: Count
    units: Count
    task: Name = "classify"


class StageFacts(Part):
    """Rounds that were trained alike; ``task`` is null where each kind trained on its own."""

    task: Name | None
    first_round: Count
    rounds: Count
    steps_per_round: Count


class Encryption(Part):
    """The parameters of the encrypted sum."""

    value_bits: Count
    max_sites: Count
    digits_per_slot: Count
    poly_modulus_degree: Count
    noise_budget_bits_left: Count
    ciphertexts: dict[Name, Count]


class StagePrivacy(Part):
    """How records were protected in one stage of training."""

    rounds: Count
    steps_per_round: Count
    sampling_probability: Fraction
    noise_multiplier: Annotated[float, Field(ge=0)]


class Privacy(Part):
    """How records were protected during training; of a plan of several stages noise, sampling and steps of the last."""

    mechanism: Name
    unit: Name
    epsilon_target: Epsilon
    delta: Annotated[float, Field(gt=0, lt=1)]
    noise_multiplier: Annotated[float, Field(ge=0)]
    sampling_probability: Fraction
    steps_per_round: Count
    l2_clip_norm: Annotated[float, Field(gt=0)]
    earlier_stages: tuple[StagePrivacy, ...] = ()


class SitePhases(Part):
    """Seconds a site spent in each step of a round."""

    train: Seconds
    encode: Seconds
    tag: Seconds
    mask: Seconds
    encrypt: Seconds
    shares: Seconds
    decrypt: Seconds
    apply: Seconds
    evaluate: Seconds


class PhaseTotals(SitePhases):
    """Seconds in each step, added over all sites and rounds; ``aggregate`` and ``unmask`` are the coordinator's."""

    aggregate: Seconds
    unmask: Seconds


class SiteRound(Part):
    """One site in one round."""

    site: Name
    utility: float | None
    metric: Name
    task: Name = "classify"
    loss: float | None
    perplexity: Annotated[float, Field(ge=0)] | None = None
    epsilon: Epsilon | None
    bytes_up: Count
    bytes_down: Count
    saturated_fraction: Fraction | None
    seconds: SitePhases


class CoordinatorRound(Part):
    """The coordinator in one round."""

    aggregate_s: Seconds
    unmask_s: Seconds
    survivors: Count
    bytes_in: Count
    bytes_out: Count


class Round(Part):
    """One round; round 0 is the state before training."""

    round: Count
    seconds: Seconds
    sites: tuple[SiteRound, ...]
    coordinator: CoordinatorRound | None
    federated_utility: dict[Name, float]


class Baselines(Part):
    """What the same held-back records give without the federation; each is null if it was not run."""

    local_only: dict[Name, tuple[float, ...]] | None = None
    centralised: dict[Name, tuple[float, ...]] | None = None
    linear_probe: dict[Name, float] | None = None
    dp_linear_probe: dict[Name, float] | None = None
    local_only_loss: dict[Name, tuple[float, ...]] | None = None
    centralised_loss: dict[Name, tuple[float, ...]] | None = None
    base_loss: dict[Name, float] | None = None


class AnswerScores(Part):
    """Means over the answers to some held-back rows."""

    exact: Fraction
    f1: Fraction
    rouge_l: Fraction
    count: Count


class SiteAnswers(Part):
    """How good the answers of a site's base model were, and those of its adapter at the end."""

    site: Name
    base: AnswerScores | None
    adapter: AnswerScores | None


class Totals(Part):
    """The whole run: wall-clock time, bytes on the wire, seconds by step."""

    seconds: Seconds
    bytes_up: Count
    bytes_down: Count
    plain_float32_bytes: Count
    phase_seconds: PhaseTotals


class PeakMemory(Part):
    """Largest resident set, in MB (10^6 bytes)."""

    coordinator: Annotated[float, Field(ge=0)]
    site_max: Annotated[float, Field(ge=0)]


class ReleaseFacts(Part):
    """The adapter that came out, and the run-time guards that passed at each site."""

    adapter_sha256: Sha256
    path: Name
    trainable_values: Count
    guards_passed: dict[Name, tuple[Name, ...]]


class Verdict(Part):
    """A claim about the run, the figure it rests on, what was wanted, and whether it was met."""

    claim: Name
    figure: float
    wanted: Name
    met: bool


class Summary(Part):
    """A whole run. Cross-checks: rounds count up from 0, and only sites of the run are spoken of."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run: Name
    started_at: UtcTime
    finished_at: UtcTime
    plan_digest: Name
    model: ModelFacts
    scenario: Name
    versions: dict[Name, Name]
    sites: Annotated[tuple[SiteFacts, ...], Field(min_length=1)]
    encryption: Encryption
    privacy: Privacy | None
    rounds: Annotated[tuple[Round, ...], Field(min_length=1)]
    stages: tuple[StageFacts, ...] = ()
    baselines: Baselines
    answers: tuple[SiteAnswers, ...] = ()
    totals: Totals
    peak_rss_mb: PeakMemory
    release: ReleaseFacts | None
    verdicts: tuple[Verdict, ...] = ()

    @model_validator(mode="after")
    def _check_rounds(self) -> Self:
        numbers = [entry.round for entry in self.rounds]
        if numbers != list(range(len(numbers))):
            raise ValueError(f"rounds are numbered {numbers}, wanted 0, 1, 2, ...")
        if self.finished_at < self.started_at:
            raise ValueError(f"finished_at {self.finished_at} is before started_at {self.started_at}")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError(f"a site is listed twice: {names}")
        unknown = sorted(set(_sites_spoken_of(self)) - set(names))
        if unknown:
            raise ValueError(f"figures for {unknown}, but the sites of the run are {names}")
        return self

    @property
    def final(self) -> Round:
        """The last round."""
        return self.rounds[-1]


def _sites_spoken_of(summary: Summary) -> Iterable[str]:
    for entry in summary.rounds:
        yield from (site.site for site in entry.sites)
    lines = summary.baselines
    for _, baseline in lines:
        yield from baseline or ()
    yield from (entry.site for entry in summary.answers)
    if summary.release is not None:
        yield from summary.release.guards_passed


def load_summary(path: Path) -> Summary:
    """Read a ``summary.json``.

    Raises:
        DataError: the file is missing or not a summary of version :data:`SCHEMA_VERSION`; names every wrong field.
    """
    try:
        return Summary.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", hint="is this the folder of a run?") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()]
        wanted = f"wanted a run summary of schema version {SCHEMA_VERSION}"
        raise DataError(f"{path}: {'; '.join(lines)}; {wanted}", hint="see docs/summary-schema.md") from error


def save_summary(summary: Summary, path: Path) -> None:
    """Write a summary as UTF-8 JSON, whole or not at all."""
    write_whole(path, summary.model_dump_json(indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, finds the old file or the new one, never half of one.

    Raises:
        OSError: the file could not be written; the old one, if any, is as it was.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # to be read by others; mkstemp makes it the owner's alone
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
