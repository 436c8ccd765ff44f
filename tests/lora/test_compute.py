"""Where a model is held, and in what numbers: neither may change what a record's gradient is."""

import numpy as np
import pytest
import torch
from language_models import save_tiny_causal

from fedseek.batches import Batch, record_losses
from fedseek.dp.accounting import PrivacyParams
from fedseek.dp.private_step import private_step
from fedseek.errors import InvalidConfig, WrongModel
from fedseek.lora import compute
from fedseek.lora.compute import Compute, choose_device, choose_dtype, quantisation
from fedseek.lora.load import load_base
from fedseek.lora.model import LoraParams, build_model
from fedseek.lora.targets import targets_of

CPU = Compute(device="cpu", dtype="float32")
IDS = torch.tensor([[5, 17, 99, 200, 31, 9], [7, 8, 44, 12, 0, 0], [21, 22, 23, 0, 0, 0]])
MASK = (IDS != 0).long()
COUNTED = (MASK == 1) & (torch.arange(6) > 0)
BATCH = Batch(np.arange(3), IDS, MASK, torch.zeros(3, dtype=torch.long), None, COUNTED)


def build(folder, where, *, family="qwen2", method="both", num_labels=None):
    params = LoraParams(method, 2, 4.0, targets_of(family), None, 11, every_target=False)
    model = build_model(load_base(folder, words=True, compute=where), params, num_labels=num_labels, head_seed=5)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2, generator=generator)
    return model.train()


def gradients(model, batch):
    """Of each record, as a private step sees them, shape (records, values), float32."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    privacy = PrivacyParams(noise_multiplier=1.0, sampling_probability=0.5, delta=1e-5, l2_clip_norm=1.0)
    seen = []
    with private_step(model, torch.optim.SGD(trained, lr=1.0), privacy=privacy, expected_batch_size=1.0) as step:
        clip = step._optimizer.clip_and_accumulate
        step._optimizer.clip_and_accumulate = lambda: (seen.extend(p.grad_sample.clone() for p in trained), clip())
        step.accumulate(record_losses(step.model, batch), batch.record_indices)
    return torch.cat([each.flatten(1) for each in seen], 1)


def gradients_alone(model):
    """Of each record by itself, by autograd."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for record in range(len(IDS)):
        length = int(MASK[record].sum())
        cut = [tensor[record : record + 1, :length] for tensor in (IDS, MASK, COUNTED)]
        (loss,) = record_losses(model, Batch(np.array([0]), cut[0], cut[1], BATCH.labels[:1], None, cut[2]))
        rows.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, trained)]))
    return torch.stack(rows)


def difference(one, other):
    return float((one - other).norm() / other.norm())


# --- memory


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_gradient_checkpointing_changes_no_records_gradient(tmp_path, family):
    folder = save_tiny_causal(tmp_path / "m", family)
    plain = gradients(build(folder, CPU, family=family), BATCH)
    saving = build(folder, Compute("cpu", "float32", gradient_checkpointing=True), family=family)
    assert saving.causal.is_gradient_checkpointing
    assert difference(gradients(saving, BATCH), plain) < 1e-6


def test_checkpointing_is_of_the_kind_that_per_record_gradients_survive(tiny_causal):
    model = build(tiny_causal, Compute("cpu", "float32", gradient_checkpointing=True))
    used = [
        module._gradient_checkpointing_func
        for module in model.modules()
        if hasattr(module, "_gradient_checkpointing_func")
    ]
    assert used
    assert {each.keywords["use_reentrant"] for each in used} == {True}


def test_no_prefix_with_gradient_checkpointing(tiny_causal):
    with pytest.raises(WrongModel, match="no prefix with gradient checkpointing"):
        build(tiny_causal, Compute("cpu", gradient_checkpointing=True), method="prefix")


# --- numbers


@pytest.mark.parametrize("method", ["both", "prefix", "prompt"])
def test_the_adapter_and_the_head_are_float32_on_a_base_that_is_not(tiny_causal, method):
    model = build(tiny_causal, Compute("cpu", "bfloat16"), method=method, num_labels=3)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes[name] for name in model.trained} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in model.trained} == {torch.bfloat16}
    assert model(IDS, MASK).dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_on_a_bfloat16_base_gradients_are_exact_within_its_rounding(tmp_path, family):
    folder = save_tiny_causal(tmp_path / "m", family)
    half = build(folder, Compute("cpu", "bfloat16"), family=family)
    together = gradients(half, BATCH)
    assert together.dtype == torch.float32
    alone = gradients_alone(half)
    own = gradients_alone(build(folder, CPU, family=family))
    rounding = difference(alone, own)
    assert 1e-4 < rounding < 0.1  # it does compute in bfloat16
    assert difference(together, alone) < max(0.02, rounding)


def test_the_type_of_number_follows_the_device_unless_it_is_named():
    cuda, cpu, mps = (torch.device(name) for name in ("cuda", "cpu", "mps"))
    assert [choose_dtype(Compute(), device) for device in (cuda, cpu, mps)] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    assert choose_dtype(Compute(dtype="float32"), cuda) == torch.float32
    assert choose_dtype(Compute(dtype="bfloat16"), cpu) == torch.bfloat16


# --- devices


@pytest.fixture
def machine(monkeypatch):
    def make(*, cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return make


@pytest.mark.parametrize(
    ("there", "device"), [({"cuda": 2, "mps": True}, "cuda"), ({"mps": True}, "mps"), ({}, "cpu")], ids=str
)
def test_the_best_device_is_chosen(machine, there, device):
    machine(**there)
    assert choose_device("auto") == torch.device(device)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("asked", ["cuda", "cuda:1", "mps", "tpu", "", "cuda:2", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_and_told_what_is(machine, asked):
    machine(cuda=0)
    with pytest.raises(InvalidConfig, match="is not there") as caught:
        choose_device(asked)
    assert caught.value.hint == 'there is cpu; "auto" takes the best of them'


def test_a_numbered_device_is_one_of_those_there(machine):
    machine(cuda=2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InvalidConfig) as caught:
        choose_device("cuda:2")
    assert "there is cpu, cuda, cuda:0, cuda:1" in caught.value.hint


def test_the_base_is_on_its_device_before_anything_is_put_on_it(tiny_causal, monkeypatch):
    monkeypatch.setattr(compute, "devices_there", lambda: ["cpu", "meta"])
    base = load_base(tiny_causal, compute=Compute("meta"))
    assert {parameter.device.type for parameter in base.parameters()} == {"meta"}
    params = LoraParams("both", 2, 4.0, ("q_proj",), None, 11)
    model = build_model(base, params, num_labels=2, head_seed=0)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# --- quantised


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_wants_cuda(tiny_causal, bits):
    with pytest.raises(InvalidConfig, match=f"quantise '{bits}' on cpu, wanted a CUDA device"):
        load_base(tiny_causal, compute=Compute("cpu", quantise=bits))


def test_a_quantised_base_wants_bitsandbytes(monkeypatch):
    monkeypatch.setattr(compute.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidConfig, match="wants the package bitsandbytes") as caught:
        quantisation(Compute(quantise="4bit"), torch.device("cuda"))
    assert "pip install bitsandbytes" in caught.value.hint


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_the_configuration_of_a_quantised_base(monkeypatch, bits):
    monkeypatch.setattr(compute.importlib.util, "find_spec", lambda name: object())
    config = quantisation(Compute(quantise=bits), torch.device("cuda"))
    assert (config.load_in_8bit, config.load_in_4bit) == (bits == "8bit", bits == "4bit")
    if bits == "4bit":
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert quantisation(Compute(), torch.device("cpu")) is None
