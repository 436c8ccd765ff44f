"""The site service: it owns the data, the keys and the word "no".

One method, :meth:`SiteService.handle`: bytes of a request in, bytes of a reply out. In production it stands behind a
socket in a process of its own; in a simulation behind a process of the engine. It never lets an exception's text
out: a refusal is a code and a rule, the rest goes to the site's own log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedseek.errors import FedseekError, PlanRefused, WrongRound
from fedseek.identity.keys import SiteIdentity
from fedseek.messages import (
    CloseRequest,
    KeyRequest,
    PlanOffer,
    Refused,
    ReleaseRequest,
    Reply,
    Request,
    RoundRequest,
    decode_request,
    encode_message,
)
from fedseek_site.admission import SiteData
from fedseek_site.run import SiteRun, open_run

Observe = Callable[[dict[str, Any]], None]
log = logging.getLogger(__name__)


class SiteService:
    """One institution. State between messages is the current :class:`SiteRun`, in memory.

    Args:
        identity: the site's private keys.
        data: its records.
        release_folder: where a released adapter and its evidence are written.
        observe: told what happens here, for the site's own report; never sent anywhere.
    """

    def __init__(self, identity: SiteIdentity, data: SiteData, *, release_folder: Path, observe: Observe) -> None:
        self.identity = identity
        self.data = data
        self._release_folder = release_folder
        self._observe = observe
        self._run: SiteRun | None = None

    def handle(self, request: bytes) -> bytes:
        """Answer one request of the coordinator.

        Returns:
            An encoded reply; a ``Refused`` when anything in the request or at the site forbids an answer.
        """
        run = "unknown"
        try:
            message = decode_request(request)
            run = message.run
            return encode_message(self._answer(message))
        except FedseekError as error:
            log.warning("site %s refuses a request of run %s: %s", self.identity.name, run, error)
            self._observe({"event": "refused", "code": error.code, "text": str(error)})
            rule = error.rule if isinstance(error, PlanRefused) else error.code
            return encode_message(Refused(run=run, site=self.identity.name, code=error.code, rule=rule[:200]))
        except Exception:
            # Outer edge of the site: Flower would carry the exception's text, which may quote data, to the coordinator.
            log.exception("site %s failed on a request of run %s", self.identity.name, run)
            return encode_message(
                Refused(run=run, site=self.identity.name, code="InternalError", rule="internal error")
            )

    def _answer(self, message: Request) -> Reply:
        match message:
            case PlanOffer():
                if self._run is not None and self._run.run_id == message.run:
                    raise WrongRound(f"run {message.run!r} has begun here already; it is not begun twice")
                self._run = open_run(
                    message, self.identity, self.data, observe=self._observe, release_folder=self._release_folder
                )
                return self._run.admit()
            case KeyRequest():
                return self._current(message.run).make_group_key(message)
            case RoundRequest():
                return self._current(message.run).play_round(message)
            case CloseRequest():
                return self._current(message.run).close(message)
            case ReleaseRequest():
                return self._current(message.run).release(message)

    def _current(self, run: str) -> SiteRun:
        if self._run is None or self._run.run_id != run:
            raise WrongRound(f"got a request for run {run!r}, this site is in {self._run and self._run.run_id!r}")
        return self._run
