"""What a site writes when a run ends, and the part of it that it signs for others."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from fedseek.dp.accounting import PrivacySpend
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signing import CONTEXT_RELEASE, sign
from fedseek.lora.export import ADAPTER_FILES, WEIGHTS_FILE, save_adapter, save_head
from fedseek.lora.model import AdapterModel
from fedseek.messages import ReleaseApproved, release_message
from fedseek.plan import Plan
from fedseek.release import model_card, privacy_statement, statement_bytes


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a run has come to at this site. ``digests`` are of the final tensors, ``utility`` is over the site's kind."""

    run: str
    plan: Plan
    identity: SiteIdentity = field(repr=False)
    model: AdapterModel = field(repr=False)
    digests: dict[str, bytes]
    spend: PrivacySpend | None
    guards_passed: tuple[str, ...]
    steps: int
    utility: float


def write_site_release(finished: FinishedRun, folder: Path, *, send_adapter: bool) -> ReleaseApproved:
    """Write adapter, head, model card and privacy statement into ``folder``, all or nothing.

    Returns:
        What the site signs for others, with the adapter if it is to be sent.

    Raises:
        ReleaseRefused: the privacy statement cannot be earned; nothing is written.
    """
    plan, identity, digests = finished.plan, finished.identity, finished.digests
    base = plan.spec.model.source
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".release-", dir=folder.parent) as scratch:
        draft = Path(scratch) / "release"
        save_adapter(finished.model, draft, base_name=base)
        save_head(finished.model, draft, kind=identity.kind, labels=plan.spec.kinds[identity.kind].labels)
        files = {name: (draft / name).read_bytes() for name in ADAPTER_FILES}
        statement = privacy_statement(
            plan,
            run=finished.run,
            site=identity.name,
            kind=identity.kind,
            spend=finished.spend,
            guards_passed=finished.guards_passed,
            steps=finished.steps,
            adapter_sha256=hashlib.sha256(files[WEIGHTS_FILE]).hexdigest(),
            digests=digests,
        )
        document = statement_bytes(statement)
        signature = sign(identity, CONTEXT_RELEASE, release_message(finished.run, digests, document))
        utility = {identity.kind: finished.utility}
        card = model_card(plan, run=finished.run, statements=[statement], utility=utility, base=base)
        (draft / "README.md").write_text(card, "utf-8")
        (draft / "privacy.json").write_bytes(document)
        (draft / "privacy.sig").write_bytes(signature)
        os.replace(draft, folder)
    return ReleaseApproved(
        run=finished.run,
        site=identity.name,
        digests=digests,
        statement=document,
        signature=signature,
        adapter=files if send_adapter else {},
    )
