"""The teacher as an exponential moving average (EMA) of the student: copy, freeze, one update per optimiser step.
And a frozen snapshot of a module, taken anew now and then."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .memory import HostCounter

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """A frozen deep copy of ``student`` (never an alias: the two share no storage), float32 or finer: a step of
    1 − momentum vanishes in half precision."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    return teacher._apply(lambda t: t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t)


def copy_state(student: nn.Module, teacher: nn.Module) -> None:
    """Teacher := student, parameters and buffers, except what a checkpoint has already filled."""
    for target, source in zip(teacher.parameters(), student.parameters(), strict=True):
        init.copy_(target, source)
    for target, source in zip(teacher.buffers(), student.buffers(), strict=True):
        init.copy_(target, source)


@torch.no_grad()
def ema_update(student: nn.Module, teacher: nn.Module, momentum: float | Tensor, buffers: bool = False) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, parameters only, or ``buffers`` as well.

    A teacher that runs in training mode owns its BatchNorm statistics (as in the published code of BYOL, MoCo v3 and
    DINO): its buffers are left out. A teacher that never runs would keep its initial statistics for ever, and those
    are what evaluation uses: ``buffers=True`` averages the floating buffers too and copies the others (counters,
    index tables), as google-research/fixmatch does for ImageNet. ``momentum`` is a number on the host: no device sync.
    """
    pairs: list[tuple[Tensor, Tensor]] = list(zip(teacher.parameters(), student.parameters(), strict=True))
    if buffers:
        for target, source in zip(teacher.buffers(), student.buffers(), strict=True):
            if target.is_floating_point():
                pairs.append((target, source))
            else:
                target.copy_(source)
    targets: list[Tensor] = [target for target, _ in pairs]
    torch._foreach_lerp_(targets, [source.to(target.dtype) for target, source in pairs], 1.0 - float(momentum))


def start_left(momentum_at: Callable[[float], float], steps: int, total: int, enough: float = 1e-3) -> float:
    """Share of the first weights in an average after ``steps`` of ``total``: the product of the momenta so far.

    ``momentum_at``: progress in [0, 1] -> momentum. Once it is below ``enough`` the rest is not multiplied.
    """
    left = 1.0
    for step in range(steps):
        left *= momentum_at(min(step / total, 1.0))
        if left < enough:
            break
    return left


def teacher_mode(teacher: nn.Module, training: bool) -> None:
    """Freeze ``teacher``; no dropout or drop-path ever, BatchNorm follows ``training`` (see ``ema_update``)."""
    teacher.requires_grad_(False)
    teacher.eval()
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(training)


class Snapshot(HostCounter):
    """A frozen copy of ``source`` in ``model``, taken anew every so many optimiser steps, ``times`` times at most."""

    counter = "steps"

    def __init__(self, source: nn.Module, every: int, times: int):
        super().__init__()
        self.every, self.times = every, times
        self.model = make_teacher(source).eval()
        self.steps = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> "Snapshot":
        return super().train(False)

    @torch.no_grad()
    def advance(self, source: nn.Module) -> None:
        """Once per optimiser step, after ``source`` has moved."""
        steps = self.known()[0] + 1
        self.count_on(steps)
        if steps % self.every == 0 and steps // self.every <= self.times:
            torch._foreach_copy_([*self.model.parameters()], [*source.parameters()])
            for target, buffer in zip(self.model.buffers(), source.buffers(), strict=True):
                target.copy_(buffer)

    def start(self, source: nn.Module) -> None:
        """A copy of ``source``, no step counted; values from a checkpoint stay."""
        copy_state(source, self.model)
        self.reset()

    def reset(self) -> None:
        init.zeros_(self.steps)
