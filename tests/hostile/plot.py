"""A coordinator and a site that work together: what the two know, and what they make of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from attacks import GLOBAL, as_sum, federation, group_key, holdings, replies, state

from fedseek.cohort import round_graph
from fedseek.deal import head_seed, mask_private_key, pairwise_seed
from fedseek.encode import SummedUpdate, decode_sum
from fedseek.groupkey import GroupKey
from fedseek.he.keys import decrypt_slots
from fedseek.mask import add_pairwise_mask, add_self_mask
from fedseek.messages import (
    MASK_KEY,
    SELF_MASK,
    SharesRevealed,
    UpdateReply,
)
from fedseek.secagg.shamir import combine
from fedseek.tag import check_tags, tag_key
from fedseek_site.state import SiteState


@dataclass
class Plot:
    """What the coordinator and ``colluder`` know of round ``number`` together. Made before the colluder answers."""

    cohort: Any
    colluder: str
    number: int = 1
    own: SiteState = field(init=False)
    keys: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.own = state(self.cohort, self.colluder)
        self.keys = dict(holdings(self.cohort).pipeline.keys[self.number])

    @property
    def key(self) -> Any:
        """The group key; the colluder gets it with its first request."""
        held = self.own.group_keys
        params = self.cohort.coordinator.plan.packing.params
        if not held:
            return group_key(self.cohort, self.colluder)
        return GroupKey.from_bytes(held[max(held)], epoch=max(held), params=params).secret

    @property
    def graph(self) -> Any:
        return round_graph(federation(self.cohort), self.number, self.own.rounds[self.number].listed)

    def shares(self, dealer: str, secret: str) -> dict[int, bytes]:
        """Those of one secret, by the holder's place: revealed ones, and the colluder's own of both kinds."""
        place_of = self.graph.holders(dealer).index
        found = {place_of(self.colluder): self.own.rounds[self.number].held[dealer].shares[secret]}
        for revealed in replies(self.cohort, SharesRevealed):
            given = revealed.mask_keys if secret == MASK_KEY else revealed.self_masks
            if revealed.round == self.number and dealer in given:
                found[place_of(revealed.site)] = given[dealer]
        return found

    def count(self, dealer: str) -> dict[str, int]:
        """How many shares there are of either secret."""
        return {secret: len(self.shares(dealer, secret)) for secret in (SELF_MASK, MASK_KEY)}

    def rebuild(self, dealer: str, secret: str) -> bytes | None:
        found, threshold = self.shares(dealer, secret), self.graph.threshold
        return combine(found, threshold=threshold) if len(found) >= threshold else None

    def open_update(self, update: UpdateReply, *, stolen: bytes | None = None) -> SummedUpdate:
        """Read one site's update of the adapter: take off every mask that can be rebuilt.

        ``stolen`` is the seed of its self mask, for tests that want to see what is missing.

        Raises:
            Tampered: what is left is not an update.
        """
        slots, run, victim = self._decrypt(update, GLOBAL), federation(self.cohort), update.site
        modulus, total = run.plan.packing.params.plain_modulus, np.zeros_like(slots)
        self_seed, mask_seed = stolen or self.rebuild(victim, SELF_MASK), self.rebuild(victim, MASK_KEY)
        if self_seed:
            add_self_mask(total, self_seed, modulus=modulus)
        for peer in self.graph.neighbours[victim] if mask_seed else ():
            seed = pairwise_seed(mask_private_key(mask_seed), self.keys[peer], run, me=victim)
            add_pairwise_mask(total, seed, (victim, peer), run, modulus=modulus)
        return self._read(update, GLOBAL, slots, total)

    def open_head(self, update: UpdateReply, scope: str) -> SummedUpdate:
        """Read one site's update of its head: take off the mask between it and the colluder, if there is one.

        Raises:
            Tampered: what is left is not an update.
        """
        slots, run = self._decrypt(update, scope), federation(self.cohort)
        secrets, total = self.own.rounds[self.number].secrets, np.zeros_like(slots)
        if secrets is not None and self.colluder in self.graph.kin[update.site]:
            seed = head_seed(secrets, self.keys[update.site], run, me=self.colluder)
            pair = (update.site, self.colluder)
            add_pairwise_mask(total, seed, pair, run, modulus=run.plan.packing.params.plain_modulus)
        return self._read(update, scope, slots, total)

    def _decrypt(self, update: UpdateReply, scope: str) -> Any:
        (scoped,) = (each for each in update.update if each.scope == scope)
        summed = [as_sum(self.cohort, data) for data in scoped.ciphertexts]
        return decrypt_slots(self.key, summed)

    def _read(self, update: UpdateReply, scope: str, slots: Any, masks: Any) -> SummedUpdate:
        """The tags say whether what is left is an update."""
        run, victim = federation(self.cohort), update.site
        packing, key = run.plan.packing, self.key
        modulus = packing.params.plain_modulus
        left = (slots + np.uint64(modulus) - masks) % np.uint64(modulus)
        check_tags(left, tag_key(key, run, self.number, scope), survivors=[victim], modulus=modulus, what=victim)
        layout = self.cohort.site(victim)._held[0].layouts[scope]  # public: the same at all sites of the scope
        value_range = run.plan.initial_range(scope)
        return decode_sum(left, layout, packing=packing, value_range=value_range, weight_cap=run.plan.weight_cap)
