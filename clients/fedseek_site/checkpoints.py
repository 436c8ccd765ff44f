"""How far the training of this round has come, in one sealed file: a site that is killed goes on within the round.

    every minute, and after the last step:  snapshot -> differences -> zlib -> sealed under the storage key -> the file
    asked for the round again:              the file, if it is of this very beginning -> the steps that are left

The ledger has paid for the round before its first step, and pays for it once (`fedseek_site.ledger`): the steps that are in
the file are not taken again, those that were lost are taken once more, and nothing of either left the site. What of the
randomness is kept, and why, is in `fedseek.progress`.

Only what is trained in the round is in it, as its difference from what the round began with, which the journal has. The file
is replaced whole, is at most 12 bytes a trained value and a little, and goes when the round's answer is in the journal. A
file that does not open or fit is left alone, told in the site's report, and the round is trained from its beginning.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedseek.dp.randomness import PLACE_BYTES
from fedseek.errors import CustodyError, FedseekError, Malformed, TooLarge, WrongRound
from fedseek.identity.secret_files import read_secret_file, write_secret_file
from fedseek.identity.vault import AT_REST_OVERHEAD_BYTES, StorageKey, open_at_rest, seal_at_rest
from fedseek.progress import Float32, OnProgress, Progress
from fedseek.records import TokenisedRecords

CHECKPOINT_FILE: Final = "training.checkpoint"
SECONDS_BETWEEN: Final = 60.0

_PURPOSE: Final = "site-checkpoint"
_MOMENTS: Final = 2  # Adam's, each as long as what is trained
_MOST_OF_THE_TIME: Final = 0.05  # that writing may take
_BYTES_A_TENSOR, _BYTES_BESIDE = 1024, 65_536  # names; counts, the place of the draws, names of guards

Moment = Literal["step", "exp_avg", "exp_avg_sq"]


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a round of training begins from. A checkpoint of any other beginning is of no use.

    Attributes:
        run: 1 to 128 characters.
        round: from 1.
        num_steps: of the round.
        digest: SHA-256 of the plan, the records and the weights, 32 bytes.
        first: values of what is trained in the round, by name.
    """

    run: str
    round: int
    num_steps: int
    digest: bytes
    first: Mapping[str, Float32] = field(repr=False)

    @classmethod
    def of(
        cls,
        run: str,
        number: int,
        num_steps: int,
        *,
        plan: str,
        records: TokenisedRecords,
        first: Mapping[str, Float32],
    ) -> Beginning:
        """Of these records and weights under the plan of digest ``plan``."""
        digest = hashlib.sha256(f"{plan}\0{number}\0{len(records)}".encode())
        lengths = np.array([len(row) for row in records.input_ids], np.int64)
        for array in (records.units, records.labels, lengths, *records.input_ids, *(records.counted or ())):
            digest.update(np.ascontiguousarray(array).data)
        for name, values in sorted(first.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(values).data)
        return cls(run, number, num_steps, digest.digest(), first)

    @property
    def max_bytes(self) -> int:
        """Of a checkpoint, before it is compressed."""
        num_values = sum(values.size for values in self.first.values())
        return (1 + _MOMENTS) * 4 * num_values + _BYTES_A_TENSOR * len(self.first) + _BYTES_BESIDE

    @property
    def max_file_bytes(self) -> int:
        """Of the file: zlib makes what it cannot compress longer by less than a thousandth."""
        return self.max_bytes + self.max_bytes // 1000 + AT_REST_OVERHEAD_BYTES


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`fedseek.progress.Progress` as it is sealed; ``repr`` is redacted.

    Attributes:
        digest: of the round's beginning.
        trained: by name, what the values differ in from those the round began with; see `_difference`.
        optimiser: by name, the optimiser's own values; as differences from nothing.
    """

    version: Literal[1] = 1
    run: str
    round: int
    digest: bytes
    step: Annotated[int, msgspec.Meta(ge=0)]
    num_drawn: Annotated[int, msgspec.Meta(ge=0)]
    loss_sum: float
    guards_passed: tuple[str, ...]
    draws: Annotated[bytes, msgspec.Meta(min_length=PLACE_BYTES, max_length=PLACE_BYTES)]
    trained: dict[str, bytes]
    optimiser: dict[str, dict[Moment, bytes]]

    def __repr__(self) -> str:
        return f"Checkpoint(<round {self.round}, redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class Checkpoints:
    """The checkpoint of this site; there is one round in training at a time.

    Args:
        path: of the file; its folder is made by the journal.
        key: the site's storage key.
        observe: told what was taken up, and what could not be used or kept.
        seconds: between two checkpoints; more where writing one takes long. 0: one after each step.
    """

    def __init__(
        self,
        path: Path,
        key: StorageKey,
        *,
        observe: Callable[[dict[str, Any]], None],
        seconds: float = SECONDS_BETWEEN,
    ) -> None:
        self._path = path
        self._key = key
        self._observe = observe
        self._seconds = seconds

    def find(self, beginning: Beginning) -> Progress | None:
        """How far a process that was killed had come from this beginning; None where there is nothing of use."""
        try:
            if not self._path.exists():
                return None
            progress = _read(self._path, self._key, beginning)
        except FedseekError as error:
            self._observe({"event": "checkpoint-ignored", "round": beginning.round, "text": str(error)})
            return None
        self._observe({"event": "resumed", "round": beginning.round, "step": progress.step, "of": beginning.num_steps})
        return progress

    def keeper(self, beginning: Beginning) -> OnProgress:
        """To be called after each step; keeps a snapshot when it is time, and after the last step.

        A disk that takes no checkpoint does not end the training.
        """
        written, took = time.monotonic(), 0.0

        def keep(step: int, of: int, snapshot: Callable[[], Progress]) -> None:
            nonlocal written, took
            began = time.monotonic()
            pause = max(self._seconds, took / _MOST_OF_THE_TIME) if self._seconds else 0.0
            if step < of and began - written < pause:
                return
            try:
                write_secret_file(self._path, _sealed(snapshot(), self._key, beginning))
            except (CustodyError, TooLarge) as error:
                self._observe({"event": "checkpoint-failed", "round": beginning.round, "text": str(error)})
            written = time.monotonic()
            took = written - began

        return keep

    def remove(self) -> None:
        """The round is answered, or its training came to nothing: nobody is to go on from it."""
        self._path.unlink(missing_ok=True)


def _sealed(progress: Progress, key: StorageKey, beginning: Beginning) -> bytes:
    stored = Checkpoint(
        run=beginning.run,
        round=beginning.round,
        digest=beginning.digest,
        step=progress.step,
        num_drawn=progress.num_drawn,
        loss_sum=progress.loss_sum,
        guards_passed=progress.guards_passed,
        draws=progress.draws,
        trained={name: _difference(values, beginning.first[name]) for name, values in progress.trained.items()},
        optimiser={
            name: {kind: _difference(values, np.zeros_like(values)) for kind, values in kept.items()}  # type: ignore[misc]
            for name, kept in progress.optimiser.items()
        },
    )
    # the lowest level: what there is to gain are the equal high bytes, which it finds too
    return seal_at_rest(key, zlib.compress(msgspec.msgpack.encode(stored), 1), purpose=_PURPOSE)


def _read(path: Path, key: StorageKey, beginning: Beginning) -> Progress:
    """Read the file.

    Raises:
        CustodyError, WrongKey, TooLarge, Malformed, WrongRound: it is not a checkpoint from this beginning.
    """
    sealed = read_secret_file(path, limit=beginning.max_file_bytes)
    stored = _decoded(open_at_rest(key, sealed, purpose=_PURPOSE), limit=beginning.max_bytes)
    if (stored.run, stored.round, stored.digest) != (beginning.run, beginning.round, beginning.digest):
        raise WrongRound(
            f"{path}: a checkpoint of round {stored.round} of run {stored.run!r}, wanted one of round {beginning.round} of "
            f"run {beginning.run!r}, from its plan, records and weights"
        )
    first = beginning.first
    if stored.trained.keys() != first.keys() or not stored.optimiser.keys() <= first.keys():
        raise Malformed(f"{path}: a checkpoint of other tensors than are trained in round {beginning.round}")
    if stored.step > beginning.num_steps:
        raise Malformed(f"{path}: {stored.step} steps were taken, the round has {beginning.num_steps}")
    return Progress(
        step=stored.step,
        trained={name: _changed(first[name], difference) for name, difference in stored.trained.items()},
        optimiser={
            name: {
                kind: _changed(np.zeros((), np.float32) if kind == "step" else np.zeros_like(first[name]), values)
                for kind, values in kept.items()
            }
            for name, kept in stored.optimiser.items()
        },
        num_drawn=stored.num_drawn,
        loss_sum=stored.loss_sum,
        guards_passed=stored.guards_passed,
        draws=stored.draws,
    )


def _decoded(compressed: bytes, *, limit: int) -> Checkpoint:
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(compressed, limit)
        if unpacker.eof:
            return msgspec.msgpack.decode(data, type=Checkpoint)
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError):  # msgspec lets the last one through
        pass
    raise Malformed(f"{len(compressed)} bytes are not a checkpoint of version 1 of at most {limit} bytes")


def _difference(values: Float32, first: Float32) -> bytes:
    """Which bits differ: exact, as a difference of floats is not. Byte by byte of them all: sign and exponent mostly agree."""
    bits = (_bits(values) ^ _bits(first)).astype("<u4")
    return bits.view(np.uint8).reshape(-1, 4).T.tobytes()


def _changed(first: Float32, difference: bytes) -> Float32:
    """The values that differ so from ``first``.

    Raises:
        Malformed: of another length.
    """
    if len(difference) != 4 * first.size:
        raise Malformed(f"a tensor of {first.size} values has {len(difference)} bytes in the checkpoint")
    planes = np.frombuffer(difference, np.uint8).reshape(4, -1)
    bits = np.ascontiguousarray(planes.T).view("<u4").reshape(-1).astype(np.uint32) ^ _bits(first)
    return bits.view(np.float32).reshape(first.shape)


def _bits(values: Float32) -> NDArray[np.uint32]:
    """Of each value, shape (num_values,)."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint32)
