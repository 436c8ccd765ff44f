"""Audit records for tests: three parties, a clock that stands still, and ways to tamper with files."""

from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedseek.daemon.audit import AuditChain
from fedseek.identity.signing import sign_with

NAME, HOSPITAL, COORDINATOR = "北岸银行", "仁济医院", "coordinator"
KEY, NEW_KEY, HOSPITAL_KEY, COORDINATOR_KEY = (
    Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3, 4)
)
OWNERS = {NAME: KEY, HOSPITAL: HOSPITAL_KEY, COORDINATOR: COORDINATOR_KEY}
DAY = 86_400
NOVEMBER = 1_795_373_365.123  # 2026-11-22T18:49:25.123Z


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


KEYS = {name: public(key) for name, key in OWNERS.items()}


class Clock:
    def __init__(self, now: float = NOVEMBER) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def open_chain(folder: Path, key: Ed25519PrivateKey = KEY, name: str = NAME, **settings) -> AuditChain:
    settings.setdefault("clock", Clock())
    return AuditChain(folder, name=name, sign=partial(sign_with, key), public_key=public(key), **settings)


def open_chain_of(name: str, folder: Path) -> AuditChain:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return open_chain(folder, OWNERS[name], name)


def write_months(folder: Path, months: int, **settings) -> Clock:
    """A record of so many months with a line each, the last of them in November 2026."""
    clock = Clock(NOVEMBER - months * 30.5 * DAY)
    with open_chain(folder, clock=clock, **settings) as chain:
        for month in range(months):
            clock.now += 30.5 * DAY
            chain.record("sent", kind="更新", bytes=month)
    return clock
