"""``fedseek audit``: work out again, from coins and scores, what a run's canaries say of its privacy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from fedseek.audit_picture import AuditBar, audit_picture
from fedseek.canary_record import RECORD_FILE, CanaryRecord, read_canary_record
from fedseek.dp.auditing import Guesses, bounds_of, largest_refutable
from fedseek.errors import ClaimRefuted, InvalidRecords

PICTURE_FILE: Final = "canary-audit.svg"
_CLAIM_UPHELD, _CLAIM_REFUTED, _NO_CLAIM = "not refuted", "REFUTED", "no claim"


@dataclass(frozen=True, slots=True)
class SiteAudit:
    """One site's audit, worked out again.

    Attributes:
        record: of the site.
        released_adapter: the best guesses from the released adapter, and the bound of all of them.
        every_round: the same from the sums of all rounds.
        could_refute: the bound if every guess had been right.
    """

    record: CanaryRecord
    released_adapter: tuple[Guesses, float]
    every_round: tuple[Guesses, float]
    could_refute: float

    @property
    def verdict(self) -> str:
        """Whether the claim stands, in words."""
        claim = self.record.claim
        if claim is None:
            return _NO_CLAIM
        return _CLAIM_REFUTED if max(self.released_adapter[1], self.every_round[1]) > claim else _CLAIM_UPHELD


@click.command(epilog="Example: fedseek audit runs/demo-20260726-101500")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON line on standard output.")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Where the picture goes.  [default: beside RUN's record]"
)
def audit(run: Path, as_json: bool, picture: Path | None) -> None:
    """Hold what the sites of RUN claim against their canaries.

    RUN is the folder of a simulation, the folder of a site, or a site's canary-audit.json. Lower bounds on epsilon are
    worked out from coins and scores, drawn in a picture, and held against the epsilon that each site claims. A bound below
    the claim does not prove it. Exits with 5 if a claim is refuted.
    """
    audits = [audit_record(read_canary_record(path)) for path in find_records(run)]
    drawn = picture or (run if run.is_dir() else run.parent) / PICTURE_FILE
    drawn.write_text(audit_picture(_bars(audits)), "utf-8")
    if as_json:
        click.echo(
            json.dumps({"sites": [_document(each) for each in audits], "picture": str(drawn)}, ensure_ascii=False)
        )
    else:
        _show(audits, drawn)
    refuted = [each.record.site for each in audits if each.verdict == _CLAIM_REFUTED]
    if refuted:
        raise ClaimRefuted(
            f"the canaries of {', '.join(refuted)} refute the epsilon claimed there",
            hint="do not use the adapter as private; chance alone says so in at most 1 - confidence of sound runs",
        )


def find_records(run: Path) -> list[Path]:
    """The records of a run: the file itself, the one in a site's folder, or those of all sites of a simulation.

    Raises:
        InvalidRecords: there is none.
    """
    if not run.is_dir():
        return [run]
    found = [run / RECORD_FILE] if (run / RECORD_FILE).exists() else sorted(run.glob(f"sites/*/{RECORD_FILE}"))
    if not found:
        raise InvalidRecords(
            f"{run}: no {RECORD_FILE} in it or in sites/*/",
            hint="a site writes one when its run is released, if the plan asks for canaries (audit.canaries)",
        )
    return found


def audit_record(record: CanaryRecord) -> SiteAudit:
    """Work out one site's audit."""
    coins = np.array(record.coins, dtype=np.bool_)

    def best(scores: tuple[float, ...]) -> tuple[Guesses, float]:
        told = np.array(scores, dtype=np.float64)
        ways = bounds_of(told, coins, delta=record.delta, confidence=record.confidence)
        return max(ways, key=lambda way: way[1], default=(Guesses(0, 0), 0.0))

    return SiteAudit(
        record=record,
        released_adapter=best(record.released_scores),
        every_round=best(record.round_scores),
        could_refute=largest_refutable(len(coins), delta=record.delta, confidence=record.confidence),
    )


def _document(audited: SiteAudit) -> dict[str, Any]:
    record = audited.record
    told: dict[str, Any] = {
        "run": record.run,
        "site": record.site,
        "kind": record.kind,
        "canaries": len(record.coins),
        "rounds": record.rounds,
        "claim": record.claim,
        "delta": record.delta,
        "confidence": record.confidence,
        "could_refute": audited.could_refute,
        "verdict": audited.verdict,
    }
    for name, (guesses, bound) in (
        ("released_adapter", audited.released_adapter),
        ("every_round", audited.every_round),
    ):
        told[name] = {"epsilon_lower_bound": bound, "guesses": guesses.made, "right": guesses.right}
    return told


def _show(audits: Sequence[SiteAudit], drawn: Path) -> None:
    first = audits[0].record
    title = f"epsilon at delta {first.delta:g}, lower bounds at {first.confidence:.0%} confidence"
    table = Table(title=title, title_justify="left")
    for name in ("site", "canaries", "claim", "released adapter", "every round", "could refute", "verdict"):
        left = name in ("site", "verdict")
        table.add_column(name, justify="left" if left else "right", no_wrap=name == "verdict", overflow="fold")
    for each in audits:
        claim = each.record.claim
        shown = [f"{bound:.2f}" for bound in (each.released_adapter[1], each.every_round[1], each.could_refute)]
        said = "none" if claim is None else f"{claim:.2f}"
        table.add_row(each.record.site, str(len(each.record.coins)), said, *shown, each.verdict)
    Console().print(table)
    click.echo(
        "A bound below the claim does not prove the claim; one above it refutes it. Without a claim, it is what leaks."
    )
    click.echo(f"picture {drawn}")


def _bars(audits: Sequence[SiteAudit]) -> list[AuditBar]:
    return [
        AuditBar(
            site=each.record.site,
            seen=seen,
            bound=bound,
            right=guesses.right,
            made=guesses.made,
            claim=each.record.claim,
            could_refute=each.could_refute,
        )
        for each in audits
        for seen, (guesses, bound) in (("released adapter", each.released_adapter), ("every round", each.every_round))
    ]
