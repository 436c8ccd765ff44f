"""``audit verify | show | export``: the same three commands at a site and at the coordinator.

A report is written for a data protection officer: what is there, from when to when, who vouches for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from fedseek.daemon.asking import json_option
from fedseek.daemon.audit_check import AuditReport, checked_lines, export_audit, heads_kept_by, verify_audit
from fedseek.daemon.audit_lines import AuditHead, AuditLine, milliseconds, time_text
from fedseek.daemon.audit_reading import open_record
from fedseek.identity.roster import SIGNING_PUBLIC_KEY_BYTES


@dataclass(frozen=True, slots=True)
class AuditSource:
    """Where a daemon's own record is, and what it is checked against.

    Attributes:
        folder: of the segments.
        name: its owner.
        public_key: of its owner, 32 bytes.
        others: public keys of other parties by name, to check countersignatures with.
    """

    folder: Path
    name: str
    public_key: bytes
    others: Mapping[str, bytes] = field(default_factory=dict)


def _public_key(ctx: click.Context, param: click.Parameter, value: str | None) -> bytes | None:
    try:
        key = None if value is None else bytes.fromhex(value)
    except ValueError:
        key = b""
    if key is not None and len(key) != SIGNING_PUBLIC_KEY_BYTES:
        raise click.BadParameter("wanted 64 hexadecimal digits")
    return key


_FILE = click.Path(path_type=Path, exists=True)
_MOMENT = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"])


def audit_group(find: Callable[[Path], AuditSource], *, program: str, folder: Path = Path()) -> click.Group:
    """The ``audit`` commands of a daemon.

    Args:
        find: from the value of ``--folder`` to the record in it.
        program: name of the command they are part of, for the examples.
        folder: where ``--folder`` points unless told otherwise.
    """
    where = click.option(
        "--folder", type=_FILE, default=folder, show_default=True, help="Folder of the site or the coordinator."
    )

    @click.group(epilog=f"Example: {program} audit verify")
    def audit() -> None:
        """The signed record of what was asked, admitted, refused and sent."""

    @audit.command(epilog=f"Example: {program} audit verify --against coordinator.jsonl")
    @click.argument("file", type=_FILE, required=False)
    @where
    @click.option(
        "--public-key", callback=_public_key, metavar="HEX", help="Key of the owner of FILE, 64 hexadecimal digits."
    )
    @click.option("--against", type=_FILE, multiple=True, help="Record of another party, exported; may be repeated.")
    @json_option
    def verify(
        file: Path | None, folder: Path, public_key: bytes | None, against: tuple[Path, ...], as_json: bool
    ) -> None:
        """Check every line of the record here, or of an exported FILE; name the first that is wrong.

        A record cannot tell by itself that its newest lines were cut. With --against, the heads that other parties keep
        of it are looked up in their records.
        """
        source = find(folder) if file is None else _exported(file, public_key)
        heads = [head for other in against for head in heads_kept_by(other, source.name)]
        report = verify_audit(
            source.folder, public_key=source.public_key, name=source.name, others=source.others, heads=heads
        )
        trusted = file is None or public_key is not None
        click.echo(json.dumps(asdict(report)) if as_json else "\n".join(_words(report, heads, trusted=trusted)))

    @audit.command(epilog=f"Example: {program} audit show --since 2026-11-01 --kind started")
    @where
    @click.option("--since", type=_MOMENT, help="Only lines from this day or time on, in UTC.")
    @click.option("--kind", multiple=True, help="Only lines of this kind; may be repeated.")
    @click.option("--json", "as_json", is_flag=True, help="The lines as they stand in the record, one JSON line each.")
    def show(folder: Path, since: datetime | None, kind: tuple[str, ...], as_json: bool) -> None:
        """Print lines, each only after it was checked; ends with an error at the first that is wrong."""
        oldest = since.replace(tzinfo=UTC).timestamp() * 1000 if since else 0
        source = find(folder)
        for line in checked_lines(source.folder, public_key=source.public_key, name=source.name):
            if milliseconds(line.at) >= oldest and (not kind or line.kind in kind):
                click.echo(msgspec.json.encode(line).decode() if as_json else line_in_words(line))

    @audit.command(epilog=f"Example: {program} audit export --out audit.jsonl")
    @where
    @click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write; must not exist.")
    def export(folder: Path, out: Path) -> None:
        """Write the whole record to one file, which anybody can verify without this machine."""
        lines = export_audit(find(folder).folder, out)
        click.echo(f"{out}: {lines} lines; to be checked with: audit verify {out}")

    return audit


def _exported(file: Path, public_key: bytes | None) -> AuditSource:
    header = open_record(file).header
    if header is None:
        raise click.UsageError(f"{file} is a folder; wanted a file made with: audit export")
    return AuditSource(file, header.name, public_key or bytes.fromhex(header.public_key))


def _words(report: AuditReport, heads: list[AuditHead], *, trusted: bool) -> list[str]:
    def each(numbers: Mapping[str, int]) -> str:
        return ", ".join(f"{name} to line {number}" for name, number in numbers.items()) or "none"

    words = [
        f"audit record of {report.name}: intact",
        f"  lines          {report.first} to {report.last}, none missing in between",
        f"  written        {time_text(report.first_at)} to {time_text(report.last_at)}",
        f"  last digest    {report.last_digest}",
        f"  signed with    {', then '.join(report.keys)}",
        f"  keeps heads    {each(report.heads_seen)}",
        f"  countersigned  {each(report.countersigned)}",
    ]
    if report.unchecked:
        words.append(
            f"  not checked    countersignatures of {', '.join(report.unchecked)}: their key is not known here"
        )
    if report.dropped:
        words.append(f"  dropped        lines 1 to {report.dropped}, after their retention time, as a line says")
    if heads:
        words.append(f"  the end        agrees with {len(heads)} heads that other parties keep of it")
    if report.unfinished:
        words.append(f"  unfinished     {report.unfinished}: being written just now, or left by a crash; not counted")
    words += [f"  CONTRADICTION  {fork}" for fork in report.forks]
    if not trusted:
        words.append("  The key was taken from the file itself: compare it with the roster, or give --public-key.")
    return [visible(word) for word in words]


def line_in_words(line: AuditLine) -> str:
    """One line of a record for a person: time, number, kind, detail."""
    detail = "  ".join(f"{key}={_value(value)}" for key, value in line.detail.items())
    return visible(f"{line.at}  {line.number:>6}  {line.kind:<20}  {detail}".rstrip())


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def visible(text: str) -> str:
    """The text with everything escaped that would not show, or would move the cursor of a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
