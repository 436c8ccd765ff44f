"""Keeps the SuperLink's list of nodes equal to the consortium's roster: whoever is off it is cut off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fedseek.errors import NotAdmitted, WrongKey


class Registry(Protocol):
    """Who may come through the gate; flower.py:FlowerLink says what each call promises and raises."""

    def enrolled(self) -> dict[bytes, int]:
        """Node ids by public key (PEM) of every registered node."""

    def names(self) -> dict[int, str]:
        """The name that each of them was registered under."""

    def enrol(self, public_key: bytes, name: str) -> int:
        """Register a node; returns its id."""

    def revoke(self, node: int) -> None:
        """Unregister a node."""


def reconcile(link: Registry, wanted: Mapping[str, bytes]) -> tuple[list[str], list[str]]:
    """Register what is missing and unregister what is not wanted.

    Guarantees: on return exactly the wanted keys are registered, and every call of a node whose key is not is refused.
    Those that have to go go first, so a site with a new key has never two. May be called again after any failure.

    Args:
        link: to the SuperLink.
        wanted: node keys (public, PEM) by site name.

    Returns:
        Names of the sites that were registered, and of those that were unregistered, each in order.

    Raises:
        WrongKey: two sites have the same key; nothing is changed.
        NotAdmitted: the SuperLink does not take a wanted key, because it was revoked once. All else is done: this is
            raised by a call that has nothing to do but that.
        NetworkError: the SuperLink is away; some changes may be made.
    """
    names_by_key: dict[bytes, str] = {}
    for name, key in wanted.items():
        if key in names_by_key:
            raise WrongKey(f"{names_by_key[key]!r} and {name!r} have the same node key", hint="enrol one of them anew")
        names_by_key[key] = name
    known = link.enrolled()
    removed = _revoke(link, [node for key, node in known.items() if key not in names_by_key])
    added: list[str] = []
    refused: NotAdmitted | None = None
    for name in sorted(name for key, name in names_by_key.items() if key not in known):
        try:
            link.enrol(wanted[name], name)
        except NotAdmitted as error:
            refused = error
        else:
            added.append(name)
    if refused and not added and not removed:
        raise refused
    return added, removed


def _revoke(link: Registry, nodes: list[int]) -> list[str]:
    names = link.names() if nodes else {}
    for node in nodes:
        link.revoke(node)
    return sorted(names.get(node) or f"node {node}" for node in nodes)
