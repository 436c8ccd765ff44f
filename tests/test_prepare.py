import numpy as np
import pytest
import torch

from fedseek.encode import flatten
from fedseek.lora.load import empty_base, load_base
from fedseek.lora.model import adapter_tensors, head_tensors
from fedseek.prepare import HELD_BACK_METRICS, prepare_layouts, prepare_model, prepare_settings


@pytest.fixture
def prepare(tiny_model):
    """The plan's model for a kind, on a base of its own."""
    return lambda plan, kind: prepare_model(plan, kind, load_base(tiny_model))


def test_two_kinds_share_lora_a_and_have_heads_of_their_own(prepare, tiny_plan):
    plan = tiny_plan()
    bank, hospital = prepare(plan, "bank"), prepare(plan, "hospital")
    frozen = [(n, p) for n, p in bank.named_parameters() if "lora_A" in n]
    others = dict(hospital.named_parameters())
    assert len(frozen) == 4
    assert all(torch.equal(value, others[name]) for name, value in frozen)
    assert (bank.head.out_features, hospital.head.out_features) == (2, 3)
    assert not torch.equal(bank.head.weight, hospital.head.weight[:2])


def test_the_plans_name_and_seed_decide_the_first_values(prepare, tiny_plan):
    def frozen(plan):
        return [p.detach().numpy().tobytes() for n, p in prepare(plan, "bank").named_parameters() if "lora_A" in n]

    assert frozen(tiny_plan()) == frozen(tiny_plan(training={"rounds": 3}))
    assert frozen(tiny_plan()) != frozen(tiny_plan(seed=1))
    assert frozen(tiny_plan()) != frozen(tiny_plan(name="other"))


def test_the_model_is_built_as_the_plan_says(prepare, tiny_plan):
    lora = {"method": "both", "rank": 3, "alpha": 6.0, "target_modules": ["key"], "layers": [0]}
    model = prepare(tiny_plan(lora=lora), "bank")
    shapes = {name.split("layer.")[1]: value.shape for name, value in adapter_tensors(model).items()}
    assert shapes == {
        "0.attention.self.key.lora_A.default.weight": (3, 16),
        "0.attention.self.key.lora_B.default.weight": (16, 3),
    }
    assert dict(model.named_modules())["encoder.base_model.model.encoder.layer.0.attention.self.key"].scaling == {
        "default": 2.0
    }


def test_the_layouts_hold_exactly_what_is_trained(prepare, tiny_plan):
    model = prepare(tiny_plan(), "bank")
    layouts = prepare_layouts("bank", model)
    assert list(layouts) == ["global", "kind/bank"] == list(tiny_plan().scopes("bank"))
    assert all(layout.scope == scope for scope, layout in layouts.items())
    assert layouts["global"].metrics == ()
    assert layouts["kind/bank"].metrics == HELD_BACK_METRICS
    tensors = {"global": adapter_tensors(model), "kind/bank": head_tensors(model)}
    for scope, layout in layouts.items():
        assert layout.num_values == sum(value.size for value in tensors[scope].values())
        assert flatten(tensors[scope], layout).dtype == np.float32
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(layout.num_values for layout in layouts.values()) == trained


def test_layouts_need_no_weights(prepare, tiny_plan, tiny_model):
    empty = prepare_model(tiny_plan(), "hospital", empty_base(tiny_model))
    assert prepare_layouts("hospital", empty) == prepare_layouts("hospital", prepare(tiny_plan(), "hospital"))


def test_metrics_are_named_so_that_the_guard_lets_them_leave():
    assert all(name.startswith("held_back_") for name in HELD_BACK_METRICS)


def test_settings_are_the_plans(tiny_plan):
    training = {
        "rounds": 3,
        "steps_per_round": 7,
        "sampling_probability": 0.3,
        "learning_rate": 0.02,
        "head_learning_rate": 0.04,
        "physical_batch_size": 5,
    }
    settings = prepare_settings(tiny_plan(training=training))
    assert (settings.num_steps, settings.sampling_probability, settings.physical_batch_size) == (7, 0.3, 5)
    assert (settings.learning_rate, settings.head_learning_rate) == (0.02, 0.04)
    assert (settings.optimiser, settings.weight_decay) == ("adam", 0.0)
