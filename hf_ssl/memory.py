"""What methods remember of earlier images: a first-in-first-out queue of features, and a bank with a row per image.

Both change once per optimiser step, in ``advance``: all micro-batches of a step see the same memory. Rows that wait
for it are state as well, so a checkpoint taken between two micro-batches loses nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from . import distributed


class _Waiting(nn.Module):
    """Up to ``capacity`` rows (and their numbers) since the last ``take``. The count is kept on the host: no sync."""

    def __init__(self, capacity: int, dim: int):
        super().__init__()
        self.rows = nn.Buffer(torch.zeros(capacity, dim))
        self.index = nn.Buffer(torch.zeros(capacity, dtype=torch.int64))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self._count: int | None = None  # None: to be read from the buffer

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._count = None

    def known_count(self) -> int:
        if self._count is None:
            self._count = int(self.count)
        return self._count

    def put(self, rows: Tensor, index: Tensor | None = None) -> None:
        """Rows beyond the capacity are an error: whoever may drop some does so before."""
        start = self.known_count()
        self._count = start + len(rows)
        if self._count > len(self.rows):
            raise ValueError(
                f"{self._count} images in one optimiser step, and the memory holds {len(self.rows)} at a time: "
                "use smaller batches or fewer accumulation steps"
            )
        self.rows[start : self._count] = rows.to(self.rows.dtype)
        if index is not None:
            self.index[start : self._count] = index
        self.count.add_(len(rows))

    def take(self) -> tuple[Tensor, Tensor]:
        count, self._count = self.known_count(), 0
        self.count.zero_()
        return self.rows[:count], self.index[:count]


class FeatureQueue(nn.Module):
    """The last ``size`` rows pushed, (size, dim) in ``rows``; random unit vectors at the start.

    ``filled``: how many rows are no longer those of the start, a 0-d tensor.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.rows = nn.Buffer(F.normalize(torch.randn(size, dim), dim=1))
        self.pointer = nn.Buffer(torch.zeros((), dtype=torch.int64))  # the oldest row, the next to go
        self.filled = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.waiting = _Waiting(size, dim)

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Remember this micro-batch's rows (B, dim) of every rank, in rank order, for ``advance``."""
        rows = distributed.gather_with_grad(rows.detach())
        room = len(self.rows) - self.waiting.known_count()
        if len(rows) > room:  # the step alone fills the queue: its oldest rows would be gone at once
            kept = torch.cat([self.waiting.take()[0], rows.to(self.rows.dtype)])[-len(self.rows) :]
            self.waiting.put(kept)
        else:
            self.waiting.put(rows)

    @torch.no_grad()
    def advance(self) -> None:
        """The rows pushed since the last call replace the oldest ones."""
        rows, _ = self.waiting.take()
        places = (self.pointer + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows.index_copy_(0, places, rows)
        self.pointer.add_(len(rows)).remainder_(len(self.rows))
        self.filled.add_(len(rows)).clamp_(max=len(self.rows))

    def reset(self) -> None:
        """Random unit vectors, nothing waiting; values from a checkpoint stay."""
        init.copy_(self.rows, F.normalize(torch.randn_like(self.rows), dim=1))
        for buffer in (self.pointer, self.filled, *self.waiting.buffers()):
            init.zeros_(buffer)


class ExampleBank(nn.Module):
    """One row per training image: (examples, dim) in ``rows``, by row number.

    momentum: v ← normalise(momentum · v + (1 − momentum) · new); 0 replaces. ``scale``: the rows start uniform in
    ±scale (instance discrimination's, not normalised); None: random unit vectors.
    """

    def __init__(self, examples: int, dim: int, momentum: float = 0.5, scale: float | None = None):
        super().__init__()
        self.momentum, self.scale = momentum, scale
        self.rows = nn.Buffer(self._start(torch.empty(examples, dim)))
        self.waiting = _Waiting(min(examples, 16384), dim)

    def _start(self, like: Tensor) -> Tensor:
        if self.scale is None:
            return F.normalize(torch.randn_like(like), dim=1)
        return torch.empty_like(like).uniform_(-self.scale, self.scale)

    @torch.no_grad()
    def push(self, index: Tensor, rows: Tensor) -> None:
        """Remember row numbers (B,) and features (B, dim) of every rank for ``advance``."""
        self.waiting.put(distributed.gather_with_grad(rows.detach()), distributed.gather_with_grad(index))

    @torch.no_grad()
    def advance(self) -> None:
        """Update the rows pushed since the last call; of a row pushed twice, which one counts is not defined."""
        rows, index = self.waiting.take()
        if self.momentum:
            rows = F.normalize(torch.lerp(rows, self.rows[index], self.momentum), dim=1)
        self.rows.index_copy_(0, index, rows)

    def reset(self) -> None:
        """As at the start, nothing waiting; values from a checkpoint stay."""
        init.copy_(self.rows, self._start(self.rows))
        for buffer in self.waiting.buffers():
            init.zeros_(buffer)
