"""Time of a DP-LoRA step against a plain LoRA step on a causal language model: one process, short rounds in turn.

The model is a Qwen2 of 50 million parameters from its config, weights random, with LoRA of rank 16 on every linear layer;
both of its matrices are trained. The batch has 8 records of 128 tokens, of which the last half count. Both kinds of step go
through `fedseek.train.train_round`; what is timed is a step, without the set-up of its round. The ratio is the median over
turns of CPU seconds of the private steps over those of the plain steps of the same turn, so that other work on the machine
shows little in it.

Example:
    python benchmarks/language_step.py --turns 20 --threads 1
    python benchmarks/language_step.py --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fedseek.dp.accounting import PrivacyParams
from fedseek.lora.model import AdapterModel, LoraParams, build_model
from fedseek.records import TokenisedRecords
from fedseek.train import train_round
from fedseek.train_settings import TrainingSettings

TARGET = 1.2
STEPS_IN_A_TURN = 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PRIVACY = PrivacyParams(noise_multiplier=1.0, sampling_probability=1.0, delta=1e-5, l2_clip_norm=1.0)


@dataclass(frozen=True, slots=True)
class Size:
    """Of the model, its adapter and the batch; the defaults are those of the figure."""

    hidden: int = 512
    layers: int = 12
    intermediate: int = 1408
    vocabulary: int = 32_000
    rank: int = 16
    records: int = 8
    tokens: int = 128


def causal_model(size: Size) -> AdapterModel:
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    lora = LoraParams(method="both", rank=size.rank, alpha=2.0 * size.rank, target_modules=TARGETS, layers=None, seed=0)
    return build_model(Qwen2ForCausalLM(config), lora, num_labels=None, head_seed=0)


def synthetic_records(size: Size) -> TokenisedRecords:
    rng = np.random.default_rng(0)
    return TokenisedRecords(
        input_ids=list(rng.integers(3, size.vocabulary, size=(size.records, size.tokens), dtype=np.int32)),
        labels=np.zeros(size.records, dtype=np.int64),
        units=np.arange(size.records),
        counted=[np.arange(size.tokens) >= size.tokens // 2] * size.records,
    )


def time_steps(model: AdapterModel, records: TokenisedRecords, privacy: PrivacyParams | None) -> tuple[float, float]:
    """Mean wall and CPU seconds of a step of a short round; the first step holds the set-up of the round and is left out."""
    settings = TrainingSettings(
        sampling_probability=1.0,
        num_steps=STEPS_IN_A_TURN + 1,
        learning_rate=1e-4,
        head_learning_rate=1e-4,
        physical_batch_size=len(records),
    )
    ticks: list[tuple[float, float]] = []

    def tick(step: int, of: int) -> None:
        ticks.append((time.perf_counter(), time.process_time()))

    train_round(model, records, settings=settings, privacy=privacy, on_step=tick)
    steps = [(later[0] - now[0], later[1] - now[1]) for now, later in itertools.pairwise(ticks)]
    return statistics.mean(wall for wall, _ in steps), statistics.mean(cpu for _, cpu in steps)


def measure(turns: int, size: Size) -> dict[str, Any]:
    model, records = causal_model(size), synthetic_records(size)
    for warm in (None, PRIVACY):
        time_steps(model, records, warm)
    plain, private = [], []
    for _ in range(turns):
        plain.append(time_steps(model, records, None))
        private.append(time_steps(model, records, PRIVACY))
    ratios = [[ours[clock] / theirs[clock] for ours, theirs in zip(private, plain, strict=True)] for clock in (0, 1)]
    plain_wall, private_wall = (statistics.median(wall for wall, _ in steps) for steps in (plain, private))
    trained = [tensor.numel() for tensor in model.parameters() if tensor.requires_grad]
    num_tokens = size.records * size.tokens
    return {
        "dp_over_plain": round(statistics.median(ratios[1]), 3),
        "dp_over_plain_wall": round(statistics.median(ratios[0]), 3),
        "dp_over_plain_quartiles": [round(q, 3) for q in statistics.quantiles(ratios[1], n=4)][::2],
        "plain_tokens_per_s": round(num_tokens / plain_wall, 1),
        "dp_tokens_per_s": round(num_tokens / private_wall, 1),
        "parameters": sum(tensor.numel() for tensor in model.parameters()) - sum(trained),
        "trained_values": sum(trained),
        "records": size.records,
        "tokens": size.tokens,
        "rank": size.rank,
        "turns": turns,
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time a DP-LoRA step against a plain LoRA step (Qwen2 of 50 million parameters, 8 x 128 tokens).",
        epilog="example: python benchmarks/language_step.py --turns 20 --threads 1 --json",
    )
    parser.add_argument("--turns", type=int, default=12, help="rounds of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--rank", type=int, default=Size().rank, help="of the adapter (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tiny = Size(hidden=32, layers=2, intermediate=64, vocabulary=300, rank=2, records=4, tokens=8)
    result = measure(args.turns, tiny if args.tiny else Size(rank=args.rank))
    if args.json:
        print(json.dumps(result))
    else:
        print(f"plain LoRA step: {result['plain_tokens_per_s']} tokens/s")
        print(f"DP-LoRA step:    {result['dp_tokens_per_s']} tokens/s")
        print(
            f"time of DP over plain: {result['dp_over_plain']} (target: at most {TARGET}), {result['threads']} threads"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
