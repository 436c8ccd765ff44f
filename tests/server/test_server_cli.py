"""The coordinator's command line: what it prints, what it writes, and with which code it ends."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from plan_documents import DOCUMENT

from fedseek.daemon.audit_check import verify_audit
from fedseek.errors import AuditBroken, FedseekError, InvalidConfig, InvalidPlan, ReleaseRefused
from fedseek.plan import check_plan, parse_spec
from fedseek_server import cli as module
from fedseek_server.cli import cli, main
from fedseek_server.config import CONFIG_FILE, load_config
from fedseek_server.consortium import open_consortium
from fedseek_server.orders import Status, all_runs, submit

PLAN = check_plan(parse_spec(DOCUMENT))
PLAN_FILE = """
name = "demo"
[model]
source = "package:some-model"
sha256 = "{sha}"
[kinds.bank]
labels = ["欺诈", "正常"]
[lora]
target_modules = ["query"]
[training]
rounds = {rounds}
steps_per_round = 2
sampling_probability = 0.5
learning_rate = 0.01
head_learning_rate = 0.05
[privacy]
mechanism = "none"
[cohort]
max_sites = 4
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSEEK_PASSPHRASE", raising=False)
    Path("计划.toml").write_text(PLAN_FILE.format(sha="ab" * 32, rounds=2), "utf-8")
    return tmp_path


@pytest.fixture
def consortium():
    ok("init", "--name", "华东联合", "--host", "localhost", "--host", "127.0.0.1", "--port", "9555")
    return Path("consortium")


def run(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def ok(*words) -> str:
    result = run(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(error, *words) -> FedseekError:
    result = run(*words)
    assert isinstance(result.exception, error), (result.output, result.exception)
    return result.exception


def ended(monkeypatch, capsys, *words) -> tuple[int, str]:
    """As a shell sees it: the code, and what is on standard error."""
    monkeypatch.setattr(sys, "argv", ["fedseek-server", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr().err


def commands(group: click.Group, *before: str):
    for name, command in group.commands.items():
        yield [*before, name], command
        if isinstance(command, click.Group):
            yield from commands(command, *before, name)


# help


@pytest.mark.parametrize(
    "words", [[], *(words for words, _ in commands(cli))], ids=lambda words: "-".join(words) or "itself"
)
def test_every_command_tells_what_it_does_and_gives_an_example(words):
    told = ok(*words, "--help")
    assert "Example: fedseek-server" in told
    assert len(told.split("Usage:")[1].splitlines()[2]) > 10, "what it does"


def test_help_waits_for_no_daemon():
    """Nothing that serving needs is imported to print a page."""
    code = "import sys; from fedseek_server.cli import cli; print(sorted({'flwr', 'torch', 'grpc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# making one


def test_init_writes_a_configuration_that_serve_takes(consortium):
    config = load_config(consortium)
    assert (config.listen.port, config.audit.retention_days, config.limits.largest_update_mb) == (9555, 400, 1024)
    assert (consortium / CONFIG_FILE).stat().st_mode & 0o077 == 0


def test_init_leaves_a_configuration_alone_that_is_there(here):
    Path("consortium").mkdir(mode=0o700)
    mine = "version = 1\n[listen]\nhost = '10.0.0.1'\nport = 1\n"
    Path("consortium", CONFIG_FILE).write_text(mine)
    ok("init", "--name", "x", "--host", "localhost")
    assert Path("consortium", CONFIG_FILE).read_text() == mine


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version = 1", ["listen"]),
        ("version = 2\n[listen]\nhost = ''\nport = 0\n[audit]\nretention_days = 10\n[limits]\nx = 1\n", [
            "version", "listen.host", "listen.port", "audit.retention_days", "limits.x",
        ]),
        ("version = 1\ngreet_hours = 0\nsettle_seconds = -1\n[listen]\nhost = 'a'\nport = '1'\n", [
            "greet_hours", "settle_seconds", "listen.port",
        ]),
    ],
    ids=["nothing", "all", "times"],
)  # fmt: skip
def test_a_configuration_is_refused_with_all_that_is_wrong(consortium, text, said):
    (consortium / CONFIG_FILE).write_text(text)
    with pytest.raises(InvalidConfig) as told:
        load_config(consortium)
    assert sorted(problem.split(":")[0] for problem in told.value.problems) == sorted(said)


def test_serving_a_folder_without_a_consortium_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(module, "stop_on_signals", threading.Event)  # the tests' own process keeps its handlers
    monkeypatch.setattr(module, "start_log", lambda **options: None)
    code, said = ended(monkeypatch, capsys, "serve", "--folder", "nowhere")
    assert code == 3
    assert "nowhere" in said
    assert "Traceback" not in said


# runs


def test_run_puts_an_order_where_the_daemon_finds_it(consortium):
    told = json.loads(ok("run", "计划.toml", "--wait", "60", "--name", "r-1", "--json"))
    [order] = all_runs(consortium)
    assert told == {"run": "r-1", "plan_digest": order.plan().digest}
    assert (order.order().wait_seconds, order.order().continues) == (60.0, None)
    assert told["plan_digest"] in ok("run", "计划.toml")
    assert [each.path.name.startswith("demo-") for each in all_runs(consortium)] == [False, True]


def test_run_takes_up_a_lost_run(consortium):
    ok("run", "计划.toml", "--name", "r-2", "--continues", "r-1")
    assert all_runs(consortium)[0].order().continues == "r-1"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere.toml"], InvalidPlan),
        (["计划.toml", "--name", "R"], InvalidPlan),
        (["计划.toml", "--name", "../r"], InvalidPlan),
        (["计划.toml", "--name", "r\n"], InvalidPlan),
    ],
)
def test_an_order_that_cannot_be_is_refused(consortium, words, error):
    refused(error, "run", *words)
    assert all_runs(consortium) == []


def test_all_problems_of_a_plan_are_told_with_the_code_of_the_family(consortium, monkeypatch, capsys):
    Path("bad.toml").write_text(PLAN_FILE.format(sha="xy", rounds=0), "utf-8")
    code, said = ended(monkeypatch, capsys, "run", "bad.toml")
    assert code == 3
    assert "sha256" in said
    assert "rounds" in said


def test_a_consortium_that_is_not_there_gets_no_order(monkeypatch, capsys):
    """A run asked for in the wrong folder would wait for ever."""
    code, said = ended(monkeypatch, capsys, "run", "计划.toml", "--folder", "elsewhere")
    assert code == 6
    assert "holds no consortium" in said
    assert not Path("elsewhere").exists()


def test_status_shows_every_run_and_one_of_them(consortium):
    first = submit(consortium, PLAN, wait_seconds=0, run="alpha")
    second = submit(consortium, PLAN, wait_seconds=0, run="beta")
    first.write_status(Status(run="alpha", state="released", round=2, rounds=2))
    second.write_status(Status(run="beta", state="waiting", sites={"北岸银行": "ready", "仁济医院": "away"}))
    table = ok("status")
    assert table.index("alpha") < table.index("beta")
    assert "2 of 2" in table
    assert [each["state"] for each in json.loads(ok("status", "--json"))] == ["released", "waiting"]
    told = json.loads(ok("status", "be", "--json"))
    assert (told["run"], told["sites"]) == ("beta", {"北岸银行": "ready", "仁济医院": "away"})
    assert "waiting: 仁济医院: away; 北岸银行: ready" in ok("status", "beta")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (Status(run="r", state="running"), "running: begins, round 0 of 0"),
        (Status(run="r", state="running", phase="unmask", round=1, rounds=3), "running: unmask, round 1 of 3"),
        (Status(run="r", state="failed", code="X", text="太少", hint="再试"), "failed: 太少\n  hint: 再试"),
        (Status(run="r", state="stopped"), "stopped"),
        (Status(run="r", state="released"), "released"),
    ],
)
def test_status_of_one_run_in_words(consortium, status, said):
    submit(consortium, PLAN, wait_seconds=0, run="r").write_status(status)
    assert ok("status", "r").splitlines()[1:] == said.splitlines()


def test_a_run_that_nobody_asked_for_has_no_status(consortium, monkeypatch, capsys):
    submit(consortium, PLAN, wait_seconds=0, run="alpha")
    code, said = ended(monkeypatch, capsys, "status", "gamma")
    assert code == 1
    assert "runs here: alpha" in said


def test_stop_leaves_a_mark_once(consortium):
    order = submit(consortium, PLAN, wait_seconds=0, run="alpha")
    assert "alpha ends" in ok("stop", "al")
    assert order.is_to_stop
    order.write_status(Status(run="alpha", state="stopped"))
    assert "stopped already" in refused(FedseekError, "stop", "alpha").message


@pytest.mark.parametrize("state", ["queued", "waiting", "running", "failed", "stopped"])
def test_only_what_all_sites_approved_is_released(consortium, state):
    order = submit(consortium, PLAN, wait_seconds=0, run="r")
    order.write_status(Status(run="r", state=state, text="太少"))
    order.release.mkdir()
    error = refused(ReleaseRefused, "release", "r", "--out", "out")
    assert (state in error.message, error.exit_code) == (True, 7)
    assert not Path("out").exists()


def test_a_release_is_copied_to_a_new_folder(consortium):
    order = submit(consortium, PLAN, wait_seconds=0, run="r")
    order.release.mkdir()
    (order.release / "privacy-北岸银行.json").write_text("{}")
    order.write_status(Status(run="r", state="released"))
    ok("release", "r", "--out", "out")
    assert [each.name for each in Path("out").iterdir()] == ["privacy-北岸银行.json"]
    assert run("release", "r", "--out", "out").exit_code == 2


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (Status(run="r", state="released"), 0),
        (Status(run="r", state="stopped"), 1),
        (Status(run="r", state="failed", code="CohortTooSmall", text="太少"), 6),
        (Status(run="r", state="failed", code="GuardTripped", text="epsilon"), 5),
    ],
)
def test_follow_tells_each_change_once_and_ends_with_the_runs_own_code(consortium, monkeypatch, capsys, last, code):
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.02)

    def daemon():
        while not (found := all_runs(consortium)):
            time.sleep(0.01)
        for status in (Status(run="r", state="waiting", sites={"北岸银行": "away"}), last):
            time.sleep(0.1)
            found[0].write_status(status)

    thread = threading.Thread(target=daemon)
    thread.start()
    monkeypatch.setattr(sys, "argv", ["fedseek-server", "run", "计划.toml", "--name", "r", "--follow"])
    with pytest.raises(SystemExit) as end:
        main()
    thread.join()
    told = capsys.readouterr().out.splitlines()
    assert end.value.code == code
    assert told[2:] == ["queued", "waiting: 北岸银行: away", f"{last.state}{': ' + last.text if last.text else ''}"]


# the record


@pytest.fixture
def record(consortium):
    with open_consortium(consortium).audit_chain(retention_days=400) as audit:
        audit.record("run-asked-for", run="试运行", rounds=2)
        audit.record("reply-refused", site="仁济医院", node="17")
    return consortium


def test_the_coordinators_record_is_verified_shown_and_exported(record):
    assert json.loads(ok("audit", "verify", "--json"))["last"] == 3
    assert "audit record of coordinator: intact" in ok("audit", "verify")
    assert "reply-refused" in ok("audit", "show", "--kind", "reply-refused")
    ok("audit", "export", "--out", "audit.jsonl")
    key = open_consortium(record).about.coordinator_key
    assert verify_audit(Path("audit.jsonl"), public_key=key).name == "coordinator"
    assert "intact" in ok("audit", "verify", "audit.jsonl", "--public-key", key.hex())


def test_a_changed_line_is_named_and_ends_with_8(record, monkeypatch, capsys):
    [file] = (record / "audit").glob("*.jsonl")
    file.write_bytes(file.read_bytes().replace("仁济医院".encode(), "仁济医局".encode()))
    refused(AuditBroken, "audit", "verify")
    code, said = ended(monkeypatch, capsys, "audit", "verify")
    assert code == 8
    assert f"{file.name} line 3" in said


def test_a_folder_without_a_consortium_has_no_record(monkeypatch, capsys, here):
    assert ended(monkeypatch, capsys, "audit", "verify", "--folder", here)[0] == 6
    assert ended(monkeypatch, capsys, "audit", "verify", "--folder", "nowhere")[0] == 2
