"""The two files of a released adapter, as PEFT loads them, read and made without torch or PEFT.

The configuration is a function of the plan: PEFT's own carries its version and sets in no order, so that two sites would
write different bytes, and nobody could work out what it has to be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from fedseek.errors import Malformed

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
ADAPTER_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE)

Tensors = dict[str, npt.NDArray[np.float32]]

# peft's name of a tensor in a file, and the name that the model trains it under
_IN_FILE, _IN_MODEL = ".weight", ".default.weight"


def adapter_config(
    *, rank: int, alpha: float, target_modules: Sequence[str], layers: Sequence[int] | None, base_name: str
) -> bytes:
    """The bytes of ``adapter_config.json``; ``base_name`` stands for the base model's folder, which is nobody's business.

    What is left out has PEFT's default.
    """
    document = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None if layers is None else sorted(set(layers)),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(set(target_modules)),
        "task_type": "FEATURE_EXTRACTION",
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(document, ensure_ascii=False, indent=2).encode() + b"\n"


def read_adapter(data: bytes) -> Tensors:
    """The tensors of ``adapter_model.safetensors``, by PEFT's names.

    Raises:
        Malformed: not a safetensors file, or one that holds anything else than the float32 matrices of LoRA.
    """
    try:
        tensors: Tensors = load(data)
    # the first is the parser's own; the others come of a type of number that numpy has not
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise Malformed(f"{WEIGHTS_FILE} does not parse: {str(error)[:200]}") from None
    for name, value in tensors.items():
        if value.dtype != np.float32 or value.ndim != 2 or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise Malformed(
                f"{WEIGHTS_FILE}: {name!r} is {value.dtype} of shape {value.shape}, wanted a float32 LoRA matrix"
            )
    if not any(".lora_B." in name for name in tensors):
        raise Malformed(f"{WEIGHTS_FILE} holds no lora_B")
    return tensors


def trained_tensors(tensors: Mapping[str, npt.NDArray[np.float32]], *, method: str) -> Tensors:
    """Those that were trained, by the names that sites sign digests under: lora_B, and with ``both`` lora_A too."""
    return {
        f"encoder.{name.removesuffix(_IN_FILE)}{_IN_MODEL}": value
        for name, value in tensors.items()
        if ".lora_B." in name or method == "both"
    }


def largest_value(tensors: Mapping[str, npt.NDArray[np.float32]]) -> float:
    """The largest magnitude in any lora_B: 0 for an adapter that did not move, since lora_B starts at 0 (Hu et al.

    2022, arXiv:2106.09685, section 4.1); not finite if any value of the adapter is not.
    """
    if not all(np.isfinite(value).all() for value in tensors.values()):
        return float("nan")
    return max(float(np.abs(value).max(initial=0.0)) for name, value in tensors.items() if ".lora_B." in name)
