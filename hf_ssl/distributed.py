"""What crosses ranks: gather with gradient, means, shared random numbers, BatchNorm over the global batch.

Every function is the identity in a single process, so methods call them unconditionally.
"""

import atexit
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

_alone = False


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() and not _alone else 0


def leave() -> None:
    """Leaves the group of processes, if there is one; afterwards no thread of gloo holds a tensor.

    A gloo thread that drops its last tensor while the interpreter shuts down aborts the process ("terminate called
    without an active exception", exit code -6), after all work is done.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a trainer in a reference cycle keeps the group, and the group keeps its threads
        dist.destroy_process_group()
        time.sleep(0.05)  # where something else keeps the group: its threads get the interpreter lock


@cache
def leave_at_exit() -> None:
    """Calls ``leave`` when the interpreter ends, where the group's backend is gloo."""
    atexit.register(lambda: leave() if dist.is_initialized() and dist.get_backend() == "gloo" else None)


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process computes as if there were no others, who need not take part."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def from_first(call: Callable[[], T]) -> T:
    """``call()``, made by the first process alone: all return its result. Its error is raised there, and on the others
    as a ValueError of its words. Every process must call."""
    if world_size() == 1:
        return call()
    told: list[Any] = [None, None]
    failed: Exception | None = None
    if rank() == 0:
        try:
            with alone():
                told[0] = call()
        except Exception as error:  # the others wait for an answer
            failed, told[1] = error, str(error)
    dist.broadcast_object_list(told)
    if failed is not None:
        raise failed
    if told[1] is not None:
        raise ValueError(told[1])
    decided: T = told[0]
    return decided


def all_arrive(place: str, seconds: float = 20.0) -> bool:
    """Whether all processes call this with the same ``place`` in time, which works once. It is not a collective: those
    that do not call it may be in the middle of one."""
    if world_size() == 1:
        return True
    store = dist.distributed_c10d._get_default_store()
    store.set(f"hf_ssl/{place}/{rank()}", "arrived")
    try:
        store.wait([f"hf_ssl/{place}/{other}" for other in range(world_size())], timedelta(seconds=seconds))
    except RuntimeError:
        return False
    return True


class _AllGather(torch.autograd.Function):
    """(…) on each rank -> (W, …) on all; backward sums what every rank wants of this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[rank()]


def gather_with_grad(x: Tensor) -> Tensor:
    """(B, ...) on each rank -> (W·B, ...) on all, in rank order. The backward pass sums the gradients of all ranks.

    A loss that averages its local rows and lets DDP average the ranks then has the single-process gradient.
    """
    if world_size() == 1:
        return x
    return _AllGather.apply(x).flatten(0, 1)


def own_rows(rows: Tensor) -> Tensor:
    """(B,) int64: where this rank's ``rows`` (B, ...) stand among the gathered ones."""
    return torch.arange(len(rows), device=rows.device) + rank() * len(rows)


class _AllSum(torch.autograd.Function):
    """Sum over ranks; backward sums what every rank wants of it, as ``_AllGather`` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def sum_with_grad(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks. The backward pass sums over ranks too: a loss of the sum that every rank computes alike
    then has, averaged by DDP, the single-process gradient."""
    return x if world_size() == 1 else _AllSum.apply(x)


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn–Knopp: (B, K) scores of the local rows -> (B, K) assignments, over the rows of all ranks together.

    exp(scores / epsilon) is scaled, ``iterations`` times, to equal sums over the K columns, then to rows of sum 1
    (SwAV, section 3.1); with none, to a mean row sum of 1. Every column's and row's largest score is taken out first:
    nothing overflows and no row vanishes. Ranks may hold unequally many rows; a row of −∞ counts for nothing.
    """
    scores = scores.float() / epsilon
    lowest = torch.finfo(scores.dtype).min
    largest = torch.cat([scores, scores.new_full((1, scores.shape[1]), lowest)]).amax(0)  # a rank may have no row
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    if not iterations:
        assignment = (scores - largest.max()).exp()
        total = torch.stack([assignment.sum(), scores.isfinite().any(1).float().sum()])
        if world_size() > 1:
            dist.all_reduce(total)
        return assignment * (total[1] / total[0])
    scores = scores - largest  # a column's factor is lost in its first scaling, a row's only in the one after it:
    assignment = (scores - scores.amax(1, keepdim=True).clamp(min=lowest)).exp()
    columns = scores.exp().sum(0)  # so the first sums are of the unscaled rows
    for iteration in range(iterations):
        columns = assignment.sum(0) if iteration else columns
        if world_size() > 1:
            dist.all_reduce(columns)
        assignment = assignment / columns.clamp(min=1e-30)
        assignment = assignment / assignment.sum(1, keepdim=True).clamp(min=1e-30)
    return assignment


@torch.no_grad()
def all_mean(x: Tensor, count: Tensor | float = 1.0) -> Tensor:
    """Mean over ranks of ``x``, each rank weighted by ``count``. No gradient flows: for statistics, not for losses."""
    if world_size() == 1:
        return x.clone()
    count = torch.as_tensor(count, dtype=torch.float32, device=x.device)
    packed = torch.cat([(x.float() * count).flatten(), count.reshape(1)])
    dist.all_reduce(packed)
    return (packed[:-1] / packed[-1].clamp(min=1e-12)).reshape(x.shape).to(x.dtype)


def _mix(x: Tensor) -> Tensor:
    """An integer hash of 32 bits in int64; products that overflow keep their low 32 bits."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 16)


def step_uniform(step: Tensor, *shape: int) -> Tensor:
    """Random numbers in (0, 1] that ``step`` (0-d int64) alone decides: alike on every rank and in a resumed run.

    A counter-based generator on the step's own device: it has no state, and the host never waits for a seed.
    """
    return (((_step_bits(step, shape) >> 8) + 0.5) / 2**24).view(shape)


def step_integers(step: Tensor, below: int, *shape: int) -> Tensor:
    """As ``step_uniform``, int64 from 0 to ``below`` − 1, with replacement."""
    return (_step_bits(step, shape) * below >> 32).view(shape)


def _step_bits(step: Tensor, shape: tuple[int, ...]) -> Tensor:
    places = torch.arange(math.prod(shape), device=step.device)
    return _mix(_mix(places) ^ _mix(_mix(step + 1)))


def step_normal(step: Tensor, *shape: int) -> Tensor:
    """As ``step_uniform``, standard normal (Box and Muller)."""
    radius, angle = step_uniform(step, 2, *shape)
    return (-2 * radius.log()).sqrt() * torch.cos(2 * math.pi * angle)


class CrossRankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose statistics are those of the global batch; unlike ``nn.SyncBatchNorm`` it also runs on CPU.

    Every rank must hold equally many samples, which the data layer guarantees.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm needs (B, C, ...) input, got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        x = input.float()
        local_var, local_mean = torch.var_mean(x, axes, unbiased=False)
        stats = _AllGather.apply(torch.stack([local_mean, local_var]))  # (W, 2, C)
        mean = stats[:, 0].mean(0)
        var = (stats[:, 1] + (stats[:, 0] - mean).square()).mean(0)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._update_running(mean.detach(), var.detach(), x.numel() // x.shape[1] * world_size())
        shape = [1, -1] + [1] * (input.ndim - 2)
        out = (x - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, count: int) -> None:
        running_mean, running_var, seen = self.running_mean, self.running_var, self.num_batches_tracked
        assert running_mean is not None and running_var is not None and seen is not None
        seen.add_(1)
        momentum = self.momentum
        if momentum is None:  # a cumulative average; the one case that reads the counter back
            momentum = 1.0 / float(seen)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * count / max(count - 1, 1)).to(running_var.dtype), momentum)


def synchronise_batchnorm(model: nn.Module) -> nn.Module:
    """Let every plain BatchNorm of ``model`` use global-batch statistics, in place; weights and names stay."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = CrossRankBatchNorm
    return model
