"""Which public key a site's courier authenticates with: the list behind the fleet gate, in ``nodes.json``.

The list is written before the roster that it goes with, so a crash in between leaves lines of a roster that never came
about. What counts is therefore looked up by the digest of the entry on the roster, never by name alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Literal

import msgspec

from fedseek.errors import WrongKey
from fedseek.identity.enrolment import MAX_NODE_KEY_BYTES, JoinRequest, check_node_key
from fedseek.identity.forms import Digest, Form
from fedseek.identity.roster import MAX_ROSTER_ENTRIES
from fedseek.identity.signed_roster import SignedRoster

MAX_NODE_LIST_BYTES: Final = 4 << 20


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node key, and the roster entry it came with.

    Attributes:
        site: whose it is.
        entry: digest of the site's roster entry.
        key: P-256 public key in PEM, to the byte as Flower compares it.
        number: of the roster that first had the entry.
    """

    site: str
    entry: Digest
    key: Annotated[bytes, msgspec.Meta(max_length=MAX_NODE_KEY_BYTES)]
    number: Annotated[int, msgspec.Meta(ge=0)]

    def __post_init__(self) -> None:
        check_node_key(self.key)


class NodeList(Form, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of them: for each site the key of its entry, and for a while the one before."""

    version: Literal[1]
    nodes: Annotated[tuple[Node, ...], msgspec.Meta(max_length=3 * MAX_ROSTER_ENTRIES)]

    def current(self, roster: SignedRoster) -> dict[str, bytes]:
        """By site, the key that came with its entry on this roster."""
        entries = {member.entry.digest(): member.entry.name for member in roster.members}
        return {entries[node.entry]: node.key for node in self.nodes if node.entry in entries}

    def former(self, roster: SignedRoster) -> dict[str, bytes]:
        """By site, the key before its last renewal, where that is still let in."""
        entries = {member.entry.name: member.entry.digest() for member in roster.members}
        return {
            node.site: node.key
            for node in self.nodes
            if node.number <= roster.number and entries.get(node.site, node.entry) != node.entry
        }

    def with_node(self, request: JoinRequest, held: SignedRoster, *, renewal: bool) -> NodeList:
        """The list for the roster after ``held``, on which the site of ``request`` has a new entry.

        Raises:
            WrongKey: the node key is or was that of another site, or of this one's earlier entry.
        """
        site = request.entry.name
        for node in self._counting(held):
            if node.key == request.node_key:
                raise WrongKey(
                    f"node key of {site!r} is that of {node.site!r}", hint="every entry has a node key of its own"
                )
        before = {member.entry.digest() for member in held.members if renewal and member.entry.name == site}
        kept = [node for node in self._counting(held) if node.site != site or node.entry in before]
        new = Node(site, request.entry.digest(), request.node_key, held.number + 1)
        return _sorted([*kept, new])

    def without_former(self, site: str, held: SignedRoster) -> NodeList:
        """The list without the key before the site's last renewal."""
        current = {member.entry.digest() for member in held.members}
        return _sorted(node for node in self.nodes if node.site != site or node.entry in current)

    def of(self, roster: SignedRoster) -> NodeList:
        """The list without sites that are not on the roster."""
        return _sorted(self._counting(roster))

    def _counting(self, held: SignedRoster) -> list[Node]:
        """Without what a crash left over, and without sites that are gone."""
        names = {member.entry.name for member in held.members}
        return [node for node in self.nodes if node.site in names and node.number <= held.number]


def _sorted(nodes: Iterable[Node]) -> NodeList:
    return NodeList(version=1, nodes=tuple(sorted(nodes, key=lambda node: (node.site, node.number))))
