"""Who is in the run: which node speaks for which site, and what a site must show to be let in.

Nodes are the network's names, sites those of the roster. A node says which site it is when it admits the plan, with
that site's signature; from then on it may speak for no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from fedseek.cohort import Federation
from fedseek.errors import Malformed, WrongModel, WrongRound
from fedseek.identity.signing import CONTEXT_PLAN, verify
from fedseek.messages import PlanAdmitted


class ScopeSize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How large a scope is; ``site`` was the first to say so."""

    site: str
    num_values: int
    ciphertexts: int


@dataclass(slots=True)
class Admissions:
    """The sites that run the plan.

    Attributes:
        federation: the run.
        sites: by node, the site it speaks for.
        sizes: by scope; the same at all sites of it.
    """

    federation: Federation
    sites: dict[int, str] = field(default_factory=dict)
    sizes: dict[str, ScopeSize] = field(default_factory=dict)

    def connected(self, nodes: Sequence[int]) -> dict[str, int]:
        """Admitted sites that are there now, and their nodes, in roster order."""
        here = {self.sites[node]: node for node in sorted(nodes) if node in self.sites}
        return {name: here[name] for name in self.federation.roster.names if name in here}

    def strangers(self, nodes: Sequence[int]) -> list[int]:
        """Nodes that are there now and have not said who they are, ascending."""
        return sorted(node for node in nodes if node not in self.sites)

    def missing(self) -> tuple[str, ...]:
        """Sites of the roster that have not been admitted."""
        return tuple(name for name in self.federation.roster.names if name not in set(self.sites.values()))

    def check_sender(self, node: int, site: str) -> None:
        """Check that this node may speak for this site: it always did, or is new.

        Raises:
            WrongKey: no such site on the roster.
            WrongRound: the node was admitted as another site.
        """
        self.federation.roster.entry(site)
        if self.sites.get(node, site) != site:
            raise WrongRound(f"node {node} was admitted as {self.sites[node]!r} and now answers as {site!r}")

    def check(self, node: int, reply: PlanAdmitted, number: int, nodes: Sequence[int]) -> None:
        """Check an admission, all but the keys in it.

        Args:
            node: that sent it.
            reply: from a site that ``check_sender`` passed.
            number: round that the plan was offered from.
            nodes: that are there now. A site may come back as another node when its old one is gone.

        Raises:
            WrongKey: the site did not sign for this run, plan and roster.
            WrongRound: for another round, or the site is there already.
            WrongModel: another base model, or a scope of another size than at the others.
            Malformed: sizes of other scopes than the site shares, or contributors that are not on the roster.
        """
        entry = self.federation.roster.entry(reply.site)
        verify(entry, CONTEXT_PLAN, self.federation.bound, reply.signature)
        if reply.round != number:
            raise WrongRound(f"site {reply.site!r} admitted the plan from round {reply.round}, wanted {number}")
        if self.connected(nodes).get(reply.site, node) != node:
            raise WrongRound(f"site {reply.site!r} was admitted twice")
        wanted = self.federation.plan.spec.model.sha256
        if reply.model_sha256 != wanted:
            raise WrongModel(f"site {reply.site!r} holds base model {reply.model_sha256}, the plan names another")
        self._check_sizes(reply, entry.kind)
        self.federation.names(reply.contributors)

    def admit(self, node: int, reply: PlanAdmitted) -> None:
        """Let in a site whose reply passed ``check``."""
        self.sites = {other: site for other, site in self.sites.items() if site != reply.site}
        self.sites[node] = reply.site
        for scope, size in self._sizes_of(reply).items():
            self.sizes.setdefault(scope, size)

    def _sizes_of(self, reply: PlanAdmitted) -> dict[str, ScopeSize]:
        shared = self.federation.shared_scopes(self.federation.roster.entry(reply.site).kind)
        return {scope: ScopeSize(reply.site, reply.num_values[scope], reply.ciphertexts[scope]) for scope in shared}

    def _check_sizes(self, reply: PlanAdmitted, kind: str) -> None:
        wanted = set(self.federation.shared_scopes(kind))
        for announced in (set(reply.ciphertexts), set(reply.num_values)):
            if announced != wanted:
                raise Malformed(f"site {reply.site!r} announced scopes {sorted(announced)}, wanted {sorted(wanted)}")
        for scope, size in self._sizes_of(reply).items():
            first = self.sizes.get(scope, size)
            if (first.num_values, first.ciphertexts) != (size.num_values, size.ciphertexts):
                raise WrongModel(
                    f"site {reply.site!r} trains {size.num_values} values of {scope!r} in {size.ciphertexts} "
                    f"ciphertexts, site {first.site!r} {first.num_values} in {first.ciphertexts}",
                    hint="the base models differ in shape, or one site runs another version of FedSeek",
                )
