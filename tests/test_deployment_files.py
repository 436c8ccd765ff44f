"""What an institution copies to its machines is read by the programs it is for, and shuts off what it says it does."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from fedseek.daemon.settings import load_settings
from fedseek_server import cli as server_cli
from fedseek_server.config import CoordinatorConfig
from fedseek_site import cli as site_cli
from fedseek_site.config import SiteConfig
from fedseek_site.policy import Policy

ROOT = Path(__file__).resolve().parent.parent
UNITS = ("server/fedseek-server.service", "clients/fedseek-site.service", "clients/fedseek-courier.service")
DOCKERFILES = ("server/Dockerfile", "clients/Dockerfile")
COMPOSES = ("server/compose.yaml", "clients/compose.yaml")
COORDINATOR, SITE, COURIER = UNITS
NETWORK = {"AF_INET", "AF_INET6"}

# systemd.unit(5), systemd.service(5), systemd.exec(5), systemd.kill(5), systemd.resource-control(5): what we use of them
KNOWN = {
    "Unit": {"Description", "Wants", "After", "StartLimitIntervalSec"},
    "Install": {"WantedBy"},
    "Service": {
        *("Type", "User", "Group", "SupplementaryGroups", "UMask", "StateDirectory", "StateDirectoryMode"),
        *("WorkingDirectory", "Environment", "LoadCredential", "ExecStart", "Restart", "RestartSec", "KillMode"),
        *("TimeoutStopSec", "LimitNOFILE", "LimitCORE", "TasksMax", "MemoryMax"),
        *("ProtectSystem", "ProtectHome", "ProtectProc", "ProcSubset", "ProtectClock", "ProtectControlGroups"),
        *("ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables"),
        *("PrivateTmp", "PrivateDevices", "PrivateIPC", "PrivateUsers", "PrivateNetwork", "IPAddressDeny"),
        *("NoExecPaths", "ReadOnlyPaths", "BindPaths", "TemporaryFileSystem", "NoNewPrivileges"),
        *("CapabilityBoundingSet", "AmbientCapabilities", "RestrictAddressFamilies", "RestrictNamespaces"),
        *("RestrictRealtime", "RestrictSUIDSGID", "LockPersonality", "MemoryDenyWriteExecute", "RemoveIPC"),
        *("KeyringMode", "SystemCallArchitectures", "SystemCallFilter", "SystemCallErrorNumber"),
    },
}
EVERY_UNIT = {
    "Restart": ["always"],
    "UMask": ["0077"],
    "LimitCORE": ["0"],
    "ProtectSystem": ["strict"],
    "ProtectHome": ["yes"],
    "PrivateTmp": ["yes"],
    "PrivateDevices": ["yes"],
    "NoNewPrivileges": ["yes"],
    "CapabilityBoundingSet": [""],
    "AmbientCapabilities": [""],
    "RestrictNamespaces": ["yes"],
    "RestrictSUIDSGID": ["yes"],
    "LockPersonality": ["yes"],
    "SystemCallArchitectures": ["native"],
}


def read_unit(text: str) -> dict[str, dict[str, list[str]]]:
    """Options by section; each with all its values, in order."""
    sections: dict[str, dict[str, list[str]]] = {}
    current: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            current.setdefault(name, []).append(value)
    return sections


def unit(path: str) -> dict[str, dict[str, list[str]]]:
    return read_unit((ROOT / path).read_text("utf-8"))


def unknown_options(sections: dict[str, dict[str, list[str]]]) -> list[str]:
    return [
        f"{section}.{name}"
        for section, options in sections.items()
        for name in options
        if name not in KNOWN.get(section, ())
    ]


# Unit files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", UNITS)
def test_every_option_of_a_unit_file_is_one_of_systemds(path):
    assert unknown_options(unit(path)) == []


def test_a_misspelt_option_is_noticed():
    assert unknown_options(read_unit("[Service]\nProtectSytem=strict\n")) == ["Service.ProtectSytem"]


@pytest.mark.parametrize("path", UNITS)
def test_a_unit_runs_for_ever_as_an_account_of_its_own_and_shuts_off_what_it_does_not_need(path):
    service = unit(path)["Service"]
    assert {name: service.get(name) for name in EVERY_UNIT} == EVERY_UNIT
    assert service["User"] not in (["root"], ["0"], [])
    assert service["SystemCallFilter"][0] == "@system-service"
    assert service["StateDirectory"][0] in service["WorkingDirectory"][0]


def test_no_two_units_share_an_account():
    accounts = [unit(path)["Service"]["User"][0] for path in UNITS]
    assert len(set(accounts)) == len(UNITS)


def test_the_site_service_has_no_network_and_the_courier_no_data():
    site, courier = unit(SITE)["Service"], unit(COURIER)["Service"]
    assert site["PrivateNetwork"] == ["yes"]
    assert site["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert courier["TemporaryFileSystem"] == ["/var/lib/fedseek:ro /srv:ro"]
    assert courier["BindPaths"] == ["/var/lib/fedseek/site/run"]
    assert "LoadCredential" not in courier
    assert set(courier["RestrictAddressFamilies"][0].split()) == {*NETWORK, "AF_UNIX"}
    assert site["SupplementaryGroups"] == courier["Group"]


def test_torch_may_compile_and_nobody_else():
    assert "MemoryDenyWriteExecute" not in unit(SITE)["Service"]  # oneDNN: "could not create a primitive"
    for path in (COORDINATOR, COURIER):
        assert unit(path)["Service"]["MemoryDenyWriteExecute"] == ["yes"]


@pytest.mark.parametrize("path", UNITS)
def test_a_passphrase_is_a_credential_and_not_in_the_environment(path):
    service = unit(path)["Service"]
    assert not re.search("PASS|KEY|SECRET", " ".join(service["Environment"]), re.IGNORECASE)
    for credential in service.get("LoadCredential", []):
        name = credential.split(":")[0]
        assert f"--passphrase-file ${{CREDENTIALS_DIRECTORY}}/{name}" in service["ExecStart"][0]


@pytest.mark.parametrize("path", UNITS)
def test_systemd_itself_finds_nothing_wrong(path, tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze on this machine")
    copy = tmp_path / Path(path).name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (ROOT / path).read_text("utf-8"), flags=re.M))
    done = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True, timeout=60)
    about = [line for line in (done.stdout + done.stderr).splitlines() if copy.name in line and "mounted" not in line]
    assert about == []


# Commands ------------------------------------------------------------------------------------------------------------


def parse(words: list[str], monkeypatch) -> None:
    """Let click read a command line, program first, as the program would."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))  # of another machine
    program = {"fedseek-server": server_cli.cli, "fedseek-site": site_cli.cli}[words[0]]
    command = program.get_command(click.Context(program), words[1])
    assert command is not None, words
    command.make_context(words[0], list(words[2:]))


@pytest.mark.parametrize("path", UNITS)
def test_the_command_of_a_unit_is_one_of_ours(path, monkeypatch):
    program, *arguments = shlex.split(unit(path)["Service"]["ExecStart"][0])
    assert program.startswith("/opt/fedseek/bin/")
    parse([Path(program).name, *arguments], monkeypatch)


@pytest.mark.parametrize("path", COMPOSES)
def test_the_commands_of_a_compose_file_are_ours(path, monkeypatch):
    for name, service in compose(path)["services"].items():
        program = "fedseek-server" if name == "coordinator" else "fedseek-site"
        parse([program, *service["command"]], monkeypatch)
        check = service.get("healthcheck", {}).get("test", [])
        if check:
            parse(check[1:], monkeypatch)


@pytest.mark.parametrize("path", DOCKERFILES)
def test_the_entry_points_and_commands_of_an_image_are_ours(path, monkeypatch):
    text = (ROOT / path).read_text("utf-8")
    (entry,) = re.findall(r'^ENTRYPOINT \["([\w-]+)"\]$', text, re.M)
    commands = re.findall(r"^CMD (\[.*\])$", text, re.M)
    assert commands
    for command in commands:
        parse([entry, *yaml.safe_load(command)], monkeypatch)


# Containers ----------------------------------------------------------------------------------------------------------


def compose(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def stages(path: str) -> dict[str, str]:
    """The text of each stage of a Dockerfile, by its name; that of the last is "" if it has none."""
    parts = re.split(r"^FROM (\S+)(?: AS (\S+))?$", (ROOT / path).read_text("utf-8"), flags=re.M)[1:]
    return {name or "": f"FROM {base}\n{text}" for base, name, text in zip(*[iter(parts)] * 3, strict=True)}


FINAL = [(DOCKERFILES[0], ""), (DOCKERFILES[1], "site"), (DOCKERFILES[1], "courier")]


@pytest.mark.parametrize(("path", "stage"), FINAL)
def test_an_image_runs_as_nobody_special_with_nothing_that_installs(path, stage):
    text = stages(path)[stage]
    users = re.findall(r"^USER (\S+)$", text, re.M)
    assert len(users) == 1
    assert re.fullmatch(r"1\d{4}:1\d{4}", users[0])  # a number: Kubernetes can see that it is not root
    assert "pip install" not in text
    builds = [part for name, part in stages(path).items() if name.endswith("build") or name == "source"]
    assert any("constraints.txt" in part for part in builds)
    assert all("pip uninstall --yes pip setuptools" in part for part in builds if "pip install" in part)


def test_the_images_of_coordinator_and_courier_hold_no_training_library():
    assert "'.[server]'" in stages(DOCKERFILES[0])["build"]
    assert "if u.find_spec(name)" in stages(DOCKERFILES[0])["build"]
    courier = stages(DOCKERFILES[1])["courier-build"]
    assert re.findall(r"pip install (\S+)", courier) == ["'.[courier]'"]


@pytest.mark.parametrize("path", DOCKERFILES)
def test_everything_an_image_copies_from_the_repository_is_there(path):
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / path).read_text("utf-8"), re.M)
    files = [file for copy in copies for file in copy.split()]
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("path", COMPOSES)
def test_a_container_writes_to_its_volumes_alone_and_can_gain_nothing(path):
    for name, service in compose(path)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert re.fullmatch(r"1\d{4}:1\d{4}", service["user"]), name
        assert all({"noexec", "nosuid", "nodev"} <= set(mount.split(":")[1].split(",")) for mount in service["tmpfs"])
        assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & set(service), name
        assert service["restart"] == "unless-stopped", name
        assert "environment" not in service, name  # no secret in it


def test_site_and_courier_share_the_run_folder_and_nothing_else():
    services = compose(COMPOSES[1])["services"]
    volumes = {
        name: {line.split(":")[0]: line.split(":")[1] for line in services[name]["volumes"]} for name in services
    }
    assert set(volumes["site"]) & set(volumes["courier"]) == {"run"}
    assert volumes["site"]["run"] == volumes["courier"]["run"] == "/var/lib/fedseek/site/run"
    assert services["site"]["network_mode"] == "none"
    assert services["site"]["user"] != services["courier"]["user"]
    assert services["site"]["group_add"] == [services["courier"]["user"].split(":")[1]]
    assert "ports" not in services["courier"]  # it only dials out
    assert "secrets" not in services["courier"]


def test_the_coordinator_opens_one_port():
    (service,) = compose(COMPOSES[0])["services"].values()
    (port,) = service["ports"]
    listen = load_settings(ROOT / "server/coordinator.example.toml", CoordinatorConfig).listen
    assert port.endswith(f":{listen.port}")
    assert f"EXPOSE {listen.port}\n" in (ROOT / DOCKERFILES[0]).read_text("utf-8")
    assert listen.host == "0.0.0.0"  # noqa: S104 -- in a container, and behind a firewall


@pytest.mark.parametrize("path", COMPOSES)
def test_the_accounts_of_a_compose_file_are_those_of_its_image(path):
    text = (ROOT / Path(path).with_name("Dockerfile")).read_text("utf-8")
    for service in compose(path)["services"].values():
        user, group = service["user"].split(":")
        assert re.search(rf"useradd --uid {user} --gid {group} ", text)


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("server/coordinator.example.toml", CoordinatorConfig),
        ("clients/bank.example.toml", SiteConfig),
        ("clients/hospital.example.toml", SiteConfig),
        ("clients/instruct.example.toml", SiteConfig),
        ("clients/policy.example.toml", Policy),
    ],
)
def test_an_example_is_read_by_the_program_it_is_for(path, model):
    assert load_settings(ROOT / path, model).version == 1


def test_the_examples_name_every_setting_there_is():
    coordinator = (ROOT / "server/coordinator.example.toml").read_text("utf-8")
    names = ("bank", "hospital", "instruct")
    sites = "".join((ROOT / f"clients/{name}.example.toml").read_text("utf-8") for name in names)
    for text, model in ((coordinator, CoordinatorConfig), (sites, SiteConfig)):
        for name, field in model.model_fields.items():
            inner = getattr(field.annotation, "model_fields", {})
            missing = [each for each in inner or (name,) if not re.search(rf"^(# )?{each} = ", text, re.M)]
            assert missing == [], name


def test_the_bank_has_its_courier_under_another_account():
    bank = load_settings(ROOT / "clients/bank.example.toml", SiteConfig)
    assert bank.courier.separate
    assert bank.sockets.courier_group == unit(COURIER)["Service"]["Group"][0]
