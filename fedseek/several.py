"""Several processes of one site, one a GPU, that take the steps of a round together (`fedseek.dp.workers`).

    the lead: the site service           followers, started once a run: each holds the base model on a GPU of its own
      records, settings, adapter --pipe--> the same records and adapter
      the draw of a step ---------pipe---> a share of it: clipped record by record, added up
      sum over all <---- shared memory ---> sum over all
      + noise, once --- shared memory ----> the same noised gradient: all move alike

What the noise is added to is the sum of the same clipped gradients as in one process, so privacy is that of one process.

Records, draws and sums never leave this machine: they go through pipes and anonymous shared memory, not through a socket that
another account could connect to, nor a file. That is why this is not ``torch.distributed``. There, too, a process that dies
leaves the others waiting or takes the site service with it; here it is the end of a pipe, and an error.
"""

from __future__ import annotations

import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing.connection import Connection
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import multiprocessing, nn

from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.sampling import Draw
from fedseek.errors import FedseekError, GuardTripped, ProcessLost
from fedseek.progress import OnProgress, Progress
from fedseek.records import TokenisedRecords
from fedseek.round_job import Job
from fedseek.train import TrainingOutcome, train_round
from fedseek.train_settings import TrainingSettings

Build = Callable[[int], nn.Module]
"""Given a rank, from 1, the model of that follower on its device; a function that a fresh process can import."""

_ROW_BYTES: Final = 4 << 20  # of shared memory, a process: containers often have 64 MB of it in all
_FAILED: Final = b"!"
_T = TypeVar("_T")


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a follower gave up; for this machine's log."""

    code: str
    message: str
    hint: str
    guard: str = ""


@dataclass(frozen=True, slots=True)
class Together:
    """One process's end; `fedseek.dp.workers.Workers`.

    Attributes:
        rank: 0 for the lead.
        rows: shared memory, uint8, shape (number of processes, bytes).
        pipes: the lead's to each follower, in order of rank; a follower's to the lead.

    Raises:
        ProcessLost: from every method: another process is gone.
        FedseekError: from every method of the lead: a follower gave up for this reason.
    """

    rank: int
    rows: torch.Tensor = field(repr=False)
    pipes: tuple[Connection, ...] = field(repr=False)

    @property
    def leads(self) -> bool:
        """Whether this is the site service."""
        return self.rank == 0

    def agree(self, draw: Draw) -> Draw:
        """The lead's draw."""
        if self.leads:
            self.hand_out(
                (draw.step, draw.record_indices.astype("<i8").tobytes(), draw.unit_indices.astype("<i8").tobytes())
            )
            return draw
        step, records, units = self.receive(tuple[int, bytes, bytes])
        return Draw(step, _indices(records), _indices(units))

    def share(self, record_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Every so many-th of the draw, so that the parts differ by one record at most."""
        return record_indices[self.rank :: len(self.rows)]

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each by its sum over the processes. All add up in one order: the result is the same to the bit."""

        def sum_up(mine: torch.Tensor) -> torch.Tensor:
            self._row(self.rank, mine).copy_(mine)
            self.meet()
            total = self._row(0, mine).clone()
            for rank in range(1, len(self.rows)):
                total += self._row(rank, mine)
            self.meet()  # nobody writes again before all have read
            return total

        self._exchange(tensors, sum_up)

    def follow(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each by the lead's."""

        def take_over(mine: torch.Tensor) -> torch.Tensor:
            if self.leads:
                self._row(0, mine).copy_(mine)
            self.meet()
            theirs = self._row(0, mine).clone()
            self.meet()
            return theirs

        self._exchange(tensors, take_over)

    def meet(self) -> None:
        """Wait for all processes."""
        with self._nobody_lost():
            if self.leads:
                for pipe in self.pipes:
                    _raise_failure(pipe.recv_bytes())
                for pipe in self.pipes:
                    pipe.send_bytes(b"")
            else:
                self.pipes[0].send_bytes(b"")
                self.pipes[0].recv_bytes()

    def hand_out(self, value: object) -> None:
        """The lead's part of `receive`."""
        data = msgspec.msgpack.encode(value)
        with self._nobody_lost():
            for pipe in self.pipes:
                pipe.send_bytes(data)

    def receive(self, kind: type[_T]) -> _T:
        """What the lead hands out, at a follower."""
        with self._nobody_lost():
            return msgspec.msgpack.decode(self.pipes[0].recv_bytes(), type=kind)

    def _row(self, rank: int, like: torch.Tensor) -> torch.Tensor:
        return self.rows[rank, : like.nbytes].view(like.dtype)

    def _exchange(self, tensors: Sequence[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change all values of all tensors, a row of one type at a time."""
        with torch.no_grad():
            for dtype, alike in groupby(tensors, lambda tensor: tensor.dtype):
                group = list(alike)
                flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
                for part in torch.split(flat, self.rows.shape[1] // dtype.itemsize):
                    part.copy_(change(part))
                for tensor, values in zip(group, torch.split(flat, [tensor.numel() for tensor in group]), strict=True):
                    tensor.copy_(values.view(tensor.shape))

    @contextmanager
    def _nobody_lost(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            who = "a process that was training with the site service" if self.leads else "the site service"
            raise ProcessLost(
                f"{who} is gone ({type(error).__name__}); the round came to nothing",
                hint="the log of the daemon and of the kernel (out of memory?) say why; the round may be asked for again",
            ) from None


class Several:
    """The followers of a site, for one run; started at once, so that they load the base model while the lead loads its own.

    Args:
        build: makes the model of each.
        num_processes: of the site, the lead among them; 2 or more.
    """

    def __init__(self, build: Build, num_processes: int) -> None:
        if num_processes < 2:
            raise ValueError(f"{num_processes} processes, wanted 2 or more")
        self._build = build
        self.num_processes = num_processes
        self._together: Together | None = None
        self._open()

    def train_round(
        self,
        model: nn.Module,
        records: TokenisedRecords,
        *,
        settings: TrainingSettings,
        privacy: PrivacyParams | None,
        spend: PrivacySpend | None = None,
        steps_before: int = 0,
        expected_units: float | None = None,
        on_step: Callable[[int, int], None] | None = None,
        resume: Progress | None = None,
        on_progress: OnProgress | None = None,
    ) -> TrainingOutcome:
        """`fedseek.train.train_round`, by all processes of the site; to be called where that is called.

        When it raises, no follower is left; the next round starts them again.

        Raises:
            ProcessLost: a follower is gone.
            FedseekError: as ``train_round``, here or at a follower.
        """
        trainable = tuple(name for name, tensor in model.named_parameters() if tensor.requires_grad)
        job = Job.of(
            records,
            trainable,
            settings=settings,
            privacy=privacy,
            spend=spend,
            steps_before=steps_before,
            expected_units=expected_units,
            resume=resume,
        )
        with ExitStack() as undo:
            undo.callback(self.close)
            together = self._together or self._open()
            together.meet()  # all are there
            together.hand_out(job)
            together.follow(_held_by(model))
            outcome = train_round(
                model,
                records,
                settings=settings,
                privacy=privacy,
                spend=spend,
                steps_before=steps_before,
                expected_units=expected_units,
                on_step=on_step,
                workers=together,
                resume=resume,
                on_progress=on_progress,
            )
            together.meet()  # all are done, and their guards held
            undo.pop_all()
        return outcome

    def close(self) -> None:
        """End the followers, and wait for their end."""
        self._together = None
        self._end()

    def _open(self) -> Together:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        rows = torch.zeros((self.num_processes, _ROW_BYTES), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        threads = max(1, torch.get_num_threads() // self.num_processes)
        pipes, processes = [], []
        for rank in range(1, self.num_processes):
            near, far = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self._build, rows, far, threads),
                name=f"fedseek-follower-{rank}",
                daemon=True,
            )
            process.start()
            far.close()
            pipes.append(near)
            processes.append(process)
        self._end = weakref.finalize(self, _end, tuple(pipes), tuple(processes))
        self._together = Together(0, rows, tuple(pipes))
        return self._together


def _end(pipes: Sequence[Connection], processes: Sequence[Any]) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.kill()  # it holds nothing that would have to be kept
    for process in processes:
        process.join()
        process.close()


def _serve(rank: int, build: Build, rows: torch.Tensor, pipe: Connection, threads: int) -> None:
    """A follower's process. What is not an error of ours ends it with a traceback in the daemon's log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the lead ends its followers itself
    torch.set_num_threads(threads)
    _follow(Together(rank, rows, (pipe,)), build)


def _follow(together: Together, build: Build) -> None:
    """Take part in one round after another, until the lead is gone."""
    try:
        model = build(together.rank)
        while True:
            together.meet()
            _take_part(together, model)
    except ProcessLost:
        return
    except FedseekError as error:
        guard = error.guard if isinstance(error, GuardTripped) else ""
        failure = Failure(error.code, error.message, error.hint, guard)
        together.pipes[0].send_bytes(_FAILED + msgspec.msgpack.encode(failure))


def _take_part(together: Together, model: nn.Module) -> None:
    """A round at a follower."""
    job = together.receive(Job)
    for name, tensor in model.named_parameters():
        if tensor.requires_grad != (name in job.trainable):
            tensor.requires_grad_(name in job.trainable)
    together.follow(_held_by(model))
    train_round(model, job.records, workers=together, **job.options)
    together.meet()


def _held_by(model: nn.Module) -> list[torch.Tensor]:
    """What a run changes of a model: the adapter and the head, also what this round does not train."""
    names = getattr(model, "trained", frozenset[str]())
    return [tensor for name, tensor in sorted(model.named_parameters()) if name in names or tensor.requires_grad]


def _raise_failure(data: bytes) -> None:
    if not data:
        return
    failure = msgspec.msgpack.decode(data.removeprefix(_FAILED), type=Failure)
    if failure.guard:
        raise GuardTripped(failure.guard, f"in another process of this site: {failure.message}", hint=failure.hint)
    raise ProcessLost(f"another process of this site gave up ({failure.code}): {failure.message}", hint=failure.hint)


def _indices(data: bytes) -> NDArray[np.int64]:
    return np.frombuffer(data, "<i8").astype(np.int64)
