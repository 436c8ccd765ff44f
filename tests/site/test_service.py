"""One site against a coordinator that does not follow the protocol: what it refuses, and what its refusals tell."""

import logging

import msgspec
import numpy as np
import pytest

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.encrypt import encrypt_update
from fedseek.he.ciphertext import ScopedCiphertexts, ScopedSum
from fedseek.he.keys import SecretKey
from fedseek.identity.sealing import SealedKey, seal
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PLAN, join_fields, verify
from fedseek.messages import (
    CloseRequest,
    KeyRequest,
    PlanAdmitted,
    PlanOffer,
    Refused,
    ReleaseApproved,
    ReleaseRequest,
    RoundRequest,
    UpdateReply,
    decode_reply,
    decode_request,
    digest_message,
    encode_message,
)
from fedseek.records import Records
from fedseek_site.admission import SiteData

RUN = "试运行-1"
SITE = "仁济医院"


def ask(service, message):
    """The site's answer to a request, which may be bytes already."""
    data = message if isinstance(message, bytes) else encode_message(message)
    return decode_reply(service.handle(data))


def code(service, message) -> str:
    answer = ask(service, message)
    return answer.code if isinstance(answer, Refused) else type(answer).__name__


def request_for(cohort, exchange, site=SITE):
    node = next(node for node, service in cohort.services.items() if service.identity.name == site)
    return decode_request(exchange.requests[node])


def with_(message, **fields):
    return msgspec.structs.replace(message, **fields)


@pytest.fixture
def before(make_cohort):
    """A cohort that has played up to some phase; the site under test and the request it is about to get."""

    def play(phase, number, **options):
        cohort = make_cohort(**options)
        exchange = cohort.play(until=(phase, number))
        return cohort, cohort.site(SITE), request_for(cohort, exchange)

    return play


# --- what it answers ------------------------------------------------------------------------------------------------


def test_a_site_signs_the_plan_with_the_run_and_the_roster_it_is_bound_to(make_cohort):
    cohort = make_cohort()
    service, coordinator = cohort.site(SITE), cohort.coordinator
    offer = PlanOffer(run=RUN, plan=coordinator.plan.canonical(), roster=coordinator.roster.canonical_bytes())
    reply = ask(service, offer)
    assert isinstance(reply, PlanAdmitted)
    bound = join_fields(RUN.encode(), coordinator.plan.digest.encode(), coordinator.roster.digest())
    verify(service.identity.public(), CONTEXT_PLAN, bound, reply.signature)
    # lora_B of query and value in two layers, 16 x 2 each; a head of 3 labels
    assert reply.num_values == {"global": 128, "kind/hospital": 51}
    assert reply.ciphertexts == {"global": 1, "kind/hospital": 1}


def test_the_digests_of_an_update_are_of_what_the_site_started_from_and_are_signed(before):
    _, service, request = before("round", 1)
    reply = ask(service, request)
    assert isinstance(reply, UpdateReply)
    assert reply.digests == {"global": reply.digests["global"], "kind/hospital": reply.digests["kind/hospital"]}
    verify(service.identity.public(), CONTEXT_ADAPTER, digest_message(RUN, 1, reply.digests), reply.signature)


def test_training_leaves_the_shared_weights_where_they_were(before):
    _, service, request = before("round", 1)
    started = {scope: held.weights.copy() for scope, held in service._run.scopes.items()}
    ask(service, request)
    assert all((service._run.scopes[scope].weights == weights).all() for scope, weights in started.items())
    held_by_the_model = dict(service._run.model.named_parameters())
    assert not any(p.detach().any() for name, p in held_by_the_model.items() if "lora_B" in name)


# --- order ----------------------------------------------------------------------------------------------------------


def test_a_round_is_played_once(before):
    _, service, request = before("round", 1)
    assert code(service, request) == "UpdateReply"
    steps = service._run.steps_done
    assert code(service, request) == "WrongRound"
    assert service._run.steps_done == steps, "a refused request trains nothing, so it costs no privacy"


@pytest.mark.parametrize("number", [1, 3])
def test_a_repeated_or_skipped_round_is_refused(before, number):
    _, service, request = before("round", 2)
    assert code(service, with_(request, round=number)) == "WrongRound"
    assert code(service, request) == "UpdateReply"


def test_there_is_no_round_after_the_last(before):
    _, service, request = before("close", 2)
    assert code(service, RoundRequest(run=RUN, round=3, previous=request.previous)) == "WrongRound"


def test_a_round_wants_the_sum_of_the_round_before(before):
    _, service, request = before("round", 2)
    assert code(service, with_(request, previous=None)) == "WrongRound"
    _, service, request = before("round", 2, run="another")
    assert code(service, with_(request, previous=with_(request.previous, round=2))) == "WrongRound"


def test_the_first_round_takes_no_sum(before):
    previous = before("round", 2)[2].previous
    _, service, first = before("round", 1)
    assert code(service, with_(first, previous=previous)) == "WrongRound"


@pytest.mark.parametrize(
    "message",
    [
        KeyRequest(run=RUN, epoch=0),
        RoundRequest(run=RUN, round=1),
        ReleaseRequest(run=RUN, metrics={"round": 1, "sums": []}, send_adapter=False),
    ],
    ids=["key", "round", "release"],
)
def test_nothing_is_answered_before_a_plan_is_admitted(make_cohort, message):
    assert code(make_cohort().site(SITE), message) == "WrongRound"


def test_a_request_of_another_run_is_refused(before):
    _, service, request = before("round", 1)
    assert code(service, with_(request, run="another")) == "WrongRound"


def test_a_run_is_closed_once_and_only_after_its_last_round(before):
    _, service, request = before("round", 2)
    early = CloseRequest(run=RUN, round=1, previous=request.previous)
    assert code(service, early) == "WrongRound"
    _, service, request = before("close", 2, run="another")
    assert code(service, with_(request, round=1)) == "WrongRound"
    assert code(service, request) == "UpdateReply"
    assert code(service, request) == "WrongRound"


def test_a_release_before_the_close_is_refused_and_writes_nothing(before):
    cohort, service, request = before("close", 2)
    release = ReleaseRequest(run=RUN, metrics=request.previous, send_adapter=True)
    assert code(service, release) == "WrongRound"
    assert not (cohort.folder / SITE).exists()


# --- the group key --------------------------------------------------------------------------------------------------


def test_a_group_key_is_made_once(before):
    cohort = before("round", 1)[0]
    maker = cohort.site("harbour-bank")  # first in roster order: it was asked
    assert code(maker, KeyRequest(run=RUN, epoch=0)) == "WrongRound"


def test_a_group_key_of_another_epoch_is_not_made(before):
    cohort = before("round", 1)[0]
    assert code(cohort.site("st-anna"), KeyRequest(run=RUN, epoch=1)) == "WrongRound"


def test_the_first_round_wants_an_envelope(before):
    _, service, request = before("round", 1)
    assert code(service, with_(request, envelope=None)) == "WrongKey"
    assert service._run.steps_done == 0


@pytest.mark.parametrize("envelope", [b"", b"\xc1", b"not an envelope", msgspec.msgpack.encode({"run": RUN})])
def test_an_envelope_that_is_none_is_refused(before, envelope):
    _, service, request = before("round", 1)
    assert code(service, with_(request, envelope=envelope)) == "WrongKey"


def test_the_envelope_of_another_site_is_refused(before):
    cohort, service, request = before("round", 1)
    other = cohort.coordinator._envelopes["st-anna"]
    assert code(service, with_(request, envelope=other)) == "WrongKey"


def sealed_again(cohort, service, *, run=RUN, epoch=0, roster=None, sender="harbour-bank"):
    key = SecretKey.generate(cohort.coordinator.plan.packing.params)
    sealed = seal(
        key.to_bytes(),
        sender=cohort.site(sender).identity,
        receiver=service.identity.public(),
        roster=roster or cohort.coordinator.roster,
        run=run,
        epoch=epoch,
    )
    return msgspec.msgpack.encode(sealed)


@pytest.mark.parametrize("bound", [{"run": "another"}, {"epoch": 1}], ids=["run", "epoch"])
def test_the_envelope_of_another_run_or_epoch_is_refused(before, bound):
    cohort, service, request = before("round", 1)
    assert code(service, with_(request, envelope=sealed_again(cohort, service, **bound))) == "WrongKey"
    assert service._run.key is None


@pytest.mark.parametrize("field", ["ciphertext", "signature", "sender", "receiver"])
def test_an_altered_envelope_is_refused(before, field):
    _, service, request = before("round", 1)
    sealed = msgspec.msgpack.decode(request.envelope, type=SealedKey)
    value = getattr(sealed, field)
    altered = "st-anna" if isinstance(value, str) else value[:-1] + bytes([value[-1] ^ 1])
    envelope = msgspec.msgpack.encode(with_(sealed, **{field: altered}))
    assert code(service, with_(request, envelope=envelope)) == "WrongKey"


# --- sums -----------------------------------------------------------------------------------------------------------


def altered_sum(request, alter):
    first, *rest = request.previous.sums
    return with_(request, previous=with_(request.previous, sums=(alter(first), *rest)))


def summed_by_the_coordinator(cohort, key, sites, scope, layout_of):
    """A sum over ``sites`` copies of the update of zeros, as a coordinator could make it from what a site sent."""
    from fedseek.encode import encode_update, num_ciphertexts

    layout, packing = layout_of.layout, cohort.coordinator.plan.packing
    slots = encode_update(
        np.zeros(layout.num_values, np.float32),
        layout,
        packing=packing,
        value_range=layout_of.value_range,
        weight=1,
        weight_cap=1,
        metrics=dict.fromkeys(layout.metrics, 0.0),
    )
    aggregate = agg_init(packing.params, {scope: num_ciphertexts(layout, packing)}, max_sites=packing.max_sites)
    for _ in range(sites):
        agg_update(aggregate, encrypt_update(key, {scope: slots}))
    return agg_finish(aggregate, min_sites=1)[0]


@pytest.mark.parametrize(
    ("alter", "wanted"),
    [
        (lambda total: ScopedSum(total.scope, 3, total.ciphertexts), "Malformed"),
        (lambda total: ScopedSum(total.scope, 5, total.ciphertexts), "Malformed"),
        (lambda total: ScopedSum(total.scope, 0, total.ciphertexts), "Malformed"),
        (lambda total: ScopedSum("kind/hospital", 2, total.ciphertexts), "Malformed"),
        (lambda total: ScopedSum("kind/bank", 2, total.ciphertexts), "Malformed"),
        (lambda total: ScopedSum(total.scope, 4, ()), "Malformed"),
        (lambda total: ScopedSum(total.scope, 4, total.ciphertexts * 2), "Malformed"),
        (lambda total: ScopedSum(total.scope, 4, tuple(one[:-1] for one in total.ciphertexts)), "Malformed"),
        (lambda total: ScopedSum(total.scope, 4, (b"",)), "Malformed"),
    ],
    ids=["fewer", "more", "none", "scope-twice", "scope-missing", "empty", "too-many", "truncated", "no-bytes"],
)
def test_a_sum_that_is_not_what_was_announced_is_refused_and_not_applied(before, alter, wanted):
    _, service, request = before("round", 2)
    held = service._run.scopes["global"].weights.copy()
    assert code(service, altered_sum(request, alter)) == wanted
    assert (service._run.scopes["global"].weights == held).all()
    assert service._run.rounds_applied == 0


def test_a_fresh_ciphertext_is_no_sum(before):
    """A coordinator that hands one site's upload to another, to be decrypted there."""
    cohort, service, request = before("round", 2)
    upload = next(
        reply for reply in map(decode_reply, cohort.seen[1::2]) if isinstance(reply, UpdateReply) and reply.site != SITE
    )
    passed_on = {scoped.scope: scoped.ciphertexts for scoped in upload.update}["global"]
    assert code(service, altered_sum(request, lambda total: ScopedSum(total.scope, 1, passed_on))) == "Malformed"


@pytest.mark.parametrize("sites", [1, 3])
def test_a_sum_that_lacks_sites_is_refused_though_it_is_announced_as_such(before, sites):
    cohort, service, request = before("round", 2)
    run = service._run
    fewer = summed_by_the_coordinator(cohort, run.key, sites, "global", run.scopes["global"])
    assert fewer.contributors == sites
    assert code(service, altered_sum(request, lambda total: fewer)) == "CohortTooSmall"
    assert run.rounds_applied == 0


def test_a_sum_under_another_key_is_refused(before):
    cohort, service, request = before("round", 2)
    stranger = SecretKey.generate(cohort.coordinator.plan.packing.params)
    other = summed_by_the_coordinator(cohort, stranger, 4, "global", service._run.scopes["global"])
    assert code(service, altered_sum(request, lambda total: other)) == "WrongKey"


def test_one_upload_under_another_key_spoils_the_sum_and_every_site_notices(make_cohort):
    """The coordinator cannot see it; the sites do, before they apply anything."""
    cohort = make_cohort()
    stranger = SecretKey.generate(cohort.coordinator.plan.packing.params)

    def foreign(phase, number, site, data):
        if (phase, number, site) != ("round", 1, SITE):
            return data
        reply = decode_reply(data)
        update = tuple(
            ScopedCiphertexts(
                scoped.scope, encrypt_update(stranger, {"x": np.arange(60, dtype=np.uint64)})[0].ciphertexts
            )
            for scoped in reply.update
        )
        return encode_message(with_(reply, update=update))

    exchange = cohort.play(reply=foreign, until=("round", 2))
    for node, request in exchange.requests.items():
        assert code(cohort.services[node], request) == "WrongKey"
        assert cohort.services[node]._run.rounds_applied == 0


# --- requests that do not parse -------------------------------------------------------------------------------------


def raw(message, **fields):
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(encode_message(message)), **fields})


@pytest.mark.parametrize(
    "alter",
    [
        lambda request: b"",
        lambda request: encode_message(request)[:-1],
        lambda request: encode_message(request) + b"\0",
        lambda request: raw(request, note="x"),
        lambda request: raw(request, version=2),
        lambda request: raw(request, type="RunCode"),
        lambda request: raw(request, round="1"),
        lambda request: raw(request, round=0),
        lambda request: raw(request, run=""),
        lambda request: raw(request, run="x" * 129),
        lambda request: raw(request, run=b"\xff\xfe"),
    ],
    ids=["empty", "short", "long", "field", "version", "type", "text", "zero", "no-run", "long-run", "bytes"],
)
def test_a_request_that_does_not_parse_is_refused_and_the_real_one_then_answered(before, alter):
    _, service, request = before("round", 1)
    answer = ask(service, alter(request))
    assert isinstance(answer, Refused)
    assert (answer.code, answer.run) == ("Malformed", "unknown")
    assert code(service, request) == "UpdateReply"


def test_a_reply_is_no_request(before):
    cohort, service, _ = before("round", 1)
    assert code(service, cohort.seen[1]) == "Malformed"


# --- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_that_is_not_canonical_or_not_valid_is_refused(make_cohort):
    cohort = make_cohort()
    service, roster = cohort.site(SITE), cohort.coordinator.roster.canonical_bytes()
    canonical = cohort.coordinator.plan.canonical()
    assert code(service, PlanOffer(run=RUN, plan=canonical, roster=roster)) == "PlanAdmitted"
    for plan in (canonical + b" ", canonical.replace(b'"rounds":2', b'"rounds":0'), b"{}", b"", b"\xff"):
        assert code(service, PlanOffer(run="another", plan=plan, roster=roster)) == "InvalidPlan"
    for altered in (b"", roster[:-1], roster + b"\0"):
        assert code(service, PlanOffer(run="another", plan=canonical, roster=altered)) == "Malformed"
    assert code(service, PlanOffer(run=RUN, plan=canonical, roster=roster)) == "WrongRound", "a run begins once"


def test_a_refused_plan_names_its_rule_to_the_coordinator(make_cohort, tiny_data):
    cohort = make_cohort(data={SITE: tiny_data("hospital", unit=None)})
    coordinator = cohort.coordinator
    offer = PlanOffer(run=RUN, plan=coordinator.plan.canonical(), roster=coordinator.roster.canonical_bytes())
    answer = ask(cohort.site(SITE), offer)
    assert (answer.code, answer.site) == ("PlanRefused", SITE)
    assert answer.rule == "the plan protects a patient, this site's data names no unit column"


# --- what a refusal tells -------------------------------------------------------------------------------------------

PRIVATE_WORDS = "患者王小明 /data/病历.jsonl 13800000000"


def test_of_an_internal_error_no_word_leaves_the_site(make_cohort, caplog):
    cohort = make_cohort()
    service, coordinator = cohort.site(SITE), cohort.coordinator

    def full_disk(event):
        if event["event"] == "layout":
            raise OSError(28, PRIVATE_WORDS)
        cohort.events[SITE].append(event)

    service._observe = full_disk
    offer = PlanOffer(run=RUN, plan=coordinator.plan.canonical(), roster=coordinator.roster.canonical_bytes())
    with caplog.at_level(logging.ERROR):
        reply = service.handle(encode_message(offer))
    assert decode_reply(reply) == Refused(run=RUN, site=SITE, code="InternalError", rule="internal error")
    for word in ("王小明", "病历", "13800000000", "OSError", "Errno", "/data"):
        assert word.encode() not in reply
    assert PRIVATE_WORDS in caplog.text, "the site's own log has it"


def test_an_error_over_data_is_told_as_a_code_alone(make_cohort, tiny_data):
    data = tiny_data("hospital")
    odd = Records(data.train.texts, (PRIVATE_WORDS, *data.train.labels[1:]), data.train.units, data.train.unit_column)
    cohort = make_cohort(data={SITE: SiteData(odd, data.held_back)})
    coordinator = cohort.coordinator
    offer = PlanOffer(run=RUN, plan=coordinator.plan.canonical(), roster=coordinator.roster.canonical_bytes())
    reply = cohort.site(SITE).handle(encode_message(offer))
    assert decode_reply(reply) == Refused(run=RUN, site=SITE, code="InvalidPlan", rule="InvalidPlan")


def test_a_refusal_of_a_sum_is_told_as_a_code_and_explained_at_the_site(before):
    cohort, service, request = before("round", 2)
    answer = ask(service, altered_sum(request, lambda total: ScopedSum(total.scope, 3, total.ciphertexts)))
    assert (answer.code, answer.rule) == ("Malformed", "Malformed")
    assert "coordinator announced 3 sites, it holds 4" in cohort.events[SITE][-1]["text"]


def test_no_text_label_or_unit_of_the_data_is_in_any_message(make_cohort):
    cohort = make_cohort(private=True)
    cohort.play()
    carried = b"\0".join(cohort.seen)
    data = cohort.site(SITE).data
    for text in {*data.train.texts, *data.held_back.texts, *data.train.units, *data.held_back.units}:
        assert text.encode() not in carried


# --- release --------------------------------------------------------------------------------------------------------


def test_a_release_is_written_once_and_signed(before):
    cohort, service, request = before("release", 2)
    answer = ask(service, with_(request, send_adapter=True))
    assert isinstance(answer, ReleaseApproved)
    folder = cohort.folder / SITE / "release"
    assert answer.statement == (folder / "privacy.json").read_bytes()
    assert answer.signature == (folder / "privacy.sig").read_bytes()
    assert answer.adapter == {name: (folder / name).read_bytes() for name in answer.adapter}
    assert len(answer.adapter) == 2


def test_a_release_without_the_kinds_metrics_is_refused_and_writes_nothing(before):
    cohort, service, request = before("release", 2)
    assert code(service, with_(request, metrics=with_(request.metrics, sums=()))) == "Malformed"
    assert not (cohort.folder / SITE).exists()


def test_a_site_that_cannot_earn_its_statement_does_not_release(before):
    cohort, service, request = before("release", 2, private=True)
    service._run.steps_done += 1  # a step that the accountant does not know
    assert code(service, request) == "ReleaseRefused"
    assert list((cohort.folder / SITE).iterdir()) == [], "neither a release nor a draft of one"
    assert service._run.spend.num_steps == 4
