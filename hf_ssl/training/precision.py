"""The number format a run trains in: stated, restored from a checkpoint, or measured once before the first step.

Measuring means a few forward and backward passes of a copy, on the CPU alone: a GPU's native bf16 needs no proof. No
weight, buffer, gradient or random number of the run is touched.
"""

import contextlib
import copy
import ctypes
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling import SSLModel
from ..untouched import untouched

FILE = "training_args.json"  # of a checkpoint, which says in what it was trained
ROWS = 32  # images that a measurement sees at most
WORTH_STEPS = 100  # a shorter run would hardly earn back what measuring costs
SECONDS = 8.0  # after which no further round begins
GAIN = 1.15  # what must be gained for another format than the first; less is within the noise of a shared machine


@dataclass(frozen=True)
class Choice:
    """precision: fp32, bf16 or fp16. attention: what to set, None leaves the model's. said: a line for the user."""

    precision: str
    attention: str | None = None
    said: str = ""


def choose(model: SSLModel, batch: dict[str, Tensor], stated: str = "auto", seconds: float = SECONDS) -> Choice:
    """The fastest of what ``candidates`` offers for ``batch``, at most ROWS images on the model's device."""
    offered = candidates(model, stated)
    if len(offered) == 1:
        return offered[0]
    with untouched():
        times = _measure(copy.deepcopy(model), batch, offered, seconds)
    _return_memory()
    fastest = min(times, key=lambda choice: times[choice])
    first, gain = offered[0], times[offered[0]] / times[fastest]
    if fastest == first or gain < GAIN:
        best = min(offered[1:], key=lambda choice: times[choice])
        if times[best] == float("inf"):
            return Choice(first.precision, first.attention, f"{_name(first)}: bf16 gradients are wrong here")
        said = f"{_name(first)}: {_name(best)} would be {times[first] / times[best]:.2f} times as fast here"
        return Choice(first.precision, first.attention, said)
    flag = "--precision fp32" if stated == "auto" else "--attn_implementation sdpa"
    said = f"{_name(fastest)}: {gain:.1f} times as fast as {_name(first)} here; {flag} overrides"
    return Choice(fastest.precision, fastest.attention, said)


def candidates(model: SSLModel, stated: str = "auto") -> list[Choice]:
    """What may be chosen, the one without a measurement first; one alone where there is nothing to measure."""
    device = model.step.device.type
    if device != "cpu":
        return [Choice("fp32" if stated == "auto" else stated)]
    formats = ["fp32"] if stated == "auto" else [stated]
    if stated == "auto" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        formats.append("bf16")
    offered = [Choice(name) for name in formats]
    free = not model.attention_given and model.backbone.config._attn_implementation == "sdpa"
    # sdpa's fused bf16 kernel is slow on CPUs; in fp32 it is as fast as eager attention or faster
    return offered + ([Choice("bf16", "eager")] if free and "bf16" in formats else [])


def apply(model: SSLModel, choice: Choice) -> None:
    if choice.attention not in (None, model.backbone.config._attn_implementation):
        model.set_attn_implementation(choice.attention)


def to_dict(model: SSLModel, choice: Choice) -> dict[str, Any]:
    """What a checkpoint's training_args.json says."""
    return {"precision": choice.precision, "attn_implementation": model.backbone.config._attn_implementation}


def restore(checkpoint: str | Path, model: SSLModel, stated: str) -> Choice | None:
    """What a checkpoint was trained in, unless another precision is ``stated``; None where it does not say."""
    file = Path(checkpoint, FILE)
    saved = json.loads(file.read_text()) if file.is_file() else {}
    if saved.get("precision") not in ("fp32", "bf16") or stated not in ("auto", saved["precision"]):
        return None
    return Choice(saved["precision"], None if model.attention_given else saved.get("attn_implementation"))


def _name(choice: Choice) -> str:
    return choice.precision + (f" with {choice.attention} attention" if choice.attention else "")


def _return_memory() -> None:
    """To the system, what the passes have freed: glibc keeps it in pieces that the run's tensors may not fit into."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _measure(twin: SSLModel, batch: dict[str, Tensor], offered: list[Choice], seconds: float) -> dict[Choice, float]:
    """Seconds of a pass of each choice, the best of interleaved ones, on as many images as there is time for. Where
    passes are short more of them are made, up to a third of the time: other work on the machine shows in any one.

    A choice whose gradient is far from the first one's takes for ever, and so does bf16 where a stride meets a feature
    map of 1×1: torch 2.14 leaves that kernel's gradient uninitialised, which may look like one for a while.
    """
    original, start = twin.backbone.config._attn_implementation, time.perf_counter()
    full = len(batch[twin.main_input_name])
    twin.train()
    norms: dict[Choice, float] = {}
    points: list[bool] = []  # whether a strided convolution met a single pixel
    for module in twin.modules():
        if type(module) is torch.nn.Conv2d and max(module.stride) > 1:  # SmallMapConv2d knows single pixels
            module.register_forward_pre_hook(lambda _, args: points.append(args[0].shape[-2:].numel() == 1))

    def timed(choice: Choice, rows: int) -> float:
        twin.set_attn_implementation(choice.attention or original)
        part = {name: value[: len(value) * rows // full] for name, value in batch.items()}
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=choice.precision == "bf16"):
            loss = twin(**part).loss
        loss.backward()
        took = time.perf_counter() - began
        norms[choice] = float(torch.nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None]))
        twin.zero_grad()
        with torch.no_grad():
            twin.update_state()  # what waits for an optimiser step would pile up
        sound = choice.precision != "bf16" or not any(points)
        alike = norms[offered[0]] / 2 <= norms[choice] <= norms[offered[0]] * 2  # 0 and 0 are
        return took if sound and alike else float("inf")

    rows = min(full, max(2, twin.fewest_images()[0]))
    took = timed(offered[0], rows)
    rounds = 3  # the first one warms up
    rows = max(rows, min(full, int(rows * seconds / (took * rounds * len(offered)))))
    best: dict[Choice, float] = {}
    for i in range(4 * rounds):
        if time.perf_counter() - start > (seconds if i < rounds else seconds / 3) and i:
            break
        for choice in offered:
            took = timed(choice, rows)
            best[choice] = took if i < 2 else min(best[choice], took)
    return best
