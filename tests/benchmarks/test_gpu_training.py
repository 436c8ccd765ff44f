import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_training

    return gpu_training


def test_a_tiny_model_goes_all_the_way_on_the_cpu(script, tmp_path, capsys):
    kept = tmp_path / "结果.json"
    options = ["--config", "tiny", "--sequence", "16", "--records", "3", "--steps", "1", "--device", "cpu"]
    assert script.main([*options, "--checkpointing", "--json", str(kept)]) == 0
    result = json.loads(kept.read_text("utf-8"))
    assert [way["way"] for way in result["ways"]] == ["plain LoRA", "DP-LoRA", "DP-LoRA, checkpointing"]
    assert all(way["tokens_per_s"] > 0 and way["peak_gb"] > 0 and way["mfu"] is None for way in result["ways"])
    assert 0 < result["lock_share"] < 1
    assert result["tokens_per_s_with_locks"] < max(way["tokens_per_s"] for way in result["ways"][1:])
    assert set(result["locks_s"]) >= {"encode", "tag", "mask", "encrypt", "add", "unmask", "decrypt", "apply", "whole"}
    assert all(seconds > 0 for seconds in result["locks_s"].values())
    shown = capsys.readouterr().out
    assert "| DP-LoRA + both locks, 100 steps a round |" in shown
    assert "## Qwen2 tiny on cpu" in shown


def test_the_flops_of_the_formula_are_those_that_are_done(script):
    """Torch counts each product of a real step; attention, which it counts whole, is small at this length."""
    model = script.build(script.CONFIGS["tiny"], torch.device("cpu"), 16)
    ids = torch.arange(1, 17)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, torch.ones_like(ids), torch.ones_like(ids) > 0).float().logsumexp(-1).sum().backward()
    assert script.flops_a_token(model, 16) * 16 == pytest.approx(counter.get_total_flops(), rel=0.15)


@pytest.mark.parametrize(("config", "billions", "adapter"), [("1.5b", 1.54, 18.5e6), ("7b", 7.62, 40.4e6)])
def test_the_configs_have_the_sizes_of_their_names(script, config, billions, adapter):
    with torch.device("meta"):
        model = script.AutoModelForCausalLM.from_config(script.Qwen2Config(**script.CONFIGS[config]))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    linears = [module for name, module in model.named_modules() if name.endswith(script.LINEARS)]
    assert sum(16 * (each.in_features + each.out_features) for each in linears) == pytest.approx(adapter, rel=0.01)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_that_of_the_data_sheet_or_not_said(script, name, tflops):
    assert script.peak_flops(name) == (None if tflops is None else tflops * 1e12)


def test_arguments_that_measure_nothing_are_refused(script):
    with pytest.raises(SystemExit):
        script.main(["--steps", "0"])
