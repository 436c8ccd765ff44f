"""What every scheme is measured on: the same updates, the true sum of them to check against, and a stopwatch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from fedseek.encode import Float32Vector, Float64Vector, Slots, UpdateLayout, encode_update
from fedseek.he.packing import Packing, choose_packing
from fedseek.plan import GLOBAL_SCOPE, Plan, check_plan, parse_spec

VALUE_RANGE = 0.01
WEIGHT_CAP = 10_000
METRICS = {"loss": 1.25, "examples": 512.0}
SEED = 20260801
RECEIVERS = 3  # sites that decrypt the sum, to take a median of
KIND = "bank"


@dataclass(frozen=True, slots=True)
class Workload:
    """One cohort and the size of its updates; ``dropouts`` sites deal shares and then vanish."""

    values: int
    sites: int
    max_sites: int
    bits: int
    colluders: int = 0
    dropout_fraction: float = 0.1
    dropouts: int = 0

    @property
    def packing(self) -> Packing:
        return choose_packing(self.bits, self.max_sites)

    @property
    def layout(self) -> UpdateLayout:
        return UpdateLayout(GLOBAL_SCOPE, (("lora_B", (self.values,)),), tuple(METRICS))

    @property
    def present(self) -> tuple[int, ...]:
        """The sites that do not vanish, by number; those that do are anywhere among them."""
        gone = np.random.default_rng([SEED, self.sites]).choice(self.sites, self.dropouts, replace=False)
        return tuple(sorted(set(range(self.sites)) - set(gone.tolist())))

    def update(self, site: int) -> tuple[Float32Vector, int]:
        """A site's update and its weight, made again from its number when asked for again."""
        rng = np.random.default_rng([SEED, site])
        vector = rng.standard_normal(self.values, dtype=np.float32) * np.float32(VALUE_RANGE / 6)
        return vector, int(rng.integers(1, WEIGHT_CAP, endpoint=True))

    def encode(self, vector: Float32Vector, weight: int) -> Slots:
        return encode_update(
            vector,
            self.layout,
            packing=self.packing,
            value_range=VALUE_RANGE,
            weight=weight,
            weight_cap=WEIGHT_CAP,
            metrics=METRICS,
        )

    def plan(self) -> Plan:
        """A plan that asks for just this sum. What it says about training plays no part."""
        document = {
            "name": "benchmark",
            "model": {"source": "path:none", "sha256": "0" * 64},
            "kinds": {KIND: {"labels": ["no", "yes"]}},
            "lora": {"target_modules": ["query"]},
            "training": {
                "rounds": 1,
                "steps_per_round": 1,
                "sampling_probability": 0.5,
                "learning_rate": 0.01,
                "head_learning_rate": 0.01,
            },
            "privacy": {"mechanism": "none"},
            "encryption": {"value_bits": self.bits},
            "cohort": {
                "min_sites": self.colluders + 2,
                "max_sites": self.max_sites,
                "colluders": self.colluders,
                "min_contributors": 2,
                "dropout_fraction": self.dropout_fraction,
                "weighting": "records",
                "record_cap": WEIGHT_CAP,
            },
        }
        return check_plan(parse_spec(document))


@dataclass(slots=True)
class Truth:
    """The sum in the clear. ``slots`` only where a scheme adds integers."""

    weighted: Float64Vector
    slots: Slots
    weight: int = 0

    @classmethod
    def empty(cls, workload: Workload) -> Truth:
        return cls(np.zeros(workload.values), np.zeros(0, dtype=np.uint64))

    def add(self, vector: Float32Vector, weight: int, slots: Slots | None = None) -> None:
        self.weighted += vector.astype(np.float64) * weight
        self.weight += weight
        if slots is not None:
            self.slots = self.slots + slots if self.slots.size else slots.copy()

    def error(self, mean: Float64Vector) -> float:
        """Largest distance of any value of ``mean`` from the weighted mean."""
        return float(np.abs(mean - self.weighted / self.weight).max())


@dataclass(slots=True)
class Stopwatch:
    """CPU seconds of this process by stage and site."""

    seconds: defaultdict[str, defaultdict[int, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )

    @contextmanager
    def __call__(self, stage: str, site: int) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[stage][site] += time.process_time() - started

    def median(self, *stages: str, sites: tuple[int, ...]) -> float:
        """Of what these stages took a site together."""
        return float(np.median([sum(self.seconds[stage][site] for stage in stages) for site in sites]))
