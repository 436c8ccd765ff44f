"""What a site computes on, and in what numbers: a matter of its machines, never of the plan."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from fedseek.errors import InvalidConfig

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how the base model is held. Adapter and heads are float32 in any case.

    Attributes:
        device: "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:<number>" or "mps".
        dtype: of the base; "auto" is bfloat16 on CUDA, float32 elsewhere. No float16: gradients underflow in it.
        quantise: the base's linear layers in 8 bits (Dettmers et al. 2022, arXiv:2208.07339, section 2, by rows and without
            its outlier columns) or 4 (NF4, Dettmers et al. 2023, arXiv:2305.14314); only on CUDA, and with bitsandbytes.
        gradient_checkpointing: compute activations a second time instead of keeping them: slower, in less memory.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantise: Literal["8bit", "4bit"] | None = None
    gradient_checkpointing: bool = False


def choose_device(asked: str = "auto") -> torch.device:
    """The device to compute on.

    Raises:
        InvalidConfig: no such device, or it is not there; says what is.
    """
    there = devices_there()
    if asked == "auto":
        return torch.device("cuda" if "cuda" in there else "mps" if "mps" in there else "cpu")
    if asked not in there:
        raise InvalidConfig(
            [f"device {asked!r} is not there"],
            source="compute",
            hint=f'there is {", ".join(there)}; "auto" takes the best of them',
        )
    return torch.device(asked)


def devices_there() -> list[str]:
    """Names of the devices of this machine that ``choose_device`` accepts."""
    numbered = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *(["cuda", *numbered] if numbered else []), *(["mps"] if torch.backends.mps.is_available() else [])]


def choose_dtype(compute: Compute, device: torch.device) -> torch.dtype:
    """Of the base model's weights."""
    if compute.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[compute.dtype]


def quantisation(compute: Compute, device: torch.device) -> Any:
    """Configuration of a quantised base for transformers; None for one that is not.

    Raises:
        InvalidConfig: there is no CUDA, or bitsandbytes is not installed.
    """
    if compute.quantise is None:
        return None
    if device.type != "cuda":
        raise InvalidConfig(
            [f"quantise {compute.quantise!r} on {device.type}, wanted a CUDA device"],
            source="compute",
            hint=f"there is {', '.join(devices_there())}; leave quantise out",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InvalidConfig(
            [f"quantise {compute.quantise!r} wants the package bitsandbytes, which is not installed"],
            source="compute",
            hint="pip install bitsandbytes, or leave quantise out",
        )
    from transformers import BitsAndBytesConfig

    if compute.quantise == "8bit":
        # The outlier columns of LLM.int8() are found over all tokens of a batch, so that a record's numbers would depend on
        # the records beside it and its gradient would not be its own. Without them each token is rounded by itself.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=choose_dtype(compute, device),
    )
