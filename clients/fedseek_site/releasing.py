"""What a site writes when a run ends, and the part of it that it signs for others."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fedseek.identity.signing import CONTEXT_RELEASE, sign
from fedseek.lora.export import ADAPTER_FILES, save_adapter, save_head
from fedseek.messages import ReleaseApproved, release_message
from fedseek.release import model_card, privacy_statement, statement_bytes
from fedseek_site.weights import weights_digests

if TYPE_CHECKING:
    from fedseek_site.run import SiteRun


def write_site_release(run: SiteRun, *, utility: float, send_adapter: bool) -> ReleaseApproved:
    """Write adapter, head, model card and privacy statement into the site's release folder, all or nothing.

    Raises:
        ReleaseRefused: the privacy statement cannot be earned; nothing is written.
    """
    statement = privacy_statement(
        run.plan,
        run=run.run_id,
        site=run.identity.name,
        kind=run.kind,
        spend=run.spend,
        guards_passed=run.guards_passed,
        steps=run.steps_done,
    )
    document = statement_bytes(statement)
    digests = weights_digests(run.scopes)
    signature = sign(run.identity, CONTEXT_RELEASE, release_message(run.run_id, digests, document))
    base = run.plan.spec.model.source
    card = model_card(run.plan, run=run.run_id, statements=[statement], utility={run.kind: utility}, base=base)

    run.release_folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".release-", dir=run.release_folder.parent))
    save_adapter(run.model, draft, base_name=base)
    save_head(run.model, draft, kind=run.kind, labels=run.plan.spec.kinds[run.kind].labels)
    (draft / "README.md").write_text(card, "utf-8")
    (draft / "privacy.json").write_bytes(document)
    (draft / "privacy.sig").write_bytes(signature)
    adapter = {name: (draft / name).read_bytes() for name in ADAPTER_FILES} if send_adapter else {}
    os.replace(draft, run.release_folder)
    run.observe({"event": "released", "utility": utility, "guards_passed": list(run.guards_passed)})
    return ReleaseApproved(
        run=run.run_id,
        site=run.identity.name,
        digests=digests,
        statement=document,
        signature=signature,
        adapter=adapter,
    )
