"""Keys and shares for the rounds to come, which ride on the messages of the rounds before.

A site enters round r in three steps: its keys for r are taken (with its update of r - 2, or when it admits the plan);
the key list of r is fixed, as round r - 1 is asked for, from all keys held by then; its shares for r are taken (with its
update of r - 1, or for a ShareRequest). Whoever's shares are there takes part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fedseek.cohort import Federation, RoundGraph, round_graph
from fedseek.deal import check_dealt, check_keys
from fedseek.errors import CohortTooSmall, Malformed, WrongKey
from fedseek.messages import RoundKeys, ShareRequest, SharesDealt


@dataclass(slots=True)
class Pipeline:
    """What has been sent ahead.

    Attributes:
        federation: the run.
        keys: checked round keys, by round and site.
        dealt: checked shares, by round and site.
        graphs: by round, of its key list; a round with too few keys has none.
    """

    federation: Federation
    keys: dict[int, dict[str, RoundKeys]] = field(default_factory=dict, repr=False)
    dealt: dict[int, dict[str, SharesDealt]] = field(default_factory=dict, repr=False)
    graphs: dict[int, RoundGraph] = field(default_factory=dict, repr=False)

    def has_keys(self, site: str, number: int) -> bool:
        """Whether the site's keys for a round are here."""
        return site in self.keys.get(number, {})

    def check_keys(self, site: str, numbers: Sequence[int], keys: Sequence[RoundKeys]) -> None:
        """Check that these are the site's keys for these rounds, and no others than it sent before.

        Raises:
            WrongRound: of another round.
            WrongKey: of another site, not signed by it, or other keys than those held.
        """
        for number, each in zip(numbers, keys, strict=True):
            if each.site != site:
                raise WrongKey(f"site {site!r} sent round keys of site {each.site!r}")
            check_keys(each, self.federation, number)
            held = self.keys.get(number, {}).get(site, each)
            if (held.mask_key, held.share_key) != (each.mask_key, each.share_key):
                raise WrongKey(
                    f"round keys of site {site!r}: got others for round {number} than it sent before",
                    hint="two copies of the site run, or its state was put back from a backup",
                )

    def keep_keys(self, keys: Sequence[RoundKeys]) -> None:
        """Keep keys that passed ``check_keys``."""
        for each in keys:
            self.keys.setdefault(each.round, {}).setdefault(each.site, each)

    def fix_list(self, number: int, connected: Collection[str]) -> None:
        """Fix the key list of a round: of the sites that are there, those whose keys are held.

        With fewer of them than a round needs there is no list, and the round will be given up.
        """
        listed = [site for site in self.keys.get(number, {}) if site in connected]
        try:
            self.graphs[number] = round_graph(self.federation, number, listed)
        except CohortTooSmall:
            self.graphs.pop(number, None)

    def is_listed(self, site: str, number: int) -> bool:
        """Whether the site is on the key list of a round."""
        graph = self.graphs.get(number)
        return graph is not None and site in graph.neighbours

    def check_shares(self, site: str, number: int, shares: SharesDealt | None) -> None:
        """Check that a site dealt shares for a round if it is on its key list, and none if it is not.

        Raises:
            WrongRound, WrongKey, Malformed: as ``fedseek.deal.check_dealt``.
        """
        if (shares is not None) != self.is_listed(site, number):
            got, wanted = ("none", "some") if shares is None else ("some", "none")
            raise Malformed(f"shares of site {site!r} for round {number}: got {got}, wanted {wanted}")
        if shares is not None:
            check_dealt(shares, self.federation, self.graphs[number], dealer=site)

    def keep_shares(self, site: str, shares: SharesDealt) -> None:
        """Keep shares that passed ``check_shares``."""
        self.dealt.setdefault(shares.round, {})[site] = shares

    def share_request(self, site: str, number: int) -> ShareRequest:
        """What a listed site is asked when it sends no update before the round."""
        listed, keys = self.key_list(site, number)
        return ShareRequest(run=self.federation.run, round=number, listed=listed, keys=keys)

    def key_list(self, site: str, number: int) -> tuple[tuple[int, ...], tuple[RoundKeys, ...]]:
        """Who is on the key list of a round, and the keys of this site's peers; nobody if it is not on it."""
        if not self.is_listed(site, number):
            return (), ()
        graph, keys = self.graphs[number], self.keys[number]
        return self.federation.positions(graph.listed), tuple(keys[name] for name in graph.peers(site))

    def participants(self, number: int, connected: Collection[str]) -> tuple[str, ...]:
        """Who can take part in a round now: dealt shares for it and is there; in roster order.

        A site that is gone by now is left out from the start, so that nobody masks with it.
        """
        dealt = self.dealt.get(number, {})
        return tuple(name for name in self.federation.roster.names if name in dealt and name in connected)

    def boxes(self, site: str, number: int, participants: Sequence[str]) -> dict[str, bytes]:
        """The shares sealed to this site by its neighbours among the participants, by dealer."""
        around = set(self.graphs[number].neighbours[site])
        dealt = self.dealt[number]
        return {dealer: dealt[dealer].boxes[site] for dealer in participants if dealer in around}

    def forget(self, number: int) -> None:
        """Drop what belongs to a round that has ended."""
        for held in (self.keys, self.dealt, self.graphs):
            held.pop(number, None)
