"""What was trained, in the formats others load: the adapter's weights as PEFT has them, the head as safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence

from peft import get_peft_model_state_dict
from safetensors import torch as safetensors_torch
from safetensors.numpy import save

from fedseek.lora.adapter_file import name_in_file
from fedseek.lora.model import AdapterModel, head_tensors


def adapter_weights(model: AdapterModel, *, words: bool) -> bytes:
    """The bytes of ``adapter_model.safetensors``, of which ``adapter_file.adapter_config`` is the other half.

    ``words``: whether any kind of the plan learns words; the file then fits the base as a causal language model, at all
    sites alike.
    """
    tensors = get_peft_model_state_dict(model.encoder, save_embedding_layers=False)
    values = {name_in_file(name, words=words): value.detach().cpu().contiguous() for name, value in tensors.items()}
    written: bytes = safetensors_torch.save(values, metadata={"format": "pt"})
    return written


def head_files(model: AdapterModel, *, kind: str, labels: Sequence[str]) -> dict[str, bytes]:
    """``head-<kind>.safetensors`` (weight (L, H), bias (L,)) and the labels its rows stand for, by name of the file.

    No files for a kind without labels: what reads its adapter is the base model's own head of words.
    """
    if model.head is None:
        return {}
    tensors = {name.removeprefix("head."): value for name, value in head_tensors(model).items()}
    document = {"kind": kind, "labels": list(labels), "pooling": "mean over tokens where attention_mask is 1"}
    return {
        f"head-{kind}.safetensors": save(tensors),
        f"head-{kind}.json": json.dumps(document, ensure_ascii=False, indent=2).encode() + b"\n",
    }
