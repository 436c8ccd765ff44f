"""Load the frozen base model: safetensors only, never code from a model folder, dropout off."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel


def load_base(folder: Path) -> PreTrainedModel:
    """Load the frozen base model, float32, with dropout switched off (why: see fedseek.lora.model)."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for name, value in vars(config).items():  # some attentions keep the bare number instead of a Dropout module
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    base: PreTrainedModel = AutoModel.from_pretrained(
        folder, config=config, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
    )
    _switch_dropout_off(base)
    return base


def empty_base(folder: Path) -> PreTrainedModel:
    """The base model's shapes without its weights: enough to predict the size of an update in milliseconds."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        base: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=False)
    return base


def _switch_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
