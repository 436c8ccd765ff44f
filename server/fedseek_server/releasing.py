"""What the coordinator may write when every site in the adapter has approved: the adapter and the sites' signed statements."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from fedseek.errors import Malformed, ReleaseRefused
from fedseek.identity.secret_files import sync_folder
from fedseek.messages import ReleaseApproved
from fedseek.release import PrivacyStatement, model_card
from fedseek_server.coordinator import Coordinator

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = frozenset({"adapter_config.json", WEIGHTS_FILE})


def write_release(coordinator: Coordinator, folder: Path) -> None:
    """Write the release folder, all or nothing; durably when this returns.

    The same release that is there already stays as it is: the process was stopped after it had been written.

    Raises:
        ReleaseRefused: a site whose update is in the adapter has not approved, the adapter that was sent is not the
            one all signed for, or the folder holds something else.
        Malformed: a statement does not parse or speaks of another run, plan or site.
    """
    approvals = coordinator.approvals
    missing = [site for site in coordinator.contributors if site not in approvals]
    if missing or not approvals:
        raise ReleaseRefused(
            f"no approval from {', '.join(missing) or 'any site'}",
            hint="every site whose update is in the adapter must approve; play the run again with them there",
        )
    statements = [_statement_of(coordinator, approvals[site]) for site in sorted(approvals)]
    adapter = _adapter_of(list(approvals.values()), statements)

    plan = coordinator.plan
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".release-", dir=folder.parent) as scratch:
        draft = Path(scratch) / "release"
        draft.mkdir()
        for name, data in adapter.items():
            (draft / name).write_bytes(data)
        for site, approval in approvals.items():
            (draft / f"privacy-{site}.json").write_bytes(approval.statement)
            (draft / f"privacy-{site}.sig").write_bytes(approval.signature)
        (draft / "plan.json").write_bytes(plan.canonical())
        (draft / "roster.bin").write_bytes(coordinator.roster.canonical_bytes())
        card = model_card(plan, run=coordinator.run, statements=statements, utility={}, base=plan.spec.model.source)
        (draft / "README.md").write_text(card, "utf-8")
        _put_in_place(draft, folder)


def _put_in_place(draft: Path, folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if _content(folder) != _content(draft):
            raise ReleaseRefused(f"{folder} exists and holds something else", hint="move it away")
        return
    for path in draft.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(draft)
    os.replace(draft, folder)
    sync_folder(folder.parent)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _adapter_of(approvals: list[ReleaseApproved], statements: list[PrivacyStatement]) -> dict[str, bytes]:
    """The one adapter that was sent, if its weights are those that every site signed for."""
    sent = [approval.adapter for approval in approvals if approval.adapter]
    if len(sent) != 1 or set(sent[0]) != ADAPTER_FILES:
        raise ReleaseRefused(f"{len(sent)} sites sent an adapter, wanted 1 with {', '.join(sorted(ADAPTER_FILES))}")
    got = hashlib.sha256(sent[0][WEIGHTS_FILE]).hexdigest()
    others = sorted(statement.site for statement in statements if statement.adapter_sha256 != got)
    if others:
        raise ReleaseRefused(f"the adapter that was sent has sha256 {got}, {', '.join(others)} signed for another")
    return sent[0]


def _statement_of(coordinator: Coordinator, approval: ReleaseApproved) -> PrivacyStatement:
    try:
        statement = msgspec.json.decode(approval.statement, type=PrivacyStatement)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the last two through
        raise Malformed(f"privacy statement of site {approval.site!r}: {error}") from None
    digests = {scope: digest.hex() for scope, digest in approval.digests.items()}
    said = (statement.run, statement.plan_digest, statement.site, statement.tensors)
    wanted = (coordinator.run, coordinator.plan.digest, approval.site, digests)
    if said != wanted:
        raise Malformed(f"privacy statement of site {approval.site!r} speaks of {said}, wanted {wanted}")
    return statement
