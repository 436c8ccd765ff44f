"""The small model built on the spot: what is in its folder, that it is built once, and how a scenario names it."""

import json

import pytest
import torch
from tiny_instruct import write_tiny_instruct
from transformers import AutoTokenizer

from fedseek.errors import InvalidPlan, InvalidRecords, WrongModel
from fedseek.lora.load import load_base
from fedseek.lora.source import check_model, locate_model, model_digest
from fedseek.plan import plan_from_canonical
from simulations.run_folder import create_run_folder, open_scenario
from simulations.scenario import NOT_BUILT, SmallModelSpec, TextSource, load_scenario, read_site_data
from simulations.small_model import build_small_model, model_key, pack, read_texts, train_tokenizer


@pytest.fixture
def scenario_file(tmp_path):
    return write_tiny_instruct(tmp_path)


@pytest.fixture
def spec(scenario_file):
    return load_scenario(scenario_file).spec.small_model


@pytest.fixture
def build(spec, tmp_path):
    """Build with some settings changed."""

    def run(cache="模型", report=None, **changes):
        changed = SmallModelSpec.model_validate(spec.model_dump() | changes)
        return build_small_model(changed, seed=3, cache=tmp_path / cache, report=report)

    return run


@pytest.mark.parametrize("family", ["qwen2", "llama", "deepseek_v3"])
def test_what_is_built_is_loaded_as_any_other_model(build, family):
    folder = build(family=family, steps=2)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in folder.iterdir()
    }
    base = load_base(locate_model(f"path:{folder}"), words=True)
    assert base.config.model_type == family
    assert len(load_base(folder).layers) == 2
    ids = torch.tensor([[5, 6, 7]])
    assert base(input_ids=ids).logits.shape == (1, 3, 320)


def test_it_is_built_once_and_whole(build, tmp_path):
    seen = []
    folder = build(report=lambda step, steps, loss: seen.append((step, steps)))
    assert seen == [(step, 6) for step in range(1, 7)]
    digest = model_digest(folder)
    assert build(report=lambda *told: seen.append(told)) == folder
    assert len(seen) == 6
    other = build(steps=5)
    assert other != folder
    assert {path.name for path in (tmp_path / "模型").iterdir()} == {folder.name, other.name}
    again = build(cache="elsewhere")
    assert (again.name, model_digest(again)) == (folder.name, digest), "same settings, texts and libraries"


def test_nothing_half_built_is_left_behind(build, tmp_path):
    def stop(step, steps, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(report=stop)
    assert list((tmp_path / "模型").iterdir()) == []


def test_it_learns_its_texts(build):
    losses = []
    build(steps=60, learning_rate=0.01, report=lambda step, steps, loss: losses.append(loss))
    assert losses[-1] < 0.6 * losses[0]


def test_the_key_follows_settings_texts_and_shares(spec, tmp_path):
    first = model_key(spec, 3)
    assert model_key(spec, 3) == first
    assert model_key(spec, 4) != first
    assert model_key(spec.model_copy(update={"hidden": 64}), 3) != first
    with (tmp_path / "public.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"text": "one more"}\n')
    assert model_key(spec, 3) != first


def test_the_tokenizer_writes_any_text_and_ends_each_turn(build):
    tokenizer = AutoTokenizer.from_pretrained(build(steps=1))
    for text in ("余额 1,402.5 €", "\u202eأ🙂\n\t", "<|im_end|>"):
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text
    turns = [{"role": "user", "content": "多少？"}, {"role": "assistant", "content": "42"}]
    written = tokenizer.apply_chat_template(turns, tokenize=False)
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert written == asked + "42<|im_end|>\n"
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"
    assert len(tokenizer) <= 320


def test_texts_are_packed_with_their_ends(spec):
    texts = ["one", "two"]
    tokenizer = train_tokenizer(texts, 300)
    end = tokenizer.eos_token_id
    blocks = pack(texts * 4, tokenizer, 4)
    flat = blocks.reshape(-1).tolist()
    assert blocks.shape[1] == 4
    assert tokenizer.decode([token for token in flat if token != end]).startswith("onetwoone")
    with pytest.raises(InvalidRecords, match="wanted at least 64"):
        pack(texts, tokenizer, 64)


def test_no_row_of_a_site_is_pretrained_on(scenario_file, spec):
    scenario = load_scenario(scenario_file)
    known = read_texts(spec.texts, seed=scenario.spec.simulation.seed)
    assert sum("balance" in text for text in known) == 12
    for site in scenario.spec.sites:
        data = read_site_data(scenario, site)
        for records in (data.train, data.held_back):
            assert len(records.texts) > 0
            assert not [given for given in records.texts for text in known if given in text and site.kind == "bank"]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [({"file": "missing.jsonl"}, "no such file"), ({"columns": ("nothing",)}, "no column 'nothing'")],
    ids=["file", "column"],
)
def test_texts_that_are_not_there_are_named(build, spec, source, wanted):
    texts = (TextSource.model_validate(spec.texts[1].model_dump() | source),)
    with pytest.raises(InvalidRecords, match=wanted):
        build(texts=texts)


# --- a scenario with a small model


def test_until_it_is_built_no_site_can_have_the_model(scenario_file):
    model = load_scenario(scenario_file).plan.spec.model
    assert (model.source, model.sha256) == (NOT_BUILT["source"], NOT_BUILT["sha256"])
    with pytest.raises(WrongModel, match="SMALL_MODEL"):
        locate_model(model.source)


def test_the_run_folder_keeps_the_complete_plan(scenario_file, build, tmp_path):
    folder = build(steps=1)
    named = {"source": f"path:{folder}", "sha256": model_digest(folder)}
    scenario = load_scenario(scenario_file, rounds=1, model=named)
    check_model(locate_model(scenario.plan.spec.model.source), scenario.plan.spec.model.sha256)
    run_folder = create_run_folder(scenario_file, scenario, tmp_path / "runs", rounds=1)
    opened = open_scenario(run_folder)
    kept = plan_from_canonical((run_folder / "plan.json").read_bytes())
    assert opened.plan.digest == kept.digest == scenario.plan.digest
    assert opened.plan.rounds == 2, "the domain stage's round is not overridden"
    assert json.loads((run_folder / "plan.json").read_text("utf-8"))["model"]["sha256"] == named["sha256"]


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ('source = "${SMALL_MODEL}"', 'source = "path:x"\nsha256 = "' + "0" * 64 + '"', "plan.model.source"),
        ('family = "qwen2"\nmax_tokens', 'family = "llama"\nmax_tokens', "plan.model.family: 'llama'"),
        (
            "part = { index = 2, of = 3 }\n\n[[small",
            "part = { index = 1, of = 3 }\n\n[[small",
            "rows of 'harbour-bank'",
        ),
        ("part = { index = 2, of = 3 }\n\n[[small", "\n[[small", "rows of '北岸银行'"),
        ("public.jsonl", "bank-test.jsonl", "a site's held-back rows"),
        ("heads = 4", "heads = 5", "wanted each to divide"),
        ("public.jsonl", "${SYNTHETIC}/x.jsonl", "made with the run folder"),
    ],
    ids=["source", "family", "overlap", "whole-file", "held-back", "heads", "synthetic"],
)
def test_what_does_not_fit_is_told_before_anything_is_built(scenario_file, old, new, wanted):
    text = scenario_file.read_text("utf-8")
    assert old in text
    scenario_file.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(InvalidPlan) as caught:
        load_scenario(scenario_file)
    assert [problem for problem in caught.value.problems if wanted in problem]


def test_a_small_model_without_its_table_is_refused(scenario_file):
    text = scenario_file.read_text("utf-8")
    scenario_file.write_text("[plan]" + text.split("[plan]")[1], "utf-8")
    with pytest.raises(InvalidPlan, match="plan"):
        load_scenario(scenario_file)
