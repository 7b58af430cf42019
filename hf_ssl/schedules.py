"""Schedules as pure functions of progress in [0, 1]; floats or 0-d tensors alike (no device sync)."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def cosine(progress: Number, start: float, end: float) -> Number:
    """Half a cosine from ``start`` (progress 0) to ``end`` (progress 1): EMA momentum, weight decay, learning rate."""
    if isinstance(progress, Tensor):
        return end + 0.5 * (start - end) * (1 + torch.cos(math.pi * progress))
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear(progress: Number, start: float, end: float, until: float = 1.0) -> Number:
    """A straight line from ``start`` to ``end``, reached at progress ``until`` and kept from there on."""
    if until <= 0:
        return progress * 0.0 + end
    if isinstance(progress, Tensor):
        return start + (end - start) * (progress / until).clamp(max=1.0)
    return start + (end - start) * min(progress / until, 1.0)


def warmup_cosine(progress: float, peak: float, end: float = 0.0, warmup: float = 0.0) -> float:
    """Linear from 0 to ``peak`` while progress < ``warmup``, then half a cosine to ``end``: the learning rate."""
    return _warmed_up(progress, peak, warmup, lambda rest: cosine(rest, peak, end))


def cosine_7_16(progress: float, peak: float, end: float = 0.0, warmup: float = 0.0) -> float:
    """Linear warm-up, then ``peak`` · cos(7π/16 · progress), down to 0.195 · ``peak``: FixMatch (section 2.4)."""
    return _warmed_up(progress, peak, warmup, lambda rest: max(end, peak * math.cos(7 * math.pi / 16 * rest)))


def _warmed_up(progress: float, peak: float, warmup: float, decay: Callable[[float], float]) -> float:
    if progress < warmup:
        return peak * progress / warmup
    return decay((progress - warmup) / max(1.0 - warmup, 1e-12))


# What ``lr_scheduler_type`` may name beside the shapes that transformers knows.
LEARNING_RATES = {"cosine_with_min_lr": warmup_cosine, "cosine_7_16": cosine_7_16}
