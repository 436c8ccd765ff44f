"""Targets of the protocol's own messages: requests, replies, boxes, keys, ciphertexts, a site's identity."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
from altering import Target
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from seal_inputs import framed, inflated

from fedseek.cohort import Federation, round_graph
from fedseek.deal import RoundSecrets, _box_key, advertise, deal_shares, open_box
from fedseek.groupkey import make_group_key, open_group_key
from fedseek.he.ciphertext import (
    CiphertextForm,
    ScopedCiphertexts,
    ScopedSum,
    _content_size,
    _inner_headers,
    load_ciphertext,
    save_ciphertext,
)
from fedseek.he.keys import SecretKey, encrypt_slots
from fedseek.he.sealfile import open_frame
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster, parse_roster
from fedseek.identity.sealing import seal
from fedseek.identity.vault import StorageKey, load_identity, open_at_rest, save_identity, seal_at_rest
from fedseek.messages import (
    AggregateDown,
    GroupKeySealed,
    KeyRequest,
    KeysSealed,
    PlanAdmitted,
    PlanOffer,
    Refused,
    ReleaseApproved,
    ReleaseRequest,
    RoundKeys,
    RoundRequest,
    ShareRequest,
    SharesRevealed,
    SharesSealed,
    UnmaskRequest,
    UpdateReply,
    decode_reply,
    decode_request,
    encode_message,
)
from fedseek.plan import check_plan, parse_spec, plan_from_canonical


def fixed(label: str, length: int) -> bytes:
    return hashlib.shake_256(b"fedseek/fuzz\0" + label.encode()).digest(length)


def fixed_site(name: str, kind: str, *, keys: str = "") -> SiteIdentity:
    """An identity that is the same in every process, so that a corpus means the same tomorrow."""
    form = {
        "version": 1,
        "name": name,
        "kind": kind,
        "signing_key": fixed(f"{name}{keys}/signing", 32),
        "mlkem_seed": fixed(f"{name}{keys}/mlkem", 64),
        "x25519_key": fixed(f"{name}{keys}/x25519", 32),
    }
    return SiteIdentity.from_bytes(msgspec.msgpack.encode(form))


SITES = (("北岸银行", "bank"), ("仁济医院", "hospital"), ("harbour-bank", "bank"))
RUN, NUMBER = "试运行-1", 3


def plan_document(*, private: bool) -> dict[str, Any]:
    return {
        "name": "fuzz",
        "model": {"source": "path:base-model", "sha256": "ab" * 32},
        "kinds": {"bank": {"labels": ["欺诈", "正常"]}, "hospital": {"labels": ["急诊", "普通"], "metric": "auc"}},
        "lora": {"target_modules": ["query", "value"], "layers": [0, 1]},
        "training": {
            "rounds": 4,
            "steps_per_round": 2,
            "sampling_probability": 0.5,
            "learning_rate": 0.01,
            "head_learning_rate": 0.05,
        },
        "privacy": {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3} if private else {"mechanism": "none"},
        "cohort": {"max_sites": 4, "min_contributors": 2},
    }


def message_targets() -> dict[str, Target]:
    """What sites and coordinator send each other, and what a site keeps."""
    identities = {name: fixed_site(name, kind) for name, kind in SITES}
    roster = Roster.of(identity.public() for identity in identities.values())
    plans = [check_plan(parse_spec(plan_document(private=private))) for private in (False, True)]
    federation = Federation.of(RUN, plans[0], roster)
    return {
        "decode_request": Target(decode_request, requests(plans[0].canonical(), roster.canonical_bytes())),
        "decode_reply": Target(decode_reply, replies()),
        "parse_roster": Target(parse_roster, [roster.canonical_bytes(), one_site_roster()]),
        "plan_from_canonical": Target(without_accountant, [plan.canonical() for plan in plans], document=True),
        **identity_targets(identities["北岸银行"]),
        **box_targets(federation, identities),
        **group_key_targets(federation, identities),
        **ciphertext_targets(federation),
    }


def without_accountant(data: bytes) -> object:
    """All of ``plan_from_canonical`` but the noise calibration, whose cost test_fuzz_findings.py is about."""
    with mock.patch("fedseek.plan_stages.calibrate_stages", lambda epsilon, delta, shapes: (1.0,) * len(shapes)):
        return plan_from_canonical(data)


def one_site_roster() -> bytes:
    return Roster.of([fixed_site("a", "b").public()]).canonical_bytes()


def round_keys(site: str) -> RoundKeys:
    return RoundKeys(site=site, round=2, mask_key=bytes(32), share_key=bytes(32), signature=bytes(64))


def requests(plan: bytes, roster: bytes) -> list[bytes]:
    down = AggregateDown(round=1, epoch=0, survivors=(0, 2), sums=(ScopedSum("global", 2, (b"sum",)),))
    found = [
        PlanOffer(run=RUN, round=1, plan=plan, roster=roster, make_key=True, continues=None),
        KeyRequest(run=RUN, epoch=1),
        ShareRequest(run=RUN, round=2, listed=(0, 1, 1023), keys=(round_keys("北岸银行"),)),
        RoundRequest(
            run=RUN,
            round=3,
            previous=(down,),
            epoch=1,
            envelopes={0: b"sealed"},
            participants=(0, 2),
            boxes={"北岸银行": b"box"},
            next_listed=(0, 1),
            next_keys=(round_keys("北岸银行"),),
        ),
        UnmaskRequest(run=RUN, round=1, survivors=(0, 2), presence={"北岸银行": bytes(64)}),
        ReleaseRequest(run=RUN, previous=(down,), metrics=down, envelopes={}, send_adapter=False),
    ]
    return [encode_message(message) for message in found]


def replies() -> list[bytes]:
    federation, identities, secrets, keys = dealt_round()
    graph = round_graph(federation, NUMBER, federation.roster.names)
    dealt, _ = deal_shares(secrets["北岸银行"], keys, federation, graph, identity=identities["北岸银行"])
    who: dict[str, Any] = {"run": RUN, "site": "北岸银行"}
    digests, signature = {"global": bytes(32)}, bytes(64)
    found = [
        PlanAdmitted(
            **who,
            round=1,
            model_sha256="ab" * 32,
            num_values={"global": 2**40},
            ciphertexts={"global": 3},
            signature=signature,
            keys=(round_keys("北岸银行"), round_keys("北岸银行")),
            group_key=GroupKeySealed(epoch=0, envelopes={"仁济医院": b"sealed"}),
            contributors=(0,),
        ),
        KeysSealed(**who, group_key=GroupKeySealed(epoch=0, envelopes={"仁济医院": b"sealed"})),
        SharesSealed(**who, shares=dealt),
        UpdateReply(
            **who,
            round=1,
            epoch=0,
            digests=digests,
            signature=signature,
            presence=signature,
            update=(ScopedCiphertexts("global", (b"c" * 100, b"")),),
            shares=dealt,
            keys=round_keys("北岸银行"),
        ),
        SharesRevealed(
            **who,
            round=1,
            self_masks={"北岸银行": bytes(16)},
            mask_keys={"仁济医院": bytes(16)},
            signature=signature,
        ),
        ReleaseApproved(**who, digests=digests, statement=b"{}", signature=signature, adapter={"a.json": b"{}"}),
        Refused(**who, code="PlanRefused", rule="拒绝"),
    ]
    return [encode_message(message) for message in found]


def dealt_round() -> tuple[Federation, dict[str, SiteIdentity], dict[str, RoundSecrets], dict[str, RoundKeys]]:
    identities = {name: fixed_site(name, kind) for name, kind in SITES}
    roster = Roster.of(identity.public() for identity in identities.values())
    federation = Federation.of(RUN, check_plan(parse_spec(plan_document(private=False))), roster)
    secrets = {
        name: RoundSecrets(
            mask_seed=fixed(f"{name}/mask", 16),
            self_seed=fixed(f"{name}/self", 16),
            share_key=fixed(f"{name}/share", 32),
        )
        for name, _ in SITES
    }
    keys = {name: advertise(secrets[name], federation, NUMBER, identity=identities[name]) for name, _ in SITES}
    return federation, identities, secrets, keys


def box_targets(federation: Federation, identities: Mapping[str, SiteIdentity]) -> dict[str, Target]:
    """A box from the coordinator, and what a dealer on the roster may have sealed in one."""
    _, _, secrets, keys = dealt_round()
    dealer, me = "北岸银行", "harbour-bank"
    key, bound = _box_key(secrets[dealer], keys[me], federation, NUMBER, sender=dealer, receiver=me)
    shares = {secret: fixed(secret, 16) for secret in ("mask-key", "self-mask")}
    content = msgspec.msgpack.encode({"shares": shares})
    nonce = fixed("nonce", 12)

    def read(box: bytes) -> object:
        return open_box(box, secrets[me], keys[dealer], federation, receiver=keys[me])

    def sealed(inside: bytes) -> bytes:
        return nonce + AESGCM(key).encrypt(nonce, inside, bound)

    return {
        "open_box": Target(read, [sealed(content)]),
        "open_box_inside": Target(lambda data: read(sealed(data)), [content]),
    }


def group_key_targets(federation: Federation, identities: Mapping[str, SiteIdentity]) -> dict[str, Target]:
    """An envelope from the coordinator, and what a site on the roster may have sealed in one."""
    me, maker = identities["仁济医院"], identities["北岸银行"]
    envelope = make_group_key(federation, 0, identity=maker, now=1.7e9).envelopes[me.name]
    key = SecretKey.generate(federation.plan.packing.params)
    content = msgspec.msgpack.encode([1_700_000_000, key.to_bytes()])

    def read(data: bytes) -> object:
        return open_group_key(data, federation, 0, identity=me)

    def sealed(inside: bytes) -> bytes:
        inside = inside[: 1 << 20] or b"\0"  # longer ones, and empty ones, cannot be sealed
        return msgspec.msgpack.encode(
            seal(inside, sender=maker, receiver=me.public(), roster=federation.roster, run=RUN, epoch=0)
        )

    return {
        "open_group_key": Target(read, [envelope]),
        "open_group_key_inside": Target(lambda data: read(sealed(data)), [content], native=True),
    }


def identity_targets(identity: SiteIdentity) -> dict[str, Target]:
    """Files of a site: somebody may have altered them on its disk."""
    key = StorageKey(fixed("storage key", 32))
    memory = Path("/dev/shm")  # noqa: S108
    keep = tempfile.TemporaryDirectory(prefix="fedseek-fuzz-", dir=memory if memory.is_dir() else None)
    folder = Path(keep.name)
    save_identity(identity, folder / "valid", key)
    whole = (folder / "valid").read_bytes()
    (folder / "valid").unlink()

    def load(data: bytes) -> object:
        path = Path(keep.name, "altered")  # the folder goes when the last target that needs it does
        path.touch(mode=0o600)
        path.write_bytes(data)
        return load_identity(path, key)

    def inside(data: bytes) -> object:
        sealed = seal_at_rest(key, data, purpose="site-identity")
        return load(msgspec.msgpack.encode({"version": 1, "salt": None, "sealed": sealed}))

    return {
        "identity_from_bytes": Target(SiteIdentity.from_bytes, [identity.to_bytes()]),
        "open_at_rest": Target(
            lambda data: open_at_rest(key, data, purpose="fuzz"), [seal_at_rest(key, b"secret", purpose="fuzz")]
        ),
        "identity_file": Target(load, [whole]),
        "identity_file_inside": Target(inside, [identity.to_bytes()]),
    }


def ciphertext_targets(federation: Federation) -> dict[str, Target]:
    """SEAL's format. The inner targets put the altered bytes, uncompressed, in a frame that is in order."""
    params = federation.plan.packing.params
    key = SecretKey.generate(params)
    slots = np.arange(params.slot_count, dtype=np.uint64)
    fresh = encrypt_slots(key, slots)[0]
    loaded = load_ciphertext(params, fresh, form=CiphertextForm.FRESH)
    summed = save_ciphertext(loaded)
    sizes = {form: _content_size(params, form) for form in CiphertextForm}

    size, inner = sizes[CiphertextForm.FRESH], _inner_headers(params, CiphertextForm.FRESH)
    stored = framed(inflated(fresh, size), size, fresh[4])
    found = {"open_frame": Target(partial(open_frame, content_size=size, inner=inner), [fresh, stored])}
    for form, whole in ((CiphertextForm.FRESH, fresh), (CiphertextForm.SUMMED, summed)):
        size, minor = sizes[form], whole[4]
        read = partial(load_ciphertext, params, form=form)

        def inside(data: bytes, read: Any = read, size: int = size, minor: int = minor) -> object:
            return read(framed(data, size, minor))

        found[f"load_{form.value}"] = Target(read, [whole], native=True)
        found[f"load_{form.value}_inside"] = Target(inside, [inflated(whole, size)], native=True)
    return found
