"""Held-out perplexity of a small language model: federated, each site alone, at epsilon 8, and LoRA against all weights.

The sites, the stages, the adapter and the small model are those of simulations/scenarios/instruct.toml and, at epsilon 8, of
instruct_private.toml (MedQuAD at two hospitals, TAT-QA at two banks); seeds change the order of the data. Learning rates of
LoRA and of full fine-tuning are tuned on the first seed, each by itself, on the same held-back rows that are reported. Every
figure goes to a JSON-lines file as soon as it is there, so that the work can be cut at any moment. Ends in status 1 if a target
is missed, in 2 where the public data sets are missing.

Example:
    python benchmarks/language_model.py --work /tmp/language --workers 2 --picture language.png
    python benchmarks/language_model.py --quick --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from language_figures import draw, summarise, table
from rich.console import Console

from fedseek.errors import FedseekError
from simulations.scenario import Scenario, data_folder, load_scenario

SCENARIOS = Path(__file__).parents[1] / "simulations" / "scenarios"
OPEN, PRIVATE = SCENARIOS / "instruct.toml", SCENARIOS / "instruct_private.toml"  # of one and the same small model
FEDERATED, LOCAL_ONLY, LORA, FULL = "federated", "local_only", "lora", "full"
SEEDS = 3
RATES = {LORA: (0.0045, 0.0065, 0.009), FULL: (0.00009, 0.000125, 0.00018)}
Figure = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One way, once; ``rate`` is the learning rate of LORA and FULL, 0 for the plan's."""

    way: str
    seed: int
    private: bool = False
    rate: float = 0.0


def measure(job: Job, named: dict[str, str], *, quick: bool) -> Figure:
    """Train one way once, and say how good it is at each site."""
    import torch
    from language_ways import federated, local_only, plan_with, pooled, read_sites

    torch.set_num_threads(1)  # the workers share the machine
    scenario = load_scenario(PRIVATE if job.private else OPEN, model=named)
    plan = plan_with(scenario, **_changes(job, scenario, quick=quick))
    sites = read_sites(scenario, plan)
    if job.way in (LORA, FULL):
        found = pooled(plan, sites, seed=job.seed, full=job.way == FULL)
    else:
        found = (federated if job.way == FEDERATED else local_only)(plan, sites, seed=job.seed)
    return {**asdict(job), **asdict(found), "epsilon": plan.spec.privacy.epsilon or 0.0, "plan": plan.digest}


def _changes(job: Job, scenario: Scenario, *, quick: bool) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {"training": {}}
    if job.rate:  # full fine-tuning has its own rate, told to a plan that is LoRA's in all else
        changes["training"]["learning_rate"] = job.rate
    if job.way in (LORA, FULL):  # as many steps as both stages of the other ways
        steps = scenario.plan.total_steps
        changes["training"] |= {"rounds": 1, "steps_per_round": steps}
    if quick:
        changes["training"] |= {"rounds": 1, "steps_per_round": 1}
        changes["domain"] = {"rounds": 1, "steps_per_round": 1}
    return changes


def queue(found: Sequence[Figure], *, seeds: int) -> list[Job]:
    """What is still to be measured and can be: those of the tuned rates only once the rates are known."""
    jobs = [Job(way, 0) for way in (FEDERATED, LOCAL_ONLY)]
    jobs += [Job(way, 0, rate=rate) for way, rates in RATES.items() for rate in rates]
    jobs += [Job(way, seed) for seed in range(1, seeds) for way in (FEDERATED, LOCAL_ONLY)]
    for way, rates in RATES.items():
        tuned = {each["rate"]: each for each in found if each["way"] == way and each["seed"] == 0}
        if set(rates) <= set(tuned):
            best = min(rates, key=lambda rate: sum(tuned[rate]["after"].values()))
            jobs += [Job(way, seed, rate=best) for seed in range(1, seeds)]
    jobs += [Job(way, seed, private=True) for seed in range(seeds) for way in (FEDERATED, LOCAL_ONLY)]
    done = {Job(*(each[name] for name in Job.__dataclass_fields__)) for each in found}
    return [job for job in jobs if job not in done]


def work_off(jobs: Sequence[Job], named: dict[str, str], *, workers: int, quick: bool) -> Iterator[Figure]:
    """Measure all jobs in processes of their own; each figure as soon as it is there."""
    if workers == 1:
        yield from (measure(job, named, quick=quick) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done in as_completed([pool.submit(measure, job, named, quick=quick) for job in jobs]):
            yield done.result()


def collect(arguments: argparse.Namespace, folder: Path) -> list[Figure]:
    """All figures wanted: those in the file, and then the missing ones."""
    named = _model_of(load_scenario(OPEN))
    results = folder / f"figures-{named['sha256'][:12]}.jsonl"
    found = [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []
    while jobs := queue(found, seeds=arguments.seeds):
        for figure in work_off(jobs, named, workers=arguments.workers, quick=arguments.quick):
            with results.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(figure) + "\n")
            found.append(figure)
            mean = sum(figure["after"].values()) / len(figure["after"])
            what = f"{figure['way']}, epsilon {figure['epsilon']:g}, rate {figure['rate']:g}, seed {figure['seed']}"
            print(f"{len(found)} done: {what}: mean loss {mean:.4f}", file=sys.stderr, flush=True)
    return found


def _model_of(scenario: Scenario) -> dict[str, str]:
    from simulations.small_model import build_with_progress

    return build_with_progress(scenario, Console(stderr=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Perplexity of federated LoRA against local-only, at epsilon 8, and of LoRA against full fine-tuning.",
        epilog="example: python benchmarks/language_model.py --work /tmp/language --workers 2 --picture language.png",
    )
    parser.add_argument("--work", type=Path, help="folder that keeps figures between calls")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, choices=range(1, SEEDS + 1), default=SEEDS, help="seeds (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, help="write a PNG or SVG here")
    parser.add_argument("--quick", action="store_true", help="one step a stage, to see that it runs")
    parser.add_argument("--json", action="store_true", help="end in one JSON line")
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    if data_folder() is None:
        print("skipped: the public data sets are not here; set FEDSEEK_DATA to their folder", file=sys.stderr)
        return 2
    kept = contextlib.nullcontext(arguments.work) if arguments.work else tempfile.TemporaryDirectory()
    with kept as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            figures = summarise(collect(arguments, Path(folder)))
        except FedseekError as error:
            print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
            return 2
    if arguments.picture:
        draw(figures, arguments.picture)
    print(json.dumps(asdict(figures)) if arguments.json else table(figures))
    return int(not figures.met)


if __name__ == "__main__":
    sys.exit(main())
