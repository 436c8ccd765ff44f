"""The model a site trains: frozen encoder, LoRA adapter, mean pooling, linear head.

    input_ids (B, T) -> encoder with adapter -> (B, T, H) -> mean over real tokens (B, H) -> head -> logits (B, L)

LoRA (Hu et al. 2022, arXiv:2106.09685): a linear layer W0 becomes x -> W0 x + (alpha / r) B A x, with B zero at the
start. With ``method = "ffa"`` (Sun et al. 2024, arXiv:2403.12313) A stays at a value every site derives from the plan
and only B is trained, so the average of the sites' B is exactly the average of their products.

Dropout is off: under DP-SGD the noise regularises, and a forward pass that does not depend on a hidden generator lets
two sites, or an encrypted and a plaintext run, be compared number by number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fedseek.errors import WrongModel

Tensors = dict[str, npt.NDArray[np.float32]]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class LoraParams:
    """What defines an adapter: rank r, scale alpha / r, which linears, which layers, and the public seed of A."""

    method: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    layers: tuple[int, ...] | None
    seed: int


class AdapterModel(nn.Module):
    """Encoder with adapter, mean pooling, head. Trainable: lora_B (and lora_A for ``both``) and the head."""

    def __init__(self, encoder: PeftModel, head: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map token ids (B, T) and mask (B, T) to logits (B, num_labels)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, H)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: torch.Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits


def build_model(base: PreTrainedModel, params: LoraParams, *, num_labels: int, head_seed: int) -> AdapterModel:
    """Put the adapter and a head on ``base``.

    Raises:
        WrongModel: the base has no linear layer named as ``target_modules`` asks, or not the layers asked for.
    """
    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        target_modules=list(params.target_modules),
        layers_to_transform=list(params.layers) if params.layers is not None else None,
        lora_dropout=0.0,
        bias="none",
        task_type="FEATURE_EXTRACTION",
    )
    there = f"linear layers there: {', '.join(sorted(set(_linear_names(base))))}"
    try:
        encoder = get_peft_model(base, config)
    except ValueError as error:
        raise WrongModel(f"cannot put the adapter on the base model: {error}", hint=there) from None
    if missing := _not_adapted(encoder, params):
        raise WrongModel(f"cannot put the adapter on the base model: no linear {', '.join(missing)}", hint=there)
    head = nn.Linear(base.config.hidden_size, num_labels)
    _set_initial_values(encoder, head, params, head_seed)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("lora_B" in name or (params.method == "both" and "lora_A" in name))
    return AdapterModel(encoder, head)


def _not_adapted(encoder: nn.Module, params: LoraParams) -> list[str]:
    """Peft is content when one of the names, and one of the layers, is there; a plan means all of them."""
    adapted = [name.split(".lora_B.")[0] for name, _ in encoder.named_parameters() if ".lora_B." in name]
    missing = [name for name in params.target_modules if not any(path.endswith(f".{name}") for path in adapted)]
    return missing + [f"in layer {n}" for n in params.layers or () if not any(f".{n}." in path for path in adapted)]


def _linear_names(base: nn.Module) -> Iterator[str]:
    return (name.rsplit(".", 1)[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear))


def _set_initial_values(encoder: nn.Module, head: nn.Linear, params: LoraParams, head_seed: int) -> None:
    """Same values at every site whatever its hardware: numpy's Philox in float64, never torch's generator."""
    with torch.no_grad():
        for name, parameter in sorted(encoder.named_parameters()):
            if "lora_A" in name:
                parameter.copy_(torch.from_numpy(_uniform(parameter.shape, params.seed, name)))
            elif "lora_B" in name:
                parameter.zero_()
        head.weight.copy_(torch.from_numpy(_uniform(head.weight.shape, head_seed, "head.weight")))
        head.bias.zero_()


def _uniform(shape: Sequence[int], seed: int, name: str) -> npt.NDArray[np.float32]:
    """Kaiming uniform with a = sqrt(5), as LoRA's reference initialises A: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:16], "big")
    bound = 1.0 / math.sqrt(shape[-1])
    return np.random.Generator(np.random.Philox(key=key)).uniform(-bound, bound, size=tuple(shape)).astype(np.float32)


def adapter_tensors(model: AdapterModel) -> Tensors:
    """Trainable tensors of the adapter (scope ``global``), float32, sorted by name."""
    return _tensors(model, "encoder.")


def head_tensors(model: AdapterModel) -> Tensors:
    """Tensors of the head (scope of the site's kind), float32, sorted by name."""
    return _tensors(model, "head.")


def adapter_shapes(model: AdapterModel) -> Shapes:
    """Name and shape of each of ``adapter_tensors``; also of a model that was built without weights."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in _trained(model, "encoder."))


def head_shapes(model: AdapterModel) -> Shapes:
    """Name and shape of each of ``head_tensors``; also of a model that was built without weights."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in _trained(model, "head."))


def _tensors(model: AdapterModel, scope: str) -> Tensors:
    return {
        name: parameter.detach().cpu().numpy().astype(np.float32, copy=True)
        for name, parameter in _trained(model, scope)
    }


def _trained(model: AdapterModel, scope: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and name.startswith(scope):
            yield name, parameter


def load_tensors(model: AdapterModel, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Copy ``tensors`` into the model's parameters of the same names, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
