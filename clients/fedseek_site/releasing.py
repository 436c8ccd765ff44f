"""What a site writes when a run ends, and the part of it that it signs for others."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fedseek.identity.signing import CONTEXT_RELEASE, sign
from fedseek.lora.export import ADAPTER_FILES, WEIGHTS_FILE, save_adapter, save_head
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
    base, digests = run.plan.spec.model.source, weights_digests(run.scopes)
    parent = run.release_folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".release-", dir=parent) as scratch:
        draft = Path(scratch) / "release"
        save_adapter(run.model, draft, base_name=base)
        save_head(run.model, draft, kind=run.kind, labels=run.plan.spec.kinds[run.kind].labels)
        files = {name: (draft / name).read_bytes() for name in ADAPTER_FILES}
        statement = privacy_statement(
            run.plan,
            run=run.run_id,
            site=run.identity.name,
            kind=run.kind,
            spend=run.spend,
            guards_passed=run.guards_passed,
            steps=run.steps_done,
            adapter_sha256=hashlib.sha256(files[WEIGHTS_FILE]).hexdigest(),
            digests=digests,
        )
        document = statement_bytes(statement)
        signature = sign(run.identity, CONTEXT_RELEASE, release_message(run.run_id, digests, document))
        card = model_card(run.plan, run=run.run_id, statements=[statement], utility={run.kind: utility}, base=base)
        (draft / "README.md").write_text(card, "utf-8")
        (draft / "privacy.json").write_bytes(document)
        (draft / "privacy.sig").write_bytes(signature)
        os.replace(draft, run.release_folder)
    run.observe({"event": "released", "utility": utility, "guards_passed": list(run.guards_passed)})
    return ReleaseApproved(
        run=run.run_id,
        site=run.identity.name,
        digests=digests,
        statement=document,
        signature=signature,
        adapter=files if send_adapter else {},
    )
