"""Who masks with whom, who holds whose shares, and how many shares open a secret.

Bonawitz et al. 2017 (CCS, "Practical Secure Aggregation"): every site with every other. Bell et al. 2020 (CCS, "Secure
Single-Server Aggregation with (Poly)Logarithmic Overhead"), section 3: with many sites a sparse random graph does. As
there, it is a Harary graph: sites stand on a circle in random order, and each masks with the k/2 next on either side.
A site's two secrets (the seed of its self-mask, its mask key) are shared among its neighbourhood, which is its k
neighbours and itself: m = k + 1 holders, t of whom open one.

**What a coordinator may do.** There is no exchange in which sites compare what they were told (docs/adr/0011), so it
may tell every site another list of participants and of survivors. But an honest site (``fedseek/reveal.py``) answers
once a round; only if the survivors are min_survivors or more, t or more of its neighbourhood, itself among them; and
only if each of its surviving neighbours signed the site's own list of participants. So it may be told that e = m - t of
its neighbourhood are missing, at most. It gives a share of the mask key of those participants it is told are gone
(*claims* that they vanished) and of the self-mask of the others. At most c of the holders of an honest site's secrets
collude; these give everything. A secret then takes t - c honest answers. An honest site is *lost* if its mask key opens
(set V), *summed* if its self-mask opens and its update is in a sum that carries no unknown mask (set T).

**Two stories.** Nobody's two secrets both open, for then 2 (t - c) <= m - c, and t is such that 2t > m + c.

**Complete graph.** m = n, t = floor((n + c) / 2) + 1; each answer leaves out at most d = n - min_survivors sites. Say
T is not empty. Self-masks of T opened by answers about two lists of participants would take 2 (t - c) of the n - c
honest sites; so it is one list P, and a >= t - c answers are about it. Honest sites outside P (x of them; mask keys of
T's partners inside P are known, so all others in P are in T) are missing from those a answers, each in V costs t - c
claims: |V| (t - c) + a x <= (n - c) d. Therefore |V| + x <= (n - c) d / (t - c), which ``honest_in_sum`` takes off.
With d = n - t that leaves two or more: write h = n - c; then t - c >= (h + 1) / 2, and h d / (t - c) = h^2 / (t - c) -
h <= h - 2 + 2 / (h + 1), rounded down h - 2. The tests play attacks that leave exactly as many.

**Sparse graph.** Write c for the most colluders in a neighbourhood. The degree is chosen so that 2t > m + c and

    (k/2 - c) (t - c)  >  (3k/2) e - e (e - 1) - c e,                                                    (*)

with which k > 3e + 2c (the tests check it). Then no mixture of lists isolates anybody:

1. The neighbourhood of a site in T or V holds at most e + c places that are silent or collude: m - e - c answers are
   needed. If two honest answers with none in between are about different participants, no honest site is present in
   both. Their neighbourhoods share m - r sites when they are r places apart, so m - r <= 2e + c, and r - 1 > e + c
   silent or colluding places lie between them.
2. Any k/2 places in a row hold a site of T, if there is one. Else take one at place 0 with none at 1 to k/2, the
   *gap*, and let P be its participants. By 1, all answers in its neighbourhood are about P, and one of them comes from
   a place 0 to k/2, so it sees the whole gap. Honest sites of the gap outside V (set W) are not in P, since a mask
   with them would stay; so |W| <= e. For an honest site h, let x(h) be its claims on V in the gap plus the sites of W
   in its neighbourhood. Then x(h) <= min(e, what its neighbourhood has of the gap): both kinds are missing from an
   answer about P; a silent site claims nothing; and an answer about another list comes from a place q in k/2 + 1 to k,
   with e + c + 1 silent or colluding places in a row between place 0 and q: by 1, no site of V in the gap is its
   neighbour. Summed over the 3k/2 places whose neighbourhoods reach the gap, less those of c' <= c colluders inside
   it, this is at most (3k/2) e - e (e - 1) - c' e. But each site of the gap that does not collude is counted t - c
   times or more (W by all m - c honest holders), together (k/2 - c') (t - c). As t - c > e, (*) excludes it for every
   c' <= c.
3. So by 1 all honest answers are about one list P, and T is every honest site of P that is not in V: one sum, not two.
   Counted as in the complete graph: a site outside P does not answer, and is missing from t - c - k/4 answers or more,
   since T has a site within k/4 of it; there are x <= d = n - min_survivors of them. Hence |V| + x <= ((n - c_all - x)
   e + x k/4) / (t - c), with c_all colluders in all.

**What it costs.** The degree grows with the colluders and drop-outs of a neighbourhood: 2 c without drop-outs, 3.4 e
without colluders, 2.8 (c + e) for as many of both. For fixed numbers of both it does not grow with n; for fixed shares
of n it does, more than log n. Bell et al. have log n against a malicious server because sites sign, before they reveal,
which neighbours they take to be alive (their section 4): one exchange more a round.

**What this is not about.** All honest sites must use one key list: another list is another graph. And it is about
masks that shares open, those of the adapter. The same count does not protect a sum that only some sites send, such as a
head of one kind; its masks are another matter (docs/adr/0012).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final

from fedseek.errors import InvalidPlan
from fedseek.secagg.stream import words

MAX_GRAPH_SITES = 1024

# Up to here the complete graph costs a site less than 0.1 s a million values, and needs no probability.
FULL_GRAPH_SITES = 20

# Colluders gather in one neighbourhood of a sparse graph with probability at most 2^-SECURITY_BITS, also when a
# coordinator that chooses who is listed draws 2^GRINDING_BITS graphs and keeps the one it likes best (the seed is
# public).
SECURITY_BITS = 40
GRINDING_BITS = 40
# A neighbourhood loses more holders than it can, with as many drop-outs as planned: the round is lost, nothing leaks.
CORRECTNESS_BITS = 30

_PURPOSE: Final = b"fedseek/graph/v1"


@dataclass(frozen=True, slots=True)
class GraphParams:
    """The shape of a cohort's graph; public, derived by ``choose_graph``.

    Attributes:
        num_sites: sites listed, n.
        degree: neighbours of each site, k; n - 1 in the complete graph.
        threshold: shares that open a secret, t, of the degree + 1 there are. A site must not answer a list of
            survivors that holds fewer of its neighbourhood.
        min_survivors: a site must not answer a list of survivors that is shorter.
        colluders: sites that may work with the coordinator, in all.
        colluders_nearby: most colluders among the holders of one honest site's secrets that ``threshold`` withstands.
        dropouts_nearby: holders that the secrets of a site can do without, e = degree + 1 - threshold.
    """

    num_sites: int
    degree: int
    threshold: int
    min_survivors: int
    colluders: int
    colluders_nearby: int
    dropouts_nearby: int


@lru_cache(maxsize=64)
def choose_graph(num_sites: int, *, colluders: int, dropout_fraction: float) -> GraphParams:
    """Choose the complete graph for few sites, and the thinnest sparse graph that is safe for many.

    In the complete graph m = n, and t never exceeds n as long as two sites are honest. ``dropout_fraction`` plays no
    part in it: n - t sites may drop out. It is also what many sites get where no sparse graph is safe.

    A sparse graph is safe if condition (*) of the module holds for these two numbers, exactly computed (after Bell et
    al. 2020, section 3), with d = floor(dropout_fraction * n) drop-outs that do not depend on the graph:

    - ``colluders_nearby``: the chance that some honest site has more colluders among its neighbours is at most
      2^-(SECURITY_BITS + GRINDING_BITS);
    - ``dropouts_nearby``: the chance that some neighbourhood loses more is at most 2^-CORRECTNESS_BITS. Should it, or
      should drop-outs be chosen to that end, sites refuse to answer: the round is lost, and nothing leaks.

    Args:
        num_sites: n, in [1, 1024].
        colluders: sites that may work with the coordinator, c >= 0.
        dropout_fraction: share of sites that may drop out of a round, at any of its steps, in [0, 1).

    Returns:
        The graph's shape.

    Raises:
        InvalidPlan: fewer than two sites are left honest, and a sum of one update hides nothing.
        ValueError: an argument is out of range.
    """
    if not (1 <= num_sites <= MAX_GRAPH_SITES and colluders >= 0 and 0 <= dropout_fraction < 1):
        raise ValueError(
            f"graph: got {num_sites} sites, {colluders} colluders, dropout fraction {dropout_fraction}; "
            f"wanted 1 to {MAX_GRAPH_SITES}, 0 or more, and 0 or more but below 1"
        )
    if colluders + 2 > num_sites:
        raise InvalidPlan(
            [f"colluders: got {colluders} of {num_sites} sites; wanted two sites or more left honest"],
            source="graph",
            hint="the sum of a single honest site is its update; lower the number of colluders or admit more sites",
        )
    # As written, not as stored: 0.29 of 100 sites is 29, and 0.29 * 100 is 28.999...
    dropouts = math.floor(Fraction(str(dropout_fraction)) * num_sites)
    if num_sites > FULL_GRAPH_SITES:
        for degree in range(2, num_sites - 1, 2):
            params = _sparse(num_sites, degree, colluders, dropouts)
            if params is not None:
                return params
    threshold = (num_sites + colluders) // 2 + 1
    return GraphParams(num_sites, num_sites - 1, threshold, threshold, colluders, colluders, num_sites - threshold)


def honest_in_sum(params: GraphParams, *, min_survivors: int = 0) -> int:
    """The least number of honest updates in any sum that opens, whatever the coordinator tells each site.

    Two or more; the module has the proof. A guarantee for the sites that answer by the rules of ``fedseek/reveal.py``;
    in a sparse graph, but for the chance that colluders gather.

    In the complete graph all honest sites but floor((n - c) d / (t - c)), where d = n - min_survivors sites may be
    missing from a list. More survivors asked for, fewer missing, more in the sum. It costs a coordinator nothing extra
    to lose d of them: it need not list them. It gains nothing beyond these if (n - c) d < (d + 1) (t - c); with a
    threshold as high as t = n - d that is d (d + 1) < n - c.

    In a sparse graph all but floor(((n - c) e + d max(0, k/4 - e)) / (t - colluders_nearby)), and at least 2n / k,
    since any k/2 places in a row have one.

    Args:
        params: the graph.
        min_survivors: of which a round enforces more than ``params.min_survivors``.

    Raises:
        ValueError: more survivors are asked for than there are sites.
    """
    if min_survivors > params.num_sites:
        raise ValueError(f"graph: got min_survivors {min_survivors}; wanted at most {params.num_sites}, the sites")
    missing = params.num_sites - max(min_survivors, params.min_survivors)
    honest = params.num_sites - params.colluders
    answers_needed = params.threshold - params.colluders_nearby
    if params.degree == params.num_sites - 1:
        return honest - honest * missing // answers_needed
    nearby = min(params.dropouts_nearby, missing)
    lost = (honest * nearby + missing * max(0, params.degree // 4 - nearby)) // answers_needed
    return max(honest - lost, -(-2 * params.num_sites // params.degree))


def neighbours(num_sites: int, degree: int, seed: bytes) -> tuple[tuple[int, ...], ...]:
    """The neighbours of every position.

    Normative for degree < n - 1: a list holds the positions 0 to n - 1 in order. For i = n - 1 down to 1, take the
    next word w of the stream (fedseek/secagg/stream.py, before reduction) of ``seed`` for the purpose
    "fedseek/graph/v1", skipping w >= floor(2^64 / (i + 1)) * (i + 1); swap entries i and w mod (i + 1) (Fisher and
    Yates; Knuth, vol. 2, algorithm 3.4.2P). Read as a circle, entries at most degree/2 steps apart are neighbours.

    Args:
        num_sites: n, in [2, 1024].
        degree: n - 1, or even and below it.
        seed: 16 or 32 bytes, public, the same at every site; the complete graph does not depend on it.

    Returns:
        For each position its neighbours in ascending order, itself not among them; v is one of u's exactly if u is
        one of v's.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 2 <= num_sites <= MAX_GRAPH_SITES:
        raise ValueError(f"graph: got {num_sites} sites; wanted 2 to {MAX_GRAPH_SITES}")
    if degree != num_sites - 1 and not (2 <= degree < num_sites - 1 and degree % 2 == 0):
        raise ValueError(f"graph: got degree {degree}; wanted {num_sites - 1}, or an even number from 2 below it")
    circle = _permutation(num_sites, seed)
    if degree == num_sites - 1:
        return tuple(tuple(v for v in range(num_sites) if v != u) for u in range(num_sites))
    steps = [step for reach in range(1, degree // 2 + 1) for step in (-reach, reach)]
    found: list[tuple[int, ...]] = [()] * num_sites
    for place, position in enumerate(circle):
        found[position] = tuple(sorted(circle[(place + step) % num_sites] for step in steps))
    return tuple(found)


def _permutation(count: int, seed: bytes) -> list[int]:
    order = list(range(count))
    stream = (int(word) for piece in words(seed, _PURPOSE) for word in piece)
    for i in range(count - 1, 0, -1):
        limit = (1 << 64) // (i + 1) * (i + 1)
        j = next(word for word in stream if word < limit) % (i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def _sparse(num_sites: int, degree: int, colluders: int, dropouts: int) -> GraphParams | None:
    """The graph of this degree, or None where it is not safe."""
    nearby = _colluders_nearby(num_sites, degree, colluders)
    missing = _dropouts_nearby(num_sites, degree, dropouts)
    threshold = degree + 1 - missing
    if 2 * threshold <= degree + 1 + nearby or not _no_gap_opens(degree, threshold, nearby):
        return None
    return GraphParams(num_sites, degree, threshold, num_sites - dropouts, colluders, nearby, missing)


def _no_gap_opens(degree: int, threshold: int, nearby: int) -> bool:
    """Condition (*) of the module: k/2 places in a row need more honest answers than can be had."""
    half, missing = degree // 2, degree + 1 - threshold
    return (half - nearby) * (threshold - nearby) > 3 * half * missing - missing * (missing - 1) - nearby * missing


def _colluders_nearby(num_sites: int, degree: int, colluders: int) -> int:
    """Smallest c such that n P[an honest site has more than c colluders among its k neighbours] <= 2^-bits."""
    allowed = math.comb(num_sites - 1, degree)
    more = 0
    for count, ways in _hypergeometric(num_sites - 1, colluders, degree):
        more += ways
        if num_sites * more << SECURITY_BITS + GRINDING_BITS > allowed:
            return count
    raise AssertionError("all draws together have probability one")


def _dropouts_nearby(num_sites: int, degree: int, dropouts: int) -> int:
    """Smallest e such that P[some neighbourhood loses more than e] <= 2^-CORRECTNESS_BITS, by a union bound.

    Over dealers that stay, who answer for themselves, and dealers that drop out, who are one loss themselves.
    """
    if not dropouts:
        return 0
    allowed = math.comb(num_sites - 1, degree)
    stays = dict(_hypergeometric(num_sites - 1, dropouts, degree))
    leaves = {count + 1: ways for count, ways in _hypergeometric(num_sites - 1, dropouts - 1, degree)}
    more = 0
    for count in range(min(dropouts, degree + 1), -1, -1):
        more += (num_sites - dropouts) * stays.get(count, 0) + dropouts * leaves.get(count, 0)
        if more << CORRECTNESS_BITS > allowed:
            return count
    raise AssertionError("all draws together have probability one")


def _hypergeometric(population: int, marked: int, draws: int) -> Iterator[tuple[int, int]]:
    """Descending counts of marked among ``draws`` out of ``population``, each with its exact number of ways.

    Integers, because a floating-point tail near 2^-81 is nobody's proof. Each step is a ratio of neighbouring terms.
    """
    count = min(marked, draws)
    ways = math.comb(marked, count) * math.comb(population - marked, draws - count)
    while count >= 0 and ways:
        yield count, ways
        ways = ways * count * (population - marked - draws + count) // ((marked - count + 1) * (draws - count + 1))
        count -= 1
