"""The file that a killed site goes on from: what is in it, what is refused, when it is written and when it goes."""

import dataclasses
import os
import stat
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from msgspec.structs import replace
from tiny_rounds import SETTINGS, private_round, tiny_model, toy_records

from fedseek.dp.randomness import PLACE_BYTES
from fedseek.errors import CustodyError, Malformed
from fedseek.identity.vault import StorageKey, open_at_rest, seal_at_rest
from fedseek.progress import take_values, trained_tensors
from fedseek_site import checkpoints
from fedseek_site.checkpoints import CHECKPOINT_FILE, Beginning, Checkpoint, Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Full backward hook")

RUN = "试运行-1"


@pytest.fixture(scope="module")
def key():
    return StorageKey.generate()


@pytest.fixture(scope="module")
def snapshots():
    """What a private round had come to after each of its steps."""
    kept = []
    private_round(tiny_model(), toy_records(), on_progress=lambda step, of, snapshot: kept.append(snapshot()))
    return kept


def beginning_of(**changes):
    first = take_values(trained_tensors(tiny_model()))
    given = {"plan": "ab" * 32, "records": toy_records(), "first": first} | changes
    run, number = given.pop("run", RUN), given.pop("number", 3)
    return Beginning.of(run, number, SETTINGS.num_steps, **given)


@pytest.fixture
def told():
    return []


@pytest.fixture
def store(tmp_path, key, told):
    return Checkpoints(tmp_path / CHECKPOINT_FILE, key, observe=told.append, seconds=0)


def keep(store, progress, beginning=None, *, step=None):
    store.keeper(beginning or beginning_of())(step or progress.step, SETTINGS.num_steps, lambda: progress)


def same(one, other):
    return (
        dataclasses.replace(one, trained={}, optimiser={}) == dataclasses.replace(other, trained={}, optimiser={})
        and all(np.array_equal(one.trained[name], other.trained[name]) for name in other.trained)
        and one.optimiser.keys() == other.optimiser.keys()
        and all(
            np.array_equal(one.optimiser[name][kind], values)
            for name, kept in other.optimiser.items()
            for kind, values in kept.items()
        )
    )


def test_what_is_kept_is_found_to_the_bit(store, snapshots, told):
    for progress in snapshots:
        keep(store, progress)
        assert same(store.find(beginning_of()), progress)
    assert [(each["event"], each["step"], each["of"]) for each in told] == [("resumed", n, 4) for n in (1, 2, 3, 4)]


def test_nothing_is_found_where_nothing_was_kept(store, told):
    assert store.find(beginning_of()) is None
    assert told == []


def test_it_is_a_file_of_its_owner_alone_and_shows_nothing(store, snapshots, tmp_path, key):
    keep(store, snapshots[1])
    path = tmp_path / CHECKPOINT_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == [CHECKPOINT_FILE]
    data = path.read_bytes()
    assert RUN.encode() not in data
    assert b"lora_B" not in data
    with pytest.raises(zlib.error):
        zlib.decompress(data)


def test_only_what_is_trained_is_in_it_and_it_is_bounded(store, snapshots, tmp_path):
    beginning = beginning_of()
    keep(store, snapshots[-1], beginning)
    num_values = sum(values.size for values in beginning.first.values())
    assert beginning.max_bytes == 12 * num_values + 1024 * len(beginning.first) + 65_536
    assert (tmp_path / CHECKPOINT_FILE).stat().st_size <= beginning.max_file_bytes <= 1.002 * beginning.max_bytes
    assert (tmp_path / CHECKPOINT_FILE).stat().st_size < 12 * num_values + 2000


def test_values_close_to_the_first_ones_take_less_room():
    rng = np.random.default_rng(0)
    first = rng.standard_normal(10_000).astype(np.float32)
    near = first * np.float32(1 + 1e-4)
    size = len(zlib.compress(checkpoints._difference(near, first), 1))
    assert size < 0.75 * len(zlib.compress(near.tobytes(), 1))
    assert len(zlib.compress(checkpoints._difference(first, first), 1)) < 300


@given(
    arrays.arrays(np.uint32, (3, 5)).map(lambda bits: bits.view(np.float32)),
    arrays.arrays(np.uint32, (3, 5)).map(lambda bits: bits.view(np.float32)),
)
def test_a_difference_is_exact_for_every_float(values, first):
    again = checkpoints._changed(first, checkpoints._difference(values, first))
    assert again.tobytes() == values.tobytes()
    assert again.shape == values.shape
    with pytest.raises(Malformed):
        checkpoints._changed(first, checkpoints._difference(values, first)[:-1])


def ignored(store, told, beginning=None):
    """The words with which a file is left alone."""
    told.clear()
    assert store.find(beginning or beginning_of()) is None
    (event,) = told
    assert (event["event"], event["round"]) == ("checkpoint-ignored", (beginning or beginning_of()).round)
    return event["text"]


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "试运行-2"},
        {"number": 4},
        {"plan": "ac" * 32},
        {"records": toy_records(39)},
        {"first": {name: values + 1 for name, values in take_values(trained_tensors(tiny_model())).items()}},
    ],
    ids=["run", "round", "plan", "records", "weights"],
)
def test_a_checkpoint_of_another_beginning_is_ignored(store, snapshots, told, changes):
    keep(store, snapshots[1])
    assert "wanted one of round" in ignored(store, told, beginning_of(**changes))


def test_other_tensors_counted_are_another_beginning():
    records = toy_records()
    counted = [np.ones(len(row), np.bool_) for row in records.input_ids]
    with_counted = dataclasses.replace(records, counted=counted)
    assert beginning_of(records=with_counted).digest != beginning_of().digest


def test_a_file_of_another_key_or_that_was_altered_is_ignored(store, snapshots, told, tmp_path):
    path = tmp_path / CHECKPOINT_FILE
    other = Checkpoints(path, StorageKey.generate(), observe=told.append, seconds=0)
    keep(other, snapshots[1])
    assert "does not open" in ignored(store, told)
    keep(store, snapshots[1])
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"FSK1", whole + whole):
        path.write_bytes(data)
        ignored(store, told)


def test_a_file_that_others_may_read_is_ignored(store, snapshots, told, tmp_path):
    keep(store, snapshots[1])
    (tmp_path / CHECKPOINT_FILE).chmod(0o644)
    assert "0644" in ignored(store, told)


def test_a_file_that_is_too_long_is_not_read(store, told, tmp_path):
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(b"FSK1" + bytes(beginning_of().max_file_bytes))
    path.chmod(0o600)
    assert "wanted at most" in ignored(store, told)


def rewritten(path, key, change):
    """Seal something else under the right key."""
    stored = msgspec.msgpack.decode(
        zlib.decompress(open_at_rest(key, path.read_bytes(), purpose="site-checkpoint")), type=Checkpoint
    )
    data = change(stored)
    data = data if isinstance(data, bytes) else zlib.compress(msgspec.msgpack.encode(data))
    path.write_bytes(seal_at_rest(key, data, purpose="site-checkpoint"))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: b"not compressed",
        lambda c: zlib.compress(b"\xc1"),
        lambda c: zlib.compress(msgspec.msgpack.encode({"version": 2})),
        lambda c: zlib.compress(msgspec.msgpack.encode(msgspec.to_builtins(c) | {"more": 1})),
        lambda c: zlib.compress(bytes(100_000_000)),
        lambda c: replace(c, step=5),
        lambda c: replace(c, step=-1),
        lambda c: replace(c, draws=c.draws[1:]),
        lambda c: replace(c, trained={name: data for name, data in c.trained.items() if name != "head.bias"}),
        lambda c: replace(c, trained={**c.trained, "head.bias": b"1234"}),
        lambda c: replace(c, optimiser={**c.optimiser, "stranger": {}}),
        lambda c: replace(c, optimiser={**c.optimiser, "head.bias": {"step": b"12345"}}),
        lambda c: zlib.compress(
            msgspec.msgpack.encode(msgspec.to_builtins(c) | {"optimiser": {"head.bias": {"other": b""}}})
        ),
    ],
    ids=[
        "no-zlib", "no-msgpack", "version", "field", "bomb", "steps", "negative", "draws", "missing", "length",
        "stranger", "moment", "kind",
    ],
)  # fmt: skip
def test_what_does_not_parse_or_fit_is_ignored(store, snapshots, told, tmp_path, key, change):
    keep(store, snapshots[1])
    rewritten(tmp_path / CHECKPOINT_FILE, key, change)
    ignored(store, told)


def test_it_is_written_when_it_is_time_and_after_the_last_step(tmp_path, key, told, snapshots, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    store = Checkpoints(tmp_path / CHECKPOINT_FILE, key, observe=told.append, seconds=60)
    keeper, taken = store.keeper(beginning_of()), []

    def step(number, seconds, cost=0.0):
        now[0] += seconds

        def snapshot():
            taken.append(number)
            now[0] += cost
            return snapshots[0]

        keeper(number, 9, snapshot)

    step(1, 59), step(2, 2), step(3, 59), step(4, 1, cost=10.0)
    assert taken == [2, 4]
    step(5, 150), step(6, 49), step(7, 1)
    assert taken == [2, 4, 7], "ten seconds of writing are a twentieth of two hundred"
    step(9, 0)
    assert taken == [2, 4, 7, 9]


def test_a_disk_that_takes_no_checkpoint_does_not_end_the_training(store, snapshots, told, monkeypatch):
    def full(path, data):
        raise CustodyError(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr(checkpoints, "write_secret_file", full)
    keep(store, snapshots[0])
    (event,) = told
    assert event["event"] == "checkpoint-failed"
    assert "No space" in event["text"]


def test_removing_leaves_nothing_and_may_be_repeated(store, snapshots, tmp_path):
    keep(store, snapshots[0])
    store.remove(), store.remove()
    assert os.listdir(tmp_path) == []


def test_no_secret_shows_in_what_is_printed(snapshots):
    stored = Checkpoint(
        run=RUN, round=3, digest=b"", step=1, num_drawn=7, loss_sum=1.5, guards_passed=(), draws=b"\x07" * PLACE_BYTES,
        trained={}, optimiser={},
    )  # fmt: skip
    assert repr(stored) == "Checkpoint(<round 3, redacted>)"
    assert list(stored.__rich_repr__()) == []


@given(st.integers(0, 5_000), st.integers(1, 20))
def test_the_bound_holds_whatever_the_values(num_values, tensors):
    rng = np.random.default_rng(num_values)
    names = [f"encoder.layer.{number}.lora_B.default.weight" for number in range(tensors)]
    first = {name: rng.bytes(4 * num_values) for name in names}
    values = {name: np.frombuffer(data, np.float32) for name, data in first.items()}
    beginning = beginning_of(first=values)
    data = b"".join([*first.values()] * 3)
    assert len(zlib.compress(data, 1)) + 1024 * tensors + 65_536 <= beginning.max_file_bytes
