"""Deal: a site's secrets of a round, their public halves, and shares of them for its neighbours. Run by a site.

Three secrets a round: the *mask key*, from which pairwise masks of the adapter are agreed; the *self mask*; and the
*share key*, which opens what neighbours deal to this site and from which the masks of heads are agreed. The first two
are shared out by Shamir, so that the sum can be unmasked when a site vanishes; the third never leaves the site.
16-byte seeds: 128 bits, the strength of X25519 itself.

Source: K. Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017, figure 4,
rounds 0 (AdvertiseKeys) and 1 (ShareKeys), with signatures of the sites as in its section 6.2.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedseek.cohort import Federation, RoundGraph
from fedseek.errors import Malformed, WrongKey, WrongRound
from fedseek.identity.signing import CONTEXT_ROUND_KEYS, CONTEXT_SHARES, join_fields, sign, verify
from fedseek.messages import MASK_KEY, SELF_MASK, RoundKeys, SharesDealt
from fedseek.secagg.shamir import split
from fedseek.secagg.stream import SEED_BYTES

if TYPE_CHECKING:  # the coordinator loads this module and must not load private identities
    from fedseek.identity.keys import SiteIdentity

_MASK_KEY_DOMAIN = b"fedseek/mask-key/v1"
_PAIR_DOMAIN = b"fedseek/pairwise-mask/v1"
_HEAD_DOMAIN = b"fedseek/head-mask/v1"
_BOX_DOMAIN = b"fedseek/share-box/v1"
_SHARE_DOMAIN = b"fedseek/share-digest/v1"
_SECRET_DOMAIN = b"fedseek/secret-digest/v1"
_NONCE_BYTES = 12


class RoundSecrets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a site must not let out before the round is unmasked, and then only one half of; ``repr`` is redacted.

    Attributes:
        mask_seed: of the X25519 key that pairwise masks come from, 16 bytes.
        self_seed: of the self mask, 16 bytes.
        share_key: X25519 private key of share boxes and of heads' masks, 32 bytes.
    """

    mask_seed: bytes
    self_seed: bytes
    share_key: bytes

    def __repr__(self) -> str:
        return "RoundSecrets(<redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:  # msgspec's own, which rich tracebacks use, shows every field
        return []


class HeldShares(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A holder's shares of one dealer's two secrets, by secret; ``repr`` is redacted."""

    shares: dict[str, bytes]

    def __repr__(self) -> str:
        return "HeldShares(<redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


def draw_secrets() -> RoundSecrets:
    """Fresh secrets for one round, from the operating system's entropy. Never for two rounds: a mask hides one update."""
    return RoundSecrets(os.urandom(SEED_BYTES), os.urandom(SEED_BYTES), os.urandom(32))


def mask_private_key(mask_seed: bytes) -> X25519PrivateKey:
    """The X25519 key of a 16-byte seed; a seed is one Shamir share long."""
    return X25519PrivateKey.from_private_bytes(_derive(mask_seed, _MASK_KEY_DOMAIN, 32))


def advertise(secrets: RoundSecrets, federation: Federation, number: int, *, identity: SiteIdentity) -> RoundKeys:
    """The public keys of a round, signed together with run, plan and roster."""
    mask_key = mask_private_key(secrets.mask_seed).public_key().public_bytes_raw()
    share_key = X25519PrivateKey.from_private_bytes(secrets.share_key).public_key().public_bytes_raw()
    signed = federation.bind_round(number, identity.name.encode(), mask_key, share_key)
    return RoundKeys(
        site=identity.name,
        round=number,
        mask_key=mask_key,
        share_key=share_key,
        signature=sign(identity, CONTEXT_ROUND_KEYS, signed),
    )


def check_keys(keys: RoundKeys, federation: Federation, number: int) -> None:
    """Check that the site these keys name made them, for this round of this run, plan and roster. Run by anybody.

    Since every site signs the roster with its keys, a coordinator that shows two sites two rosters is found out here.

    Raises:
        WrongRound: keys of another round.
        WrongKey: not signed by that site's identity, or not for this run, plan and roster; or of low order. Whoever
            takes keys in refuses those, or one site could make all its neighbours fail.
    """
    if keys.round != number:
        raise WrongRound(f"round keys of site {keys.site!r}: got those of round {keys.round}, wanted {number}")
    signed = federation.bind_round(number, keys.site.encode(), keys.mask_key, keys.share_key)
    verify(federation.roster.entry(keys.site), CONTEXT_ROUND_KEYS, signed, keys.signature)
    probe = X25519PrivateKey.generate()  # any will do: every X25519 scalar is a multiple of 8, the largest low order
    for public_key in (keys.mask_key, keys.share_key):
        _agree(probe, public_key, keys.site)


def deal_shares(
    secrets: RoundSecrets,
    keys: Mapping[str, RoundKeys],
    federation: Federation,
    graph: RoundGraph,
    *,
    identity: SiteIdentity,
) -> tuple[SharesDealt, HeldShares]:
    """Share the secrets of a round out to this site's neighbours. Draws fresh polynomials: deal once, keep the result.

    Args:
        secrets: of this site, for the graph's round.
        keys: checked round keys, by site; of every neighbour.
        federation: what all is bound to.
        graph: of the round.
        identity: of this site.

    Returns:
        What goes to the coordinator, and the shares this site holds of its own secrets.

    Raises:
        WrongKey: a neighbour's share key is of low order.
    """
    me, holders = identity.name, graph.holders(identity.name)
    shared = {MASK_KEY: secrets.mask_seed, SELF_MASK: secrets.self_seed}
    split_up = {name: split(seed, threshold=graph.threshold, holders=len(holders)) for name, seed in shared.items()}
    held = {holder: {name: shares[place] for name, shares in split_up.items()} for place, holder in enumerate(holders)}
    boxes = {
        holder: _seal_box(shares, secrets, federation, graph.number, sender=me, receiver=keys[holder])
        for holder, shares in held.items()
        if holder != me
    }
    share_digests = {
        holder: {
            name: share_digest(federation, graph.number, dealer=me, holder=holder, secret=name, share=share)
            for name, share in shares.items()
        }
        for holder, shares in held.items()
    }
    secret_digests = {
        name: secret_digest(federation, graph.number, dealer=me, secret=name, seed=seed)
        for name, seed in shared.items()
    }
    dealt = SharesDealt(
        round=graph.number,
        boxes=boxes,
        share_digests=share_digests,
        secret_digests=secret_digests,
        signature=sign(
            identity, CONTEXT_SHARES, _dealt_message(federation, me, graph.number, boxes, share_digests, secret_digests)
        ),
    )
    return dealt, HeldShares(held[me])


def check_dealt(dealt: SharesDealt, federation: Federation, graph: RoundGraph, *, dealer: str) -> None:
    """Check, without reading them, that these are shares of ``dealer`` for exactly its holders. Run by the coordinator.

    Raises:
        WrongRound: for another round.
        WrongKey: not signed by the dealer.
        Malformed: not one box for each neighbour, or not one digest for each secret and holder.
    """
    if dealt.round != graph.number:
        raise WrongRound(f"shares of site {dealer!r}: got those of round {dealt.round}, wanted {graph.number}")
    message = _dealt_message(federation, dealer, dealt.round, dealt.boxes, dealt.share_digests, dealt.secret_digests)
    entry = federation.roster.entry(dealer)
    verify(entry, CONTEXT_SHARES, message, dealt.signature)
    wanted = {MASK_KEY, SELF_MASK}
    complete = (
        set(dealt.boxes) == set(graph.neighbours[dealer])
        and set(dealt.share_digests) == set(graph.holders(dealer))
        and all(set(digests) == wanted for digests in (dealt.secret_digests, *dealt.share_digests.values()))
    )
    if not complete:
        raise Malformed(
            f"shares of site {dealer!r}: not one of each secret for each of its {len(graph.holders(dealer))} holders"
        )


def open_box(
    box: bytes, secrets: RoundSecrets, dealer: RoundKeys, federation: Federation, *, receiver: RoundKeys
) -> HeldShares:
    """Open the shares that ``dealer`` sealed to this site.

    Args:
        box: as it came from the coordinator.
        secrets: of this site, for the dealer's round.
        dealer: its checked round keys.
        federation: what the box is bound to.
        receiver: this site's own round keys.

    Raises:
        WrongKey: sealed by or for somebody else, for another round, run, plan or roster, or altered.
        Malformed: what is inside is not one share of each of the dealer's secrets.
    """
    key, bound = _box_key(secrets, dealer, federation, dealer.round, sender=dealer.site, receiver=receiver.site)
    try:
        content = AESGCM(key).decrypt(box[:_NONCE_BYTES], box[_NONCE_BYTES:], bound)
    except (InvalidTag, ValueError):  # ValueError: shorter than a nonce
        raise WrongKey(
            f"shares of site {dealer.site!r} for site {receiver.site!r}, round {dealer.round}: the box does not open",
            hint="it was altered, or sealed for another site, round, run, plan or roster",
        ) from None
    try:
        held = msgspec.msgpack.decode(content, type=HeldShares)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # msgspec lets the second one through
        raise Malformed(f"shares of site {dealer.site!r}: {error}") from None
    if set(held.shares) != {MASK_KEY, SELF_MASK} or any(len(share) != SEED_BYTES for share in held.shares.values()):
        raise Malformed(f"shares of site {dealer.site!r}: not one share of {SEED_BYTES} bytes for each of its secrets")
    return held


def pairwise_seed(private_key: X25519PrivateKey, peer: RoundKeys, federation: Federation, *, me: str) -> bytes:
    """The seed of the adapter's mask between two sites, 16 bytes; either mask key gives the same.

    Raises:
        WrongKey: the peer's key is of low order.
    """
    pair = sorted((me.encode(), peer.site.encode()))
    shared = _agree(private_key, peer.mask_key, peer.site)
    return _derive(shared, join_fields(_PAIR_DOMAIN, federation.bind_round(peer.round, *pair)), SEED_BYTES)


def head_seed(secrets: RoundSecrets, peer: RoundKeys, federation: Federation, *, me: str) -> bytes:
    """The seed of a head's mask between two sites of a kind, 16 bytes; either share key gives the same.

    Share keys are never shared out, so no story about who survived can open it; nor can it be taken off when one of
    the two vanishes.

    Raises:
        WrongKey: the peer's key is of low order.
    """
    pair = sorted((me.encode(), peer.site.encode()))
    shared = _agree(X25519PrivateKey.from_private_bytes(secrets.share_key), peer.share_key, peer.site)
    return _derive(shared, join_fields(_HEAD_DOMAIN, federation.bind_round(peer.round, *pair)), SEED_BYTES)


def share_digest(federation: Federation, number: int, *, dealer: str, holder: str, secret: str, share: bytes) -> bytes:
    """Commitment to one share: 128 bits of entropy under a domain of its own, so it hides as a random oracle does."""
    fields = (dealer.encode(), holder.encode(), secret.encode(), share)
    return hashlib.sha256(join_fields(_SHARE_DOMAIN, federation.bind_round(number, *fields))).digest()


def secret_digest(federation: Federation, number: int, *, dealer: str, secret: str, seed: bytes) -> bytes:
    """Commitment to one seed; shows the coordinator whether what it rebuilt is what was shared out."""
    fields = (dealer.encode(), secret.encode(), seed)
    return hashlib.sha256(join_fields(_SECRET_DOMAIN, federation.bind_round(number, *fields))).digest()


def _seal_box(
    shares: Mapping[str, bytes],
    secrets: RoundSecrets,
    federation: Federation,
    number: int,
    *,
    sender: str,
    receiver: RoundKeys,
) -> bytes:
    key, bound = _box_key(secrets, receiver, federation, number, sender=sender, receiver=receiver.site)
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, msgspec.msgpack.encode(HeldShares(dict(shares))), bound)


def _box_key(
    secrets: RoundSecrets, peer: RoundKeys, federation: Federation, number: int, *, sender: str, receiver: str
) -> tuple[bytes, bytes]:
    """AES-256-GCM key between two sites, one direction, one round; and what the box is bound to."""
    bound = join_fields(_BOX_DOMAIN, federation.bind_round(number, sender.encode(), receiver.encode()))
    shared = _agree(X25519PrivateKey.from_private_bytes(secrets.share_key), peer.share_key, peer.site)
    return _derive(shared, bound, 32), bound


def _agree(private_key: X25519PrivateKey, public_key: bytes, peer: str) -> bytes:
    try:
        return private_key.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:  # RFC 7748, section 6.1: an all-zero result means a point of low order
        raise WrongKey(f"round key of site {peer!r} is of low order: no secret can be agreed with it") from None


def _derive(secret: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=info).derive(secret)


def _dealt_message(
    federation: Federation,
    dealer: str,
    number: int,
    boxes: Mapping[str, bytes],
    share_digests: Mapping[str, Mapping[str, bytes]],
    secret_digests: Mapping[str, bytes],
) -> bytes:
    fields = [dealer.encode()]
    for holder in sorted(share_digests):
        fields += [holder.encode(), hashlib.sha256(boxes.get(holder, b"")).digest()]
        fields += [
            part for name in sorted(share_digests[holder]) for part in (name.encode(), share_digests[holder][name])
        ]
    fields += [part for name in sorted(secret_digests) for part in (name.encode(), secret_digests[name])]
    return federation.bind_round(number, *fields)
