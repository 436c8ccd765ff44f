"""Targets of the two daemons: audit records, parcels, configuration, orders, states on the disk, questions of people."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from altering import Target
from enrolment_targets import authority, fixed_roster
from message_targets import RUN, SITES, dealt_round, fixed_site, plan_document, round_keys

from fedseek.cohort import round_graph
from fedseek.daemon.audit import AuditChain
from fedseek.daemon.audit_check import export_audit, heads_kept_by, verify_audit
from fedseek.daemon.audit_lines import (
    AuditLine,
    ExportHeader,
    canonical,
    line_digest,
    parse_anchor,
    parse_export_header,
    parse_line,
    sign_line,
    time_text,
)
from fedseek.daemon.parcels import (
    ParcelDown,
    ParcelUp,
    Verdict,
    decode_parcel_down,
    decode_parcel_up,
    encode_parcel,
)
from fedseek.deal import HeldShares, deal_shares
from fedseek.errors import Malformed
from fedseek.identity.signing import CONTEXT_AUDIT, sign_with
from fedseek.messages import Standing
from fedseek.plan import check_plan, parse_spec
from fedseek_server.admission import ScopeSize
from fedseek_server.config import EXAMPLE
from fedseek_server.config import load_config as load_coordinator
from fedseek_server.orders import RunFolder, Status, submit
from fedseek_server.snapshot import Snapshot
from fedseek_site.config import load_config as load_site
from fedseek_site.local_api import METHODS, VERSION, _Question, _read
from fedseek_site.people import PlanApproval
from fedseek_site.policy import load_policy
from fedseek_site.state import CanaryState, EarlierAdapter, RoundState, ScopeValues, SiteState

NAME, AT = "北岸银行", 1_795_373_365_123
DAY_MS = 86_400_000
POLICY: dict[str, Any] = {
    "version": 1,
    "limits": {"max_epsilon": 2.0, "max_delta": 1e-5, "max_rounds": 10},
    "required": {"locks": ["encryption", "masks"], "min_sites": 3},
    "models": {"allowed": ["ab" * 32]},
    "tasks": {"kinds": ["bank"], "labels": ["any"], "units": ["customer"], "metrics": ["auc"]},
    "hours": {"timezone": "Asia/Shanghai", "windows": [{"days": ["Mon"], "from": "20:00", "to": "06:00"}]},
    "approval": {"required": 1, "people": {"张伟": {"role": "privacy officer", "key": "cd" * 32}}},
}
SITE: dict[str, Any] = {
    "version": 1,
    "threads": 8,
    "data": {"name": "账户", "train": "a.jsonl", "held_back": "b.csv", "unit": "客户"},
    "sockets": {"operator_group": "fl"},
    "courier": {"separate": True},
}
COORDINATOR: dict[str, Any] = {
    "version": 1,
    "listen": {"host": "0.0.0.0", "port": 9443},  # noqa: S104
    "audit": {"retention_days": 400},
    "limits": {"largest_update_mb": 64},
    "greet_hours": 24.0,
}


def daemon_targets() -> dict[str, Target]:
    """What the daemons read: of each other, of their disks, of their people."""
    memory = Path("/dev/shm")  # noqa: S108
    keep = tempfile.TemporaryDirectory(prefix="fedseek-fuzz-", dir=memory if memory.is_dir() else None)
    folder = Path(keep.name)

    def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        path = folder / name

        def reading(data: bytes) -> object:
            assert keep.name  # the folder goes when the last target that needs it does
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.touch(mode=0o600)
            path.write_bytes(data)
            return read(path)

        return reading

    return {
        **audit_targets(folder, in_file),
        **parcel_targets(),
        **settings_targets(in_file),
        **order_targets(folder, in_file),
        "local_question": Target(any_question, questions()),
        "coordinator_snapshot": Target(Snapshot.from_bytes, [snapshot().to_bytes()]),
        "site_state": Target(SiteState.from_bytes, [state().to_bytes()]),
    }


# Audit records


def audit_targets(folder: Path, in_file: Callable[..., Any]) -> dict[str, Target]:
    """Lines and files as they come, and whole records that their owner wrote badly and signed well."""
    key, other = authority(), fixed_site("仁济医院", "hospital")
    public = key.public_key().public_bytes_raw()
    keys = {"仁济医院": other.public().signing_key}
    clock = [AT / 1000 - 500 * 86_400]
    chain = AuditChain(
        folder / "audit", name=NAME, sign=partial(sign_with, key), public_key=public, clock=lambda: clock[0]
    )
    chain.record("plan-refused", rule="limits.max_epsilon", run=RUN)
    clock[0] = AT / 1000
    chain.record("sent", bytes=17, list=[1.5, True, {"a": "b"}])
    chain.prune()
    chain.note_heads([chain.head()], keys)
    chain.record("sent", bytes=18)
    chain.close()
    export_audit(folder / "audit", folder / "export")
    exported = (folder / "export").read_bytes()
    (folder / "export").unlink()
    header, *lines = exported.splitlines()
    anchor = (folder / "audit" / "anchor.json").read_bytes().rstrip(b"\n")

    def verify(path: Path) -> object:
        heads_kept_by(path, NAME)
        return verify_audit(path, public_key=public, name=NAME, others=keys)

    entries = [{"kind": line.kind, "detail": line.detail} for line in map(parse_line, lines)]
    begun = {"kind": "begun", "detail": {"version": 1, "name": NAME, "public_key": public.hex()}}
    announced = {"kind": "key-announced", "detail": {"public_key": "ab" * 32}}
    own = [begun, *entries[:1], announced, *entries[-1:]]
    read_file = in_file("export", verify)
    return {
        "audit_line": Target(parse_line, lines, document=True),
        "audit_anchor": Target(parse_anchor, [anchor]),
        "audit_header": Target(parse_export_header, [header]),
        "audit_file": Target(read_file, [exported]),
        "audit_file_signed": Target(
            lambda data: read_file(record_of(data, partial(sign_with, key, CONTEXT_AUDIT), public)),
            [json.dumps(own, ensure_ascii=False).encode()],
            document=True,
        ),
    }


def record_of(data: bytes, sign: Callable[[bytes], bytes], public: bytes) -> bytes:
    """An exported record with these entries, each line signed as it should be."""
    try:
        entries = json.loads(data)
        previous, lines = bytes(32), []
        for number, entry in enumerate(entries, start=1):
            line = AuditLine(
                number=number,
                at=time_text(AT + number * DAY_MS),
                kind=str(entry["kind"]),
                detail=entry["detail"],
                previous=previous.hex(),
                signature="",
            )
            lines.append(sign_line(sign, NAME, line))
            previous = line_digest(lines[-1])
        header = ExportHeader(
            fedseek_audit=1, name=NAME, public_key=public.hex(), lines=len(lines), last=previous.hex(), anchor=None
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:  # not even their owner can
        raise Malformed(f"no record can be written of this: {type(error).__name__}") from None
    return b"\n".join([canonical(header), *lines, b""])


# Parcels


def parcel_targets() -> dict[str, Target]:
    key = authority()
    with tempfile.TemporaryDirectory() as folder:
        public = key.public_key().public_bytes_raw()
        with AuditChain(Path(folder) / "a", name=NAME, sign=partial(sign_with, key), public_key=public) as chain:
            head = chain.head()
    down = ParcelDown(
        message=b"request",
        notice=b"{}",
        run=RUN,
        roster=fixed_roster(SITES[0]).to_bytes(),
        heads=(head,),
        seen=(head,),
        countersignatures={NAME: bytes(64)},
    )
    standing = Standing(
        site=NAME,
        runs=(RUN,),
        plan_digest="0" * 64,
        roster_digest=bytes(32),
        adapters={1: {"global": bytes(32)}, 2: {"global": bytes(32)}},
        contributors={1: (NAME,), 2: (NAME,)},
    )
    up = ParcelUp(
        site=NAME,
        message=b"reply",
        roster_digest=bytes(32),
        verdict=Verdict(status="waiting", rule="两人批准"),
        standing=standing,
        head=head,
        countersignature=bytes(64),
        renewal=b"{}",
    )
    small = ParcelUp(site="s", roster_digest=bytes(32))
    return {
        "parcel_down": Target(decode_parcel_down, [encode_parcel(each) for each in (down, ParcelDown())]),
        "parcel_up": Target(decode_parcel_up, [encode_parcel(each) for each in (up, small)]),
    }


# Configuration


def settings_targets(in_file: Callable[..., Any]) -> dict[str, Target]:
    """TOML as it comes; and a document altered as such, then written as TOML."""
    read_policy = in_file("policy.toml", load_policy)
    read_site = in_file("site.toml", lambda path: load_site(path.parent))
    read_coordinator = in_file("coordinator.toml", lambda path: load_coordinator(path.parent))
    files = {
        "policy_file": (read_policy, POLICY, []),
        "site_file": (read_site, SITE, []),
        "coordinator_file": (read_coordinator, COORDINATOR, [EXAMPLE.format(host="::", port=1).encode()]),
    }
    found = {}
    for name, (read, document, more) in files.items():
        found[name] = Target(read, [as_file(document), *more])
        written = json.dumps(document, ensure_ascii=False).encode()
        found[f"{name}_document"] = Target(lambda data, read=read: read(from_json(data)), [written], document=True)
    return found


def from_json(data: bytes) -> bytes:
    try:
        document = json.loads(data)
        return as_file(document)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise Malformed("no TOML can be written of this") from None


def as_file(document: dict[str, Any]) -> bytes:
    return "".join(f"{as_toml(key)} = {as_toml(value)}\n" for key, value in document.items()).encode()


def as_toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(as_toml(each) for each in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{as_toml(key)} = {as_toml(each)}' for key, each in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


# Orders


def order_targets(folder: Path, in_file: Callable[..., Any]) -> dict[str, Target]:
    plan = check_plan(parse_spec(plan_document(private=False)))
    made = submit(folder, plan, wait_seconds=60.0, run="run-1", continues="run-0")
    made.write_status(
        Status(run="run-1", state="failed", round=1, rounds=2, sites={NAME: "away"}, code="X", text="少", hint="再试")
    )
    return {
        "order_file": Target(
            in_file("runs/run-1/order.json", lambda path: RunFolder(path.parent).order()),
            [(made.path / "order.json").read_bytes()],
            document=True,
        ),
        "status_file": Target(
            in_file("runs/run-1/status.json", lambda path: RunFolder(path.parent).status()),
            [(made.path / "status.json").read_bytes()],
            document=True,
        ),
    }


# What people ask


def questions() -> list[bytes]:
    approval = PlanApproval(plan="ab" * 32, roster="cd" * 32, person="张伟", at=AT // 1000, signature=bytes(64))
    asked = [{}, {"plan": "ab" * 6}, {"plan": "ab" * 32, "person": "张伟"}, {"name": NAME, "why": "磁盘坏了"}]
    return [
        _Question(version=VERSION, json=msgspec.json.encode(each)).SerializeToString() for each in (*asked, approval)
    ]


def any_question(data: bytes) -> object:
    """Read it as whatever may be asked."""
    refusals = []
    for question in {method.question for method in METHODS.values()}:
        try:
            return _read(data, question)
        except Malformed as error:
            refusals.append(error)
    raise refusals[0]


# States


def snapshot() -> Snapshot:
    federation, identities, secrets, keys = dealt_round()
    graph = round_graph(federation, 3, federation.roster.names)
    dealt, _ = deal_shares(secrets[NAME], keys, federation, graph, identity=identities[NAME])
    return Snapshot(
        next_round=3,
        rotation_wanted=False,
        sites={17: NAME},
        sizes={"global": ScopeSize(NAME, 5, 1)},
        sealed={0: {NAME: b"sealed"}},
        held={NAME: 0},
        taken_at=1.8e9,
        keys={3: keys},
        dealt={3: {NAME: dealt}},
        listed={3: federation.roster.names},
        contributors=(NAME,),
        last_update={NAME: 2},
    )


def state() -> SiteState:
    _, _, secrets, keys = dealt_round()
    values = {"global": ScopeValues(weights=bytes(8), momentum=bytes(16), value_range=0.01)}
    held = HeldShares({"mask-key": bytes(16), "self-mask": bytes(16)})
    playing = RoundState(keys=keys[NAME], secrets=secrets[NAME], listed=(NAME,), peers=keys, held={NAME: held}, epoch=0)
    return SiteState(
        offer=b"offer",
        scopes=values,
        steps_done=(2,),
        steps_accounted=(2,),
        last_sent=1,
        last_applied=1,
        digests={"global": bytes(32)},
        contributors=(0,),
        before=EarlierAdapter(round=0, scopes=values, digests={"global": bytes(32)}, contributors=()),
        earlier_runs=("run-0",),
        group_keys={0: b"key"},
        canaries=CanaryState(seed=bytes(32), first_losses=bytes(8), round_scores=bytes(8)),
        rounds={2: playing, 3: RoundState(keys=round_keys(NAME), secrets=None)},
    )
