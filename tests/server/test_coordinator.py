"""The coordinator against real sites: a whole run, and each reply that it must refuse."""

import msgspec
import numpy as np
import pytest

from fedseek.errors import (
    AdapterDiverged,
    CohortTooSmall,
    FedseekError,
    Malformed,
    PlanRefused,
    TooLarge,
    WrongKey,
    WrongModel,
    WrongRound,
)
from fedseek.he.ciphertext import ScopedCiphertexts
from fedseek.he.keys import SecretKey, encrypt_slots
from fedseek.he.packing import choose_packing
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PLAN, CONTEXT_RELEASE, join_fields, sign
from fedseek.messages import (
    UpdateReply,
    decode_reply,
    decode_request,
    digest_message,
    encode_message,
    release_message,
)
from fedseek_server.coordinator import Coordinator

RUN = "试运行-1"
FIRST, SECOND = "harbour-bank", "st-anna"  # in roster order, which is by code point
FIRST_TO_ANSWER = "北岸银行"


def node_of(cohort, name: str) -> int:
    return next(node for node, service in cohort.services.items() if service.identity.name == name)


def change(data: bytes, **fields) -> bytes:
    return encode_message(msgspec.structs.replace(decode_reply(data), **fields))


def at(phase, number, site, alter):
    """Alter the reply of one site in one exchange; leave all others alone."""
    return lambda *where_and_data: (
        alter(where_and_data[3]) if where_and_data[:3] == (phase, number, site) else where_and_data[3]
    )


def resigned(cohort, signer, data, *, context=CONTEXT_ADAPTER, sender=None, **fields) -> bytes:
    """Alter an update and sign it again, as a site that lies would."""
    reply = decode_reply(data)
    reply = msgspec.structs.replace(reply, site=sender or reply.site, **fields)
    signed = digest_message(reply.run, reply.round, reply.digests)
    return encode_message(msgspec.structs.replace(reply, signature=sign(cohort.site(signer).identity, context, signed)))


def with_first_ciphertext(data: bytes, replace) -> bytes:
    first, *rest = decode_reply(data).update
    ciphertexts = (replace(first.ciphertexts[0]), *first.ciphertexts[1:])
    return change(data, update=(ScopedCiphertexts(first.scope, ciphertexts), *rest))


def foreign_ciphertext(value_bits, max_sites) -> bytes:
    params = choose_packing(value_bits, max_sites).params
    return encrypt_slots(SecretKey.generate(params), np.arange(8, dtype=np.uint64))[0]


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_whole_run_ends_with_every_site_approving_the_same_tensors(make_cohort, private):
    cohort = make_cohort(private=private)
    cohort.play()
    approvals = cohort.coordinator.approvals
    assert sorted(approvals) == sorted(cohort.coordinator.roster.names)
    digests = [(scope, digest) for reply in approvals.values() for scope, digest in reply.digests.items()]
    assert len(digests) == 8
    assert len(set(digests)) == 3  # the adapter, and a head for each kind

    start = {digest for service in cohort.services.values() for digest in first_digests(cohort, service)}
    assert not start & {digest for _, digest in digests}, "a run that moved nothing agrees too"


def first_digests(cohort, service):
    update = next(
        reply
        for reply in map(decode_reply, cohort.seen[1::2])
        if isinstance(reply, UpdateReply) and reply.site == service.identity.name
    )
    return update.digests.values()


def test_the_exchanges_are_those_of_the_protocol_in_order(make_cohort):
    cohort = make_cohort()
    cohort.play()
    told = cohort.events["coordinator"]
    phases = [(event["phase"], event["round"], event["sites"]) for event in told if event["event"] == "phase"]
    assert phases == [
        ("plan", 0, 4),
        ("key", 0, 1),
        ("round", 1, 4),
        ("round", 2, 4),
        ("close", 2, 4),
        ("release", 2, 4),
    ]
    sums = [(event["phase"], event["round"]) for event in told if event["event"] == "aggregated"]
    assert sums == [("round", 1), ("round", 2), ("close", 2)]
    bytes_told = sum(event["bytes_in"] + event["bytes_out"] for event in told if event["event"] == "reply")
    assert bytes_told == sum(map(len, cohort.seen))


def test_a_sum_goes_only_to_the_members_of_its_scope(make_cohort):
    cohort = make_cohort()
    exchange = cohort.play(until=("round", 2))
    got = {
        cohort.services[node].identity.kind: [each.scope for each in decode_request(request).previous.sums]
        for node, request in exchange.requests.items()
    }
    assert got == {"bank": ["global", "kind/bank"], "hospital": ["global", "kind/hospital"]}


# --- the group key -------------------------------------------------------------------------------------------------


def key_windows(key: SecretKey, step: int = 16, size: int = 32):
    """Stretches of the secret: of the raw coefficients and of the file that is sealed, past its header."""
    polynomial = key._seal_key.data()
    degree = key.params.poly_modulus_degree
    raw = np.array([polynomial.data(i) for i in range(degree)], dtype="<u8").tobytes()
    saved = key.to_bytes()
    windows = {raw[i : i + size] for i in range(0, len(raw) - size, step)}
    # the middle of the file holds coefficients only; its head names public parameters that ciphertexts name too
    return windows | {saved[i : i + size] for i in range(256, len(saved) - size, step)}


def test_the_group_key_is_in_no_message_that_the_coordinator_sees(make_cohort):
    cohort = make_cohort()
    cohort.play()
    keys = {service._run._group_key().to_bytes() for service in cohort.services.values()}
    assert len(keys) == 1, "all sites hold the same key"
    windows = key_windows(cohort.site(FIRST)._run._group_key())
    assert len(windows) > 2000
    carried = b"\0".join(cohort.seen)
    assert len(carried) > 1_000_000
    assert not [window for window in windows if window in carried]
    (key,) = keys
    assert any(window in b"\0".join([b"any", b"message", key]) for window in windows), "the search finds a key"


# --- refused admissions and keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"run": "another"}, WrongRound, "answered for run 'another'"),
        ({"model_sha256": "0" * 64}, WrongModel, "holds base model 0000"),
        ({"signature": bytes(64)}, WrongKey, "signature does not verify"),
        ({"site": FIRST}, WrongRound, "'harbour-bank' was admitted twice"),
        ({"site": "stranger"}, WrongKey, "'stranger' is not on the roster"),
        ({"ciphertexts": {"global": 1}}, Malformed, "announced scopes"),
        ({"num_values": {"global": 128, "kind/bank": 34}}, Malformed, "announced scopes"),
        ({"num_values": {"global": 129, "kind/hospital": 51}}, WrongModel, "trains 129 values of 'global'"),
    ],
)
def test_an_admission_that_is_not_what_was_asked_is_refused(make_cohort, fields, error, text):
    cohort = make_cohort()
    with pytest.raises(error, match=text):
        cohort.play(reply=at("plan", 0, SECOND, lambda data: change(data, **fields)))
    assert SECOND not in cohort.coordinator._sites.values()


def test_an_admission_in_anothers_name_is_refused(make_cohort):
    cohort = make_cohort()
    with pytest.raises(WrongKey, match="does not verify with the key of site 'st-anna'"):
        cohort.play(reply=at("plan", 0, FIRST_TO_ANSWER, lambda data: change(data, site=SECOND)))


def test_an_admission_signed_for_another_plan_is_refused(make_cohort):
    cohort = make_cohort()
    signed = join_fields(RUN.encode(), b"0" * 64, cohort.coordinator.roster.digest())
    signature = sign(cohort.site(SECOND).identity, CONTEXT_PLAN, signed)
    with pytest.raises(WrongKey, match="does not verify with the key of site 'st-anna'"):
        cohort.play(reply=at("plan", 0, SECOND, lambda data: change(data, signature=signature)))


def test_a_run_does_not_begin_without_every_site_of_the_roster(make_cohort):
    cohort = make_cohort()
    cohort.services.pop(node_of(cohort, SECOND))
    with pytest.raises(CohortTooSmall, match="no answer from st-anna"):
        cohort.play()


def test_a_site_that_does_not_answer_stops_the_round(make_cohort):
    cohort = make_cohort()
    exchanges = cohort.coordinator.play(list(cohort.services))
    exchange = next(exchanges)
    for node, request in exchange.requests.items():
        cohort.coordinator.receive(node, cohort.services[node].handle(request))
    next(exchanges)
    with pytest.raises(CohortTooSmall, match="key: no answer from harbour-bank"):
        next(exchanges)


@pytest.mark.parametrize(
    ("alter", "error", "text"),
    [
        (lambda reply: {"epoch": 1}, Malformed, "key of epoch 1"),
        (lambda reply: {"envelopes": dict(list(reply.envelopes.items())[:3])}, Malformed, "sealed the key"),
        (lambda reply: {"envelopes": {**reply.envelopes, "x": b""}}, Malformed, "sealed the key"),
        (lambda reply: {"site": SECOND}, WrongRound, "was admitted as 'harbour-bank' and now answers as 'st-anna'"),
    ],
)
def test_envelopes_must_be_one_for_each_site(make_cohort, alter, error, text):
    cohort = make_cohort()
    with pytest.raises(error, match=text):
        cohort.play(reply=at("key", 0, FIRST, lambda data: change(data, **alter(decode_reply(data)))))


# --- refused updates -----------------------------------------------------------------------------------------------

REFUSED_UPDATES = {
    "another run": (lambda c, d: change(d, run="another"), WrongRound, "answered for run 'another'"),
    "an earlier round": (lambda c, d: resigned(c, FIRST_TO_ANSWER, d, round=1), WrongRound, "round 1, wanted 2"),
    "a later round": (lambda c, d: resigned(c, FIRST_TO_ANSWER, d, round=3), WrongRound, "round 3, wanted 2"),
    "another sender": (lambda c, d: resigned(c, FIRST, d, sender=FIRST), WrongRound, "admitted as '北岸银行'"),
    "another signer": (lambda c, d: resigned(c, FIRST, d), WrongKey, "key of site '北岸银行'"),
    "another purpose": (
        lambda c, d: resigned(c, FIRST_TO_ANSWER, d, context=CONTEXT_RELEASE),
        WrongKey,
        "adapter-digest",
    ),
    "no signature": (lambda c, d: change(d, signature=bytes(64)), WrongKey, "signature does not verify"),
    "another message": (lambda c, d: c.seen[1], WrongRound, "got PlanAdmitted, wanted UpdateReply"),
    "no update": (lambda c, d: change(d, update=()), Malformed, "sent scopes"),
    "too few scopes": (lambda c, d: change(d, update=decode_reply(d).update[:1]), Malformed, "sent scopes"),
    "a scope twice": (lambda c, d: change(d, update=decode_reply(d).update * 2), Malformed, "each once"),
    "too few digests": (
        lambda c, d: resigned(c, FIRST_TO_ANSWER, d, digests={"global": bytes(32)}),
        Malformed,
        "signed digests of",
    ),
    "other digests and no update": (
        lambda c, d: resigned(
            c, FIRST_TO_ANSWER, d, update=(), digests=dict.fromkeys(decode_reply(d).digests, bytes(32))
        ),
        Malformed,
        "sent scopes",
    ),
    "a truncated ciphertext": (lambda c, d: with_first_ciphertext(d, lambda one: one[:-1]), Malformed, "SEAL object"),
    "a bit flipped": (
        lambda c, d: with_first_ciphertext(d, lambda one: one[:20] + bytes([one[20] ^ 1]) + one[21:]),
        Malformed,
        "SEAL object",
    ),
    "an empty ciphertext": (lambda c, d: with_first_ciphertext(d, lambda one: b""), Malformed, "SEAL object"),
    "a ciphertext of other parameters": (
        lambda c, d: with_first_ciphertext(d, lambda one: foreign_ciphertext(8, 4)),
        Malformed,
        "SEAL object",
    ),
    "a sum for an update": (
        lambda c, d: with_first_ciphertext(d, lambda one: c.summed),
        Malformed,
        "SEAL object",
    ),
    "truncated": (lambda c, d: d[:-1], Malformed, "refused"),
    "nothing": (lambda c, d: b"", Malformed, "refused"),
    "not MessagePack": (lambda c, d: b"\xc1" * 100, Malformed, "refused"),
    "trailing bytes": (lambda c, d: d + b"\0", Malformed, "refused"),
    "an unknown field": (lambda c, d: with_raw_field(d, "note", "x"), Malformed, "unknown field"),
    "another version": (lambda c, d: with_raw_field(d, "version", 2), Malformed, "refused"),
    "no version of ours": (lambda c, d: with_raw_field(d, "version", "1"), Malformed, "refused"),
    "another kind": (lambda c, d: with_raw_field(d, "type", "Note"), Malformed, "refused"),
    "a request": (lambda c, d: c.seen[0], Malformed, "refused"),
}


def with_raw_field(data: bytes, name: str, value: object) -> bytes:
    document = msgspec.msgpack.decode(data)
    assert name == "note" or name in document
    return msgspec.msgpack.encode({**document, name: value})


def test_an_update_that_is_refused_changes_nothing(make_cohort):
    """Each refusal says what is wrong; after all of them the site's real answer is taken and the run completes."""
    cohort = make_cohort()
    outcomes = {}

    def remember(phase, number, site, data):
        if phase == "round" and number == 2:
            cohort.summed = decode_request(data).previous.sums[0].ciphertexts[0]
        return data

    def refuse_first(data):
        for case, (alter, _, text) in REFUSED_UPDATES.items():
            try:
                cohort.coordinator.receive(node_of(cohort, FIRST_TO_ANSWER), alter(cohort, data))
            except FedseekError as error:
                outcomes[case] = (type(error), text if text in str(error) else str(error))
        return data

    cohort.play(request=remember, reply=at("round", 2, FIRST_TO_ANSWER, refuse_first))
    assert outcomes == {case: (error, text) for case, (_, error, text) in REFUSED_UPDATES.items()}
    assert len(cohort.coordinator.approvals) == 4


def test_an_oversize_reply_is_refused_before_it_is_parsed(make_cohort):
    cohort = make_cohort()
    with pytest.raises(TooLarge, match=r"got \d+ bytes, wanted at most \d+"):
        cohort.play(reply=at("round", 1, SECOND, lambda data: data + bytes(8 << 20)))
    cohort = make_cohort()
    with pytest.raises(TooLarge):
        cohort.play(reply=at("plan", 0, SECOND, lambda data: bytes((64 << 20) + 1)))


def test_an_answer_given_twice_is_refused_and_is_in_the_sum_once(make_cohort):
    cohort = make_cohort()
    exchange = cohort.play(until=("round", 1))
    node, request = next(iter(exchange.requests.items()))
    answer = cohort.services[node].handle(request)
    cohort.coordinator.receive(node, answer)
    with pytest.raises(WrongRound, match="unasked or twice"):
        cohort.coordinator.receive(node, answer)
    assert cohort.coordinator._sum().contributors["global"] == 1


def test_an_answer_from_a_node_that_was_not_asked_is_refused(make_cohort):
    cohort = make_cohort()
    exchange = cohort.play(until=("key", 0))
    (asked,) = exchange.requests
    other = next(node for node in cohort.services if node != asked)
    with pytest.raises(WrongRound, match="unasked or twice"):
        cohort.coordinator.receive(other, cohort.seen[1])


def test_no_answer_is_taken_before_the_first_question(make_cohort):
    cohort = make_cohort()
    with pytest.raises(WrongRound, match="unasked"):
        cohort.coordinator.receive(100, b"")


def test_a_site_with_another_adapter_is_named_and_its_update_is_not_mixed_in(make_cohort):
    cohort = make_cohort()

    def drift(phase, number, site, data):
        if (phase, number, site) == ("round", 2, SECOND):
            cohort.site(SECOND)._run.scopes["global"].weights[5] += np.float32(2**-10)  # one value, a little
        return data

    with pytest.raises(AdapterDiverged, match=r"round 2: site 'st-anna' holds other values of 'global' than site"):
        cohort.play(request=drift)
    assert cohort.coordinator._sum().contributors["global"] < 4


def test_a_head_is_compared_only_within_its_kind(make_cohort):
    cohort = make_cohort()

    def drift(phase, number, site, data):
        if (phase, number, site) == ("round", 1, SECOND):
            cohort.site(SECOND)._run.scopes["kind/hospital"].weights += np.float32(1)
        return data

    with pytest.raises(AdapterDiverged, match=r"'st-anna' holds other values of 'kind/hospital' than site '仁济医院'"):
        cohort.play(request=drift)


def test_a_sites_refusal_stops_the_run_with_its_rule_and_code(make_cohort, tiny_data):
    cohort = make_cohort(data={SECOND: tiny_data("hospital", unit=None)})
    with pytest.raises(PlanRefused, match=r"'st-anna' refused.*names no unit column \(PlanRefused\)") as caught:
        cohort.play()
    assert caught.value.site == SECOND


# --- refused approvals ---------------------------------------------------------------------------------------------


def approval(cohort, data, **fields):
    reply = msgspec.structs.replace(decode_reply(data), **fields)
    signed = release_message(reply.run, reply.digests, reply.statement)
    signature = sign(cohort.site(SECOND).identity, CONTEXT_RELEASE, signed)
    return encode_message(msgspec.structs.replace(reply, signature=signature))


@pytest.mark.parametrize(
    ("alter", "error", "text"),
    [
        (lambda c, d: change(d, statement=decode_reply(d).statement.replace(b"none", b"dp-sgd")), WrongKey, "release"),
        (lambda c, d: change(d, digests={**decode_reply(d).digests, "global": bytes(32)}), WrongKey, "release"),
        (lambda c, d: change(d, signature=bytes(64)), WrongKey, "release"),
        (lambda c, d: change(d, site=FIRST), WrongRound, "admitted as 'st-anna'"),
        (
            lambda c, d: approval(c, d, digests={**decode_reply(d).digests, "global": bytes(32)}),
            AdapterDiverged,
            "'st-anna' holds other values of 'global'",
        ),
        (lambda c, d: approval(c, d, digests={}), Malformed, "signed digests"),
    ],
    ids=["statement", "digest", "signature", "sender", "adapter", "no-digests"],
)
def test_an_approval_that_was_altered_is_refused(make_cohort, alter, error, text):
    cohort = make_cohort()
    with pytest.raises(error, match=text):
        cohort.play(reply=at("release", 2, SECOND, lambda data: alter(cohort, data)))
    assert SECOND not in cohort.coordinator.approvals


def test_only_one_site_is_asked_for_the_adapter(make_cohort):
    cohort = make_cohort()
    exchange = cohort.play(until=("release", 2))
    asked = [decode_request(request).send_adapter for request in exchange.requests.values()]
    assert sorted(asked) == [False, False, False, True]


def test_the_least_number_of_sites_is_of_the_run_and_not_of_a_head(make_cohort):
    cohort = make_cohort(cohort={"min_sites": 3, "max_sites": 4})
    cohort.play()  # two sites in the sum of each head
    assert len(cohort.coordinator.approvals) == 4


def test_a_roster_of_strangers_is_refused_by_the_sites(make_cohort):
    cohort = make_cohort()
    strangers = Roster.of(SiteIdentity.generate(name, "bank").public() for name in cohort.coordinator.roster.names)
    cohort.coordinator = Coordinator(cohort.coordinator.plan, strangers, run=RUN, observe=lambda event: None)
    with pytest.raises(PlanRefused, match="does not list this site with its own keys"):
        cohort.play()
