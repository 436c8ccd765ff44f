"""Whoever reads bytes of a stranger takes them or refuses them with an error of ours, and soon.

Bounded for the normal run; ``long_run.py`` goes on for as long as one likes, with the same targets and alterations.
"""

import base64
import gc
import json
import random

import pytest
from altering import Finding, Target, mutate, outcome
from batches import ALLOWED_CPU_SECONDS, numbered_input, run_batch
from fuzz_targets import CORPUS, targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from long_run import MAX_INPUT_BYTES, add_to_corpus

from fedseek.errors import Malformed

IN_PROCESS = [name for name, target in targets().items() if not target.native]
NATIVE = [name for name, target in targets().items() if target.native]
MAX_CORPUS_BYTES = 100_000
QUICK = settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("name", targets())
def test_what_is_altered_is_taken_as_it_was(name):
    assert {outcome(targets()[name], data) for data in targets()[name].valid} == {"taken"}


@pytest.mark.parametrize("name", IN_PROCESS)
@given(data=st.binary(max_size=400))
@QUICK
def test_any_bytes_are_taken_or_refused(name, data):
    outcome(targets()[name], data)


@pytest.mark.parametrize("name", IN_PROCESS)
@given(rng=st.randoms(use_true_random=False))
@QUICK
def test_altered_inputs_are_taken_or_refused(name, rng):
    outcome(targets()[name], mutate(rng, targets()[name]))


@pytest.mark.parametrize("name", NATIVE)
@given(seed=st.integers(0, 2**32))
@settings(QUICK, max_examples=4)
def test_altered_inputs_of_native_code_are_taken_or_refused(name, seed):
    """In a child process: what ends it is a finding."""
    batch = run_batch(name, str(seed), 0, count=60, seconds=2.0)
    assert batch.finding is None


@pytest.mark.parametrize("name", targets())
def test_the_corpus_gives_what_it_gave(name):
    """Inputs that a long run found interesting: one for each way of being refused. The class of the error stays."""
    cases = json.loads((CORPUS / f"{name}.json").read_text("utf-8"))
    for case in cases:
        told = outcome(targets()[name], base64.b64decode(case["input"]))
        assert told.split(":")[0] == case["outcome"].split(":")[0], case


def test_the_corpus_is_small_and_has_a_file_for_every_target():
    files = {path.stem: path.stat().st_size for path in CORPUS.iterdir()}
    assert set(files) == set(targets())
    assert sum(files.values()) < MAX_CORPUS_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("name", targets())
def test_five_seconds_of_each(name):
    batch = run_batch(name, f"slow {random.SystemRandom().random()}", 0, count=1 << 40, seconds=5.0)
    assert batch.finding is None
    assert batch.done > 100


# The instrument itself


def refuses(data):
    raise Malformed(f"got {len(data)} bytes")


def fails(data):
    raise KeyError("foreign")


def dawdles(data):
    for _ in range(200_000):
        pass


def test_an_outcome_names_the_error_and_leaves_values_out():
    assert outcome(Target(refuses, [b""]), b"abc") == "Malformed: got bytes"


@pytest.mark.parametrize(
    ("read", "said"), [(fails, "KeyError\\('foreign'\\)"), (dawdles, "s of CPU")], ids=["foreign", "slow"]
)
def test_a_foreign_exception_and_a_slow_read_are_findings(read, said):
    with pytest.raises(Finding, match=said):
        outcome(Target(read, [b""], max_cpu=1e-4), b"abc")


def test_the_collector_is_not_charged_to_an_input():
    """A full collection over all that is imported takes longer than most inputs may."""
    collected = []
    gc.callbacks.append(lambda phase, info: collected.append(phase))
    try:
        outcome(Target(lambda data: [[] for _ in range(100_000)], [b""]), b"abc")
    finally:
        gc.callbacks.pop()
    assert collected == []
    assert gc.isenabled()


def test_a_child_that_ends_is_a_finding_that_names_its_input(monkeypatch):
    def ends(data):
        import os

        os.abort()

    monkeypatch.setitem(targets(), "ends", Target(ends, [b"valid"]))
    batch = run_batch("ends", "1", 7, count=10, seconds=1.0)
    assert batch.done == 1
    assert "input 7 of seed '1' ended the process: SIGABRT" in batch.finding
    monkeypatch.setitem(targets(), "ends", Target(fails, [b"valid"]))
    assert "KeyError('foreign')" in run_batch("ends", "1", 7, count=10, seconds=1.0).finding
    assert ALLOWED_CPU_SECONDS < 600


def test_an_input_follows_from_its_number():
    first = [numbered_input("parse_roster", "seed", number) for number in range(20)]
    assert first == [numbered_input("parse_roster", "seed", number) for number in range(20)]
    assert len(set(first)) > 10
    assert first != [numbered_input("parse_roster", "other", number) for number in range(20)]


def test_the_corpus_takes_one_input_an_outcome_and_none_that_is_large(tmp_path):
    add_to_corpus("one", {"a": b"1", "b": bytes(MAX_INPUT_BYTES + 1)}, tmp_path)
    add_to_corpus("one", {"a": b"2", "c": b"3"}, tmp_path)
    cases = json.loads((tmp_path / "one.json").read_text("utf-8"))
    assert [(case["outcome"], base64.b64decode(case["input"])) for case in cases] == [("a", b"1"), ("c", b"3")]
