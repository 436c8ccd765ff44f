import math

import numpy as np
import pytest
from click.testing import CliRunner
from plan_documents import checked

from fedseek.apply import ScopeState, apply_sums
from fedseek.cli import cli
from fedseek.encode import UpdateLayout, decode_sum, encode_integers
from fedseek.errors import InvalidPlan
from fedseek.he.packing import choose_packing
from fedseek.plan import plan_from_canonical
from fedseek.site_noise import encode_noised, share_variance

SITE = {"epsilon": 8.0, "delta": 1e-4, "l2_clip_norm": 0.5}
BANK = "kind/bank"
LAYOUTS = {
    "global": UpdateLayout("global", (("lora_B", (60, 50)),)),
    BANK: UpdateLayout(BANK, (("head.weight", (2, 500)),), ("held_back_count",)),
}


def plan_of(**changes):
    return checked(**{"privacy__site": SITE, "encryption__value_bits": 16, **changes})


def problems(**changes):
    with pytest.raises(InvalidPlan) as caught:
        plan_of(**changes)
    return caught.value.problems


def zeros():
    return {scope: np.zeros(layout.num_values, np.float32) for scope, layout in LAYOUTS.items()}


def encoded(plan, updates):
    return encode_noised(
        updates, LAYOUTS, params=plan.site_level, packing=plan.packing, metrics={"held_back_count": 3.0}
    )


def decoded(plan, scope, slots):
    return decode_sum(slots, LAYOUTS[scope], packing=plan.packing, value_range=plan.initial_range(scope), weight_cap=1)


# --- the plan -----------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_its_guarantee_for_sites_needs():
    plan = plan_of()
    site, cohort = plan.site_level, plan.spec.cohort
    rounds = plan.spec.training.rounds
    assert 7.9 < site.epsilon(rounds) <= 8.0
    assert (site.delta, site.l2_clip_norm, site.tolerated, site.rounds) == (1e-4, 0.5, cohort.colluders, rounds)
    assert site.honest == (2, cohort.min_contributors - cohort.colluders)
    assert plan_from_canonical(plan.canonical()) == plan
    assert checked().site_level is None


@pytest.mark.parametrize(
    ("sizes", "in_adapter"),
    [((3, 8, 1), 2), ((8, 8, 1), 7), ((12, 16, 1), 8), ((60, 64, 3), 49), ((5, 4, 1), None)],
    ids=["small", "everyone", "some-may-miss", "sparse", "no-such-cohort"],
)
def test_noise_is_sized_for_the_smallest_sum_that_a_coordinator_can_open(sizes, in_adapter):
    min_sites, max_sites, colluders = sizes
    changes = {
        "min_sites": min_sites,
        "max_sites": max_sites,
        "colluders": colluders,
        "min_contributors": colluders + 2,
    }
    if in_adapter is None:
        assert not any("privacy.site" in line for line in problems(cohort=changes))
        return
    site = plan_of(cohort=changes, encryption__value_bits=17).site_level
    assert site.honest == (in_adapter, 2)
    assert site.adapter_variance * in_adapter == pytest.approx(site.head_variance * 2, rel=1e-3)
    assert site.graph_chance == (2.0**-40 if max_sites > 20 else 0)


def test_the_range_is_the_same_in_every_scope_and_round():
    plan = plan_of()
    site = plan.site_level
    ranges = {plan.initial_range(scope) for scope in ("global", BANK, "kind/hospital")}
    assert ranges == {site.grid * site.levels}
    state = ScopeState(LAYOUTS["global"], np.zeros(3000, np.float32), np.zeros(3000), plan.initial_range("global"))
    slots = sum(encoded(plan, zeros())[0]["global"] for _ in range(3))
    after = apply_sums({"global": state}, {"global": decoded(plan, "global", slots)}, plan)
    assert after["global"].value_range == state.value_range
    free = apply_sums({"global": state}, {"global": decoded(plan, "global", slots)}, checked())
    assert free["global"].value_range != state.value_range


def test_a_plan_that_cannot_fit_is_refused_with_every_problem():
    found = problems(encryption__value_bits=8, kinds__bank__labels=["a", "b", "c"])
    assert any("privacy.site, encryption.value_bits, cohort: " in line and "more value_bits" in line for line in found)
    assert any(line.startswith("kinds.bank") for line in found)


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"cohort__weighting": "records"}, "cohort.weighting: ", 'wanted "equal"'),
        (
            {"cohort__min_contributors": 2, "cohort__colluders": 2, "cohort__min_sites": 4},
            "cohort.min_contributors: ",
            "+ 1",
        ),
        ({"privacy__site": {**SITE, "delta": 0.01}, "cohort__max_sites": 100}, "privacy.site.delta: ", "1 / max_sites"),
        (
            {"privacy__site": {**SITE, "epsilon": 0.01}},
            "privacy.site, encryption.value_bits, cohort: ",
            "larger epsilon",
        ),
        ({"privacy__site": {**SITE, "clip": 1}}, "privacy.site.clip: ", "not permitted"),
    ],
    ids=["weights", "colluders", "delta", "no-room", "unknown-field"],
)
def test_what_speaks_against_a_guarantee_for_sites(changes, where, words):
    assert any(line.startswith(where) and words in line for line in problems(**changes))


def test_the_command_line_checks_such_a_plan(write_tiny_scenario):
    privacy = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "site": {**SITE, "epsilon": 20.0}}
    fits = write_tiny_scenario(privacy=privacy, encryption={"value_bits": 16})
    assert CliRunner().invoke(cli, ["plan", "check", str(fits)]).exit_code == 0
    small = CliRunner().invoke(
        cli, ["plan", "check", str(write_tiny_scenario(privacy=privacy, encryption={"value_bits": 8}))]
    )
    assert isinstance(small.exception, InvalidPlan)
    assert "privacy.site, encryption.value_bits, cohort: " in small.exception.message


# --- encoding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [2, 4])
def test_the_decoded_sum_has_the_noise_that_was_promised(sites):
    plan = plan_of()
    sent = [encoded(plan, zeros()) for _ in range(sites)]
    for scope in LAYOUTS:
        summed = decoded(plan, scope, sum(slots[scope] for slots, _ in sent))
        promised = plan.site_level.noise_std(share_variance(plan.site_level, scope), sites)
        assert summed.mean.std() == pytest.approx(promised, rel=6 / math.sqrt(2 * summed.mean.size))
        assert abs(summed.mean.mean()) < 6 * promised / math.sqrt(summed.mean.size)
        assert (summed.contributors, summed.weight, summed.saturated_fraction) == (sites, sites, 0)
    assert sent[0][1] == ("site_noise_added", "site_update_clipped")
    assert decoded(plan, BANK, sent[0][0][BANK]).metrics == {"held_back_count": 3.0}


def test_a_head_gets_the_larger_share():
    site = plan_of(cohort={"min_sites": 8, "max_sites": 8}).site_level
    assert site.honest == (7, 2)
    assert share_variance(site, "global") == site.adapter_variance < site.head_variance == share_variance(site, BANK)


def test_one_site_more_moves_the_sum_by_at_most_the_clip(monkeypatch):
    monkeypatch.setattr("fedseek.dp.site_share.discrete_gaussian", lambda size, *_: np.zeros(size, np.int64))
    monkeypatch.setattr("fedseek.dp.site_share.check_site_noise_added", lambda *_, **__: "off")
    plan, rng = plan_of(), np.random.default_rng(3)
    others = sum_of(encoded(plan, zeros())[0] for _ in range(2))
    for size in (1e-3, 1.0, 1e20):
        update = {
            scope: (size * rng.standard_normal(vector.size)).astype(np.float32) for scope, vector in zeros().items()
        }
        with_it, without = sum_of([others, encoded(plan, update)[0]]), sum_of([others, encoded(plan, zeros())[0]])
        moved = [3 * (decoded(plan, s, with_it[s]).mean - decoded(plan, s, without[s]).mean) for s in LAYOUTS]
        norm = math.sqrt(sum(float(part @ part) for part in moved))
        assert norm <= plan.site_level.l2_clip_norm * (1 + 1e-9)
        assert size < 1 or norm == pytest.approx(plan.site_level.l2_clip_norm, rel=0.02)


def sum_of(sent):
    sent = list(sent)
    return {scope: sum(slots[scope] for slots in sent) for scope in LAYOUTS}


def test_no_share_of_noise_leaves_its_digits():
    plan = plan_of(privacy__site={**SITE, "epsilon": 0.5}, encryption__value_bits=18)
    for _ in range(20):
        sent, _ = encoded(plan, {scope: vector + np.float32(0.01) for scope, vector in zeros().items()})
        assert all(decoded(plan, scope, slots).saturated_fraction == 0 for scope, slots in sent.items())


def test_integers_are_encoded_as_they_are_and_clamped_at_the_edge():
    packing, layout = choose_packing(13, 8), UpdateLayout("global", (("x", (5,)),))
    numbers = np.array([-9000, -4095, 0, 4095, 4096], np.int64)
    summed = decode_sum(
        encode_integers(numbers, layout, packing=packing, metrics={}),
        layout,
        packing=packing,
        value_range=4095.0,
        weight_cap=1,
    )
    assert summed.mean.tolist() == [-4095, -4095, 0, 4095, 4095]
    assert summed.saturated_fraction == 2 / 5


@pytest.mark.parametrize("numbers", [np.zeros(4, np.int64), np.zeros(5, np.int32), np.zeros((5, 1), np.int64)], ids=str)
def test_other_shapes_and_types_are_refused(numbers):
    with pytest.raises(ValueError, match="wanted int64"):
        encode_integers(numbers, UpdateLayout("global", (("x", (5,)),)), packing=choose_packing(13, 8), metrics={})


def test_two_sites_never_send_the_same_noise():
    plan = plan_of()
    first, second = (encoded(plan, zeros())[0]["global"] for _ in range(2))
    assert (first != second).mean() > 0.2  # the rest is padding


def test_a_scope_without_values_gets_no_noise_and_no_guard_vouches_for_it():
    plan = plan_of()
    layouts = {**LAYOUTS, BANK: UpdateLayout(BANK, (), ("held_back_count",))}
    nothing, params, packing = np.zeros(0, np.float32), plan.site_level, plan.packing
    metrics = {"held_back_count": 3.0}
    slots, guards = encode_noised({BANK: nothing}, layouts, params=params, packing=packing, metrics=metrics)
    summed = decode_sum(slots[BANK], layouts[BANK], packing=packing, value_range=1.0, weight_cap=1)
    assert (summed.metrics, summed.mean.shape, guards) == (metrics, (0,), ())
    both = {"global": zeros()["global"], BANK: nothing}
    slots, guards = encode_noised(both, layouts, params=params, packing=packing, metrics=metrics)
    assert set(slots) == {"global", BANK}
    assert guards == ("site_noise_added", "site_update_clipped")
