"""Every error FedSeek raises on purpose, as one tree.

    FedseekError                          exit code
    ├── PlanError                             3
    │   ├── InvalidPlan       the plan (or scenario) cannot be run; carries all problems at once
    │   └── PlanRefused       a site said no; carries the rule that decided
    ├── DataError                             4
    │   └── InvalidRecords    a data file cannot be used as the plan asks
    ├── ModelError                            4
    │   ├── WrongModel        base model is not the one the plan names
    │   ├── OutOfMemory       training does not fit in the device's memory, not even one record at a time
    │   └── AdapterDiverged   sites ended a round with different adapters
    ├── PrivacyError                          5
    │   ├── UnsupportedMechanism
    │   ├── ClaimRefuted      an audit found more leaking than the stated epsilon allows
    │   ├── GuardTripped      a run-time check of the privacy guarantee failed: no epsilon is stated
    │   └── BudgetExceeded    training would cost more privacy than the site's policy allows over the life of the data
    ├── CustodyError                          6
    │   ├── WrongKey
    │   └── Expired           a certificate's time is over, or has not come
    ├── MessageError                          6
    │   ├── Malformed
    │   ├── WrongRound
    │   ├── Tampered          a sum is not that of the sites it is said to hold
    │   └── TooLarge
    ├── CohortTooSmall                        6
    ├── NotNow                                6   a site will, but not yet: hours, or a person has to approve first
    ├── InvalidConfig                         3   a configuration or policy file; carries all problems at once
    ├── JournalUnusable                       8
    ├── AuditBroken                           8   an audit chain has a changed, cut or unsigned line
    ├── NetworkError                          8
    │   ├── Unreachable       the other side is not there now; trying again may help
    │   ├── SessionOver       the SuperLink has ended our run; a new one is needed, nothing of ours is lost
    │   ├── NotAdmitted       the coordinator's gate does not let this site in; a person has to act
    │   ├── Undelivered       a request came back with an error of Flower's in place of a reply
    │   ├── AddressTaken      a port or socket is in use by another process
    │   ├── ProcessLost       one of the processes that train together is gone
    │   └── Stopped           a daemon was told to end; what it was doing can be taken up again
    ├── SiteRefused                           1, or that of the family its code names
    ├── LocalRefused                          1, or that of the family its code names
    └── ReleaseRefused                        7

Families end in ``Error``; leaves are plain participles, as in httpx (so ruff's N818 is off). A message says what
was read, what was got, what was wanted; ``hint`` says what to do next. What leaves a site on failure is the ``code``
alone (docs/protocol.md): the text may name files, labels or values and stays in the local log.
"""

from __future__ import annotations

from collections.abc import Sequence


class FedseekError(Exception):
    """Root of the tree.

    Args:
        message: what was read, what was got, what was wanted.
        hint: what to do next; may be empty.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def code(self) -> str:
        """The only part of an error that may be told to another party: the name of its class."""
        return type(self).__name__

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class PlanError(FedseekError):
    """Something is wrong with a plan."""

    exit_code = 3


class InvalidPlan(PlanError):
    """The plan or scenario cannot be run. ``problems`` lists every problem found, not just the first."""

    def __init__(self, problems: Sequence[str], *, source: str = "plan", hint: str = "") -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{source}: {count}{lines}", hint=hint)


class PlanRefused(PlanError):
    """A site refuses the plan. ``rule`` names the rule that decided."""

    def __init__(self, site: str, rule: str, *, hint: str = "") -> None:
        self.site = site
        self.rule = rule
        super().__init__(f"site {site!r} refused the plan: {rule}", hint=hint)


class DataError(FedseekError):
    """Something is wrong with an institution's data files."""

    exit_code = 4


class InvalidRecords(DataError):
    """A data file cannot be used as the plan asks."""


class ModelError(FedseekError):
    """Something is wrong with the base model or the adapter."""

    exit_code = 4


class WrongModel(ModelError):
    """The base model is missing or its weights are not those the plan names."""


class OutOfMemory(ModelError):
    """Training does not fit in the memory of the device, not even one record at a time."""


class AdapterDiverged(ModelError):
    """Sites ended a round with different adapters; the run stops and names them."""


class PrivacyError(FedseekError):
    """The privacy guarantee cannot be given."""

    exit_code = 5


class UnsupportedMechanism(PrivacyError):
    """The accountant or the training mode has no proof for what was asked."""


class ClaimRefuted(PrivacyError):
    """An audit's lower bound is above the epsilon that was claimed: mechanism or accounting is wrong."""


class GuardTripped(PrivacyError):
    """A run-time check of the privacy guarantee failed. ``guard`` names it; no epsilon is stated."""

    def __init__(self, guard: str, message: str, *, hint: str = "") -> None:
        self.guard = guard
        super().__init__(f"privacy guard {guard!r} tripped: {message}", hint=hint)


class BudgetExceeded(PrivacyError):
    """The next training would overspend. The figures are for the site's own people; ``rule`` may be told to others."""

    rule = "limits.max_epsilon_total"

    def __init__(self, *, spent: float, asked: float, limit: float, delta: float) -> None:
        self.spent, self.asked, self.limit = spent, asked, limit
        super().__init__(
            f"privacy ledger: epsilon {spent:.4g} is spent, {asked:.4g} was asked for in all, the limit is {limit:g} "
            f"(at delta {delta:g})",
            hint="fedseek-site budget shows what it went into; only this site's policy can raise the limit",
        )


class CustodyError(FedseekError):
    """Something is wrong with who holds which key."""

    exit_code = 6


class WrongKey(CustodyError):
    """A key, signature or sealed envelope is not from or for whom it should be."""


class Expired(CustodyError):
    """A certificate's time is over, or has not come yet."""


class MessageError(FedseekError):
    """A message from another party was refused."""

    exit_code = 6


class Malformed(MessageError):
    """A message or ciphertext does not parse, is truncated, or belongs to other parameters."""


class WrongRound(MessageError):
    """A message answers for another run, round or phase."""


class Tampered(MessageError):
    """A decrypted sum does not carry the tags of exactly the sites that were announced."""


class TooLarge(MessageError):
    """A message is larger than the plan allows."""


class CohortTooSmall(FedseekError):
    """Fewer sites answered than the plan needs."""

    exit_code = 6


class NotNow(FedseekError):
    """A site will take part, but not yet: its hours, or a person has to approve first. Counts as missing, no more."""

    exit_code = 6

    def __init__(self, site: str, rule: str, *, hint: str = "") -> None:
        self.site = site
        self.rule = rule
        super().__init__(f"site {site!r} does not take part now: {rule}", hint=hint)


class InvalidConfig(FedseekError):
    """A configuration or policy file cannot be used. ``problems`` lists every problem found, not just the first."""

    exit_code = 3

    def __init__(self, problems: Sequence[str], *, source: str, hint: str = "") -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{source}: {count}{lines}", hint=hint)


class AuditBroken(FedseekError):
    """An audit chain is not what was written: a line was changed, cut, moved or not signed. The message names it."""

    exit_code = 8


class NetworkError(FedseekError):
    """Something between two processes failed; no key, budget or update is touched by it."""

    exit_code = 8


class Unreachable(NetworkError):
    """The other side is not there now."""


class SessionOver(NetworkError):
    """The SuperLink has ended our run; a new one is needed."""


class NotAdmitted(NetworkError):
    """The coordinator's gate does not let this site in."""


class Undelivered(NetworkError):
    """A request came back with an error in place of a reply."""


class AddressTaken(NetworkError):
    """A port or socket is in use by another process."""


class ProcessLost(NetworkError):
    """One of the processes of a site that train together is gone, or gave up."""


class Stopped(NetworkError):
    """A daemon was told to end."""


class JournalUnusable(FedseekError):
    """What a party wrote down to go on after a restart cannot be read or written: disk, lock or damage."""

    exit_code = 8


class SiteRefused(FedseekError):
    """A site answered a request with a refusal. ``refused_code`` is the class of the site's own error."""

    def __init__(self, site: str, refused_code: str, rule: str) -> None:
        self.site = site
        self.refused_code = refused_code
        self.exit_code = exit_code_of(refused_code)
        super().__init__(f"site {site!r} refused: {rule} ({refused_code})", hint="the site's own log says more")


class LocalRefused(FedseekError):
    """The site's daemon said no to one of the site's own people. ``refused_code`` is the class of its error."""

    def __init__(self, refused_code: str, message: str, *, hint: str = "") -> None:
        self.refused_code = refused_code
        self.exit_code = exit_code_of(refused_code)
        super().__init__(message, hint=hint)


class ReleaseRefused(FedseekError):
    """The release gate is closed."""

    exit_code = 7


def exit_code_of(code: str) -> int:
    """Exit code of the error class of this name; 1 for a name that is none of ours.

    >>> exit_code_of("GuardTripped"), exit_code_of("InternalError")
    (5, 1)
    """
    families = FedseekError.__subclasses__()
    known = {cls.__name__: cls.exit_code for family in families for cls in (family, *family.__subclasses__())}
    return known.get(code, 1)
