"""A site with a policy and people who have keys: shared by the tests of permission, local API and commands."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.vault import StorageKey
from fedseek.plan import Plan, check_plan, parse_spec
from fedseek.records import Records
from fedseek_site.approvals import Approvals
from fedseek_site.ledger import Ledger
from fedseek_site.people import PlanApproval, ReleaseApproval, sign_approval, sign_release_approval
from fedseek_site.permission import Permission
from fedseek_site.release_approvals import ReleaseApprovals

SITE = "北岸银行"
ZHANG, ANNA = "张伟", "Anna Lindqvist"
KEYS = {name: Ed25519PrivateKey.generate() for name in (ZHANG, ANNA)}
STORAGE_KEY = StorageKey.generate()
RECORDS = Records(("转账", "余额"), ("欺诈", "正常"), ("客1", "客2"), "customer")
NOON = 1_800_014_400.0  # a Friday in UTC
ROSTER = Roster.of(SiteIdentity.generate(name, "bank").public() for name in (SITE, "harbour-bank", "第三银行"))
OTHER_ROSTER = Roster.of(SiteIdentity.generate(name, "bank").public() for name in (SITE, "harbour-bank", "第三银行"))
DOCUMENT: dict[str, Any] = {
    "name": "fraud",
    "model": {"source": "package:some-model", "sha256": "ab" * 32},
    "kinds": {"bank": {"labels": ["欺诈", "正常"], "unit": "customer"}},
    "lora": {"target_modules": ["query"]},
    "training": {
        "rounds": 2,
        "steps_per_round": 4,
        "sampling_probability": 0.25,
        "learning_rate": 0.002,
        "head_learning_rate": 0.01,
    },
    "privacy": {"mechanism": "dp-sgd", "epsilon": 2.0, "delta": 1e-5},
    "cohort": {"max_sites": 8},
}
PLAN = check_plan(parse_spec(DOCUMENT))
TABLES: dict[str, Any] = {
    "models": {"allowed": ["any"]},
    "tasks": {"kinds": ["bank"], "labels": ["any"], "units": ["customer"], "metrics": ["accuracy"]},
    "approval": {"required": 0, "releases": 0},
}


def make_plan(seed: int) -> Plan:
    return check_plan(parse_spec({**DOCUMENT, "seed": seed}))


def sign(person: str, plan: Plan = PLAN, *, roster: Roster = ROSTER, at: float = NOON) -> PlanApproval:
    return sign_approval(KEYS[person], plan.digest, roster.digest().hex(), site=SITE, person=person, at=int(at))


def sign_release(
    person: str, release: str, *, at: float = NOON, key: Ed25519PrivateKey | None = None
) -> ReleaseApproval:
    return sign_release_approval(key or KEYS[person], release, site=SITE, person=person, at=int(at))


@dataclass
class House:
    """The site: its policy file, its permission, what it recorded and what time it is."""

    folder: Path
    now: float = NOON
    recorded: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.chmod(0o700)
        self.write_policy()
        self.approvals = Approvals(self.folder / "approvals.sqlite3")
        self.release_approvals = ReleaseApprovals(self.folder / "releases.sqlite3")
        self.ledger = Ledger(self.folder / "ledger.sqlite3", STORAGE_KEY, dataset="账户", clock=lambda: self.now)
        self.ledger.take_data(RECORDS)
        self.permission = Permission(
            site=SITE,
            policy_path=self.folder / "policy.toml",
            approvals=self.approvals,
            release_approvals=self.release_approvals,
            ledger=self.ledger,
            dataset="账户",
            record=self.record,
            clock=lambda: self.now,
        )

    def record(self, kind: str, /, **facts: Any) -> None:
        json.dumps(facts, allow_nan=False)
        self.recorded.append((kind, facts))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.recorded]

    def write_policy(self, **tables: dict[str, Any]) -> None:
        """Write the policy with keys of its tables changed; officers are in it."""
        document = {name: {**TABLES.get(name, {}), **tables.get(name, {})} for name in {**TABLES, **tables}}
        lines = ["version = 1"]
        for name, entries in document.items():
            lines.append(f"[{name}]")
            lines += [f"{key} = {as_toml(value)}" for key, value in entries.items()]
        for name, key in KEYS.items():
            lines += [f'[approval.people."{name}"]', 'role = "privacy officer"']
            lines += [f'key = "{key.public_key().public_bytes_raw().hex()}"']
        self.write("\n".join(lines))

    def write(self, text: str) -> None:
        path = self.folder / "policy.toml"
        path.write_text(text, "utf-8")
        path.chmod(0o600)


def as_toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(as_toml(each) for each in value)}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {as_toml(each)}' for key, each in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)
