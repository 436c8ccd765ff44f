"""A quantised base on a GPU: each record's gradient is still its own. Wants CUDA and bitsandbytes."""

import pytest
import torch
from language_models import save_tiny_causal

from fedseek.lora.compute import Compute
from fedseek.lora.load import load_base
from fedseek.lora.model import LoraParams, build_model

pytest.importorskip("bitsandbytes")
if not torch.cuda.is_available():
    pytest.skip("bitsandbytes wants CUDA", allow_module_level=True)

IDS = torch.arange(3, 51).reshape(4, 12)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_records_numbers_do_not_depend_on_the_records_beside_it(tmp_path, bits):
    """As they would with the outlier columns of LLM.int8(), which are those of the whole batch."""
    folder = save_tiny_causal(tmp_path / "m", "llama", hidden_size=64, intermediate_size=128)
    base = load_base(folder, words=True, compute=Compute("cuda", quantise=bits)).eval()
    with torch.no_grad():
        together, alone = base(input_ids=IDS.cuda()).logits[:1], base(input_ids=IDS[:1].cuda()).logits
    assert (together - alone).norm() < 1e-2 * alone.norm()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_the_adapter_on_it_is_float32_and_learns(tmp_path, bits):
    folder = save_tiny_causal(tmp_path / "m", "qwen2", hidden_size=64, intermediate_size=128)
    base = load_base(folder, words=True, compute=Compute("cuda", quantise=bits, gradient_checkpointing=True))
    params = LoraParams("both", 2, 4.0, ("q_proj", "up_proj"), None, 11)
    model = build_model(base, params, num_labels=2, head_seed=0).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {(parameter.dtype, parameter.device.type) for parameter in trained} == {(torch.float32, "cuda")}
    model(IDS.cuda(), torch.ones_like(IDS).cuda()).sum().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in trained)
