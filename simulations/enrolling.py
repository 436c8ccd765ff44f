"""Make a consortium on this machine, with what people at the real one would do by hand: init, request, admit, join.

    folder/coordinator   authority, certificate, roster, coordinator.toml
    folder/site-<n>      identity, join file, data of its own, site.toml, policy.toml

The policy of each site permits one plan and nothing beyond it, and asks no person: whoever runs this is all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedseek.identity.enrolment import parse_request
from fedseek.identity.secret_files import write_secret_file
from fedseek.plan import Plan
from fedseek.records import Records
from fedseek_server.config import CONFIG_FILE as COORDINATOR_FILE
from fedseek_server.consortium import create_consortium
from fedseek_site.admission import SiteData
from fedseek_site.config import CONFIG_FILE as SITE_FILE
from fedseek_site.config import POLICY_FILE
from fedseek_site.enrol import create_site, join, make_join_request

LOOPBACK: Final = "127.0.0.1"
TEXT, LABEL, UNIT, MESSAGES = "text", "label", "unit", "messages"


@dataclass(frozen=True, slots=True)
class Member:
    """A site to be.

    Attributes:
        name, kind: as on the roster.
        data: its records; written to files of its own.
        report: where it writes what happens there.
        release: where it puts what is released.
    """

    name: str
    kind: str
    data: SiteData = field(repr=False)
    report: Path
    release: Path


def make_consortium(folder: Path, plan: Plan, members: Sequence[Member], *, port: int) -> tuple[Path, dict[str, Path]]:
    """A consortium whose sites permit ``plan``.

    Args:
        folder: exists, is ours alone, and has a short path: sockets lie in it.
        plan: that every site's policy permits.
        members: in the order in which they are admitted.
        port: of loopback, where the coordinator will listen.

    Returns:
        The coordinator's folder, and each site's by its name.

    Raises:
        FedseekError: a name cannot be used, or the disk refuses.
    """
    home = folder / "coordinator"
    consortium = create_consortium(
        home, name=plan.spec.name, hosts=[LOOPBACK], address=f"{LOOPBACK}:{port}", now=time.time()
    )
    write_text(home / COORDINATOR_FILE, to_toml(coordinator_settings(port)))
    folders = {member.name: folder / f"site-{number}" for number, member in enumerate(members)}
    for member in members:
        create_site(folders[member.name], name=member.name, kind=member.kind)
        request = make_join_request(folders[member.name], now=time.time())  # goes by mail; people compare fingerprints
        consortium.admit(parse_request(request.to_bytes()), time.time())
    for joining in folders.values():  # once all are admitted, so that nobody has to be sent a newer roster
        join(joining, consortium.join_file().to_bytes(), now=time.time())
    for member in members:
        write_site_files(folders[member.name], plan, member)
    return home, folders


def write_site_files(folder: Path, plan: Plan, member: Member) -> None:
    """The data of one site, its settings, and a policy that permits ``plan``."""
    data = folder / "data"
    data.mkdir(mode=0o700, exist_ok=True)
    write_records(data / "train.jsonl", member.data.train)
    write_records(data / "held_back.jsonl", member.data.held_back)
    write_text(folder / SITE_FILE, to_toml(site_settings(member)))
    write_text(folder / POLICY_FILE, to_toml(policy_for(plan, member.kind)))


def coordinator_settings(port: int) -> dict[str, object]:
    """``coordinator.toml``."""
    return {"version": 1, "listen": {"host": LOOPBACK, "port": port}}


def site_settings(member: Member) -> dict[str, object]:
    """``site.toml``: a real one names files beside it, this one reports into a run's folder."""
    columns = _columns_of(member.data.train)
    return {
        "version": 1,
        "threads": 1,
        "data": {
            "name": f"records of {member.name}",
            "train": "data/train.jsonl",
            "held_back": "data/held_back.jsonl",
            **{column: column for column in columns},
        },
        "folders": {"report": str(member.report.resolve()), "release": str(member.release.resolve())},
    }


def policy_for(plan: Plan, kind: str) -> dict[str, object]:
    """``policy.toml``: every limit as the plan has it, so that one round more, or one site fewer, is refused."""
    spec, task = plan.spec, plan.spec.kinds[kind]
    privacy = spec.privacy
    costs: dict[str, object] = {"allow_without_privacy": True}
    if privacy.epsilon is not None and privacy.delta is not None:
        costs = {"max_epsilon": privacy.epsilon, "max_epsilon_total": privacy.epsilon, "max_delta": privacy.delta}
    return {
        "version": 1,
        "limits": {**costs, "max_rounds": plan.rounds, "max_steps": plan.total_steps},
        "required": {
            "min_sites": spec.cohort.min_sites,
            "min_contributors": spec.cohort.min_contributors,
            "min_colluders": spec.cohort.colluders,
            "max_key_days": spec.encryption.key_days,
        },
        "models": {"allowed": [spec.model.sha256]},
        "tasks": {
            "kinds": sorted(spec.kinds),
            "labels": list(task.labels),
            "units": [task.unit],
            "language": sorted({plan.task_in(kind, stage.first_round) for stage in plan.stages} - {"classify"}),
            "metrics": [task.metric, *(["answers"] if task.task == "instruct" else [])],
        },
        "approval": {"required": 0, "releases": 0},
    }


def write_records(path: Path, records: Records) -> None:
    """One site's records as JSON lines, in their order: what a real site has."""
    columns = _columns_of(records)
    rows = [dict[str, object]() for _ in range(len(records))]
    for column, values in ((TEXT, records.texts), (LABEL, records.labels), (UNIT, records.units)):
        if column in columns:
            for row, value in zip(rows, values, strict=True):
                row[column] = value or None
    if MESSAGES in columns:
        for row, dialogue in zip(rows, records.dialogues, strict=True):
            row[MESSAGES] = [{"role": turn.role, "content": turn.text} for turn in dialogue] or None
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _columns_of(records: Records) -> list[str]:
    """What these records have."""
    there = {
        TEXT: any(records.texts),
        LABEL: any(records.labels),
        UNIT: records.unit_column is not None,
        MESSAGES: bool(records.dialogues),
    }
    return [column for column, has in there.items() if has]


def write_text(path: Path, text: str) -> None:
    """A file that this account alone may read, written whole or not at all."""
    write_secret_file(path, text.encode())


def to_toml(document: Mapping[str, object], prefix: str = "") -> str:
    r"""TOML of plain values and tables under bare keys: JSON writes plain values as TOML does.

    >>> to_toml({"version": 1, "data": {"name": "客户"}})
    'version = 1\n[data]\nname = "客户"\n'
    """
    tables = {key: value for key, value in document.items() if isinstance(value, Mapping)}
    plain = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in document.items() if key not in tables
    ]
    return "".join(plain) + "".join(
        f"[{prefix}{key}]\n{to_toml(table, f'{prefix}{key}.')}" for key, table in tables.items()
    )
