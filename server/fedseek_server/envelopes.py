"""The group key on its way from the site that made it to the others: sealed, and closed to the coordinator."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedseek.cohort import Federation
from fedseek.errors import Malformed
from fedseek.messages import GroupKeySealed

SECONDS_A_DAY = 86_400
# A site refuses to encrypt under a key older than the plan's key_days, by its own clock. Ask for the next one early
# enough for a long round and for clocks that differ.
ROTATION_LEAD_SECONDS = 7_200

NO_EPOCH = -1


@dataclass(slots=True)
class Envelopes:
    """Sealed group keys, by epoch and site.

    Attributes:
        federation: the run.
        sealed: by epoch, then site.
        held: by site, the newest epoch it is known to have: it sent an update under it.
        taken_at: when the newest came, by this side's clock.
    """

    federation: Federation
    sealed: dict[int, dict[str, bytes]] = field(default_factory=dict, repr=False)
    held: dict[str, int] = field(default_factory=dict)
    taken_at: float = 0.0

    @property
    def epoch(self) -> int:
        """The newest epoch; ``NO_EPOCH`` before there is a key."""
        return max(self.sealed, default=NO_EPOCH)

    def check(self, site: str, sealed: GroupKeySealed, epoch: int) -> None:
        """Check that a key came for the epoch asked for and for exactly the sites of the roster.

        Raises:
            Malformed: it did not.
        """
        if sealed.epoch != epoch or set(sealed.envelopes) != set(self.federation.roster.names):
            raise Malformed(
                f"site {site!r} sealed the key of epoch {sealed.epoch} to {sorted(sealed.envelopes)}, wanted epoch "
                f"{epoch} and one envelope for each site of the roster"
            )

    def take(self, sealed: GroupKeySealed, *, now: float) -> None:
        """Keep a key that passed ``check``."""
        self.sealed[sealed.epoch] = dict(sealed.envelopes)
        self.taken_at = now

    def for_site(self, site: str) -> dict[int, bytes]:
        """By epoch, what this site may still lack: the current key, and those of rounds it missed."""
        known = self.held.get(site, NO_EPOCH)
        return {epoch: sealed[site] for epoch, sealed in sorted(self.sealed.items()) if epoch > known}

    def can_make_next(self, site: str) -> bool:
        """Whether the site would make the next key: one that does not hold the newest cannot tell which is next."""
        return self.held.get(site, NO_EPOCH) == self.epoch

    def is_old(self, *, now: float) -> bool:
        """Whether sites will soon refuse to encrypt under the newest key."""
        days = self.federation.plan.spec.encryption.key_days
        return now - self.taken_at >= days * SECONDS_A_DAY - ROTATION_LEAD_SECONDS
