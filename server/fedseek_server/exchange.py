"""What the coordinator asks at a time: one message to each of some nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedseek.messages import Request, encode_message


class Requests(Mapping[int, bytes]):
    """Requests by node, encoded when looked at: the sum of a round is in many of them, and is held once."""

    def __init__(self, requests: Mapping[int, Request]) -> None:
        self._requests = requests
        self._sizes: dict[int, int] = {}

    def __getitem__(self, node: int) -> bytes:
        data = encode_message(self._requests[node])
        self._sizes[node] = len(data)
        return data

    def __iter__(self) -> Iterator[int]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def size(self, node: int) -> int:
        """Bytes of one request."""
        return self._sizes[node] if node in self._sizes else len(self[node])


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message to each of some nodes; a reply from each is wanted, and none is waited for beyond reason.

    Attributes:
        phase: plan, shares, key, round, unmask, close or release. Within one, nodes may be asked different things.
        round: that it belongs to; the closing round is the one after the plan's last.
        requests: encoded, by node.
        pause_seconds: nobody is asked, and so long is waited before the next exchange.
    """

    phase: str
    round: int
    requests: Mapping[int, bytes]
    pause_seconds: float = 0.0
