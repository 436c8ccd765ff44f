"""What the coordinator writes when all have approved: it loads in PEFT, is what the sites hold, or is not written."""

import hashlib
import json

import msgspec
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from fedseek.errors import Malformed, ReleaseRefused
from fedseek.identity.roster import parse_roster
from fedseek.identity.signing import CONTEXT_RELEASE, verify
from fedseek.messages import release_message
from fedseek.plan import plan_from_canonical
from fedseek_server.releasing import write_release
from fedseek_site.weights import to_scopes

TEXTS = ["胸痛 chest pain 7", "汇款 transfer now", "余额"]


@pytest.fixture
def finished(make_cohort):
    cohort = make_cohort()
    cohort.play()
    return cohort


def released(cohort):
    folder = cohort.folder / "out" / "release"
    write_release(cohort.coordinator, folder)
    return folder


def hidden_states(encoder, tokenizer):
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state


@pytest.mark.parametrize("method", ["ffa", "both"])
def test_the_released_adapter_loads_in_peft_and_computes_what_every_site_computes(make_cohort, tiny_model, method):
    cohort = make_cohort(lora={"method": method})
    cohort.play()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModel.from_pretrained(tiny_model).eval()
    without = hidden_states(base, tokenizer)
    loaded = PeftModel.from_pretrained(base, str(released(cohort))).eval()
    with_adapter = hidden_states(loaded, tokenizer)
    assert (with_adapter - without).abs().max() > 1e-3, "the adapter changes what the base computes"
    for service in cohort.services.values():
        run, _ = service._held
        own = hidden_states(run.model.encoder.eval(), tokenizer)
        assert torch.equal(own, with_adapter)


def test_every_site_keeps_a_release_of_its_own_with_the_same_adapter_and_its_head(finished, tiny_model):
    ours = released(finished)
    for service in finished.services.values():
        kind = service.identity.kind
        folder = finished.folder / service.identity.name / "release"
        assert (folder / "adapter_model.safetensors").read_bytes() == (ours / "adapter_model.safetensors").read_bytes()
        head = json.loads((folder / f"head-{kind}.json").read_text("utf-8"))
        assert head["labels"] == list(finished.coordinator.plan.spec.kinds[kind].labels)
        PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), str(folder))
    assert not list(ours.glob("head-*")), "a head stays with the sites of its kind"


def test_a_release_holds_the_plan_the_roster_and_every_signed_statement(finished):
    folder = released(finished)
    coordinator = finished.coordinator
    names = coordinator.roster.names
    evidence = {f"privacy-{name}.{end}" for name in names for end in ("json", "sig")}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == evidence | adapter | {"README.md", "plan.json", "roster.bin"}
    assert plan_from_canonical((folder / "plan.json").read_bytes()).digest == coordinator.plan.digest
    roster = parse_roster((folder / "roster.bin").read_bytes())
    for name in names:
        document = (folder / f"privacy-{name}.json").read_bytes()
        said = json.loads(document)  # nothing but the folder is needed to check a signature
        digests = {scope: bytes.fromhex(digest) for scope, digest in said["tensors"].items()}
        message = release_message(said["run"], digests, document)
        assert said["adapter_sha256"] == hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        verify(roster.entry(name), CONTEXT_RELEASE, message, (folder / f"privacy-{name}.sig").read_bytes())
        assert json.loads(document)["epsilon"] is None, "a run without privacy states none"
    card = (folder / "README.md").read_text("utf-8")
    assert "北岸银行" in card
    assert card.count("**No privacy guarantee.**") == 4


def test_a_private_release_states_what_each_site_spent(make_cohort):
    cohort = make_cohort(private=True)
    cohort.play()
    folder = released(cohort)
    for name in cohort.coordinator.roster.names:
        statement = json.loads((folder / f"privacy-{name}.json").read_bytes())
        assert 0 < statement["epsilon"] <= 8.0
        assert statement["epsilon_second_opinion"] > statement["epsilon"]
        assert (statement["num_steps"], statement["delta"]) == (4, 1e-3)
        assert len(statement["guards_passed"]) >= 9
    assert "(8.00, 0.001)-differential privacy" in (folder / "README.md").read_text("utf-8")


def test_a_site_whose_update_is_in_no_sum_need_not_approve(make_cohort):
    """It never came back from round 1; the release is of the others, and says so."""
    cohort = make_cohort()
    cohort.play(away=lambda phase, number, site: site == "st-anna" and phase != "plan")
    folder = released(cohort)
    assert cohort.coordinator.contributors == ("harbour-bank", "仁济医院", "北岸银行")
    assert not (folder / "privacy-st-anna.json").exists()
    assert len(list(folder.glob("privacy-*.sig"))) == 3


def test_without_every_approval_nothing_is_written(finished):
    del finished.coordinator.approvals["st-anna"]
    with pytest.raises(ReleaseRefused, match="no approval from st-anna"):
        released(finished)
    assert not (finished.folder / "out").exists()


def one_file_more(files):
    return {**files, "../adapter_model.bin": b"x"}


def one_file_less(files):
    return {"adapter_config.json": files["adapter_config.json"]}


@pytest.mark.parametrize("alter", [one_file_more, one_file_less])
def test_only_the_files_of_an_adapter_are_written(finished, alter):
    approvals = finished.coordinator.approvals
    sender = next(name for name, approval in approvals.items() if approval.adapter)
    approvals[sender] = msgspec.structs.replace(approvals[sender], adapter=alter(approvals[sender].adapter))
    with pytest.raises(ReleaseRefused, match=r"wanted 1 with adapter_config\.json, adapter_model\.safetensors"):
        released(finished)
    assert not (finished.folder / "out").exists()


def test_an_adapter_other_than_the_one_all_signed_for_is_refused(finished):
    approvals = finished.coordinator.approvals
    sender = next(name for name, approval in approvals.items() if approval.adapter)
    weights = bytearray(approvals[sender].adapter["adapter_model.safetensors"])
    weights[-1] ^= 1
    swapped = {**approvals[sender].adapter, "adapter_model.safetensors": bytes(weights)}
    approvals[sender] = msgspec.structs.replace(approvals[sender], adapter=swapped)
    with pytest.raises(ReleaseRefused, match="signed for another"):
        released(finished)
    assert not (finished.folder / "out").exists()


def test_an_adapter_from_none_or_from_two_is_refused(finished):
    approvals = finished.coordinator.approvals
    sender = next(name for name, approval in approvals.items() if approval.adapter)
    files = approvals[sender].adapter
    approvals["st-anna"] = msgspec.structs.replace(approvals["st-anna"], adapter=files)
    with pytest.raises(ReleaseRefused, match="2 sites sent an adapter"):
        released(finished)
    for name in approvals:
        approvals[name] = msgspec.structs.replace(approvals[name], adapter={})
    with pytest.raises(ReleaseRefused, match="0 sites sent an adapter"):
        released(finished)


@pytest.mark.parametrize(
    "alter",
    [
        {"run": "another"},
        {"plan_digest": "0" * 64},
        {"site": "harbour-bank"},
        {"note": "unknown field"},
        {"num_steps": "four"},
    ],
    ids=lambda alter: next(iter(alter)),
)
def test_a_statement_of_something_else_is_refused(finished, alter):
    approvals = finished.coordinator.approvals
    document = {**json.loads(approvals["st-anna"].statement), **alter}
    altered = msgspec.structs.replace(approvals["st-anna"], statement=json.dumps(document).encode())
    approvals["st-anna"] = altered
    with pytest.raises(Malformed, match="privacy statement of site 'st-anna'"):
        released(finished)
    assert not (finished.folder / "out").exists()


def test_the_released_tensors_are_those_the_sites_signed(finished):
    from safetensors.numpy import load_file

    tensors = load_file(released(finished) / "adapter_model.safetensors")
    run, state = finished.site("st-anna")._held
    trained = np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors) if "lora_B" in name])
    assert trained.dtype == np.float32
    assert (trained == to_scopes(state.scopes, run.layouts)["global"].weights).all()


def test_a_release_that_is_there_already_stays_and_another_is_not_replaced(finished):
    folder = released(finished)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert released(finished) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (folder / "plan.json").write_bytes(b"{}")
    with pytest.raises(ReleaseRefused, match="holds something else"):
        released(finished)
    assert (folder / "plan.json").read_bytes() == b"{}"
