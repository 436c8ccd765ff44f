from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from simulations.summary import Summary
from simulations.verdicts import with_verdicts

SITES = (
    ("northern-bank", "bank", "Northern Bank"),
    ("harbour-bank", "bank", "Harbour Bank 海港"),
    ("st-anna-hospital", "hospital", "St. Anna Hospital"),
    ("renji-hospital", "hospital", "仁济医院"),
)
FEDERATED = ((0.12, 0.55, 0.74, 0.86), (0.11, 0.52, 0.75, 0.88), (0.21, 0.44, 0.61, 0.72), (0.19, 0.46, 0.66, 0.75))
LOCAL = ((0.12, 0.48, 0.58, 0.62), (0.11, 0.44, 0.57, 0.61), (0.21, 0.40, 0.48, 0.51), (0.19, 0.43, 0.54, 0.58))
CENTRALISED = ((0.12, 0.70, 0.85, 0.91), (0.11, 0.71, 0.86, 0.92), (0.21, 0.52, 0.70, 0.78), (0.19, 0.55, 0.74, 0.80))
EPSILON = (0.0, 3.9, 6.1, 7.86)
SECONDS = {
    "train": 21.4,
    "encode": 0.31,
    "tag": 0.02,
    "mask": 0.06,
    "encrypt": 0.42,
    "shares": 0.01,
    "decrypt": 0.28,
    "apply": 0.05,
    "evaluate": 3.9,
}
NO_SECONDS = dict.fromkeys(SECONDS, 0.0)


def _site_round(index: int, turn: int, *, private: bool) -> dict[str, Any]:
    return {
        "site": SITES[index][0],
        "utility": FEDERATED[index][turn],
        "metric": "accuracy",
        "loss": 2.1 - 0.5 * turn,
        "epsilon": EPSILON[turn] - 0.3 * index * (turn > 0) if private else None,
        "bytes_up": 384_210 if turn else 0,
        "bytes_down": 770_112 if turn else 0,
        "saturated_fraction": 0.0004 if turn else None,
        "seconds": SECONDS if turn else NO_SECONDS | {"evaluate": 3.9},
    }


def _round(turn: int, *, private: bool) -> dict[str, Any]:
    coordinator = {
        "aggregate_s": 0.21,
        "unmask_s": 0.02,
        "survivors": 4,
        "bytes_in": 4 * 384_210,
        "bytes_out": 4 * 770_112,
    }
    return {
        "round": turn,
        "seconds": 31.0 if turn else 4.2,
        "sites": [_site_round(index, turn, private=private) for index in range(len(SITES))],
        "coordinator": coordinator if turn else None,
        "federated_utility": {"bank": FEDERATED[0][turn], "hospital": FEDERATED[2][turn]},
    }


def _by_site(values: tuple[Any, ...]) -> dict[str, Any]:
    return {site: value for (site, _, _), value in zip(SITES, values, strict=True)}


def _figures(*, private: bool, baselines: bool) -> dict[str, Any]:
    units = ("customer", "customer", "patient", "patient")
    return {
        "run": "two-banks-two-hospitals-7",
        "started_at": "2026-03-02T08:15:30Z",
        "finished_at": "2026-03-02T08:17:14Z",
        "plan_digest": "sha256:" + "5a" * 32,
        "model": {"name": "all-MiniLM-L6-v2", "sha256": "c3" * 32},
        "scenario": "two-banks-two-hospitals",
        "versions": {"python": "3.11.9", "fedseek": "0.1.0", "flwr": "1.41.0", "torch": "2.13.0"},
        "sites": [
            {
                "name": name,
                "kind": kind,
                "display_name": display,
                "records": 2050,
                "held_back_records": 500,
                "units": 900 + len(unit),
            }
            for (name, kind, display), unit in zip(SITES, units, strict=True)
        ],
        "encryption": {
            "value_bits": 13,
            "max_sites": 8,
            "digits_per_slot": 3,
            "poly_modulus_degree": 4096,
            "noise_budget_bits_left": 4,
            "ciphertexts": {"global": 9, "kind": 2},
        },
        "privacy": {
            "mechanism": "dp-sgd",
            "unit": "customer",
            "epsilon_target": 8.0,
            "delta": 1e-5,
            "noise_multiplier": 0.83,
            "sampling_probability": 0.06,
            "steps_per_round": 16,
            "l2_clip_norm": 1.0,
        }
        if private
        else None,
        "rounds": [_round(turn, private=private) for turn in range(4)],
        "baselines": {
            "local_only": _by_site(LOCAL),
            "centralised": _by_site(CENTRALISED),
            "linear_probe": _by_site((0.60, 0.61, 0.52, 0.57)),
            "dp_linear_probe": _by_site((0.55, 0.54, 0.47, 0.50)),
        }
        if baselines
        else {},
        "totals": {
            "seconds": 104.0,
            "bytes_up": 12 * 384_210,
            "bytes_down": 12 * 770_112,
            "plain_float32_bytes": 12 * 589_824,
            "phase_seconds": {name: 12 * value for name, value in SECONDS.items()}
            | {"aggregate": 0.63, "unmask": 0.06},
        },
        "peak_rss_mb": {"coordinator": 212.0, "site_max": 1480.0},
        "release": {
            "adapter_sha256": "9e" * 32,
            "path": "release/adapter_model.safetensors",
            "trainable_values": 147_456,
            "guards_passed": _by_site((("adapter-moved", "clipped", "noise-fresh"),) * 4),
        },
    }


@pytest.fixture
def made_up_figures() -> Callable[..., dict[str, Any]]:
    """Return the JSON of a whole made-up run; ``private`` and ``baselines`` choose what it has."""

    def make(*, private: bool = True, baselines: bool = True) -> dict[str, Any]:
        return _figures(private=private, baselines=baselines)

    return make


@pytest.fixture
def made_up_summary(made_up_figures: Callable[..., dict[str, Any]]) -> Callable[..., Summary]:
    """Return the summary of a made-up run, with its verdicts."""

    def make(*, private: bool = True, baselines: bool = True) -> Summary:
        return with_verdicts(Summary.model_validate(made_up_figures(private=private, baselines=baselines)))

    return make
