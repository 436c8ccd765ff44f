"""Predict what a plan costs, before anyone trains: bytes, ciphertexts, noise budget, seconds, epsilon.

Sizes come from the model's shapes (no weights are loaded); bytes and seconds from masking, encrypting, adding and
decrypting a sample for real on this machine; epsilon from the plan alone, which fixes sampling probability and steps
for every site. Masks are counted for the largest cohort the plan allows, those of a head as if all of it were one kind.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.encode import Slots, UpdateLayout, decode_sum, encode_update, num_ciphertexts
from fedseek.encrypt import encrypt_update
from fedseek.he.keys import SecretKey, decrypt_slots
from fedseek.he.params import noise_budget_bits
from fedseek.lora.load import empty_base
from fedseek.lora.source import locate_model
from fedseek.plan import GLOBAL_SCOPE, Plan
from fedseek.prepare import prepare_layouts, prepare_model
from fedseek.secagg.graph import choose_graph
from fedseek.secagg.mac import mac
from fedseek.secagg.stream import SEED_BYTES, add_stream

SAMPLE_VALUES = 100_000
SAMPLE = "sample"
SAMPLE_MASKS = 4


@dataclass(frozen=True, slots=True)
class KindPrediction:
    """A site of one kind, one round. ``encrypt_seconds`` is all that is done to an update: encode, tag, mask, encrypt."""

    values: int
    ciphertexts: int
    bytes_up: int
    bytes_down: int
    plain_float32_bytes: int
    encrypt_seconds: float
    decrypt_seconds: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What :func:`predict_plan` found. Seconds hold for one core of this machine; bytes are of ciphertexts.

    ``noise_multiplier`` is that of the last stage, ``epsilon_per_site`` of all of them.
    """

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
    """Measured on one encrypted vector: bytes a ciphertext, seconds a ciphertext; ``mask`` is one mask on one of them."""

    bytes_up: float
    bytes_down: float
    encrypt: float
    mask: float
    add: float
    decrypt: float


def predict_plan(plan: Plan) -> Prediction:
    """Predict every round of ``plan``.

    Raises:
        WrongModel: the base model is not here, or has no layers as the plan asks for.
    """
    sample = _measure(plan)
    layouts = {kind: _layouts(plan, kind) for kind in plan.spec.kinds}
    kinds = {kind: _predict_kind(plan, of_kind, sample) for kind, of_kind in layouts.items()}
    adapter = num_ciphertexts(next(iter(layouts.values()))[GLOBAL_SCOPE], plan.packing)
    largest = max(kinds.values(), key=lambda predicted: predicted.ciphertexts)
    spend = plan.spend_after(plan.rounds)
    return Prediction(
        rounds=plan.rounds,
        steps=plan.total_steps,
        noise_budget_bits_left=noise_budget_bits(plan.packing.params, plan.packing.max_sites, largest.ciphertexts),
        digits_per_slot=plan.packing.digits_per_slot,
        bytes_per_value_up=largest.bytes_up / largest.values,
        # in the mask of the sum is each site's self mask; heads have none
        add_seconds_per_site=sample.add * largest.ciphertexts + sample.mask * adapter,
        epsilon_per_site=spend.epsilon() if spend else None,
        delta=plan.privacy.delta if plan.privacy else None,
        noise_multiplier=plan.privacy.noise_multiplier if plan.privacy else None,
        kinds=kinds,
    )


def prediction_document(prediction: Prediction) -> dict[str, Any]:
    """The prediction as plain values, for JSON."""
    return asdict(prediction)


def _layouts(plan: Plan, kind: str) -> dict[str, UpdateLayout]:
    base = empty_base(locate_model(plan.spec.model.source), words=plan.writes(kind))
    return prepare_layouts(plan, kind, prepare_model(plan, kind, base))


def _predict_kind(plan: Plan, layouts: Mapping[str, UpdateLayout], sample: _Sample) -> KindPrediction:
    values = sum(layout.num_values for layout in layouts.values())
    by_scope = {scope: num_ciphertexts(layout, plan.packing) for scope, layout in layouts.items()}
    ciphertexts = sum(by_scope.values())
    masks = sum(count * _masks_per_site(plan, scope) for scope, count in by_scope.items())
    return KindPrediction(
        values=values,
        ciphertexts=ciphertexts,
        bytes_up=round(ciphertexts * sample.bytes_up),
        bytes_down=round(ciphertexts * sample.bytes_down),
        plain_float32_bytes=4 * values,
        encrypt_seconds=ciphertexts * sample.encrypt + masks * sample.mask,
        decrypt_seconds=ciphertexts * sample.decrypt,
    )


def _measure(plan: Plan) -> _Sample:
    packing = plan.packing
    layout = UpdateLayout(SAMPLE, (("values", (SAMPLE_VALUES,)),))
    key = SecretKey.generate(packing.params)
    vector = np.random.default_rng().normal(0, 0.3, SAMPLE_VALUES).astype(np.float32)
    count = num_ciphertexts(layout, packing)
    modulus, tag_key = packing.params.plain_modulus, key.derive(SAMPLE.encode())

    started = time.perf_counter()
    slots = encode_update(vector, layout, packing=packing, value_range=1.0, weight=1, weight_cap=1, metrics={})
    mac(slots, tag_key, modulus)
    update = encrypt_update(key, {SAMPLE: slots})
    encrypted = time.perf_counter()
    _add_masks(slots.copy(), SAMPLE_MASKS, modulus)  # the sample stays unmasked: it is decoded below
    masked = time.perf_counter()
    aggregate = agg_init(packing.params, {SAMPLE: count}, max_sites=packing.max_sites)
    agg_update(aggregate, update)
    agg_update(aggregate, update)
    added = time.perf_counter()
    sums = agg_finish(aggregate, min_sites=2)
    finished = time.perf_counter()
    summed = decrypt_slots(key, sums[0].ciphertexts)
    mac(summed, tag_key, modulus)
    decode_sum(summed, layout, packing=packing, value_range=1.0, weight_cap=1)
    done = time.perf_counter()
    return _Sample(
        bytes_up=sum(map(len, update[0].ciphertexts)) / count,
        bytes_down=sum(map(len, sums[0].ciphertexts)) / count,
        encrypt=(encrypted - started) / count,
        mask=(masked - encrypted) / SAMPLE_MASKS / count,
        add=(added - masked) / 2 / count,
        decrypt=(done - finished) / count,
    )


def _masks_per_site(plan: Plan, scope: str) -> int:
    """Masks a site adds to its update of a scope in the largest cohort.

    To the adapter its self mask, and one for each neighbour; to a head one for each other site of its kind. How many
    of a kind there will be is not in the plan: at most all.
    """
    cohort = plan.spec.cohort
    if scope != GLOBAL_SCOPE:
        return cohort.max_sites - 1
    graph = choose_graph(cohort.max_sites, colluders=cohort.colluders, dropout_fraction=cohort.dropout_fraction)
    return graph.degree + 1


def _add_masks(slots: Slots, count: int, modulus: int) -> None:
    for number in range(count):
        add_stream(slots, number.to_bytes(SEED_BYTES, "big"), SAMPLE.encode(), modulus)
