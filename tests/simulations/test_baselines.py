import json

import numpy as np
import pytest
import torch

from fedseek.evaluate import evaluate
from fedseek.lora.load import load_base
from fedseek.lora.model import adapter_tensors, head_tensors
from fedseek.prepare import prepare_model
from fedseek.tokenise import tokenise
from fedseek_site.admission import units_for
from simulations.baselines import (
    Bench,
    HeadView,
    Probe,
    _average_heads,
    _open,
    centralised,
    label_offsets,
    linear_probe,
    local_only,
    pool,
    pooled_features,
    prepare_union_model,
    train_rounds,
)
from simulations.run_folder import create_run_folder
from simulations.scenario import load_scenario

IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
MASK = (IDS != 0).long()
WORDS = {"欺诈": "汇款", "正常": "余额", "急诊": "胸痛", "普通": "复查", "自理": "感冒"}
SITES = (("北岸银行", "bank"), ("harbour-bank", "bank"), ("仁济医院", "hospital"), ("st-anna", "hospital"))


@pytest.fixture
def bench(tiny_plan, tiny_model, tiny_records):
    """A site's tokenised records, as a baseline opens them."""

    def make(name: str, kind: str, *, train: int = 12, held_back: int = 6) -> Bench:
        plan = tiny_plan()
        labels = plan.spec.kinds[kind].labels
        records = [units_for(plan, kind, tiny_records(kind, count)) for count in (train, held_back)]
        return Bench(name, kind, *(tokenise(each, tiny_model, labels=labels, max_tokens=16) for each in records))

    return make


@pytest.fixture
def own_model(tiny_model):
    """The plan's model for a kind at its first values, on a base of its own."""
    return lambda plan, kind: prepare_model(plan, kind, load_base(tiny_model))


# --- the union of all labels


def test_the_labels_of_each_kind_start_where_the_last_kinds_end(tiny_plan):
    assert label_offsets(tiny_plan()) == {"bank": 0, "hospital": 2}
    swapped = {
        "hospital": {"labels": ["a", "b", "c", "d"]},
        "bank": {"labels": ["x", "y"]},
        "lab": {"labels": ["p", "q"]},
    }
    document = tiny_plan(kinds=swapped)
    offsets = label_offsets(document)
    spans = [range(offsets[kind], offsets[kind] + len(task.labels)) for kind, task in document.spec.kinds.items()]
    assert sorted(label for span in spans for label in span) == list(range(8))


def test_the_pool_renumbers_labels_and_units_and_allows_a_record_its_own_kind_only(tiny_plan, bench):
    plan = tiny_plan()
    benches = [bench("a", "bank", train=4), bench("b", "hospital", train=6), bench("c", "bank", train=2)]
    pooled, allowed = pool(plan, benches, label_offsets(plan))
    assert allowed.shape == (12, 5)
    assert allowed[:4].tolist() == allowed[10:].tolist()[:1] * 4 == [[True, True, False, False, False]] * 4
    assert allowed[4:10].tolist() == [[False, False, True, True, True]] * 6
    assert pooled.labels.tolist() == [
        *benches[0].train.labels,
        *(benches[1].train.labels + 2),
        *benches[2].train.labels,
    ]
    assert allowed[np.arange(12), pooled.labels].all()
    assert pooled.num_units == sum(one.train.num_units for one in benches)
    assert [ids.tolist() for ids in pooled.input_ids] == [i.tolist() for one in benches for i in one.train.input_ids]


def test_no_unit_of_one_site_is_a_unit_of_another(tiny_plan, bench):
    benches = [bench("a", "hospital", train=6), bench("b", "hospital", train=6)]  # the same names of patients at both
    pooled, _ = pool(tiny_plan(), benches, label_offsets(tiny_plan()))
    assert benches[0].train.units.tolist() == [0, 0, 1, 1, 2, 2]
    assert pooled.units.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_kinds_logits_in_the_union_are_those_of_its_own_model_at_the_start(tiny_plan, own_model):
    plan = tiny_plan()
    union = prepare_union_model(plan)
    assert union(IDS, MASK).shape == (2, 5)
    for kind, first in label_offsets(plan).items():
        own = own_model(plan, kind)(IDS, MASK)
        assert torch.allclose(HeadView(union, first, own.shape[1])(IDS, MASK), own, atol=1e-6), kind
        assert torch.allclose(union(IDS, MASK)[:, first : first + own.shape[1]], own, atol=1e-6)


def test_training_the_union_moves_the_adapter_and_the_head_and_nothing_else(tiny_plan, bench):
    plan = tiny_plan()
    union = prepare_union_model(plan)
    pooled, allowed = pool(plan, [bench("a", "bank"), bench("b", "hospital")], label_offsets(plan))
    before = {name: value.detach().clone() for name, value in union.named_parameters()}
    assert list(train_rounds(plan, union, pooled, allowed=allowed)) == [1, 2]
    moved = {name for name, value in union.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {*adapter_tensors(union), *head_tensors(union)}
    assert all("lora_B" in name or name in ("head.weight", "head.bias") for name in moved)


def test_a_kind_alone_in_the_pool_does_not_touch_the_other_kinds_rows(tiny_plan, bench):
    plan = tiny_plan()
    union = prepare_union_model(plan)
    before = union.head.weight.detach().clone()
    pooled, allowed = pool(plan, [bench("a", "bank")], label_offsets(plan))
    list(train_rounds(plan, union, pooled, allowed=allowed))
    assert not torch.equal(union.head.weight[:2], before[:2])
    assert torch.equal(union.head.weight[2:], before[2:])


def test_one_spend_goes_through_all_rounds_of_a_private_baseline(tiny_plan, bench, own_model):
    plan = tiny_plan(private=True, training={"rounds": 3})
    model = own_model(plan, "bank")
    assert list(train_rounds(plan, model, bench("a", "bank", train=20).train)) == [1, 2, 3]  # or its guard trips


# --- the frozen encoder


def test_a_probes_logits_are_the_frozen_models(tiny_plan, own_model, bench):
    model, site = own_model(tiny_plan(), "hospital"), bench("a", "hospital")
    probe = Probe(own_model(tiny_plan(), "hospital"), site)
    for rows, probed in ((site.train, probe.train_records), (site.held_back, probe.held_back)):
        assert len(probed) == len(rows)
        assert probed.labels.tolist() == rows.labels.tolist()
        assert probed.units.tolist() == rows.units.tolist()
        for own, stands_for in zip(rows.input_ids, probed.input_ids, strict=True):
            ids = torch.from_numpy(own.astype(np.int64))[None]
            expected = model(ids, torch.ones_like(ids))
            got = probe(torch.from_numpy(stands_for.astype(np.int64))[None], torch.ones(1, 1))
            assert torch.allclose(got, expected, atol=1e-6)


def test_a_probe_scores_what_the_untrained_model_scores(tiny_plan, own_model, bench):
    site = bench("a", "bank", held_back=12)
    probe = Probe(own_model(tiny_plan(), "bank"), site)
    expected = evaluate(own_model(tiny_plan(), "bank"), site.held_back)
    got = evaluate(probe, probe.held_back)
    assert (got.correct, got.count) == (expected.correct, expected.count)
    assert got.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)


def test_only_the_head_of_a_probe_is_trained(tiny_plan, own_model, bench):
    plan = tiny_plan()
    probe = Probe(own_model(plan, "bank"), bench("a", "bank"))
    features = probe.features.clone()
    weight = probe.head.weight.detach().clone()
    assert {name for name, _ in probe.named_parameters()} == {"head.weight", "head.bias"}
    list(train_rounds(plan, probe, probe.train_records))
    assert torch.equal(probe.features, features)
    assert not torch.equal(probe.head.weight, weight)


def test_a_probe_has_a_head_of_its_own(tiny_plan, own_model, bench):
    model = own_model(tiny_plan(), "bank")
    probe = Probe(model, bench("a", "bank"))
    with torch.no_grad():
        probe.head.weight += 1
    assert torch.equal(model.head.weight, own_model(tiny_plan(), "bank").head.weight)
    assert isinstance(model.head, torch.nn.Linear)


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_the_size_of_a_batch_does_not_change_features_or_their_order(tiny_plan, own_model, batch):
    model = own_model(tiny_plan(), "bank")
    texts = [np.array([2, *range(7, 7 + length), 3], np.int32) for length in (5, 1, 9, 2, 9, 3, 1)]
    features = pooled_features(model, texts, batch=batch)
    assert features.shape == (7, 16)
    for row, text in enumerate(texts):
        ids = torch.from_numpy(text.astype(np.int64))[None]
        hidden = model.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert torch.allclose(features[row], hidden[0].mean(0), atol=1e-6)


def test_heads_of_a_kind_are_averaged(tiny_plan, own_model, bench):
    probes = [Probe(own_model(tiny_plan(seed=seed), "bank"), bench("a", "bank")) for seed in (1, 2, 3)]
    mean = sum(probe.head.weight.detach() for probe in probes) / 3
    with torch.no_grad():
        probes[0].head.bias += 3.0
    _average_heads(probes)
    for probe in probes:
        assert torch.allclose(probe.head.weight, mean)
        assert torch.allclose(probe.head.bias, torch.full((2,), 1.0))


# --- whole baselines, from a run folder


def as_toml(table: dict, path: str) -> str:
    """A nested document as TOML tables; JSON's strings, numbers and lists are TOML's too."""
    own = "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items() if not isinstance(value, dict))
    inner = "".join(as_toml(value, f"{path}.{key}") for key, value in table.items() if isinstance(value, dict))
    return f"[{path}]\n{own}{inner}"


@pytest.fixture
def run_folder(tmp_path, tiny_plan_document):
    """A run folder of four sites with a file each."""

    def make(**changes):
        text = as_toml(tiny_plan_document(**changes), "plan")
        for name, kind in SITES:
            file = tmp_path / f"{name}.jsonl"
            labels = tiny_plan_document()["kinds"][kind]["labels"]
            rows = [
                {"text": f"{WORDS[label]} {number}", "label": label, "u": number // 2}
                for number in range(24)
                for label in [labels[number % len(labels)]]
            ]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
            held_back = tmp_path / f"{name}-held-back.jsonl"
            held_back.write_bytes(file.read_bytes())  # the same rows: how well they are learned is what is looked at
            site = {"name": name, "kind": kind, "train": str(file), "held_back": str(held_back), "unit": "u"}
            text += as_toml(site, "[sites]")
        path = tmp_path / "small.toml"
        path.write_text(text, "utf-8")
        return create_run_folder(path, load_scenario(path), tmp_path / "runs", rounds=None)

    return make


def test_baselines_train_on_as_many_records_of_a_patient_as_the_plan_allows(
    write_tiny_scenario, tiny_records, tmp_path
):
    records = tiny_records("hospital", 24)
    rows = [
        {"text": text, "label": label, "unit": "客0"} for text, label in zip(records.texts, records.labels, strict=True)
    ]
    path = write_tiny_scenario(rows={"仁济医院": rows}, privacy={"max_records_per_unit": 4})
    _, benches = _open(create_run_folder(path, load_scenario(path), tmp_path / "runs", rounds=None))
    sizes = {bench.name: (len(bench.train), bench.train.num_units, len(bench.held_back)) for bench in benches}
    assert sizes["仁济医院"] == (4, 1, 12)
    assert sizes["北岸银行"] == (24, 24, 12)


@pytest.mark.parametrize("private", [False, True])
def test_every_baseline_gives_every_site_a_utility_for_every_round(run_folder, private):
    folder = run_folder(private=private, training={"sampling_probability": 0.5})
    names = [name for name, _ in SITES]
    alone = local_only(folder, "仁济医院")
    assert alone.keys() == {"仁济医院"}
    together = centralised(folder)
    assert list(together) == names
    for line in [*alone.values(), *together.values()]:
        assert len(line.utilities) == len(line.losses) == 3  # before training, and after each of two rounds
        assert all(0 <= utility <= 1 for utility in line.utilities)
    assert together["仁济医院"].utilities[0] == alone["仁济医院"].utilities[0]
    probed = linear_probe(folder)
    assert probed.keys() == set(names)
    assert all(0 <= utility <= 1 for utility in probed.values())


def test_an_easy_task_is_learned_by_every_baseline(run_folder):
    folder = run_folder(training={"rounds": 3, "steps_per_round": 30, "learning_rate": 0.01, "head_learning_rate": 0.1})
    assert local_only(folder, "harbour-bank")["harbour-bank"].utilities[-1] >= 0.8
    assert all(line.utilities[-1] >= 0.8 for line in centralised(folder).values())
    assert all(utility >= 0.8 for utility in linear_probe(folder).values())
