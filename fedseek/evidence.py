"""The evidence bundle: what the folder of a release holds, and nothing else.

    adapter_config.json  adapter_model.safetensors      the adapter, as PEFT loads it
    plan.json  roster.bin                               what all sites agreed to, and their public keys; canonical
    privacy-<site>.json  privacy-<site>.sig             what each site states and signs
    audit-heads.json                                    how far each audit record went, countersigned (from daemons only)
    README.md  PRIVACY.md  PRIVACY.zh.md                the same for people; they follow from the files above

A folder is read whole, within bounds, before anything in it is looked at; whether it is true is for ``verification``.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import msgspec

from fedseek.daemon.audit_lines import AuditHead, HeadDocument, Hex64, head_document, in_order, read_head
from fedseek.errors import FedseekError, Malformed, ReleaseRefused
from fedseek.identity.roster import MAX_ROSTER_ENTRIES, Roster, check_name, parse_roster
from fedseek.identity.secret_files import read_at_most
from fedseek.identity.signing import SIGNATURE_BYTES
from fedseek.lora.adapter_file import ADAPTER_FILES, WEIGHTS_FILE
from fedseek.plan import MAX_PLAN_BYTES, Plan, plan_digest, plan_from_canonical
from fedseek.release import model_card
from fedseek.statement import MAX_STATEMENT_BYTES, PrivacyStatement, one_form, parse_statement
from fedseek.statement_page import privacy_page
from fedseek.statement_words import LANGUAGES

PLAN_FILE: Final = "plan.json"
ROSTER_FILE: Final = "roster.bin"
HEADS_FILE: Final = "audit-heads.json"
README_FILE: Final = "README.md"
STATEMENT_PREFIX, STATEMENT_SUFFIX, SIGNATURE_SUFFIX = "privacy-", ".json", ".sig"
MAX_ROSTER_BYTES: Final = 4 << 20  # 1024 sites of at most 3 KiB
MAX_HEADS_BYTES: Final = 2 << 20
MAX_PAGE_BYTES: Final = 256 << 20  # it follows from the statements, of which there may be 1024
MAX_WEIGHTS_BYTES: Final = 1 << 30
MAX_CONFIG_BYTES: Final = 1 << 20

_FIXED: Final = {
    WEIGHTS_FILE: MAX_WEIGHTS_BYTES,
    **{name: MAX_CONFIG_BYTES for name in ADAPTER_FILES if name != WEIGHTS_FILE},
    PLAN_FILE: MAX_PLAN_BYTES,
    ROSTER_FILE: MAX_ROSTER_BYTES,
    README_FILE: MAX_PAGE_BYTES,
    **{words.file: MAX_PAGE_BYTES for words in LANGUAGES},
}
"""Files that every release has, and the most bytes of each."""


class AuditHeads(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Heads of the audit records of coordinator and sites when the release was approved, and who countersigned them.

    Attributes:
        heads: by name; the coordinator's, whose key is on no roster, is vouched for by the countersignatures.
        countersignatures: by site, over the list of heads.
    """

    version: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    heads: Annotated[tuple[HeadDocument, ...], msgspec.Meta(min_length=1, max_length=MAX_ROSTER_ENTRIES + 1)]
    countersignatures: Annotated[
        dict[Annotated[str, msgspec.Meta(max_length=64)], Hex64], msgspec.Meta(max_length=MAX_ROSTER_ENTRIES)
    ]

    def listed(self) -> tuple[AuditHead, ...]:
        """The heads in order of name. Raises ``Malformed``: two of one name."""
        return in_order([read_head(document) for document in self.heads])


@dataclass(frozen=True, slots=True)
class Release:
    """A release folder, read whole. Each part parses; nothing is verified yet.

    Attributes:
        files: content by name.
        plan: of the run.
        roster: of the run.
        statements: by site, in ascending order of name.
        heads: None where there is no such file.
    """

    files: Mapping[str, bytes] = field(repr=False)
    plan: Plan
    roster: Roster = field(repr=False)
    statements: Mapping[str, PrivacyStatement] = field(repr=False)
    heads: AuditHeads | None = field(repr=False)


def read_release(folder: Path) -> Release:
    """Read a release folder: the coordinator's, not the one that a site keeps for itself.

    Raises:
        ReleaseRefused: there is no such folder, or a file is missing, unknown, too large, a link, or does not parse; names it.
    """
    return parse_release(read_files(folder))


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a release folder by name, each within its bound.

    Raises:
        ReleaseRefused: a file is missing, unknown, too large or not a plain file.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for _, entry in zip(range(_MAX_FILES + 1), entries, strict=False))
    except OSError as error:
        raise ReleaseRefused(
            f"{folder} cannot be read: {error.strerror}", hint="name the folder of a release"
        ) from None
    if len(names) > _MAX_FILES:
        raise ReleaseRefused(f"{folder} holds more than {_MAX_FILES} files")
    plain = {unicodedata.normalize("NFC", name): name for name in names}  # a file system may have taken names apart
    _check_names(list(plain))
    return {name: _read_plain(folder / stored, name) for name, stored in plain.items()}


def parse_release(files: Mapping[str, bytes]) -> Release:
    """The parts of a release, each in its one form.

    Raises:
        ReleaseRefused: a file is missing, unknown, too large, or does not parse; names it.
    """
    _check_names(list(files))
    for name, data in files.items():
        if len(data) > _limit(name):
            raise ReleaseRefused(f"{name}: got {len(data)} bytes, wanted at most {_limit(name)}")
    with naming(ROSTER_FILE):
        roster = parse_roster(files[ROSTER_FILE])
    statements = {}
    for site in statement_sites(files):
        with naming(statement_file(site)):
            statements[site] = parse_statement(files[statement_file(site)])
    with naming(PLAN_FILE):
        plan = _parse_plan(files[PLAN_FILE], statements)
    heads = None
    if HEADS_FILE in files:
        with naming(HEADS_FILE):
            heads = parse_heads(files[HEADS_FILE])
    return Release(files, plan, roster, statements, heads)


def _parse_plan(data: bytes, statements: Mapping[str, PrivacyStatement]) -> Plan:
    """The digest first: to work a plan out takes seconds, and nobody has signed just any."""
    digest = plan_digest(data)
    wanted = {statement.plan_digest for statement in statements.values()}
    if digest not in wanted:
        raise ReleaseRefused(f"has digest {digest}, the sites have signed for {', '.join(sorted(wanted))}")
    return plan_from_canonical(data)


def bundle(
    plan: Plan,
    roster: Roster,
    adapter: Mapping[str, bytes],
    signed: Mapping[str, tuple[bytes, bytes]],
    *,
    heads: bytes | None = None,
) -> dict[str, bytes]:
    """The files of a release, by name; ``signed`` are statement and signature by site.

    Raises:
        TooLarge, Malformed: a statement does not parse.
    """
    files = dict(adapter)
    for site, (document, signature) in signed.items():
        files |= {statement_file(site): document, signature_file(site): signature}
    files |= {PLAN_FILE: plan.canonical(), ROSTER_FILE: roster.canonical_bytes()}
    if heads is not None:
        files[HEADS_FILE] = heads
    return files | pages(plan, [parse_statement(signed[site][0]) for site in sorted(signed)])


def pages(plan: Plan, statements: Sequence[PrivacyStatement]) -> dict[str, bytes]:
    """README.md and the statements in words, by name of the file: they follow from plan and statements."""
    first = statements[0]
    unsigned = [name for name in first.contributors if name not in {statement.site for statement in statements}]
    card = model_card(plan, run=first.run, statements=statements, utility={}, base=plan.spec.model.source)
    told = {words.file: privacy_page(plan, statements, words, unsigned=unsigned) for words in LANGUAGES}
    return {name: text.encode() for name, text in {README_FILE: card, **told}.items()}


def heads_bytes(heads: Sequence[AuditHead], countersignatures: Mapping[str, bytes]) -> bytes:
    """The one form of ``audit-heads.json``."""
    return one_form(
        AuditHeads(
            heads=tuple(msgspec.convert(head_document(head), HeadDocument) for head in in_order(heads)),
            countersignatures={name: signature.hex() for name, signature in countersignatures.items()},
        )
    )


def parse_heads(data: bytes) -> AuditHeads:
    """Read what ``heads_bytes`` wrote. Raises ``Malformed``."""
    try:
        heads = msgspec.json.decode(data, type=AuditHeads)
        same = one_form(heads) == data and [head.name for head in heads.listed()] == [h.name for h in heads.heads]
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:  # msgspec lets the latter two through
        raise Malformed(f"audit heads of {len(data)} bytes do not parse: {str(error)[:200]}") from None
    if not same:
        raise Malformed("audit heads are not in the one form that they have")
    return heads


def statement_file(site: str) -> str:
    """Name of the file with a site's statement."""
    return f"{STATEMENT_PREFIX}{site}{STATEMENT_SUFFIX}"


def signature_file(site: str) -> str:
    """Name of the file with a site's signature."""
    return f"{STATEMENT_PREFIX}{site}{SIGNATURE_SUFFIX}"


def statement_sites(names: Iterable[str]) -> list[str]:
    """The sites of which there is a statement or a signature among these files, in ascending order."""
    ends = (STATEMENT_SUFFIX, SIGNATURE_SUFFIX)
    own = [name.removeprefix(STATEMENT_PREFIX) for name in names if name.startswith(STATEMENT_PREFIX)]
    return sorted({name.removesuffix(end) for name in own for end in ends if name.endswith(end)})


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Tell an error of ours in the block as a refusal that names the file."""
    try:
        yield
    except FedseekError as error:
        raise ReleaseRefused(f"{file}: {error.message}", hint=error.hint) from error


_MAX_FILES: Final = len(_FIXED) + 1 + 2 * MAX_ROSTER_ENTRIES


def _check_names(names: Sequence[str]) -> None:
    sites = statement_sites(names)
    if "privacy.json" in names and PLAN_FILE not in names:
        raise ReleaseRefused(
            "privacy.json: this is the folder that one site keeps for itself",
            hint="verify the release that the coordinator wrote: it has the plan, the roster and every site's statement",
        )
    for site in sites:
        with naming(statement_file(site)):
            check_name("site name", site)
    known = {*_FIXED, HEADS_FILE, *map(statement_file, sites), *map(signature_file, sites)}
    for name in sorted(names):
        if name not in known:
            raise ReleaseRefused(f"{name}: a release has no such file", hint="somebody has put it there since")
    wanted = {*_FIXED, *map(statement_file, sites), *map(signature_file, sites)}
    for name in sorted(wanted - set(names)):
        raise ReleaseRefused(f"{name}: missing", hint="a release is whole, or it is none")
    if not sites:
        raise ReleaseRefused(f"{statement_file('<site>')}: missing; no site has signed a statement")


def _limit(name: str) -> int:
    if name in _FIXED:
        return _FIXED[name]
    if name == HEADS_FILE:
        return MAX_HEADS_BYTES
    return SIGNATURE_BYTES if name.endswith(SIGNATURE_SUFFIX) else MAX_STATEMENT_BYTES


def _read_plain(path: Path, name: str) -> bytes:
    """A plain file; neither a link nor a pipe is followed or waited for."""
    limit = _limit(name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ReleaseRefused(f"{name}: not a plain file")
            data = read_at_most(descriptor, limit + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise ReleaseRefused(f"{name}: cannot be read: {reason}") from None
    if len(data) > limit:
        raise ReleaseRefused(f"{name}: got more than {limit} bytes, wanted at most that")
    return data
