"""Rounds of training small enough for a test: tiny models and records, of labels and of words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from language_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from fedseek.dp.accounting import PrivacyParams
from fedseek.lora.model import AdapterModel, LoraParams, build_model
from fedseek.records import TokenisedRecords
from fedseek.train import TrainingOutcome, train_round
from fedseek.train_settings import TrainingSettings

NUM_LABELS = 3
SETTINGS = TrainingSettings(
    sampling_probability=0.5, num_steps=4, learning_rate=0.05, head_learning_rate=0.05, physical_batch_size=8
)
PRIVACY = PrivacyParams(noise_multiplier=1.0, sampling_probability=0.5, delta=1e-5, l2_clip_norm=0.5)


def tiny_model(dropout: float = 0.0) -> AdapterModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    lora = LoraParams(method="ffa", rank=4, alpha=8.0, target_modules=("query", "value"), layers=None, seed=1)
    return build_model(BertModel(config), lora, num_labels=NUM_LABELS, head_seed=2)


def toy_records(num_records: int = 40) -> TokenisedRecords:
    """The label is told by the first token."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, NUM_LABELS, num_records)
    rows = [
        np.concatenate([[1 + label], rng.integers(10, 50, rng.integers(2, 9))]).astype(np.int32) for label in labels
    ]
    return TokenisedRecords(rows, labels, np.arange(num_records))


def language_model(family: str = "qwen2", *, method: str = "ffa") -> AdapterModel:
    """A causal model whose adapter says something already."""
    torch.manual_seed(0)
    targets = ("o_proj",) if family.startswith("deepseek") else ("q_proj", "v_proj")
    lora = LoraParams(method=method, rank=2, alpha=4.0, target_modules=targets, layers=None, seed=1)
    model = build_model(AutoModelForCausalLM.from_config(tiny_config(family)), lora, num_labels=None, head_seed=2)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=0.2)
    return model.train()


def language_records(lengths: Any = (9, 3, 6, 2), *, seed: int = 0) -> TokenisedRecords:
    """The last half of each record counts."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 300, length).astype(np.int32) for length in lengths]
    counted = [np.arange(length) >= max(1, length // 2) for length in lengths]
    zeros = np.zeros(len(rows), dtype=np.int64)
    return TokenisedRecords(rows, zeros, np.arange(len(rows)), counted)


def changed(settings: TrainingSettings, **fields: Any) -> TrainingSettings:
    return replace(settings, **fields)


def everyone(privacy: PrivacyParams, **fields: Any) -> PrivacyParams:
    return replace(privacy, sampling_probability=1.0, **fields)


def trained_values(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def plain_round(
    model: nn.Module, records: TokenisedRecords, settings: TrainingSettings = SETTINGS, **arguments: Any
) -> TrainingOutcome:
    return train_round(model, records, settings=settings, privacy=None, **arguments)


def private_round(
    model: nn.Module,
    records: TokenisedRecords,
    settings: TrainingSettings = SETTINGS,
    privacy: PrivacyParams = PRIVACY,
    **arguments: Any,
) -> TrainingOutcome:
    return train_round(model, records, settings=settings, privacy=privacy, **arguments)
