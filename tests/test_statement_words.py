"""The statement in words: no language says more or less than the statement, or than another language."""

import re

import msgspec
import pytest
from bundled import Signers

from fedseek.dp import guards
from fedseek.dp.site_guards import SITE_LEVEL_GUARDS
from fedseek.release import _GATE, check_release
from fedseek.statement import (
    ACCOUNTANT,
    NEIGHBORING_RELATION,
    NO_TRUST_MODEL,
    NOT_COVERED,
    SITE_MECHANISM,
    SITE_RELATION,
    SITE_TRUST_MODEL,
    TRUST_MODEL,
    CanaryAudit,
    PrivacyStatement,
    SiteLevel,
    StageStated,
)
from fedseek.statement_page import describe_guarantee, describe_statement, privacy_page
from fedseek.statement_words import CHINESE, ENGLISH, LANGUAGES

SITE = "仁济医院"
both = pytest.mark.parametrize("words", LANGUAGES, ids=lambda words: words.file)


@pytest.fixture(scope="module")
def private(tiny_plan):
    return Signers.of(tiny_plan(private=True))


@pytest.fixture(scope="module")
def said(private):
    level = SiteLevel(
        epsilon=3.14159,
        delta=1e-4,
        l2_clip_norm=0.777,
        neighboring_relation=SITE_RELATION,
        mechanism=SITE_MECHANISM,
        trust_model=SITE_TRUST_MODEL,
    )
    return msgspec.structs.replace(private.statement(SITE), site_level=level, max_records_per_unit=11)


@both
def test_every_field_has_a_name(words):
    assert tuple(words.fields) == PrivacyStatement.__struct_fields__
    assert tuple(words.stage) == StageStated.__struct_fields__
    assert tuple(words.site_level) == SiteLevel.__struct_fields__
    assert tuple(words.audit) == CanaryAudit.__struct_fields__
    assert all([*words.fields.values(), *words.stage.values(), *words.site_level.values(), *words.audit.values()])


@both
def test_every_guard_and_check_has_words(words, private):
    known = {*guards.TRAINING_GUARDS, guards.NO_UNNOISED_METRICS, *SITE_LEVEL_GUARDS}
    assert set(words.guards) == known
    checks = check_release(private.plan, private.outcome(SITE))
    assert len(checks) == len(_GATE)
    assert set(words.checks) == {check.name for check in checks}


def test_every_fixed_text_is_in_chinese():
    fixed = {
        NEIGHBORING_RELATION,
        ACCOUNTANT,
        TRUST_MODEL,
        NO_TRUST_MODEL,
        SITE_MECHANISM,
        SITE_RELATION,
        SITE_TRUST_MODEL,
    }
    assert fixed | {*NOT_COVERED, "record", "customer", "patient", "none", "dp-sgd"} == set(CHINESE.terms)
    for text, told in CHINESE.terms.items():
        assert re.search(r"[\u4e00-\u9fff]", told), text


def test_the_tables_say_different_things_in_the_two_languages():
    for name in ("fields", "stage", "site_level", "audit", "guards", "checks"):
        english, chinese = getattr(ENGLISH, name), getattr(CHINESE, name)
        assert english.keys() == chinese.keys()
        assert not [key for key in english if english[key] == chinese[key]]


@both
def test_a_page_shows_every_field_and_every_limit(words, private, said):
    page = privacy_page(private.plan, [said], words, unsigned=["st-anna"])
    for label in (*words.fields.values(), *words.stage.values(), *words.site_level.values(), *words.audit.values()):
        assert label in page
    for line in NOT_COVERED:
        assert f"- {words.term(line)}\n" in page
    for figure in ("3.14159", "0.777", "1.25", "0.95", "64", "11", "0.6944", f"{said.epsilon:.6g}", "0.001", "st-anna"):
        assert figure in page, figure
    for digest in (said.plan_digest, said.roster_digest, *said.files.values(), *said.tensors.values()):
        assert digest in page
    for guard in said.guards_passed:
        assert f"`{guard}` | {words.guards[guard]}" in page
    for check in said.checks:
        assert f"| {words.checks[check.name]} | `{check.wanted}` | `{check.got}` |" in page
    for name in said.contributors:
        assert name in page
    for text in (said.trust_model, said.accountant, said.mechanism, said.unit, said.neighboring_relation):
        assert words.term(text).replace("_", r"\_") in page


@both
def test_the_two_pages_are_built_alike(words, private, said):
    page = privacy_page(private.plan, [said, private.statement("st-anna")], words, unsigned=())
    other = privacy_page(private.plan, [said, private.statement("st-anna")], ENGLISH, unsigned=())
    shape = [line[:2] for line in page.splitlines()]
    assert [each for each in shape if each in ("# ", "##", "| ", "- ")] == [
        line[:2] for line in other.splitlines() if line[:2] in ("# ", "##", "| ", "- ")
    ]


def test_the_guarantee_is_one_sentence(private, said):
    assert describe_guarantee(said, ENGLISH) == (
        "仁济医院 (hospital): **(8.00, 0.001)-differential privacy** for one patient (add or remove one unit)."
    )
    assert describe_guarantee(said, CHINESE) == (
        "仁济医院 (hospital)：以患者为隐私单元，满足 **(8.00, 0.001)-差分隐私**（相邻关系：增加或移除一个隐私单元）。"
    )


@pytest.mark.parametrize(
    ("epsilon", "told"), [(7.991, "8.00"), (0.1, "0.10"), (2.0, "2.00"), (2.0001, "2.01"), (0.501, "0.51")]
)
def test_an_upper_bound_is_never_rounded_down(said, epsilon, told):
    assert f"({told}, " in describe_guarantee(msgspec.structs.replace(said, epsilon=epsilon), ENGLISH)


@both
def test_nothing_is_promised_that_was_not_earned(words, private, tiny_plan):
    public = Signers.of(tiny_plan())
    for statement in (public.statement(SITE), msgspec.structs.replace(private.statement(SITE), epsilon=None)):
        text = describe_statement(statement, words)
        assert words.nothing in text
        assert "differential privacy" not in text
        assert "差分隐私**" not in text


@both
def test_a_name_cannot_change_the_page(words, private, said):
    odd = msgspec.structs.replace(said, site="A | `B` <b>*c*</b> [x](y)", contributors=("# d\ne",), run="r\n# s")
    page = privacy_page(private.plan, [odd], words, unsigned=())
    assert "<b>" not in page
    assert "[x](y)" not in page
    assert "\n# s" not in page
    assert "\n# d" not in page
