"""What a shell sees of an error: one clear text, and the exit code of its family."""

import sys

import click
import pytest

from fedseek.daemon.console import run
from fedseek.errors import (
    AuditBroken,
    CohortTooSmall,
    FedseekError,
    GuardTripped,
    InvalidConfig,
    InvalidPlan,
    InvalidRecords,
    LocalRefused,
    ReleaseRefused,
    Unreachable,
    WrongKey,
)


def ended(monkeypatch, capsys, action, *words):
    """Exit code, standard output, standard error of a program whose one command does ``action``."""

    @click.command()
    @click.option("--number", type=int)
    def command(number):
        """Do it."""
        action()

    monkeypatch.setattr(sys, "argv", ["fedseek-x", *words])
    with pytest.raises(SystemExit) as end:
        run(command, "fedseek-x")
    return end.value.code, *capsys.readouterr()


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FedseekError("x"), 1),
        (InvalidPlan(["x"]), 3),
        (InvalidConfig(["x"], source="site.toml"), 3),
        (InvalidRecords("x"), 4),
        (GuardTripped("clip", "x"), 5),
        (WrongKey("x"), 6),
        (CohortTooSmall("x"), 6),
        (ReleaseRefused("x"), 7),
        (Unreachable("x"), 8),
        (AuditBroken("x"), 8),
        (LocalRefused("WrongKey", "x"), 6),
    ],
    ids=lambda each: getattr(each, "code", ""),
)
def test_an_error_of_ours_ends_with_the_code_of_its_family(monkeypatch, capsys, error, code):
    got, out, err = ended(monkeypatch, capsys, raising(error))
    assert (got, out) == (code, "")
    assert err.startswith("fedseek-x: error: ")
    assert "x" in err
    assert "Traceback" not in err


def test_a_hint_has_a_line_of_its_own(monkeypatch, capsys):
    _, _, err = ended(monkeypatch, capsys, raising(WrongKey("北岸银行的钥匙不对", hint="打电话")))
    assert err == "fedseek-x: error: 北岸银行的钥匙不对\nfedseek-x: hint: 打电话\n"


def test_success_ends_with_0(monkeypatch, capsys):
    assert ended(monkeypatch, capsys, lambda: click.echo("done")) == (0, "done\n", "")


@pytest.mark.parametrize("words", [["--number", "x"], ["--no-such"], ["more"]])
def test_wrong_use_ends_with_2_and_says_how_it_is_right(monkeypatch, capsys, words):
    code, _, err = ended(monkeypatch, capsys, lambda: None, *words)
    assert code == 2
    assert "Usage: fedseek-x" in err


def test_help_ends_with_0(monkeypatch, capsys):
    code, out, _ = ended(monkeypatch, capsys, raising(AssertionError), "--help")
    assert code == 0
    assert "Do it." in out


@pytest.mark.parametrize("error", [click.Abort(), KeyboardInterrupt()])
def test_an_interruption_ends_with_130(monkeypatch, capsys, error):
    code, out, err = ended(monkeypatch, capsys, raising(error))
    assert (code, out, err.strip()) == (130, "", "fedseek-x: interrupted")


@pytest.mark.parametrize("code", [0, 1, 6])
def test_a_command_may_end_with_a_code_of_its_own(monkeypatch, capsys, code):
    assert ended(monkeypatch, capsys, lambda: sys.exit(code))[0] == code


def test_an_error_that_is_not_ours_is_not_hidden(monkeypatch, capsys):
    with pytest.raises(KeyError):
        ended(monkeypatch, capsys, raising(KeyError("a bug")))
