"""Targets of who verifies a release: each file of the folder, and a statement that its site signed whatever it says."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
from altering import Target
from message_targets import plan_document

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what it takes from the tests, when run as a program
from bundled import Signers

from fedseek.errors import Malformed
from fedseek.evidence import bundle, parse_heads, parse_release, statement_file
from fedseek.lora.adapter_file import WEIGHTS_FILE, read_adapter
from fedseek.plan import check_plan, parse_spec
from fedseek.statement import PrivacyStatement, parse_statement
from fedseek.verification import verify_release

SITE = "st-anna"
ACCOUNTED_CPU = 10.0  # seconds, for the first statement with so many steps: epsilon is worked out, then kept


def release_targets() -> dict[str, Target]:
    """What a stranger can hand to ``fedseek verify``."""
    signers = Signers.of(check_plan(parse_spec(plan_document(private=True))))
    files, honest = signers.files(), signers.signed()
    statements = [files[statement_file(site)] for site in signers.identities]

    def statement_signed(data: bytes) -> object:
        try:
            statement = msgspec.json.decode(data, type=PrivacyStatement)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            raise Malformed("no statement") from None
        own = signers.sign(SITE, statement)
        signed = bundle(signers.plan, signers.roster, signers.adapter, {**honest, SITE: own})
        return verify_release(parse_release(signed), signers.roster)

    return {
        "privacy_statement": Target(parse_statement, statements, document=True),
        "statement_signed": Target(
            statement_signed, [files[statement_file(SITE)]], document=True, max_cpu=ACCOUNTED_CPU
        ),
        "audit_heads": Target(parse_heads, [signers.heads()], document=True),
        "released_adapter": Target(read_adapter, [files[WEIGHTS_FILE]]),
    }
