"""Fuzz for as long as there is patience: ``python tests/fuzz/long_run.py --minutes 10``.

Every target gets the same time, a few seconds in turn. Prints how many inputs were read and what was found, and adds
the smallest input of every new outcome to the corpus, which the test suite replays. Exit code 1: something was found.
"""

from __future__ import annotations

import argparse
import base64
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path

from batches import numbered_input, run_batch
from fuzz_targets import CORPUS, targets

SLICE_SECONDS = 3.0
MAX_INPUT_BYTES = 2600  # a roster of two sites still fits
MAX_FILE_BYTES = 1900  # of one target's corpus: all of them stay below 100 KB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", default=time.strftime("%Y-%m-%d %H:%M:%S"))
    options = parser.parse_args()
    next_number: Counter[str] = Counter()
    inputs: dict[str, dict[str, bytes]] = {name: {} for name in targets()}
    findings: list[str] = []
    until = time.monotonic() + 60 * options.minutes
    while time.monotonic() < until:
        for name in targets():
            batch = run_batch(name, options.seed, next_number[name], count=1 << 40, seconds=SLICE_SECONDS)
            next_number[name] += batch.done
            if batch.finding:
                findings.append(batch.finding)
                say(f"FOUND {batch.finding}")
            for told, (_, number) in batch.outcomes.items():
                data = numbered_input(name, options.seed, number)
                if told not in inputs[name] or len(data) < len(inputs[name][told]):
                    inputs[name][told] = data
    for name, by_outcome in inputs.items():
        add_to_corpus(name, by_outcome)
        say(f"{name}: {next_number[name]} inputs, {len(by_outcome)} outcomes")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    say(f"seed {options.seed!r}: {next_number.total()} inputs, {len(findings)} findings, {peak} MiB at most")
    return 1 if findings else 0


def add_to_corpus(name: str, by_outcome: dict[str, bytes], folder: Path = CORPUS) -> None:
    """The smallest input of each outcome, small ones first, as long as there is room."""
    path = folder / f"{name}.json"
    cases = json.loads(path.read_text("utf-8")) if path.exists() else []
    known = {case["outcome"] for case in cases}
    for told, data in sorted(by_outcome.items(), key=lambda item: len(item[1])):
        case = {"outcome": told, "input": base64.b64encode(data).decode()}
        fits = len(json.dumps([*cases, case])) <= MAX_FILE_BYTES
        if told not in known and len(data) <= MAX_INPUT_BYTES and fits:
            cases.append(case)
    rows = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    path.write_text(f"[\n{rows}\n]\n" if cases else "[]\n", "utf-8")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
