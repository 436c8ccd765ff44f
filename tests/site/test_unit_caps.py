"""Caps on the records of a unit, from the plan to the records that a site trains on."""

import numpy as np
import pytest

from fedseek.records import Records
from fedseek_site import training
from fedseek_site.admission import SiteData, units_for

HOSPITAL = "仁济医院"


@pytest.fixture
def crowded(tiny_records):
    """Twelve hospital rows, ten of them of one patient."""
    records = tiny_records("hospital", 12)
    return Records(records.texts, records.labels, ("客0",) * 10 + ("客9", "客9"), "unit")


@pytest.fixture
def seen_in_training(monkeypatch):
    """What each call of ``train_round`` was given, as (site, records)."""
    seen, real = [], training.train_round

    def watched(model, records, **options):
        seen.append(records)
        return real(model, records, **options)

    monkeypatch.setattr(training, "train_round", watched)
    return seen


def test_a_record_level_kind_beside_it_is_not_capped(tiny_plan, crowded):
    plan = tiny_plan(privacy={"max_records_per_unit": 2})
    capped = units_for(plan, "hospital", crowded)
    assert (len(capped), capped.num_units) == (4, 2)
    assert (len(units_for(plan, "bank", crowded)), units_for(plan, "bank", crowded).num_units) == (12, 12)


def test_without_a_cap_all_records_are_kept(tiny_plan, crowded):
    assert units_for(tiny_plan(), "hospital", crowded) is crowded


def test_another_plan_draws_other_lots(tiny_plan, crowded):
    kept = {
        units_for(tiny_plan(seed=seed, privacy={"max_records_per_unit": 3}), "hospital", crowded) for seed in range(8)
    }
    assert len(kept) > 1


def test_training_sees_only_what_is_kept_also_after_a_restart(make_cohort, tiny_plan, crowded, seen_in_training):
    plan = tiny_plan(private=True, privacy={"max_records_per_unit": 3}, audit={"canaries": 0})
    cohort = make_cohort(plan=plan, data={HOSPITAL: SiteData(crowded, crowded)})
    cohort.play(until=("round", 2))
    assert len(seen_in_training) == 4
    cohort.restart(HOSPITAL)
    cohort.play()
    of_hospital = [records for records in seen_in_training if len(records) == 5]
    assert len(of_hospital) == plan.spec.training.rounds == 2
    first, second = ([ids.tolist() for ids in records.input_ids] for records in of_hospital)
    assert first == second
    assert np.bincount(of_hospital[0].units).tolist() == [3, 2]


def test_held_back_rows_are_not_capped(make_cohort, tiny_plan, crowded):
    plan = tiny_plan(privacy={"max_records_per_unit": 3})
    cohort = make_cohort(plan=plan, data={HOSPITAL: SiteData(crowded, crowded)})
    cohort.play(until=("round", 1))
    run, _ = cohort.site(HOSPITAL)._held
    assert (len(run.train_in(1)), len(run.held_back_in(1))) == (5, 12)


def test_a_site_that_counts_by_records_counts_its_patients(make_cohort, tiny_plan, crowded, monkeypatch):
    """How many records one of them has must not show in the weight of the site: the guarantee is for the patient."""
    weights = {}
    real = training.encode_update

    def watched(update, layout, *, weight, **options):
        weights[layout.scope] = weight
        return real(update, layout, weight=weight, **options)

    monkeypatch.setattr(training, "encode_update", watched)
    cohort = make_cohort(
        plan=tiny_plan(cohort={"weighting": "records", "record_cap": 100}),
        data={HOSPITAL: SiteData(crowded, crowded), "st-anna": SiteData(crowded, crowded)},
    )
    cohort.play(until=("round", 2))
    assert weights["kind/hospital"] == 2
    assert weights["kind/bank"] == 12
