from collections.abc import Callable

import pytest
import torch
from transformers import BertConfig, BertModel

from fedseek.dp.accounting import PrivacyParams
from fedseek.lora.model import AdapterModel, LoraParams, build_model

NUM_LABELS = 3


def build_tiny_model() -> AdapterModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    lora = LoraParams(method="ffa", rank=4, alpha=8.0, target_modules=("query", "value"), layers=None, seed=1)
    model = build_model(BertModel(config), lora, num_labels=NUM_LABELS, head_seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.train()


def random_batch(num_records: int, num_tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, mask (lengths 3 to num_tokens) and labels."""
    generator = torch.Generator().manual_seed(num_records)
    ids = torch.randint(1, 50, (num_records, num_tokens), generator=generator)
    lengths = torch.randint(3, num_tokens + 1, (num_records, 1), generator=generator)
    labels = torch.randint(0, NUM_LABELS, (num_records,), generator=generator)
    return ids, (torch.arange(num_tokens) < lengths).long(), labels


@pytest.fixture
def model() -> AdapterModel:
    return build_tiny_model()


@pytest.fixture
def make_batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return random_batch


@pytest.fixture
def privacy() -> PrivacyParams:
    return PrivacyParams(noise_multiplier=1.0, sampling_probability=0.5, delta=1e-5, l2_clip_norm=0.1)
