"""A coordinator that tells every site another list of participants and of survivors: how few updates it can corner.

The whole attack as an integer program, from the rules of ``fedseek/reveal.py`` and nothing of the proof in
``fedseek/secagg/graph.py``: which of two lists of participants a site masked with, what it is told to be missing, and
what opens for it. Larger graphs: the claims that empty a gap, as a flow.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from fedseek.secagg.graph import GraphParams, _no_gap_opens, choose_graph, honest_in_sum

Term = tuple[str, int]


@dataclass
class Program:
    """Binary variables by name, and rows ``sum of terms >= lower``."""

    names: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[list[Term], float]] = field(default_factory=list)

    def at_least(self, lower: float, *terms: Term) -> None:
        for name, _ in terms:
            self.names.setdefault(name, len(self.names))
        self.rows.append((list(terms), lower))

    def solve(self, cost: Iterable[str] = ()) -> Mapping[str, bool] | None:
        """The cheapest solution, or None where there is none."""
        entries = [
            (row, self.names[name], factor) for row, (terms, _) in enumerate(self.rows) for name, factor in terms
        ]
        row, column, factor = zip(*entries, strict=True)
        matrix = csr_array((factor, (row, column)), shape=(len(self.rows), len(self.names)))
        lower = [lower for _, lower in self.rows]
        weights = np.zeros(len(self.names))
        weights[[self.names[name] for name in cost]] = 1
        found = milp(
            weights, constraints=LinearConstraint(matrix, lower), integrality=np.ones_like(weights), bounds=Bounds(0, 1)
        )
        assert found.status in (0, 2), found.message  # solved, or proven to have no solution
        return None if found.x is None else {name: found.x[place] > 0.5 for name, place in self.names.items()}


@dataclass(frozen=True)
class Attack:
    """The program and who is honest; ``summed(v)`` is the variable that says that v is in the sum."""

    program: Program
    honest: tuple[int, ...]

    def fewest(self) -> int:
        """Least number of honest updates in a sum that opens."""
        self.program.at_least(1, *((f"summed {v}", 1) for v in self.honest))
        cost = [f"summed {v}" for v in self.honest]
        found = self.program.solve(cost)
        assert found is not None
        return sum(found[name] for name in cost)

    def empties(self, gap: Iterable[int]) -> bool:
        """Whether a sum can open that holds site 0 and nobody of ``gap``."""
        self.program.at_least(1, ("summed 0", 1))
        for v in set(gap) & set(self.honest):
            self.program.at_least(0, (f"summed {v}", -1))
        return self.program.solve() is not None


def neighbourhoods(num_sites: int, degree: int) -> list[set[int]]:
    """Of every place on the circle, itself included."""
    if degree == num_sites - 1:
        return [set(range(num_sites))] * num_sites
    steps = range(-(degree // 2), degree // 2 + 1)
    return [{(v + step) % num_sites for step in steps} for v in range(num_sites)]


def attack(num_sites: int, degree: int, threshold: int, missing: int, colluding: set[int], *, lists: int = 2) -> Attack:
    """All that a coordinator with these colluders may say, if at most ``missing`` may be missing from each answer.

    Variables, each once for every list l of participants: ``in l v``: v is on it; ``masked l v``: v masked by it;
    ``answers l h``: h answers about it. ``absent h v``: h is told that v is missing, or v did not sign h's list.
    ``claim h v``, ``alive h v``: h gives its share of v's mask key, of its self-mask. ``lost v``, ``summed v``: opened.
    """
    program, around, told = Program(), neighbourhoods(num_sites, degree), range(lists)
    honest = tuple(v for v in range(num_sites) if v not in colluding)
    for h in honest:
        program.at_least(-1, *((f"masked {own} {h}", -1) for own in told))
        program.at_least(-1, (f"summed {h}", -1), (f"lost {h}", -1))  # 2t > m + c
        program.at_least(-missing, *((f"absent {h} {v}", -1) for v in around[h] - {h}))
        for own in told:
            program.at_least(0, (f"masked {own} {h}", 1), (f"answers {own} {h}", -1))
            program.at_least(0, (f"in {own} {h}", 1), (f"answers {own} {h}", -1))
    for v in honest:
        _add_answers_about(program, v, around[v] - colluding, told)
        enough = threshold - len(around[v] & colluding)
        others = around[v] - colluding
        program.at_least(0, (f"lost {v}", -enough), *((f"claim {h} {v}", 1) for h in others - {v}))
        program.at_least(0, (f"summed {v}", -enough), *((f"alive {h} {v}", 1) for h in others))
        program.at_least(0, (f"summed {v}", -1), *((f"masked {own} {v}", 1) for own in told))
        for w in others - {v}:  # every mask with a participant cancels in the sum, or is known
            for own in told:
                known = ((f"summed {w}", 1), (f"lost {w}", 1))
                program.at_least(-2, *known, (f"summed {v}", -1), (f"masked {own} {v}", -1), (f"in {own} {w}", -1))
    return Attack(program, honest)


def _add_answers_about(program: Program, v: int, holders: set[int], told: range) -> None:
    for h in holders:
        answered = [(f"answers {own} {h}", 1) for own in told]
        program.at_least(0, *answered, (f"alive {h} {v}", -1))
        if h == v:  # nobody answers a list that lacks itself
            continue
        program.at_least(0, *answered, (f"claim {h} {v}", -1))
        program.at_least(0, (f"absent {h} {v}", 1), (f"claim {h} {v}", -1))
        program.at_least(-1, (f"absent {h} {v}", -1), (f"alive {h} {v}", -1))
        for own in told:
            program.at_least(0, (f"absent {h} {v}", 1), (f"answers {own} {h}", -1), (f"masked {own} {v}", 1))
            program.at_least(0, (f"absent {h} {v}", 1), (f"answers {own} {h}", -1), (f"in {own} {v}", 1))
            program.at_least(-1, (f"claim {h} {v}", -1), (f"answers {own} {h}", -1), (f"in {own} {v}", 1))


# --- the complete graph ------------------------------------------------------------------------------------------


def complete(num_sites: int, colluders: int, threshold: int, min_survivors: int) -> GraphParams:
    missing = num_sites - threshold
    return GraphParams(num_sites, num_sites - 1, threshold, min_survivors, colluders, colluders, missing)


@pytest.mark.parametrize("num_sites", [2, 3, 4, 5, 6, 7])
def test_the_best_attack_on_a_complete_graph_leaves_exactly_as_many_as_stated(num_sites):
    for colluders in range(num_sites - 1):
        params = choose_graph(num_sites, colluders=colluders, dropout_fraction=0.0)
        for wanted in range(params.threshold, num_sites + 1):
            lists = 2 if num_sites < 6 else 1  # the second gives nothing more, and takes its time
            shape = (num_sites, num_sites - 1, params.threshold, num_sites - wanted, set(range(colluders)))
            best = attack(*shape, lists=lists).fewest()
            assert best == honest_in_sum(params, min_survivors=wanted)


@pytest.mark.parametrize("num_sites", [4, 5, 6, 7])
def test_few_drop_outs_under_a_threshold_as_high_leave_nothing_to_gain_from_mixing_lists(num_sites):
    for colluders in range(num_sites - 2):
        for missing in range(1, num_sites):
            threshold, honest = num_sites - missing, num_sites - colluders
            if 2 * threshold <= num_sites + colluders:
                continue
            best = attack(num_sites, num_sites - 1, threshold, missing, set(range(colluders)), lists=1).fewest()
            assert best == honest_in_sum(complete(num_sites, colluders, threshold, threshold))
            assert (best == honest - missing) == (missing * (missing + 1) < honest)


def test_a_threshold_one_lower_leaves_a_single_update():
    for num_sites, colluders in ((3, 0), (5, 0), (6, 1), (7, 2)):
        threshold = (num_sites + colluders) // 2
        assert attack(num_sites, num_sites - 1, threshold, num_sites - threshold, set(range(colluders))).fewest() == 1


def test_no_sum_of_a_complete_graph_holds_fewer_than_two():
    for num_sites in range(2, 61):
        for colluders in range(num_sites - 1):
            params = complete(num_sites, colluders, *[(num_sites + colluders) // 2 + 1] * 2)
            honest = num_sites - colluders
            left = [honest_in_sum(params, min_survivors=wanted) for wanted in range(params.threshold, num_sites + 1)]
            assert left[0] == honest_in_sum(params) >= 2
            assert left == sorted(left)
            assert left[-1] == honest
            if honest % 2:
                assert left[0] == 2


def test_lists_told_one_by_one_reduce_twenty_sites_to_a_sum_of_two():
    params = choose_graph(20, colluders=1, dropout_fraction=0.1)
    honest = range(19)
    victims = honest[:17]
    left_out_by: dict[int, set[int]] = {site: set() for site in honest}
    for victim in victims:  # the least burdened lists first
        told = sorted((site for site in honest if site != victim), key=lambda site: len(left_out_by[site]))
        for site in told[: params.threshold - 1]:  # the colluder gives one share more
            left_out_by[site].add(victim)
    assert all(20 - len(left_out) >= params.min_survivors for left_out in left_out_by.values())
    assert not any({17, 18} & left_out for left_out in left_out_by.values())
    assert honest_in_sum(params) == len({17, 18})


def test_more_survivors_than_sites_cannot_be_asked_for():
    with pytest.raises(ValueError, match="wanted at most 5"):
        honest_in_sum(choose_graph(5, colluders=1, dropout_fraction=0.0), min_survivors=6)


# --- sparse graphs, everything a coordinator may say -------------------------------------------------------------

# degree, drop-outs nearby, places of colluders next to the gap 1 to k/2
SHAPES = [
    (4, 1, set()),
    (6, 1, set()),
    (6, 1, {1}),
    (6, 1, {3}),
    (6, 1, {4}),
    (8, 1, {1, 2}),
    (8, 1, {3, 4}),
    (8, 2, set()),
]
# The same, where the condition does not hold.
WIDE_OPEN = [
    (4, 1, {1}),
    (4, 2, set()),
    (6, 1, {1, 2}),
    (6, 2, set()),
    (6, 2, {1}),
    (8, 2, {1}),
    (8, 3, set()),
    (10, 3, {1}),
]


@pytest.mark.parametrize(("degree", "missing", "colluding"), SHAPES)
def test_no_mixture_of_lists_empties_a_gap(degree, missing, colluding):
    threshold, half = degree + 1 - missing, degree // 2
    assert _no_gap_opens(degree, threshold, len(colluding))
    sites = degree + half + 4
    assert not attack(sites, degree, threshold, missing, colluding).empties(range(1, half + 1))


@pytest.mark.parametrize(("degree", "missing", "colluding"), WIDE_OPEN)
def test_where_the_condition_does_not_hold_a_gap_opens(degree, missing, colluding):
    threshold, half = degree + 1 - missing, degree // 2
    assert 2 * threshold > degree + 1 + len(colluding)
    assert not _no_gap_opens(degree, threshold, len(colluding))
    sites = degree + half + 4
    assert attack(sites, degree, threshold, missing, colluding).empties(range(1, half + 1))


def test_a_site_of_a_sparse_graph_is_alone_if_its_neighbourhood_may_miss_one_more():
    params = choose_graph(21, colluders=1, dropout_fraction=0.05)
    assert (params.degree, params.threshold, params.dropouts_nearby) == (6, 6, 1)
    around = neighbourhoods(21, 6)[0] - {0}
    assert not attack(21, 6, params.threshold, 1, colluding={1}).empties(around)
    assert attack(21, 6, params.threshold - 1, 2, colluding={1}).empties(around)


def test_the_best_attack_on_a_small_sparse_graph_leaves_at_least_as_many_as_stated():
    params = choose_graph(21, colluders=1, dropout_fraction=0.05)
    shape = (21, params.degree, params.threshold, params.dropouts_nearby)
    fewest = attack(*shape, colluding={0}, lists=1).fewest()  # with two lists the same, in a minute
    assert honest_in_sum(params) <= fewest <= honest_in_sum(params) + 1


# --- sparse graphs of real size: the claims that empty a gap -----------------------------------------------------


def flow_empties_gap(degree: int, threshold: int, colluding: set[int]) -> bool:
    """Whether all of places 1 to k/2 that do not collude can be made to look vanished."""
    half, needed = degree // 2, threshold - len(colluding)
    victims = [v for v in range(1, half + 1) if v not in colluding]
    holders = [h for h in range(1 - half, degree + 1) if h not in colluding]
    first, sink = 1 + len(holders), 1 + len(holders) + len(victims)
    edges = [(0, 1 + place, degree + 1 - threshold) for place in range(len(holders))]
    edges += [(first + place, sink, needed) for place in range(len(victims))]
    edges += [
        (1 + from_, first + to, 1)
        for from_, h in enumerate(holders)
        for to, v in enumerate(victims)
        if 0 < abs(h - v) <= half
    ]
    row, column, capacity = zip(*edges, strict=True)
    network = csr_array((np.array(capacity, dtype=np.int32), (row, column)), shape=(sink + 1, sink + 1))
    return bool(maximum_flow(network, 0, sink).flow_value == needed * len(victims))


def seats(degree: int, count: int) -> list[set[int]]:
    """Colluders at either end of the gap, or spread over it."""
    half = degree // 2
    spread = {1 + place * half // count for place in range(count)} if count else set()
    return [set(range(1, count + 1)), set(range(half - count + 1, half + 1)), spread]


@pytest.mark.parametrize(
    ("key", "more"),  # how many more missing open a gap: the condition is close to exact
    [
        ((21, 1, 0.05), 1),
        ((64, 3, 0.05), 1),
        ((64, 4, 0.1), 1),
        ((100, 2, 0.1), 1),
        ((128, 8, 0.1), 1),
        ((256, 12, 0.05), 2),
        ((1024, 1, 0.1), 2),
        ((1024, 51, 0.05), 5),
    ],
)
def test_the_claims_to_be_had_do_not_empty_a_gap(key, more):
    num_sites, colluders, dropout_fraction = key
    params = choose_graph(num_sites, colluders=colluders, dropout_fraction=dropout_fraction)
    chosen = seats(params.degree, params.colluders_nearby)
    assert not any(flow_empties_gap(params.degree, params.threshold, colluding) for colluding in chosen)
    assert any(flow_empties_gap(params.degree, params.threshold - more, colluding) for colluding in chosen)


@pytest.mark.parametrize("num_sites", [21, 24, 50, 100, 300, 1024])
def test_a_sum_of_a_sparse_graph_holds_most_honest_sites(num_sites):
    for colluders, dropout_fraction in ((1, 0.0), (1, 0.05), (3, 0.02), (num_sites // 20, 0.05)):
        params = choose_graph(num_sites, colluders=colluders, dropout_fraction=dropout_fraction)
        assert params.degree < num_sites - 1
        honest = num_sites - colluders
        left = [honest_in_sum(params, min_survivors=wanted) for wanted in range(num_sites // 2, num_sites + 1)]
        assert left == sorted(left)
        assert left[-1] == honest
        assert honest_in_sum(params) >= max(honest / 2, 2 * num_sites / params.degree)
