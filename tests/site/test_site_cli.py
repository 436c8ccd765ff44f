"""The site's command line as a whole: help, exit codes, the record. Its parts have tests of their own."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from joined import OPEN_POLICY, join_all

from fedseek.daemon.audit_check import verify_audit
from fedseek.errors import AuditBroken
from fedseek_site import cli as module
from fedseek_site.cli import cli, main

BEIAN = "北岸银行"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSEEK_PASSPHRASE", raising=False)
    return tmp_path


@pytest.fixture
def site(here):
    """A folder that has joined, with a few lines on its record."""
    joined = join_all(here)
    joined.seats[BEIAN].desk.permission.pause()
    joined.seats[BEIAN].desk.permission.resume()
    joined.close()
    return here / BEIAN


def run(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def ok(*words) -> str:
    result = run(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def ended(monkeypatch, capsys, *words) -> tuple[int, str]:
    """As a shell sees it: the code, and what is on standard error."""
    monkeypatch.setattr(sys, "argv", ["fedseek-site", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr().err


def served(monkeypatch, capsys, folder) -> tuple[int, str]:
    monkeypatch.setattr(module, "stop_on_signals", threading.Event)  # the tests' own process keeps its handlers
    monkeypatch.setattr(module, "start_log", lambda **options: None)
    monkeypatch.setattr(module.os, "umask", lambda mask: None)
    return ended(monkeypatch, capsys, "serve", "--folder", folder)


def names(group: click.Group, *before: str):
    for name, command in group.commands.items():
        yield [*before, name]
        if isinstance(command, click.Group):
            yield from names(command, *before, name)


@pytest.mark.parametrize("words", [[], *names(cli)], ids=lambda words: "-".join(words) or "itself")
def test_every_command_tells_what_it_does_and_gives_an_example(words):
    told = ok(*words, "--help")
    assert "Example: fedseek-site" in told
    assert len(told.split("Usage:")[1].splitlines()[2]) > 10, "what it does"


def test_help_waits_for_no_daemon():
    """Nothing that serving needs is imported to print a page."""
    code = (
        "import sys; from fedseek_site.cli import cli; "
        "print(sorted({'flwr', 'torch', 'transformers', 'grpc'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# serving


def test_a_site_without_a_configuration_says_so(site, monkeypatch, capsys):
    code, said = served(monkeypatch, capsys, site)
    assert code == 3
    assert "site.toml" in said


def test_all_that_is_wrong_with_a_configuration_is_told_at_once(site, monkeypatch, capsys):
    (site / "site.toml").write_text('version = 1\nthreads = 0\ncolour = "red"\n[data]\nname = ""\n', "utf-8")
    code, said = served(monkeypatch, capsys, site)
    assert code == 3
    for key in ("threads", "colour", "data.name", "data.train", "data.held_back"):
        assert key in said


def test_a_file_of_records_that_is_not_there_is_told_by_its_name(site, monkeypatch, capsys):
    (site / "policy.toml").write_text(OPEN_POLICY)
    (site / "site.toml").write_text(
        'version = 1\n[data]\nname = "账户"\ntrain = "记录.jsonl"\nheld_back = "x.csv"\n', "utf-8"
    )
    code, said = served(monkeypatch, capsys, site)
    assert code == 4
    assert "记录.jsonl: no such file" in said
    assert "Traceback" not in said


def test_a_folder_that_has_not_joined_says_what_to_do(here, monkeypatch, capsys):
    ok("init", "--name", BEIAN, "--kind", "bank", "--folder", "new")
    Path("new/site.toml").write_text('version = 1\n[data]\nname = "x"\ntrain = "x.csv"\nheld_back = "x.csv"\n')
    code, said = served(monkeypatch, capsys, "new")
    assert code == 6
    assert "fedseek-site join" in said


# the record


def test_the_sites_record_is_verified_shown_and_exported(site):
    report = json.loads(ok("audit", "verify", "--folder", site, "--json"))
    assert (report["name"], report["last"]) == (BEIAN, 3)
    assert f"audit record of {BEIAN}: intact" in ok("audit", "verify", "--folder", site)
    assert "paused" in ok("audit", "show", "--folder", site, "--kind", "paused")
    ok("audit", "export", "--folder", site, "--out", "audit.jsonl")
    assert verify_audit(Path("audit.jsonl"), public_key=bytes.fromhex(report["keys"][-1])).last == 3


def test_a_changed_line_is_named_and_ends_with_8(site, monkeypatch, capsys):
    [file] = (site / "audit").glob("*.jsonl")
    file.write_bytes(file.read_bytes().replace(b'"paused"', b'"passed"'))
    assert isinstance(run("audit", "verify", "--folder", site).exception, AuditBroken)
    code, said = ended(monkeypatch, capsys, "audit", "verify", "--folder", site)
    assert code == 8
    assert f"{file.name} line 2" in said


def test_people_who_ask_a_daemon_that_is_not_there_are_told_so(site, monkeypatch, capsys):
    code, said = ended(monkeypatch, capsys, "status", "--folder", site)
    assert code == 8
    assert "is fedseek-site serve running" in said
