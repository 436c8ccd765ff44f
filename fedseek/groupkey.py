"""The group key: the BFV secret key that only sites hold, one an epoch.

One site makes it and seals it to each member; the coordinator carries the envelopes. It belongs to a run, a roster and
an epoch: a changed roster means a new run with a new key, and within a run the coordinator asks for the next epoch when
the key is old or when somebody wants it. Each site looks at the age for itself.

Run by sites.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from fedseek.cohort import Federation
from fedseek.errors import Malformed, WrongKey
from fedseek.he.keys import SecretKey
from fedseek.he.params import HeParams
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.sealing import SealedKey, open_sealed, seal
from fedseek.messages import GroupKeySealed

SECONDS_A_DAY = 86_400
CLOCK_SKEW_SECONDS = 3_600  # clocks of two institutions may differ by so much


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    made_at: int
    secret: bytes


@dataclass(frozen=True, slots=True, eq=False)
class GroupKey:
    """The key of one epoch.

    Attributes:
        epoch: counted from 0 in a run.
        made_at: Unix time in whole seconds.
        secret: encrypts, decrypts, and is what tag keys are derived from.
    """

    epoch: int
    made_at: int
    secret: SecretKey = field(repr=False)

    def to_bytes(self) -> bytes:
        """Key and age, without the epoch: secret. About 32 KB."""
        return msgspec.msgpack.encode(_Sealed(self.made_at, self.secret.to_bytes()))

    @classmethod
    def from_bytes(cls, data: bytes, *, epoch: int, params: HeParams) -> GroupKey:
        """Read what ``to_bytes`` wrote.

        Raises:
            Malformed: the bytes are anything else.
        """
        try:
            read = msgspec.msgpack.decode(data, type=_Sealed)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # msgspec lets the second one through
            raise Malformed(f"group key of epoch {epoch} does not parse: {error}") from None
        return cls(epoch, read.made_at, SecretKey.from_bytes(params, read.secret))


def make_group_key(federation: Federation, epoch: int, *, identity: SiteIdentity, now: float) -> GroupKeySealed:
    """Draw the key of an epoch and seal it to every site of the roster, this one included. Nothing of it is kept here.

    Raises:
        WrongKey: this site is not on the roster, or a sealing key on it is none.
    """
    key = GroupKey(epoch, int(now), SecretKey.generate(federation.plan.packing.params))
    secret, roster = key.to_bytes(), federation.roster
    envelopes = {
        entry.name: msgspec.msgpack.encode(
            seal(secret, sender=identity, receiver=entry, roster=roster, run=federation.run, epoch=epoch)
        )
        for entry in roster.entries
    }
    return GroupKeySealed(epoch=epoch, envelopes=envelopes)


def open_group_key(envelope: bytes, federation: Federation, epoch: int, *, identity: SiteIdentity) -> GroupKey:
    """Open the envelope that a site sealed to this one.

    Raises:
        WrongKey: it does not parse, or is for another run, epoch, site or roster, or not signed by a site of it.
        Malformed: what is inside is no group key of this plan.
    """
    try:
        sealed = msgspec.msgpack.decode(envelope, type=SealedKey)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # msgspec lets the second one through
        raise WrongKey(f"the envelope with the group key of epoch {epoch} does not parse: {error}") from None
    secret = open_sealed(sealed, receiver=identity, roster=federation.roster, run=federation.run, epoch=epoch)
    return GroupKey.from_bytes(secret, epoch=epoch, params=federation.plan.packing.params)


def check_age(key: GroupKey, *, now: float, max_days: int) -> None:
    """Refuse a key that is too old to encrypt under, or comes from the future. Decrypting with it stays possible.

    Raises:
        WrongKey: says how old it is.
    """
    days = (now - key.made_at) / SECONDS_A_DAY
    if days > max_days:
        raise WrongKey(
            f"group key of epoch {key.epoch} is {days:.0f} days old, wanted at most {max_days}",
            hint="the coordinator has to ask for the key of the next epoch before the next round",
        )
    if key.made_at > now + CLOCK_SKEW_SECONDS:
        raise WrongKey(
            f"group key of epoch {key.epoch} was made {-days:.2f} days from now by this site's clock",
            hint="compare the clocks of this site and of the one that made the key",
        )
