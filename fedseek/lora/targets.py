"""Which linear layers of a model get an adapter, by the model's family; nothing is loaded to say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_LLAMA: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Attention alone: the experts are fused tensors that no per-record gradient reaches, and PEFT would put an adapter asked
# for "shared_experts" on the routed ones. Models of a family have either q_proj or the low-rank pair.
_DEEPSEEK: Final = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FAMILIES: Final[Mapping[str, tuple[str, ...]]] = {
    "bert": ("query", "key", "value"),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "llama": _LLAMA,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}
"""By ``model_type`` of a model's config.json."""


def targets_of(family: str | None) -> tuple[str, ...]:
    """Names of the linear layers of a family.

    Raises:
        KeyError: a family that is not in ``FAMILIES``; a checked plan has one that is.
    """
    return FAMILIES[family or ""]
