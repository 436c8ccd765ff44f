"""Runs that an operator asked for, and how far each is: small files, so that a command needs no running daemon.

runs/<run>/  order.json   what was asked, written once
plan.json    the canonical plan
status.json  how far it is, for people and scripts
stop         there when somebody asked to stop it
ask-again    there when somebody asked to wait for approvals of the release once more
report.jsonl what happened
run.sqlite3  what the coordinator needs to go on (run_log.py)
release/     what all sites approved
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from fedseek.errors import FedseekError, InvalidPlan, Malformed, ReleaseRefused
from fedseek.identity.secret_files import refusing, write_secret_file
from fedseek.plan import Plan, plan_from_canonical

RUNS: Final = "runs"
MAX_FILE_BYTES: Final = 1 << 20
OPEN_STATES: Final = frozenset({"queued", "waiting", "running"})
State = Literal["queued", "waiting", "running", "released", "failed", "stopped"]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
RunName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,127}\Z")]

_StructT = TypeVar("_StructT", "Order", "Status")


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run that was asked for.

    Attributes:
        run: its name.
        created_at: Unix time in seconds; runs are played in this order.
        wait_seconds: how long to wait for every site of the roster to be ready; then it begins with those that are.
        continues: the run of a coordinator that lost its disk, to be taken up from the sites' last common adapter.
    """

    version: Literal[1] = 1
    run: RunName
    created_at: float
    wait_seconds: Annotated[float, msgspec.Meta(ge=0, le=30 * 86_400)]
    continues: Annotated[str, msgspec.Meta(max_length=128)] | None = None


class Status(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far a run is.

    Attributes:
        state: queued; waiting for sites; running; or over: released, failed, stopped.
        phase, round, rounds: of the exchange under way.
        sites: by name, a word on each: ready, waiting, refused and the rule, away, answered. While approvals of the
            release are waited for, of those in the adapter: approved, away, or the rule that it does not approve by yet.
        approvals_wanted: how many of these have to approve; 0 before.
        code, text, hint: why it failed.
        updated_at: Unix time in seconds.
    """

    version: Literal[1] = 1
    run: str
    state: State
    phase: str = ""
    round: int = 0
    rounds: int = 0
    sites: dict[str, Text] = {}
    approvals_wanted: int = 0
    code: str = ""
    text: Text = ""
    hint: Text = ""
    updated_at: float = 0.0


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def release(self) -> Path:
        """What all sites approved."""
        return self.path / "release"

    @property
    def report(self) -> Path:
        """What happened, as JSON lines."""
        return self.path / "report.jsonl"

    @property
    def is_to_stop(self) -> bool:
        """Whether somebody asked to stop the run."""
        return (self.path / "stop").exists()

    @property
    def is_to_ask_again(self) -> bool:
        """Whether somebody asked to wait for approvals once more."""
        return (self.path / "ask-again").exists()

    def order(self) -> Order:
        """What was asked."""
        return _read(self.path / "order.json", Order)

    def plan(self) -> Plan:
        """The plan, checked."""
        return plan_from_canonical((self.path / "plan.json").read_bytes())

    def status(self) -> Status:
        """How far it is."""
        path = self.path / "status.json"
        return _read(path, Status) if path.exists() else Status(run=self.path.name, state="queued")

    def write_status(self, status: Status) -> None:
        """Replace the status, whole or not at all.

        Raises:
            CustodyError: the disk refuses.
        """
        told = msgspec.structs.replace(status, updated_at=round(time.time(), 3))
        write_secret_file(self.path / "status.json", msgspec.json.format(msgspec.json.encode(told)))

    def ask_to_stop(self) -> None:
        """Have the daemon end the run; what was spent stays spent.

        Raises:
            FedseekError: it is over already.
        """
        state = self.status().state
        if state not in OPEN_STATES:
            raise FedseekError(f"run {self.path.name} is {state} already", hint="there is nothing to stop")
        (self.path / "stop").touch(mode=0o600)

    def ask_again(self) -> None:
        """Have the daemon ask once more for approvals of a release that was refused for want of them.

        Raises:
            FedseekError: that is not how the run ended.
        """
        told = self.status()
        if (told.state, told.code) != ("failed", ReleaseRefused.__name__):
            raise FedseekError(
                f"run {self.path.name} is {told.state}{f' ({told.code})' if told.code else ''}",
                hint="asked once more are sites that did not approve a release in time; nothing else is done twice",
            )
        (self.path / "ask-again").touch(mode=0o600)
        self.write_status(msgspec.structs.replace(told, state="queued", code="", text="", hint=""))
        os.utime(self.path.parent)  # what the daemon looks at: see ``last_change``

    def asked_again(self) -> None:
        """The wish is on the run's own record."""
        (self.path / "ask-again").unlink(missing_ok=True)


def submit(
    folder: Path, plan: Plan, *, wait_seconds: float, run: str | None = None, continues: str | None = None
) -> RunFolder:
    """Ask for a run; a running daemon finds it within a second.

    Raises:
        InvalidPlan: the name is taken or is none.
    """
    now = datetime.now(UTC)
    name = run or f"{plan.spec.name}-{now:%Y%m%d-%H%M%S}"
    try:
        order = msgspec.convert(
            {"run": name, "created_at": now.timestamp(), "wait_seconds": wait_seconds, "continues": continues}, Order
        )
    except msgspec.ValidationError as error:
        raise InvalidPlan([f"run {name!r}: {error}"], source="order") from None
    path, draft = folder / RUNS / name, folder / RUNS / f".{name}.{secrets.token_hex(4)}"
    with refusing(draft, "made"):
        draft.mkdir(parents=True, mode=0o700)
    write_secret_file(draft / "plan.json", plan.canonical())
    write_secret_file(draft / "order.json", msgspec.json.encode(order))
    try:
        draft.rename(path)  # whole or not at all; onto a folder that holds a run it fails
    except OSError:
        shutil.rmtree(draft)
        raise InvalidPlan([f"run {name!r} exists"], source="order", hint="give it another name with --name") from None
    return RunFolder(path)


def run_folder(folder: Path, run: str) -> RunFolder:
    """The folder of a run by its name; an unambiguous beginning of it will do.

    Raises:
        FedseekError: there is none, or several.
    """
    found = [each for each in all_runs(folder) if each.path.name == run] or [
        each for each in all_runs(folder) if each.path.name.startswith(run)
    ]
    if len(found) != 1:
        known = ", ".join(each.path.name for each in all_runs(folder)) or "none"
        raise FedseekError(f"run {run!r}: got {len(found)} of that name, wanted 1", hint=f"runs here: {known}")
    return found[0]


def all_runs(folder: Path) -> list[RunFolder]:
    """Every run ever asked for, oldest first."""
    paths = [path for path in (folder / RUNS).glob("[!.]*") if (path / "order.json").exists()]
    return sorted((RunFolder(path) for path in paths), key=lambda each: (each.order().created_at, each.path.name))


def next_run(folder: Path) -> RunFolder | None:
    """The oldest run that is not over."""
    return next((each for each in all_runs(folder) if each.status().state in OPEN_STATES), None)


def last_change(folder: Path) -> int:
    """Changes whenever a run is asked for: so that a daemon need not read every status to know that nothing is new."""
    runs = folder / RUNS
    return runs.stat().st_mtime_ns if runs.exists() else 0


def _read(path: Path, kind: type[_StructT]) -> _StructT:
    data = path.read_bytes()
    if len(data) > MAX_FILE_BYTES:
        raise Malformed(f"{path}: got {len(data)} bytes, wanted at most {MAX_FILE_BYTES}")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Malformed(f"{path}: {error}", hint="it is written by the daemon; was it edited?") from None
