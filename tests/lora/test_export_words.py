"""A released adapter of a plan that writes words: PEFT loads it on the causal model, and computes the same."""

import numpy as np
import pytest
import torch
from language_models import save_tiny_causal
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedseek.errors import Malformed
from fedseek.lora.adapter_file import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterForm,
    adapter_config,
    largest_value,
    read_adapter,
    trained_tensors,
)
from fedseek.lora.digest import tensors_digest
from fedseek.lora.export import adapter_weights, head_files
from fedseek.lora.load import load_base
from fedseek.lora.model import LoraParams, adapter_tensors, build_model, load_tensors
from fedseek.lora.targets import targets_of

SEED, TOKENS = 11, 3
IDS = torch.tensor([[5, 17, 99, 200, 31], [7, 8, 44, 12, 13]])


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "deepseek_v3"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_tiny_causal(tmp_path_factory.mktemp("m") / family, family)


def trained_model(folder, family, method, *, words=True, **changes):
    params = LoraParams(
        method, 2, 4.0, targets_of(family), None, SEED, virtual_tokens=TOKENS, every_target=False, **changes
    )
    model = build_model(load_base(folder, words=words), params, num_labels=None if words else 2, head_seed=5)
    generator = np.random.default_rng(3)
    tensors = {n: v + generator.normal(0, 0.2, v.shape).astype(np.float32) for n, v in adapter_tensors(model).items()}
    load_tensors(model, tensors)
    return model.eval()


def write_release(folder, model, family, method, **changes):
    form = AdapterForm(method, 2, 4.0, False, targets_of(family), None, TOKENS, words=True, base_name="hub:a/b")
    for name, value in changes.items():
        object.__setattr__(form, name, value)
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes(adapter_config(form))
    (folder / WEIGHTS_FILE).write_bytes(adapter_weights(model, words=True))


@pytest.mark.parametrize("method", ["ffa", "both", "alternating", "prompt", "prefix"])
def test_peft_loads_it_on_the_causal_model_and_gives_the_same_logits(folder, family, method, tmp_path):
    if (family, method) == ("deepseek_v3", "prefix"):
        pytest.skip("refused")
    model = trained_model(folder, family, method)
    write_release(tmp_path / "out", model, family, method)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "out")).eval()
    counted = torch.ones_like(IDS, dtype=torch.bool)
    counted[:, 0] = False
    own = model(IDS, torch.ones_like(IDS), counted).reshape(2, 4, -1)
    logits = loaded(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -5:-1]
    assert torch.allclose(logits, own, atol=2e-5)
    base = load_base(folder, words=True)(input_ids=IDS).logits[:, :-1]
    assert not torch.allclose(own, base, atol=1e-2)


def test_a_rank_stabilised_adapter_is_scaled_alike_when_it_is_loaded(tmp_path):
    folder = save_tiny_causal(tmp_path / "m", "qwen2")
    model = trained_model(folder, "qwen2", "both", rank_stabilised=True)
    write_release(tmp_path / "out", model, "qwen2", "both", rank_stabilised=True)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "out")).eval()
    own = model.causal(input_ids=IDS).logits
    assert torch.allclose(loaded(input_ids=IDS).logits, own, atol=2e-5)


@pytest.mark.parametrize("method", ["ffa", "both", "prompt"])
def test_a_site_that_learns_labels_writes_the_same_bytes_as_one_that_learns_words(folder, family, method):
    one, other = (trained_model(folder, family, method, words=words) for words in (True, False))
    assert adapter_weights(one, words=True) == adapter_weights(other, words=True)


@pytest.mark.parametrize("method", ["ffa", "both", "prompt"])
def test_the_digest_of_the_file_is_that_of_what_the_sites_trained(folder, family, method):
    model = trained_model(folder, family, method)
    read = read_adapter(adapter_weights(model, words=True))
    assert tensors_digest(trained_tensors(read, method=method, words=True)) == tensors_digest(adapter_tensors(model))


def test_names_of_no_causal_model_are_refused_where_words_are_written(folder, family):
    read = read_adapter(adapter_weights(trained_model(folder, family, "ffa"), words=False))
    with pytest.raises(Malformed, match=r"wanted names that begin with base_model\.model\.model\."):
        trained_tensors(read, method="ffa", words=True)


@pytest.mark.parametrize("method", ["ffa", "prompt"])
def test_an_adapter_that_did_not_move_has_no_largest_value(tmp_path, method):
    folder = save_tiny_causal(tmp_path / "m", "qwen2")
    params = LoraParams(method, 2, 4.0, targets_of("qwen2"), None, SEED, virtual_tokens=TOKENS)
    still = build_model(load_base(folder, words=True), params, num_labels=None, head_seed=5)
    assert largest_value(read_adapter(adapter_weights(still, words=True)), seed=SEED) == 0.0
    moved = trained_model(folder, "qwen2", method)
    assert 0.2 < largest_value(read_adapter(adapter_weights(moved, words=True)), seed=SEED) < 2


def test_a_kind_without_labels_has_no_head_to_write(tmp_path):
    folder = save_tiny_causal(tmp_path / "m", "llama")
    assert head_files(trained_model(folder, "llama", "ffa"), kind="hospital", labels=()) == {}
