"""The coordinator's daemon: the SuperLink kept alive beside it, runs played one after another, sites greeted between.

    fedseek-server serve
        this process    runs, their log, the audit chain; no key that decrypts, no torch
        SuperLink       a child: the fleet gate over TLS, Flower's own state

All that matters is on the disk before anybody is told: killed at any moment, the next start takes the open run up from
its last reply.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedseek.daemon.audit import AuditChain
from fedseek.daemon.bundle import code_free_bundle
from fedseek.daemon.process import only_one
from fedseek.daemon.supervise import supervise
from fedseek.errors import FedseekError, NetworkError, Stopped, WrongKey
from fedseek.identity.enrolment import parse_renewal
from fedseek_server.accepting import accept_waiting
from fedseek_server.config import CoordinatorConfig, load_config
from fedseek_server.consortium import Consortium, open_consortium
from fedseek_server.flower import FlowerLink
from fedseek_server.mail import Greeting, Mail
from fedseek_server.orders import last_change, next_run
from fedseek_server.playing import GREETING_SECONDS, Network, play_run
from fedseek_server.registration import reconcile
from fedseek_server.superlink import SuperLinkSettings, prepare, superlink

IDLE_SECONDS: Final = 0.5  # between two looks for orders
RETRY_SECONDS: Final = 30.0  # between two greetings while a site has not got the roster in force, or its new keys
REGISTRATION_SECONDS: Final = 60.0  # after which the SuperLink is asked again, though nothing changed here
FORMER: Final = "/former"  # after the name of a site, which holds no slash
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Daemon:
    """What the coordinator's process holds while it serves.

    Attributes:
        folder: of the consortium.
        config: of the operator.
        consortium: roster, nodes, certificates.
        audit: the coordinator's record.
        link: to the SuperLink; used by one thread.
        stop: set when the process is to end.
        nodes: site by node, as registered at the SuperLink.
        keys: by node, the public key it is registered under.
    """

    folder: Path
    config: CoordinatorConfig
    consortium: Consortium
    audit: AuditChain = field(repr=False)
    link: FlowerLink = field(repr=False)
    stop: threading.Event = field(repr=False)
    nodes: dict[int, str] = field(default_factory=dict)
    keys: dict[int, bytes] = field(default_factory=dict, repr=False)
    greet_at: float = 0.0

    def network(self) -> Network:
        """The way to the sites that are on the roster now."""
        mail = Mail(self.consortium.signed_roster, lambda node: self.nodes.get(node), self.audit)
        return Network(
            self.link, mail, self.config.limits.largest_update_mb << 20, self.config.settle_seconds, self.stop
        )


def run_daemon(folder: Path, stop: threading.Event, *, passphrase: str | None = None) -> None:
    """Serve until ``stop`` is set.

    Raises:
        FedseekError: the folder, configuration, keys or address cannot be used: what, and what to do.
    """
    config = load_config(folder)
    with only_one(folder), ExitStack() as closing:
        consortium = open_consortium(folder, passphrase=passphrase)
        consortium.renew_certificate(time.time())
        settings = SuperLinkSettings(
            folder / "state", config.listen.host, config.listen.port, consortium.certificate, consortium.key
        )
        secret = prepare(settings)
        audit = consortium.audit_chain(retention_days=config.audit.retention_days)
        closing.callback(audit.close)
        audit.record(
            "started", listen=f"{config.listen.host}:{config.listen.port}", roster=consortium.signed_roster.number
        )
        ended = threading.Event()
        keeper = threading.Thread(
            target=supervise, args=(superlink(settings, log_file=folder / "superlink.log"), ended), name="superlink"
        )
        keeper.start()
        closing.callback(keeper.join)
        closing.callback(ended.set)
        closing.callback(audit.record, "stopped")
        daemon = Daemon(folder, config, consortium, audit, _link(settings, secret), stop)
        registrar = threading.Thread(
            target=_keep_registered, args=(daemon, _link(settings, secret)), name="registration", daemon=True
        )
        registrar.start()
        _log.info("serving %s on %s port %d", consortium.name, config.listen.host, config.listen.port)
        _serve(daemon)


def _serve(daemon: Daemon) -> None:
    looked_at = -1
    while not daemon.stop.is_set():
        changed = last_change(daemon.folder)
        run = next_run(daemon.folder) if changed != looked_at else None
        if run is not None:
            play_run(daemon.network(), run)
            continue  # look again: there may be another
        looked_at = changed
        accept_waiting(daemon.folder, daemon.audit)
        if time.monotonic() >= daemon.greet_at:
            daemon.consortium.renew_certificate(time.time())
            greet(daemon)
        daemon.stop.wait(IDLE_SECONDS)


def greet(daemon: Daemon) -> None:
    """Ask every connected site where it stands; put renewed keys on the roster and tell the sites of it."""
    network = daemon.network()
    mail = network.mail
    try:
        network.driver(daemon.stop, GREETING_SECONDS).drive(Greeting(mail))
    except (Stopped, NetworkError):
        return
    daemon.audit.prune()
    changed = _renew(daemon, mail)
    _forget_former(daemon, mail)
    told = all(mail.holds_roster(site) for site in daemon.nodes.values())
    settled = told and not changed and not daemon.consortium.former_node_keys()
    pause = daemon.config.greet_hours * 3600 if settled else RETRY_SECONDS
    daemon.greet_at = time.monotonic() + pause


def _renew(daemon: Daemon, mail: Mail) -> bool:
    """Put keys that sites renewed on the roster. Whether any were."""
    changed = False
    for site, renewal in mail.renewals.items():
        try:
            if (named := parse_renewal(renewal).request.entry.name) != site:
                raise WrongKey(f"site {site!r} brings a renewal of site {named!r}, wanted one of its own")
            daemon.consortium.renew(renewal, int(time.time()))
        except FedseekError as error:
            daemon.audit.record("renewal-refused", site=site, code=error.code, text=error.message)
            _log.warning("renewal of site %s: %s", site, error)
        else:
            daemon.audit.record("renewed", site=site, roster=daemon.consortium.signed_roster.number)
            changed = True
    return changed


def _forget_former(daemon: Daemon, mail: Mail) -> None:
    """A site that was heard under its new node key is let in under that one alone."""
    newest = daemon.consortium.node_keys()
    heard = {daemon.keys.get(node) for node in mail.heard}
    for name in daemon.consortium.former_node_keys():
        if newest.get(name) in heard:
            daemon.consortium.forget_former(name)
            daemon.audit.record("former-key-dropped", site=name)


def _keep_registered(daemon: Daemon, link: FlowerLink) -> None:
    """Have the SuperLink know exactly the nodes of the roster, whatever the operator changes meanwhile."""
    done: dict[str, bytes] | None = None
    again_at = 0.0
    while not daemon.stop.is_set():
        try:
            wanted = _wanted(daemon.consortium)
            if wanted != done or time.monotonic() > again_at:
                _register(daemon, link, wanted)
                done, again_at = wanted, time.monotonic() + REGISTRATION_SECONDS
        except NetworkError as error:
            _log.debug("registration: %s", error.message)
        except FedseekError as error:  # somebody is at work on the folder: try again
            _log.error("registration: %s", error)
        daemon.stop.wait(IDLE_SECONDS)


def _wanted(consortium: Consortium) -> dict[str, bytes]:
    """Node keys by name; a site that renews is let in under its former key too, until it was seen with the new one."""
    former = {f"{name}{FORMER}": key for name, key in consortium.former_node_keys().items()}
    return {**consortium.node_keys(), **former}


def _register(daemon: Daemon, link: FlowerLink, wanted: Mapping[str, bytes]) -> None:
    added, removed = reconcile(link, wanted)
    for kind, names in (("node-registered", added), ("node-removed", removed)):
        for name in names:
            daemon.audit.record(kind, site=name)
    enrolled = link.enrolled()
    sites = {key: name.removesuffix(FORMER) for name, key in wanted.items()}
    found = {enrolled[key]: site for key, site in sites.items() if key in enrolled}
    daemon.keys = {node: key for key, node in enrolled.items()}
    if found != daemon.nodes:
        daemon.nodes = found  # in one step: the other thread looks sites up in it
        daemon.greet_at = 0.0


def _link(settings: SuperLinkSettings, secret: bytes) -> FlowerLink:
    return FlowerLink(settings.socket, secret, code_free_bundle())
