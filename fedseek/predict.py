"""Predict what a plan costs, before anyone trains: bytes, ciphertexts, noise budget, seconds, epsilon.

Sizes come from the model's shapes (no weights are loaded); bytes and seconds from encrypting, adding and decrypting a
sample for real on this machine; epsilon from the plan alone, which fixes sampling probability and steps for every site.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.decrypt import decrypt_sum
from fedseek.encode import UpdateLayout, encode_update, num_ciphertexts
from fedseek.encrypt import encrypt_update
from fedseek.he.keys import SecretKey
from fedseek.he.params import noise_budget_bits
from fedseek.lora.load import empty_base
from fedseek.lora.source import locate_model
from fedseek.plan import Plan
from fedseek.prepare import prepare_layouts, prepare_model

SAMPLE_VALUES = 100_000
SAMPLE = "sample"


@dataclass(frozen=True, slots=True)
class KindPrediction:
    """A site of one kind, one round."""

    values: int
    ciphertexts: int
    bytes_up: int
    bytes_down: int
    plain_float32_bytes: int
    encrypt_seconds: float
    decrypt_seconds: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What :func:`predict_plan` found. Seconds hold for one core of this machine; bytes are of ciphertexts."""

    rounds: int
    steps: int
    noise_budget_bits_left: float
    digits_per_slot: int
    bytes_per_value_up: float
    add_seconds_per_site: float
    epsilon_per_site: float | None
    delta: float | None
    noise_multiplier: float | None
    kinds: dict[str, KindPrediction]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Measured on one encrypted vector: bytes a ciphertext, seconds a ciphertext."""

    bytes_up: float
    bytes_down: float
    encrypt: float
    add: float
    decrypt: float


def predict_plan(plan: Plan) -> Prediction:
    """Predict every round of ``plan``.

    Raises:
        WrongModel: the base model is not here, or has no layers as the plan asks for.
    """
    sample = _measure(plan)
    kinds = {kind: _predict_kind(plan, kind, sample) for kind in plan.spec.kinds}
    largest = max(kinds.values(), key=lambda predicted: predicted.ciphertexts)
    spend = plan.spend_after(plan.spec.training.rounds)
    return Prediction(
        rounds=plan.spec.training.rounds,
        steps=plan.total_steps,
        noise_budget_bits_left=noise_budget_bits(plan.packing.params, plan.packing.max_sites, largest.ciphertexts),
        digits_per_slot=plan.packing.digits_per_slot,
        bytes_per_value_up=largest.bytes_up / largest.values,
        add_seconds_per_site=sample.add * largest.ciphertexts,
        epsilon_per_site=spend.epsilon() if spend else None,
        delta=plan.privacy.delta if plan.privacy else None,
        noise_multiplier=plan.privacy.noise_multiplier if plan.privacy else None,
        kinds=kinds,
    )


def prediction_document(prediction: Prediction) -> dict[str, Any]:
    """The prediction as plain values, for JSON."""
    return asdict(prediction)


def _predict_kind(plan: Plan, kind: str, sample: _Sample) -> KindPrediction:
    base = empty_base(locate_model(plan.spec.model.source))
    layouts = prepare_layouts(kind, prepare_model(plan, kind, base))
    values = sum(layout.num_values for layout in layouts.values())
    ciphertexts = sum(num_ciphertexts(layout, plan.packing) for layout in layouts.values())
    return KindPrediction(
        values=values,
        ciphertexts=ciphertexts,
        bytes_up=round(ciphertexts * sample.bytes_up),
        bytes_down=round(ciphertexts * sample.bytes_down),
        plain_float32_bytes=4 * values,
        encrypt_seconds=ciphertexts * sample.encrypt,
        decrypt_seconds=ciphertexts * sample.decrypt,
    )


def _measure(plan: Plan) -> _Sample:
    packing = plan.packing
    layout = UpdateLayout(SAMPLE, (("values", (SAMPLE_VALUES,)),))
    key = SecretKey.generate(packing.params)
    vector = np.random.default_rng().normal(0, 0.3, SAMPLE_VALUES).astype(np.float32)
    count = num_ciphertexts(layout, packing)

    started = time.perf_counter()
    slots = encode_update(vector, layout, packing=packing, value_range=1.0, weight=1, weight_cap=1, metrics={})
    update = encrypt_update(key, {SAMPLE: slots})
    encrypted = time.perf_counter()
    aggregate = agg_init(packing.params, {SAMPLE: count}, max_sites=packing.max_sites)
    agg_update(aggregate, update)
    agg_update(aggregate, update)
    added = time.perf_counter()
    sums = agg_finish(aggregate, min_sites=2)
    finished = time.perf_counter()
    decrypt_sum(key, sums, layouts={SAMPLE: layout}, packing=packing, value_ranges={SAMPLE: 1.0}, weight_cap=1)
    done = time.perf_counter()
    return _Sample(
        bytes_up=sum(map(len, update[0].ciphertexts)) / count,
        bytes_down=sum(map(len, sums[0].ciphertexts)) / count,
        encrypt=(encrypted - started) / count,
        add=(added - encrypted) / 2 / count,
        decrypt=(done - finished) / count,
    )
