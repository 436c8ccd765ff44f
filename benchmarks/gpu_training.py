"""What privacy and both locks cost on an accelerator: plain LoRA, DP-LoRA, and DP-LoRA in a round with both locks.

A Qwen2 model of random weights, built on the device from its config (nothing is downloaded), all linear layers adapted
at rank 16. Training goes through `fedseek.train.train_round`, the round through `simulations.protocol.run_round`: the
code that sites run. Plain and private steps are taken in turns. The first step of a turn, which holds its set-up, is left out.

Model FLOPs utilisation counts what the mathematics needs, each multiply-add as 2, nothing that is computed twice:

    2 N          a token forward through the N values of the linear layers, and of the head of words
  + 2 N          backward through the same: they are frozen, so no gradient of a weight is taken
  + 6 n          the n values of the adapter: forward, backward, gradient of the weight
  + 6 L T A      attention over T tokens in L layers of A = heads * head size, half of it masked away (causal)

Example:
    python benchmarks/gpu_training.py --config 7b --json 7b.json
    python benchmarks/gpu_training.py --config tiny --sequence 32 --steps 2 --device cpu
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from locks_of_round import PROTECT, RECEIVE, SITES, measure_locks
from transformers import AutoModelForCausalLM, Qwen2Config

from fedseek.dp.accounting import PrivacyParams
from fedseek.dp.noise import SecretGaussian
from fedseek.lora.compute import choose_device
from fedseek.lora.model import AdapterModel, LoraParams, build_model
from fedseek.records import TokenisedRecords
from fedseek.train import train_round
from fedseek.train_settings import TrainingSettings

RANK = 16
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WANTED_RATIO, WANTED_LOCKS = 0.85, 0.02
STEPS_IN_A_TURN = 2

# Shapes as in the config.json of Qwen2-1.5B and Qwen2-7B.
CONFIGS: dict[str, dict[str, Any]] = {
    "1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}

# TFLOPS of dense bfloat16 tensor cores, from NVIDIA's data sheets; where a sheet gives the figure with sparsity, half of it.
PEAK_TFLOPS = {
    "H200": 989.5,  # "H200 Tensor Core GPU", 2024: 1,979 with sparsity
    "H100 NVL": 835.5,  # "H100 Tensor Core GPU", 2024: 1,671 with sparsity
    "H100 PCIe": 756.5,  # "H100 Tensor Core GPU", 2023: 1,513 with sparsity
    "H100": 989.5,  # SXM5, the same sheet: 1,979 with sparsity
    "A100": 312.0,  # "A100 Tensor Core GPU", 2021
    "L40S": 362.05,  # "L40S GPU", 2023
    "A10": 125.0,  # "A10 Tensor Core GPU", 2021
    "L4": 121.0,  # "L4 Tensor Core GPU", 2023: 242 with sparsity
}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train."""

    name: str
    private: bool
    checkpointing: bool = False


WAYS = (Way("plain LoRA", False), Way("DP-LoRA", True), Way("DP-LoRA, checkpointing", True, True))
PRIVACY = PrivacyParams(noise_multiplier=1.0, sampling_probability=1.0, delta=1e-5, l2_clip_norm=1.0)
SETTINGS = TrainingSettings(
    sampling_probability=1.0, num_steps=1, learning_rate=1e-4, head_learning_rate=1e-4, physical_batch_size=None
)


def build(config: dict[str, Any], device: torch.device, sequence: int) -> AdapterModel:
    """Random weights, made where they are to be; bfloat16 on an accelerator, the adapter in float32."""
    shape = Qwen2Config(max_position_embeddings=max(sequence, 128), **config)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    lora = LoraParams(method="both", rank=RANK, alpha=32.0, target_modules=LINEARS, layers=None, seed=0)
    return build_model(base, lora, num_labels=None, head_seed=0)


def make_records(number: int, sequence: int, vocabulary: int) -> TokenisedRecords:
    """Records of one length, every token counted but the first: no time goes into padding."""
    rng = np.random.default_rng(0)
    counted = np.arange(sequence) > 0
    return TokenisedRecords(
        input_ids=list(rng.integers(1, vocabulary, size=(number, sequence), dtype=np.int32)),
        labels=np.zeros(number, dtype=np.int64),
        units=np.arange(number),
        counted=[counted] * number,
    )


def flops_a_token(model: AdapterModel, sequence: int) -> float:
    """Model FLOPs of a training step, a token; the formula is at the top."""
    config = model.encoder.get_base_model().config
    frozen = sum(p.numel() for name, p in model.encoder.named_parameters() if "proj" in name and "lora_" not in name)
    frozen += config.vocab_size * config.hidden_size
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    heads = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    return 4 * frozen + 6 * adapter + 6 * config.num_hidden_layers * sequence * heads


def peak_flops(device_name: str) -> float | None:
    """Of the device, dense bfloat16; None where no sheet is known."""
    words = set(device_name.replace("-", " ").split())
    known = [tflops for name, tflops in PEAK_TFLOPS.items() if words.issuperset(name.split())]
    return known[0] * 1e12 if known else None


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def checkpointed(model: AdapterModel, on: bool) -> Iterator[None]:
    """With activations computed again in the backward pass, reentrant: the only kind that per-record gradients survive."""
    base = model.encoder.get_base_model()
    if on:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        base.enable_input_require_grads()
    try:
        yield
    finally:
        if on:
            base.gradient_checkpointing_disable()
            base.disable_input_require_grads()


def take_steps(model: AdapterModel, records: TokenisedRecords, way: Way, *, steps: int) -> tuple[list[float], int]:
    """Seconds of each step of a short round after its first, and the records that were on the device at once."""
    device, ticks = next(model.parameters()).device, list[float]()

    def tick(step: int, of: int) -> None:
        wait(device)
        ticks.append(time.perf_counter())

    with checkpointed(model, way.checkpointing):
        outcome = train_round(
            model,
            records,
            settings=replace(SETTINGS, num_steps=steps + 1),
            privacy=PRIVACY if way.private else None,
            on_step=tick,
        )
    return [later - now for now, later in itertools.pairwise(ticks)], outcome.physical_batch_size


@dataclass(frozen=True, slots=True)
class Trained:
    """What one way came to."""

    way: str
    physical_batch: int
    step_s: float
    tokens_per_s: float
    peak_gb: float
    mfu: float | None


def measure_ways(
    model: AdapterModel, records: TokenisedRecords, ways: tuple[Way, ...], *, steps: int, seconds: float
) -> list[Trained]:
    """All ways in turns, until each has taken ``steps`` steps or the time is up."""
    device, sequence = next(model.parameters()).device, len(records.input_ids[0])
    taken: dict[Way, list[float]] = {way: [] for way in ways}
    batches: dict[Way, int] = {}
    peaks: dict[Way, int] = defaultdict(int)
    began = time.perf_counter()
    while len(taken[ways[0]]) < steps and (not batches or time.perf_counter() - began < seconds):
        for way in ways:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            seen, batches[way] = take_steps(model, records, way, steps=min(steps, STEPS_IN_A_TURN))
            taken[way] += seen
            peaks[way] = max(peaks[way], peak_bytes(device))
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    tokens = sum(len(row) for row in records.input_ids)
    trained = []
    for way in ways:
        step = statistics.median(taken[way])
        mfu = None if peak is None else tokens / step * flops_a_token(model, sequence) / peak
        trained.append(Trained(way.name, batches[way], step, tokens / step, peaks[way] / 2**30, mfu))
    return trained


def noise_seconds(num_values: int) -> float:
    """What the noise of one step takes on the CPU, by as many threads as torch has."""
    began = time.perf_counter()
    SecretGaussian().normal(torch.Size([num_values]), 1.0)
    return time.perf_counter() - began


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the options ask for; what is done is kept, should the time run out over the rest."""
    device, config = choose_device(arguments.device), CONFIGS[arguments.config]
    model = build(config, device, arguments.sequence)
    records = make_records(arguments.records, arguments.sequence, config["vocab_size"])
    ways = WAYS if arguments.checkpointing else WAYS[:2]
    trained = measure_ways(model, records, ways, steps=arguments.steps, seconds=arguments.seconds)
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result: dict[str, Any] = {
        "config": arguments.config,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "sequence": arguments.sequence,
        "records_a_step": arguments.records,
        "values": values,
        "model_values": sum(p.numel() for p in model.parameters()),
        "flops_a_token": flops_a_token(model, arguments.sequence),
        "ways": [asdict(each) for each in trained],
        "noise_s": noise_seconds(values),
    }
    keep(result, arguments.json)
    del model
    plain, private = trained[0], min(trained[1:], key=lambda each: each.step_s)
    result |= of_round(arguments, plain, private, measure_locks(values))
    keep(result, arguments.json)
    return result


def of_round(
    arguments: argparse.Namespace, plain: Trained, private: Trained, locks: dict[str, float]
) -> dict[str, Any]:
    """What a round of so many steps takes, locks and all."""
    training, protect = arguments.round_steps * private.step_s, sum(locks[stage] for stage in PROTECT + RECEIVE)
    tokens = arguments.round_steps * arguments.records * arguments.sequence
    return {
        "dp_over_plain": private.tokens_per_s / plain.tokens_per_s,
        "locks_s": locks,
        "lock_s_a_site": protect,
        "round_steps": arguments.round_steps,
        "lock_share": protect / (training + protect),
        "tokens_per_s_with_locks": tokens / (training + protect),
        "steps_for_wanted_share": protect * (1 - WANTED_LOCKS) / WANTED_LOCKS / private.step_s,
        "round_s": SITES * training + locks["whole"],
    }


def keep(result: dict[str, Any], path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def show(result: dict[str, Any]) -> str:
    """A section for benchmarks/results: tables in Markdown."""
    lines = [
        f"## Qwen2 {result['config']} on {result['device']}, sequence {result['sequence']}, rank {RANK}, all linears",
        "",
        f"torch {result['torch']}, {result['threads']} CPU threads; {result['values']:,} of {result['model_values']:,} values "
        f"trained; {result['records_a_step']} records a step, {result['flops_a_token'] / 1e9:.2f} GFLOP a token.",
        "",
        "| Way | records at once | step, s | tokens/s | peak memory, GB | MFU |",
        "|---|---|---|---|---|---|",
    ]
    for way in result["ways"]:
        mfu = "-" if way["mfu"] is None else f"{way['mfu']:.1%}"
        lines.append(
            f"| {way['way']} | {way['physical_batch']} | {way['step_s']:.3f} | {way['tokens_per_s']:,.0f} | "
            f"{way['peak_gb']:.1f} | {mfu} |"
        )
    lines += [
        f"| DP-LoRA + both locks, {result['round_steps']} steps a round | | | {result['tokens_per_s_with_locks']:,.0f} | | |",
        "",
        f"DP over plain, tokens/s: {result['dp_over_plain']:.3f} (wanted: {WANTED_RATIO} or more). Locks: "
        f"{result['lock_share']:.1%} of a round of {result['round_steps']} steps (wanted: {WANTED_LOCKS:.0%} or less, "
        f"which takes {result['steps_for_wanted_share']:.0f} steps).",
        "",
        f"A round of {SITES} sites one after another on this machine, {result['round_steps']} steps each (the median "
        f"step times their number), with all of the protocol: {result['round_s']:.1f} s.",
    ]
    stages = " | ".join(f"{stage}" for stage in result["locks_s"])
    seconds = " | ".join(f"{value:.2f}" for value in result["locks_s"].values())
    lines += [
        "",
        f"Noise of a step, on the CPU: {result['noise_s']:.2f} s, which is in the step. Seconds of the locks, wall, a site each; "
        f"`add` is the coordinator's a site, `unmask` its own, `whole` all of it for {SITES} sites:",
        "",
        f"| {stages} |",
        "|" + "---|" * len(result["locks_s"]),
        f"| {seconds} |",
    ]
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tokens a second, memory and FLOPs utilisation of plain LoRA, DP-LoRA and DP-LoRA with both locks.",
        epilog="example: python benchmarks/gpu_training.py --config 1.5b --json 1.5b.json",
    )
    parser.add_argument("--config", choices=CONFIGS, default="1.5b", help="size of the model (default: %(default)s)")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of a record (default: %(default)s)")
    parser.add_argument("--records", type=int, default=32, help="records of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps measured of each way (default: %(default)s)")
    parser.add_argument(
        "--round-steps", type=int, default=100, help="steps of a round at a site (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=240, help="no new turn after so many (default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="measure DP-LoRA with gradient checkpointing too")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="", help="write the result there; without FILE, print it"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.sequence - 1, arguments.records, arguments.steps, arguments.round_steps) < 1:
        parser.error("wanted --sequence of at least 2, --records, --steps and --round-steps of at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    result = measure(arguments)
    print(json.dumps(result) if arguments.json == "" else show(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
