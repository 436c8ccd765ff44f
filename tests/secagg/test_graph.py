import hashlib
import hmac
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, hypergeom

from fedseek.errors import InvalidPlan
from fedseek.secagg import graph
from fedseek.secagg.graph import (
    CORRECTNESS_BITS,
    FULL_GRAPH_SITES,
    GRINDING_BITS,
    SECURITY_BITS,
    GraphParams,
    choose_graph,
    honest_in_sum,
    neighbours,
)

SEED = bytes(range(16))

ATTACK = Fraction(1, 2 ** (SECURITY_BITS + GRINDING_BITS))
LOSS = Fraction(1, 2**CORRECTNESS_BITS)

# (n, c, drop-outs) -> (k, t, colluders nearby, drop-outs nearby, honest updates in a sum). Cost grows with k.
GROWTH = {
    (64, 4, 0.1): (30, 25, 4, 6, 43),
    (64, 3, 0.05): (18, 16, 3, 3, 47),
    (128, 8, 0.1): (58, 47, 8, 12, 83),
    (128, 6, 0.05): (34, 29, 6, 6, 90),
    (256, 16, 0.1): (120, 96, 16, 25, 164),
    (256, 12, 0.05): (68, 57, 12, 12, 178),
    (512, 32, 0.1): (224, 180, 32, 45, 331),
    (512, 25, 0.05): (130, 109, 25, 22, 357),
    (1024, 64, 0.1): (376, 306, 62, 71, 672),
    (1024, 51, 0.05): (210, 178, 45, 33, 725),
    (21, 1, 0.05): (6, 6, 1, 1, 16),
    (24, 1, 0.1): (10, 9, 1, 2, 18),
    (100, 1, 0.1): (36, 27, 1, 10, 61),
    (1024, 1, 0.1): (142, 102, 1, 41, 608),
}


def chosen(key) -> GraphParams:
    num_sites, colluders, dropout_fraction = key
    return choose_graph(num_sites, colluders=colluders, dropout_fraction=dropout_fraction)


def complete(num_sites: int, threshold: int, colluders: int) -> GraphParams:
    return GraphParams(
        num_sites, num_sites - 1, threshold, threshold, colluders, colluders, dropouts_nearby=num_sites - threshold
    )


def tail(above: int, population: int, marked: int, draws: int) -> Fraction:
    """P[more than ``above`` marked], term by term from the definition."""
    ways = sum(
        math.comb(marked, x) * math.comb(population - marked, draws - x)
        for x in range(above + 1, min(marked, draws) + 1)
    )
    return Fraction(ways, math.comb(population, draws))


def colluders_gather(nearby, num_sites, degree, colluders) -> Fraction:
    return num_sites * tail(nearby, num_sites - 1, colluders, degree)


def neighbourhoods_fail(missing, num_sites, degree, dropouts) -> Fraction:
    stays = tail(missing, num_sites - 1, dropouts, degree)
    leaves = tail(missing - 1, num_sites - 1, dropouts - 1, degree) if dropouts else Fraction(0)
    return (num_sites - dropouts) * stays + dropouts * leaves


def least_nearby(num_sites, degree, colluders) -> int:
    return next(x for x in itertools.count() if colluders_gather(x, num_sites, degree, colluders) <= ATTACK)


def least_missing(num_sites, degree, dropouts) -> int:
    return next(x for x in itertools.count() if neighbourhoods_fail(x, num_sites, degree, dropouts) <= LOSS)


def claims_to_be_had(degree: int, missing: int, nearby: int) -> int:
    """Of sites k/2 in a row: place by place, as many as are missing from an answer and are its neighbours."""
    half = degree // 2
    gap = range(1, half + 1)
    places = (sum(abs(place - site) <= half for site in gap) for place in range(1 - degree, 2 * degree))
    return sum(min(missing, overlap) for overlap in places) - nearby * missing


def is_safe(num_sites, degree, nearby, missing, colluders, dropouts) -> bool:
    """The conditions of the docstrings, written down a second time."""
    threshold = degree + 1 - missing
    return (
        2 * threshold > degree + 1 + nearby
        and colluders_gather(nearby, num_sites, degree, colluders) <= ATTACK
        and neighbourhoods_fail(missing, num_sites, degree, dropouts) <= LOSS
        and (degree // 2 - nearby) * (threshold - nearby) > claims_to_be_had(degree, missing, nearby)
    )


def check_sparse(params: GraphParams, colluders: int) -> None:
    num_sites, dropouts = params.num_sites, params.num_sites - params.min_survivors
    assert params.threshold == params.degree + 1 - params.dropouts_nearby
    assert params.degree % 2 == 0
    nearby, missing = params.colluders_nearby, params.dropouts_nearby
    assert is_safe(num_sites, params.degree, nearby, missing, colluders, dropouts)


@pytest.mark.parametrize(
    ("num_sites", "colluders", "threshold"),
    [(2, 0, 2), (3, 0, 2), (3, 1, 3), (4, 1, 3), (4, 2, 4), (8, 2, 6), (20, 1, 11), (20, 18, 20)],
)
def test_few_sites_get_the_complete_graph(num_sites, colluders, threshold):
    params = choose_graph(num_sites, colluders=colluders, dropout_fraction=0.1)
    assert params == complete(num_sites, threshold, colluders)


def test_the_complete_graph_never_needs_more_shares_than_there_are():
    for num_sites in range(2, FULL_GRAPH_SITES + 1):
        for colluders in range(num_sites - 1):
            assert choose_graph(num_sites, colluders=colluders, dropout_fraction=0.0).threshold <= num_sites


def test_many_sites_get_the_complete_graph_where_nothing_less_is_safe():
    assert choose_graph(30, colluders=28, dropout_fraction=0.0) == complete(30, 30, 28)
    assert choose_graph(1024, colluders=1022, dropout_fraction=0.0) == complete(1024, 1024, 1022)
    assert choose_graph(50, colluders=5, dropout_fraction=0.3) == complete(50, 28, 5)


@pytest.mark.parametrize("key", GROWTH)
def test_growth(key):
    params = chosen(key)
    found = (params.degree, params.threshold, params.colluders_nearby, params.dropouts_nearby, honest_in_sum(params))
    assert found == GROWTH[key]
    assert params.colluders == key[1]
    assert params.min_survivors == key[0] - math.floor(key[2] * key[0])


@pytest.mark.parametrize("key", GROWTH)
def test_a_sparse_graph_meets_the_stated_conditions_and_no_thinner_one_does(key):
    num_sites, colluders, dropout_fraction = key
    dropouts = math.floor(dropout_fraction * num_sites)
    params = chosen(key)
    check_sparse(params, colluders)
    for degree in range(max(2, params.degree - 8), params.degree, 2):
        nearby, missing = least_nearby(num_sites, degree, colluders), least_missing(num_sites, degree, dropouts)
        assert not is_safe(num_sites, degree, nearby, missing, colluders, dropouts)


@settings(deadline=None, max_examples=60)
@given(st.integers(21, 200), st.floats(0, 0.9), st.floats(0, 0.5))
def test_every_sparse_graph_is_safe(num_sites, colluding, dropout_fraction):
    colluders = int(colluding * (num_sites - 2))
    params = choose_graph(num_sites, colluders=colluders, dropout_fraction=dropout_fraction)
    assert 2 * params.threshold > params.degree + 1 + params.colluders_nearby
    if params.degree < num_sites - 1:
        check_sparse(params, colluders)


def test_the_degree_does_not_grow_with_the_cohort_for_fixed_numbers_of_colluders_and_drop_outs():
    degrees = [choose_graph(n, colluders=3, dropout_fraction=3 / n).degree for n in (32, 64, 256, 1024)]
    assert degrees == [18, 18, 18, 18]


@pytest.mark.parametrize("key", GROWTH)
def test_exact_tails_agree_with_scipy(key):
    num_sites, colluders, _ = key
    degree = chosen(key).degree
    total = math.comb(num_sites - 1, degree)
    terms = dict(graph._hypergeometric(num_sites - 1, colluders, degree))
    assert sum(terms.values()) == total
    for count, ways in terms.items():
        assert ways / total == pytest.approx(hypergeom.pmf(count, num_sites - 1, colluders, degree), rel=1e-6)


def test_fractions_mean_what_is_written():
    assert 0.145 * 200 < 29
    params = choose_graph(200, colluders=1, dropout_fraction=0.145)
    assert (params.degree < 199, params.min_survivors) == (True, 171)


def test_fewer_than_two_honest_sites_are_refused():
    for num_sites in (1, 2, 5, 21, 100):
        with pytest.raises(InvalidPlan, match="wanted two sites or more left honest") as caught:
            choose_graph(num_sites, colluders=num_sites - 1, dropout_fraction=0.0)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("num_sites", "colluders", "dropout_fraction"),
    [(0, 0, 0.0), (-3, 0, 0.0), (1025, 0, 0.0), (8, -1, 0.0), (8, 1, -0.1), (8, 1, 1.0), (8, 1, float("nan"))],
)
def test_numbers_out_of_range_are_refused(num_sites, colluders, dropout_fraction):
    with pytest.raises(ValueError, match="wanted"):
        choose_graph(num_sites, colluders=colluders, dropout_fraction=dropout_fraction)


# --- the two stories ---------------------------------------------------------------------------------------------


def best_split_opens_both(holders: int, colluders: int, threshold: int) -> bool:
    """Whether some way to tell each honest holder "survived", "dropped" or nothing opens both secrets of a site."""
    honest = holders - colluders
    return any(
        colluders + survived >= threshold and colluders + dropped >= threshold
        for survived in range(honest + 1)
        for dropped in range(honest + 1 - survived)
    )


def test_two_stories_never_open_both_secrets_and_the_threshold_is_the_least_that_does_it():
    for num_sites in range(2, 41):
        for colluders in range(num_sites - 1):
            threshold = (num_sites + colluders) // 2 + 1
            if num_sites <= FULL_GRAPH_SITES:
                assert choose_graph(num_sites, colluders=colluders, dropout_fraction=0.0).threshold == threshold
            assert not best_split_opens_both(num_sites, colluders, threshold)
            assert best_split_opens_both(num_sites, colluders, threshold - 1)


@pytest.mark.parametrize("key", GROWTH)
def test_two_stories_never_open_both_secrets_in_a_sparse_graph(key):
    params = chosen(key)
    for nearby in range(params.colluders_nearby + 1):
        assert not best_split_opens_both(params.degree + 1, nearby, params.threshold)


def test_the_condition_on_gaps_implies_what_the_proof_also_uses():
    for degree in range(2, 121, 2):
        for missing in range(degree + 1):
            for nearby in range(degree + 1 - 2 * missing):  # 2t > m + c
                if graph._no_gap_opens(degree, degree + 1 - missing, nearby):
                    assert degree > 3 * missing + 2 * nearby


# --- who is next to whom -----------------------------------------------------------------------------------------


def plain_neighbours(num_sites: int, degree: int, seed: bytes) -> list[list[int]]:
    """The definition in the docstring again, with another AES."""
    pseudorandom_key = hmac.digest(bytes(32), seed, hashlib.sha256)
    key = hmac.digest(pseudorandom_key, b"fedseek/stream/v1\x00fedseek/graph/v1\x01", hashlib.sha256)
    cipher = AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=0)
    circle = list(range(num_sites))
    for i in reversed(range(1, num_sites)):
        word = 2**64
        while word >= 2**64 // (i + 1) * (i + 1):
            word = int.from_bytes(cipher.encrypt(bytes(8)), "little")
        j = word % (i + 1)
        circle[i], circle[j] = circle[j], circle[i]
    place = {site: where for where, site in enumerate(circle)}

    def distance(u, v):
        return min((place[u] - place[v]) % num_sites, (place[v] - place[u]) % num_sites)

    return [[v for v in range(num_sites) if 0 < distance(u, v) <= degree // 2] for u in range(num_sites)]


shapes = st.integers(4, 80).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(1, (n - 2) // 2).map(lambda half: 2 * half))
)


@given(shapes, st.binary(min_size=16, max_size=16))
def test_neighbours_follow_their_definition(shape, seed):
    num_sites, degree = shape
    found = neighbours(num_sites, degree, seed)
    assert [list(each) for each in found] == plain_neighbours(num_sites, degree, seed)
    for u, around in enumerate(found):
        assert len(around) == degree
        assert u not in around
        assert list(around) == sorted(set(around))
        assert all(u in found[v] for v in around)


def test_known_answer():
    assert neighbours(6, 2, SEED) == ((3, 5), (2, 4), (1, 5), (0, 4), (1, 3), (0, 2))


def test_words_past_the_last_whole_block_are_skipped(monkeypatch):
    # 2^64 - 1 is a multiple of 3: as a draw among 3 that one word is skipped, as a draw among 2 it is not.
    stream = [2**64 - 1, 1, 2**64 - 1]
    monkeypatch.setattr(graph, "words", lambda seed, purpose: iter([np.array(stream, dtype=np.uint64)]))
    assert graph._permutation(3, SEED) == [0, 2, 1]  # swap 2 and 1, then 1 with itself


@pytest.mark.parametrize("num_sites", [2, 3, 4, 7, 20])
def test_the_complete_graph_is_complete_and_the_same_for_every_seed(num_sites):
    found = neighbours(num_sites, num_sites - 1, SEED)
    assert found == tuple(tuple(v for v in range(num_sites) if v != u) for u in range(num_sites))
    assert found == neighbours(num_sites, num_sites - 1, bytes(32))


def test_another_seed_gives_another_graph():
    graphs = {neighbours(64, 22, bytes([number]) * 16) for number in range(50)}
    assert len(graphs) == 50


def test_all_circles_of_five_are_equally_likely():
    # Twelve ways to seat five at a round table, mirror images alike.
    counts = {}
    for number in range(2400):
        found = neighbours(5, 2, number.to_bytes(16))
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 12
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_colluders_gather_no_more_often_than_bounded(monkeypatch):
    # The same rule with few bits, so that failures can be seen: colluders 0 to 7 of 40 on 3000 random circles.
    monkeypatch.setattr(graph, "SECURITY_BITS", 2)
    monkeypatch.setattr(graph, "GRINDING_BITS", 2)
    nearby = graph._colluders_nearby(40, 10, 8)
    assert 0 < nearby < 8
    failures = {nearby: 0, nearby - 2: 0}
    for number in range(3000):
        found = neighbours(40, 10, number.to_bytes(16))
        most = max(sum(v < 8 for v in found[u]) for u in range(8, 40))
        for allowed in failures:
            failures[allowed] += most > allowed
    assert 0 < failures[nearby] <= 3000 / 2**4
    assert failures[nearby - 2] > 3000 / 2**4


def test_neighbourhoods_lose_too_many_no_more_often_than_bounded(monkeypatch):
    monkeypatch.setattr(graph, "CORRECTNESS_BITS", 4)
    degree, dropouts = 12, 8
    missing = graph._dropouts_nearby(40, degree, dropouts)
    assert 2 < missing < dropouts
    lost = {missing: 0, missing - 2: 0}
    for number in range(3000):
        found = neighbours(40, degree, number.to_bytes(16))
        most = max(sum(holder < dropouts for holder in (u, *found[u])) for u in range(40))
        for allowed in lost:
            lost[allowed] += most > allowed
    assert 0 < lost[missing] <= 3000 / 2**4
    assert lost[missing - 2] > 3000 / 2**4


def test_without_drop_outs_nothing_is_missing_and_all_shares_are_needed():
    params = choose_graph(40, colluders=2, dropout_fraction=0.0)
    assert (params.degree, params.threshold, params.dropouts_nearby, params.min_survivors) == (6, 7, 0, 40)
    assert choose_graph(40, colluders=0, dropout_fraction=0.0).degree == 2


@pytest.mark.parametrize(
    ("num_sites", "degree"), [(1, 0), (0, -1), (1025, 2), (8, 3), (8, 5), (8, 8), (8, 0), (8, -2), (2, 2)]
)
def test_shapes_out_of_range_are_refused(num_sites, degree):
    with pytest.raises(ValueError, match="wanted"):
        neighbours(num_sites, degree, SEED)


@pytest.mark.parametrize("degree", [2, 7])
def test_seeds_of_other_lengths_are_refused(degree):
    with pytest.raises(ValueError, match="seed of 5 bytes"):
        neighbours(8, degree, bytes(5))
