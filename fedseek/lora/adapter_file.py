"""The two files of a released adapter, as PEFT loads them, read and made without torch or PEFT.

The configuration is a function of the plan: PEFT's own carries its version and sets in no order, so that two sites would
write different bytes, and nobody could work out what it has to be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from fedseek.errors import Malformed
from fedseek.lora.initial import first_values
from fedseek.lora.methods import PROMPTS, parts_trained

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
ADAPTER_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE)

Tensors = dict[str, npt.NDArray[np.float32]]

_VECTORS: Final = "prompt_embeddings"  # peft's name of a prefix or prompt in a file
_VECTORS_IN_MODEL: Final = "prompt_encoder.default.embedding.weight"
_MATRICES: Final = (".lora_A.weight", ".lora_B.weight")
# where peft puts a model's layers: those of an inner model by itself, and those of one inside a causal language model
_INNER, _CAUSAL = "base_model.model.", "base_model.model.model."


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """What an adapter is, as far as its files tell.

    Attributes:
        method: ``lora.method`` of the plan.
        rank, alpha, rank_stabilised, target_modules, layers: of LoRA.
        virtual_tokens: of a prefix or prompt.
        words: whether any kind of the plan learns words: the adapter is then one for a causal language model.
        base_name: stands for the base model's folder, which is nobody's business.
    """

    method: str
    rank: int
    alpha: float
    rank_stabilised: bool
    target_modules: tuple[str, ...]
    layers: tuple[int, ...] | None
    virtual_tokens: int
    words: bool
    base_name: str


def adapter_config(form: AdapterForm) -> bytes:
    """The bytes of ``adapter_config.json``. What is left out has PEFT's default, or follows from the base model."""
    document: dict[str, Any] = {
        "base_model_name_or_path": form.base_name,
        "inference_mode": True,
        "task_type": "CAUSAL_LM" if form.words else "FEATURE_EXTRACTION",
    }
    document |= _vectors_config(form) if form.method in PROMPTS else _matrices_config(form)
    return json.dumps(document, ensure_ascii=False, indent=2, sort_keys=True).encode() + b"\n"


def _vectors_config(form: AdapterForm) -> dict[str, Any]:
    peft_type = "PREFIX_TUNING" if form.method == "prefix" else "PROMPT_TUNING"
    return {"num_virtual_tokens": form.virtual_tokens, "peft_type": peft_type}


def _matrices_config(form: AdapterForm) -> dict[str, Any]:
    return {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None if form.layers is None else sorted(set(form.layers)),
        "lora_alpha": form.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": form.rank,
        "target_modules": sorted(set(form.target_modules)),
        "use_dora": False,
        "use_rslora": form.rank_stabilised,
    }


def name_in_file(name: str, *, words: bool) -> str:
    """What a tensor of the inner model's adapter, by PEFT's name, is called in the file."""
    inner = name.removeprefix(_INNER)
    return f"{_CAUSAL}{inner}" if words and inner != name else name


def read_adapter(data: bytes) -> Tensors:
    """The tensors of ``adapter_model.safetensors``, by PEFT's names.

    Raises:
        Malformed: not a safetensors file, or one that holds anything else than LoRA's float32 matrices or a prompt's
            vectors.
    """
    try:
        tensors: Tensors = load(data)
    # the first is the parser's own; the others come of a type of number that numpy has not
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise Malformed(f"{WEIGHTS_FILE} does not parse: {str(error)[:200]}") from None
    for name, value in tensors.items():
        if value.dtype != np.float32 or value.ndim != 2 or not (name == _VECTORS or name.endswith(_MATRICES)):
            raise Malformed(
                f"{WEIGHTS_FILE}: {name!r} is {value.dtype} of shape {value.shape}, wanted float32 matrices of an adapter"
            )
    if list(tensors) != [_VECTORS] and (_VECTORS in tensors or not any(".lora_B." in name for name in tensors)):
        raise Malformed(f"{WEIGHTS_FILE} holds neither lora_B nor {_VECTORS} alone")
    return tensors


def trained_tensors(tensors: Mapping[str, npt.NDArray[np.float32]], *, method: str, words: bool) -> Tensors:
    """Those that were trained in some round, by the names that sites sign digests under.

    Raises:
        Malformed: ``words``, and a matrix is of no causal language model.
    """
    parts = parts_trained(method)
    named = {_name_in_model(name, words=words): value for name, value in tensors.items()}
    return {name: value for name, value in named.items() if any(part in name for part in parts)}


def _name_in_model(name: str, *, words: bool) -> str:
    if name == _VECTORS:
        return f"encoder.{_VECTORS_IN_MODEL}"
    if words and not name.startswith(_CAUSAL):
        raise Malformed(f"{WEIGHTS_FILE}: {name!r}, wanted names that begin with {_CAUSAL}")
    inner = f"{_INNER}{name.removeprefix(_CAUSAL)}" if words else name
    return f"encoder.{inner.removesuffix('.weight')}.default.weight"


def largest_value(tensors: Mapping[str, npt.NDArray[np.float32]], *, seed: int) -> float:
    """How far the adapter went: 0 for one that did not move; not finite if any value of it is not.

    The largest magnitude in any lora_B, since lora_B starts at 0 (Hu et al. 2022, arXiv:2106.09685, section 4.1); of
    vectors the largest change.

    Args:
        tensors: of the file.
        seed: of the adapter's first values, from the plan.
    """
    if not all(np.isfinite(value).all() for value in tensors.values()):
        return float("nan")
    if _VECTORS in tensors:
        vectors = tensors[_VECTORS]
        return float(np.abs(vectors - first_values(vectors.shape, seed=seed, name=_VECTORS_IN_MODEL)).max(initial=0.0))
    return max(float(np.abs(value).max(initial=0.0)) for name, value in tensors.items() if ".lora_B." in name)
