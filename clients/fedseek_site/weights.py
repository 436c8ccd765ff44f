"""The weights a site holds between rounds: one float32 vector a scope, and what belongs to it.

The model is only a place to compute in. What all sites of a scope must agree on lives here, and changes in one way:
by applying a decrypted sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedseek.decrypt import apply_mean
from fedseek.encode import SummedUpdate, UpdateLayout, flatten, next_value_range, unflatten
from fedseek.lora.digest import tensors_digest
from fedseek.lora.model import AdapterModel, adapter_tensors, head_tensors, load_tensors
from fedseek.plan import Plan
from fedseek.prepare import prepare_layouts

Vector = npt.NDArray[np.float32]


@dataclass(slots=True)
class ScopeWeights:
    """One scope. ``weights`` and ``momentum`` have shape (num_values,); ``value_range`` is the quantiser's C."""

    layout: UpdateLayout
    weights: Vector
    momentum: npt.NDArray[np.float64]
    value_range: float


def start_weights(plan: Plan, kind: str, model: AdapterModel) -> dict[str, ScopeWeights]:
    """The weights before round 1, as the plan's seed made them."""
    vectors = model_vectors(model, prepare_layouts(kind, model))
    return {
        layout.scope: ScopeWeights(layout, vector, np.zeros(len(vector), np.float64), plan.initial_range(layout.scope))
        for layout, vector in vectors
    }


def model_vectors(model: AdapterModel, layouts: Mapping[str, UpdateLayout]) -> list[tuple[UpdateLayout, Vector]]:
    """What the model holds now, one vector a scope."""
    tensors = {**adapter_tensors(model), **head_tensors(model)}
    return [
        (layout, flatten({name: tensors[name] for name, _ in layout.tensors}, layout)) for layout in layouts.values()
    ]


def local_updates(model: AdapterModel, scopes: Mapping[str, ScopeWeights]) -> dict[str, Vector]:
    """Trained minus initial, by scope."""
    layouts = {scope: held.layout for scope, held in scopes.items()}
    return {layout.scope: vector - scopes[layout.scope].weights for layout, vector in model_vectors(model, layouts)}


def apply_sums(scopes: Mapping[str, ScopeWeights], summed: Mapping[str, SummedUpdate], plan: Plan) -> None:
    """Take the server's step in every scope, and the next round's range from the aggregate everybody has."""
    training = plan.spec.training
    for scope, update in summed.items():
        held = scopes[scope]
        held.weights, held.momentum = apply_mean(
            held.weights,
            update.mean,
            held.momentum,
            learning_rate=training.server_learning_rate,
            momentum_factor=training.server_momentum,
        )
        held.value_range = next_value_range(update, held.value_range)


def load_weights(model: AdapterModel, scopes: Mapping[str, ScopeWeights]) -> None:
    """Put the held weights into the model."""
    for held in scopes.values():
        load_tensors(model, unflatten(held.weights, held.layout))


def weights_digests(scopes: Mapping[str, ScopeWeights]) -> dict[str, bytes]:
    """Digest by scope; the same at every site of the scope, or the run stops."""
    return {scope: tensors_digest(unflatten(held.weights, held.layout)) for scope, held in scopes.items()}
