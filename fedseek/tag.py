"""Tag: two numbers in front of a site's slots by which every site recognises a sum. Run by a site, before masking.

A tag is linear, so the tags of a sum are the sum of the tags; and each site adds a pad of its own, so they fit the
sum of exactly the sites that were announced, each once. Whoever holds no group key and adds, drops, repeats, scales or
swaps anything has to guess: both tags fit with probability 1/t^2, below 2^-88.

What it does not stop: whoever holds the group key. A site that colludes with the coordinator can make a sum that
passes, as it could make a false update of its own.

Source: S. Agrawal, D. Boneh, "Homomorphic MACs: MAC-based integrity for network coding", ACNS 2009, section 3, over
Z_t instead of a byte field, with a pad for each sender in place of one for each vector.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedseek.cohort import Federation
from fedseek.errors import Tampered
from fedseek.he.keys import SecretKey
from fedseek.secagg.mac import NUM_TAGS, mac, pad
from fedseek.secagg.stream import Slots

_DOMAIN = b"fedseek/tag/v1"


def tag_key(group_key: SecretKey, federation: Federation, number: int, scope: str) -> bytes:
    """The key of the tags of one scope in one round, 32 bytes; only holders of the group key can make it."""
    return group_key.derive(_DOMAIN + federation.bind_round(number, scope.encode()))


def add_tags(slots: Slots, key: bytes, *, site: str, modulus: int) -> Slots:
    """The same slots with this site's tags in the first ``NUM_TAGS``, which must be zero.

    Args:
        slots: an encoded update, shape (n,), each below ``modulus``.
        key: from ``tag_key``.
        site: whose update it is.
        modulus: t of the plan.

    Raises:
        ValueError: the places of the tags are taken.
    """
    if slots[:NUM_TAGS].any():
        raise ValueError(f"tags: the first {NUM_TAGS} slots are {slots[:NUM_TAGS].tolist()}; wanted zeros")
    tagged = slots.copy()
    tagged[:NUM_TAGS] = _tags(slots, key, [site], modulus=modulus)
    return tagged


def check_tags(slots: Slots, key: bytes, *, survivors: Sequence[str], modulus: int, what: str) -> None:
    """Check that decrypted slots are the sum of exactly the updates that ``survivors`` tagged. Run by each site.

    Args:
        slots: of the decrypted sum, all of them, shape (n,).
        key: from ``tag_key``.
        survivors: the sites announced, members of the scope.
        modulus: t of the plan.
        what: named in the error.

    Raises:
        Tampered: they are not.
    """
    if tuple(slots[:NUM_TAGS].tolist()) != _tags(slots, key, survivors, modulus=modulus):
        raise Tampered(
            f"{what}: its tags are not those of the {len(survivors)} sites announced ({', '.join(survivors[:5])}"
            f"{', ...' if len(survivors) > 5 else ''})",
            hint="the coordinator altered the sum or announced other sites than it added, or a site sent a false "
            "update; the sum is not applied",
        )


def _tags(slots: Slots, key: bytes, sites: Sequence[str], *, modulus: int) -> tuple[int, ...]:
    """The linear part over the slots behind the tags, and the pad of each site.

    A stream begins with the shorter one and tags are linear: what the first slots add is taken off again, so that no
    copy of the vector is needed to put zeros there.
    """
    whole, first = mac(slots, key, modulus), mac(slots[:NUM_TAGS], key, modulus)
    pads = [pad(key, site.encode(), modulus) for site in sites]
    return tuple((total - own + sum(added)) % modulus for total, own, *added in zip(whole, first, *pads, strict=True))
