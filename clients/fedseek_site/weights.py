"""The weights a site holds between rounds: one vector a scope, in three forms.

    bytes in the state  <->  fedseek.apply.ScopeState  ->  parameters of the model

The model is only a place to compute in: each step puts the held weights in before it uses it. What all sites of a scope
must agree on changes in one way, by applying a decrypted sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedseek.apply import ScopeState
from fedseek.encode import Float32Vector, Float64Vector, UpdateLayout, flatten, unflatten
from fedseek.errors import Malformed
from fedseek.lora.model import AdapterModel, adapter_tensors, head_tensors, load_tensors
from fedseek.plan import Plan
from fedseek_site.state import ScopeValues


def start_scopes(plan: Plan, layouts: Mapping[str, UpdateLayout], model: AdapterModel) -> dict[str, ScopeState]:
    """The weights before round 1, as the plan's seed made them."""
    return {
        scope: ScopeState(layouts[scope], vector, np.zeros(len(vector), np.float64), plan.initial_range(scope))
        for scope, vector in model_vectors(model, layouts).items()
    }


def model_vectors(model: AdapterModel, layouts: Mapping[str, UpdateLayout]) -> dict[str, Float32Vector]:
    """What the model holds now, by scope; each of shape (num_values,)."""
    tensors = {**adapter_tensors(model), **head_tensors(model)}
    return {
        scope: flatten({name: tensors[name] for name, _ in layout.tensors}, layout) for scope, layout in layouts.items()
    }


def load_weights(model: AdapterModel, scopes: Mapping[str, ScopeState]) -> None:
    """Put the held weights into the model."""
    for held in scopes.values():
        load_tensors(model, unflatten(held.weights, held.layout))


def digests_of(scopes: Mapping[str, ScopeState], shared: Iterable[str]) -> dict[str, bytes]:
    """Digest by shared scope; the same at every site of the scope, or the run stops."""
    return {scope: scopes[scope].digest() for scope in shared}


def to_values(scopes: Mapping[str, ScopeState]) -> dict[str, ScopeValues]:
    """The weights as the state keeps them."""
    return {
        scope: ScopeValues(
            weights=held.weights.astype("<f4", copy=False).tobytes(),
            momentum=held.momentum.astype("<f8", copy=False).tobytes() if held.momentum.any() else b"",
            value_range=held.value_range,
        )
        for scope, held in scopes.items()
    }


def to_scopes(values: Mapping[str, ScopeValues], layouts: Mapping[str, UpdateLayout]) -> dict[str, ScopeState]:
    """Undo ``to_values``.

    Raises:
        Malformed: not the scopes or the numbers of values of the layouts.
    """
    sizes = {
        scope: (len(held.weights) / 4, len(held.momentum) / 8 if held.momentum else len(held.weights) / 4)
        for scope, held in values.items()
    }
    wanted = {scope: (layout.num_values, layout.num_values) for scope, layout in layouts.items()}
    if sizes != wanted:
        raise Malformed(f"stored weights: got (weights, momentum) of sizes {sizes}, wanted {wanted}")
    return {
        scope: ScopeState(
            layouts[scope],
            np.frombuffer(held.weights, "<f4").astype(np.float32),  # a copy: torch wants arrays it may write to
            _momentum_of(held),
            held.value_range,
        )
        for scope, held in values.items()
    }


def _momentum_of(held: ScopeValues) -> Float64Vector:
    """A vector of zeros is kept as no bytes at all."""
    if not held.momentum:
        return np.zeros(len(held.weights) // 4, np.float64)
    return np.frombuffer(held.momentum, "<f8").astype(np.float64)
