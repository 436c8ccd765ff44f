"""Mask: add numbers to a site's slots that cancel in the sum, so that a single update opens for nobody. Run by a site.

Slots x of site u become, modulo the plain modulus t,

    adapter   y_u = x_u + s_u + sum over neighbours v after u of p_uv - sum over neighbours v before u of p_uv
    head      y_u = x_u       + sum over its kind v after u of h_uv   - sum over its kind v before u of h_uv

with the self mask s_u and the pairwise masks p_uv = p_vu (Bonawitz et al., CCS 2017, section 4.0.2; over a sparse graph:
Bell et al., CCS 2020, algorithm 2). The masks h of a head come from keys that nobody shares out: they cancel if every
site of the kind that took part is in the sum, and never otherwise (docs/adr/0012). Masks are uniform modulo t, so y_u
alone is uniform too, whatever x_u is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedseek.cohort import Federation, RoundGraph
from fedseek.deal import RoundSecrets, head_seed, mask_private_key, pairwise_seed
from fedseek.messages import RoundKeys
from fedseek.plan import GLOBAL_SCOPE
from fedseek.secagg.stream import Slots, add_stream


def mask_slots(
    encoded: Mapping[str, Slots],
    secrets: RoundSecrets,
    keys: Mapping[str, RoundKeys],
    federation: Federation,
    graph: RoundGraph,
    *,
    participants: Sequence[str],
    me: str,
) -> dict[str, Slots]:
    """Mask one site's update. The same arguments give the same result: nothing is drawn here.

    Args:
        encoded: tagged slots by scope, shape (n,) each, whole ciphertexts, below t; a head only where
            ``federation.summed_scopes(participants)`` has it.
        secrets: of this site for the round. Never used for a second update.
        keys: checked round keys by site, of this site's peers on the graph.
        federation: the run.
        graph: of the round.
        participants: who masks in this round.
        me: this site.

    Returns:
        Masked slots by scope; the arguments are not changed.

    Raises:
        WrongKey: a peer's key is of low order.
        ValueError: a head that this site would send alone, without a mask.

    Cost: 7 ns a slot for the self mask and for each neighbour.
    """
    modulus, there = federation.plan.packing.params.plain_modulus, set(participants)
    private_key = mask_private_key(secrets.mask_seed)
    masked = {}
    for scope, slots in encoded.items():
        total = slots.copy()
        if scope == GLOBAL_SCOPE:
            add_self_mask(total, secrets.self_seed, modulus=modulus)
            around = [name for name in graph.neighbours[me] if name in there]
            seeds = {name: pairwise_seed(private_key, keys[name], federation, me=me) for name in around}
        else:
            kin = [name for name in graph.kin[me] if name in there]
            seeds = {name: head_seed(secrets, keys[name], federation, me=me) for name in kin}
            if not seeds:
                raise ValueError(f"scope {scope!r}: no other site to mask with")
        for name, seed in seeds.items():
            add_pairwise_mask(total, seed, (me, name), federation, modulus=modulus)
        masked[scope] = total
    return masked


def add_self_mask(total: Slots, seed: bytes, *, modulus: int) -> None:
    """Add the self mask of ``seed`` to ``total``, in place, modulo t."""
    add_stream(total, seed, b"self", modulus)


def add_pairwise_mask(total: Slots, seed: bytes, pair: Sequence[str], federation: Federation, *, modulus: int) -> None:
    """Add the pairwise mask as the first of ``pair`` carries it to ``total``, in place: the second carries its negative."""
    carrier, peer = pair
    names = federation.roster.names
    add_stream(total, seed, b"pair", modulus, subtract=names.index(carrier) > names.index(peer))
