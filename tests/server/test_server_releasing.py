"""What the coordinator writes when all have approved: it loads in PEFT, is what the sites hold, or is not written."""

import hashlib
import json
import random

import msgspec
import numpy as np
import pytest
import torch
from bundled import Signers
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from fedseek.errors import ReleaseRefused
from fedseek.evidence import parse_heads, parse_release, read_files, read_release
from fedseek.identity.roster import parse_roster
from fedseek.identity.signing import CONTEXT_RELEASE, sign, verify
from fedseek.messages import release_message
from fedseek.plan import plan_from_canonical
from fedseek.statement import parse_statement, statement_bytes
from fedseek.verification import verify_release
from fedseek_server.releasing import audit_heads, write_release
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
    pages = {"README.md", "PRIVACY.md", "PRIVACY.zh.md"}
    assert {path.name for path in folder.iterdir()} == evidence | adapter | pages | {"plan.json", "roster.bin"}
    assert plan_from_canonical((folder / "plan.json").read_bytes()).digest == coordinator.plan.digest
    roster = parse_roster((folder / "roster.bin").read_bytes())
    for name in names:
        document = (folder / f"privacy-{name}.json").read_bytes()
        said = json.loads(document)  # nothing but the folder is needed to check a signature
        digests = {scope: bytes.fromhex(digest) for scope, digest in said["tensors"].items()}
        message = release_message(said["run"], digests, document)
        assert said["files"] == {each: hashlib.sha256((folder / each).read_bytes()).hexdigest() for each in adapter}
        assert said["contributors"] == list(names)
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
        assert ([stage["num_steps"] for stage in statement["stages"]], statement["delta"]) == ([4], 1e-3)
        assert len(statement["guards_passed"]) >= 9
        assert statement["audit"]["canaries"] == cohort.coordinator.plan.num_canaries
    assert "(8.00, 0.001)-differential privacy" in (folder / "README.md").read_text("utf-8")
    check_that_no_byte_can_be_another(folder, cohort.coordinator.roster)


def check_that_no_byte_can_be_another(folder, roster):
    """Of what real sites wrote; place by place it is tests/test_evidence.py."""
    files = read_files(folder)
    assert verify_release(parse_release(files), roster).approved == roster.names
    rng = random.Random(5)
    for name, data in files.items():
        for place in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(12))}:
            changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            with pytest.raises(ReleaseRefused) as caught:
                verify_release(parse_release({**files, name: changed}), roster)
            assert name in caught.value.message, (name, place, caught.value.message)


def test_a_site_whose_update_is_in_no_sum_need_not_approve(make_cohort):
    """It never came back from round 1; the release is of the others, and says so."""
    cohort = make_cohort()
    cohort.play(away=lambda phase, number, site: site == "st-anna" and phase != "plan")
    folder = released(cohort)
    assert cohort.coordinator.contributors == ("harbour-bank", "仁济医院", "北岸银行")
    assert not (folder / "privacy-st-anna.json").exists()
    assert len(list(folder.glob("privacy-*.sig"))) == 3


def test_as_many_approvals_as_the_plan_says_are_enough(make_cohort):
    cohort = make_cohort(release={"min_approvals": 3})
    cohort.play()
    del cohort.coordinator.approvals["st-anna"]
    folder = released(cohort)
    assert verify_release(read_release(folder), cohort.coordinator.roster).approved == (
        "harbour-bank",
        "仁济医院",
        "北岸银行",
    )
    assert "have signed no statement:** st-anna" in (folder / "PRIVACY.md").read_text("utf-8")
    del cohort.coordinator.approvals["仁济医院"]
    with pytest.raises(ReleaseRefused, match="2 of 4 sites in the adapter have approved, wanted 3"):
        write_release(cohort.coordinator, cohort.folder / "another")


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
    with pytest.raises(ReleaseRefused, match=r"adapter_model\.safetensors: has sha256"):
        released(finished)
    assert not (finished.folder / "out").exists()


def test_an_adapter_from_none_or_two_that_differ_are_refused(finished):
    approvals = finished.coordinator.approvals
    sender = next(name for name, approval in approvals.items() if approval.adapter)
    files = approvals[sender].adapter
    other = {**files, "adapter_config.json": files["adapter_config.json"] + b" "}
    approvals["st-anna"] = msgspec.structs.replace(approvals["st-anna"], adapter=other)
    with pytest.raises(ReleaseRefused, match="2 sites sent an adapter"):
        released(finished)
    for name in approvals:
        approvals[name] = msgspec.structs.replace(approvals[name], adapter={})
    with pytest.raises(ReleaseRefused, match="0 sites sent an adapter"):
        released(finished)
    assert not (finished.folder / "out").exists()


def test_the_same_adapter_may_come_twice(finished):
    """Whoever was to send it put its approval off, so another one was asked for it too."""
    approvals = finished.coordinator.approvals
    files = next(approval.adapter for approval in approvals.values() if approval.adapter)
    for name in approvals:
        approvals[name] = msgspec.structs.replace(approvals[name], adapter=dict(files))
    released(finished)


LIES = {
    "run": lambda said: msgspec.structs.replace(said, run="another"),
    "plan_digest": lambda said: msgspec.structs.replace(said, plan_digest="0" * 64),
    "site": lambda said: msgspec.structs.replace(said, site="harbour-bank"),
    "contributors": lambda said: msgspec.structs.replace(said, contributors=said.contributors[1:]),
    "steps": lambda said: msgspec.structs.replace(said, stages=(msgspec.structs.replace(said.stages[0], num_steps=3),)),
    "checks": lambda said: msgspec.structs.replace(said, checks=()),
}


@pytest.mark.parametrize("field", LIES)
def test_a_statement_of_something_else_is_refused_though_its_site_signed_it(finished, field):
    coordinator = finished.coordinator
    approval = coordinator.approvals["st-anna"]
    document = statement_bytes(LIES[field](parse_statement(approval.statement)))
    message = release_message(coordinator.run, approval.digests, document)
    signature = sign(finished.site("st-anna").identity, CONTEXT_RELEASE, message)
    lie = msgspec.structs.replace(approval, statement=document, signature=signature)
    coordinator.approvals["st-anna"] = lie
    with pytest.raises(ReleaseRefused, match=r"privacy-st-anna\.json"):
        released(finished)
    assert not (finished.folder / "out").exists()


def test_a_statement_that_is_none_is_refused(finished):
    approvals = finished.coordinator.approvals
    approvals["st-anna"] = msgspec.structs.replace(approvals["st-anna"], statement=b"a statement")
    with pytest.raises(ReleaseRefused, match=r"privacy-st-anna\.json of this run: privacy statement of 11 bytes"):
        released(finished)


def test_heads_of_audit_records_lie_beside_the_release_where_the_roster_can_verify_them(finished):
    coordinator = finished.coordinator
    signers = Signers(
        coordinator.plan, {s.identity.name: s.identity for s in finished.services.values()}, coordinator.roster, {}
    )
    kept = parse_heads(signers.heads())
    signatures = {name: bytes.fromhex(signature) for name, signature in kept.countersignatures.items()}
    heads = audit_heads(coordinator.roster, kept.listed(), signatures)
    folder = finished.folder / "out" / "release"
    write_release(coordinator, folder, heads=heads)
    assert verify_release(read_release(folder), coordinator.roster).checked[7].startswith("audit-heads.json")
    write_release(coordinator, folder)  # a process that was killed after it had been written knows of no heads
    assert (folder / "audit-heads.json").exists()
    others = Signers.of(coordinator.plan)
    assert audit_heads(others.roster, kept.listed(), signatures) is None
    assert audit_heads(coordinator.roster, kept.listed(), {}) is None
    assert audit_heads(coordinator.roster, (), signatures) is None


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
