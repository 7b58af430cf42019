"""The number format a run trains in: stated, restored from a checkpoint, or decided once per machine and shape.

What the processor is decides first: one that computes bf16 natively is faster with it for transformers and for large
pictures. A few forward and backward passes of a copy are measured, on the CPU alone (a GPU's native bf16 needs no
proof), and overrule that only by a clear margin. What was decided is remembered, so that equal commands train alike
whatever else the machine does. No weight, buffer, gradient or random number of the run is touched.
"""

import contextlib
import copy
import ctypes
import functools
import gc
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..documents import read_json
from ..modeling import SSLModel
from ..untouched import untouched

FILE = "training_args.json"  # of a checkpoint, which says in what it was trained
ROWS = 32  # images that a measurement sees at most
WORTH_STEPS = 100  # a shorter run would hardly earn back what measuring costs
SECONDS = 8.0  # of work after which no further round begins
CLEAR = 1.3  # how much faster the other format must be; less is within the noise of a shared machine
LARGE = 96  # side in pixels from which convolutions gain by bf16, as a rule
_NATIVE = {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}  # flags of processors that multiply bf16 themselves


@dataclass(frozen=True)
class Choice:
    """precision: fp32, bf16 or fp16. attention: what to set, None leaves the model's. said: why, for the user."""

    precision: str
    attention: str | None = None
    said: str = field(default="", compare=False)


def choose(model: SSLModel, batch: dict[str, Tensor], stated: str = "auto", seconds: float = SECONDS) -> Choice:
    """What ``candidates`` offers that is right for ``batch``, at most ROWS images on the model's device."""
    offered = candidates(model, stated, batch)
    if len(offered) == 1:
        return offered[0]
    file = _memory(model, batch, offered)
    if (known := _recall(file, offered)) is not None:
        return known
    with untouched():
        times = _measure(copy.deepcopy(model), batch, offered, seconds)
    _return_memory()
    return _remember(file, decide(offered, times), offered)


def decide(offered: list[Choice], times: Mapping[Choice, float]) -> Choice:
    """The first of ``offered``, the processor's rule, unless another one took clearly less time."""
    rule, other = offered[0], min(offered[1:], key=lambda choice: times[choice])
    if times[other] == float("inf") or times[rule] == float("inf"):
        chosen = rule if times[other] == float("inf") else other
        return Choice(chosen.precision, chosen.attention, f"{_name(chosen)}: bf16 gradients are wrong here")
    gain = times[rule] / times[other]
    chosen, left, gain = (other, rule, gain) if gain >= CLEAR else (rule, other, 1 / gain)
    said = f"{_name(chosen)}: {gain:.2f} times as fast as {_name(left)} here"
    if gain < 1:
        said = f"{_name(chosen)}, as a rule on this processor: {_name(left)} is {1 / gain:.2f} times as fast here"
    said += "; --precision fp32 overrides" if chosen.precision == "bf16" else ""
    return Choice(chosen.precision, chosen.attention, said)


def candidates(model: SSLModel, stated: str = "auto", batch: Mapping[str, Tensor] | None = None) -> list[Choice]:
    """What may be chosen, what the processor is best at first; one alone where there is nothing to measure.

    bf16 on a CPU goes with eager attention, unless another was chosen: sdpa's fused bf16 kernel is slow there.
    """
    free = not model.attention_given and model.backbone.config._attn_implementation == "sdpa"
    if model.step.device.type != "cpu":
        return [Choice("fp32" if stated == "auto" else stated, None, _reason(stated))]
    bf16 = Choice("bf16", "eager" if free else None, _reason(stated))
    if stated != "auto":
        return [bf16 if stated == "bf16" else Choice(stated, None, _reason(stated))]
    fp32 = Choice("fp32", None, "fp32: this processor has no bf16 of its own")
    if not native_bf16():
        return [fp32]
    sides = [views.shape[-1] for views in (batch or {}).values() if views.ndim >= 4]
    transformer = model.backbone.config._attn_implementation is not None and _attends(model)
    return [bf16, fp32] if transformer or max(sides, default=0) >= LARGE else [fp32, bf16]


def _attends(model: SSLModel) -> bool:
    return any("attention" in type(module).__name__.lower() for module in model.backbone.modules())


def plain(stated: str, why: str) -> Choice:
    """What is stated, else fp32, where nothing is measured; ``why``."""
    return Choice("fp32" if stated == "auto" else stated, None, f"fp32: {why}" if stated == "auto" else "stated")


def _reason(stated: str) -> str:
    return "fp32: nothing else is faster here as a rule" if stated == "auto" else "stated"


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 by instructions of its own, and torch uses them."""
    flags = _processor()[1]
    known = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(known and _NATIVE & set(flags))


@functools.cache
def _processor() -> tuple[str, tuple[str, ...]]:
    """Name and flags of the CPU, as Linux tells them."""
    with contextlib.suppress(OSError):
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
        flags = (found.get("flags") or found.get("Features") or "").split()
        return found.get("model name") or platform.machine(), tuple(sorted(flags))
    return platform.processor() or platform.machine(), ()


# --- what was decided before --------------------------------------------------------------------------------------


def _memory(model: SSLModel, batch: Mapping[str, Tensor], offered: list[Choice]) -> Path | None:
    """The file for this machine and shape in the user's cache; None where there is no such folder."""
    facts = {
        "processor": _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "method": type(model).__name__,
        "backbone": type(model.backbone).__name__,
        "parameters": [list(parameter.shape) for parameter in model.parameters()],
        "batch": {name: list(value.shape) for name, value in sorted(batch.items())},
        "offered": [_name(choice) for choice in offered],
    }
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # there is no home folder
        return None
    return cache / "hf_ssl" / "precision" / f"{digest}.json"


def _recall(file: Path | None, offered: list[Choice]) -> Choice | None:
    try:
        found = read_json(file) if file else {}
        choice = Choice(found["precision"], found["attention"], str(found["said"]))
    except (ValueError, KeyError, TypeError):  # none, or one that is damaged
        return None
    return choice if choice in offered else None


def _remember(file: Path | None, choice: Choice, offered: list[Choice]) -> Choice:
    """Keep ``choice``, unless another process was first: then its choice counts for both."""
    if file is None:
        return choice
    text = json.dumps({"precision": choice.precision, "attention": choice.attention, "said": choice.said})
    scratch = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as scratch:
            scratch.write(text)
        try:
            os.link(scratch.name, file)
        except OSError:  # it is there, or the file system has no links
            if (known := _recall(file, offered)) is not None:
                return known
            os.replace(scratch.name, file)
    except OSError:  # a full or read-only disk: the next run measures again
        pass
    finally:
        if scratch is not None:
            with contextlib.suppress(OSError):
                os.unlink(scratch.name)
    return choice


def apply(model: SSLModel, choice: Choice) -> None:
    if choice.attention not in (None, model.backbone.config._attn_implementation):
        model.set_attn_implementation(choice.attention)


def to_dict(model: SSLModel, choice: Choice) -> dict[str, Any]:
    """What a checkpoint's training_args.json says, and with the reason run.json."""
    return {"precision": choice.precision, "attn_implementation": model.backbone.config._attn_implementation}


def restore(checkpoint: str | Path, model: SSLModel, stated: str) -> Choice | None:
    """What a checkpoint was trained in, unless another precision is ``stated``; None where it does not say."""
    file = Path(checkpoint, FILE)
    saved = read_json(file) if file.is_file() else {}
    if saved.get("precision") not in ("fp32", "bf16") or stated not in ("auto", saved["precision"]):
        return None
    attention = None if model.attention_given else saved.get("attn_implementation")
    return Choice(saved["precision"], attention, "as the checkpoint was trained")


def _name(choice: Choice) -> str:
    return choice.precision + (f" with {choice.attention} attention" if choice.attention else "")


def _return_memory() -> None:
    """To the system, what the passes have freed: glibc keeps it in pieces that the run's tensors may not fit into."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _work() -> float:
    """Seconds that this process has computed, per thread."""
    return time.process_time() / torch.get_num_threads()


def _measure(twin: SSLModel, batch: dict[str, Tensor], offered: list[Choice], seconds: float) -> dict[Choice, float]:
    """Seconds of a pass of each choice, the best of interleaved ones, on as many images as there is time for. Where
    passes are short more of them are made, up to a third of the time. Seconds are the processor's, not the clock's:
    other work on the machine makes a pass wait, which says nothing about formats.

    A choice whose gradient is far from fp32's takes for ever, and so does bf16 where a stride meets a feature
    map of 1×1: torch 2.14 leaves that kernel's gradient uninitialised, which may look like one for a while.
    """
    original, start, clock = twin.backbone.config._attn_implementation, _work(), time.perf_counter()
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
        began = _work()
        with torch.autocast("cpu", torch.bfloat16, enabled=choice.precision == "bf16"):
            loss = twin(**part).loss
        loss.backward()
        took = _work() - began
        norms[choice] = float(torch.nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None]))
        twin.zero_grad()
        with torch.no_grad():
            twin.update_state()  # what waits for an optimiser step would pile up
        sound = choice.precision != "bf16" or not any(points)
        alike = norms[exact] / 2 <= norms[choice] <= norms[exact] * 2  # 0 and 0 are
        return took if sound and alike else float("inf")

    exact = next((choice for choice in offered if choice.precision == "fp32"), offered[0])
    rows = min(full, max(2, twin.fewest_images()[0]))
    took = max(timed(exact, rows), (time.perf_counter() - clock) / 4)
    rounds = 3  # the first one warms up
    rows = max(rows, min(full, int(rows * seconds / (took * rounds * len(offered)))))
    best: dict[Choice, float] = {}
    for i in range(4 * rounds):
        late = time.perf_counter() - clock > 4 * seconds  # beside other work
        if i and (late or _work() - start > (seconds if i < rounds else seconds / 3)):
            break
        for choice in sorted(offered, key=lambda choice: choice != exact):  # its gradient is what others' are held to
            took = timed(choice, rows)
            best[choice] = took if i < 2 else min(best[choice], took)
    return best
