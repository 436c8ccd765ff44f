"""Whole runs with each method on a language model: what is trained, and that PEFT loads what every site releases."""

import numpy as np
import pytest
import torch
from language_sites import language_changes, language_data
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedseek.lora.adapter_file import ADAPTER_FILES
from fedseek.lora.initial import first_values
from fedseek.lora.load import load_base

SITES = ("北岸银行", "harbour-bank", "仁济医院", "st-anna")
IDS = torch.tensor([[5, 17, 99, 200, 31], [7, 8, 44, 12, 13]])


def play(make_desk, folder, method):
    """Two rounds at four sites, to the release; returns the release folder of each."""
    changes = language_changes(folder, training={"rounds": 2, "learning_rate": 0.05})
    changes["lora"] |= {"method": method, "virtual_tokens": 3}
    changes["kinds"]["bank"]["generation"] = {"rows": 0}
    desk = make_desk(data={name: language_data(name) for name in SITES}, **changes)
    desk.play()
    return desk.plan, [desk.folder / name / "release" for name in SITES]


@pytest.mark.parametrize("method", ["alternating", "prefix", "prompt"])
def test_what_all_sites_release_moved_and_is_loaded_by_peft(make_desk, tiny_causal, method):
    plan, folders = play(make_desk, tiny_causal, method)
    for name in ADAPTER_FILES:
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    assert not list(folders[0].glob("head-*"))
    for name, value in load_file(folders[0] / "adapter_model.safetensors").items():
        named = name.replace("model.model.model.", "model.model.").replace(".weight", ".default.weight")
        if method != "alternating":
            named = "prompt_encoder.default.embedding.weight"
        first = first_values(value.shape, seed=plan.seed_for("lora"), name=named) * (".lora_B." not in name)
        assert 0.01 < np.abs(value - first).max() < 0.3, name
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_causal), str(folders[0])).eval()
    logits = loaded(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -5:]
    assert not torch.allclose(logits, load_base(tiny_causal, words=True)(input_ids=IDS).logits, atol=1e-2)
