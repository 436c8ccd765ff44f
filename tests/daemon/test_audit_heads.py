"""Heads that go around: every party keeps them, countersigns them, and finds a record that was cut or rewritten."""

import shutil
from functools import partial
from pathlib import Path

import msgspec
import pytest
from audit_records import (
    COORDINATOR,
    HOSPITAL,
    HOSPITAL_KEY,
    KEY,
    KEYS,
    NAME,
    NEW_KEY,
    open_chain,
    open_chain_of,
    public,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedseek.daemon import audit_heads
from fedseek.daemon.audit import AuditChain
from fedseek.daemon.audit_check import checked_lines, heads_kept_by, verify_audit
from fedseek.daemon.audit_lines import AuditHead, heads_digest, sign_head, verify_head
from fedseek.errors import AuditBroken, Malformed, WrongKey
from fedseek.identity.signing import CONTEXT_AUDIT_HEAD, CONTEXT_HEADS_SEEN, sign_with, verify_with


@pytest.fixture
def chains(tmp_path):
    opened = {name: open_chain_of(name, tmp_path / name) for name in (NAME, HOSPITAL, COORDINATOR)}
    yield opened
    for chain in opened.values():
        chain.close()


def heads_of(chains) -> list[AuditHead]:
    return [chain.head() for chain in chains.values()]


def play_round(chains) -> list[AuditHead]:
    """What the coordinator and the sites do with heads in each round."""
    heads = heads_of(chains)
    for chain in chains.values():
        chain.note_heads(heads, KEYS)
    signatures = {name: chain.countersign(heads) for name, chain in chains.items()}
    for name, chain in chains.items():
        others = {other: signature for other, signature in signatures.items() if other != name}
        chain.note_countersignatures(heads, others, KEYS)
    return heads


def lines_of(folder: Path, name: str = NAME):
    return list(checked_lines(folder, public_key=KEYS[name], name=name))


def kinds(folder: Path, name: str = NAME) -> list[str]:
    return [line.kind for line in lines_of(folder, name)]


def head_at(number: int, name: str = HOSPITAL, *, key: Ed25519PrivateKey = HOSPITAL_KEY, fill: int = 0) -> AuditHead:
    return sign_head(partial(sign_with, key), name, number, bytes([fill]) * 32, 1)


# heads


def test_a_head_is_signed_by_its_owner_for_this_purpose_only(chains):
    head = chains[NAME].record("sent")
    verify_head(head, KEYS[NAME])
    assert chains[NAME].head() == head
    changes = ({"number": 3}, {"digest": bytes(32)}, {"at": 0}, {"name": HOSPITAL}, {"signature": bytes(64)})
    for change in changes:
        with pytest.raises(WrongKey):
            verify_head(msgspec.structs.replace(head, **change), KEYS[NAME])
    with pytest.raises(WrongKey):
        verify_head(head, KEYS[HOSPITAL])


def test_a_digest_of_a_list_does_not_depend_on_its_order_and_on_everything_else():
    heads = [head_at(5), head_at(7, COORDINATOR)]
    assert heads_digest(heads) == heads_digest(heads[::-1])
    assert len({heads_digest(each) for each in (heads, heads[:1], [head_at(5), head_at(8, COORDINATOR)])}) == 3


@pytest.mark.parametrize("heads", [[], [head_at(1), head_at(2)], [head_at(1, f"站点{n}") for n in range(1026)]])
def test_a_list_that_is_empty_too_long_or_names_one_twice_is_refused(chains, heads):
    with pytest.raises(Malformed, match="list of audit heads"):
        chains[NAME].note_heads(heads, KEYS)


# a round


def test_heads_and_countersignatures_are_kept_by_everybody_and_verify(chains, tmp_path):
    for _ in range(3):
        for chain in chains.values():
            chain.record("sent", kind="update")
        heads = play_round(chains)
    report = verify_audit(tmp_path / NAME, public_key=KEYS[NAME], name=NAME, others=KEYS)
    by_name = {head.name: head.number for head in heads}
    assert report.heads_seen == {HOSPITAL: by_name[HOSPITAL], COORDINATOR: by_name[COORDINATOR]}
    assert report.countersigned == {HOSPITAL: by_name[NAME], COORDINATOR: by_name[NAME]}
    assert report.unchecked == ()
    alone = verify_audit(tmp_path / NAME, public_key=KEYS[NAME])
    assert (alone.countersigned, alone.unchecked) == ({}, (COORDINATOR, HOSPITAL))
    partly = verify_audit(
        tmp_path / NAME, public_key=KEYS[NAME], others={HOSPITAL: KEYS[HOSPITAL], COORDINATOR: bytes(32)}
    )
    assert (partly.countersigned, partly.unchecked) == ({HOSPITAL: by_name[NAME]}, (COORDINATOR,))
    assert [head.number for head in heads_kept_by(tmp_path / HOSPITAL, NAME)][-1] == by_name[NAME]


def test_a_countersignature_is_over_the_whole_list_for_this_purpose(chains):
    heads = heads_of(chains)
    chains[NAME].note_heads(heads, KEYS)
    signature = chains[NAME].countersign(heads[::-1])
    verify_with(KEYS[NAME], CONTEXT_HEADS_SEEN, heads_digest(heads), signature, who=NAME)
    with pytest.raises(WrongKey):
        verify_with(KEYS[NAME], CONTEXT_HEADS_SEEN, heads_digest(heads[:2]), signature, who=NAME)
    with pytest.raises(WrongKey):
        verify_with(KEYS[NAME], CONTEXT_AUDIT_HEAD, heads_digest(heads), signature, who=NAME)


def test_only_the_list_noted_last_is_countersigned(chains):
    first = heads_of(chains)
    with pytest.raises(ValueError, match="not the ones that were noted last"):
        chains[NAME].countersign(first)
    chains[NAME].note_heads(first, KEYS)
    chains[HOSPITAL].record("sent")
    chains[NAME].note_heads(second := heads_of(chains), KEYS)
    assert len(chains[NAME].countersign(second)) == 64
    with pytest.raises(ValueError, match="noted last"):
        chains[NAME].countersign(first)


def test_the_same_list_again_writes_nothing_also_after_reopening(tmp_path):
    heads = [head_at(5), head_at(9, COORDINATOR, key=Ed25519PrivateKey.from_private_bytes(bytes([4]) * 32))]
    with open_chain(tmp_path / NAME) as chain:
        chain.note_heads(heads, KEYS)
        head = chain.head()
        chain.note_heads(heads[::-1], KEYS)
        assert chain.head() == head
    with open_chain(tmp_path / NAME) as chain:
        chain.note_heads(heads, KEYS)
        assert chain.head() == head
        assert chain.countersign(heads)
        assert sorted(chain.noted_heads(), key=lambda each: each.name) == sorted(heads, key=lambda each: each.name)


def test_a_list_of_many_names_takes_several_lines_and_verifies(tmp_path):
    name = "北" * 60
    many = {f"{name}{n:04}": HOSPITAL_KEY for n in range(150)}
    keys = {each: public(key) for each, key in many.items()}
    heads = [head_at(2**53 - 1, each, fill=255) for each in many]
    with open_chain(tmp_path / NAME) as chain:
        own = chain.head()
        chain.note_heads([*heads, own], keys)
        signatures = {each: sign_with(HOSPITAL_KEY, CONTEXT_HEADS_SEEN, heads_digest([*heads, own])) for each in many}
        chain.note_countersignatures([*heads, own], signatures, keys)
    report = verify_audit(tmp_path / NAME, public_key=KEYS[NAME], others=keys)
    assert report.lines == 1 + 2 * 3
    assert len(report.heads_seen) == len(report.countersigned) == 150
    with open_chain(tmp_path / NAME) as chain:
        assert len(chain.noted_heads()) == 151


def test_heads_that_are_not_of_whom_they_name_are_refused_and_nothing_is_written(chains, tmp_path):
    before = kinds(tmp_path / NAME)
    forged = msgspec.structs.replace(head_at(5), number=6)
    for heads in ([forged], [head_at(5, key=KEY)], [head_at(5, "陌生人")], [head_at(1, NAME)]):
        with pytest.raises(WrongKey):
            chains[NAME].note_heads([chains[COORDINATOR].head(), *heads], KEYS)
    assert kinds(tmp_path / NAME) == before


def test_countersignatures_that_come_again_are_not_written_again(chains, tmp_path):
    heads = heads_of(chains)
    for chain in chains.values():
        chain.note_heads(heads, KEYS)
    signatures = {name: chains[name].countersign(heads) for name in (HOSPITAL, COORDINATOR)}
    chains[NAME].note_countersignatures(heads, {HOSPITAL: signatures[HOSPITAL]}, KEYS)
    for _ in range(2):
        chains[NAME].note_countersignatures(heads, signatures, KEYS)
    assert [sorted(line.detail["signatures"]) for line in lines_of(tmp_path / NAME)[2:]] == [[HOSPITAL], [COORDINATOR]]


def test_countersignatures_that_do_not_verify_or_of_unknown_lists_are_refused(chains, tmp_path):
    heads = heads_of(chains)
    for chain in chains.values():
        chain.note_heads(heads, KEYS)
    before = kinds(tmp_path / NAME)
    good, bad = chains[HOSPITAL].countersign(heads), chains[COORDINATOR].countersign(heads)
    for signatures in ({HOSPITAL: good, COORDINATOR: good}, {HOSPITAL: bad}, {"陌生人": good}):
        with pytest.raises(WrongKey):
            chains[NAME].note_countersignatures(heads, signatures, KEYS)
    other = [head_at(77)]
    signature = sign_with(HOSPITAL_KEY, CONTEXT_HEADS_SEEN, heads_digest(other))
    with pytest.raises(ValueError, match="never noted"):
        chains[NAME].note_countersignatures(other, {HOSPITAL: signature}, KEYS)
    assert kinds(tmp_path / NAME) == before


# forks


@pytest.mark.parametrize(("number", "fill"), [(4, 0), (4, 1), (5, 1), (1, 0)])
def test_a_record_that_went_back_or_has_two_lines_of_a_number_is_named(chains, tmp_path, number, fill):
    chains[NAME].note_heads([head_at(5)], KEYS)
    shown = head_at(number, fill=fill)
    match = f"the record of '{HOSPITAL}' was at line 5 with digest {'00' * 32}, and now is at line {number}"
    for _ in range(3):
        with pytest.raises(AuditBroken, match=match):
            chains[NAME].note_heads([shown], KEYS)
    assert kinds(tmp_path / NAME) == ["begun", "heads", "fork"], "written down once"
    report = verify_audit(tmp_path / NAME, public_key=KEYS[NAME])
    assert report.heads_seen == {HOSPITAL: 5}
    assert len(report.forks) == 1
    assert report.forks[0].startswith("the record of '仁济医院' was at line 5")
    chains[NAME].note_heads([head_at(6)], KEYS)


def test_what_was_seen_is_held_against_it_after_reopening(tmp_path):
    with open_chain(tmp_path / NAME) as chain:
        chain.note_heads([head_at(5)], KEYS)
    with open_chain(tmp_path / NAME) as chain, pytest.raises(AuditBroken, match="now is at line 4"):
        chain.note_heads([head_at(4)], KEYS)
    with open_chain(tmp_path / NAME) as chain, pytest.raises(AuditBroken, match="now is at line 4"):
        chain.note_heads([head_at(4)], KEYS)
    assert kinds(tmp_path / NAME) == ["begun", "heads", "fork"]


def test_a_record_put_back_from_a_copy_is_found_by_the_others_and_by_itself(tmp_path):
    with open_chain_of(COORDINATOR, tmp_path / "c") as coordinator:
        with open_chain(tmp_path / NAME) as bank:
            bank.record("sent")
        shutil.copytree(tmp_path / NAME, tmp_path / "copy")
        with open_chain(tmp_path / NAME) as bank:
            newer = bank.record("spent", epsilon=1.0)
            coordinator.note_heads([newer, coordinator.head()], KEYS)
            going_around = coordinator.noted_heads()
        with open_chain(tmp_path / "copy") as bank:
            with pytest.raises(AuditBroken, match=r"was at line 3 .* now is at line 2"):
                coordinator.note_heads([bank.head(), coordinator.head()], KEYS)
            for now in (2, 3):
                with pytest.raises(AuditBroken, match=f"the record of '{NAME}' was at line 3 .* now is at line {now}"):
                    bank.note_heads(going_around[1:], KEYS)
                assert bank.head().number == 3, "written down once"
            bank.record("spent", epsilon=2.0)
            with pytest.raises(AuditBroken, match=r"was at line 3 .* now is at line 4"):
                bank.note_heads(going_around[1:], KEYS)
    assert kinds(tmp_path / "copy") == ["begun", "sent", "fork", "spent"]


def test_a_record_begun_anew_is_taken_at_the_word_of_a_person_and_that_is_written_down(tmp_path):
    with open_chain(tmp_path / NAME) as chain:
        chain.note_heads([head_at(50)], KEYS)
        with pytest.raises(AuditBroken):
            chain.note_heads([head_at(1, fill=1)], KEYS)
        with pytest.raises(ValueError, match="no head"):
            chain.accept_new_record(COORDINATOR, why="disk lost")
        chain.accept_new_record(HOSPITAL, why="磁盘损坏, 电话核实")
        chain.note_heads([head_at(1, fill=1)], KEYS)
        with pytest.raises(AuditBroken):
            chain.note_heads([head_at(1, fill=2)], KEYS)
    with open_chain(tmp_path / NAME) as chain:
        chain.note_heads([head_at(2, fill=1)], KEYS)
    lines = lines_of(tmp_path / NAME)
    assert [line.kind for line in lines][1:] == ["heads", "fork", "new-record-accepted", "heads", "fork", "heads"]
    assert lines[3].detail == {"name": HOSPITAL, "why": "磁盘损坏, 电话核实", "instead_of": 50}


def test_more_forks_than_a_bound_are_refused_but_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr("fedseek.daemon.audit.MAX_FORKS_KEPT", 3)
    with open_chain(tmp_path / NAME) as chain:
        chain.note_heads([head_at(50)], KEYS)
        for number in range(1, 10):
            with pytest.raises(AuditBroken):
                chain.note_heads([head_at(number)], KEYS)
    assert kinds(tmp_path / NAME).count("fork") == 3


def test_an_own_head_from_before_a_change_of_key_is_taken(tmp_path):
    with open_chain(tmp_path / NAME) as chain:
        old = chain.head()
        chain.change_key(partial(sign_with, NEW_KEY), public(NEW_KEY))
        chain.note_heads([old, head_at(5)], KEYS)
        with pytest.raises(WrongKey, match="none of its keys"):
            chain.note_heads([head_at(1, NAME)], KEYS)


# lines that an owner could write but must not pass


def write_as_owner(chain: AuditChain, kind: str, detail) -> None:
    """A line with a true signature, past every check of the writer."""
    take = audit_heads.HeadsSeen.take
    audit_heads.HeadsSeen.take = lambda *_, **__: None
    try:
        chain._append(kind, detail)
    finally:
        audit_heads.HeadsSeen.take = take


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"list": "0" * 64}, "not the one whose digest it names"),
        ({"heads": []}, "list of audit heads has 0"),
        ({"heads": [{"name": "x"}]}, "detail of a 'heads' line"),
        ({"more": 1}, "detail of a 'heads' line"),
    ],
)
def test_a_line_of_heads_that_contradicts_itself_is_found(tmp_path, change, match):
    (detail,) = audit_heads.heads_details([head_at(5)])
    with open_chain(tmp_path / NAME) as chain:
        write_as_owner(chain, "heads", {**detail, **change})
    with pytest.raises(AuditBroken, match=f"2026-11.jsonl line 2: .*{match}"):
        verify_audit(tmp_path / NAME, public_key=KEYS[NAME])
    with pytest.raises(AuditBroken, match=r"2026-11.jsonl line 2"):
        open_chain(tmp_path / NAME)


def test_a_line_that_notes_an_own_line_that_is_not_there_is_found(tmp_path):
    with open_chain(tmp_path / NAME) as chain:
        (detail,) = audit_heads.heads_details([head_at(9, NAME, key=KEY)])
        write_as_owner(chain, "heads", detail)
    with pytest.raises(AuditBroken, match=r"line 2: it notes the head of line 9 of this very record"):
        verify_audit(tmp_path / NAME, public_key=KEYS[NAME])
