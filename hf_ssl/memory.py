"""What methods remember of earlier images: a first-in-first-out queue, a bank with a row per image, a centre.

All change once per optimiser step, in ``advance``: all micro-batches of a step see the same memory. Rows that wait
for it are state as well, so a checkpoint taken between two micro-batches loses nothing.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from . import distributed


def in_own_precision(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``change(tensor)``, what ``Module.to`` and its like do, without a change of dtype."""
    changed = change(tensor)
    return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)


class State(nn.Module):
    """What training changes without a gradient, float32 whatever precision the model is loaded in or cast to: rows are
    compared, and averages move by small steps, in float32. A subclass makes its buffers with that dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "State":
        return super()._apply(lambda tensor: in_own_precision(fn, tensor), recurse)

    def reset(self) -> None:
        """As at the start; values from a checkpoint stay."""
        raise NotImplementedError


class HostCounter(State):
    """A module whose int64 buffer, the one that ``counter`` names, is known on the host too: no device sync."""

    counter: ClassVar[str]
    _known: list[int] | None = None  # None: to be read from the buffer, which a load may fill

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._known = None

    def known(self) -> list[int]:
        """What the counter holds, a list of one number for a 0-d buffer."""
        if self._known is None:
            self._known = getattr(self, self.counter).view(-1).tolist()
        return self._known

    def count_on(self, *values: int) -> None:
        """The counter's new values."""
        self._known = [*values]
        for place, value in zip(getattr(self, self.counter).view(-1), values, strict=True):
            place.fill_(value)


class _Waiting(HostCounter):
    """Up to ``capacity`` rows (and their numbers) since the last ``take``."""

    counter = "count"

    def __init__(self, capacity: int, dim: int):
        super().__init__()
        self.rows = nn.Buffer(torch.zeros(capacity, dim, dtype=torch.float32))
        self.index = nn.Buffer(torch.zeros(capacity, dtype=torch.int64))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        for buffer in self.buffers():
            init.zeros_(buffer)

    def put(self, rows: Tensor, index: Tensor | None = None) -> None:
        """Rows beyond the capacity are an error: whoever may drop some does so before."""
        start = self.known()[0]
        end = start + len(rows)
        if end > len(self.rows):
            raise ValueError(
                f"{end} images in one optimiser step, and the memory holds {len(self.rows)} at a time: "
                "use smaller batches or fewer accumulation steps"
            )
        self.rows[start:end] = rows.to(self.rows.dtype)
        if index is not None:
            self.index[start:end] = index
        self.count_on(end)

    def take(self) -> tuple[Tensor, Tensor]:
        """All that waits, in the order it came. Nothing is left behind: state must not depend on that order."""
        count = self.known()[0]
        rows, index = self.rows[:count].clone(), self.index[:count].clone()
        for buffer in (self.rows[:count], self.index[:count]):
            buffer.zero_()
        self.count_on(0)
        return rows, index


class FeatureQueue(State):
    """The last ``size`` rows pushed, (size, dim) in ``rows``; random unit vectors at the start.

    ``filled``: how many rows are no longer those of the start, a 0-d tensor.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.rows = nn.Buffer(F.normalize(torch.randn(size, dim, dtype=torch.float32), dim=1))
        self.pointer = nn.Buffer(torch.zeros((), dtype=torch.int64))  # the oldest row, the next to go
        self.filled = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.waiting = _Waiting(size, dim)

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Remember this micro-batch's rows (B, dim) of every rank, in rank order, for ``advance``."""
        rows = distributed.gather_with_grad(rows.detach())
        room = len(self.rows) - self.waiting.known()[0]
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


class ExampleBank(State):
    """One row per training image: (examples, dim) in ``rows``, by row number.

    momentum: v ← normalise(momentum · v + (1 − momentum) · new); 0 replaces. ``scale``: the rows start uniform in
    ±scale (instance discrimination's, not normalised); None: random unit vectors. Every later row is a unit vector.
    """

    def __init__(self, examples: int, dim: int, momentum: float = 0.5, scale: float | None = None):
        super().__init__()
        self.momentum, self.scale = momentum, scale
        self.rows = nn.Buffer(self._start(torch.empty(examples, dim, dtype=torch.float32)))
        self.waiting = _Waiting(min(examples, 16384), dim)

    def _start(self, like: Tensor) -> Tensor:
        if self.scale is None:
            return F.normalize(torch.randn_like(like), dim=1)
        return torch.empty_like(like).uniform_(-self.scale, self.scale)

    def at(self, index: Tensor) -> Tensor:
        """(B,) row numbers -> (B, dim); ValueError where there is no such row (on a GPU only the trainer looks)."""
        try:
            return self.rows.index_select(0, index)
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"a row number lies outside the bank of {len(self.rows)} training images: num_examples must be the "
                f"number of rows of the data ({str(error).splitlines()[0]})"
            ) from error

    @torch.no_grad()
    def push(self, index: Tensor, rows: Tensor) -> None:
        """Remember row numbers (B,) and features (B, dim) of every rank for ``advance``."""
        self.waiting.put(distributed.gather_with_grad(rows.detach()), distributed.gather_with_grad(index))

    @torch.no_grad()
    def advance(self) -> Tensor:
        """Update the rows pushed since the last call and return their numbers; a row pushed twice learns the mean."""
        rows, index = self.waiting.take()
        rows = F.normalize(torch.lerp(_mean_of_equals(rows, index), self.rows[index], self.momentum), dim=1)
        self.rows.index_copy_(0, index, rows)
        return index

    def reset(self) -> None:
        init.copy_(self.rows, self._start(self.rows))
        self.waiting.reset()


def _mean_of_equals(rows: Tensor, index: Tensor) -> Tensor:
    """(M, D) rows, those of equal ``index`` (M,) replaced by their mean: writing them then has no order."""
    if len(rows) < 2:
        return rows
    index, order = index.sort(stable=True)
    group = F.pad(index[1:] != index[:-1], (1, 0)).cumsum(0)  # of each sorted row, from 0 on
    sums = torch.zeros_like(rows).index_add_(0, group, rows[order])
    sizes = rows.new_zeros(len(rows), 1).index_add_(0, group, rows.new_ones(len(rows), 1))
    return torch.empty_like(rows).index_copy_(0, order, (sums / sizes)[group])


class Center(State):
    """EMA of the mean row that a teacher gives, over micro-batches and ranks (DINO, eq. 4): (1, dim) in ``value``."""

    def __init__(self, dim: int):
        super().__init__()
        self.value = nn.Buffer(torch.zeros(1, dim, dtype=torch.float32))
        # of the micro-batches since the last optimiser step
        self.sum = nn.Buffer(torch.zeros(1, dim, dtype=torch.float32))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.float32))

    @torch.no_grad()
    def observe(self, rows: Tensor) -> None:
        """Remember a micro-batch's rows (N, dim) for ``advance``; ranks may hold unequally many."""
        self.sum.add_(rows.sum(0, keepdim=True))
        self.count.add_(len(rows))

    @torch.no_grad()
    def advance(self, momentum: float) -> None:
        """value ← momentum · value + (1 − momentum) · mean of the rows observed since the last call, on all ranks."""
        mean = distributed.all_mean(self.sum / self.count.clamp(min=1), self.count)
        self.value.lerp_(mean, 1 - momentum)
        self.sum.zero_()
        self.count.zero_()

    def reset(self) -> None:
        for buffer in self.buffers():
            init.zeros_(buffer)
