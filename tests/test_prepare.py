import numpy as np
import pytest
import torch

from fedseek.encode import flatten
from fedseek.lora.load import empty_base, load_base
from fedseek.lora.model import adapter_tensors, head_tensors, set_trainable
from fedseek.lora.source import model_digest
from fedseek.prepare import (
    ANSWER_METRICS,
    HELD_BACK_METRICS,
    STOP_METRICS,
    prepare_layouts,
    prepare_model,
    prepare_settings,
)


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
    layouts = prepare_layouts(tiny_plan(), "bank", model)
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
    plan = tiny_plan()
    empty = prepare_model(plan, "hospital", empty_base(tiny_model))
    assert prepare_layouts(plan, "hospital", empty) == prepare_layouts(plan, "hospital", prepare(plan, "hospital"))


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
    settings = prepare_settings(tiny_plan(training=training), 1)
    assert (settings.num_steps, settings.sampling_probability, settings.physical_batch_size) == (7, 0.3, 5)
    assert (settings.learning_rate, settings.head_learning_rate) == (0.02, 0.04)
    assert (settings.optimiser, settings.weight_decay) == ("adam", 0.0)


# --- language tasks


def language_plan(tiny_plan, folder, *, kinds, **changes):
    model = {"source": f"path:{folder}", "sha256": model_digest(folder), "family": "qwen2"}
    lora = {"target_modules": "auto", **changes.pop("lora", {})}
    return tiny_plan(kinds=kinds, model=model, lora=lora, **changes)


@pytest.fixture
def instruct_plan(tiny_plan, tiny_causal):
    """Banks learn labels, hospitals answer instructions; keyword arguments as for ``tiny_plan``."""
    kinds = {"hospital": {"task": "instruct", "labels": [], "unit": "patient"}}
    return lambda **changes: language_plan(tiny_plan, tiny_causal, kinds=kinds, **changes)


@pytest.fixture
def prepare_causal(tiny_causal):
    return lambda plan, kind: prepare_model(plan, kind, load_base(tiny_causal, words=plan.writes(kind)))


def test_a_kind_without_labels_sends_metrics_and_no_head(instruct_plan, prepare_causal):
    plan = instruct_plan()
    bank, hospital = (prepare_layouts(plan, kind, prepare_causal(plan, kind)) for kind in ("bank", "hospital"))
    assert bank["global"] == hospital["global"]
    assert hospital["kind/hospital"].tensors == ()
    assert hospital["kind/hospital"].metrics == HELD_BACK_METRICS + ANSWER_METRICS
    assert [name for name, _ in bank["kind/bank"].tensors] == ["head.bias", "head.weight"]
    assert bank["kind/bank"].metrics == HELD_BACK_METRICS


def test_votes_ride_beside_the_adapter_where_training_may_end_early(instruct_plan, prepare_causal):
    plan = instruct_plan(training={"early_stopping": {"patience": 2}})
    assert prepare_layouts(plan, "bank", prepare_causal(plan, "bank"))["global"].metrics == STOP_METRICS
    without = instruct_plan()
    assert prepare_layouts(without, "bank", prepare_causal(without, "bank"))["global"].metrics == ()


def test_the_layouts_are_those_of_all_rounds(instruct_plan, prepare_causal):
    plan = instruct_plan(lora={"method": "alternating"})
    model = prepare_causal(plan, "bank")
    layouts = prepare_layouts(plan, "bank", model)
    for number, task in ((1, "continue"), (2, "continue"), (3, "classify"), (4, "classify")):
        set_trainable(model, method="alternating", task=task, number=number)
        assert prepare_layouts(plan, "bank", model) == layouts


@pytest.mark.parametrize("method", ["ffa", "prefix", "prompt"])
def test_a_site_of_labels_and_one_of_words_share_the_adapters_first_values(instruct_plan, prepare_causal, method):
    plan = instruct_plan(lora={"method": method, "virtual_tokens": 5})
    one, other = (adapter_tensors(prepare_causal(plan, kind)) for kind in ("bank", "hospital"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    if method != "ffa":
        assert {value.shape[0] for value in one.values()} == {5}


def test_only_kinds_that_write_words_get_the_head_of_words(instruct_plan, prepare_causal):
    plan = instruct_plan()
    assert prepare_causal(plan, "bank").lm_head is None
    assert prepare_causal(plan, "hospital").lm_head is not None
    assert prepare_causal(plan, "hospital").head is None


def test_a_rank_stabilised_plan_builds_such_an_adapter(instruct_plan, prepare_causal):
    model = prepare_causal(instruct_plan(lora={"rank": 4, "alpha": 4.0, "rank_stabilised": True}), "bank")
    scalings = {str(module.scaling) for module in model.modules() if hasattr(module, "lora_A")}
    assert scalings == {"{'default': 2.0}"}
