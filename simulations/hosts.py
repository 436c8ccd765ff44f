"""Site services in processes of their own, as in a deployment.

The engine's process runs the coordinator; these processes hold the sites' data, private keys and the group key. What
passes between the two is what would pass over a network: encoded messages, and public roster entries. A host serves
several sites, so memory grows with the number of workers and not with the number of sites.

The imports inside :class:`SiteHost` are deliberate: importing this module must not bring a secret-key type into the
engine's process.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from fedseek.daemon.reports import EventLog
from simulations.events import site_log


class SiteHost:
    """Serves every ``stride``-th site of a scenario, starting from ``first``; lives in a Ray actor's process."""

    def __init__(self, run_folder: str, scratch: str, *, first: int, stride: int) -> None:
        import torch

        from fedseek.identity.keys import SiteIdentity
        from fedseek.identity.vault import StorageKey
        from fedseek_site.ledger import Ledger
        from fedseek_site.service import SiteService
        from simulations.run_folder import open_scenario, synthetic_folder
        from simulations.scenario import read_site_data

        torch.set_num_threads(1)
        folder = Path(run_folder)
        logging.basicConfig(filename=folder / f"{host_name(first)}.log", level=logging.WARNING, encoding="utf-8")
        scenario = open_scenario(folder)
        self._services: dict[int, SiteService] = {}
        self._away: dict[int, frozenset[int]] = {}
        for index in range(first, len(scenario.spec.sites), stride):
            site = scenario.spec.sites[index]
            log = EventLog(site_log(folder, site.name))
            data = read_site_data(scenario, site, synthetic=synthetic_folder(folder))
            log.write(
                {
                    "event": "data",
                    "records": len(data.train),
                    "held_back_records": len(data.held_back),
                    "units": data.train.num_units,
                }
            )
            self._away[index] = frozenset(site.away)
            state_folder = Path(scratch) / "sites" / site.name
            state_folder.mkdir(parents=True, exist_ok=True)
            state_folder.chmod(0o700)
            storage_key = StorageKey.generate()  # never written down: with the run, its secrets are gone
            self._services[index] = SiteService(
                SiteIdentity.generate(site.name, site.kind),
                data,
                roster=None,
                state_folder=state_folder,
                storage_key=storage_key,
                ledger=Ledger(state_folder / "ledger.sqlite3", storage_key, dataset=site.name),
                release_folder=folder / "sites" / site.name / "release",
                observe=log.write,
            )

    def enrol(self) -> list[Any]:
        """The public roster entries of this host's sites."""
        return [service.identity.public() for service in self._services.values()]

    def trust(self, roster: bytes) -> None:
        """What people do when they have compared fingerprints: tell each site of this host the roster."""
        from fedseek.identity.roster import parse_roster

        for service in self._services.values():
            service.trust(parse_roster(roster))

    def handle(self, index: int, request: bytes) -> bytes:
        """Give a request to the site with this index.

        Raises:
            ConnectionError: the scenario has the site away in this round.
        """
        from fedseek.messages import RoundRequest, decode_request

        message = decode_request(request)
        if isinstance(message, RoundRequest) and message.round in self._away[index]:
            raise ConnectionError(f"away in round {message.round}")
        return self._services[index].handle(request)

    def peak_rss_mb(self) -> float:
        """Largest resident set of this process so far, in MB."""
        from fedseek.daemon.reports import peak_rss_mb

        return peak_rss_mb()


def host_name(index: int) -> str:
    """Name of a host's actor."""
    return f"site-host-{index}"


def start_hosts(run_folder: Path, scratch: Path, count: int) -> list[Any]:
    """Start ``count`` host processes; returns their actor handles once every site has read its data.

    ``scratch`` takes the sites' journals, which the caller removes after the run.

    Raises:
        ray.exceptions.RayError: a site could not be set up; the cause is the site's own error.
    """
    remote = ray.remote(SiteHost)
    return [
        remote.options(name=host_name(index), num_cpus=0, max_concurrency=1).remote(
            str(run_folder), str(scratch), first=index, stride=count
        )
        for index in range(count)
    ]


def deliver_to_host(node_config: Mapping[str, Any], request: bytes, *, hosts: int) -> bytes:
    """Courier's side: hand a request to the process that holds the site of this Flower node."""
    index = int(node_config["partition-id"])
    actor = ray.get_actor(host_name(index % hosts))
    reply: bytes = ray.get(actor.handle.remote(index, request))
    return reply
