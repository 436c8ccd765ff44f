"""What this site computes on: ``[compute]`` of site.toml against the machine, and the model of each of its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedseek.errors import InvalidConfig
from fedseek.lora.compute import Compute, choose_device, choose_dtype, devices_there, quantisation
from fedseek.lora.load import load_base
from fedseek.lora.model import AdapterModel
from fedseek.lora.source import locate_model
from fedseek.plan import plan_from_canonical
from fedseek.prepare import prepare_model
from fedseek_site.config import ComputeSettings


def computes_of(settings: ComputeSettings) -> tuple[Compute, ...]:
    """What each process of the site computes on, one a GPU; that of the site service itself first.

    Raises:
        InvalidConfig: the machine has not what is asked for; says what it has.
    """
    device = choose_device(settings.device)
    first = Compute(
        device=str(device),
        dtype=settings.dtype,
        quantise=None if settings.quantise == "none" else settings.quantise,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    quantisation(first, device)  # refused now, and not when a run begins
    there = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    number = there if settings.gpus == "all" else settings.gpus
    if number > there:
        raise InvalidConfig(
            [f"gpus = {number}, and device {settings.device!r} is {there}"],
            source="site.toml, [compute]",
            hint=f'there is {", ".join(devices_there())}; several GPUs want device "auto" or "cuda", gpus = "all" takes each',
        )
    return tuple(replace(first, device=f"cuda:{rank}") for rank in range(number)) if number > 1 else (first,)


def describe(computes: Sequence[Compute]) -> dict[str, Any]:
    """For the site's own report."""
    first = computes[0]
    device = torch.device(first.device)
    return {
        "event": "compute",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(choose_dtype(first, device)).removeprefix("torch."),
        "quantise": first.quantise or "none",
        "gradient_checkpointing": first.gradient_checkpointing,
        "processes": len(computes),
        "threads": torch.get_num_threads(),
    }


def site_model(plan: bytes, kind: str, computes: Sequence[Compute], rank: int) -> AdapterModel:
    """The model of process ``rank``, on its own device, at its first values; a function for `fedseek.several`.

    Raises:
        WrongModel: the base model is not there, or not one for this plan.
    """
    checked, compute = plan_from_canonical(plan), computes[rank]
    if compute.device.startswith("cuda:"):
        torch.cuda.set_device(compute.device)  # what asks for "cuda" gets this one, not the first
    folder = locate_model(checked.spec.model.source)
    return prepare_model(checked, kind, load_base(folder, words=checked.writes(kind), compute=compute))
