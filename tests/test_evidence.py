"""The evidence bundle: what may be in its folder, and that no byte of it can be another without being named."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata

import msgspec
import numpy as np
import pytest
from bundled import RUN, Signers, adapter_bytes
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enrolled import signed_roster
from hypothesis import given
from hypothesis import strategies as st

from fedseek.cli import cli
from fedseek.errors import ReleaseRefused
from fedseek.evidence import bundle, parse_heads, parse_release, read_release
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.lora.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from fedseek.plan import check_plan, parse_spec
from fedseek.release import check_release
from fedseek.statement import PrivacyStatement, SiteLevel, privacy_statement
from fedseek.verification import verify_release

ANNA, RENJI, HARBOUR, BEIAN = "st-anna", "仁济医院", "harbour-bank", "北岸银行"


def replaced(statement, **changes):
    return msgspec.structs.replace(statement, **changes)


@pytest.fixture(scope="module")
def signers(tiny_plan):
    return Signers.of(tiny_plan(private=True))


@pytest.fixture(scope="module")
def whole(signers):
    return signers.files()


def refused(files, roster) -> str:
    with pytest.raises(ReleaseRefused) as caught:
        verify_release(parse_release(files), roster)
    assert caught.value.exit_code == 7
    return caught.value.message


def written(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def altered(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


# --- a release that holds


def test_a_release_as_it_was_written_holds(whole, signers, tmp_path):
    verified = verify_release(read_release(written(tmp_path / "发布", whole)), signers.roster)
    assert (verified.run, verified.approved) == (RUN, signers.roster.names)
    assert set(verified.statements) == set(signers.identities)
    assert len(verified.checked) == 9
    assert "countersigned by" in verified.checked[7]


def test_heads_of_audit_records_may_be_missing(signers):
    verified = verify_release(parse_release(signers.files(heads=False)), signers.roster)
    assert not any("audit" in line for line in verified.checked[1:6])
    assert len(verified.checked) == 8


def test_a_plan_without_privacy_is_released_and_states_no_epsilon(tiny_plan):
    public = Signers.of(tiny_plan())
    verified = verify_release(parse_release(public.files()), public.roster)
    assert {statement.epsilon for statement in verified.statements.values()} == {None}


def test_a_guarantee_for_whole_sites_is_stated_apart_and_worked_out_again(tiny_plan_document):
    document = tiny_plan_document(private=True, encryption={"value_bits": 20}, cohort={"colluders": 1})
    document["privacy"]["site"] = {"epsilon": 8.0, "delta": 1e-4, "l2_clip_norm": 0.5}
    both = Signers.of(check_plan(parse_spec(document)))
    statement = both.statement(ANNA)
    assert isinstance(statement.site_level, SiteLevel)
    assert 0 < statement.site_level.epsilon <= 8.0
    assert {"site_update_clipped", "site_noise_added"} <= set(statement.guards_passed)
    verify_release(parse_release(both.files()), both.roster)
    less = replaced(statement, site_level=replaced(statement.site_level, epsilon=1.0))
    assert "site_level" in refused(both.files(**{ANNA: both.sign(ANNA, less)}), both.roster)


# --- one byte


def places_in_text(data: bytes):
    """One place in every line: in the value, if it is a field."""
    start = 0
    for line in data.splitlines(keepends=True):
        told = [index for index, byte in enumerate(line.rstrip(b",\n")) if chr(byte).isalnum()]
        if told:
            yield start + told[-1]
        start += len(line)


def places(name: str, data: bytes):
    if name.endswith((".json", ".md")) and name != "plan.json":
        every = 1 if name in (f"privacy-{ANNA}.json", "audit-heads.json") else 9
        return sorted({0, len(data) - 1, *list(places_in_text(data))[::every]})
    if name == WEIGHTS_FILE:
        header = int.from_bytes(data[:8], "little")
        return [0, 7, 9, 8 + header // 2, 8 + header - 1, 8 + header, len(data) - 1]
    return sorted({*range(0, len(data), max(1, len(data) // 40)), len(data) - 1})


def test_a_byte_that_is_another_is_found_in_whatever_file_it_is(whole, signers):
    tried = 0
    for name, data in whole.items():
        for place in places(name, data):
            message = refused({**whole, name: altered(data, place)}, signers.roster)
            assert name in message, (name, place, data[max(0, place - 20) : place + 20], message)
            tried += 1
    assert tried > 400


@given(data=st.data())
def test_a_byte_anywhere_in_a_file_is_found(whole, signers, data):
    name = data.draw(st.sampled_from(sorted(whole)))
    place = data.draw(st.integers(0, len(whole[name]) - 1))
    assert name in refused({**whole, name: altered(whole[name], place)}, signers.roster)


@pytest.mark.parametrize(
    "alter", [lambda data: data[:-1], lambda data: data + b"\n", lambda data: b""], ids=["cut", "more", "empty"]
)
def test_a_file_that_is_cut_or_longer_is_found(whole, signers, alter):
    for name, data in whole.items():
        assert name in refused({**whole, name: alter(data)}, signers.roster)


# --- files


def test_each_file_has_to_be_there(whole, signers):
    for name in whole:
        if name == "audit-heads.json":
            continue
        files = {each: data for each, data in whole.items() if each != name}
        assert name in refused(files, signers.roster)


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "privacy-st-anna.txt", "privacy-.json", ".hidden", "head-bank.safetensors", "PRIVACY.fr.md"],
)
def test_a_file_that_no_release_has_is_refused(whole, tmp_path, name):
    folder = written(tmp_path / "release", {**whole, name: b"x"})
    with pytest.raises(ReleaseRefused, match=name.replace(".", r"\.")):
        read_release(folder)


def test_no_folder_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(ReleaseRefused, match="cannot be read"):
        read_release(tmp_path / "nowhere")
    with pytest.raises(ReleaseRefused, match="missing"):
        read_release(tmp_path)


def test_the_folder_that_a_site_keeps_is_told_from_a_release(tmp_path):
    with pytest.raises(ReleaseRefused, match="one site keeps for itself"):
        read_release(written(tmp_path / "own", {"privacy.json": b"{}", "README.md": b""}))


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_what_is_no_plain_file_is_neither_followed_nor_waited_for(whole, tmp_path, what):
    folder = written(tmp_path / "release", whole)
    path = folder / "README.md"
    path.unlink()
    if what == "link":
        (tmp_path / "elsewhere").write_bytes(whole["README.md"])
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(
        ReleaseRefused, match=r"README\.md: (cannot be read: it is a symbolic link|not a plain file|cannot be read)"
    ):
        read_release(folder)


@pytest.mark.parametrize("name", ["privacy-st-anna.sig", "privacy-st-anna.json", "plan.json"])
def test_a_file_beyond_its_bound_is_not_read(whole, signers, tmp_path, name):
    large = {**whole, name: whole[name] + bytes(1 << 20)}
    assert f"{name}: got" in refused(large, signers.roster)
    with pytest.raises(ReleaseRefused, match="wanted at most"):
        read_release(written(tmp_path / "release", large))


def test_names_that_a_file_system_takes_apart_are_read_as_they_were(signers, tmp_path, tiny_plan):
    name = "zürich"
    odd = Signers.of(tiny_plan(private=True))
    odd.identities[name] = SiteIdentity.generate(name, "bank")
    del odd.identities["harbour-bank"]
    odd.roster = Roster.of(identity.public() for identity in odd.identities.values())
    files = {unicodedata.normalize("NFD", each): data for each, data in odd.files(heads=False).items()}
    assert any(each not in odd.files(heads=False) for each in files)
    assert verify_release(read_release(written(tmp_path / "release", files)), odd.roster).approved == odd.roster.names


# --- who signed


def test_two_sites_that_change_places_are_found(whole, signers):
    swapped = dict(whole)
    for end in ("json", "sig"):
        swapped[f"privacy-{ANNA}.{end}"] = whole[f"privacy-{RENJI}.{end}"]
        swapped[f"privacy-{RENJI}.{end}"] = whole[f"privacy-{ANNA}.{end}"]
    assert f"privacy-{ANNA}.json" in refused(swapped, signers.roster)


def test_a_statement_that_a_site_signed_for_another_is_found(signers):
    spoken = signers.sign(ANNA, signers.statement(RENJI))
    assert "speaks for '仁济医院'" in refused(signers.files(**{ANNA: spoken}), signers.roster)


def test_a_statement_signed_by_nobody_on_the_roster_is_found(signers):
    stranger = SiteIdentity.generate(ANNA, "hospital")
    forged = signers.sign(ANNA, signers.statement(ANNA), by=stranger)
    assert f"privacy-{ANNA}.json" in refused(signers.files(**{ANNA: forged}), signers.roster)


def test_a_statement_of_a_site_that_is_not_on_the_roster_is_found(signers):
    stranger = SiteIdentity.generate("stranger", "bank")
    signed = signers.sign("stranger", replaced(signers.statement(HARBOUR), site="stranger"), by=stranger)
    assert "'stranger' is not on the roster" in refused(signers.files(stranger=signed), signers.roster)


def test_a_release_of_another_roster_is_found(whole, signers):
    other = Signers.of(signers.plan)
    assert "roster.bin" in refused(whole, other.roster)
    # the given roster in the bundle, with statements of the other one
    assert "privacy-" in refused({**whole, "roster.bin": other.roster.canonical_bytes()}, other.roster)


# --- what a site that lies may sign

LIES = {
    "version": None,
    "run": lambda s: "another",
    "plan_digest": lambda s: "0" * 64,
    "roster_digest": lambda s: "0" * 64,
    "site": lambda s: "harbour-bank",
    "kind": lambda s: "bank",
    "files": lambda s: {**s.files, CONFIG_FILE: "0" * 64},
    "tensors": lambda s: {**s.tensors, "global": "0" * 64},
    "contributors": lambda s: s.contributors[1:],
    "mechanism": lambda s: "none",
    "unit": lambda s: "customer",
    "max_records_per_unit": lambda s: 3,
    "neighboring_relation": lambda s: "replace one unit",
    "epsilon": lambda s: s.epsilon * 0.99,
    "epsilon_second_opinion": lambda s: None,
    "delta": lambda s: 1e-9,
    "accountant": lambda s: "none",
    "stages": lambda s: (replaced(s.stages[0], num_steps=2),),
    "l2_clip_norm": lambda s: 0.5,
    "site_level": lambda s: SiteLevel(
        epsilon=1.0, delta=1e-5, l2_clip_norm=1.0, neighboring_relation="x", mechanism="x", trust_model="x"
    ),
    "audit": lambda s: None,
    "guards_passed": lambda s: s.guards_passed[1:],
    "checks": lambda s: s.checks[:-1],
    "trust_model": lambda s: "nobody has to be trusted",
    "not_covered": lambda s: (),
}


def test_every_field_of_the_statement_is_lied_about_below():
    assert set(LIES) == set(PrivacyStatement.__struct_fields__)


@pytest.mark.parametrize("name", [name for name, lie in LIES.items() if lie])
def test_a_site_that_signs_something_else_in_one_field_is_found_out(signers, name):
    true = signers.statement(ANNA)
    lie = replaced(true, **{name: LIES[name](true)})
    message = refused(signers.files(**{ANNA: signers.sign(ANNA, lie)}), signers.roster)
    assert f"privacy-{ANNA}.json" in message


@pytest.mark.parametrize("name", ["released_adapter", "every_round"])
def test_a_canary_audit_that_refutes_the_epsilon_is_found(signers, name):
    true = signers.statement(ANNA)
    audit = replaced(true.audit, **{name: true.epsilon * 1.01})
    lie = replaced(true, audit=audit)
    message = refused(signers.files(**{ANNA: signers.sign(ANNA, lie)}), signers.roster)
    assert f"privacy-{ANNA}.json" in message
    assert "canary-audit" in message


def test_an_epsilon_above_what_the_numbers_give_is_found_too(signers):
    """A claim that is too modest would let a canary audit pass."""
    true = signers.statement(ANNA)
    message = refused(
        signers.files(**{ANNA: signers.sign(ANNA, replaced(true, epsilon=true.epsilon + 0.1))}), signers.roster
    )
    assert "epsilon is" in message
    assert "worked out again" in message


def test_the_last_bits_of_another_machines_fft_are_no_lie(signers):
    signed = {}
    for site in signers.identities:
        true = signers.statement(site)
        signed[site] = signers.sign(site, replaced(true, epsilon=np.nextafter(true.epsilon, 9.0).item()))
    verify_release(parse_release(signers.files(**signed)), signers.roster)


def test_more_steps_than_the_plan_has_are_refused_before_anything_is_worked_out(signers):
    true = signers.statement(ANNA)
    lie = replaced(true, stages=(replaced(true.stages[0], num_steps=1 << 40),))
    assert "budget" in refused(signers.files(**{ANNA: signers.sign(ANNA, lie)}), signers.roster)


DOMAIN = {"rounds": 1, "steps_per_round": 2, "sampling_probability": 1.0, "learning_rate": 0.001}
STAGE_LIES = {
    "less noise than the plan's": lambda s: (replaced(s.stages[0], noise_multiplier=9.0), s.stages[1]),
    "another sampling probability": lambda s: (s.stages[0], replaced(s.stages[1], sampling_probability=1.0)),
    "steps moved to the other stage": lambda s: (
        replaced(s.stages[0], num_steps=1),
        replaced(s.stages[1], num_steps=5),
    ),
    "one stage kept quiet": lambda s: s.stages[1:],
    "a stage too many": lambda s: (*s.stages, s.stages[1]),
}


@pytest.fixture(scope="module")
def staged(tiny_plan):
    return Signers.of(tiny_plan(private=True, domain=DOMAIN))


def test_a_release_of_two_stages_is_verified_and_its_epsilon_worked_out_again(staged):
    verified = verify_release(parse_release(staged.files()), staged.roster)
    assert {len(statement.stages) for statement in verified.statements.values()} == {2}
    true = staged.statement(ANNA)
    lie = replaced(true, epsilon=true.epsilon * 0.99)
    message = refused(staged.files(**{ANNA: staged.sign(ANNA, lie)}), staged.roster)
    assert "worked out again" in message


@pytest.mark.parametrize("lie", STAGE_LIES.values(), ids=list(STAGE_LIES))
def test_a_site_that_lies_about_a_stage_is_found_out(staged, lie):
    true = staged.statement(ANNA)
    signed = staged.sign(ANNA, replaced(true, stages=lie(true)))
    assert f"privacy-{ANNA}.json" in refused(staged.files(**{ANNA: signed}), staged.roster)


def test_heads_that_sites_of_one_kind_sign_differently_are_found(signers):
    true = signers.statement(ANNA)
    lie = replaced(true, tensors={**true.tensors, "kind/hospital": "0" * 64})
    assert "kind/hospital" in refused(signers.files(**{ANNA: signers.sign(ANNA, lie)}), signers.roster)


def test_all_sites_together_cannot_sign_for_an_adapter_that_did_not_move(tiny_plan):
    still = Signers.of(tiny_plan(private=True), value=0.0)
    moved = {site: still.outcome(site, largest_value=0.25) for site in still.identities}
    signed = {
        site: still.sign(site, privacy_statement(still.plan, outcome, checks=check_release(still.plan, outcome)))
        for site, outcome in moved.items()
    }
    assert "adapter: got 0, wanted > 0" in refused(bundled_with(still, signed), still.roster)


def bundled_with(signers, signed):
    return bundle(signers.plan, signers.roster, signers.adapter, signed)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({CONFIG_FILE: b"{}"}, "adapter_config.json: is not the configuration"),
        ({WEIGHTS_FILE: adapter_bytes(0.5)}, "its trained tensors have digest"),
        (
            {WEIGHTS_FILE: adapter_bytes(**{"base_model.extra.weight": np.ones((1, 1), np.float32)})},
            "wanted float32 matrices of an adapter",
        ),
        ({WEIGHTS_FILE: b"not safetensors"}, "does not parse"),
    ],
    ids=["config", "weights", "more", "other"],
)
def test_all_sites_together_cannot_sign_for_another_adapter_than_their_digests_say(signers, adapter, said):
    files = {**signers.adapter, **adapter}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    signed = {site: signers.sign(site, replaced(signers.statement(site), files=digests)) for site in signers.identities}
    assert said in refused(bundle(signers.plan, signers.roster, files, signed), signers.roster)


# --- approvals


def of_sites(signers, *names):
    signed = {name: entry for name, entry in signers.signed().items() if name in names}
    return bundled_with(signers, signed)


def test_without_a_number_in_the_plan_every_site_in_the_adapter_must_have_signed(signers):
    message = refused(of_sites(signers, ANNA, RENJI, HARBOUR), signers.roster)
    assert f"privacy-{BEIAN}.json: missing; 3 of the 4 sites in the adapter have signed, wanted 4" in message


def test_as_many_sites_as_the_plan_says_are_enough_and_who_did_not_sign_is_named(tiny_plan):
    three = Signers.of(tiny_plan(private=True, release={"min_approvals": 3}))
    files = of_sites(three, ANNA, RENJI, HARBOUR)
    assert verify_release(parse_release(files), three.roster).approved == ("harbour-bank", "st-anna", "仁济医院")
    assert "have signed no statement:** 北岸银行" in files["PRIVACY.md"].decode()
    assert "未签署声明：** 北岸银行" in files["PRIVACY.zh.md"].decode()
    assert "wanted 3" in refused(of_sites(three, ANNA, RENJI), three.roster)


def test_a_site_that_is_not_in_the_adapter_does_not_count_among_those_that_approved(tiny_plan):
    three = Signers.of(tiny_plan(private=True, release={"min_approvals": 3}))
    inside = (HARBOUR, RENJI, BEIAN)

    def signed(*names):
        return {name: three.sign(name, three.statement(name, contributors=inside)) for name in names}

    whole = bundled_with(three, signed(*inside, ANNA))
    assert verify_release(parse_release(whole), three.roster).approved == inside
    assert "No update of this site is in the adapter." in whole["PRIVACY.md"].decode()
    assert "2 of the 3 sites" in refused(bundled_with(three, signed(HARBOUR, RENJI, ANNA)), three.roster)


# --- heads of audit records


def test_heads_that_nobody_countersigned_prove_nothing(signers):
    files = {**signers.files(heads=False), "audit-heads.json": signers.heads(without=tuple(signers.identities))}
    assert "audit-heads.json: no site has countersigned" in refused(files, signers.roster)


def test_heads_of_sites_that_are_not_on_the_roster_are_refused(signers):
    other = Signers.of(signers.plan)
    files = {**signers.files(heads=False), "audit-heads.json": other.heads()}
    assert "audit-heads.json" in refused(files, signers.roster)


def test_heads_have_one_form(signers):
    document = json.loads(signers.heads())
    document["heads"].reverse()
    with pytest.raises(Exception, match="one form"):
        parse_heads(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


# --- the command


def verify_command(*arguments):
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def test_the_command_says_what_was_checked(whole, signers, tmp_path):
    folder = written(tmp_path / "发布", whole)
    (tmp_path / "roster.bin").write_bytes(signers.roster.canonical_bytes())
    told = verify_command(folder, "--roster", tmp_path / "roster.bin")
    assert told.exit_code == 0, told.output
    assert told.output.count("✓") == 9
    document = json.loads(verify_command(folder, "--roster", tmp_path / "roster.bin", "--json").output)
    assert document["verified"] is True
    assert document["sites"][RENJI]["unit"] == "patient"
    assert document["sites"][RENJI]["epsilon"] == signers.statement(RENJI).epsilon


def test_the_command_takes_the_signed_roster_of_a_consortium(whole, signers, tmp_path):
    roster = signed_roster(Ed25519PrivateKey.generate(), *signers.identities.values())
    (tmp_path / "roster.json").write_bytes(roster.to_bytes())
    told = verify_command(written(tmp_path / "release", whole), "--roster", tmp_path / "roster.json")
    assert told.exit_code == 0, told.output


def test_the_command_names_what_is_wrong_and_ends_with_7(whole, signers, tmp_path):
    folder = written(tmp_path / "release", {**whole, "README.md": whole["README.md"].replace(b"8.00", b"0.80")})
    (tmp_path / "roster.bin").write_bytes(signers.roster.canonical_bytes())
    told = verify_command(folder, "--roster", tmp_path / "roster.bin", "--json")
    assert isinstance(told.exception, ReleaseRefused)
    assert told.exception.exit_code == 7
    assert json.loads(told.output) == {"verified": False, "wrong": told.exception.message}
    assert told.exception.message.startswith("README.md: ")


@pytest.mark.parametrize("content", [b"", b"{", b"\x81", b'{"version": 1}'])
def test_a_roster_that_is_none_is_named(whole, tmp_path, content):
    (tmp_path / "roster").write_bytes(content)
    told = verify_command(written(tmp_path / "release", whole), "--roster", tmp_path / "roster")
    assert isinstance(told.exception, ReleaseRefused)
    assert str(tmp_path / "roster") in told.exception.message
