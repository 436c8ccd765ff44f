"""Prepare: what follows from a plan before the first record is read: the model, the layouts, the settings."""

from __future__ import annotations

from transformers import PreTrainedModel

from fedseek.encode import UpdateLayout
from fedseek.lora.model import AdapterModel, LoraParams, adapter_shapes, build_model, head_shapes
from fedseek.plan import GLOBAL_SCOPE, Plan, head_scope
from fedseek.train_settings import TrainingSettings

HELD_BACK_METRICS = ("held_back_score", "held_back_weight", "held_back_loss", "held_back_count")
"""What rides beside the head of a kind, summed under encryption; computed on held-back rows only."""
ANSWER_METRICS = ("answers_exact", "answers_f1", "answers_rouge_l", "answers_count")
"""For kinds that answer instructions, besides: sums over the answers to a sample of held-back rows."""
STOP_METRICS = ("stop_votes",)
"""Beside the adapter, where the plan may end training early: 1 of a site that votes for it, else 0."""


def prepare_model(plan: Plan, kind: str, base: PreTrainedModel) -> AdapterModel:
    """``base`` (with its head of words where ``plan.writes``) with the plan's adapter and the head of ``kind``, if it has one.

    Both are at their first values. What a round trains, ``set_trainable`` says.

    Raises:
        WrongModel: the base has no layers as the plan asks for.
    """
    lora = plan.spec.lora
    params = LoraParams(
        method=lora.method,
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=plan.target_modules,
        layers=lora.layers,
        seed=plan.seed_for("lora"),
        rank_stabilised=lora.rank_stabilised,
        virtual_tokens=lora.virtual_tokens,
        every_target=lora.target_modules != "auto",
    )
    num_labels = len(plan.spec.kinds[kind].labels) or None
    return build_model(base, params, num_labels=num_labels, head_seed=plan.seed_for(f"head/{kind}"))


def prepare_layouts(plan: Plan, kind: str, model: AdapterModel) -> dict[str, UpdateLayout]:
    """Layout of each scope a site of ``kind`` contributes to: all that any round trains, and the metrics beside it.

    A kind without labels has no head; its scope is metrics alone.
    """
    head, answers = head_scope(kind), ANSWER_METRICS if plan.spec.kinds[kind].task == "instruct" else ()
    votes = STOP_METRICS if plan.spec.training.early_stopping is not None else ()
    return {
        GLOBAL_SCOPE: UpdateLayout(GLOBAL_SCOPE, adapter_shapes(model), votes),
        head: UpdateLayout(head, head_shapes(model), HELD_BACK_METRICS + answers),
    }


def prepare_settings(plan: Plan, number: int) -> TrainingSettings:
    """Local training of round ``number`` as the plan fixes it."""
    training, stage = plan.spec.training, plan.stage_of(number)
    return TrainingSettings(
        sampling_probability=stage.sampling_probability,
        num_steps=stage.steps_per_round,
        learning_rate=stage.learning_rate,
        head_learning_rate=stage.head_learning_rate,
        physical_batch_size=None if training.physical_batch_size == "auto" else training.physical_batch_size,
        optimiser=training.optimiser,
        weight_decay=training.weight_decay,
        warmup_steps=stage.warmup_steps,
        first_step=(number - stage.first_round) * stage.steps_per_round,
        max_gradient_norm=training.max_gradient_norm,
        label_smoothing=training.label_smoothing,
    )
