"""Prepare: what follows from a plan before the first record is read: the model, the layouts, the settings."""

from __future__ import annotations

from transformers import PreTrainedModel

from fedseek.encode import UpdateLayout
from fedseek.lora.model import AdapterModel, LoraParams, adapter_shapes, build_model, head_shapes
from fedseek.plan import GLOBAL_SCOPE, Plan, head_scope
from fedseek.train import TrainingSettings

HELD_BACK_METRICS = ("held_back_score", "held_back_weight", "held_back_loss", "held_back_count")
"""What rides beside the head of a kind, summed under encryption; computed on held-back rows only."""


def prepare_model(plan: Plan, kind: str, base: PreTrainedModel) -> AdapterModel:
    """``base`` with the plan's adapter and the head of ``kind``, both at their first values."""
    lora = plan.spec.lora
    params = LoraParams(
        method=lora.method,
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=lora.target_modules,
        layers=lora.layers,
        seed=plan.seed_for("lora"),
    )
    num_labels = len(plan.spec.kinds[kind].labels)
    return build_model(base, params, num_labels=num_labels, head_seed=plan.seed_for(f"head/{kind}"))


def prepare_layouts(kind: str, model: AdapterModel) -> dict[str, UpdateLayout]:
    """Layout of each scope a site of ``kind`` contributes to."""
    head = head_scope(kind)
    return {
        GLOBAL_SCOPE: UpdateLayout(GLOBAL_SCOPE, adapter_shapes(model)),
        head: UpdateLayout(head, head_shapes(model), HELD_BACK_METRICS),
    }


def prepare_settings(plan: Plan) -> TrainingSettings:
    """One round of local training as the plan fixes it."""
    training = plan.spec.training
    return TrainingSettings(
        sampling_probability=training.sampling_probability,
        num_steps=training.steps_per_round,
        learning_rate=training.learning_rate,
        head_learning_rate=training.head_learning_rate,
        physical_batch_size=training.physical_batch_size,
    )
