"""Write what was trained in the formats others load: the adapter as PEFT, the head as safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save_file

from fedseek.lora.model import AdapterModel, head_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = ("adapter_config.json", WEIGHTS_FILE)


def save_adapter(model: AdapterModel, folder: Path, *, base_name: str) -> None:
    """Write a folder that ``PeftModel.from_pretrained(base, folder)`` loads.

    ``base_name`` replaces the path the base was loaded from, which is nobody else's business.
    """
    config = model.encoder.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    model.encoder.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card template: empty but for that path


def save_head(model: AdapterModel, folder: Path, *, kind: str, labels: Sequence[str]) -> None:
    """Write ``head-<kind>.safetensors`` (weight (L, H), bias (L,)) and the labels its rows stand for."""
    tensors = {name.removeprefix("head."): value for name, value in head_tensors(model).items()}
    save_file(tensors, folder / f"head-{kind}.safetensors")
    document = {"kind": kind, "labels": list(labels), "pooling": "mean over tokens where attention_mask is 1"}
    (folder / f"head-{kind}.json").write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", "utf-8")
