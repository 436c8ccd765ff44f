"""Load the frozen base model: safetensors only, never code from a model folder, dropout off, on the device it stays on."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from fedseek.errors import WrongModel
from fedseek.lora.compute import Compute, choose_device, choose_dtype, quantisation

# Of configurations whose models scale or bend the logits after the head of words; these values do nothing.
_SCALES: Final = {"logit_scale": 1, "logits_scaling": 1, "lm_head_multiplier": 1, "final_logit_softcapping": None}


def load_base(folder: Path, *, words: bool = False, compute: Compute | None = None) -> PreTrainedModel:
    """Load the frozen base model with dropout switched off (why: see fedseek.lora.model), onto its device.

    It is where it stays before anything is put on it: an adapter on a model that moves later would never be trained.

    Args:
        folder: with config.json and safetensors.
        words: as a causal language model, with its head of words; else without any head.
        compute: device, type of number, and what saves memory; chosen by what there is when None.

    Raises:
        WrongModel: the files lack some weights; or ``words``, and the model is not causal, or does more to its logits than
            its head of words does.
        InvalidConfig: the device is not there, or does not do what is asked of it.
    """
    compute = compute or Compute()
    device = choose_device(compute.device)
    config = _config(folder)
    for name, value in vars(config).items():  # some attentions keep the bare number instead of a Dropout module
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    if words:
        _check_head(config)
    quantised = quantisation(compute, device)
    base, loaded = _loader(words).from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=choose_dtype(compute, device),
        quantization_config=quantised,
        device_map={"": device} if quantised is not None else None,
        output_loading_info=True,
    )
    _check_complete(loaded["missing_keys"], folder)
    if quantised is None:
        base.to(device)
    _switch_dropout_off(base)
    if words:
        _check_words(base)
    if compute.gradient_checkpointing:
        # Reentrant: with the other kind, no hook of the second forward pass sees the activations, and no record has a
        # gradient of its own. It wants an input that requires a gradient, which no frozen embedding gives.
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        base.enable_input_require_grads()
    return cast(PreTrainedModel, base)


def empty_base(folder: Path, *, words: bool = False) -> PreTrainedModel:
    """The base model's shapes without its weights: enough to predict the size of an update in milliseconds.

    Raises:
        WrongModel: ``words``, and the model does more to its logits than its head of words does.
    """
    config = _config(folder)
    if words:
        _check_head(config)
    with torch.device("meta"):
        base: PreTrainedModel = _loader(words).from_config(config, trust_remote_code=False)
    return base


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _loader(words: bool) -> Any:
    return AutoModelForCausalLM if words else AutoModel


def _check_complete(missing: Collection[str], folder: Path) -> None:
    """What the files lack was made up on the spot, another at each site. Nothing reads a pooler."""
    if lacking := sorted(name for name in missing if not name.startswith("pooler.")):
        raise WrongModel(
            f"{folder}: {len(lacking)} weights of the model are not in its files: {', '.join(lacking[:4])}",
            hint="a model of labels alone has no head of words, which language tasks need",
        )


def _check_head(config: Any) -> None:
    found = [name for name, idle in _SCALES.items() if getattr(config, name, idle) not in (idle, None)]
    if found:
        raise WrongModel(
            f"model of family {config.model_type!r}: {', '.join(found)} changes its logits after the head of words, which "
            "language tasks use alone",
            hint="a family such as qwen2, qwen3, llama or deepseek_v3, or a task of labels",
        )


@torch.no_grad()
def _check_words(base: PreTrainedModel) -> None:
    """A few tokens show whether a token is predicted from those before it alone, by the head of words and nothing else."""
    ids = torch.arange(1, 5, device=base.device).unsqueeze(0) % base.config.get_text_config().vocab_size
    other = ids.clone()
    other[0, -1] = 0
    was_training = base.training
    base.eval()
    logits, hidden = base(input_ids=ids).logits, base.base_model(input_ids=ids).last_hidden_state
    slack = 1e-4 if logits.dtype == torch.float32 else 3e-2  # of all logits; bfloat16 rounds to 0.4 %
    if _distance(base.get_output_embeddings()(hidden), logits) > slack:
        raise WrongModel("the base model's logits are not those of its head of words alone, which language tasks use")
    if _distance(base(input_ids=other).logits[:, :-1], logits[:, :-1]) > slack:
        raise WrongModel("the base model predicts a token from those after it: it is no causal language model")
    base.train(was_training)


def _distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def _switch_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
