"""The institution's daemon: the site service behind its sockets, and the courier kept alive beside it.

fedseek-site serve
site service   this process: data, keys, policy, journal, audit chain, the model on the device
courier        a child of it, or a process under another account: the network, and nothing else
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from fedseek.daemon.audit import RETENTION_DAYS, AuditChain
from fedseek.daemon.process import following, only_one
from fedseek.daemon.reports import EventLog
from fedseek.daemon.supervise import supervise
from fedseek.errors import InvalidConfig, Malformed
from fedseek.identity.signing import sign
from fedseek.lora.compute import Compute
from fedseek_site.approvals import Approvals
from fedseek_site.computing import computes_of, describe
from fedseek_site.config import POLICY_FILE, SiteConfig, load_config, read_site_data
from fedseek_site.courier import courier
from fedseek_site.desk import Desk
from fedseek_site.enrol import SiteFolder, open_site
from fedseek_site.ledger_opening import open_ledger
from fedseek_site.lending import group_number, lend
from fedseek_site.local_answers import answer_from
from fedseek_site.local_api import LocalApi, RecordAccepted, serve_local
from fedseek_site.paths import Paths, courier_settings
from fedseek_site.permission import Permission
from fedseek_site.policy import load_policy
from fedseek_site.release_approvals import ReleaseApprovals
from fedseek_site.socket_service import serve

GRACE_SECONDS: Final = 2.0  # that calls under way have to end
_log = logging.getLogger(__name__)


def run_daemon(folder: Path, stop: threading.Event, *, passphrase: str | None = None) -> None:
    """Serve until ``stop`` is set; starts over when the site's keys were renewed.

    Raises:
        FedseekError: the folder, configuration, data, keys or sockets cannot be used: what, and what to do.
    """
    config, paths = load_config(folder), Paths(folder)
    with only_one(folder):
        while not stop.is_set():
            site = open_site(folder, passphrase=passphrase)
            renewed = threading.Event()
            with following(stop, renewed.is_set) as over, serving(site, config, paths, renewed.set):
                _log.info(
                    "site %s serves consortium %s at %s",
                    site.identity.name,
                    site.join.consortium,
                    site.join.coordinator,
                )
                if config.courier.separate:
                    over.wait()
                else:
                    supervise(courier(courier_settings(site, paths), log_file=folder / "courier.log"), over)


@contextmanager
def serving(site: SiteFolder, config: SiteConfig, paths: Paths, changed: Callable[[], None]) -> Iterator[Desk]:
    """The site service behind its sockets, for the block; on leaving, calls under way end and the journal is closed."""
    computes, told = _computing(config)
    paths.run.mkdir(mode=0o750, exist_ok=True)
    with ExitStack() as closing:
        audit = _audit_chain(site, paths)
        closing.callback(audit.close)
        report = EventLog(paths.folder / config.folders.report)
        closing.callback(report.close)
        report.write(told)
        data = read_site_data(paths.folder, config.data)
        report.write(
            {
                "event": "data",
                "records": len(data.train),
                "held_back_records": len(data.held_back),
                "units": data.train.num_units,
            }
        )
        permission = _permission(site, config, paths, audit, closing)
        desk = Desk.open(
            site,
            permission,
            audit,
            changed,
            report=report,
            data=data,
            state=paths.state,
            release=paths.folder / config.folders.release,
            computes=computes,
        )
        closing.callback(desk.service.close)
        fingerprint = fingerprint_of(paths.folder / config.data.train)
        audit.record(
            "started",
            version=version("fedseek"),
            fingerprint=site.identity.public().fingerprint(),
            roster=site.signed_roster.digest().hex(),
            dataset=config.data.name,
            dataset_sha256=fingerprint,
        )
        closing.callback(audit.record, "stopped")
        group = group_number(config.sockets.courier_group)
        if config.courier.separate:
            lend(site, paths.lent, group)
        stop_service = serve(desk.handle, paths.service_socket, mode=0o600 if group is None else 0o660, group=group)
        closing.callback(stop_service, GRACE_SECONDS)
        api = local_api(desk, paths, config)
        closing.callback(serve_local(api, paths.run, record=audit.record, groups=config.sockets.by_role), GRACE_SECONDS)
        yield desk


def _computing(config: SiteConfig) -> tuple[tuple[Compute, ...], dict[str, Any]]:
    """What the site trains on, and what to tell of it."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    computes = computes_of(config.compute)
    told = describe(computes)
    _log.info("trains on %s", ", ".join(f"{key} {value}" for key, value in told.items() if key != "event"))
    return computes, told


def local_api(desk: Desk, paths: Paths, config: SiteConfig) -> LocalApi:
    """What this daemon does for its people."""

    def tell_data() -> Mapping[str, Any]:
        data = desk.service.data
        return {
            "name": config.data.name,
            "records": len(data.train),
            "units": data.train.num_units,
            "held_back_records": len(data.held_back),
            "sha256": fingerprint_of(paths.folder / config.data.train),
        }

    def reload_data() -> Mapping[str, Any]:
        desk.service.replace_data(read_site_data(paths.folder, config.data))
        return tell_data()

    def tell_head() -> Mapping[str, Any]:
        head = desk.audit.head()
        return {"name": head.name, "number": head.number, "digest": head.digest.hex(), "at": head.at}

    def accept_record(asked: RecordAccepted) -> Mapping[str, Any]:
        try:
            desk.audit.accept_new_record(asked.name, why=asked.why)
        except ValueError as error:
            raise Malformed(str(error)) from None
        return {"name": asked.name, "accepted": True}

    return answer_from(
        desk.permission,
        more_status=lambda: {"consortium": desk.site.join.consortium, "roster": desk.site.signed_roster.number},
        data=tell_data,
        reload_data=reload_data,
        audit_head=tell_head,
        accept_record=accept_record,
    )


def fingerprint_of(path: Path) -> str:
    """SHA-256 of a file of records, in hexadecimal: what spending is counted for."""
    digest = sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _permission(
    site: SiteFolder, config: SiteConfig, paths: Paths, audit: AuditChain, closing: ExitStack
) -> Permission:
    """The site's word "no", over its approvals and its ledger, which ``closing`` closes."""
    policy_path = paths.folder / POLICY_FILE
    approvals = Approvals(paths.approvals)
    closing.callback(approvals.close)
    release_approvals = ReleaseApprovals(paths.release_approvals)
    closing.callback(release_approvals.close)
    ledger = open_ledger(
        paths.ledger,
        site.storage_key,
        dataset=config.data.name,
        site=site.identity.name,
        policy_path=policy_path,
        audit=audit,
        audit_folder=paths.audit,
    )
    closing.callback(ledger.close)
    return Permission(
        site=site.identity.name,
        policy_path=policy_path,
        approvals=approvals,
        release_approvals=release_approvals,
        ledger=ledger,
        dataset=config.data.name,
        record=audit.record,
    )


def _audit_chain(site: SiteFolder, paths: Paths) -> AuditChain:
    identity = site.identity
    try:
        days = load_policy(paths.folder / POLICY_FILE).audit.retention_days
    except InvalidConfig:  # such a policy permits nothing, but what is recorded is kept
        days = RETENTION_DAYS
    return AuditChain(
        paths.audit,
        name=identity.name,
        sign=partial(sign, identity),
        public_key=identity.public().signing_key,
        retention_days=days,
    )
