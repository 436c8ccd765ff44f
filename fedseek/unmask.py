"""Unmask: from the shares that sites revealed, rebuild the total mask and take it off the sum, still encrypted.

Run by the coordinator. What it learns is the mask of the sum and nothing of the sum: that is under the group key, which
it does not hold. Of a survivor it learns the self mask, of a site that vanished the mask key, of none both.

Source: K. Bonawitz et al., CCS 2017, figure 4, round 4, the server's part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedseek.aggregate import Aggregate
from fedseek.cohort import Federation, RoundGraph
from fedseek.deal import mask_private_key, pairwise_seed, secret_digest, share_digest
from fedseek.errors import CohortTooSmall, Malformed
from fedseek.he.ciphertext import CiphertextForm, load_ciphertext, save_ciphertext, subtract_slots
from fedseek.he.sealfile import scratch
from fedseek.identity.signing import CONTEXT_UNMASK, verify
from fedseek.mask import add_pairwise_mask, add_self_mask
from fedseek.messages import MASK_KEY, SELF_MASK, RoundKeys, SharesDealt, SharesRevealed
from fedseek.plan import GLOBAL_SCOPE
from fedseek.reveal import revealed_message
from fedseek.secagg.shamir import combine
from fedseek.secagg.stream import Slots


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What the coordinator holds of a masked round.

    Attributes:
        graph: who holds whose shares.
        keys: round keys of every participant.
        dealt: what every participant dealt.
        participants: who masked with whom, in roster order.
        survivors: whose updates are in the sum, in roster order.
    """

    graph: RoundGraph
    keys: Mapping[str, RoundKeys] = field(repr=False)
    dealt: Mapping[str, SharesDealt] = field(repr=False)
    participants: Sequence[str]
    survivors: Sequence[str]


def check_revealed(revealed: SharesRevealed, record: RoundRecord, federation: Federation) -> SharesRevealed:
    """Check what one site revealed, and keep the shares that are what their dealers dealt.

    Raises:
        WrongKey: not signed by the site, or for another set of participants or survivors.
        Malformed: from a site that did not survive, shares it was not asked for, or both kinds of one dealer.
    """
    number, site = record.graph.number, revealed.site
    message = revealed_message(
        federation, number, record.participants, record.survivors, revealed.self_masks, revealed.mask_keys
    )
    verify(federation.roster.entry(site), CONTEXT_UNMASK, message, revealed.signature)
    if site not in record.survivors:
        raise Malformed(f"site {site!r} revealed shares of round {number} and was not asked: it did not survive it")
    around = set(record.graph.holders(site)) & set(record.participants)
    if set(revealed.self_masks) != around & set(record.survivors) or set(revealed.mask_keys) != around - set(
        record.survivors
    ):
        raise Malformed(f"site {site!r} revealed other shares than it was asked for in round {number}")

    def is_true(dealer: str, secret: str, share: bytes) -> bool:
        digest = share_digest(federation, number, dealer=dealer, holder=site, secret=secret, share=share)
        return digest == record.dealt[dealer].share_digests[site].get(secret)

    self_masks = {dealer: share for dealer, share in revealed.self_masks.items() if is_true(dealer, SELF_MASK, share)}
    mask_keys = {dealer: share for dealer, share in revealed.mask_keys.items() if is_true(dealer, MASK_KEY, share)}
    return SharesRevealed(
        run=revealed.run,
        site=site,
        round=number,
        self_masks=self_masks,
        mask_keys=mask_keys,
        signature=revealed.signature,
    )


def rebuild_seeds(
    revealed: Mapping[str, SharesRevealed], record: RoundRecord, federation: Federation
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Put the secrets that are needed together again.

    Args:
        revealed: by site, as ``check_revealed`` left them.
        record: of the round.
        federation: the run.

    Returns:
        Self mask seeds by survivor; mask key seeds by participant that vanished.

    Raises:
        CohortTooSmall: too few true shares of a secret; nothing is unmasked.
        Malformed: the shares of a dealer do not make the secret it vouched for, or not the mask key it announced; names
            it.
    """
    self_seeds = {dealer: _rebuild(dealer, SELF_MASK, record, federation, revealed) for dealer in record.survivors}
    alive = set(record.survivors)
    vanished = [name for name in record.participants if name not in alive]
    mask_seeds = {dealer: _rebuild(dealer, MASK_KEY, record, federation, revealed) for dealer in vanished}
    for dealer, seed in mask_seeds.items():
        if mask_private_key(seed).public_key().public_bytes_raw() != record.keys[dealer].mask_key:
            raise Malformed(
                f"round {record.graph.number}: site {dealer!r} dealt shares of another mask key than it announced",
                hint="the round is given up; leave that site out if it happens again",
            )
    return self_seeds, mask_seeds


def total_mask(
    self_seeds: Mapping[str, bytes],
    mask_seeds: Mapping[str, bytes],
    record: RoundRecord,
    federation: Federation,
    *,
    num_slots: int,
) -> Slots:
    """The mask that the survivors' sum of the adapter carries, shape (num_slots,).

    Every survivor's self mask, and between each survivor and each neighbour that vanished the pairwise mask that found
    no counterpart. One running vector: memory does not grow with the number of sites.

    Raises:
        WrongKey: a round key is of low order.
    """
    modulus = federation.plan.packing.params.plain_modulus
    total = np.zeros(num_slots, dtype=np.uint64)
    for name in record.survivors:
        add_self_mask(total, self_seeds[name], modulus=modulus)
    for gone, mask_seed in mask_seeds.items():
        private_key = mask_private_key(mask_seed)
        for name in sorted(set(record.graph.neighbours[gone]) & set(record.survivors)):
            seed = pairwise_seed(private_key, record.keys[name], federation, me=gone)
            add_pairwise_mask(total, seed, (name, gone), federation, modulus=modulus)
    return total


def unmask_sum(
    aggregate: Aggregate, revealed: Mapping[str, SharesRevealed], record: RoundRecord, federation: Federation
) -> None:
    """Take the mask off the adapter's running sum, in place and under encryption. Heads carry none when they are whole.

    Raises:
        CohortTooSmall, Malformed: as ``rebuild_seeds``; the sum is as it was.
    """
    self_seeds, mask_seeds = rebuild_seeds(revealed, record, federation)
    params, sums, slot_count = aggregate.params, aggregate.sums[GLOBAL_SCOPE], aggregate.params.slot_count
    mask = total_mask(self_seeds, mask_seeds, record, federation, num_slots=len(sums) * slot_count)
    with scratch() as through:
        for place, data in enumerate(sums):
            ciphertext = load_ciphertext(params, data, form=CiphertextForm.SUMMED, through=through)
            subtract_slots(params, ciphertext, mask[place * slot_count : (place + 1) * slot_count])
            sums[place] = save_ciphertext(ciphertext, through)


def _rebuild(
    dealer: str,
    secret: str,
    record: RoundRecord,
    federation: Federation,
    revealed: Mapping[str, SharesRevealed],
) -> bytes:
    number, graph = record.graph.number, record.graph
    shares = {
        place: share
        for place, holder in enumerate(graph.holders(dealer))
        if holder in revealed and (share := _share_of(revealed[holder], dealer, secret)) is not None
    }
    if len(shares) < graph.threshold:
        raise CohortTooSmall(
            f"round {number}: {len(shares)} sites revealed a true share of {secret!r} of site {dealer!r}, "
            f"wanted {graph.threshold}",
            hint="the round is given up; the next one may go on",
        )
    seed = combine(shares, threshold=graph.threshold)
    if (
        secret_digest(federation, number, dealer=dealer, secret=secret, seed=seed)
        != record.dealt[dealer].secret_digests[secret]
    ):
        raise Malformed(
            f"round {number}: site {dealer!r} dealt shares of {secret!r} that do not make the secret it vouched for",
            hint="the round is given up; leave that site out if it happens again",
        )
    return seed


def _share_of(revealed: SharesRevealed, dealer: str, secret: str) -> bytes | None:
    return (revealed.mask_keys if secret == MASK_KEY else revealed.self_masks).get(dealer)
