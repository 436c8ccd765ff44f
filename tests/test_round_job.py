"""A round as bytes: what comes out is what went in, and nothing of it is ever printed."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.randomness import PLACE_BYTES
from fedseek.progress import Progress
from fedseek.records import TokenisedRecords
from fedseek.round_job import Begun, Job, Rows
from fedseek.train_settings import TrainingSettings

SETTINGS = TrainingSettings(0.5, 3, 1e-4, 1e-3, None, "adam", warmup_steps=2)
PRIVACY = PrivacyParams(noise_multiplier=1.0, sampling_probability=0.5, delta=1e-5, l2_clip_norm=0.5)


def carried(value):
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value))


def job(records, *, privacy=PRIVACY, resume=None):
    spend = None if privacy is None else PrivacySpend(privacy, 6)
    return Job.of(
        records,
        ("encoder.lora_B", "head.weight"),
        settings=SETTINGS,
        privacy=privacy,
        spend=spend,
        steps_before=6,
        expected_units=7.5,
        resume=resume,
    )


def records(lengths, *, words):
    rows = [np.arange(length, dtype=np.int32) for length in lengths]
    counted = [np.arange(length) % 2 == 1 for length in lengths] if words else None
    return TokenisedRecords(rows, np.arange(len(rows)), np.arange(len(rows)), counted)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_records_arrive_as_they_are(lengths, words):
    sent = records(lengths, words=words)
    got = carried(job(sent)).records
    for name in ("labels", "units"):
        assert getattr(got, name).dtype == getattr(sent, name).dtype
        assert getattr(got, name).tolist() == getattr(sent, name).tolist()
    assert [row.tolist() for row in got.input_ids] == [row.tolist() for row in sent.input_ids]
    assert {row.dtype for row in got.input_ids} == {np.dtype(np.int32)}
    assert (got.counted is None) == (not words)
    if words:
        assert [row.tolist() for row in got.counted] == [row.tolist() for row in sent.counted]
        assert {row.dtype for row in got.counted} == {np.dtype(bool)}


@pytest.mark.parametrize("privacy", [None, PRIVACY], ids=["plain", "private"])
def test_the_options_arrive_as_they_are(privacy):
    options = carried(job(records([2], words=True), privacy=privacy)).options
    assert options == {
        "settings": SETTINGS,
        "privacy": privacy,
        "spend": None if privacy is None else PrivacySpend(privacy, 6),
        "steps_before": 6,
        "expected_units": 7.5,
        "resume": None,
    }


def test_progress_arrives_without_the_key_of_the_draws():
    values = {"encoder.lora_B": np.ones((2, 3), np.float32)}
    moments = {"encoder.lora_B": {"exp_avg": np.full((2, 3), 0.5, np.float32), "step": np.float32(4).reshape(())}}
    sent = Progress(4, values, moments, 11, 2.5, ("noise_added",), b"k" * PLACE_BYTES)
    told = carried(Begun.of(sent))
    assert b"kkkk" not in msgspec.msgpack.encode(told)
    got = told.progress()
    assert (got.step, got.num_drawn, got.loss_sum, got.guards_passed) == (4, 11, 2.5, ("noise_added",))
    assert np.array_equal(got.trained["encoder.lora_B"], values["encoder.lora_B"])
    assert {kind: value.shape for kind, value in got.optimiser["encoder.lora_B"].items()} == {
        "exp_avg": (2, 3),
        "step": (),
    }
    assert len(got.draws) == PLACE_BYTES
    assert got.draws != sent.draws


def test_nothing_of_a_round_is_printed():
    told = job(records([3, 2], words=True))
    assert repr(told) == str(told) == "Job(<withheld>)"
    assert repr(Rows.of([np.arange(3)])) == "Rows(<withheld>)"


def test_what_is_no_round_is_refused():
    data = msgspec.msgpack.encode({"input_ids": 3})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(data, type=Job)
