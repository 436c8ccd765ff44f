"""The rule of ``fedseek.reveal`` that the proof in ``fedseek/secagg/graph.py`` counts on, at a site that answers."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_round import federate, make_identities, play_round

from fedseek.errors import CohortTooSmall, WrongKey
from fedseek.secagg.graph import choose_graph

IDENTITIES = make_identities(24)


@pytest.fixture(scope="module")
def played(tiny_plan):
    """24 sites in a sparse graph, whose lists may be as short as in a larger cohort: there, e < n - min_survivors."""
    round_of_24 = play_round(federate(tiny_plan(cohort={"max_sites": 24}), IDENTITIES), IDENTITIES)
    return replace(round_of_24, graph=replace(round_of_24.graph, min_survivors=14))


def gone(names, *missing):
    return tuple(name for name in names if name not in missing)


def test_in_a_large_cohort_a_list_may_lack_more_than_a_neighbourhood():
    params = choose_graph(512, colluders=2, dropout_fraction=0.1)
    assert params.dropouts_nearby < params.num_sites - params.min_survivors


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_site_answers_exactly_if_its_threshold_of_its_neighbourhood_survived(played, data):
    me = data.draw(st.sampled_from(played.names))
    away = data.draw(st.sets(st.sampled_from(gone(played.names, me)), max_size=10))
    survivors = gone(played.names, *away)
    left = 1 + sum(name in survivors for name in played.graph.neighbours[me])
    if left >= played.graph.threshold:
        answer = played.reveal(me, played.names, survivors)
        assert len(answer.mask_keys) == len(played.graph.holders(me)) - left
        assert len(answer.mask_keys) <= len(played.graph.holders(me)) - played.graph.threshold
    else:
        with pytest.raises(CohortTooSmall, match=f"{left} sites of this site's neighbourhood survived") as caught:
            played.reveal(me, played.names, survivors)
        assert "nothing was revealed" in caught.value.hint


def test_sites_that_never_took_part_count_as_missing_too(played):
    me = played.names[0]
    around = played.graph.neighbours[me]
    spare = len(around) + 1 - played.graph.threshold
    participants = gone(played.names, *around[:spare])
    assert not played.reveal(me, participants, participants).mask_keys
    with pytest.raises(CohortTooSmall, match="neighbourhood survived"):
        played.reveal(me, participants, gone(participants, around[spare]))


def test_far_from_a_site_more_may_be_missing(played):
    me = played.names[0]
    far = gone(played.names, *played.graph.holders(me))
    spare = len(played.graph.holders(me)) - played.graph.threshold
    assert len(far) > spare
    assert not played.reveal(me, played.names, gone(played.names, *far[:10])).mask_keys


def test_a_neighbour_told_another_list_of_participants_cannot_be_shown_as_alive(played):
    me, told_else = played.names[0], played.graph.neighbours[played.names[0]][0]
    request = played.request(played.names, played.names)
    others = gone(played.names, gone(played.names, *played.graph.holders(me))[0])
    request.presence[told_else] = played.presence(others)[told_else]
    with pytest.raises(WrongKey):
        played.reveal(me, played.names, played.names, request)
