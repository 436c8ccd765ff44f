from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_round import RUN, federate, make_identities

from fedseek.cohort import Federation, participants_message, presence_message, round_graph
from fedseek.errors import CohortTooSmall, Malformed
from fedseek.identity.roster import Roster, parse_roster
from fedseek.plan import plan_from_canonical
from fedseek.secagg.graph import choose_graph

KINDS = ("bank", "hospital", "bank", "insurer", "bank", "hospital")  # three banks, two hospitals, one insurer
IDENTITIES = make_identities(24, KINDS)
SIX = dict(list(IDENTITIES.items())[:6])


@pytest.fixture(scope="module")
def plan(tiny_plan):
    return tiny_plan(cohort={"max_sites": 24})


@pytest.fixture(scope="module")
def six(plan):
    return federate(plan, SIX)


@pytest.fixture(scope="module")
def sparse(plan):
    return federate(plan, IDENTITIES)


# --- scopes


def test_the_scopes_are_the_adapter_and_the_heads_that_enough_sites_share(six):
    assert six.scopes() == ("global", "kind/bank", "kind/hospital")
    assert six.shared_scopes("bank") == ("global", "kind/bank")
    assert six.shared_scopes("insurer") == ("global",)  # its head stays at home
    assert six.members("global") == six.roster.names
    assert set(six.members("kind/bank")) == {name for name, identity in SIX.items() if identity.kind == "bank"}
    assert list(six.members("kind/bank")) == sorted(six.members("kind/bank"))


@pytest.mark.parametrize(
    ("floor", "shared"), [(2, ("global", "kind/bank", "kind/hospital")), (3, ("global", "kind/bank")), (4, ("global",))]
)
def test_a_head_needs_as_many_sites_as_the_plan_wants_in_a_sum(tiny_plan, floor, shared):
    federation = with_floor(tiny_plan, floor)
    assert federation.scopes() == shared
    assert all(set(federation.shared_scopes(kind)) <= set(shared) for kind in KINDS)


def with_floor(tiny_plan, floor):
    return federate(tiny_plan(cohort={"max_sites": 6, "min_contributors": floor}), SIX)


def of_kind(kind, names):
    return tuple(sorted(name for name in names if SIX[name].kind == kind))


@given(st.sets(st.sampled_from(sorted(SIX)), min_size=4), st.integers(2, 4))
def test_a_head_is_sent_where_as_many_of_its_kind_take_part_as_the_plan_wants(tiny_plan, participants, floor):
    federation = with_floor(tiny_plan, floor)
    wanted = {"global": tuple(sorted(participants))}
    for kind in ("bank", "hospital"):
        senders = of_kind(kind, participants)
        if len(senders) >= floor:
            wanted[f"kind/{kind}"] = senders
    assert federation.summed_scopes(tuple(participants)) == wanted  # roster order is the order of names
    assert list(federation.summed_scopes(tuple(participants))) == list(wanted)


def test_a_site_that_is_alone_of_its_kind_in_a_round_keeps_its_head_at_home(six):
    hospitals = of_kind("hospital", SIX)
    for there in hospitals:
        participants = tuple(name for name in six.roster.names if name == there or name not in hospitals)
        assert set(six.summed_scopes(participants)) == {"global", "kind/bank"}
        assert set(six.open_scopes(participants, participants)) == {"global", "kind/bank"}


@given(st.data(), st.integers(2, 4))
def test_the_adapter_is_open_for_the_survivors_and_a_head_if_all_that_sent_it_survived(tiny_plan, data, floor):
    federation = with_floor(tiny_plan, floor)
    participants = data.draw(st.sets(st.sampled_from(sorted(SIX)), min_size=4))
    survivors = data.draw(st.sets(st.sampled_from(sorted(participants)), min_size=floor))
    opened = federation.open_scopes(tuple(participants), tuple(survivors))
    assert opened.pop("global") == tuple(sorted(survivors))
    for kind in ("bank", "hospital"):
        sent = of_kind(kind, participants)
        if len(sent) >= floor and set(sent) <= survivors:
            assert opened.pop(f"kind/{kind}") == sent
    assert not opened


def test_a_head_is_closed_when_one_of_its_kind_vanished_though_enough_are_left(six):
    banks = of_kind("bank", SIX)
    for gone in banks:
        survivors = tuple(name for name in six.roster.names if name != gone)
        assert len(set(banks) - {gone}) >= six.plan.spec.cohort.min_contributors
        assert "kind/bank" not in six.open_scopes(six.roster.names, survivors)  # it dealt shares and then vanished
        assert set(six.open_scopes(survivors, survivors)["kind/bank"]) == set(banks) - {gone}  # it was never there


def test_strangers_among_participants_and_survivors_open_nothing(six):
    (insurer,) = six.members("kind/insurer")
    told = (insurer, "北岸银行", "nobody")
    assert six.open_scopes(told, ("nobody", "北岸银行", insurer)) == {
        "global": six.names(six.positions(("北岸银行", insurer)))
    }
    hospital = of_kind("hospital", SIX)[0]
    assert six.summed_scopes((hospital, "nobody", insurer)).keys() == {"global"}


@pytest.mark.parametrize("participants", [(), ("nobody", "somebody"), ("北岸银行",)])
def test_fewer_participants_than_a_sum_needs_open_nothing(six, participants):
    assert six.summed_scopes(participants) == {}
    assert six.open_scopes(participants, participants) == {}


# --- names and positions


@given(st.sets(st.integers(0, 23)))
def test_positions_and_names_are_the_same_sites(sparse, places):
    names = sparse.names(sorted(places))
    assert sparse.positions(names) == tuple(sorted(places))
    assert sparse.positions(tuple(reversed(names))) == tuple(sorted(places))
    assert [sparse.roster.names[place] for place in sorted(places)] == list(names)


@pytest.mark.parametrize("positions", [(1, 0), (0, 0), (0, 2, 2), (6,), (0, 1, 2, 3, 4, 5, 6), (-1,), (-1, 0, 1)])
def test_positions_that_are_repeated_out_of_order_or_beyond_the_roster_are_refused(six, positions):
    with pytest.raises(Malformed, match="positions on the roster"):
        six.names(positions)


def test_an_endless_list_of_positions_is_not_quoted(six):
    with pytest.raises(Malformed) as caught:
        six.names([5] * 1000)
    assert len(str(caught.value)) < 300


# --- what everything is bound to


def federations(plan, tiny_plan):
    return [
        federate(plan, SIX),
        federate(plan, SIX, run="试运行-2"),
        federate(tiny_plan(seed=1, cohort={"max_sites": 24}), SIX),
        federate(plan, dict(list(SIX.items())[:5])),
        federate(plan, {**SIX, "st-anna": make_identities(4, KINDS)["st-anna"]}),  # the same name with other keys
    ]


def test_what_is_signed_differs_by_run_plan_roster_round_and_field(plan, tiny_plan):
    bound = [
        each
        for federation in federations(plan, tiny_plan)
        for each in (
            federation.bind(),
            federation.bind(b"ab"),
            federation.bind(b"a", b"b"),
            federation.bind(b"", b"ab"),
            federation.bind_round(1, b"ab"),
            federation.bind_round(2, b"ab"),
            federation.bind_round(1, b"a", b"b"),
            participants_message(federation, 1, federation.roster.names),
            participants_message(federation, 2, federation.roster.names),
            participants_message(federation, 1, federation.roster.names[:4]),
        )
    ]
    assert len(set(bound)) == len(bound)


VOUCHED = {"epoch": 0, "digest": bytes(32)}


def test_a_site_vouches_for_run_plan_roster_round_key_list_participants_epoch_and_adapter(plan, tiny_plan):
    signed = []
    for federation in federations(plan, tiny_plan):
        names = federation.roster.names
        graph, later = (round_graph(federation, number, names) for number in (1, 2))
        signed += [
            presence_message(federation, graph, names, **VOUCHED),
            presence_message(federation, later, names, **VOUCHED),
            presence_message(federation, graph, names[:4], **VOUCHED),
            presence_message(federation, round_graph(federation, 1, names[:4]), names[:4], **VOUCHED),
            presence_message(federation, graph, names, **(VOUCHED | {"epoch": 1})),
            presence_message(federation, graph, names, **(VOUCHED | {"digest": bytes(31) + b"\1"})),
            participants_message(federation, 1, names),
        ]
    assert len(set(signed)) == len(signed)


@given(st.tuples(*[st.lists(st.binary(max_size=3), max_size=4)] * 2), st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_no_two_fields_are_bound_alike(six, fields, numbers):
    first, second = (six.bind_round(number, *each) for number, each in zip(numbers, fields, strict=True))
    assert (first == second) == ((fields[0], numbers[0]) == (fields[1], numbers[1]))


@given(st.permutations(sorted(SIX)))
def test_the_order_of_names_says_nothing(six, names):
    assert participants_message(six, 1, names) == participants_message(six, 1, six.roster.names)
    graph, again = (round_graph(six, 1, listed) for listed in (names, six.roster.names))
    assert presence_message(six, graph, names, **VOUCHED) == presence_message(six, again, six.roster.names, **VOUCHED)


def test_a_federation_shows_its_run_and_no_more(six):
    assert repr(six) == f"Federation(run={RUN!r})"


# --- the graph


@settings(max_examples=20)
@given(st.permutations(sorted(IDENTITIES)))
def test_everybody_computes_the_same_graph(sparse, names):
    elsewhere = Federation.of(
        RUN, plan_from_canonical(sparse.plan.canonical()), parse_roster(sparse.roster.canonical_bytes())
    )
    assert round_graph(elsewhere, 3, names) == round_graph(sparse, 3, sparse.roster.names)


def neighbourhoods(federation, number=1, listed=None):
    graph = round_graph(federation, number, listed or federation.roster.names)
    return frozenset(graph.neighbours.items())


def test_the_graph_depends_on_run_plan_roster_round_and_list(plan, tiny_plan, sparse):
    other_keys = {**IDENTITIES, "st-anna": make_identities(4, KINDS)["st-anna"]}
    graphs = [
        *(neighbourhoods(sparse, number) for number in (1, 2, 3)),
        neighbourhoods(federate(plan, IDENTITIES, run="试运行-2")),
        neighbourhoods(federate(tiny_plan(seed=1, cohort={"max_sites": 24}), IDENTITIES)),
        neighbourhoods(federate(plan, other_keys)),
        neighbourhoods(sparse, listed=sparse.roster.names[1:]),
        neighbourhoods(sparse, listed=sparse.roster.names[:-1]),
    ]
    assert len(set(graphs)) == len(graphs)


@pytest.mark.parametrize("count", [3, 6, 20, 21, 23, 24])
def test_neighbours_are_mutual_and_as_many_as_the_graph_wants(sparse, count):
    graph = round_graph(sparse, 1, sparse.roster.names[-count:])
    params = choose_graph(count, colluders=1, dropout_fraction=0.1)
    assert graph.listed == sparse.roster.names[-count:]
    for name in graph.listed:
        around = graph.neighbours[name]
        assert len(set(around) - {name}) == len(around) == params.degree
        assert all(name in graph.neighbours[peer] for peer in around)
        assert graph.holders(name) == tuple(sorted({*around, name}))  # roster order is the order of names
    assert (graph.number, graph.threshold) == (1, params.threshold)
    assert graph.threshold <= params.degree + 1
    # everybody holds as many shares as there are holders of its own
    held = Counter(holder for name in graph.listed for holder in graph.holders(name))
    assert set(held.values()) == {params.degree + 1}


def test_a_round_needs_as_many_survivors_as_the_graph_and_the_plan_want(tiny_plan):
    for min_sites, wanted in ((3, 22), (22, 22), (24, 24)):
        federation = federate(tiny_plan(cohort={"max_sites": 24, "min_sites": min_sites}), IDENTITIES)
        assert round_graph(federation, 1, federation.roster.names).min_survivors == wanted


def test_fewer_sites_than_the_plan_wants_make_no_graph(six):
    for count in (0, 1, 2):
        with pytest.raises(CohortTooSmall, match=f"round 7: {count} sites are listed, wanted at least 3"):
            round_graph(six, 7, six.roster.names[:count])
    with pytest.raises(CohortTooSmall, match="2 sites are listed"):  # one name twice, and a stranger
        round_graph(six, 7, (*six.roster.names[:2], six.roster.names[0], "nobody"))


def test_colluders_of_the_plan_raise_the_threshold(tiny_plan):
    found = {}
    for colluders in (0, 1, 2, 4):
        federation = federate(tiny_plan(cohort={"max_sites": 6, "min_sites": 6, "colluders": colluders}), SIX)
        found[colluders] = round_graph(federation, 1, federation.roster.names).threshold
    assert found == {0: 4, 1: 4, 2: 5, 4: 6}


# --- kin: with whom a head is masked


@pytest.mark.parametrize("count", [3, 6, 23, 24])
def test_kin_are_all_others_of_ones_kind_on_the_list_neighbours_or_not(sparse, count):
    listed = sparse.roster.names[-count:]
    graph = round_graph(sparse, 1, listed)
    for name in listed:
        kind = IDENTITIES[name].kind
        assert graph.kin[name] == tuple(other for other in listed if other != name and IDENTITIES[other].kind == kind)
        assert all(name in graph.kin[other] for other in graph.kin[name])
        assert graph.peers(name) == tuple(
            other for other in listed if other in graph.neighbours[name] or other in graph.kin[name]
        )
        assert name not in graph.peers(name)


def test_a_site_gets_keys_of_kin_that_are_no_neighbours(sparse):
    graph = round_graph(sparse, 1, sparse.roster.names)
    far = {name: set(graph.kin[name]) - set(graph.neighbours[name]) for name in graph.listed}
    assert any(far.values())
    assert all(far[name] <= set(graph.peers(name)) for name in graph.listed)
    assert all(set(graph.holders(name)).isdisjoint(far[name]) for name in graph.listed)  # they hold no shares


@pytest.mark.parametrize(("floor", "heads"), [(2, {"bank", "hospital"}), (3, {"bank"}), (4, set())])
def test_a_kind_whose_head_stays_home_has_no_kin(tiny_plan, floor, heads):
    federation = with_floor(tiny_plan, floor)
    graph = round_graph(federation, 1, federation.roster.names)
    assert {SIX[name].kind for name, kin in graph.kin.items() if kin} == heads
    for name in graph.listed:
        assert graph.peers(name) == graph.neighbours[name]  # a complete graph: all others


def test_kin_do_not_depend_on_the_round(sparse):
    kin = [round_graph(sparse, number, sparse.roster.names).kin for number in (1, 2, 3)]
    assert kin[0] == kin[1] == kin[2]


# --- cohorts that are none


def test_a_roster_of_one_site_opens_nothing(plan):
    alone = Federation.of(RUN, plan, Roster.of([next(iter(SIX.values())).public()]))
    assert alone.open_scopes(alone.roster.names, alone.roster.names) == {}


def test_a_roster_of_one_site_is_no_cohort(plan):
    alone = Federation.of(RUN, plan, Roster.of([next(iter(SIX.values())).public()]))
    assert alone.scopes() == ("global",)
    assert alone.summed_scopes(alone.roster.names) == {}
    with pytest.raises(CohortTooSmall):
        round_graph(alone, 1, alone.roster.names)
