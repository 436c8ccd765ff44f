"""A round of training as one process of a site tells another of it: as bytes, through a pipe, never through a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.randomness import place_of, secret_generator
from fedseek.progress import Progress
from fedseek.records import TokenisedRecords
from fedseek.train_settings import TrainingSettings


class _Withheld(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in it are records, and what was made of them: it is never printed."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<withheld>)"


class Rows(_Withheld, frozen=True):
    """Arrays of one type and one dimension, of any lengths."""

    values: bytes
    lengths: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, rows: Sequence[NDArray[Any]]) -> Rows:
        """Of at least one array."""
        return cls(np.concatenate(rows).tobytes(), tuple(len(row) for row in rows), rows[0].dtype.str)

    def split(self) -> list[NDArray[Any]]:
        """The arrays again."""
        values = np.frombuffer(self.values, self.dtype).copy()  # torch wants arrays it may write to
        return np.split(values, np.cumsum(self.lengths)[:-1])


class Values(_Withheld, frozen=True):
    """A float32 array of any shape."""

    values: bytes
    shape: tuple[int, ...]

    @classmethod
    def of_each(cls, arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, Values]:
        """By name."""
        return {name: cls(array.astype("<f4").tobytes(), array.shape) for name, array in arrays.items()}

    def array(self) -> NDArray[np.float32]:
        """The array again."""
        return np.frombuffer(self.values, "<f4").astype(np.float32).reshape(self.shape)


class Begun(_Withheld, frozen=True):
    """`fedseek.progress.Progress` without the place in the stream of draws: that stays with who draws."""

    step: int
    trained: dict[str, Values]
    optimiser: dict[str, dict[str, Values]]
    num_drawn: int
    loss_sum: float
    guards_passed: tuple[str, ...]

    @classmethod
    def of(cls, progress: Progress) -> Begun:
        """To tell another process."""
        return cls(
            step=progress.step,
            trained=Values.of_each(progress.trained),
            optimiser={name: Values.of_each(kept) for name, kept in progress.optimiser.items()},
            num_drawn=progress.num_drawn,
            loss_sum=progress.loss_sum,
            guards_passed=progress.guards_passed,
        )

    def progress(self) -> Progress:
        """For a process whose own draws are thrown away: it draws from a stream of its own."""
        return Progress(
            step=self.step,
            trained={name: value.array() for name, value in self.trained.items()},
            optimiser={
                name: {kind: value.array() for kind, value in kept.items()} for name, kept in self.optimiser.items()
            },
            num_drawn=self.num_drawn,
            loss_sum=self.loss_sum,
            guards_passed=self.guards_passed,
            draws=place_of(secret_generator()),
        )


class Job(_Withheld, frozen=True):
    """What `fedseek.train.train_round` is called with, and the names of what is trained; the weights come after it."""

    input_ids: Rows
    labels: Rows
    units: Rows
    counted: Rows | None
    settings: TrainingSettings
    privacy: PrivacyParams | None
    steps_spent: int | None
    steps_before: int
    expected_units: float | None
    begun: Begun | None
    trainable: tuple[str, ...]

    @classmethod
    def of(
        cls,
        records: TokenisedRecords,
        trainable: tuple[str, ...],
        *,
        settings: TrainingSettings,
        privacy: PrivacyParams | None,
        spend: PrivacySpend | None,
        steps_before: int,
        expected_units: float | None,
        resume: Progress | None,
    ) -> Job:
        """Of at least one record."""
        return cls(
            input_ids=Rows.of(records.input_ids),
            labels=Rows.of([records.labels]),
            units=Rows.of([records.units]),
            counted=None if records.counted is None else Rows.of(records.counted),
            settings=settings,
            privacy=privacy,
            steps_spent=None if spend is None else spend.num_steps,
            steps_before=steps_before,
            expected_units=expected_units,
            begun=None if resume is None else Begun.of(resume),
            trainable=trainable,
        )

    @property
    def records(self) -> TokenisedRecords:
        """The same, in the same order, in every process."""
        counted = None if self.counted is None else self.counted.split()
        (labels,), (units,) = self.labels.split(), self.units.split()
        return TokenisedRecords(self.input_ids.split(), labels, units, counted)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``train_round`` after the records, but the workers."""
        spent, privacy = self.steps_spent, self.privacy
        return {
            "settings": self.settings,
            "privacy": privacy,
            "spend": None if spent is None or privacy is None else PrivacySpend(privacy, spent),
            "steps_before": self.steps_before,
            "expected_units": self.expected_units,
            "resume": None if self.begun is None else self.begun.progress(),
        }
