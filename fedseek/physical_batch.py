"""How many records are on the device at once: as many as its memory takes, and fewer once it turns out to be short.

Cutting a step into micro-batches changes nothing of what it adds up (docs/adr/0024-physical-batches.md), so the size is
a site's own affair, found on its own machine.

    one record forth and back  ->  bytes a record needs  ->  records that fit in a share of what is free
    out of memory in a micro-batch  ->  forget what it left  ->  half as many records, the same ones again
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from fedseek.batches import Indices
from fedseek.errors import OutOfMemory

FRACTION: float = 0.5
"""Of the free memory that is planned with. The rest is for what is not counted: the workspace of kernels, what one layer
holds for a moment, fragmentation, and other processes of the machine."""

_LOGIT_COPIES = 3  # as the model gives them, in float32, and their gradient; what is kept for backward is counted there
_FLOAT_BYTES = 4
_CGROUP = Path("/sys/fs/cgroup")
_SHORT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "not enough memory")


@dataclass(slots=True)
class PhysicalBatch:
    """The number of records on the device at once; only ever shrinks."""

    size: int

    def halve(self, tried: int) -> None:
        """Go on with half of the ``tried`` records that did not fit.

        Raises:
            OutOfMemory: it was one record.
        """
        if tried <= 1:
            raise OutOfMemory(
                "the memory of the device is too small for training on one record at a time",
                hint="free memory on the device, set gradient checkpointing or a smaller dtype in [compute] of site.toml, "
                "or agree on a plan with a smaller max_tokens, rank or model",
            )
        self.size = min(self.size, tried // 2)


def fitting(free: int, per_record: int, *, expected: float) -> int:
    """Records that fit: at least 1, at most the expected batch, which most steps would not fill up beyond.

    Args:
        free: bytes.
        per_record: bytes that the longest record needs.
        expected: mean number of records in a step.
    """
    return max(1, min(math.floor(FRACTION * free / max(per_record, 1)), math.ceil(expected)))


def bytes_per_record(
    model: nn.Module, losses_of: Callable[[Indices], torch.Tensor], longest: Indices, *, num_logits: int, private: bool
) -> int:
    """Bytes that training on one record takes besides the model itself.

    What autograd keeps between forward and backward dominates and grows with the record; it is counted as it is kept,
    each storage once, and without the model's own tensors. Then come a gradient for each record (private training), and
    copies of the logits, which for a large vocabulary weigh as much as many layers.

    Args:
        model: in training mode.
        losses_of: losses of some records.
        longest: the one record to try.
        num_logits: values in its logits.
        private: whether each record has gradients of its own.
    """
    kept = _CountedBytes(model)
    device = next(model.parameters()).device
    with _measured(device, kept), torch.autograd.graph.saved_tensors_hooks(kept.pack, _unpack):
        losses_of(longest).sum().backward()  # type: ignore[no-untyped-call]  # back too: checkpointed layers are kept then
    gradients = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad) if private else 0
    return kept.most + _FLOAT_BYTES * (gradients + _LOGIT_COPIES * num_logits)


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may still take on the device: of the GPU, or of the machine and this process's control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch keeps freed blocks for itself
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min([int(psutil.virtual_memory().available), *_left_in_control_group()])


def _left_in_control_group() -> Iterator[int]:
    """Bytes below the limit of a container or a systemd unit (cgroup v2): beyond it the process is killed.

    Pages of files are not counted as used: the system drops them when memory is short.
    """
    try:
        path = Path("/proc/self/cgroup").read_text("utf-8").partition("0::")[2].split("\n")[0].lstrip("/")
        limit = (_CGROUP / path / "memory.max").read_text("ascii").strip()
        used = dict(line.split() for line in (_CGROUP / path / "memory.stat").read_text("ascii").splitlines())
        if limit != "max":
            yield max(int(limit) - int(used["anon"]), 0)
    except (OSError, ValueError, KeyError):  # no such thing here, or of another form
        return


class _CountedBytes:
    """Bytes of tensors that autograd keeps for the way back, now and at most; not those of the model itself."""

    def __init__(self, model: nn.Module) -> None:
        own = (*model.parameters(), *model.buffers())
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._times: Counter[int] = Counter()
        self._now = 0
        self.most = 0

    def pack(self, tensor: torch.Tensor) -> _Kept:
        """Note a tensor that is kept, until autograd lets go of it."""
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._own:
            self._now += size if not self._times[place] else 0
            self._times[place] += 1
            self.most = max(self.most, self._now)
            weakref.finalize(kept, self._let_go, place, size)
        return kept

    def _let_go(self, place: int, size: int) -> None:
        self._times[place] -= 1
        self._now -= size if not self._times[place] else 0


class _Kept:
    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _unpack(kept: _Kept) -> torch.Tensor:
    return kept.tensor


@contextmanager
def _measured(device: torch.device, counted: _CountedBytes) -> Iterator[None]:
    """On a GPU the allocator knows the most that was taken, kernels and layers done twice among it."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield
    counted.most = max(counted.most, torch.cuda.max_memory_allocated(device) - before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: that of CUDA says so by class; those of the CPU, of MPS and of cuBLAS by their words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORT_OF_MEMORY)


def in_pieces(
    record_indices: Indices, batch: PhysicalBatch, *, take: Callable[[Indices], None], forget: Callable[[], None]
) -> None:
    """Take all records of a step, piece by piece, each once; a piece that does not fit again in halves.

    Args:
        record_indices: shape (n,).
        batch: how many at once; smaller after this, if they did not fit.
        take: trains on some records: all of it happens, or it raises and none does.
        forget: frees what a failed ``take`` left behind.

    Raises:
        OutOfMemory: one record alone does not fit.
    """
    begin = 0
    while begin < len(record_indices):
        piece = record_indices[begin : begin + batch.size]
        if fits(piece, take):
            begin += len(piece)
        else:
            forget()
            batch.halve(len(piece))


def fits(piece: Indices, take: Callable[[Indices], None]) -> bool:
    """Take some records; false if the memory did not do. By then the error is gone, and with it the tensors it kept."""
    try:
        take(piece)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
