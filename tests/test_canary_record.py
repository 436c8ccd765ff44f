"""The private record of a canary audit: written for its owner, read strictly, its bounds worked out again."""

import json
import stat

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from fedseek.canary_record import MAX_RECORD_BYTES, CanaryRecord, read_canary_record, work_out, write_canary_record
from fedseek.errors import CustodyError, Malformed, TooLarge
from fedseek.identity.secret_files import write_secret_file


def record(*, leaking: bool = True, claim: float | None = 8.0, site: str = "仁济医院") -> CanaryRecord:
    rng = np.random.default_rng(0)
    coins = np.arange(64) % 2 == 0
    draft = CanaryRecord(
        run="试运行-1",
        site=site,
        kind="hospital",
        plan_digest="ab" * 32,
        claim=claim,
        delta=1e-5,
        confidence=0.95,
        rounds=2,
        coins=tuple(coins.tolist()),
        released_scores=tuple(rng.normal(size=64).tolist()),
        round_scores=tuple((coins * leaking + 0.1 * rng.normal(size=64)).tolist()),
        released_adapter=0.0,
        every_round=0.0,
    )
    found = work_out(draft)
    return replace(draft, released_adapter=found.released_adapter, every_round=found.every_round)


def written(path, document) -> None:
    write_secret_file(path, json.dumps(document, ensure_ascii=False).encode())


def test_a_record_comes_back_and_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "canary-audit.json"
    write_canary_record(path, record())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_canary_record(path) == record()
    assert record().outcome == work_out(record())
    assert record().every_round > 2 > record().released_adapter
    path.chmod(0o644)
    with pytest.raises(CustodyError, match="0600"):
        read_canary_record(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"note": "x"},
        {"delta": 1.0},
        {"delta": -1e-5},
        {"confidence": 1.0},
        {"rounds": -1},
        {"coins": [1] * 64},
        {"coins": [True] * 63},
        {"released_scores": [0.0] * 63},
        {"round_scores": [None] * 64},
        {"round_scores": ["0"] * 64},
        {"claim": "8"},
    ],
    ids=lambda changes: "-".join(f"{key}-{str(value)[:12]}" for key, value in changes.items()),
)
def test_anything_else_is_refused_and_nothing_of_it_is_quoted(tmp_path, changes):
    path = tmp_path / "canary-audit.json"
    written(path, {**msgspec.to_builtins(record()), **changes})
    with pytest.raises(Malformed) as caught:
        read_canary_record(path)
    assert "True" not in str(caught.value)


@pytest.mark.parametrize("field", ["released_adapter", "every_round"])
def test_a_bound_that_does_not_follow_is_refused(tmp_path, field):
    path = tmp_path / "canary-audit.json"
    write_canary_record(path, replace(record(), **{field: 0.7}))
    with pytest.raises(Malformed, match="do not follow"):
        read_canary_record(path)


def test_a_coin_or_score_that_was_altered_shows(tmp_path):
    path = tmp_path / "canary-audit.json"
    coins = (not record().coins[0], *record().coins[1:])
    write_canary_record(path, replace(record(), coins=coins))
    with pytest.raises(Malformed, match="do not follow"):
        read_canary_record(path)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"[" * 100_000, b'{"version": 1}'])
def test_bytes_that_are_no_record_are_refused(tmp_path, data):
    path = tmp_path / "canary-audit.json"
    write_secret_file(path, data)
    with pytest.raises(Malformed):
        read_canary_record(path)


def test_an_infinite_number_and_a_file_without_end_are_refused(tmp_path):
    path = tmp_path / "canary-audit.json"
    text = json.dumps({**msgspec.to_builtins(record()), "claim": 1e308})
    write_secret_file(path, text.replace("1e+308", "1e999").encode())
    with pytest.raises(Malformed):
        read_canary_record(path)
    write_secret_file(path, b" " * (MAX_RECORD_BYTES + 1))
    with pytest.raises(TooLarge):
        read_canary_record(path)


def test_the_largest_audit_fits():
    longest = (-1.7976931348623157e-308,) * 10_000
    full = replace(record(), coins=(False,) * 10_000, released_scores=longest, round_scores=longest)
    assert len(msgspec.json.format(msgspec.json.encode(full), indent=0)) < MAX_RECORD_BYTES


def test_nothing_that_shows_a_record_shows_a_coin():
    assert "True" not in repr(record()) + str(record()) + str(record().__rich_repr__())
