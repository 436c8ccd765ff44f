"""What both locks take of a round of three sites, stage by stage: a whole `simulations.protocol.run_round`, its stages timed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
from workload import KIND, VALUE_RANGE, Workload

from fedseek.apply import ScopeState
from fedseek.encode import UpdateLayout
from fedseek.identity.keys import SiteIdentity
from fedseek.plan import GLOBAL_SCOPE, head_scope
from fedseek.prepare import HELD_BACK_METRICS
from simulations import protocol

SITES = 3
PROTECT, RECEIVE = ("encode", "tag", "mask", "encrypt"), ("decrypt", "apply")


@contextmanager
def stages_timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up what each stage of `protocol.run_round` takes, over all sites."""

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds[stage] += time.perf_counter() - began

        return call

    stages = {
        "encode": "encode_scopes",
        "tag": "add_tags",
        "mask": "mask_slots",
        "encrypt": "encrypt_update",
        "add": "agg_update",
        "unmask": "unmask_sum",
        "decrypt": "decrypt_sum",
        "apply": "apply_sums",
    }
    with ExitStack() as patched:
        for stage, name in stages.items():
            patched.enter_context(mock.patch.object(protocol, name, timed(stage, getattr(protocol, name))))
        yield


def measure_locks(num_values: int) -> dict[str, float]:
    """Wall seconds of each stage of a round of three sites under both locks: a site's own where it is a site's stage."""
    workload = Workload(values=num_values, sites=SITES, max_sites=SITES, bits=13)
    plan, (update, _) = workload.plan(), workload.update(0)
    layouts = (
        UpdateLayout(GLOBAL_SCOPE, (("lora", (num_values,)),)),
        UpdateLayout(head_scope(KIND), (("head", (2,)),), HELD_BACK_METRICS),
    )
    vectors = {GLOBAL_SCOPE: update, head_scope(KIND): np.zeros(2, np.float32)}
    scopes = {
        layout.scope: ScopeState(layout, np.zeros(size, np.float32), np.zeros(size), VALUE_RANGE)
        for layout, size in zip(layouts, (num_values, 2), strict=True)
    }
    sites = [
        protocol.Participant(
            SiteIdentity.generate(f"支行-{number}", KIND),
            scopes,
            vectors,
            metrics={head_scope(KIND): dict.fromkeys(HELD_BACK_METRICS, 1.0)},
        )
        for number in range(SITES)
    ]
    seconds: dict[str, float] = defaultdict(float)
    began = time.perf_counter()
    with stages_timed(seconds):
        protocol.run_round(plan, sites, run="基准-1", number=1)
    of_sites = {stage: total / (1 if stage == "unmask" else SITES) for stage, total in seconds.items()}
    return {**of_sites, "whole": time.perf_counter() - began}
