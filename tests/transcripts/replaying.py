"""Sessions at the command line, kept as text: ``python tests/transcripts/replaying.py FILE`` plays one anew and prints it.

    # a comment
    --- plan.toml            a file that is there; its text up to the line ---
    $ fedseek plan check plan.toml
    > y                      what somebody types
    output, both streams together, as a terminal shows them; [exit 3] if the exit code is not 0

It is played in a new folder. Digests, words, times and that folder are written as <digest>, <words>, <time>, <here>.
With --record the file is replaced; read the difference before it is committed.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from fedseek.daemon.console import run

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
PROGRAMS = {"fedseek": "fedseek.cli", "fedseek-server": "fedseek_server.cli", "fedseek-site": "fedseek_site.cli"}
ENVIRONMENT = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}

_WORD = "(?:[bdfghjklmnprstvz][aiou]){2}[bdfghjklmnprstvz]"
_REPLACED = (
    (re.compile(r"\b[0-9a-f]{64}\b"), "<digest>"),
    (re.compile(rf"\b{_WORD}(?:[ -]{_WORD}){{3}}\b"), "<words>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|\+00:00)?"), "<time>"),
    (re.compile(r"-\d{8}-\d{6}\b"), "-<time>"),
    (re.compile(r'("(?:updated|created)_at":)[\d.]+'), r"\1<time>"),
    (re.compile(r"[\d,]+ s ago"), "<n> s ago"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A comment, a file, or a command with what is typed; each with its lines."""

    kind: str
    head: str
    lines: tuple[str, ...] = ()


def steps(text: str) -> Iterator[Step]:
    """What a transcript asks for, in order; what it says came of it is left out."""
    lines = iter(text.splitlines())
    command, typed = "", []
    for line in lines:
        if line.startswith(("$ ", "# ", "--- ")) and command:
            yield Step("command", command, tuple(typed))
            command, typed = "", []
        if line.startswith("$ "):
            command = line[2:]
        elif line.startswith("# "):
            yield Step("comment", line)
        elif line.startswith("--- "):
            yield Step("file", line[4:], tuple(iter(lines.__next__, "---")))
        elif line.startswith("> ") and command:
            typed.append(line[2:])
    if command:
        yield Step("command", command, tuple(typed))


class Keyboard(io.StringIO):
    """Standard input whose lines show in the output, as at a terminal."""

    def __init__(self, typed: str, shown: io.StringIO) -> None:
        super().__init__(typed)
        self._shown = shown

    def readline(self, size: int | None = -1, /) -> str:
        line = super().readline(-1 if size is None else size)
        self._shown.write(line)
        return line


def play(command: str, typed: tuple[str, ...]) -> str:
    """Run a command line in this process; what it prints, and how it ends."""
    program, *arguments = shlex.split(command)
    cli = importlib.import_module(PROGRAMS[program]).cli
    shown = io.StringIO()
    sys.argv = [program, *arguments]
    sys.stdin = Keyboard("".join(line + "\n" for line in typed), shown)
    code: object = None
    with redirect_stdout(shown), redirect_stderr(shown):
        try:
            run(cli, program)
        except SystemExit as ended:
            code = ended.code
    return shown.getvalue() + (f"[exit {code}]\n" if code else "")


def normalised(text: str, here: Path) -> str:
    """The text with what differs from day to day replaced, and no spaces at the ends of lines."""
    text = text.replace(str(here), "<here>")
    for pattern, shown in _REPLACED:
        text = pattern.sub(shown, text)
    return "".join(line.rstrip() + "\n" for line in text.strip("\n").splitlines())


def replay(text: str) -> str:
    """The transcript as it is today."""
    os.environ.update(ENVIRONMENT)
    os.umask(0o022)
    told: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("simulations").symlink_to(ROOT / "simulations")
        for step in steps(text):
            if step.kind == "comment":
                told.append(("" if told and told[-1].startswith("# ") else "\n") + step.head + "\n")
            elif step.kind == "file":
                Path(step.head).parent.mkdir(parents=True, exist_ok=True)
                Path(step.head).write_text("".join(line + "\n" for line in step.lines), "utf-8")
                told.append("\n".join(["", f"--- {step.head}", *step.lines, "---", ""]))
            else:
                keys = "".join(f"> {line}\n" for line in step.lines)
                output = normalised(play(step.head, step.lines), Path(folder))
                told.append(f"\n$ {step.head}\n{keys}{output}")
        os.chdir(ROOT)
    return "".join(told).lstrip("\n")


def main() -> None:
    """Play the files named; print what came of it, or write it down."""
    for name in [word for word in sys.argv[1:] if word != "--record"]:
        path, record = Path(name).resolve(), "--record" in sys.argv
        arguments = list(sys.argv)
        told = replay(path.read_text("utf-8"))
        sys.argv = arguments
        if record:
            path.write_text(told, "utf-8")
        else:
            sys.stdout.write(told)


if __name__ == "__main__":
    main()
