import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fedseek.cli import cli, main
from fedseek.errors import InvalidPlan
from fedseek.plan import load_plan
from simulations.scenario import load_scenario

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = sorted((ROOT / "simulations" / "scenarios").glob("*.toml"))
# a plan that names a model which is yet to be built is none that anybody could approve
UNFINISHED = [path for path in SCENARIOS if "${SMALL_MODEL}" in path.read_text("utf-8")]
PLAN = """
name = "tiny"
[model]
source = "path:{model}"
sha256 = "{sha}"
max_tokens = 16
[kinds.bank]
labels = ["欺诈", "正常"]
[kinds.hospital]
labels = ["急诊", "普通", "自理"]
[lora]
rank = 2
target_modules = ["query"]
[training]
rounds = 2
steps_per_round = 2
sampling_probability = 0.5
learning_rate = 0.01
head_learning_rate = 0.05
[privacy]
mechanism = "none"
[cohort]
min_sites = 2
colluders = 0
max_sites = 4
"""
SITES = """
[[sites]]
name = "北岸银行"
kind = "bank"
train = "{folder}/没有.jsonl"
held_back = "{folder}/也没有.jsonl"
[[sites]]
name = "harbour-bank"
kind = "bank"
train = "{folder}/没有.jsonl"
held_back = "{folder}/也没有.jsonl"
"""


@pytest.fixture
def plan_file(tmp_path, tiny_model):
    from fedseek.lora.source import model_digest

    path = tmp_path / "计划.toml"
    path.write_text(PLAN.format(model=tiny_model, sha=model_digest(tiny_model)), "utf-8")
    return path


@pytest.fixture
def scenario_file(plan_file, tmp_path):
    """A scenario whose data files do not exist."""
    path = tmp_path / "场景.toml"
    inside = plan_file.read_text("utf-8").replace("\n[", "\n[plan.")
    path.write_text("[plan]\n" + inside + SITES.format(folder=tmp_path), "utf-8")
    return path


def fedseek(*arguments) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    code = "from fedseek.cli import main; main()"
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=120)


@pytest.fixture
def failing(monkeypatch, capsys):
    """Run the command in this process, where it must fail; returns exit code and stderr, having seen a clean stdout."""

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedseek", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        told = capsys.readouterr()
        assert told.out == ""
        return caught.value.code, told.err

    return run


def commands(command: click.Command, path: tuple[str, ...] = ()):
    """Every command and group, with its words."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), (*path, name))


COMMANDS = dict(commands(cli))


def test_the_commands_are_these():
    assert set(COMMANDS) == {
        (),
        ("plan",),
        ("plan", "check"),
        ("plan", "predict"),
        ("audit",),
        ("model",),
        ("model", "fetch"),
        ("model", "show"),
        ("verify",),
        ("simulate",),
        ("consortium",),
        ("consortium", "up"),
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_says_what_the_command_does_and_shows_an_example_that_names_it(path):
    done = CliRunner().invoke(cli, [*path, "--help"])
    assert done.exit_code == 0
    text = " ".join(done.output.split())
    assert COMMANDS[path].help.split("\n")[0] in text
    assert f"Example: fedseek {' '.join(path)}".strip() in text


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_scenario_in_each_example_exists(path):
    words = COMMANDS[path].epilog.split()
    files = [word for word in words if word.endswith(".toml")]
    others = (("audit",), ("verify",), ("model",), ("model", "fetch"), ("model", "show"))
    assert files or path in others, "these read what a run has written, or a model"
    for file in files:
        assert (ROOT / file).is_file(), file


def test_the_version_is_the_installed_ones():
    done = CliRunner().invoke(cli, ["--version"])
    assert done.exit_code == 0
    assert version("fedseek") in done.output


# --- plan check


def test_a_plan_file_and_the_plan_of_a_scenario_are_checked_alike(plan_file, scenario_file):
    digest = load_plan(plan_file).digest
    for file in (plan_file, scenario_file):
        done = CliRunner().invoke(cli, ["plan", "check", str(file)])
        assert done.exit_code == 0
        assert done.output == f"{file}: plan 'tiny' is valid\ndigest {digest}\n"
        line = CliRunner().invoke(cli, ["plan", "check", str(file), "--json"]).output
        assert line.count("\n") == 1
        assert json.loads(line) == {"name": "tiny", "digest": digest}


def test_there_are_scenarios_to_check():
    assert "demo" in {path.stem for path in SCENARIOS}


@pytest.mark.parametrize("path", [path for path in SCENARIOS if path not in UNFINISHED], ids=lambda path: path.stem)
def test_every_scenario_of_the_project_has_a_valid_plan(path):
    done = CliRunner().invoke(cli, ["plan", "check", str(path)])
    assert done.exit_code == 0, done.exception
    assert "is valid" in done.output


@pytest.mark.parametrize("path", UNFINISHED, ids=lambda path: path.stem)
def test_a_plan_without_its_model_is_complete_in_all_else(path, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDSEEK_DATA", str(tmp_path))
    with pytest.raises(InvalidPlan) as caught:
        load_plan(path)
    assert {problem.split(":")[0] for problem in caught.value.problems} == {"model.source", "model.sha256"}
    assert load_scenario(path).plan.rounds > 1


# --- exit codes: 0 done, 2 usage, 3 plan, 4 data or model


def test_done_is_0_with_the_result_on_stdout_and_nothing_on_stderr(plan_file):
    done = fedseek("plan", "check", plan_file, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["name"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Usage"),
        (["plan", "check"], "PLAN_FILE"),
        (["plan", "cheque", "x"], "No such command 'cheque'"),
        (["plan", "check", "--colour", "x"], "--colour"),
        (["simulate", "x.toml", "--rounds", "0"], "--rounds"),
    ],
)
def test_wrong_usage_is_2(failing, arguments, words):
    code, text = failing(*arguments)
    assert code == 2
    assert words in text


def test_a_wrong_plan_is_3_with_every_problem_on_stderr(plan_file):
    text = plan_file.read_text("utf-8").replace("rank = 2", "rank = 0").replace("max_sites = 4", "max_sites = 0")
    plan_file.write_text(text, "utf-8")
    done = fedseek("plan", "check", plan_file, "--json")
    assert (done.returncode, done.stdout) == (3, "")
    first, *problems = done.stderr.splitlines()
    assert first == f"fedseek: error: {plan_file}: 2 problems"
    assert sorted(problem.split(":")[0] for problem in problems) == ["  - cohort.max_sites", "  - lora.rank"]


def test_a_missing_plan_file_is_3_with_a_hint(failing, tmp_path):
    code, text = failing("plan", "check", tmp_path / "没有.toml")
    assert code == 3
    assert "没有.toml" in text
    assert "no such file" in text
    assert "fedseek: hint: check the path" in text


def test_a_missing_model_is_4(failing, plan_file):
    text = plan_file.read_text("utf-8").replace('source = "path:', 'source = "path:/no/such')
    plan_file.write_text(text, "utf-8")
    code, text = failing("plan", "predict", plan_file, "--json")
    assert code == 4
    assert "fedseek: error: no model at 'path:/no/such" in text


def test_missing_data_is_4_before_anything_is_written(scenario_file, tmp_path):
    done = fedseek("simulate", scenario_file, "--out", tmp_path / "runs")
    assert (done.returncode, done.stdout) == (4, "")
    assert "没有.jsonl: no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_wrong_scenario_is_3_before_anything_is_written(failing, scenario_file, tmp_path):
    scenario_file.write_text(scenario_file.read_text("utf-8").replace('"harbour-bank"', '"北岸银行"'), "utf-8")
    code, text = failing("simulate", scenario_file, "--out", tmp_path / "runs")
    assert code == 3
    assert "'北岸银行' is given twice" in text
    assert not (tmp_path / "runs").exists()


def test_an_interrupt_is_130(failing, monkeypatch, plan_file):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedseek.cli.load_plan", interrupted)
    code, text = failing("plan", "check", plan_file)
    assert (code, text.strip()) == (130, "fedseek: interrupted")


# --- plan predict


def test_predict_prints_one_line_of_json_and_nothing_else(plan_file):
    done = fedseek("plan", "predict", plan_file, "--json")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    document = json.loads(done.stdout)
    assert document["epsilon_per_site"] is None
    assert document["privacy"] is None
    assert document["kinds"]["hospital"]["values"] == 2 * 2 * 16 + 3 * 16 + 3
    assert done.stderr == ""


def test_predict_shows_a_table_with_every_figure(plan_file):
    done = CliRunner().invoke(cli, ["plan", "predict", str(plan_file)])
    assert done.exit_code == 0
    for words in ("plan tiny", "bank: bytes up", "hospital: ciphertexts", "noise budget bits left", "epsilon per site"):
        assert words in done.output


def test_checking_a_plan_and_predicting_its_privacy_need_no_torch_and_no_flower(plan_file):
    code = (
        "import sys; from fedseek.cli import cli; cli(sys.argv[1:], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'flwr', 'opacus', 'peft') if name in sys.modules])"
    )
    line = [sys.executable, "-c", code, "plan", "predict", "--privacy-only", str(plan_file)]
    done = subprocess.run(line, capture_output=True, encoding="utf-8", timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
