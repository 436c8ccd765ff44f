"""The process that plays a run: Flower's simulation engine with the coordinator in it, site hosts beside it.

Started by ``fedseek simulate`` as ``python -m simulations.engine RUN_FOLDER SCRATCH``, in a process group of its own, so
that whatever happens the caller can end all of it and remove what it left in SCRATCH. It exits with the code of the
error's family and leaves the text in ``failure.json``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings
from pathlib import Path

from fedseek.daemon.bundle import FLOWER_ENVIRONMENT

QUIET = {
    **FLOWER_ENVIRONMENT,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning,ignore::DeprecationWarning",
}


def play(run_folder: Path, scratch: Path) -> None:
    """Play the run of ``run_folder`` to its release.

    Raises:
        FedseekError: the run failed; nothing half-written is left in ``release/``.
    """
    import ray
    from flwr.simulation import run_simulation

    from fedseek.daemon.reports import EventLog, peak_rss_mb
    from fedseek.identity.roster import Roster
    from fedseek_server.app import build_server_app
    from fedseek_server.coordinator import Coordinator
    from fedseek_server.releasing import write_release
    from fedseek_site.app import build_client_app
    from simulations.events import coordinator_log
    from simulations.hosts import deliver_to_host, start_hosts
    from simulations.run_folder import open_scenario

    scenario = open_scenario(run_folder)
    log = EventLog(coordinator_log(run_folder))
    sites = len(scenario.spec.sites)
    workers = min(scenario.spec.simulation.workers, sites, os.cpu_count() or 1)
    start_ray(scratch, workers)
    try:
        hosts = start_hosts(run_folder, scratch, workers)
        roster = Roster.of(entry for entries in ray.get([host.enrol.remote() for host in hosts]) for entry in entries)
        ray.get([host.trust.remote(roster.canonical_bytes()) for host in hosts])
        coordinator = Coordinator(scenario.plan, roster, run=run_folder.name, observe=log.write, wait_seconds=0.0)

        def finish(done: Coordinator) -> None:
            write_release(done, run_folder / "release")
            log.write(
                {
                    "event": "finished",
                    "secret_key_type_loaded": "fedseek.he.keys" in sys.modules,
                    "coordinator_rss_mb": peak_rss_mb(),
                    "site_rss_mb": max(ray.get([host.peak_rss_mb.remote() for host in hosts])),
                }
            )

        run_simulation(
            server_app=build_server_app(coordinator, finish),
            client_app=build_client_app(functools.partial(deliver_to_host, hosts=workers)),
            num_supernodes=sites,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    finally:
        ray.shutdown()


def start_ray(scratch: Path, workers: int) -> None:
    """Ray on loopback only, without dashboard or usage report, its files in ``scratch``."""
    import ray

    ray.init(
        num_cpus=workers,
        num_gpus=0,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=512 << 20,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(scratch),
    )


def main() -> None:
    """Play one run; the process's only broad ``except`` turns any failure into ``failure.json`` and an exit code."""
    run_folder, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    os.environ.update(QUIET)
    os.environ["FLWR_HOME"] = str(scratch)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        play(run_folder, scratch)
    except Exception as error:  # noqa: BLE001  outer edge of the process
        sys.exit(report_failure(error, run_folder))


def report_failure(error: Exception, run_folder: Path) -> int:
    """Write down why the run failed; returns the exit code."""
    from fedseek.errors import FedseekError

    cause: BaseException = error
    while not isinstance(cause, FedseekError) and (inner := getattr(cause, "cause", None) or cause.__cause__):
        cause = inner
    logging.getLogger(__name__).exception("the run failed", exc_info=error)
    known = isinstance(cause, FedseekError)
    document = {
        "code": type(cause).__name__,
        "message": cause.message if isinstance(cause, FedseekError) else repr(cause),
        "hint": cause.hint if isinstance(cause, FedseekError) else "see engine.log in the run folder",
        "exit_code": cause.exit_code if isinstance(cause, FedseekError) else 1,
        "known": known,
    }
    (run_folder / "failure.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    return int(document["exit_code"])


if __name__ == "__main__":
    main()
