"""What the coordinator may write when enough sites have approved: the evidence bundle, which verifies, or nothing."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedseek.daemon.audit_lines import AuditHead
from fedseek.errors import FedseekError, ReleaseRefused
from fedseek.evidence import HEADS_FILE, bundle, heads_bytes, naming, parse_heads, parse_release, statement_file
from fedseek.identity.roster import Roster
from fedseek.identity.secret_files import sync_folder
from fedseek.lora.adapter_file import ADAPTER_FILES
from fedseek.messages import ReleaseApproved
from fedseek.release import approvals_wanted
from fedseek.statement import parse_statement
from fedseek.verification import check_heads, verify_release
from fedseek_server.coordinator import Coordinator

_log = logging.getLogger(__name__)


def write_release(coordinator: Coordinator, folder: Path, *, heads: bytes | None = None) -> None:
    """Write the release folder, all or nothing; durably when this returns.

    What is put in place has passed the very check that ``fedseek verify`` makes. The same release that is there already
    stays as it is: the process was stopped after it had been written.

    Args:
        coordinator: of a run that was played to its end.
        folder: of the release.
        heads: the file ``audit-heads.json``, where there are audit records.

    Raises:
        ReleaseRefused: too few of the sites whose updates are in the adapter have approved, the adapter that was sent is
            not the one that all signed for, a statement does not hold, or the folder holds something else.
    """
    approvals = coordinator.approvals
    check_enough(coordinator, approvals)
    files = bundle_of(coordinator, approvals, heads=heads)
    verify_release(parse_release(files), coordinator.roster)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".release-", dir=folder.parent) as scratch:
        draft = Path(scratch) / "release"
        draft.mkdir()
        for name, data in files.items():
            (draft / name).write_bytes(data)
        _put_in_place(draft, folder)


def audit_heads(roster: Roster, heads: Sequence[AuditHead], countersignatures: Mapping[str, bytes]) -> bytes | None:
    """The file ``audit-heads.json``; None where the run's roster cannot verify it, as when a site has new keys since."""
    if not heads or not countersignatures:
        return None
    data = heads_bytes(heads, countersignatures)
    try:
        check_heads(parse_heads(data), roster)
    except FedseekError as error:
        _log.warning("no heads of audit records beside the release: %s", error)
        return None
    return data


def check_enough(coordinator: Coordinator, approved: Mapping[str, ReleaseApproved]) -> None:
    """Check that as many sites of those in the adapter have approved as the plan asks for.

    Raises:
        ReleaseRefused: they have not; names those that did not.
    """
    contributors = coordinator.contributors
    missing = [site for site in contributors if site not in approved]
    wanted, count = approvals_wanted(coordinator.plan, contributors), len(contributors) - len(missing)
    if not contributors or count < wanted:
        raise ReleaseRefused(
            f"no approval from {', '.join(missing) or 'any site'}; {count} of {len(contributors)} sites in the adapter have "
            f"approved, wanted {wanted}",
            hint="sites whose updates are in the adapter must approve; play the run again with them there",
        )


def bundle_of(
    coordinator: Coordinator, approvals: Mapping[str, ReleaseApproved], *, heads: bytes | None
) -> dict[str, bytes]:
    """The files of the release, by name.

    Raises:
        ReleaseRefused: no adapter was sent, or two that differ; or a statement is not of this run and site.
    """
    for site, approval in approvals.items():
        _check_statement(coordinator, site, approval)
    signed = {site: (approval.statement, approval.signature) for site, approval in approvals.items()}
    return bundle(coordinator.plan, coordinator.roster, _adapter_of(list(approvals.values())), signed, heads=heads)


def _check_statement(coordinator: Coordinator, site: str, approval: ReleaseApproved) -> None:
    """What sites state of each other is verified with the bundle; of which run it is, only the coordinator knows."""
    with naming(f"{statement_file(site)} of this run"):
        statement = parse_statement(approval.statement)
        said = (statement.run, statement.plan_digest, statement.site, statement.contributors)
        wanted = (coordinator.run, coordinator.plan.digest, site, coordinator.contributors)
        if said != wanted:
            raise ReleaseRefused(f"speaks of {said}, wanted {wanted}")


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
    """Without the heads of the audit records, which go on."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != HEADS_FILE}


def _adapter_of(approvals: Sequence[ReleaseApproved]) -> dict[str, bytes]:
    """The one adapter that was sent; whether it is the one that every site signed for is verified with the bundle."""
    sent = [approval.adapter for approval in approvals if approval.adapter]
    if not sent or any(each != sent[0] for each in sent) or set(sent[0]) != set(ADAPTER_FILES):
        raise ReleaseRefused(
            f"{len(sent)} sites sent an adapter, wanted 1 with {', '.join(ADAPTER_FILES)}, or the same from several"
        )
    return sent[0]
