"""``[compute]`` of site.toml against machines that are made up, and a site of two processes on the CPU."""

import multiprocessing

import pytest
import torch

from fedseek.errors import InvalidConfig
from fedseek.lora.compute import Compute
from fedseek_site.computing import computes_of, describe, site_model
from fedseek_site.config import ComputeSettings, load_config

SMALLEST = 'version = 1\n[data]\nname = "账户"\ntrain = "训练.jsonl"\nheld_back = "保留.csv"\n'


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, of one name."""

    def have(gpus: int, *, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return have


def settings(tmp_path, text=""):
    (tmp_path / "site.toml").write_text(SMALLEST + text, "utf-8")
    return load_config(tmp_path).compute


def test_left_out_the_best_device_is_taken_by_one_process(tmp_path, machine):
    machine(0)
    assert [c.device for c in computes_of(settings(tmp_path))] == ["cpu"]
    machine(0, mps=True)
    assert [c.device for c in computes_of(settings(tmp_path))] == ["mps"]
    machine(4)
    assert [c.device for c in computes_of(settings(tmp_path))] == ["cuda"]


def test_all_that_can_be_said_arrives_at_the_model(tmp_path, machine, monkeypatch):
    monkeypatch.setattr("fedseek.lora.compute.importlib.util.find_spec", lambda name: object())
    machine(2)
    text = '[compute]\ndevice = "cuda:1"\ndtype = "bfloat16"\nquantise = "4bit"\ngradient_checkpointing = true\n'
    asked = Compute("cuda:1", "bfloat16", "4bit", gradient_checkpointing=True)
    monkeypatch.setattr("fedseek_site.computing.quantisation", lambda compute, device: None)
    assert computes_of(settings(tmp_path, text)) == (asked,)


@pytest.mark.parametrize(("asked", "devices"), [('"all"', 4), ("3", 3), ("1", 1)])
def test_each_process_has_a_gpu_of_its_own(tmp_path, machine, asked, devices):
    machine(4)
    computes = computes_of(settings(tmp_path, f"[compute]\ngpus = {asked}\n"))
    assert len(computes) == devices
    assert len({compute.device for compute in computes}) == devices
    assert computes[0].device in ("cuda", "cuda:0")


@pytest.mark.parametrize(
    ("gpus", "text", "said"),
    [
        (0, 'device = "cuda"', "there is cpu"),
        (2, 'device = "cuda:2"', "there is cpu, cuda, cuda:0, cuda:1"),
        (0, 'device = "mps"', "there is cpu"),
        (0, "gpus = 2", "'auto' is 1"),
        (2, "gpus = 3", "gpus = 3, and device 'auto' is 2"),
        (2, 'gpus = 2\ndevice = "cuda:0"', "several GPUs want device"),
        (2, 'gpus = 2\ndevice = "cpu"', "several GPUs want device"),
        (0, 'quantise = "4bit"', "wanted a CUDA device"),
    ],
)
def test_what_the_machine_has_not_is_refused_with_what_it_has(tmp_path, machine, gpus, text, said):
    machine(gpus)
    with pytest.raises(InvalidConfig) as refused:
        computes_of(settings(tmp_path, f"[compute]\n{text}\n"))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        'device = "tpu"',
        'device = "cuda:x"',
        'dtype = "float16"',
        'quantise = "2bit"',
        "gpus = 0",
        'gpus = "some"',
        "speed = 2",
    ],
)
def test_what_there_is_no_way_to_do_is_refused_when_the_file_is_read(tmp_path, text):
    with pytest.raises(InvalidConfig, match=r"compute"):
        settings(tmp_path, f"[compute]\n{text}\n")


def test_people_are_told_what_is_trained_on(machine):
    assert describe((Compute(device="cpu"),)) == {
        "event": "compute",
        "device": "cpu",
        "dtype": "float32",
        "quantise": "none",
        "gradient_checkpointing": False,
        "processes": 1,
        "threads": torch.get_num_threads(),
    }
    machine(2)
    told = describe(computes_of(ComputeSettings(gpus="all")))
    assert (told["device"], told["dtype"], told["processes"]) == ("NVIDIA H100 80GB HBM3", "bfloat16", 2)


def test_every_process_makes_the_same_model(tiny_plan):
    plan = tiny_plan().canonical()
    first, second = (site_model(plan, "bank", (Compute("cpu"), Compute("cpu")), rank) for rank in (0, 1))
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
def test_sites_that_compute_in_ways_of_their_own_play_a_private_run_together(make_cohort):
    cohort = make_cohort(private=True)
    cohort.site("仁济医院")._computes = (Compute("cpu"), Compute("cpu"))
    cohort.site("st-anna")._computes = (Compute("cpu", "bfloat16"),)
    cohort.site("harbour-bank")._computes = (Compute("cpu", gradient_checkpointing=True),)
    assert cohort.play() is None
    for service in cohort.services.values():  # which takes that all hold the same adapter
        assert "released" in {event["event"] for event in cohort.events[service.identity.name]}
    trained = [event for event in cohort.events["仁济医院"] if event["event"] == "step"]
    assert len(trained) == 4
    assert not [child for child in multiprocessing.active_children() if "fedseek" in child.name], "the run is over"
