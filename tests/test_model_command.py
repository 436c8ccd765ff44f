import json
import warnings

import pytest
from click.testing import CliRunner
from language_models import save_tiny_causal

from fedseek import model_command
from fedseek.cli import cli
from fedseek.errors import WrongModel
from fedseek.lora.load import load_base
from fedseek.lora.model import LoraParams, adapter_tensors, build_model
from fedseek.lora.source import files_digest, model_digest

TARGETS = {
    "qwen2": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "deepseek_v3": ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"],
}


def call(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = CliRunner().invoke(cli, ["model", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.mark.parametrize("family", list(TARGETS))
def test_show_tells_what_a_plan_has_to_say_of_the_model(tmp_path, family):
    folder = save_tiny_causal(tmp_path / "模型", family)
    told = json.loads(call("show", f"path:{folder}", "--rank", "3", "--json").stdout)
    base = load_base(folder, words=True)
    size = sum(parameter.numel() for parameter in base.parameters())
    values = {}
    for method in ("ffa", "both"):
        params = LoraParams(method, 3, 1.0, tuple(TARGETS[family]), None, 0)
        model = build_model(load_base(folder), params, num_labels=None, head_seed=0)
        values[method] = sum(value.size for value in adapter_tensors(model).values())
    assert told == {
        "family": family,
        "parameters": size,
        "language_tasks": True,
        "sha256": model_digest(folder),
        "files_sha256": files_digest(folder),
        "targets": TARGETS[family],
        "adapted_layers": 2 * len(TARGETS[family]),
        "rank": 3,
        "adapter_values_ffa": values["ffa"],
        "adapter_values_both": values["both"],
        "percent_both": pytest.approx(100 * values["both"] / size),
        "source": f"path:{folder}",
    }


def test_show_is_for_people_too(tiny_model):
    shown = call("show", f"path:{tiny_model}").stdout
    for line in (
        "family: bert",
        "language tasks: no",
        "targets: key, query, value",
        f"sha256: {model_digest(tiny_model)}",
    ):
        assert line in shown


def test_of_a_family_that_auto_does_not_know_nothing_is_made_up(tmp_path):
    folder = save_tiny_causal(tmp_path / "m", "gpt_neox")
    assert json.loads(call("show", f"path:{folder}", "--json").stdout)["targets"] is None
    assert 'targets: none: "auto" knows bert, deepseek_v2' in call("show", f"path:{folder}").stdout


def test_fetch_prints_the_digest_for_the_plan(monkeypatch, tiny_model):
    source = f"hub:owner/name@{'0' * 40}"
    monkeypatch.setattr(model_command, "fetch_model", lambda rest: {source.removeprefix("hub:"): tiny_model}[rest])
    told = json.loads(call("fetch", source, "--json").stdout)
    digests = {"sha256": model_digest(tiny_model), "files_sha256": files_digest(tiny_model)}
    assert told == {"source": source, "folder": str(tiny_model), **digests}
    assert f"sha256: {model_digest(tiny_model)}" in call("fetch", source).stdout


def test_only_a_hubs_model_is_fetched(tiny_model):
    with pytest.raises(WrongModel, match="cannot fetch 'path:"):
        call("fetch", f"path:{tiny_model}")


@pytest.mark.parametrize("command", [[], ["fetch"], ["show"]])
def test_help_has_an_example(command):
    assert "Example: fedseek model" in call(*command, "--help").stdout
