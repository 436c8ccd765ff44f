"""A kind without a head: its scope has no tensors, and carries its metrics through the whole round all the same."""

from dataclasses import replace

import numpy as np
import pytest
from four_sites import KINDS, LAYOUTS, RUN, WEIGHTS, participants

from fedseek.apply import ScopeState
from fedseek.encode import UpdateLayout
from simulations.protocol import ciphertexts_of, run_round

BANK = "kind/bank"
NO_HEAD = UpdateLayout(BANK, (), ("held_back_loss", "held_back_count"))
SITE_LEVEL = {
    "private": True,
    "privacy": {"site": {"epsilon": 8.0, "delta": 1e-4, "l2_clip_norm": 0.5}},
    "encryption": {"value_bits": 20},
}


def without_heads():
    """Four sites; the banks have no head and say how they did, the hospitals have one."""
    sites = []
    for place, site in enumerate(participants()):
        if BANK in site.scopes:
            empty = np.zeros(0, np.float32)
            site = replace(
                site,
                scopes={**site.scopes, BANK: ScopeState(NO_HEAD, empty, np.zeros(0), 0.5)},
                updates={**site.updates, BANK: empty},
                metrics={BANK: {"held_back_loss": 0.25 + place, "held_back_count": 10.0 + place}},
            )
        sites.append(site)
    return sites


@pytest.mark.parametrize("changes", [{}, SITE_LEVEL], ids=["plain", "site-level"])
def test_metrics_of_a_kind_without_a_head_come_out_of_the_encrypted_sum(tiny_plan, changes):
    weighting = {} if changes else {"weighting": "records", "record_cap": 10}
    plan = tiny_plan(
        cohort={"max_sites": 4, **weighting}, training={"server_momentum": 0.0 if changes else 0.9}, **changes
    )
    sites = without_heads()
    assert ciphertexts_of(plan, sites)[BANK] == 1
    outcome = run_round(plan, sites, run=RUN, number=1)
    for site in sites:
        if BANK not in site.scopes:
            continue
        after = outcome.sites[site.identity.name]
        summed, state = after.summed[BANK], after.scopes[BANK]
        assert summed.metrics == {"held_back_loss": 1.5, "held_back_count": 21.0}  # of the sites in places 0 and 1
        assert summed.weight == (2 if changes else sum(WEIGHTS[name] for name in WEIGHTS if KINDS[name] == "bank"))
        assert (summed.contributors, summed.saturated_fraction, summed.mean.shape) == (2, 0.0, (0,))
        assert (state.weights.size, state.momentum.size, state.value_range) == (0, 0, 0.5)
        assert state.layout == NO_HEAD


def test_a_kind_without_a_head_changes_nothing_for_the_others(tiny_plan):
    plan = tiny_plan(cohort={"max_sites": 4, "weighting": "records", "record_cap": 10})
    with_heads = run_round(plan, participants(), run=RUN, number=1).sites
    without = run_round(plan, without_heads(), run=RUN, number=1).sites
    for name in KINDS:
        assert without[name].digests["global"] == with_heads[name].digests["global"]
    hospital = LAYOUTS["kind/hospital"].scope
    assert without["st-anna"].digests[hospital] == with_heads["st-anna"].digests[hospital]
    assert without["harbour-bank"].digests[BANK] != with_heads["harbour-bank"].digests[BANK]
