"""What reads bytes of a stranger, each as a function of bytes; and how such bytes are made.

A target may return or raise a ``FedseekError``. Anything else, or more than a second of CPU, is a finding. Where a
signature or a cipher would turn every altered input away at the door, a second target signs or seals the altered bytes
properly: that is what a hostile site on the roster can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from altering import Target
from daemon_targets import daemon_targets
from enrolment_targets import enrolment_targets
from message_targets import message_targets
from release_targets import release_targets

CORPUS = Path(__file__).resolve().parent / "corpus"


@cache
def targets() -> Mapping[str, Target]:
    """Every target by name."""
    return {**message_targets(), **enrolment_targets(), **daemon_targets(), **release_targets()}
