"""The folder a run leaves behind, and how its processes find what they need in it.

``runs/<scenario>-<time>/`` holds

- what was run: ``scenario.toml``, ``options.json``, ``plan.json``, and ``data/`` if it was made here;
- what happened, by who saw it: ``coordinator.jsonl``, ``sites/<name>/report.jsonl``;
- what came out: ``metrics.jsonl``, ``summary.json``, ``report.html``, ``release/`` and each site's own copy with its head
  in ``sites/<name>/release/``;
- what the libraries said, and tracebacks: ``engine.log``, ``site-host-<n>.log``.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

from simulations.scenario import Scenario, load_scenario
from simulations.synthetic import write_demo_data


def create_run_folder(scenario_file: Path, scenario: Scenario, out: Path, *, rounds: int | None) -> Path:
    """Make a new run folder under ``out`` with everything the engine reads; never reuses one."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = out / f"{scenario.name}-{stamp}"
    number = 1
    while folder.exists():
        number += 1
        folder = out / f"{scenario.name}-{stamp}-{number}"
    folder.mkdir(parents=True)
    shutil.copyfile(scenario_file, folder / "scenario.toml")
    (folder / "options.json").write_text(json.dumps({"name": scenario.name, "rounds": rounds}), "utf-8")
    (folder / "plan.json").write_bytes(scenario.plan.canonical())
    if scenario.spec.synthetic is not None:
        made = scenario.spec.synthetic
        write_demo_data(folder / "data", seed=made.seed, records_per_site=made.records_per_site)
    return folder


def open_scenario(folder: Path) -> Scenario:
    """The scenario of a run folder, as it was when the run began; a small model is the one that its plan names."""
    options = json.loads((folder / "options.json").read_text("utf-8"))
    named = json.loads((folder / "plan.json").read_text("utf-8"))["model"]
    model = {field: named[field] for field in ("source", "sha256")}
    scenario = load_scenario(folder / "scenario.toml", rounds=options["rounds"], model=model)
    return Scenario(options["name"], scenario.spec, scenario.plan)


def synthetic_folder(folder: Path) -> Path | None:
    """Where the demo's data was written, if the scenario asked for it."""
    return folder / "data" if (folder / "data").is_dir() else None
