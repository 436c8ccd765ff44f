"""Site daemons whose trainer does nothing, several in one process: what is left of a round is the product's own work.

    python benchmarks/resting_sites.py SITE_FOLDER...

Everything but training is real: policy, journal, audit chain, masks, encryption, sockets, a courier for each site. An
update is a vector of noise drawn once. Torch is loaded once, so many sites fit a small machine.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fedseek.apply import ScopeState
from fedseek.daemon.process import only_one, start_log, stop_on_signals
from fedseek.daemon.supervise import die_with_parent, supervise
from fedseek.evaluate import Evaluation

_UPDATES: dict[tuple[str, str, int], Any] = {}


def train_nothing(run: Any, state: Any, scopes: Mapping[str, ScopeState], *, number: int) -> Any:
    """In place of ``fedseek_site.training.train``: the same update every round, of the size that a real one has."""
    from fedseek_site.training import LocalWork

    updates = {}
    for scope in run.shared:
        key = (run.me, scope, run.layouts[scope].num_values)
        if key not in _UPDATES:
            _UPDATES[key] = np.random.default_rng().standard_normal(key[2], dtype=np.float32) * np.float32(1e-3)
        updates[scope] = _UPDATES[key]
    stage = run.plan.stage_of(number)
    steps = tuple(
        done + (stage.steps_per_round if index == stage.index else 0) for index, done in enumerate(state.steps_done)
    )
    return LocalWork(scopes, updates, steps, state.steps_accounted, state.guards_passed)


def evaluate_nothing(run: Any, scopes: Mapping[str, ScopeState], *, number: int) -> Evaluation:
    """In place of ``fedseek_site.training.evaluate_weights``."""
    run.observe({"event": "utility", "round": number, "utility": 0.0, "loss": 0.0})
    return Evaluation(loss_sum=0.0, correct=0, count=len(run.held_back_in(number + 1)))


def rest() -> None:
    """Put both in the place of the real ones, in this process."""
    from fedseek_site import releasing, rounds

    rounds.train = train_nothing
    rounds.evaluate_weights = releasing.evaluate_weights = evaluate_nothing


def serve(folders: list[Path], stop: threading.Event) -> None:
    """Serve every site until ``stop`` is set."""
    from fedseek_site.config import load_config
    from fedseek_site.courier import courier
    from fedseek_site.daemon import Paths, courier_settings, serving
    from fedseek_site.enrol import open_site

    with ExitStack() as closing:
        for folder in folders:
            closing.enter_context(only_one(folder))
            site, paths = open_site(folder), Paths(folder)
            closing.enter_context(serving(site, load_config(folder), paths, lambda: None))
            child = courier(courier_settings(site, paths), log_file=folder / "courier.log")
            keeper = threading.Thread(target=supervise, args=(child, stop), name=f"courier-{folder.name}")
            keeper.start()
            closing.callback(keeper.join)
        stop.wait()


if __name__ == "__main__":
    die_with_parent()
    stop = stop_on_signals()
    start_log()
    rest()
    serve([Path(argument) for argument in sys.argv[1:]], stop)
