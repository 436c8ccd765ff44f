"""Each rule by which a site refuses a plan, and that the rule's text tells nothing of the data."""

import pytest

from fedseek.errors import InvalidPlan, PlanRefused
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.lora.source import files_digest
from fedseek.plan import check_plan, parse_spec
from fedseek.records import Records
from fedseek_site.admission import SiteData, check_admission, check_labels, check_roster, units_for

ME = SiteIdentity.generate("仁济医院", "hospital").public()
OTHERS = [
    SiteIdentity.generate(name, kind).public()
    for name, kind in (("甲银行", "bank"), ("乙银行", "bank"), ("st-anna", "hospital"))
]
ROSTER = Roster.of([ME, *OTHERS])


def refusal(plan, data, *, me=ME, roster=ROSTER) -> PlanRefused:
    with pytest.raises(PlanRefused) as caught:
        check_admission(plan, roster, me=me, data=data)
    assert caught.value.site == me.name
    return caught.value


@pytest.mark.parametrize("private", [False, True])
def test_a_plan_that_fits_is_admitted(tiny_plan, tiny_data, private):
    check_admission(tiny_plan(private=private), ROSTER, me=ME, data=tiny_data("hospital"))


def test_a_kind_that_is_not_in_the_plan(tiny_plan, tiny_data):
    insurer = SiteIdentity.generate("平安", "insurer").public()
    error = refusal(tiny_plan(), tiny_data("hospital"), me=insurer, roster=Roster.of([insurer, *OTHERS]))
    assert error.rule == "the plan has no task for sites of kind 'insurer'"


def roster_refusal(roster, trusted, *, me=ME) -> PlanRefused:
    with pytest.raises(PlanRefused) as caught:
        check_roster(roster, trusted, me=me)
    return caught.value


def test_the_roster_that_people_compared_is_taken():
    check_roster(ROSTER, Roster.of(reversed(ROSTER.entries)), me=ME)


def test_no_roster_is_taken_before_people_compared_one():
    assert roster_refusal(ROSTER, None).rule == "no roster is trusted at this site yet"


@pytest.mark.parametrize("what", ["keys-swapped", "a-site-more", "a-site-less", "another-kind"])
def test_a_roster_that_differs_from_the_compared_one_in_anything_is_refused(what):
    first, *rest = OTHERS
    false = SiteIdentity.generate(first.name, first.kind).public()
    offered = {
        "keys-swapped": [ME, false, *rest],
        "a-site-more": [ME, *OTHERS, SiteIdentity.generate("丙银行", "bank").public()],
        "a-site-less": [ME, *rest],
        "another-kind": [ME, type(first)(first.name, "hospital", first.signing_key, first.sealing_key), *rest],
    }[what]
    error = roster_refusal(Roster.of(offered), ROSTER)
    assert error.rule == "the roster offered is not the one that is trusted at this site"


def test_a_roster_without_this_site_is_refused_though_it_is_trusted():
    without_me = Roster.of(OTHERS)
    assert "does not list this site" in roster_refusal(without_me, without_me).rule
    impostor = Roster.of([SiteIdentity.generate(ME.name, ME.kind).public(), *OTHERS])
    assert roster_refusal(impostor, impostor).rule == "the roster does not list this site with its own keys"


@pytest.mark.parametrize("cohort", [{"min_sites": 5, "max_sites": 8}, {"max_sites": 3}], ids=["too-few", "too-many"])
def test_a_roster_of_a_size_that_the_plan_does_not_allow(tiny_plan, tiny_data, cohort):
    error = refusal(tiny_plan(cohort=cohort), tiny_data("hospital"))
    wanted = f"{cohort.get('min_sites', 3)} to {cohort['max_sites']}"
    assert error.rule == f"the roster has 4 sites, the plan wants {wanted}"


def test_the_only_site_of_its_kind_is_admitted(tiny_plan, tiny_data):
    """Its head stays at home, so no sum of heads is its own head."""
    banks = [*OTHERS[:2], SiteIdentity.generate("丙银行", "bank").public()]
    check_admission(tiny_plan(), Roster.of([ME, *banks]), me=ME, data=tiny_data("hospital"))


def test_a_patient_level_plan_where_no_column_names_the_patient(tiny_plan, tiny_data):
    error = refusal(tiny_plan(), tiny_data("hospital", unit=None))
    assert error.rule == "the plan protects a patient, this site's data names no unit column"


def test_a_record_level_plan_needs_no_unit_column(tiny_plan_document, tiny_data):
    document = tiny_plan_document()
    document["kinds"]["hospital"]["unit"] = "record"
    check_admission(check_plan(parse_spec(document)), ROSTER, me=ME, data=tiny_data("hospital", unit=None))


@pytest.mark.parametrize(
    ("unit", "num_records", "admitted"),
    [
        # delta is 1/1000; two records a patient
        ("patient", 1998, True),
        ("patient", 2000, False),
        ("record", 999, True),
        ("record", 1000, False),
    ],
)
def test_delta_must_be_below_one_in_the_number_of_units_of_this_site(
    tiny_plan_document, tiny_records, unit, num_records, admitted
):
    document = tiny_plan_document(private=True)
    document["kinds"]["hospital"]["unit"] = unit
    plan = check_plan(parse_spec(document))
    data = SiteData(tiny_records("hospital", num_records), tiny_records("hospital", 6))
    if admitted:
        check_admission(plan, ROSTER, me=ME, data=data)
    else:
        assert refusal(plan, data).rule == "delta 0.001 is not below 1 / number of units of this site"


def test_without_privacy_no_delta_is_asked_for(tiny_plan, tiny_data):
    plan = tiny_plan()
    assert plan.privacy is None
    check_admission(plan, ROSTER, me=ME, data=tiny_data("hospital"))


def test_an_auc_over_held_back_rows_of_one_label(tiny_plan_document, tiny_data):
    document = tiny_plan_document()
    document["kinds"]["hospital"] = {"labels": ["急诊", "普通"], "unit": "patient", "metric": "auc"}
    plan, data = check_plan(parse_spec(document)), tiny_data("hospital")
    one_label = Records(data.held_back.texts[:1], ("急诊",), ("客0",), "unit")
    error = refusal(plan, SiteData(data.train, one_label))
    assert error.rule == "the plan asks for an AUC, the rows held back here have one label only"


def test_another_base_model(tiny_plan, tiny_data, make_tiny_model, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=1)
    error = refusal(tiny_plan(model={"source": f"path:{other}"}), tiny_data("hospital"))
    assert error.rule == "the base model here is not the one the plan names"
    assert "weights have sha256" in error.hint, "what differs stays in the site's own log"


def test_a_base_model_with_another_tokenizer(tiny_plan, tiny_data, tiny_model):
    held = files_digest(tiny_model)
    check_admission(tiny_plan(model={"files_sha256": held}), ROSTER, me=ME, data=tiny_data("hospital"))
    error = refusal(tiny_plan(model={"files_sha256": "0" * 64}), tiny_data("hospital"))
    assert error.rule == "the base model here is not the one the plan names"
    assert f"configuration and tokenizer have sha256 {held}" in error.hint


def test_a_base_model_that_is_not_there(tiny_plan, tiny_data, tmp_path):
    error = refusal(tiny_plan(model={"source": f"path:{tmp_path}/无"}), tiny_data("hospital"))
    assert error.rule == "the base model here is not the one the plan names"


def test_a_base_model_of_another_family(tiny_plan, tiny_data):
    check_admission(tiny_plan(model={"family": "bert"}), ROSTER, me=ME, data=tiny_data("hospital"))
    error = refusal(tiny_plan(model={"family": "qwen2"}), tiny_data("hospital"))
    assert error.rule == "the base model here is not the one the plan names"
    assert "'bert', the plan wants 'qwen2'" in error.hint


def test_a_model_of_a_hub_that_is_not_here_is_not_fetched(tiny_plan, tiny_data, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: pytest.fail("fetched"))
    error = refusal(tiny_plan(model={"source": f"hub:owner/name@{'0' * 40}"}), tiny_data("hospital"))
    assert error.rule == "the base model here is not the one the plan names"
    assert "in the local cache" in error.hint


def test_no_rule_tells_a_count_or_a_path(tiny_plan, tiny_data, tiny_records, tmp_path):
    many = SiteData(tiny_records("hospital", 4246), tiny_records("hospital", 6))
    refused = [
        refusal(tiny_plan(private=True), many),
        refusal(tiny_plan(model={"source": f"path:{tmp_path}/无"}), tiny_data("hospital")),
        refusal(tiny_plan(), tiny_data("hospital", unit=None)),
    ]
    for error in refused:
        for secret in ("4246", "2123", str(tmp_path), "胸痛", "客"):
            assert secret not in error.rule


def test_labels_that_are_not_in_the_plan_are_counted_and_not_named(tiny_plan, tiny_data):
    data = tiny_data("hospital")
    check_labels(tiny_plan(), "hospital", data)
    for part in ("train", "held_back"):
        rows = getattr(data, part)
        odd = Records(rows.texts, ("罕见病-王小明", *rows.labels[1:]), rows.units, rows.unit_column)
        altered = SiteData(odd, data.held_back) if part == "train" else SiteData(data.train, odd)
        with pytest.raises(InvalidPlan, match=r"kinds\.hospital: 1 label\(s\)") as caught:
            check_labels(tiny_plan(), "hospital", altered)
        assert "王小明" not in str(caught.value)


def test_the_unit_is_the_plans_whatever_the_columns_say(tiny_plan_document, tiny_data):
    records = tiny_data("hospital").train
    document = tiny_plan_document()
    assert units_for(check_plan(parse_spec(document)), "hospital", records).num_units == 6
    document["kinds"]["hospital"]["unit"] = "record"
    assert units_for(check_plan(parse_spec(document)), "hospital", records).num_units == 12
