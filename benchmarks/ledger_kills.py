"""Kill a process that spends from a privacy ledger, with SIGKILL, at random points, again and again.

A child opens the ledger, reads data that has grown since, admits a run, spends round after round, and says so on a pipe
after each; then it is killed, and another one goes on from the first round that was not confirmed, as a site does. After
each kill the file is read anew. Wanted: every confirmed spend is there, once, in the place it was confirmed for; no round
is there twice; of those not confirmed at most one a kill is there; the chain is whole.

Children are forked from a parent that has loaded everything, so that a kill falls into the ledger's own work and not
into imports. A kill leaves what was written in the system's cache: this shows crashes of the process, not of the power,
for which the ledger relies on SQLite's synchronous=EXTRA.

Example:
    python benchmarks/ledger_kills.py --trials 1000
    python benchmarks/ledger_kills.py --trials 25 --seed 7 --json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fedseek.dp.accounting import PrivacyParams
from fedseek.identity.vault import StorageKey
from fedseek_site.ledger import Ledger, read_ledger
from fedseek_site.ledger_entries import DataTaken, Mechanism, Noted, Reserved, Spent

PARAMS = PrivacyParams(noise_multiplier=1.1, sampling_probability=0.15, delta=1e-5, l2_clip_norm=1.0)
STEPS = 5
ROUNDS_A_RUN = 40
TRIALS_A_LEDGER = 40  # then a new one: what is checked after each kill is the whole file
CONFIRMATION = struct.Struct(">II32s")  # round over all runs, number and digest of its entry


@dataclass(frozen=True)
class Rows:
    """Records as a ledger looks at them."""

    texts: tuple[str, ...]
    units: tuple[str, ...]
    unit_column: str | None = "customer"
    dialogues: tuple[()] = ()


@dataclass
class Tally:
    """What was seen over all trials."""

    trials: int = 0
    confirmed: int = 0
    entered_unconfirmed: int = 0
    retried: int = 0
    before_any: int = 0
    lost: int = 0
    doubled: int = 0
    moved: int = 0
    seconds: float = 0.0


def spend_until_killed(path: Path, key: StorageKey, trial: int, first: int, pipe: int) -> None:
    """The child: from round ``first`` on, counted over all runs."""
    ledger = Ledger(path, key, dataset="账户")
    units = tuple(f"客{number}" for number in range(20 + trial))
    ledger.take_data(Rows(texts=tuple(f"转账 {unit}" for unit in units), units=units))
    number = first
    while True:
        run = f"run-{number // ROUNDS_A_RUN}"
        ledger.reserve(run, [(Mechanism.of(PARAMS), ROUNDS_A_RUN * STEPS)], plan="ab" * 32, unit="customer")
        ledger.end_earlier(run)
        entered = ledger.spend(run, number % ROUNDS_A_RUN, PARAMS, STEPS)
        os.write(pipe, CONFIRMATION.pack(number, entered.number, entered.digest))
        number += 1


def play(path: Path, key: StorageKey, trial: int, first: int, seconds: float) -> list[tuple[int, int, bytes]]:
    """One trial: what the child confirmed before it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            spend_until_killed(path, key, trial, first, writing)
        finally:
            os._exit(1)  # the ledger refused: seen below as a child that was not killed
    os.close(writing)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    told = b""
    while piece := os.read(reading, 1 << 16):
        told += piece
    os.close(reading)
    if not os.WIFSIGNALED(status):
        raise SystemExit(f"trial {trial}: the child ended by itself with status {status}; it should spend until killed")
    return list(CONFIRMATION.iter_unpack(told))


def check(entries: list[Noted], confirmed: dict[int, tuple[int, bytes]], tally: Tally) -> int:
    """Compare the file with what was confirmed; the number of rounds in it."""
    rounds = Counter(
        int(noted.entry.run.removeprefix("run-")) * ROUNDS_A_RUN + noted.entry.round
        for noted in entries
        if isinstance(noted.entry, Spent)
    )
    admitted = Counter(noted.entry.run for noted in entries if isinstance(noted.entry, Reserved))
    read = Counter(noted.entry.fingerprint for noted in entries if isinstance(noted.entry, DataTaken))
    tally.lost += sum(number not in rounds for number in confirmed)
    tally.doubled += sum(count > 1 for counted in (rounds, admitted, read) for count in counted.values())
    tally.moved += sum(
        number > len(entries) or entries[number - 1].digest != digest for number, digest in confirmed.values()
    )
    return len(rounds)


def measure(trials: int, *, seed: int, longest: float) -> Tally:
    """Play the trials; ``longest`` in seconds is the latest moment of a kill after the child was made."""
    chance, tally = random.Random(seed), Tally()
    began = time.perf_counter()
    key = StorageKey.generate()
    with tempfile.TemporaryDirectory() as scratch:
        for trial in range(trials):
            number, turn = divmod(trial, TRIALS_A_LEDGER)
            path = Path(scratch) / f"ledger-{number}.sqlite3"
            if not turn:
                confirmed: dict[int, tuple[int, bytes]] = {}
                entered = surplus = 0
            told = play(path, key, turn, len(confirmed), chance.uniform(0, longest))
            tally.trials += 1
            tally.before_any += not told
            confirmed |= {each: (place, digest) for each, place, digest in told}
            tally.confirmed += len(told)
            tally.retried += bool(told) and told[0][0] < entered  # it was on the disk, and not confirmed
            entered = check(read_ledger(path), confirmed, tally)
            surplus, unconfirmed = entered - len(confirmed), 0 if told else surplus
            if surplus not in (0, 1):
                raise SystemExit(
                    f"trial {trial}: {surplus} rounds in the ledger that were not confirmed, wanted 0 or 1"
                )
            tally.entered_unconfirmed += surplus - unconfirmed  # one that an earlier kill left is not counted again
    tally.seconds = time.perf_counter() - began
    return tally


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=0.15, help="Latest moment of a kill; seconds.")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    tally = measure(asked.trials, seed=asked.seed, longest=asked.longest)
    figures = vars(tally)
    if asked.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<22}{value:.1f}" if isinstance(value, float) else f"{name:<22}{value}")
    return int(bool(tally.lost or tally.doubled or tally.moved))


if __name__ == "__main__":
    sys.exit(main())
