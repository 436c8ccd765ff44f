"""Put an adapter on a base model: all that the plan asks for, only where its per-record gradients are exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import PreTrainedModel

from fedseek.errors import WrongModel
from fedseek.lora.initial import first_values
from fedseek.lora.methods import PROMPTS

MAX_FULL_PARAMETERS = 200_000_000  # full fine-tuning keeps gradients and the optimiser's state of every one

_NO_WORDS_IN_FRONT = "FEATURE_EXTRACTION"  # peft's name for a model without a head: what it wraps is the inner model


@dataclass(frozen=True, slots=True)
class LoraParams:
    """What defines an adapter.

    Attributes:
        method: ``lora.method`` of a plan.
        rank, alpha: LoRA's r, and its scale alpha / r.
        target_modules: names of the linear layers that get an adapter.
        layers: numbers of the layers; all when None.
        seed: public seed of the first values.
        rank_stabilised: scale by alpha / sqrt(r) instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
        virtual_tokens: vectors in front, for ``prefix`` and ``prompt``.
        every_target: whether each of the target modules must be there; else at least one, as for those of a family.
    """

    method: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    layers: tuple[int, ...] | None
    seed: int
    rank_stabilised: bool = False
    virtual_tokens: int = 20
    every_target: bool = True


def put_adapter(inner: PreTrainedModel, params: LoraParams) -> PeftModel | PreTrainedModel:
    """``inner`` (without any head) with the adapter at its first values, float32, everything frozen.

    Raises:
        WrongModel: no linear layer named as ``target_modules`` asks, or not the layers asked for; a target that is an
            expert; vectors in front where the model has no place for them; a model too large to be trained in full.
    """
    if params.method == "full":
        _check_full(inner)
        return inner
    adapt = _put_vectors if params.method in PROMPTS else _put_matrices
    encoder = adapt(inner, params)
    with torch.no_grad():
        for name, parameter in sorted(encoder.named_parameters()):
            if ".lora_A." in name or ".prompt_encoder." in f".{name}":
                values = first_values(parameter.shape, seed=params.seed, name=name)
                parameter.copy_(torch.from_numpy(values))
            elif ".lora_B." in name:
                parameter.zero_()
            parameter.requires_grad_(False)
    return encoder


def hidden_states(
    encoder: PeftModel | PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The encoder's last hidden states of the tokens, shape (B, T, H)."""
    if isinstance(encoder, PeftModel) and encoder.active_peft_config.peft_type == PeftType.PROMPT_TUNING:
        # peft looks the vectors up once a batch and copies them; once a record is what per-record gradients want
        tokens = encoder.prompt_tokens[encoder.active_adapter].expand(len(input_ids), -1).to(input_ids.device)
        embedded: torch.Tensor = encoder.word_embeddings(input_ids)
        vectors = encoder.prompt_encoder[encoder.active_adapter](tokens).to(embedded.dtype)
        embeddings, mask = torch.cat([vectors, embedded], 1), torch.cat([torch.ones_like(tokens), attention_mask], 1)
        states = encoder.base_model(inputs_embeds=embeddings, attention_mask=mask, **options).last_hidden_state
    else:
        states = encoder(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
    hidden: torch.Tensor = states[:, -input_ids.shape[1] :]  # without those of the vectors
    return hidden


def writing_with(
    encoder: PeftModel | PreTrainedModel, causal: PreTrainedModel, params: LoraParams
) -> PreTrainedModel | PeftModel:
    """``causal``, whose inner model is in ``encoder``, so that its ``generate`` uses the adapter.

    Matrices are in the inner model itself; vectors are handed over.

    Raises:
        WrongModel: the names of its layers are not those that a released adapter has.
    """
    if causal.base_model_prefix != "model":
        raise WrongModel(
            f"the layers of family {causal.config.model_type!r} are under {causal.base_model_prefix!r}, wanted 'model': the "
            "names in a released adapter follow from the plan alone",
            hint="a family such as qwen2, qwen3, llama or deepseek_v3, or tasks of labels for all kinds",
        )
    if params.method not in PROMPTS:
        return causal
    writer = PeftModelForCausalLM(causal, _vectors(params, "CAUSAL_LM"))
    writer.prompt_encoder, writer.prompt_tokens = encoder.prompt_encoder, encoder.prompt_tokens
    return writer


def _check_full(inner: PreTrainedModel) -> None:
    size = sum(parameter.numel() for parameter in inner.parameters())
    if size > MAX_FULL_PARAMETERS:
        raise WrongModel(f"full fine-tuning of {size:,} parameters, wanted at most {MAX_FULL_PARAMETERS:,}")


def _put_matrices(inner: PreTrainedModel, params: LoraParams) -> PeftModel:
    there = f"linear layers there: {', '.join(sorted(set(_linear_names(inner))))}"
    if experts := sorted(_in_experts(inner) & {name.rpartition(".")[2] for name in params.target_modules}):
        raise WrongModel(
            f"cannot put the adapter on the base model: {', '.join(experts)} are names of its experts, fused tensors that "
            "no per-record gradient reaches, onto which an adapter for the shared ones would be put as well",
            hint='name the attention\'s layers, or leave the choice to target_modules = "auto"; ' + there,
        )
    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        use_rslora=params.rank_stabilised,
        target_modules=list(params.target_modules),
        layers_to_transform=list(params.layers) if params.layers is not None else None,
        lora_dropout=0.0,
        bias="none",
        task_type=_NO_WORDS_IN_FRONT,
    )
    try:
        encoder = get_peft_model(inner, config)
    except ValueError as error:
        raise WrongModel(f"cannot put the adapter on the base model: {error}", hint=there) from None
    if missing := _not_adapted(encoder, params):
        raise WrongModel(f"cannot put the adapter on the base model: no linear {', '.join(missing)}", hint=there)
    return encoder


def _put_vectors(inner: PreTrainedModel, params: LoraParams) -> PeftModel:
    config = inner.config
    if params.layers is not None:
        raise WrongModel(
            f"{params.method} vectors are in front of all layers, but layers were named", hint="leave them out"
        )
    if params.method == "prefix":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if hasattr(config, "kv_lora_rank") or size * config.num_attention_heads != config.hidden_size:
            raise WrongModel(
                f"no prefix for a model of family {config.model_type!r}: its keys and values are not of one size that "
                "follows from hidden_size, which is what PEFT writes and reads",
                hint='method "prompt", or LoRA',
            )
        if inner.is_gradient_checkpointing:
            raise WrongModel("no prefix with gradient checkpointing, which computes the keys again without it")
    try:
        return get_peft_model(inner, _vectors(params, _NO_WORDS_IN_FRONT))
    except ValueError as error:
        raise WrongModel(f"cannot put {params.method} vectors in front of the base model: {error}") from None


def _vectors(params: LoraParams, task_type: str) -> PeftConfig:
    config = PrefixTuningConfig if params.method == "prefix" else PromptTuningConfig
    return config(num_virtual_tokens=params.virtual_tokens, task_type=task_type)


def _not_adapted(encoder: nn.Module, params: LoraParams) -> list[str]:
    """Peft is content when one of the names, and one of the layers, is there; a plan means all of them."""
    adapted = [name.split(".lora_B.")[0] for name, _ in encoder.named_parameters() if ".lora_B." in name]
    missing = [name for name in params.target_modules if not any(path.endswith(f".{name}") for path in adapted)]
    if not params.every_target and len(missing) < len(params.target_modules):
        missing = []
    return missing + [f"in layer {n}" for n in params.layers or () if not any(f".{n}." in path for path in adapted)]


def _linear_names(inner: nn.Module) -> Iterator[str]:
    return (name.rsplit(".", 1)[-1] for name, module in inner.named_modules() if isinstance(module, nn.Linear))


def _in_experts(inner: nn.Module) -> set[str]:
    """Last names of all modules and tensors of mixture-of-experts layers: routed experts, shared ones, the router."""
    blocks = [path.rpartition(".")[0] for path, _ in inner.named_modules() if path.rpartition(".")[2] == "experts"]
    names = [path for path, _ in inner.named_modules()] + [path for path, _ in inner.named_parameters()]
    inside = (path.removesuffix(".weight") for path in names for block in blocks if path.startswith(f"{block}."))
    return {path.rpartition(".")[2] for path in inside} - {"experts", "shared_experts"}
