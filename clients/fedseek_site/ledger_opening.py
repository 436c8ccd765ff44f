"""A daemon opens its ledger: with the limit of the policy of the day, and no older copy of it than its own record knows.

Each spend leaves a line in the site's audit record that names the entry by its digest. The record is signed, and other
sites keep its heads; so a ledger put back from an older copy is found out by the first line whose entry it lacks.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from fedseek.daemon.audit import AuditChain
from fedseek.daemon.audit_reading import Trail, open_record, walk
from fedseek.errors import AuditBroken
from fedseek.identity.vault import StorageKey
from fedseek_site.ledger import Ledger
from fedseek_site.ledger_entries import Limit
from fedseek_site.policy import Policy, load_policy, policy_in_force

LEDGER_LINE: Final = "ledger"
"""Kind of the audit lines that name an entry of the ledger."""


def open_ledger(
    path: Path, key: StorageKey, *, dataset: str, site: str, policy_path: Path, audit: AuditChain, audit_folder: Path
) -> Ledger:
    """The ledger at ``path``, checked against the audit record, which then names its newest entry.

    Args:
        path: of the ledger.
        key: the site's storage key.
        dataset: what the site's people call the data set.
        site: its name.
        policy_path: of ``policy.toml``, read anew before each spend.
        audit: the site's own record, open.
        audit_folder: where that is.

    Raises:
        AuditBroken: the ledger was altered, or lacks an entry that the record names.
        FedseekError: as :class:`fedseek_site.ledger.Ledger` says.
    """

    def limit() -> Limit:
        return limit_of(policy_in_force(partial(load_policy, policy_path), site=site))

    ledger = Ledger(path, key, dataset=dataset, limit=limit)
    with ExitStack() as undo:
        undo.callback(ledger.close)
        ledger.check_holds(*newest_entry_named(audit_folder))
        number, digest = ledger.head()
        if number:
            audit.record(LEDGER_LINE, entry=number, digest=digest.hex())
        undo.pop_all()
    return ledger


def limit_of(policy: Policy) -> Limit:
    """What a policy allows over the life of the data."""
    return Limit(policy.limits.max_epsilon_total, policy.limits.max_delta)


def newest_entry_named(audit_folder: Path) -> tuple[int, bytes]:
    """Number and digest of the ledger entry that the audit record named last; 0 if it names none.

    Raises:
        AuditBroken: such a line cannot be read.
    """
    newest = None
    for _, line, _ in walk(open_record(audit_folder), Trail(), thorough=False):
        newest = line if line.kind == LEDGER_LINE else newest
    if newest is None:
        return 0, bytes(32)
    try:
        return int(newest.detail["entry"]), bytes.fromhex(newest.detail["digest"])
    except (KeyError, TypeError, ValueError):
        raise AuditBroken(f"{audit_folder}: line {newest.number} names no entry of the privacy ledger") from None
