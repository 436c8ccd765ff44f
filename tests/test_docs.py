"""The documentation is held to the code: links, names, commands, tables."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import get_args

import click
import msgspec
import pytest

from fedseek import errors, messages
from fedseek.cli import cli
from fedseek.daemon import audit_lines
from fedseek.identity import signing
from fedseek_server import playing
from fedseek_server.cli import cli as server_cli
from fedseek_site import desk
from fedseek_site.cli import cli as site_cli
from simulations import scenario

ROOT = Path(__file__).resolve().parent.parent
OTHER_TREES = (".venv", "runs", "build", "dist")


def tracked_files() -> list[Path]:
    """What git tracks or would track; outside a clone, everything that is no product of a build."""
    git = shutil.which("git")
    if git is not None and (ROOT / ".git").exists():
        command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, capture_output=True, check=False, cwd=ROOT)
        if done.returncode == 0:
            names = set(done.stdout.decode().split("\0")) - {""}
            return sorted(ROOT / name for name in names if (ROOT / name).is_file())
    return sorted(path for path in ROOT.rglob("*") if path.is_file() and path.parts[len(ROOT.parts)] not in OTHER_TREES)


FILES = tracked_files()
PAGES = [path for path in FILES if path.suffix == ".md"]
SHORT = {path: path.relative_to(ROOT).as_posix() for path in FILES}
each_page = pytest.mark.parametrize("page", PAGES, ids=[SHORT[page] for page in PAGES])


# Links ---------------------------------------------------------------------------------------------------------------


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and GitLab make them."""
    headings = re.findall(r"^#+ (.+)$", without_fences(text), flags=re.MULTILINE)
    kept = (
        "".join(c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN") for heading in headings
    )
    return {heading.strip().replace(" ", "-") for heading in kept}


def broken_links(text: str, folder: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (folder / name).resolve()
        if name and not (target.exists() and target.is_relative_to(ROOT)):
            broken.append(link)
            continue
        if anchor and anchor not in anchors(target.read_text("utf-8") if name else text):
            broken.append(link)
    return broken


@each_page
def test_every_relative_link_resolves(page):
    assert not broken_links(page.read_text("utf-8"), page.parent)


def test_a_broken_link_is_noticed():
    page = "# Two words, 简介\n[a](README.md) [b](no.md) [c](#two-words-简介) [d](#none) [e](../x) [f](https://x.org/y)"
    assert broken_links(page, ROOT) == ["no.md", "#none", "../x"]
    assert broken_links("[a](CHANGELOG.md#no-such-heading)", ROOT) == ["CHANGELOG.md#no-such-heading"]


# Names ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def names_of(path: Path) -> frozenset[str]:
    """Functions, classes, methods (``Class.method``) and module variables of a file."""
    return frozenset(_names(ast.parse(path.read_text("utf-8")).body, ""))


def _names(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node.body, f"{prefix}{node.name}.")
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                yield prefix + target.id


def missing_names(text: str, folder: Path = ROOT) -> list[str]:
    """``path.py:name`` where there is no such file or no such name in it; and files in backticks that are not there."""
    missing = []
    for path, name in re.findall(r"([\w./-]+\.py):([A-Za-z_]\w*(?:\.\w+)*)", text):
        if not (ROOT / path).is_file() or name not in names_of(ROOT / path):
            missing.append(f"{path}:{name}")
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|toml|md))`", text):
        if not (ROOT / path).is_file() and not (folder / path).is_file():
            missing.append(path)
    return missing


@each_page
def test_every_name_and_file_mentioned_exists(page):
    assert not missing_names(page.read_text("utf-8"), page.parent)


def test_a_missing_name_is_noticed():
    text = "fedseek/plan.py:Plan.canonical fedseek/plan.py:Plan.no fedseek/no.py:x `fedseek/none.py` `fedseek/plan.py`."
    assert missing_names(text) == ["fedseek/plan.py:Plan.no", "fedseek/no.py:x", "fedseek/none.py"]


def test_the_walkthrough_visits_every_step():
    page = (ROOT / "docs/walkthrough.md").read_text("utf-8")
    steps = ("plan", "records", "train", "encode", "encrypt", "messages", "aggregate", "decrypt", "evaluate", "release")
    assert [step for step in steps if f"fedseek/{step}.py:" not in page] == []


# Commands ------------------------------------------------------------------------------------------------------------


def commands_in(text: str) -> list[tuple[str, ...]]:
    blocks = re.findall(r"^```(?:console|bash)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    return [words for line in lines if (words := tuple(shlex.split(line, comments=True)))]


COMMANDS = sorted({command for page in PAGES for command in commands_in(page.read_text("utf-8"))})
FEDSEEK = [command for command in COMMANDS if command[0] == "fedseek"]
DAEMONS = {"fedseek-server": server_cli, "fedseek-site": site_cli}
DAEMON = [command for command in COMMANDS if command[0] in DAEMONS]
PLAN = [command for command in FEDSEEK if command[1] == "plan"]
BENCHMARKS = [command for command in COMMANDS if command[0] == "python" and command[1].startswith("benchmarks/")]
MODULES = [command for command in COMMANDS if command[:2] == ("python", "-m")]


def parse(arguments: tuple[str, ...], program: click.Command = cli) -> None:
    """Let click parse a command as the program would; raises ``click.UsageError`` where it would refuse."""
    command: click.Command | None = program
    words = list(arguments)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        command = command.get_command(click.Context(command), name)
    if command is None:
        raise click.UsageError(f"no such command: {arguments}")
    command.make_context("fedseek", words)


def run(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=800)


def test_there_are_commands_to_check():
    first = commands_in((ROOT / "README.md").read_text("utf-8"))[:2]
    assert first == [("make", "demo"), ("make", "test")]
    assert FEDSEEK
    assert BENCHMARKS
    assert {command[0] for command in COMMANDS} <= {"make", "fedseek", "python", *DAEMONS}


@pytest.mark.parametrize("command", FEDSEEK, ids=" ".join)
def test_a_printed_command_parses_and_its_files_exist(command):
    parse(command[1:])
    assert [word for word in command if word.endswith(".toml") and not (ROOT / word).is_file()] == []


@pytest.mark.parametrize("command", DAEMON, ids=" ".join)
def test_a_printed_command_of_a_daemon_parses(command, monkeypatch):
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))  # files of another machine
    parse(command[1:], DAEMONS[command[0]])
    example = [word for word in command if word.endswith(".example.toml") and not (ROOT / word).is_file()]
    assert example == []


@pytest.mark.parametrize("program", DAEMONS)
def test_a_command_of_a_daemon_that_would_be_refused_is_noticed(program):
    for words in (("sreve",), ("audit", "verify", "--no-such"), ("keys", "x")):
        with pytest.raises(click.UsageError):
            parse(words, DAEMONS[program])


def test_every_command_of_a_daemon_is_in_its_runbook():
    for program, page in (("fedseek-server", "server/README.md"), ("fedseek-site", "clients/README.md")):
        text = (ROOT / page).read_text("utf-8")
        assert [name for name in DAEMONS[program].commands if f"{program} {name}" not in text] == []


@pytest.mark.parametrize("words", [("simulate", "x.toml", "--no-such"), ("plan", "chekc", "x.toml"), ("simulate",)])
def test_a_command_that_would_be_refused_is_noticed(words):
    with pytest.raises(click.UsageError):
        parse(words)


@pytest.mark.parametrize("command", PLAN, ids=" ".join)
def test_a_printed_plan_command_runs(command):
    done = run([str(Path(sys.executable).with_name("fedseek")), *command[1:]])
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    if "--json" in command:
        json.loads(done.stdout)


@pytest.mark.parametrize("command", MODULES, ids=" ".join)
def test_a_printed_module_runs(command):
    assert command[-1] == "--help"
    assert run([sys.executable, *command[1:]]).returncode == 0


def test_a_printed_make_target_exists():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = [command[1] for command in COMMANDS if command[0] == "make"]
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)] == []


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({command[2] for command in FEDSEEK if command[1] == "simulate"}))
def test_a_printed_simulation_runs(file, tmp_path):
    fedseek = str(Path(sys.executable).with_name("fedseek"))
    done = run([fedseek, "simulate", file, "--rounds", "1", "--out", str(tmp_path), "--json"])
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    wanted = ("report.html", "summary.json", "release/adapter_model.safetensors", "release/README.md")
    assert [name for name in wanted if not (folder / name).is_file()] == []
    assert json.loads(done.stdout)["run"] == folder.name


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHMARKS, ids=" ".join)
def test_a_printed_benchmark_runs(command):
    done = run([sys.executable, *command[1:], "--json"])
    # the time of a step is judged against a target, which a busy machine may miss: that it ran and measured is enough
    assert done.stdout.strip(), done.stderr
    assert json.loads(done.stdout.splitlines()[-1])


# Tables --------------------------------------------------------------------------------------------------------------


def section(page: str, heading: str) -> str:
    text = (ROOT / page).read_text("utf-8")
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the tables of a section, without their heads."""
    lines = [line for line in section(page, heading).splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    rules = [number for number, row in enumerate(cells) if set("".join(row)) <= set("-: ")]
    return [row for number, row in enumerate(cells) if number not in rules and number + 1 not in rules]


def leaves(family: type[errors.FedseekError]) -> list[type[errors.FedseekError]]:
    below = family.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [family]


def test_the_protocol_names_every_message_and_no_other():
    structs = {
        name
        for name, value in vars(messages).items()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == messages.__name__
    }
    assert {kind.__name__ for kind in (*get_args(messages.Request), *get_args(messages.Reply))} <= structs
    assert {row[0] for row in rows("docs/protocol.md", "Messages")} == structs


def test_the_protocol_names_every_error_leaf_with_its_exit_code():
    # InternalError is what a site says of anything that is no error of ours
    wanted = {
        leaf.__name__: leaf.exit_code for leaf in leaves(errors.FedseekError) if leaf.__module__ == "fedseek.errors"
    }
    table = {row[0]: int(row[-1]) for row in rows("docs/protocol.md", "Refusal codes")}
    assert table == {**wanted, "InternalError": 1}
    assert '"InternalError"' in (ROOT / "clients/fedseek_site/service.py").read_text("utf-8")


def test_the_protocol_names_every_signature_context():
    contexts = {value.decode() for name, value in vars(signing).items() if name.startswith("CONTEXT_")}
    assert {row[0] for row in rows("docs/protocol.md", "Wire format") if row[0].startswith("fedseek/")} == contexts


def test_the_operating_page_names_every_exit_code():
    classes = [errors.FedseekError, *errors.FedseekError.__subclasses__()]
    ours = {each.exit_code for each in classes if each.__module__ == "fedseek.errors"}
    assert {int(row[0]) for row in rows("docs/operating.md", "Exit codes")} == ours | {0, 2, 130}


def test_the_operating_page_names_every_event_and_no_other():
    # what these tell goes into the audit chain
    permission = {f"clients/fedseek_site/{name}.py" for name in ("permission", "release_permission")}
    sources = [
        path
        for path in FILES
        if path.suffix == ".py" and SHORT[path].split("/")[0] != "tests" and SHORT[path] not in permission
    ]
    said = re.compile(r'(?:"event": |_tell\()"([\w-]+)"(?: if .+ else "([\w-]+)")?')
    told = {name for path in sources for found in said.findall(path.read_text("utf-8")) for name in found if name}
    named = {name for row in rows("docs/operating.md", "Events") for name in re.findall(r"[\w-]+", row[0])}
    assert named == told


def test_the_operating_page_names_every_kind_of_line_in_an_audit_chain():
    sources = [*ROOT.glob("server/fedseek_server/*.py"), *ROOT.glob("clients/fedseek_site/*.py")]
    text = "\n".join(path.read_text("utf-8") for path in sources)
    said = re.findall(r'(?:audit\.|self\._)record,?\(?\s*"([a-z-]+)"', text)
    said += re.findall(r'closing\.callback\((?:daemon\.)?audit\.record, "([a-z-]+)"', text)
    said += re.findall(r'self\._record\("([a-z-]+)"|kind = "([a-z-]+)" if .* else "([a-z-]+)"', text)
    for name in ("permission", "release_permission"):
        permission = (ROOT / f"clients/fedseek_site/{name}.py").read_text("utf-8")
        said += re.findall(r'self\._tell\("([a-z-]+)"', permission)
    told = {name for found in said for name in ([found] if isinstance(found, str) else found) if name}
    told |= {kind for kind, _ in re.findall(r'\("(node-[a-z]+)", (added|removed)\)', text)}
    told |= {*audit_lines.OWN_KINDS, *desk.AUDITED.values(), *playing.AUDITED.values()}
    cells = [row[0] for row in rows("docs/operating.md", "Lines of the audit chain")]
    assert {name for cell in cells for name in re.findall(r"[a-z-]+", cell)} == told


def test_the_page_on_papers_names_every_paper_of_the_sources():
    page = (ROOT / "docs/papers.md").read_text("utf-8")
    sources = [path for path in FILES if path.suffix == ".py" and SHORT[path].split("/")[0] != "tests"]
    cited = {
        paper
        for path in sources
        for paper in re.findall(
            r"arXiv:\d{4}\.\d{5}|eprint \d{4}/\d+|RFC \d{4}|FIPS \d+|SP 800-\w+", path.read_text("utf-8")
        )
    }
    assert len(cited) > 10
    assert [paper for paper in sorted(cited) if paper not in page] == []


# Scenarios and data --------------------------------------------------------------------------------------------------


def test_the_sites_shown_in_the_readme_are_read_as_shown():
    blocks = re.findall(r"^```toml\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    sites = [site for block in blocks for site in tomllib.loads(block)["sites"]]
    assert sites
    for site in sites:
        scenario.SiteSpec.model_validate(site)


@pytest.mark.parametrize(
    "table",
    [
        scenario.SimulationSpec,
        scenario.SyntheticSpec,
        scenario.SmallModelSpec,
        scenario.TextSource,
        scenario.SiteSpec,
        scenario.Part,
    ],
)
def test_the_page_on_simulations_names_every_field(table):
    page = section("simulations/README.md", "A scenario file")
    assert [name for name in table.model_fields if not re.search(rf"\b{name}\b", page)] == []


# The whole tree ------------------------------------------------------------------------------------------------------

# written in parts, so that this file is not found by its own rule
MACHINE_PATH = re.compile(
    r"(?<![\w.$}/-])/(?:" + "|".join(("wo" + "rk", "ho" + "me", "ro" + "ot", "tmp/" + "fs")) + r")(?=/|\b(?![\w-]))"
)


def machine_paths(text: str) -> list[str]:
    return [text[max(0, hit.start() - 20) : hit.end() + 20] for hit in MACHINE_PATH.finditer(text)]


def test_no_text_file_names_a_folder_of_somebodys_machine():
    found = {}
    for path in FILES:
        data = path.read_bytes()
        if b"\0" not in data and (hits := machine_paths(data.decode("utf-8"))):
            found[SHORT[path]] = hits
    assert found == {}


@pytest.mark.parametrize("name", ["wo" + "rk", "ho" + "me", "ro" + "ot", "tmp/" + "fs"])
def test_a_machine_path_is_noticed(name):
    assert machine_paths(f"see /{name}/x")
    assert machine_paths(f"cd /{name}")
    assert not machine_paths(f"client/{name}er and a/{name}flow, ./{name}, /{name}ers")


def test_the_changelog_has_a_section_for_what_is_not_released():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## .*unreleased", changelog, flags=re.IGNORECASE | re.MULTILINE)


def test_decisions_are_numbered_and_complete():
    files = [path for path in PAGES if path.parent.name == "adr"]
    assert [path.name[:4] for path in files] == [f"{number:04}" for number in range(1, len(files) + 1)]
    for number, path in enumerate(files, start=1):
        text = path.read_text("utf-8")
        assert text.startswith(f"# {number}. "), path
        assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == ["Context", "Options", "Decision", "Consequences"]
        assert len(re.findall(r"^- \*\*", text, flags=re.MULTILINE)) >= 2, f"{path}: no option was rejected"


def test_the_readme_introduces_itself_in_chinese_with_both_commands():
    chinese = section("README.md", "简介")
    assert "`make demo`" in chinese
    assert "`make test`" in chinese
    assert sum("一" <= character <= "鿿" for character in chinese) > 100


def test_the_page_on_simulations_lists_every_scenario():
    page = section("simulations/README.md", "Scenarios")
    files = {path.name for path in FILES if path.parent == ROOT / "simulations/scenarios"}
    assert set(re.findall(r"\(scenarios/([\w.]+)\)", page)) == files
