"""What reads bytes of a stranger, each as a function of bytes; and how such bytes are made.

A target may return or raise a ``FedseekError``. Anything else, or more than a second of CPU, is a finding. Where a
signature or a cipher would turn every altered input away at the door, a second target signs or seals the altered bytes
properly: that is what a hostile site on the roster can do.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from seal_inputs import framed, inflated

from fedseek.cohort import Federation, round_graph
from fedseek.deal import RoundSecrets, _box_key, advertise, deal_shares, open_box
from fedseek.errors import FedseekError, InvalidPlan
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

MAX_CPU_SECONDS = 1.0
CORPUS = Path(__file__).resolve().parent / "corpus"


@dataclass(frozen=True, slots=True)
class Target:
    """One way in.

    Attributes:
        read: takes the bytes of a stranger.
        valid: inputs it takes, to be altered.
        document: whether inputs are JSON, and altered as such too.
        native: whether the bytes reach C++ that may end the process: to be read in a child process.
        max_cpu: seconds of CPU an input may cost.
    """

    read: Callable[[bytes], object]
    valid: Sequence[bytes]
    document: bool = False
    native: bool = False
    max_cpu: float = MAX_CPU_SECONDS


class Finding(AssertionError):
    """A target did something else than to take its input or to refuse it."""


def outcome(target: Target, data: bytes) -> str:
    """ "taken", or the class of the refusal and what kind of text it has.

    Raises:
        Finding: another exception, or too slow.
    """
    # A full collection walks everything the process ever imported: 0.3 s with torch and Flower loaded, more after some
    # thousand tests, and charged to whichever input it falls on. It belongs to the process, so it waits.
    gc.disable()
    started = time.process_time()
    try:
        target.read(data)
        told = "taken"
    except FedseekError as error:
        told = f"{error.code}: {shape_of(error)}"
    except Exception as error:
        raise Finding(f"{error!r} from {data[:200]!r} ({len(data)} bytes)") from error
    finally:
        seconds = time.process_time() - started
        gc.enable()
    if seconds > target.max_cpu:
        raise Finding(f"{seconds:.1f} s of CPU for {data[:200]!r} ({len(data)} bytes)")
    return told


def shape_of(error: FedseekError) -> str:
    """The text of an error without the values it quotes, so that two inputs refused by one rule look alike."""
    text = error.problems[0] if isinstance(error, InvalidPlan) else error.message
    words = [word for word in text.split() if word.isascii() and word.isalpha()]
    return " ".join(words)[:120]


# Altering


def mutate(rng: random.Random, target: Target) -> bytes:
    """A valid input with one to four things done to it; now and then bytes out of nothing."""
    if rng.random() < 0.03:
        return rng.randbytes(rng.randrange(200))
    data = rng.choice(target.valid)
    if target.document and rng.random() < 0.7:
        return mutate_json(rng, data)
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(MUTATIONS)(rng, data, target)
    return data


def flip_bits(rng: random.Random, data: bytes, _target: Target) -> bytes:
    altered = bytearray(data)
    for _ in range(rng.randint(1, 8) if altered else 0):
        altered[place(rng, altered)] ^= 1 << rng.randrange(8)
    return bytes(altered)


def place(rng: random.Random, data: bytes | bytearray) -> int:
    """Where to alter: half of the time near the front, where lengths and types are."""
    return rng.randrange(min(len(data), 64) if rng.random() < 0.5 else len(data))


def cut(rng: random.Random, data: bytes, _target: Target) -> bytes:
    if not data:
        return data
    start = place(rng, data)
    return data[:start] if rng.random() < 0.5 else data[:start] + data[start + rng.randint(1, 32) :]


def splice(rng: random.Random, data: bytes, target: Target) -> bytes:
    other = rng.choice(target.valid)
    start, end = sorted((rng.randrange(len(other) + 1), rng.randrange(len(other) + 1)))
    at = rng.randrange(len(data) + 1)
    return data[:at] + other[start:end] + data[at if rng.random() < 0.5 else at + end - start :]


def insert(rng: random.Random, data: bytes, _target: Target) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TELLING) + data[at if rng.random() < 0.5 else at + 1 :]


def nest(rng: random.Random, data: bytes, _target: Target) -> bytes:
    """Deep nesting, which has ended many a parser."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([b"\x91", b"\x81\xa1a", b"[", b'{"a":']) * rng.choice([10, 1000, 20_000]) + data[at:]


# MessagePack heads and lengths, numbers at an edge, broken UTF-8, JSON that parsers disagree about
TELLING = (
    b"\xc0", b"\xc1", b"\xc2", b"\xc3", b"\xc4\xff", b"\xc6\xff\xff\xff\xff", b"\xc7\x04\x01", b"\xcb\x7f\xf8" + bytes(6),
    b"\xcc\x01", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7), b"\xd6\xff" + bytes(4), b"\xd9\xff", b"\xdb\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xff", b"\xa4\xff\xfe\xfd\xfc", b"\xa3\xed\xa0\x80", bytes(64),
    b"NaN", b"1e999", b"-0", b"\\ud800", b'"', b"null", b"\x00",
)  # fmt: skip
MUTATIONS = (flip_bits, flip_bits, cut, splice, insert, insert, nest)

ODD_VALUES: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 24, 50, 1023, 1024, 1025, 2**31, 2**53, 2**63, 2**64, 10**30, 0.0, -0.0, 1e-300, 1e308, 0.5, 1e-3,
    0.999999, True, False, None, "", "a", "\u0000", "\u202e", "e\u0301", "行" * 300, [], {}, [[]], {"a": 1}, "dp-sgd", "auc",
    "none", 8.0, 100_000, 10_000,
)  # fmt: skip


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """A document with some of its values replaced, in canonical form again: it gets past the first check."""
    document = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        inner = document
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(inner[key], dict | list) and rng.random() < 0.8:
                inner = inner[key]
                continue
            if rng.random() < 0.1 and isinstance(inner, dict):
                del inner[key]
            else:
                inner[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            break
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# The targets


def fixed(label: str, length: int) -> bytes:
    return hashlib.shake_256(b"fedseek/fuzz\0" + label.encode()).digest(length)


def fixed_site(name: str, kind: str) -> SiteIdentity:
    """An identity that is the same in every process, so that a corpus means the same tomorrow."""
    form = {
        "version": 1,
        "name": name,
        "kind": kind,
        "signing_key": fixed(f"{name}/signing", 32),
        "mlkem_seed": fixed(f"{name}/mlkem", 64),
        "x25519_key": fixed(f"{name}/x25519", 32),
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


@cache
def targets() -> Mapping[str, Target]:
    """Every target by name."""
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
    with mock.patch("fedseek.plan.calibrate_noise_multiplier", return_value=1.0):
        return plan_from_canonical(data)


def one_site_roster() -> bytes:
    return Roster.of([fixed_site("a", "b").public()]).canonical_bytes()


def round_keys(site: str) -> RoundKeys:
    return RoundKeys(site=site, round=2, mask_key=bytes(32), share_key=bytes(32), signature=bytes(64))


def requests(plan: bytes, roster: bytes) -> list[bytes]:
    down = AggregateDown(round=1, epoch=0, survivors=(0, 2), sums=(ScopedSum("global", 2, (b"sum",)),))
    found = [
        PlanOffer(run=RUN, round=1, plan=plan, roster=roster, make_key=True),
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
    # named after its file in the corpus
    found = {"check_frame": Target(partial(open_frame, content_size=size, inner=inner), [fresh, stored])}
    for form, whole in ((CiphertextForm.FRESH, fresh), (CiphertextForm.SUMMED, summed)):
        size, minor = sizes[form], whole[4]
        read = partial(load_ciphertext, params, form=form)

        def inside(data: bytes, read: Any = read, size: int = size, minor: int = minor) -> object:
            return read(framed(data, size, minor))

        found[f"load_{form.value}"] = Target(read, [whole], native=True)
        found[f"load_{form.value}_inside"] = Target(inside, [inflated(whole, size)], native=True)
    return found
