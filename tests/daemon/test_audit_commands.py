import json
from pathlib import Path

import pytest
from audit_records import COORDINATOR, HOSPITAL, KEYS, NAME, open_chain, open_chain_of
from click.testing import CliRunner, Result

from fedseek.daemon.audit_commands import AuditSource, audit_group, visible
from fedseek.errors import AuditBroken, exit_code_of


@pytest.fixture
def home(tmp_path) -> Path:
    """A site's folder with a record of five lines, and a coordinator's that keeps its heads."""
    with open_chain_of(NAME, tmp_path / "bank" / "audit") as bank, open_chain_of(COORDINATOR, tmp_path / "c") as other:
        bank.record("plan-refused", rule="epsilon 3.0 exceeds 2.0", run="试运行", kind="plan")
        bank.record("sent", kind="update", bytes=1_000_000, note="a\x1b[2Jb\u202e")
        heads = [bank.head(), other.head()]
        bank.note_heads(heads, KEYS)
        other.note_heads(heads, KEYS)
        bank.note_countersignatures(heads, {COORDINATOR: other.countersign(heads)}, KEYS)
    return tmp_path / "bank"


def find(folder: Path) -> AuditSource:
    others = {name: key for name, key in KEYS.items() if name != NAME}
    return AuditSource(folder=folder / "audit", name=NAME, public_key=KEYS[NAME], others=others)


def run(*words: object) -> Result:
    return CliRunner().invoke(audit_group(find, program="fedseek-site"), [str(word) for word in words])


def test_verify_says_what_is_there_and_who_vouches_for_it(home):
    told = run("verify", "--folder", home)
    assert told.exit_code == 0, told.output
    assert f"audit record of {NAME}: intact" in told.output
    assert "lines          1 to 5, none missing" in told.output
    assert "countersigned  coordinator to line 3" in told.output
    assert "--public-key" not in told.output
    report = json.loads(run("verify", "--folder", home, "--json").output)
    assert (report["last"], report["countersigned"]) == (5, {COORDINATOR: 3})


def test_a_changed_line_ends_verify_and_show_with_the_exit_code_of_the_family(home):
    file = home / "audit" / "2026-11.jsonl"
    file.write_bytes(file.read_bytes().replace(b"exceeds 2.0", b"exceeds 4.0"))
    for command in ("verify", "show"):
        told = run(command, "--folder", home)
        assert isinstance(told.exception, AuditBroken)
        assert told.exception.exit_code == exit_code_of("AuditBroken") == 8
        assert told.exception.message.startswith("2026-11.jsonl line 2: entry 2 is not signed")
        assert "4.0" not in told.output, "a line is shown only when it was checked"


def test_show_prints_lines_chosen_by_time_and_kind(home):
    told = run("show", "--folder", home)
    assert told.exit_code == 0, told.output
    lines = told.output.splitlines()
    assert len(lines) == 5
    assert lines[1] == (
        "2026-11-22T18:49:25.123Z       2  plan-refused          kind=plan  rule=epsilon 3.0 exceeds 2.0  run=试运行"
    )
    assert "note=a\\x1b[2Jb\\u202e" in lines[2], "nothing that moves a terminal's cursor"
    only = run("show", "--folder", home, "--kind", "sent", "--kind", "heads", "--json").output.splitlines()
    assert [json.loads(line)["kind"] for line in only] == ["sent", "heads"]
    assert (home / "audit" / "2026-11.jsonl").read_text("utf-8").splitlines()[2] == only[0], (
        "as it stands in the record"
    )
    assert run("show", "--folder", home, "--since", "2026-11-23").output == ""
    assert len(run("show", "--folder", home, "--since", "2026-11-22T18:49").output.splitlines()) == 5
    assert run("show", "--folder", home, "--since", "yesterday").exit_code == 2


def test_an_export_is_verified_alone_and_says_whose_key_was_taken(home, tmp_path):
    out = tmp_path / "out.jsonl"
    told = run("export", "--folder", home, "--out", out)
    assert told.exit_code == 0, told.output
    assert f"{out}: 5 lines" in told.output
    alone = run("verify", out)
    assert alone.exit_code == 0, alone.output
    assert "key was taken from the file itself" in alone.output
    assert "not checked    countersignatures of coordinator" in alone.output
    assert "taken from" not in run("verify", out, "--public-key", KEYS[NAME].hex()).output
    wrong = run("verify", out, "--public-key", KEYS[HOSPITAL].hex())
    assert isinstance(wrong.exception, AuditBroken)
    assert run("verify", out, "--public-key", "abc").exit_code == 2
    assert run("verify", home / "audit").exit_code == 2
    assert run("export", "--folder", home, "--out", out).exit_code != 0


def test_an_export_with_its_end_cut_is_broken(home, tmp_path):
    out = tmp_path / "out.jsonl"
    run("export", "--folder", home, "--out", out)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:-1]))
    told = run("verify", out)
    assert isinstance(told.exception, AuditBroken)
    assert "line 5: the file ends with entry 4" in told.exception.message


def test_a_cut_end_is_found_against_the_record_of_another_party(home, tmp_path):
    assert "agrees with 1 heads" in run("verify", "--folder", home, "--against", tmp_path / "c").output
    file = home / "audit" / "2026-11.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))
    assert run("verify", "--folder", home).exit_code == 0
    told = run("verify", "--folder", home, "--against", tmp_path / "c")
    assert isinstance(told.exception, AuditBroken)
    assert "the end was cut" in told.exception.message


def test_a_fork_and_an_unfinished_line_are_told(home):
    with open_chain(home / "audit") as chain, open_chain_of(COORDINATOR, home / "new") as rewritten:
        for _ in range(3):
            rewritten.record("other")
        chain.note_heads([rewritten.head()], KEYS)
        before = chain.head().number
    with open_chain(home / "audit") as chain, open_chain_of(COORDINATOR, home / "newer") as again:
        with pytest.raises(AuditBroken):
            chain.note_heads([again.head()], KEYS)
        assert chain.head().number == before + 1
    with (home / "audit" / "2026-11.jsonl").open("ab") as stream:
        stream.write(b'{"number"')
    told = run("verify", "--folder", home).output
    assert "CONTRADICTION  the record of 'coordinator' was at line 4" in told
    assert "unfinished     2026-11.jsonl line 8" in told


@pytest.mark.parametrize("words", [[], ["verify"], ["show"], ["export"]])
def test_every_command_has_help_with_an_example(words):
    told = run(*words, "--help")
    assert told.exit_code == 0
    assert "Example: fedseek-site audit" in told.output


def test_text_is_made_visible_and_names_stay():
    assert visible("北岸银行 é") == "北岸银行 é"
    assert visible("a\nb\x9b\u200b") == "a\\nb\\x9b\\u200b"
