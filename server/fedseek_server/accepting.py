"""Letting a site's audit record begin anew, at the operator's word: the site lost its disk, and said so.

As with orders, the word is a file: the daemon has the coordinator's record open, and a command cannot write to it.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from fedseek.daemon.audit import AuditChain
from fedseek.errors import Malformed
from fedseek.identity.roster import MAX_NAME_CHARS
from fedseek.identity.secret_files import read_secret_file, refusing, write_secret_file

ACCEPTED: Final = "accepted"
MAX_FILE_BYTES: Final = 16 << 10
_log = logging.getLogger(__name__)


class RecordAccepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whose record may begin anew, and why."""

    version: Literal[1] = 1
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    why: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


def ask_to_accept(folder: Path, name: str, why: str) -> None:
    """Leave the operator's word for the daemon.

    Raises:
        Malformed: the name or the reason is empty or too long.
        CustodyError: the disk refuses.
    """
    try:
        asked = msgspec.convert({"name": name, "why": why}, RecordAccepted)
    except msgspec.ValidationError as error:
        raise Malformed(f"record of {name!r}: {error}") from None
    with refusing(folder / ACCEPTED, "made"):
        (folder / ACCEPTED).mkdir(mode=0o700, exist_ok=True)
    write_secret_file(
        folder / ACCEPTED / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json", msgspec.json.encode(asked)
    )


def accept_waiting(folder: Path, audit: AuditChain) -> None:
    """Write down every word that was left; a file that is none is logged and removed."""
    for path in sorted((folder / ACCEPTED).glob("*.json")):
        try:
            asked = msgspec.json.decode(read_secret_file(path, limit=MAX_FILE_BYTES), type=RecordAccepted)
            audit.accept_new_record(asked.name, why=asked.why)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
            _log.error("%s: %s", path, error)
        path.unlink()
