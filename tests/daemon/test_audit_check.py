"""Whatever is done to the files of a record, the first thing that is wrong is named, with file and line."""

import re
import shutil
import time
from pathlib import Path

import msgspec
import pytest
from audit_records import (
    COORDINATOR,
    DAY,
    HOSPITAL,
    HOSPITAL_KEY,
    KEY,
    KEYS,
    NAME,
    NEW_KEY,
    Clock,
    open_chain,
    open_chain_of,
    public,
    write_months,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedseek.daemon.audit_check import checked_lines, export_audit, heads_kept_by, verify_audit
from fedseek.daemon.audit_lines import canonical, line_digest, parse_anchor, parse_export_header, parse_line
from fedseek.daemon.audit_reading import Trail, open_record, walk
from fedseek.errors import AuditBroken, CustodyError, Malformed, WrongKey

SEGMENTS = 3


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Three segments: 3, 3 and 4 lines."""
    folder = tmp_path_factory.mktemp("pristine") / "audit"
    clock = Clock(Clock().now - 61 * DAY)
    with open_chain(folder, clock=clock) as chain:
        for _ in range(SEGMENTS):
            for rule in ("小时", "epsilon", "rank")[: 2 if chain.head().number == 1 else 3]:
                chain.record("plan-refused", rule=rule, sites=[NAME, HOSPITAL])
            clock.now += 30.5 * DAY
        clock.now -= 30.5 * DAY
        chain.record("stopped")
    assert [len(file.read_bytes().splitlines()) for file in sorted(folder.glob("*.jsonl"))] == [3, 3, 4]
    return folder


def copied(pristine: Path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(pristine, tmp_path_factory.mktemp("tampered") / "audit"))


def verify(path: Path, **more):
    return verify_audit(path, public_key=KEYS[NAME], name=NAME, **more)


def pick(data, folder: Path) -> tuple[Path, list[bytes]]:
    file = data.draw(st.sampled_from(sorted(folder.glob("*.jsonl"))))
    return file, file.read_bytes().splitlines()


def write(file: Path, lines: list[bytes]) -> None:
    file.write_bytes(b"".join(line + b"\n" for line in lines))


def next_line(file: Path, lines: list[bytes], line: int) -> str:
    """Where the line after ``line`` stands: in this file, or first in the next one."""
    if line < len(lines):
        return f"{file.name} line {line + 1}: "
    return f"{sorted(file.parent.glob('*.jsonl'))[sorted(file.parent.glob('*.jsonl')).index(file) + 1].name} line 1: "


def test_an_untouched_record_verifies(pristine):
    report = verify(pristine)
    assert (report.lines, report.first, report.last, report.files, report.name) == (10, 1, 10, SEGMENTS, NAME)
    assert report.keys == (KEYS[NAME].hex(),)
    assert (report.dropped, report.unfinished, report.forks, report.countersigned) == (0, "", (), {})
    assert report.first_at < report.last_at


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_found_in_its_line(pristine, tmp_path_factory, data):
    folder = copied(pristine, tmp_path_factory)
    file, _ = pick(data, folder)
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    line = bytes(file.read_bytes()[:position]).count(b"\n") + 1
    last_end = position == len(content) - 1 and file == max(folder.glob("*.jsonl"))
    file.write_bytes(bytes(content))
    if last_end:  # looks like what a crash leaves; the line does not count
        report = verify(folder)
        assert (report.unfinished, report.last) == (f"{file.name} line {line}", 9)
    else:
        with pytest.raises(AuditBroken, match=rf"^{re.escape(file.name)} line {line}: "):
            verify(folder)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_line_taken_out_is_found_where_it_was(pristine, tmp_path_factory, data):
    folder = copied(pristine, tmp_path_factory)
    file, lines = pick(data, folder)
    line = data.draw(st.integers(1, len(lines)))
    assume(not (line == len(lines) and file == max(folder.glob("*.jsonl"))))  # the end: see below
    place = f"{file.name} line {line}: " if line < len(lines) else next_line(file, lines, line)
    write(file, lines[: line - 1] + lines[line:])
    with pytest.raises(AuditBroken, match=f"^{place}.*got entry"):
        verify(folder)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_two_lines_swapped_are_found_at_the_first(pristine, tmp_path_factory, data):
    folder = copied(pristine, tmp_path_factory)
    file, lines = pick(data, folder)
    first = data.draw(st.integers(0, len(lines) - 2))
    second = data.draw(st.integers(first + 1, len(lines) - 1))
    lines[first], lines[second] = lines[second], lines[first]
    write(file, lines)
    with pytest.raises(AuditBroken, match=f"^{file.name} line {first + 1}: got entry .*moved"):
        verify(folder)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_line_put_in_is_found(pristine, tmp_path_factory, data):
    folder = copied(pristine, tmp_path_factory)
    file, lines = pick(data, folder)
    own = st.sampled_from(sorted(folder.glob("*.jsonl"))).flatmap(
        lambda each: st.sampled_from(each.read_bytes().splitlines())
    )
    foreign = data.draw(own | st.binary(max_size=40).filter(lambda line: b"\n" not in line))
    position = data.draw(st.integers(0, len(lines)))
    write(file, [*lines[:position], foreign, *lines[position:]])
    # a line put in front of itself is found as the second of the two
    place = position + 2 if position < len(lines) and foreign == lines[position] else position + 1
    with pytest.raises(AuditBroken, match=f"^{file.name} line {place}: "):
        verify(folder)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_is_found(pristine, tmp_path_factory, data):
    folder = copied(pristine, tmp_path_factory)
    file, lines = pick(data, folder)
    content = file.read_bytes()
    end = data.draw(st.integers(0, len(content) - 1))
    file.write_bytes(content[:end])
    kept = content[:end].count(b"\n")
    whole = end == 0 or content[end - 1 : end] == b"\n"
    if file == max(folder.glob("*.jsonl")):
        report = verify(folder)
        assert report.last == 6 + kept
        assert report.unfinished == ("" if whole else f"{file.name} line {kept + 1}")
        with pytest.raises(AuditBroken, match=f"ends with entry {6 + kept}, .* entry 10 .*: the end was cut"):
            verify(folder, heads=[head_of(pristine)])
    else:
        place = next_line(file, lines, len(lines)) if whole else f"{file.name} line {kept + 1}: "
        with pytest.raises(AuditBroken, match=f"^{place}"):
            verify(folder)


def head_of(folder: Path):
    copy = folder.parent / f"head-{time.monotonic_ns()}"
    shutil.copytree(folder, copy)
    with open_chain(copy) as chain:
        return chain.head()


@pytest.mark.parametrize("missing", range(SEGMENTS))
def test_a_missing_segment_is_found(pristine, tmp_path_factory, missing):
    folder = copied(pristine, tmp_path_factory)
    files = sorted(folder.glob("*.jsonl"))
    files[missing].unlink()
    if missing == SEGMENTS - 1:
        with pytest.raises(AuditBroken, match="the end was cut"):
            verify(folder, heads=[head_of(pristine)])
    else:
        with pytest.raises(AuditBroken, match=f"^{files[missing + 1].name} line 1: got entry"):
            verify(folder)


def test_lines_moved_to_another_segment_are_found(pristine, tmp_path_factory):
    folder = copied(pristine, tmp_path_factory)
    first, second, third = sorted(folder.glob("*.jsonl"))
    third.write_bytes(second.read_bytes() + third.read_bytes())
    second.write_bytes(b"")
    with pytest.raises(AuditBroken, match=f"^{third.name} line 1: entry 4 of .* belongs in segment {second.stem}"):
        verify(folder)
    assert first.exists()


def test_an_empty_folder_is_no_record(tmp_path):
    with pytest.raises(AuditBroken, match="no line of an audit record"):
        verify(tmp_path)
    with pytest.raises(CustodyError):
        verify(tmp_path / "nowhere")


def test_another_owner_and_another_key_are_named(pristine):
    with pytest.raises(AuditBroken, match=f"line 1: this is the record of '{NAME}', wanted that of '{HOSPITAL}'"):
        verify_audit(pristine, public_key=KEYS[NAME], name=HOSPITAL)
    with pytest.raises(AuditBroken, match=f"no line is signed with the key {KEYS[HOSPITAL].hex()}"):
        verify_audit(pristine, public_key=KEYS[HOSPITAL])
    with pytest.raises(AuditBroken, match="no line is signed"):
        list(checked_lines(pristine, public_key=KEYS[HOSPITAL], name=NAME))
    with pytest.raises(AuditBroken, match="wanted that of"):
        list(checked_lines(pristine, public_key=KEYS[NAME], name=HOSPITAL))


def resigned(lines: list[bytes], change: dict, at: int) -> list[bytes]:
    """A forger without the key changes a line and mends every hash after it."""
    forged, previous = [], None
    for number, raw in enumerate(lines):
        line = parse_line(raw)
        if number == at:
            line = msgspec.structs.replace(line, **change)
        if previous is not None and number > at:
            line = msgspec.structs.replace(line, previous=previous)
        forged.append(canonical(line))
        previous = line_digest(forged[-1]).hex()
    return forged


@pytest.mark.parametrize(
    "change", [{"kind": "plan-admitted"}, {"detail": {"rule": "none"}}, {"at": "2026-09-22T00:00:00.000Z"}]
)
def test_a_change_with_all_hashes_mended_is_found_by_the_signature(pristine, tmp_path_factory, change):
    folder = copied(pristine, tmp_path_factory)
    file = min(folder.glob("*.jsonl"))
    write(file, resigned(file.read_bytes().splitlines(), change, 1))
    with pytest.raises(AuditBroken, match=f"^{file.name} line 2: entry 2 is not signed with the key"):
        verify(folder)


def test_the_lines_of_another_record_of_the_same_key_do_not_fit(tmp_path):
    for name in ("one", "two"):
        with open_chain(tmp_path / name) as chain:
            chain.record("started", of=name)
            chain.record("stopped")
    first, second = (
        file.read_bytes().splitlines() for file in (tmp_path / "one/2026-11.jsonl", tmp_path / "two/2026-11.jsonl")
    )
    write(tmp_path / "one/2026-11.jsonl", [first[0], second[1], first[2]])
    with pytest.raises(AuditBroken, match=r"^2026-11.jsonl line 3: entry 3 follows .* one of the two was put in place"):
        verify(tmp_path / "one")
    with pytest.raises(AuditBroken, match="line 3"):
        open_chain(tmp_path / "one")


def test_a_stranger_s_record_that_goes_over_to_the_owner_s_key_has_no_line_of_the_owner(tmp_path):
    with open_chain(tmp_path / "forged", NEW_KEY) as chain:
        chain.announce_key(KEYS[NAME])
    with pytest.raises(AuditBroken, match="no line is signed with the key"):
        verify(tmp_path / "forged")


def test_a_stranger_cannot_take_over_with_a_key_that_was_not_announced(tmp_path):
    folder = tmp_path / "audit"
    with open_chain(folder) as chain:
        chain.record("started")
    file = folder / "2026-11.jsonl"
    before = file.read_bytes()
    with open_chain(tmp_path / "copy", NEW_KEY) as stranger:
        stranger._trail, trail = Trail(), stranger._trail
        for _ in walk(open_record(folder), stranger._trail, thorough=True):
            pass
        with pytest.raises(Malformed, match="did not announce"):
            stranger._append("key-taken", {"public_key": public(NEW_KEY).hex()})
        stranger._trail = trail
    stolen = (tmp_path / "copy" / "2026-11.jsonl").read_bytes().splitlines(keepends=True)[-1]
    file.write_bytes(before + stolen)
    with pytest.raises(AuditBroken, match=r"^2026-11.jsonl line 3: the key .* takes over, which .* did not announce"):
        verify(folder)


# heads of this record that others keep


def test_a_head_of_a_line_that_is_another_now_is_found_at_that_line(pristine, tmp_path):
    with open_chain(tmp_path / "other", clock=Clock(Clock().now - 61 * DAY)) as chain:
        chain.record("something-else")
        head = chain.record("and-more")
    with pytest.raises(AuditBroken, match=r"line 3: entry 3 has digest .*: there are two records"):
        verify(pristine, heads=[head])
    assert verify(pristine, heads=[head_of(pristine)]).last == 10


def test_a_head_signed_by_somebody_else_and_one_of_another_record(pristine, tmp_path):
    with open_chain(tmp_path / "a", HOSPITAL_KEY, NAME) as chain:
        forged = chain.head()
    with pytest.raises(WrongKey, match="no key of its record"):
        verify(pristine, heads=[forged])
    with open_chain(tmp_path / "b", HOSPITAL_KEY, HOSPITAL) as chain:
        assert verify(pristine, heads=[chain.head()]).last == 10
        assert verify_audit(pristine, public_key=KEYS[NAME], heads=[chain.head()]).last == 10


def test_a_cut_end_is_found_in_the_record_of_another_party(tmp_path):
    mine, theirs = tmp_path / "bank", tmp_path / "coordinator"
    with open_chain_of(NAME, mine) as bank, open_chain_of(COORDINATOR, theirs) as coordinator:
        for _ in range(3):
            bank.record("sent")
            coordinator.note_heads([bank.head(), coordinator.head()], KEYS)
    export_audit(theirs, tmp_path / "theirs.jsonl")
    kept = heads_kept_by(tmp_path / "theirs.jsonl", NAME)
    assert [head.number for head in kept] == [2, 3, 4]
    assert verify(mine, heads=kept).last == 4
    file = mine / "2026-11.jsonl"
    write(file, file.read_bytes().splitlines()[:-2])
    assert verify(mine).last == 2, "by itself a record cannot tell"
    with pytest.raises(AuditBroken, match=r"line 2: the record ends with entry 2, .* entry 3 .*: the end was cut"):
        verify(mine, heads=kept)


# old lines dropped


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "audit"
    clock = write_months(folder, 18)
    with open_chain(folder, clock=clock) as chain:
        assert chain.prune() > 2
    return folder


def test_the_anchor_cannot_be_missing_changed_or_made_of_a_head_that_went_around(pruned, pristine, tmp_path_factory):
    folder = copied(pruned, tmp_path_factory)
    report = verify(folder)
    anchor_file = folder / "anchor.json"
    anchor = parse_anchor(anchor_file.read_bytes().strip())
    first = min(folder.glob("2*.jsonl"))
    anchor_file.unlink()
    with pytest.raises(AuditBroken, match=f"^{first.name} line 1: got entry {report.first} .*the beginning was cut"):
        verify(folder)
    for change, place in (
        ({"segment": "2020-01"}, "anchor.json: no line of the record says"),
        ({"public_key": KEYS[HOSPITAL].hex()}, f"{first.name} line 1: entry {report.first} is not signed"),
        (
            {"head": msgspec.structs.replace(anchor.head, signature="0" * 128)},
            "anchor.json: its head .* no key of this",
        ),
        ({"head": msgspec.structs.replace(anchor.head, digest="0" * 64)}, f"{first.name} line 1: entry .* follows"),
        ({"head": msgspec.structs.replace(anchor.head, number=1)}, f"{first.name} line 1: got entry"),
        ({"head": msgspec.structs.replace(anchor.head, name="x")}, f"{first.name} line 1: entry .* is not signed"),
        ({"head": msgspec.structs.replace(anchor.head, name=" ")}, "anchor.json: name of an audit record"),
    ):
        anchor_file.write_bytes(canonical(msgspec.structs.replace(anchor, **change)))
        with pytest.raises(AuditBroken, match=f"^{place}"):
            verify(folder)


def test_a_beginning_cut_with_a_true_head_as_anchor_is_found(pristine, tmp_path_factory):
    """Heads go around signed: one of the last line of a segment must not pass for the owner's word to drop it."""
    folder = copied(pristine, tmp_path_factory)
    early = copied(pristine, tmp_path_factory)
    for file in sorted(early.glob("*.jsonl"))[1:]:
        file.unlink()
    head = head_of(early)
    document = {
        "name": NAME,
        "number": 3,
        "digest": head.digest.hex(),
        "at": head.at,
        "signature": head.signature.hex(),
    }
    first = min(folder.glob("*.jsonl"))
    anchor = {"version": 1, "segment": first.stem, "head": document, "public_key": KEYS[NAME].hex(), "announced": ""}
    first.unlink()
    (folder / "anchor.json").write_bytes(msgspec.json.encode(anchor))
    with pytest.raises(
        AuditBroken, match=r"^anchor.json: no line of the record says that it was dropped up to entry 3"
    ):
        verify(folder)


def test_lines_dropped_too_early_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("fedseek.daemon.audit.MIN_RETENTION_DAYS", 1)
    clock = write_months(tmp_path / "audit", 4, retention_days=30)
    monkeypatch.setattr("fedseek.daemon.audit_reading.MIN_RETENTION_DAYS", 1)
    with open_chain(tmp_path / "audit", clock=clock, retention_days=30) as chain:
        assert chain.prune()
    monkeypatch.undo()
    with pytest.raises(AuditBroken, match="were dropped before 180 days"):
        verify(tmp_path / "audit")


# export


@pytest.mark.parametrize("which", ["pristine", "pruned"])
def test_an_export_verifies_by_itself(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    out = tmp_path / "出口.jsonl"
    lines = export_audit(folder, out)
    whole, alone = verify(folder), verify(out)
    assert lines == whole.lines == alone.lines
    assert alone.last_digest == whole.last_digest
    assert out.stat().st_mode & 0o077 == 0
    header = parse_export_header(out.read_bytes().splitlines()[0])
    assert (header.name, header.public_key) == (NAME, KEYS[NAME].hex())
    with pytest.raises(CustodyError, match="already"):
        export_audit(folder, out)
    assert [each.name for each in tmp_path.iterdir()] == [out.name]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_an_export_is_found(pruned, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("export") / "audit.jsonl"
    export_audit(pruned, out)
    content = bytearray(out.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 900))
    line = bytes(content[:position]).count(b"\n") + 1
    content[position] ^= data.draw(st.integers(1, 255))
    out.write_bytes(bytes(content))
    # a header that names other lines, or another anchor, is found where the lines do not fit it
    place = f"audit.jsonl line {line}: " if line > 1 else r"(audit.jsonl line \d+|anchor.json): "
    with pytest.raises(AuditBroken, match=f"^{place}"):
        verify(out)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_export_cut_anywhere_is_found(pristine, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("export") / "audit.jsonl"
    export_audit(pristine, out)
    content = out.read_bytes()
    out.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(AuditBroken):
        verify(out)


def test_a_broken_record_and_an_unfinished_line_are_not_exported(pristine, tmp_path_factory, tmp_path):
    folder = copied(pristine, tmp_path_factory)
    last = max(folder.glob("*.jsonl"))
    with last.open("ab") as stream:
        stream.write(b'{"number":11')
    assert export_audit(folder, tmp_path / "out.jsonl") == 10
    assert verify(tmp_path / "out.jsonl").unfinished == ""
    write(last, last.read_bytes().splitlines()[1:])
    with pytest.raises(AuditBroken):
        export_audit(folder, tmp_path / "out2.jsonl")
    assert not (tmp_path / "out2.jsonl").exists()


def test_a_record_can_be_verified_while_it_is_written(tmp_path):
    with open_chain(tmp_path / "audit") as chain:
        for number in range(1, 20):
            assert verify(tmp_path / "audit").last == number
            chain.record("sent")


# what a line must be


GOOD = b'{"number":1,"at":"2026-11-22T18:49:25.123Z","kind":"x","detail":{},"previous":"%s","signature":"%s"}' % (
    b"0" * 64,
    b"0" * 128,
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"number":1', b'"number":0'),
        (b'"number":1', b'"number":1.0'),
        (b'"number":1', b'"number":true'),
        (b'"number":1', b'"number":99999999999999999999'),
        (b'"kind":"x"', b'"kind":"X"'),
        (b'"kind":"x"', b'"kind":"x\\n"'),
        (b'"detail":{}', b'"detail":[]'),
        (b'"detail":{}', b'"detail":{"a":1,"a":1}'),
        (b'"detail":{}', b'"detail":{"b":1,"a":1}'),
        (b'"detail":{}', b'"detail":{"a": 1}'),
        (b'"detail":{}', b'"detail":{"a":"\\u0061"}'),
        (b'"detail":{}', b'"detail":{"a":"\xff"}'),
        (b'"detail":{}', b'"detail":{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
        (b'"detail":{}', b'"detail":{},"more":1'),
        (b"25.123Z", b"25.123z"),
        (b"25.123Z", b"61.123Z"),
        (b"2026-11-22T", b"2026-13-22T"),
        (b"2026-11-22T18:49:25.123Z", b"1926-11-22T18:49:25.123Z"),
        (b'"previous":"0', b'"previous":"A'),
        (b'"signature":"0', b'"signature":"'),
    ],
)
def test_a_line_has_one_form(old, new):
    assert parse_line(GOOD).kind == "x"
    assert old in GOOD
    with pytest.raises(Malformed):
        parse_line(GOOD.replace(old, new))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_bytes_of_a_stranger_are_refused_in_our_words(tmp_path_factory, data):
    for parse in (parse_line, parse_anchor, parse_export_header):
        with pytest.raises(Malformed):
            parse(data)
    file = tmp_path_factory.mktemp("strange") / "x.jsonl"
    file.write_bytes(data)
    with pytest.raises(AuditBroken):
        verify_audit(file, public_key=public(KEY))
