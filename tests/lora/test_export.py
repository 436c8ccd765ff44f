import json

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.numpy import load_file

from fedseek.lora.adapter_file import ADAPTER_FILES, AdapterForm, adapter_config
from fedseek.lora.export import adapter_weights, head_files
from fedseek.lora.load import load_base
from fedseek.lora.model import LoraParams, adapter_tensors, build_model, head_tensors, load_tensors

IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
MASK = (IDS != 0).long()


def trained_model(tiny_model, method="ffa"):
    """A model whose adapter and head are no longer what they were."""
    params = LoraParams(method, rank=2, alpha=4.0, target_modules=("query", "value"), layers=(1,), seed=11)
    model = build_model(load_base(tiny_model), params, num_labels=3, head_seed=5)
    generator = np.random.default_rng(3)
    tensors = {**adapter_tensors(model), **head_tensors(model)}
    load_tensors(model, {n: generator.normal(0, 0.3, v.shape).astype(np.float32) for n, v in tensors.items()})
    return model


def save_adapter(model, folder, *, base_name):
    form = AdapterForm("ffa", 2, 4.0, False, ("value", "query"), (1,), 20, words=False, base_name=base_name)
    write(folder, dict(zip(ADAPTER_FILES, (adapter_config(form), adapter_weights(model, words=False)), strict=True)))


def save_head(model, folder, *, kind, labels):
    write(folder, head_files(model, kind=kind, labels=labels))


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("method", ["ffa", "both"])
def test_peft_loads_the_saved_adapter_and_computes_the_same(tiny_model, tmp_path, method):
    model = trained_model(tiny_model, method)
    save_adapter(model, tmp_path, base_name="package:some-model")
    save_head(model, tmp_path, kind="bank", labels=["a", "b", "c"])
    loaded = PeftModel.from_pretrained(load_base(tiny_model), str(tmp_path))
    hidden = loaded(input_ids=IDS, attention_mask=MASK).last_hidden_state
    mean = (hidden * MASK.unsqueeze(-1)).sum(1) / MASK.sum(1, keepdim=True)
    head = load_file(tmp_path / "head-bank.safetensors")
    logits = mean @ torch.from_numpy(head["weight"]).T + torch.from_numpy(head["bias"])
    assert torch.allclose(logits, model(IDS, MASK), atol=1e-6)
    untouched = load_base(tiny_model)(input_ids=IDS, attention_mask=MASK).last_hidden_state
    assert not torch.allclose(hidden, untouched, atol=1e-3)


def test_the_saved_files_are_the_adapters_and_name_no_local_path(tiny_model, tmp_path):
    save_adapter(trained_model(tiny_model), tmp_path / "out", base_name="package:some-model")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(ADAPTER_FILES)
    for file in (tmp_path / "out").iterdir():
        for path in (str(tiny_model), str(tmp_path), str(tiny_model.parent)):
            assert path.encode() not in file.read_bytes(), file.name
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "package:some-model"
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (2, 4.0, ["query", "value"])
    assert (config["layers_to_transform"], config["inference_mode"]) == ([1], True)


def test_the_adapter_holds_a_and_b_and_nothing_of_the_base_or_head(tiny_model, tmp_path):
    model = trained_model(tiny_model)
    save_adapter(model, tmp_path, base_name="b")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 4
    assert all("lora_A" in name or "lora_B" in name for name in saved)
    for name, value in adapter_tensors(model).items():
        assert np.array_equal(saved[name.removeprefix("encoder.").replace(".default", "")], value)


def test_the_config_says_all_that_pefts_own_says_but_its_version(tiny_model, tmp_path):
    """What it leaves out has the default, so PEFT reads both alike."""
    model = trained_model(tiny_model)
    model.encoder.save_pretrained(str(tmp_path / "own"))
    save_adapter(model, tmp_path / "ours", base_name="b")
    own, ours = (PeftConfig.from_pretrained(str(tmp_path / name)).to_dict() for name in ("own", "ours"))
    differ = {name for name in own if own[name] != ours[name]}
    assert differ <= {"base_model_name_or_path", "peft_version", "inference_mode", "auto_mapping"}


def test_the_same_values_give_the_same_bytes(tiny_model):
    one, two = trained_model(tiny_model), trained_model(tiny_model)
    assert adapter_weights(one, words=False) == adapter_weights(two, words=False)


def test_saving_leaves_the_model_as_it_was(tiny_model, tmp_path):
    model = trained_model(tiny_model)
    before = model(IDS, MASK)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    save_adapter(model, tmp_path, base_name="b")
    assert torch.equal(model(IDS, MASK), before)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable


def test_a_head_comes_with_the_labels_its_rows_stand_for(tiny_model, tmp_path):
    model = trained_model(tiny_model)
    save_head(model, tmp_path, kind="hospital", labels=("急诊", "普通", "自理"))
    saved = load_file(tmp_path / "head-hospital.safetensors")
    assert saved.keys() == {"weight", "bias"}
    assert np.array_equal(saved["weight"], model.head.weight.detach().numpy())
    assert np.array_equal(saved["bias"], model.head.bias.detach().numpy())
    text = (tmp_path / "head-hospital.json").read_text("utf-8")
    assert "急诊" in text
    document = json.loads(text)
    assert (document["kind"], document["labels"]) == ("hospital", ["急诊", "普通", "自理"])
    assert len(document["labels"]) == len(saved["weight"])
