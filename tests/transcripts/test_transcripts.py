"""What the three programs print is what the transcripts beside this file say."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from replaying import PROGRAMS, normalised, steps

FOLDER = Path(__file__).resolve().parent
TRANSCRIPTS = sorted(FOLDER.glob("*.txt"))


def commands(command: click.Command, words: tuple[str, ...]):
    yield words
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), (*words, name))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_session_goes_as_it_is_written_down(path):
    done = subprocess.run(
        [sys.executable, FOLDER / "replaying.py", path],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    written = path.read_text("utf-8")
    difference = difflib.unified_diff(written.splitlines(), done.stdout.splitlines(), "written", "now", lineterm="")
    assert done.stdout == written, "\n".join([*difference, "if that is meant: replaying.py --record FILE"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_of_every_command_is_written_down(program):
    module = __import__(PROGRAMS[program], fromlist=["cli"])
    written = [step.head for path in TRANSCRIPTS for step in steps(path.read_text("utf-8")) if step.kind == "command"]
    wanted = [" ".join((*words, "--help")) for words in commands(module.cli, (program,))]
    assert [line for line in wanted if line not in written] == []


def test_the_transcripts_show_errors_of_each_program_and_their_hints():
    text = "".join(path.read_text("utf-8") for path in TRANSCRIPTS)
    for program in PROGRAMS:
        assert f"{program}: error:" in text
        assert f"{program}: hint:" in text
    assert set(re.findall(r"^\[exit (\d+)\]$", text, re.M)) >= {"2", "3", "6", "7", "8"}
    assert "Traceback" not in text


def test_what_differs_from_day_to_day_is_replaced_and_nothing_else():
    text = f"{'a' * 64} lusab-babad-lusab-babad 2026-11-22T18:49:25.123Z demo-20261122-184925 3 s ago /var/x \n"
    assert normalised(text, Path("/var/x")) == "<digest> <words> <time> demo-<time> <n> s ago <here>\n"
    plain = "roster 3 of 华东联合, 90 days left, [exit 3], abcdef\n"
    assert normalised(plain, Path("/var/x")) == plain


def test_a_transcript_is_read_step_by_step():
    text = "# 注释\n--- a.toml\nx = 1\n---\n$ fedseek plan\n> y\noutput\n$ fedseek --help\n"
    found = [(step.kind, step.head, step.lines) for step in steps(text)]
    assert found == [
        ("comment", "# 注释", ()),
        ("file", "a.toml", ("x = 1",)),
        ("command", "fedseek plan", ("y",)),
        ("command", "fedseek --help", ()),
    ]
