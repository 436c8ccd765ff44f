"""Causal language models of each family: what is adapted, what is computed, and that each record's gradient is its own."""

import json

import numpy as np
import pytest
import torch
from language_models import FAMILIES, save_tiny_causal
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaModel

from fedseek.batches import Batch, record_losses
from fedseek.dp.accounting import PrivacyParams
from fedseek.dp.private_step import private_step
from fedseek.errors import GuardTripped, WrongModel
from fedseek.lora.load import empty_base, load_base
from fedseek.lora.model import (
    LoraParams,
    adapted_layers,
    adapter_shapes,
    adapter_tensors,
    build_model,
    head_shapes,
    set_trainable,
)
from fedseek.lora.targets import targets_of

LENGTHS = (9, 5, 7, 3)
ATTENTION = {
    "deepseek_v2": ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_proj"),
    "deepseek_v3": ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"),
}
PREFIXED = [family for family in FAMILIES if family not in ATTENTION]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a model of each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_causal(root / family, family) for family in FAMILIES}


def build(folder, family, *, method="both", num_labels=None, empty=False, **changes):
    """A model whose adapter does something."""
    fields = {"method": method, "rank": 2, "alpha": 4.0, "target_modules": targets_of(family), "layers": None}
    params = LoraParams(**{**fields, "seed": 11, "every_target": False, "virtual_tokens": 3, **changes})
    base = (empty_base if empty else load_base)(folder, words=True)
    model = build_model(base, params, num_labels=num_labels, head_seed=5)
    generator = torch.Generator().manual_seed(7)
    if not empty:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.2, generator=generator)
    return model.train()


def make_batch() -> Batch:
    """Four records of different lengths; of each about two in three tokens count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    counted = mask & (torch.rand(ids.shape, generator=generator) < 0.7)
    counted[:, 0], counted[:, 1] = False, True
    labels = torch.tensor([0, 2, 1, 0])
    return Batch(np.arange(len(LENGTHS)), ids * mask, mask.long(), labels, None, counted)


def only(batch: Batch, record: int, *, counted: bool = True) -> Batch:
    """One record by itself, without padding."""
    length = LENGTHS[record]
    rows = [tensor[record : record + 1, :length] for tensor in (batch.input_ids, batch.attention_mask)]
    marks = batch.counted[record : record + 1, :length] if counted else None
    return Batch(np.array([record]), *rows, batch.labels[record : record + 1], None, marks)


def gradients_by_record(model, batch, *, counted=True):
    """What autograd says of each record alone, shape (records, values)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for record in range(len(LENGTHS)):
        (loss,) = record_losses(model, only(batch, record, counted=counted))
        rows.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)]))
    return torch.stack(rows)


def private_update(model, batch, *, clip):
    """The clipped sum of a private step without noise, as the update that stochastic gradient descent makes of it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    privacy = PrivacyParams(noise_multiplier=1e-9, sampling_probability=0.5, delta=1e-5, l2_clip_norm=clip)
    with private_step(model, torch.optim.SGD(trained, lr=1.0), privacy=privacy, expected_batch_size=1.0) as step:
        step.accumulate(record_losses(step.model, batch), batch.record_indices)
        return torch.cat([parameter.summed_grad.flatten().clone() for parameter in trained])


def clipped_sum(gradients, clip):
    return (gradients * (clip / gradients.norm(dim=1, keepdim=True)).clamp(max=1.0)).sum(0)


def assert_exact(model, batch, *, counted=True):
    wanted = gradients_by_record(model, batch, counted=counted)
    clip = float(wanted.norm(dim=1).median())  # some records are clipped, others are not
    given = batch if counted else Batch(*(getattr(batch, name) for name in list(Batch.__slots__)[:-1]))
    got, expected = private_update(model, given, clip=clip), clipped_sum(wanted, clip)
    assert (got - expected).norm() < 1e-5 * expected.norm()


# --- gradients


@pytest.mark.parametrize("method", ["ffa", "both", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_private_step_clips_the_gradient_of_each_record_alone(folders, family, method):
    assert_exact(build(folders[family], family, method=method), make_batch())


@pytest.mark.parametrize("family", PREFIXED)
def test_a_prefix_has_exact_gradients_where_it_can_be_put(folders, family):
    assert_exact(build(folders[family], family, method="prefix"), make_batch())


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_halves_of_alternating_rounds_have_exact_gradients(folders, family, number):
    model = build(folders[family], family, method="alternating")
    set_trainable(model, method="alternating", task="instruct", number=number)
    assert_exact(model, make_batch())


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_labels_are_learned_on_a_causal_model_with_exact_gradients(folders, family):
    assert_exact(build(folders[family], family, num_labels=3), make_batch(), counted=False)


def test_full_fine_tuning_never_trains_in_private(folders):
    """Its head of words sees the counted tokens of all records in one row each: the guard stops it."""
    model = build(folders["llama"], "llama", method="full")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(GuardTripped, match="no gradient for each of the 4 records"):
        private_update(model, make_batch(), clip=1.0)


# --- the forward pass


@pytest.mark.parametrize("method", ["both", "prompt", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_causal_model_where_tokens_count(folders, family, method):
    if method == "prefix" and family not in PREFIXED:
        pytest.skip("refused, see below")
    model, batch = build(folders[family], family, method=method).eval(), make_batch()
    logits = model(batch.input_ids, batch.attention_mask, batch.counted)
    assert logits.shape == (int(batch.counted.sum()), 304)
    shift = 3 if method == "prompt" else 0
    rows = []
    for record, length in enumerate(LENGTHS):
        alone = only(batch, record)
        whole = model.causal(input_ids=alone.input_ids, attention_mask=alone.attention_mask).logits[0, shift:]
        rows += [whole[place - 1] for place in range(1, length) if alone.counted[0, place]]
    assert torch.allclose(logits, torch.stack(rows), atol=2e-5)


@pytest.mark.parametrize("method", ["both", "prompt", "prefix"])
def test_what_is_generated_shows_the_adapter(folders, method):
    model = build(folders["qwen2"], "qwen2", method=method).eval()
    prompt = make_batch().input_ids[:1, :5]
    tokens = prompt
    for _ in range(6):
        counted = torch.zeros(1, tokens.shape[1] + 1, dtype=torch.bool)
        counted[0, -1] = True
        padded = torch.cat([tokens, torch.zeros(1, 1, dtype=torch.long)], 1)
        logits = model(padded, torch.ones_like(padded), counted)
        tokens = torch.cat([tokens, logits.argmax(1, keepdim=True)], 1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.causal.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    assert written.tolist() == tokens.tolist()
    plain = load_base(folders["qwen2"], words=True).generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), **options
    )
    assert plain.tolist() != tokens.tolist()


def test_without_a_head_of_the_kind_asked_for_nothing_is_computed(folders, tiny_model):
    batch = make_batch()
    with pytest.raises(ValueError, match="no head of labels"):
        build(folders["qwen2"], "qwen2")(batch.input_ids, batch.attention_mask)
    params = LoraParams("ffa", 2, 4.0, ("query",), None, 1)
    bert = build_model(load_base(tiny_model), params, num_labels=2, head_seed=0)
    with pytest.raises(ValueError, match="no head of words"):
        bert(batch.input_ids % 20, batch.attention_mask, batch.counted)


# --- what is adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_adapts_what_the_family_has_and_never_an_expert(folders, family):
    model = build(folders[family], family)
    assert adapted_layers(model) == ATTENTION.get(family, tuple(sorted(targets_of(family))))
    assert not any("expert" in name for name, _ in adapter_shapes(model))
    layers = {name.split(".layers.")[1][0] for name, _ in adapter_shapes(model)}
    assert layers == {"0", "1"}


@pytest.mark.parametrize("target", ["gate_proj", "down_proj", "gate_up_proj", "gate", "shared_experts.gate_proj"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_plan_that_names_what_is_an_expert_is_refused(folders, family, target):
    with pytest.raises(WrongModel, match=f"{target.rpartition('.')[2]} are names of its experts") as caught:
        build(folders[family], family, target_modules=("o_proj", target), every_target=True)
    assert "no per-record gradient" in caught.value.message
    assert "auto" in caught.value.hint


def test_of_a_family_at_least_one_layer_is_there_and_of_a_plan_all(folders):
    with pytest.raises(WrongModel, match=r"Target modules|no linear"):
        build(folders["llama"], "bert")
    with pytest.raises(WrongModel, match="no linear q_a_proj, q_b_proj"):
        build(
            folders["deepseek_v2"], "deepseek_v2", target_modules=("o_proj", "q_a_proj", "q_b_proj"), every_target=True
        )


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_prefix_is_refused_where_keys_and_values_differ(folders, family):
    with pytest.raises(WrongModel, match="no prefix for a model of family"):
        build(folders[family], family, method="prefix")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_vectors_are_in_front_of_all_layers_or_none(folders, method):
    with pytest.raises(WrongModel, match="in front of all layers, but layers were named"):
        build(folders["llama"], "llama", method=method, layers=(1,))


def test_a_prefix_is_refused_where_the_heads_have_a_size_of_their_own(tmp_path):
    folder = save_tiny_causal(tmp_path / "m", "qwen3", head_dim=16)
    with pytest.raises(WrongModel, match="no prefix for a model of family 'qwen3'"):
        build(folder, "qwen3", method="prefix")


@pytest.mark.parametrize(("alpha", "rank"), [(8.0, 4), (3.0, 2)])
def test_a_rank_stabilised_adapter_is_scaled_by_the_root_of_its_rank(folders, alpha, rank):
    model = build(folders["qwen2"], "qwen2", alpha=alpha, rank=rank, rank_stabilised=True)
    (name,) = [name for name, _ in model.named_modules() if name.endswith("layers.0.self_attn.q_proj")]
    assert dict(model.named_modules())[name].scaling == {"default": pytest.approx(alpha / rank**0.5)}


# --- what a round trains


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("method", "number", "parts"),
    [
        ("ffa", 1, {"lora_B"}),
        ("ffa", 2, {"lora_B"}),
        ("both", 2, {"lora_A", "lora_B"}),
        ("alternating", 1, {"lora_B"}),
        ("alternating", 2, {"lora_A"}),
        ("alternating", 3, {"lora_B"}),
        ("prefix", 1, {"prompt_encoder"}),
        ("prompt", 4, {"prompt_encoder"}),
    ],
)
@pytest.mark.parametrize("task", ["continue", "classify"])
def test_a_round_trains_its_part_of_the_adapter_and_the_head_for_labels_only(folders, method, number, parts, task):
    model = build(folders["qwen2"], "qwen2", method=method, num_labels=3)
    shapes = adapter_shapes(model), head_shapes(model)
    set_trainable(model, method=method, task=task, number=number)
    names = trainable(model)
    heads = {"head.weight", "head.bias"}
    assert names & heads == (heads if task == "classify" else set())
    assert {part for name in names - heads for part in ("lora_A", "lora_B", "prompt_encoder") if part in name} == parts
    assert not any("lm_head" in name or "embed_tokens" in name for name in names)
    assert (adapter_shapes(model), head_shapes(model)) == shapes  # what is summed is the same in every round
    assert names <= model.trained


def test_what_alternating_sums_is_both_halves_in_every_round(folders):
    model = build(folders["qwen2"], "qwen2", method="alternating")
    both = build(folders["qwen2"], "qwen2", method="both")
    for number in (1, 2):
        set_trainable(model, method="alternating", task="continue", number=number)
        assert adapter_shapes(model) == adapter_shapes(both)
        assert set(adapter_tensors(model)) == set(adapter_tensors(both))


@pytest.mark.parametrize("method", ["both", "prefix", "prompt"])
def test_shapes_are_known_without_weights(folders, method):
    real, empty = (build(folders["qwen2"], "qwen2", method=method, empty=empty) for empty in (False, True))
    assert adapter_shapes(real) == adapter_shapes(empty) != ()


@pytest.mark.parametrize("method", ["both", "prefix", "prompt"])
def test_the_encoders_tensors_are_named_alike_with_and_without_the_head_of_words(folders, method):
    params = LoraParams(method, 2, 4.0, targets_of("qwen2"), None, 11, virtual_tokens=3)
    alone = build_model(load_base(folders["qwen2"]), params, num_labels=2, head_seed=0)
    with_words = build_model(load_base(folders["qwen2"], words=True), params, num_labels=None, head_seed=0)
    one, other = adapter_tensors(alone), adapter_tensors(with_words)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert head_shapes(with_words) == ()


# --- models that language tasks cannot use


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("cohere", {"logit_scale": 0.0625}, "logit_scale"),
        ("gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8}, "final_logit_softcapping"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling"),
    ],
)
def test_a_model_that_changes_its_logits_after_the_head_is_refused_for_words_only(tmp_path, family, changes, named):
    folder = save_tiny_causal(tmp_path / "m", family, **changes)
    for load in (load_base, empty_base):
        with pytest.raises(WrongModel, match=named):
            load(folder, words=True)
        load(folder)


def test_a_model_that_changes_its_logits_in_a_way_no_field_tells_is_refused(folders, monkeypatch):
    forward = LlamaForCausalLM.forward

    def louder(self, *arguments, **options):
        given = forward(self, *arguments, **options)
        given.logits = given.logits * 1.1
        return given

    monkeypatch.setattr(LlamaForCausalLM, "forward", louder)
    with pytest.raises(WrongModel, match="not those of its head of words alone"):
        load_base(folders["llama"], words=True)


def test_a_model_that_sees_the_whole_text_is_refused_for_words(folders, monkeypatch):
    forward = LlamaModel.forward

    def seeing_all(self, *arguments, **options):
        given = forward(self, *arguments, **options)
        given.last_hidden_state = given.last_hidden_state + given.last_hidden_state.mean(1, keepdim=True)
        return given

    monkeypatch.setattr(LlamaModel, "forward", seeing_all)
    with pytest.raises(WrongModel, match="no causal language model"):
        load_base(folders["llama"], words=True)


def test_weights_that_the_files_lack_are_never_made_up(tiny_model, tmp_path):
    with pytest.raises(WrongModel, match="weights of the model are not in its files: cls"):
        load_base(tiny_model, words=True)
    folder = save_tiny_causal(tmp_path / "m", "llama")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    for words in (False, True):
        with pytest.raises(WrongModel, match=r"1 weights of the model are not in its files: .*up_proj"):
            load_base(folder, words=words)


def test_a_family_whose_layers_have_other_names_is_refused_for_words_only(tmp_path):
    folder = save_tiny_causal(tmp_path / "m", "gpt_neox")
    params = LoraParams("ffa", 2, 4.0, ("query_key_value",), None, 1)
    with pytest.raises(WrongModel, match="under 'gpt_neox', wanted 'model'"):
        build_model(load_base(folder, words=True), params, num_labels=None, head_seed=0)
    build_model(load_base(folder), params, num_labels=2, head_seed=0)


def test_scales_that_do_nothing_are_no_reason(tmp_path):
    folder = save_tiny_causal(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logit_scale": 1.0, "final_logit_softcapping": None}))
    load_base(folder, words=True)
