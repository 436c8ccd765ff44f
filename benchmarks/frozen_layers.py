"""What lies below the only trained matrix of the encoder is the same at every step: computed once a text, then looked up.

The plan adapts one linear: the down-projection of the top layer's feed-forward part, with ``lora_A`` frozen (FFA). Then

    hidden = LayerNorm(W x + b + residual + (alpha / r) B A x)
                       \\_______ base _______/              \\_/ projected

where ``base`` and ``projected`` do not change in training. A step costs a thousandth of the whole model's. A record's
"token ids" become rows of these tables, so `fedseek.train` and `fedseek.evaluate` need no change, and the numbers are
those of the whole model (tests/benchmarks/test_private_utility.py holds them, and their gradients, against it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedseek.lora.model import AdapterModel

TokenIds = Sequence[npt.NDArray[np.int32]]
Table = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Frozen:
    """Texts as the frozen part of the model leaves them.

    Attributes:
        starts: first row of each text, then the end; shape (num_texts + 1,).
        base: what the top LayerNorm gets while B is zero, float32, shape (num_tokens, H).
        projected: A x by seed of the plan, float32, shape (num_tokens, rank).
        features: mean-pooled output of the frozen encoder, float32, shape (num_texts, H).
    """

    starts: npt.NDArray[np.int64] = field(repr=False)
    base: Table = field(repr=False)
    projected: Mapping[int, Table] = field(repr=False)
    features: Table = field(repr=False)

    def rows_of(self, text: int) -> npt.NDArray[np.int32]:
        """Rows of the tables that are this text's."""
        return np.arange(self.starts[text], self.starts[text + 1], dtype=np.int32)


def freeze(models: Mapping[int, AdapterModel], texts: TokenIds, *, batch: int = 64) -> Frozen:
    """Run ``texts`` through the model once and keep what goes into its trained part.

    Args:
        models: the plan's model by seed, B still zero; they differ in A and head alone.
        texts: token ids, one array a text.
        batch: texts at once; does not change the result beyond rounding.
    """
    first = next(iter(models.values()))
    top = _top_output(first)
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in texts])])
    base = np.empty((int(starts[-1]), first.head.in_features), np.float32)
    features = np.empty((len(texts), first.head.in_features), np.float32)
    lora_as = {seed: _top_output(model).dense.lora_A["default"] for seed, model in models.items()}
    projected = {seed: np.empty((len(base), lora_a.out_features), np.float32) for seed, lora_a in lora_as.items()}
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = top.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    order = np.argsort([len(ids) for ids in texts], kind="stable")
    with torch.inference_mode():
        for begin in range(0, len(order), batch):
            some = order[begin : begin + batch]
            ids, mask = _padded([texts[text] for text in some])
            first.encoder(input_ids=ids, attention_mask=mask)
            x, residual = seen.pop()
            real = mask.bool()
            rows = np.concatenate([np.arange(starts[text], starts[text + 1]) for text in some])
            summed = top.dense.base_layer(x) + residual
            base[rows] = summed[real].numpy()
            features[some] = _pooled(top.LayerNorm(summed), mask).numpy()
            for seed, lora_a in lora_as.items():
                projected[seed][rows] = lora_a(x)[real].numpy()
    hook.remove()
    return Frozen(starts, base, projected, features)


class TrainedPart(nn.Module):
    """The trained part of the plan's model, on the tables: what it gets as token ids are rows of them."""

    def __init__(self, model: AdapterModel, frozen: Frozen, *, seed: int) -> None:
        super().__init__()
        top = _top_output(model)
        # Named as in the model: what is below ``encoder.`` is the adapter's, what is below ``head.`` the head's.
        self.encoder = nn.ModuleDict({"lora_B": top.dense.lora_B["default"], "LayerNorm": top.LayerNorm})
        self.head = model.head
        self.trained = frozenset({"encoder.lora_B.weight", "head.weight", "head.bias"})
        self._scaling = top.dense.scaling["default"]
        self.register_buffer("base", torch.from_numpy(frozen.base), persistent=False)
        self.register_buffer("projected", torch.from_numpy(frozen.projected[seed]), persistent=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (B, L) of records given as rows of the tables (B, T)."""
        moved = self._scaling * self.encoder["lora_B"](self.projected[input_ids])
        hidden = self.encoder["LayerNorm"](self.base[input_ids] + moved)
        logits: torch.Tensor = self.head(_pooled(hidden, attention_mask))
        return logits


class HeadOnFeatures(nn.Module):
    """The linear probe: the head alone. A record's only "token id" is its row of ``features``."""

    def __init__(self, head: nn.Linear, features: Table) -> None:
        super().__init__()
        self.head = head
        self.trained = frozenset({"head.weight", "head.bias"})
        self.register_buffer("features", torch.from_numpy(features), persistent=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (B, L)."""
        logits: torch.Tensor = self.head(self.features[input_ids[:, 0]])
        return logits


def save_frozen(frozen: Frozen, folder: Path) -> None:
    """Write one file an array, to be mapped by any number of processes."""
    tables = {"starts": frozen.starts, "base": frozen.base, "features": frozen.features}
    for name, table in {**tables, **{f"projected{seed}": table for seed, table in frozen.projected.items()}}.items():
        np.save(folder / f"{name}.npy", table)


def open_frozen(folder: Path) -> Frozen:
    """Map what `save_frozen` wrote; the pages are shared by all processes that do."""
    tables: dict[str, Any] = {
        file.stem: np.load(file, mmap_mode="c", allow_pickle=False) for file in sorted(folder.glob("*.npy"))
    }
    projected = {int(name.removeprefix("projected")): tables.pop(name) for name in list(tables) if "projected" in name}
    return Frozen(projected=projected, **tables)


def _top_output(model: AdapterModel) -> Any:
    return model.encoder.base_model.model.encoder.layer[-1].output


def _pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    pooled: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1)
    return pooled


def _padded(texts: TokenIds) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(len(texts), max(len(each) for each in texts), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for line, each in enumerate(texts):
        ids[line, : len(each)] = torch.from_numpy(each.astype(np.int64))
        mask[line, : len(each)] = 1
    return ids, mask
