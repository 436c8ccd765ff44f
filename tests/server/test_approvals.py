"""The end of a run: who is asked to approve, whose word counts, and who must have given it."""

import msgspec
import pytest
from played_sites import ANNA, BEIAN, HARBOUR, RENJI, at, away, change, federate, lost, played_plan

from fedseek.errors import AdapterDiverged, ReleaseRefused
from fedseek.identity.signing import CONTEXT_RELEASE, sign
from fedseek.messages import decode_reply, decode_request, encode_message, release_message
from fedseek_server.releasing import write_release

ALL = (HARBOUR, ANNA, RENJI, BEIAN)


def approval(federated, data, **fields):
    """Alter an approval and sign it again, as a site that lies would."""
    reply = msgspec.structs.replace(decode_reply(data), **fields)
    signed = release_message(reply.run, reply.digests, reply.statement)
    signature = sign(federated.site(ANNA).identity, CONTEXT_RELEASE, signed)
    return encode_message(msgspec.structs.replace(reply, signature=signature))


def senders(federated):
    return [
        federated.sites[node].name
        for node, data in federated.exchanges[-1].requests.items()
        if decode_request(data).send_adapter
    ]


REFUSED = {
    "statement": (lambda f, d: change(d, statement=b"another"), "WrongKey"),
    "digest": (lambda f, d: change(d, digests={**decode_reply(d).digests, "global": bytes(32)}), "WrongKey"),
    "signature": (lambda f, d: change(d, signature=bytes(64)), "WrongKey"),
    "sender": (lambda f, d: change(d, site=HARBOUR), "WrongRound"),
    "run": (lambda f, d: approval(f, d, run="another"), "WrongRound"),
    "no digests": (lambda f, d: approval(f, d, digests={}), "Malformed"),
    "size": (lambda f, d: d + bytes(8 << 20), "TooLarge"),
}


@pytest.mark.parametrize(("alter", "code"), REFUSED.values(), ids=list(REFUSED))
def test_an_approval_that_was_altered_is_none(alter, code, tmp_path):
    federated = federate(played_plan())
    with pytest.raises(ReleaseRefused, match="no approval from st-anna"):
        federated.play(reply=at("release", 3, ANNA, lambda data: alter(federated, data)))
    assert federated.events("rejected", "phase", "site", "code") == [("release", ANNA, code)]
    assert ANNA not in federated.coordinator.approvals
    with pytest.raises(ReleaseRefused, match="no approval from st-anna"):
        write_release(federated.coordinator, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_an_approval_of_another_adapter_ends_the_run():
    federated = federate(played_plan())
    with pytest.raises(AdapterDiverged, match="release: site 'st-anna' holds other values of 'global'"):
        federated.play(
            reply=at(
                "release",
                3,
                ANNA,
                lambda data: approval(federated, data, digests={**decode_reply(data).digests, "global": bytes(32)}),
            )
        )
    assert ANNA not in federated.coordinator.approvals


def test_every_site_that_is_there_is_asked_and_one_sends_the_adapter():
    federated = federate(played_plan())
    federated.play()
    assert senders(federated) == [HARBOUR]
    assert [name for name, reply in federated.coordinator.approvals.items() if reply.adapter] == [HARBOUR]


def test_the_adapter_is_sent_by_a_site_that_was_there_to_the_end():
    federated = federate(played_plan())
    federated.play(away=away(("close", 3, HARBOUR)))
    assert senders(federated) == [ANNA]
    assert len(federated.coordinator.approvals) == 4, "the one that was away applies what it missed"


def test_a_release_needs_every_site_whose_update_is_in_it(tmp_path):
    federated = federate(played_plan())
    with pytest.raises(ReleaseRefused, match=r"2 of 4 sites .* no approval from st-anna, 仁济医院"):
        federated.play(away=away(("release", 3, ANNA), ("release", 3, RENJI)))
    assert federated.events("dropout", "phase", "site") == [("release", ANNA), ("release", RENJI)]
    with pytest.raises(ReleaseRefused, match="no approval from st-anna, 仁济医院"):
        write_release(federated.coordinator, tmp_path / "release")


def test_a_release_needs_no_word_of_a_site_that_is_not_in_it():
    """Its updates never arrived: it approves if it is there, and nobody waits for it if it is not."""
    federated = federate(played_plan())
    federated.play(
        reply=lost(("round", 1, ANNA), ("round", 2, ANNA)), away=away(("close", 3, ANNA), ("release", 3, ANNA))
    )
    assert federated.coordinator.contributors == (HARBOUR, RENJI, BEIAN)
    assert set(federated.coordinator.approvals) == {HARBOUR, RENJI, BEIAN}


def test_a_site_that_was_in_one_sum_long_ago_must_approve_too(tmp_path):
    federated = federate(played_plan(rounds=4))
    with pytest.raises(ReleaseRefused, match="no approval from st-anna"):
        federated.play(away=lambda phase, number, site: site == ANNA and number > 1)
    assert federated.coordinator.contributors == ALL
    with pytest.raises(ReleaseRefused, match="no approval from st-anna"):
        write_release(federated.coordinator, tmp_path / "release")


def test_a_run_that_was_never_played_releases_nothing(tmp_path):
    federated = federate(played_plan())
    with pytest.raises(ReleaseRefused, match="no approval from any site"):
        write_release(federated.coordinator, tmp_path / "release")
