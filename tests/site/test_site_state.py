"""The state of a run as bytes: round trips, strictness, and nothing shown that is secret."""

import os

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fedseek.apply import ScopeState
from fedseek.deal import HeldShares, RoundSecrets
from fedseek.encode import UpdateLayout
from fedseek.errors import Malformed, PlanRefused
from fedseek.messages import RoundKeys
from fedseek_site.admission import ROOM_BESIDE_WEIGHTS, check_room
from fedseek_site.journal import MAX_KEPT_BYTES
from fedseek_site.state import CanaryState, EarlierAdapter, RoundState, ScopeValues, SiteState
from fedseek_site.weights import to_scopes, to_values

KEYS = RoundKeys(site="仁济医院", round=2, mask_key=bytes(32), share_key=bytes(32), signature=bytes(64))
SECRET = b"\xf0secret-seed-of-\xff"
FULL = RoundState(
    keys=KEYS,
    secrets=RoundSecrets(SECRET, SECRET * 2, SECRET * 3),
    listed=("st-anna", "仁济医院"),
    peers={"st-anna": KEYS},
    held={"仁济医院": HeldShares({"mask-key": SECRET})},
    participants=("仁济医院",),
    epoch=3,
    vouched=b"vouched",
    survivors=("仁济医院",),
)
BEFORE = EarlierAdapter(
    round=0,
    scopes={"global": ScopeValues(weights=SECRET, momentum=SECRET * 2, value_range=0.25)},
    digests={"global": b"\x07" * 32},
    contributors=(0, 3),
)
CANARIES = CanaryState(seed=SECRET * 2, first_losses=SECRET * 8, round_scores=SECRET * 8, rounds=1)
STATE = SiteState(
    offer=b"offer",
    scopes={"global": ScopeValues(weights=SECRET, momentum=SECRET * 2, value_range=0.5)},
    steps_done=(4, 2),
    steps_accounted=(4, 2),
    guards_passed=("a", "b"),
    last_sent=2,
    last_applied=1,
    digests={"global": b"\x08" * 32},
    contributors=(0, 2, 3),
    before=BEFORE,
    earlier_runs=("丢失的运行",),
    group_keys={0: SECRET, 7: SECRET},
    canaries=CANARIES,
    rounds={2: FULL, 3: RoundState(keys=KEYS, secrets=None)},
    released=True,
)
LAYOUT = UpdateLayout("global", (("a", (2, 3)), ("b", (1,))))


def test_a_state_comes_back_as_it_was():
    assert SiteState.from_bytes(STATE.to_bytes()) == STATE
    assert SiteState.from_bytes(STATE.to_bytes()).to_bytes() == STATE.to_bytes()


@pytest.mark.parametrize("shown", [repr, str, lambda each: str(each.__rich_repr__())])
def test_nothing_that_shows_a_state_shows_a_secret(shown):
    for each in (STATE, FULL, BEFORE, CANARIES, STATE.scopes["global"], FULL.secrets, *FULL.held.values()):
        assert "secret-seed" not in shown(each)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_state_are_refused_in_one_way(data):
    with pytest.raises(Malformed):
        SiteState.from_bytes(data)


@given(st.data())
def test_a_state_cut_short_or_made_longer_is_refused(data):
    whole = STATE.to_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    for altered in (whole[:cut], whole + b"\0"):
        with pytest.raises(Malformed) as caught:
            SiteState.from_bytes(altered)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"version": 1}, {"note": 1}, {"last_sent": "2"}, {"group_keys": {"0": b""}}])
def test_a_state_of_another_form_is_refused(fields):
    document = msgspec.msgpack.decode(STATE.to_bytes(), strict=False)
    with pytest.raises(Malformed):
        SiteState.from_bytes(msgspec.msgpack.encode({**document, **fields}))


def scope_state():
    rng = np.random.default_rng(1)
    return ScopeState(LAYOUT, rng.normal(size=7).astype(np.float32), rng.normal(size=7), 0.25)


def test_weights_come_back_bit_for_bit_and_can_be_written_to():
    held = scope_state()
    values = to_values({"global": held})
    assert (len(values["global"].weights), len(values["global"].momentum)) == (28, 56)
    back = to_scopes(values, {"global": LAYOUT})["global"]
    assert (back.weights.dtype, back.momentum.dtype) == (np.float32, np.float64)
    assert back.digest() == held.digest()
    assert np.array_equal(back.momentum, held.momentum)
    assert back.value_range == held.value_range
    assert back.weights.flags.writeable, "torch warns of arrays that it may not write to"


@pytest.mark.parametrize("what", ["short", "odd", "momentum", "scope-less", "scope-more"])
def test_stored_weights_that_do_not_fit_the_model_are_refused(what):
    values = to_values({"global": scope_state()})
    one = values["global"]
    altered = {
        "short": {"global": replace(one, weights=one.weights[:-4])},
        "odd": {"global": replace(one, weights=one.weights[:-1])},
        "momentum": {"global": replace(one, momentum=os.urandom(28))},
        "scope-less": {},
        "scope-more": {**values, "kind/bank": one},
    }[what]
    with pytest.raises(Malformed, match="stored weights"):
        to_scopes(altered, {"global": LAYOUT})


def test_without_server_momentum_a_state_keeps_the_weights_alone():
    held = scope_state()
    still = ScopeState(held.layout, held.weights, np.zeros_like(held.momentum), held.value_range)
    values = to_values({"global": still})["global"]
    assert values.momentum == b""
    back = to_scopes({"global": values}, {"global": LAYOUT})["global"]
    assert (back.momentum == still.momentum).all()
    assert back.momentum.dtype == np.float64


def test_a_plan_whose_state_the_journal_could_not_keep_is_refused_before_training(tiny_plan):
    for momentum, each in ((0.0, 8), (0.9, 24)):
        plan = tiny_plan(training={"server_momentum": momentum})
        most = (MAX_KEPT_BYTES - ROOM_BESIDE_WEIGHTS) // each
        check_room(plan, most, me="仁济医院")
        with pytest.raises(PlanRefused, match=f"keeps at most {most}"):
            check_room(plan, most + 1, me="仁济医院")
