"""What others do: float32 in the clear, and CKKS through TenSEAL's vectors with the parameters of its tutorials.

Both are measured like our own sum: same updates, same process of its own for the adding side.
"""

from __future__ import annotations

import msgspec
import numpy as np
from adding_side import start_ckks, start_plain
from party import Party
from workload import RECEIVERS, Stopwatch, Truth, Workload

# TenSEAL, tutorials "Working with approximate numbers" and "Encrypted evaluation": degree 8192, primes of 60, 40, 40
# bits, scale 2^40. A vector takes half the degree.
CKKS_DEGREE, CKKS_PRIMES, CKKS_SCALE = 8192, (60, 40, 40), 2.0**40
CKKS_CHUNK = CKKS_DEGREE // 2


def measure_plain(workload: Workload) -> dict[str, object]:
    """float32 in the clear, unweighted as in the simplest peer: the price of no lock at all."""
    watch, truth, total = Stopwatch(), Truth.empty(workload), np.zeros(workload.values, dtype=np.float32)
    up_bytes = 0
    with Party(start_plain, workload.values) as adding:
        for site in workload.present:
            vector, _ = workload.update(site)
            with watch("up", site):
                message = vector.tobytes()
            adding.ask("update", message)
            up_bytes = max(up_bytes, len(message))
            total += vector
            truth.add(vector, 1)
        answer = adding.ask("finish")
    for site in workload.present[:RECEIVERS]:
        with watch("down", site):
            summed = np.frombuffer(answer, dtype=np.float32)
            mean = summed.astype(np.float64) / len(workload.present)
    return {
        **_measured(workload, watch, adding, up_bytes=up_bytes, answer=answer),
        "exact": bool((summed == total).all()),
        "max_error": truth.error(mean),
    }


def measure_ckks(workload: Workload) -> dict[str, object]:
    """One key pair for all sites; the adding side holds the context without the secret key."""
    import tenseal

    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, CKKS_DEGREE, coeff_mod_bit_sizes=list(CKKS_PRIMES), n_threads=1)
    context.global_scale = CKKS_SCALE
    public = context.serialize(save_secret_key=False, save_galois_keys=False, save_relin_keys=False)
    watch, truth, up_bytes = Stopwatch(), Truth.empty(workload), 0
    with Party(start_ckks, public) as adding:
        for site in workload.present:
            vector, _ = workload.update(site)
            with watch("up", site):
                chunks = [vector[start : start + CKKS_CHUNK] for start in range(0, workload.values, CKKS_CHUNK)]
                sent = [tenseal.ckks_vector(context, chunk.tolist()).serialize() for chunk in chunks]
            message = msgspec.msgpack.encode(sent)
            del sent
            adding.ask("update", message)
            up_bytes = max(up_bytes, len(message))
            truth.add(vector, 1)
        answer = adding.ask("finish")
    for site in workload.present[:RECEIVERS]:
        with watch("down", site):
            got = msgspec.msgpack.decode(answer, type=tuple[bytes, ...])
            opened = [tenseal.ckks_vector_from(context, data).decrypt() for data in got]
            mean = np.concatenate([np.array(each) for each in opened]) / len(workload.present)
    error = truth.error(mean)
    return {
        **_measured(workload, watch, adding, up_bytes=up_bytes, answer=answer),
        "exact": error == 0,  # CKKS is approximate by design
        "max_error": error,
    }


def _measured(
    workload: Workload, watch: Stopwatch, adding: Party, *, up_bytes: int, answer: bytes
) -> dict[str, object]:
    return {
        "up_bytes_per_value": round(up_bytes / workload.values, 4),
        "down_bytes_per_value": round(len(answer) / workload.values, 4),
        "site_up_s": round(watch.median("up", sites=workload.present), 4),
        "site_down_s": round(watch.median("down", sites=workload.present[:RECEIVERS]), 4),
        "add_s_per_site": round(float(np.median(adding.seconds["update"])), 4),
        "unmask_s": 0.0,
        "finish_s": round(adding.seconds["finish"][0], 4),
        "server_idle_rss_mb": round(adding.idle_mb, 1),
        "server_peak_rss_mb": round(adding.peak_mb, 1),
    }
