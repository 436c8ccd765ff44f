"""The coordinator with played sites: a whole run, what is asked in it, and what the coordinator gets to see."""

import msgspec
import numpy as np
import pytest
from played_sites import ANNA, BEIAN, FOUR, HARBOUR, RENJI, RUN, at, federate, lost, played_plan

from fedseek.errors import CohortTooSmall, PlanRefused, SiteRefused, WrongRound
from fedseek.identity.keys import SiteIdentity
from fedseek.messages import MASK_KEY, SELF_MASK, Refused, RoundRequest, UnmaskRequest, decode_request, encode_message
from fedseek_server.exchange import Exchange
from fedseek_server.history import RoundsInMemory

ROSTER_ORDER = (HARBOUR, ANNA, RENJI, BEIAN)


def no(site, code, *, rule="a rule"):
    """A reply that says no."""
    return lambda data: encode_message(Refused(run=RUN, site=site, code=code, rule=rule))


def asked_of(federated, phase, number):
    """By site, what it was asked in one exchange."""
    exchange = next(each for each in federated.exchanges if (each.phase, each.round) == (phase, number))
    return {federated.sites[node].name: decode_request(data) for node, data in exchange.requests.items()}


def test_a_whole_run_ends_with_every_site_approving_the_same_adapter():
    federated = federate(played_plan(rounds=3))
    federated.play()
    assert tuple(federated.coordinator.approvals) == ROSTER_ORDER
    assert federated.coordinator.contributors == ROSTER_ORDER
    assert federated.ended == dict.fromkeys((1, 2, 3, 4), ROSTER_ORDER)
    for name, _ in FOUR:
        federated.check_adapter(name)
    assert not federated.events("dropout") + federated.events("rejected") + federated.events("round-failed")


def test_the_exchanges_are_those_of_the_protocol_in_order():
    federated = federate(played_plan())
    federated.play()
    assert federated.events("phase", "phase", "round", "sites") == [
        ("plan", 1, 4),
        ("shares", 1, 4),
        ("round", 1, 4),
        ("unmask", 1, 4),
        ("round", 2, 4),
        ("unmask", 2, 4),
        ("close", 3, 4),
        ("release", 3, 4),
    ]
    assert federated.events("aggregated", "phase", "round") == [("round", 1), ("round", 2), ("close", 3)]
    unmasked = federated.events("unmasked", "round", "survivors", "vanished")
    assert unmasked == [(number, list(ROSTER_ORDER), []) for number in (1, 2, 3)]
    assert all(seconds > 0 for (seconds,) in federated.events("unmasked", "seconds"))


def test_every_byte_is_accounted_for():
    federated = federate(played_plan())
    seen = []
    federated.play(reply=lambda phase, number, site, data: seen.append(data) or data)
    assert sum(size for (size,) in federated.events("reply", "bytes_in")) == sum(map(len, seen))
    sent = sum(len(data) for exchange in federated.exchanges for data in exchange.requests.values())
    assert sum(size for (size,) in federated.events("reply", "bytes_out")) == sent


def test_the_same_replies_give_the_same_requests():
    """A run that is played again from its record asks the same: nothing is drawn here, and no order is left to chance."""
    federated = federate(played_plan())
    replies = {}
    federated.play(reply=lambda *where_and_data: replies.setdefault(where_and_data[:3], where_and_data[3]))
    again = federate(played_plan())
    again.coordinator = type(federated.coordinator)(
        federated.coordinator.plan, federated.coordinator.roster, run=RUN, observe=again.told.append
    )
    exchanges = []
    for exchange in again.coordinator.play(lambda: [103, 101, 102, 100]):
        exchanges.append(exchange)
        for node in reversed(list(exchange.requests)):  # and replies may come in any order
            again.coordinator.receive(node, replies[exchange.phase, exchange.round, federated.sites[node].name])
    assert exchanges == federated.exchanges
    assert [list(each.requests) for each in exchanges] == [list(each.requests) for each in federated.exchanges]


def test_a_sum_goes_only_to_the_members_of_its_scope():
    federated = federate(played_plan())
    exchange = federated.play(until=("round", 2))
    got = {
        federated.sites[node].identity.kind: [each.scope for each in decode_request(data).previous[0].sums]
        for node, data in exchange.requests.items()
    }
    assert got == {"bank": ["global", "kind/bank"], "hospital": ["global", "kind/hospital"]}


def test_boxes_and_keys_go_to_the_neighbours_they_are_for():
    federated = federate(played_plan())
    federated.play()
    for name, request in asked_of(federated, "round", 1).items():
        others = [each for each in ROSTER_ORDER if each != name]
        assert isinstance(request, RoundRequest)
        assert list(request.boxes) == others
        assert [keys.site for keys in request.next_keys] == others
        assert {keys.round for keys in request.next_keys} == {2}
        assert request.participants == request.next_listed == (0, 1, 2, 3)
    for name, request in asked_of(federated, "close", 3).items():
        assert (request.next_listed, request.next_keys) == ((), ())
        assert list(request.boxes) == [each for each in ROSTER_ORDER if each != name]
    for name, request in asked_of(federated, "unmask", 2).items():
        assert isinstance(request, UnmaskRequest)
        assert sorted(request.presence) == sorted(each for each in ROSTER_ORDER if each != name)


def test_an_envelope_is_sent_until_the_site_is_known_to_have_it():
    federated = federate(played_plan())
    federated.play(reply=lost(("round", 1, ANNA)))
    assert all(list(request.envelopes) == [0] for request in asked_of(federated, "round", 1).values())
    stayed = {name: request for name, request in asked_of(federated, "round", 2).items() if name != ANNA}
    assert [request.envelopes for request in stayed.values()] == [{}, {}, {}]
    back = asked_of(federated, "close", 3)
    assert {name: list(request.envelopes) for name, request in back.items()} == {
        HARBOUR: [],
        ANNA: [0],
        RENJI: [],
        BEIAN: [],
    }


def test_a_head_that_too_few_sites_share_is_neither_summed_nor_missed():
    sites = (*FOUR[:3], ("clinic", "clinic"))  # one hospital, one clinic
    federated = federate(played_plan(kinds=("bank", "hospital", "clinic")), sites)
    federated.play()
    assert [each.scope for each in federated.coordinator._state.history.ended[0].sums] == ["global", "kind/bank"]
    closing = federated.coordinator._state.history.ended[-1]
    assert [each.scope for each in closing.sums] == ["kind/bank"]
    assert len(closing.survivors) == 4, "a site with nothing to send in the closing round is there all the same"
    assert len(federated.coordinator.approvals) == 4
    federated.check_adapter("clinic")


def test_a_run_in_which_no_head_is_shared_closes_without_a_sum():
    kinds = ("bank", "hospital", "clinic")
    federated = federate(played_plan(kinds=kinds), [(f"site-{kind}", kind) for kind in kinds])
    federated.play()
    phases = [phase for phase, number in federated.events("phase", "phase", "round") if number == 3]
    assert phases == ["close", "release"], "there is nothing to unmask"
    assert len(federated.coordinator.approvals) == 3
    federated.check_adapter("site-clinic")


# --- what the coordinator gets to see -------------------------------------------------------------------------------


def key_windows(key, step=16, size=32):
    """Stretches of the secret: of the raw coefficients and of the file that is sealed, past its header."""
    polynomial = key._seal_key.data()
    degree = key.params.poly_modulus_degree
    raw = np.array([polynomial.data(i) for i in range(degree)], dtype="<u8").tobytes()
    saved = key.to_bytes()
    windows = {raw[i : i + size] for i in range(0, len(raw) - size, step)}
    # the middle of the file holds coefficients only; its head names public parameters that ciphertexts name too
    return windows | {saved[i : i + size] for i in range(256, len(saved) - size, step)}


def carried_by(federated, **options):
    replies = []

    def keep(phase, number, site, data):
        replies.append(data)
        return data

    federated.play(reply=keep, **options)
    return b"\0".join([*replies, *(data for each in federated.exchanges for data in each.requests.values())])


def test_the_group_key_is_in_no_message_that_the_coordinator_sees():
    federated = federate(played_plan())
    carried = carried_by(federated)
    keys = {site.group_keys[0].secret.to_bytes() for site in federated.sites.values()}
    assert len(keys) == 1, "all sites hold the same key"
    windows = key_windows(federated.site(ANNA).group_keys[0].secret)
    assert len(windows) > 2000
    assert len(carried) > 1_000_000
    assert not [window for window in windows if window in carried]
    assert any(window in b"\0".join([b"any", b"message", *keys]) for window in windows), "the search finds a key"


def test_of_no_site_both_halves_are_revealed_and_no_seed_is_ever_sent():
    federated = federate(played_plan())
    carried = carried_by(federated, away=lambda phase, number, site: (phase, number, site) == ("round", 2, ANNA))
    for site in federated.sites.values():
        for secrets in site.secrets.values():
            assert secrets.mask_seed not in carried
            assert secrets.share_key not in carried
            assert secrets.self_seed not in carried
    revealed = set()
    for holder in federated.sites.values():
        for number, held in holder.held.items():
            for dealer, shares in held.items():
                opened = (shares.shares[SELF_MASK] in carried, shares.shares[MASK_KEY] in carried)
                vanished = (number, dealer) == (2, ANNA)
                asked = (number, holder.name) != (
                    2,
                    ANNA,
                ) and number < 3  # heads, alone in the closing round, need none
                assert opened == (asked and not vanished, asked and vanished)
                revealed.add((number, dealer, opened))
    assert (2, ANNA, (False, True)) in revealed
    assert (2, RENJI, (True, False)) in revealed


# --- driving it -----------------------------------------------------------------------------------------------------


def test_no_answer_is_taken_before_the_first_question_or_after_the_last():
    federated = federate(played_plan())
    with pytest.raises(WrongRound, match="unasked"):
        federated.coordinator.receive(100, b"")
    answers = []
    federated.play(reply=lambda *where_and_data: answers.append(where_and_data[3]) or answers[-1])
    with pytest.raises(WrongRound, match="unasked"):
        federated.coordinator.receive(100, answers[-1])


def test_an_answer_from_a_node_that_was_not_asked_is_refused():
    federated = federate(played_plan())
    answers = {}
    exchange = federated.play(
        until=("key", 1),
        reply=lambda phase, number, site, data: b"" if (phase, site) == ("plan", BEIAN) else data,
    )
    (asked,) = exchange.requests
    other = next(node for node in federated.sites if node not in (asked, federated.node(BEIAN)))
    answers = federated.sites[asked].handle(exchange.requests[asked])
    with pytest.raises(WrongRound, match="unasked or twice"):
        federated.coordinator.receive(other, answers)


def test_an_exchange_is_what_the_driver_may_read():
    exchange = next(federate(played_plan()).start())
    assert isinstance(exchange, Exchange)
    assert (exchange.phase, exchange.round, sorted(exchange.requests)) == ("plan", 1, [100, 101, 102, 103])
    with pytest.raises(AttributeError):
        exchange.phase = "release"


def test_what_is_rejected_is_on_record_with_its_code_and_site():
    federated = federate(played_plan())
    federated.play(reply=at("round", 1, ANNA, lambda data: data[:-1]))
    ((phase, number, site, node, code, text),) = federated.events(
        "rejected", "phase", "round", "site", "node", "code", "text"
    )
    assert (phase, number, site, node, code) == ("round", 1, ANNA, federated.node(ANNA), "Malformed")
    assert "refused" in text


# --- a site says no -------------------------------------------------------------------------------------------------


def test_a_sites_no_to_the_plan_ends_the_run_with_its_rule_and_code():
    federated = federate(played_plan())
    with pytest.raises(PlanRefused, match=r"'st-anna' refused.*no unit column \(PlanRefused\)") as caught:
        federated.play(reply=at("plan", 1, ANNA, no(ANNA, "PlanRefused", rule="names no unit column")))
    assert caught.value.site == ANNA


def test_any_other_no_ends_the_run_with_the_exit_code_of_its_family():
    federated = federate(played_plan())
    with pytest.raises(SiteRefused, match=r"'st-anna' refused: a rule \(GuardTripped\)") as caught:
        federated.play(reply=at("round", 1, ANNA, no(ANNA, "GuardTripped")))
    assert caught.value.exit_code == 5


def test_a_no_in_the_name_of_another_site_does_not_end_the_run():
    federated = federate(played_plan())
    federated.play(reply=at("round", 1, ANNA, no(HARBOUR, "GuardTripped")))
    assert federated.events("rejected", "code", "site") == [("WrongRound", ANNA)]
    federated = federate(played_plan())
    federated.play(reply=at("plan", 1, ANNA, no("陌生人", "PlanRefused")))
    assert federated.events("rejected", "code") == [("WrongKey",)]


@pytest.mark.parametrize("phase", ["round", "unmask"])
def test_a_site_that_finds_too_few_others_only_misses_the_round(phase):
    federated = federate(played_plan())
    federated.play(reply=at(phase, 1, ANNA, no(ANNA, "CohortTooSmall")))
    assert federated.events("declined", "phase", "round", "site") == [(phase, 1, ANNA)]
    assert federated.events("dropout", "phase", "round", "site") == [(phase, 1, ANNA)]
    assert len(federated.ended[1]) == (3 if phase == "round" else 4)


@pytest.mark.parametrize("phase", ["plan", "shares", "round", "unmask", "close"])
def test_a_site_that_will_not_take_part_now_only_counts_as_missing(phase):
    number = 3 if phase == "close" else 1
    federated = federate(played_plan())
    federated.play(reply=at(phase, number, ANNA, no(ANNA, "NotNow", rule="hours 22:00 to 06:00")))
    assert federated.events("declined", "phase", "round", "site", "rule") == [
        (phase, number, ANNA, "hours 22:00 to 06:00")
    ]
    assert federated.events("dropout", "phase", "round", "node")[0] == (phase, number, federated.node(ANNA))
    others = tuple(name for name in ROSTER_ORDER if name != ANNA)
    assert federated.ended[number] == (ROSTER_ORDER if phase == "unmask" else others)
    assert set(federated.coordinator.approvals) >= set(others)


def test_a_site_that_will_not_make_the_group_key_now_is_passed_over():
    federated = federate(played_plan())
    federated.play(
        reply=lambda phase, number, site, data: (
            no(site, "NotNow")(data) if (phase, site) in (("plan", BEIAN), ("key", HARBOUR)) else data
        )
    )
    assert federated.events("declined", "phase", "site") == [("plan", BEIAN), ("key", HARBOUR)]
    assert ("key",) in federated.events("phase", "phase")


def test_who_must_approve_is_known_without_reading_a_sum():
    class Unreadable(RoundsInMemory):
        def read(self, number):
            raise AssertionError("a sum was read")

    federated = federate(played_plan())
    federated.play()
    state = federated.coordinator._state
    state.history.ended, state.history._latest = Unreadable(), None
    assert federated.coordinator.contributors == ROSTER_ORDER


def test_a_sum_is_encoded_for_one_site_at_a_time():
    federated = federate(played_plan())
    exchange = federated.play(until=("round", 2))
    node = next(iter(exchange.requests))
    assert exchange.requests[node] == exchange.requests[node]
    assert exchange.requests[node] is not exchange.requests[node], "what is kept is the sum, not a request for each"
    sums = {id(asked.previous[0].sums[0]) for asked in federated.coordinator._asked.values()}
    assert len(sums) == 1


def test_a_run_that_trained_nothing_ends_before_it_asks_for_a_closing_round():
    federated = federate(played_plan())
    with pytest.raises(CohortTooSmall, match="no round of training could be opened"):
        federated.play(reply=lambda phase, number, site, data: b"" if phase == "round" else data)
    assert not [phase for (phase,) in federated.events("phase", "phase") if phase in ("close", "release")]


def test_a_run_whose_closing_round_fails_releases_nothing():
    federated = federate(played_plan())
    with pytest.raises(CohortTooSmall, match="the closing round could not be opened"):
        federated.play(reply=lambda phase, number, site, data: b"" if phase == "close" else data)
    assert not federated.coordinator.approvals


def test_a_site_that_was_swapped_on_the_roster_is_not_let_in():
    """Two rosters for one run: whoever signs with a key that is not on this side's roster is nobody here."""
    federated = federate(played_plan())
    federated.site(ANNA).identity = SiteIdentity.generate(ANNA, "hospital")
    federated.play()
    assert federated.events("rejected", "phase", "code")[0] == ("plan", "WrongKey")
    assert ANNA not in federated.coordinator.contributors


def test_requests_of_one_exchange_are_of_the_run_and_of_the_right_round():
    federated = federate(played_plan())
    federated.play(reply=lost(("round", 1, ANNA)))
    for exchange in federated.exchanges:
        for data in exchange.requests.values():
            request = decode_request(data)
            ahead = {"PlanOffer": 2, "ShareRequest": 1}.get(type(request).__name__, 0)
            if exchange.phase in ("round", "unmask"):
                assert request.round == exchange.round + ahead
            assert msgspec.structs.asdict(request)["run"] == RUN
