"""A consortium of real daemons for benchmarks: its plan, its sites that rest, and what its processes cost."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from fedseek.daemon.reports import Event, read_events
from fedseek.lora.source import model_digest
from fedseek.plan import Plan, check_plan, parse_spec
from fedseek.records import Columns, to_records
from fedseek_server.orders import OPEN_STATES, submit
from fedseek_site.admission import SiteData
from simulations.daemons import Daemon, children_of, coordinator_daemon, end_all, free_port, peak_rss_mb_of
from simulations.enrolling import Member, make_consortium

KIND, LABELS = "bank", ("yes", "no")
HIDDEN, LAYERS = 16, 2  # of the base model: nothing is computed with it, so it is as small as can be
RESTING = Path(__file__).with_name("resting_sites.py")
RUN_SECONDS = 1800.0  # that a run may take


@dataclass(frozen=True, slots=True)
class Deployment:
    """Daemons that run.

    Attributes:
        folder: of everything.
        home: the coordinator's.
        plan: that every site permits.
        coordinator: its daemon.
        sites: processes with one site each, or one with all of them.
    """

    folder: Path
    home: Path
    plan: Plan = field(repr=False)
    coordinator: Daemon
    sites: tuple[Daemon, ...]

    def roles(self) -> dict[int, str]:
        """What each process is, by its number."""
        found = {self.coordinator.pid: "coordinator"}
        found |= {child.pid: "superlink" for child in children_of(self.coordinator)}
        for daemon in self.sites:
            found[daemon.pid] = "site"
            found |= {child.pid: "courier" for child in children_of(daemon)}
        return found

    def check_alive(self) -> None:
        for daemon in (self.coordinator, *self.sites):
            if not daemon.is_running:
                raise daemon.failure()


@contextmanager
def deployed(
    *, sites: int, values: int, rounds: int, max_sites: int, processes: int, bits: int = 13
) -> Iterator[Deployment]:
    """Sites whose update has about ``values`` values, in so many processes, enrolled and started; all ended after."""
    folder = Path(tempfile.mkdtemp(prefix="bd-"))
    started: list[Daemon] = []
    try:
        plan = check_plan(
            parse_spec(plan_document(write_model(folder / "model", values), values, rounds, max_sites, bits))
        )
        members = [_member(folder, number) for number in range(sites)]
        home, folders = make_consortium(folder, plan, members, port=free_port())
        shares = [list(folders.values())[start::processes] for start in range(processes)]
        started += [coordinator_daemon(home, folder / "coordinator.log")]
        for number, share in enumerate(shares):
            command = (sys.executable, str(RESTING), *map(str, share))
            started.append(Daemon(f"sites {number}", command, folder / f"sites-{number}.log"))
        for daemon in started:
            daemon.start()
        yield Deployment(folder, home, plan, started[0], tuple(started[1:]))
    finally:
        end_all(started)
        shutil.rmtree(folder, ignore_errors=True)


def play(deployment: Deployment, *, on_phase: Callable[[str, int], None] = lambda phase, number: None) -> list[Event]:
    """Play the plan to its release; returns the coordinator's report. ``on_phase`` is told when an exchange begins."""
    run = submit(deployment.home, deployment.plan, wait_seconds=RUN_SECONDS)
    limit, here = time.monotonic() + RUN_SECONDS, ("", 0)
    while (status := run.status()).state in OPEN_STATES:
        deployment.check_alive()
        if (status.phase, status.round) != here:
            here = (status.phase, status.round)
            on_phase(*here)
        if time.monotonic() > limit:
            raise TimeoutError(f"the run did not end: {status}")
        time.sleep(0.1)
    if status.state != "released":
        logs = "\n".join(daemon.tail() for daemon in (deployment.coordinator, *deployment.sites))
        raise RuntimeError(f"the run {status.state}: {status.text}\n{logs}")
    return list(read_events(run.report))


def round_seconds(events: list[Event]) -> list[float]:
    """From each round's requests to those of the next: everything that a round is, its apply included.

    The first is left out: sites load the model and make the group key beside it.
    """
    opened = [event["t"] for event in events if event["event"] == "phase" and event["phase"] in ("round", "close")]
    return [round(later - earlier, 3) for earlier, later in pairwise(opened[1:])]


def phase_seconds(events: list[Event]) -> dict[str, list[float]]:
    """How long each exchange took, by phase."""
    phases = [event for event in events if event["event"] in ("phase", "finished")]
    found: dict[str, list[float]] = {}
    for phase, following in pairwise(phases):
        found.setdefault(phase["phase"], []).append(round(following["t"] - phase["t"], 3))
    return found


def cpu_seconds(deployment: Deployment) -> dict[int, float]:
    """CPU seconds so far of each process."""
    found = {}
    for pid in deployment.roles():
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[pid] = times.user + times.system
    return found


def memory_mb(deployment: Deployment) -> dict[int, float]:
    """What each process holds that no other does, in MB (10^6 bytes): pages of libraries that they share count once."""
    found = {}
    for pid in deployment.roles():
        try:
            found[pid] = psutil.Process(pid).memory_full_info().uss / 1e6
        except psutil.NoSuchProcess:
            continue
    return found


def peaks_mb(deployment: Deployment) -> dict[str, float]:
    """Largest resident set so far of any process of each role, in MB."""
    found: dict[str, float] = {}
    for pid, role in deployment.roles().items():
        found[role] = max(found.get(role, 0.0), round(peak_rss_mb_of(pid), 1))
    return found


def by_role(figures: Mapping[int, float], roles: Mapping[int, str]) -> dict[str, list[float]]:
    """The same figures, largest first, of each role."""
    found: dict[str, list[float]] = {}
    for pid, figure in figures.items():
        found.setdefault(roles[pid], []).append(figure)
    return {role: sorted(each, reverse=True) for role, each in found.items()}


def plan_document(model: Path, values: int, rounds: int, max_sites: int, bits: int) -> dict[str, Any]:
    """A plan whose adapter has about ``values`` values: wide layers under a tiny encoder."""
    return {
        "name": "deployment",
        "model": {"source": f"path:{model}", "sha256": model_digest(model), "max_tokens": 8},
        "kinds": {KIND: {"labels": list(LABELS)}},
        "lora": {"rank": rank_for(values), "alpha": 4.0, "target_modules": ["intermediate.dense"]},
        "training": {
            "rounds": rounds,
            "steps_per_round": 1,
            "sampling_probability": 0.5,
            "learning_rate": 0.01,
            "head_learning_rate": 0.01,
        },
        "privacy": {"mechanism": "none"},
        "encryption": {"value_bits": bits},
        "cohort": {"max_sites": max_sites, "deadline_seconds": 900},
    }


def rank_for(values: int) -> int:
    """Of the adapter: large where there are many values, so that the base model stays small."""
    return max(2, min(512, values // (1 << 15)))


def width_for(values: int) -> int:
    """Of the layers that are adapted: lora_B of each is (width, rank)."""
    return max(HIDDEN, round(values / (LAYERS * rank_for(values))))


def write_model(folder: Path, values: int) -> Path:
    """The base model, with a tokenizer, in the files that a real one comes in."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=width_for(values),
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def _member(folder: Path, number: int) -> Member:
    rows = [{"text": "a b", "label": label} for label in LABELS * 4]
    records = to_records(rows, Columns("text", "label", None), labels=list(LABELS), source="made up")
    data = SiteData(train=records, held_back=records)
    place = folder / "results" / str(number)
    return Member(f"支行-{number:02}", KIND, data, place / "report.jsonl", place / "release")
