"""Whether a step can fit into the machine's memory at all, asked before anything is made that takes minutes."""

import os
from pathlib import Path
from typing import Any

import torch

_FLOAT = 4  # bytes
_WITH_STATE = 4  # a weight, its gradient and the optimiser's two moments
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def check_fits(
    config: Any, height: int, width: int, channels: int, images: int = 1, memory: int | None = None
) -> None:
    """ValueError where ``images`` views of height × width pixels alone take more than all memory, or what a
    transformer needs for the patches of one of them does. config: the backbone's; memory: in bytes, default: of this
    machine's accelerator, without one its own.

    A lower bound: what is refused cannot run, what passes may still not fit. Attention counts by patches² where
    it is computed so: without an accelerator's kernels, and as "eager".
    """
    memory = memory or _memory()
    needs = {f"{images:,} views of {height}×{width} pixels": images * channels * height * width * _FLOAT}
    patches, heads = _patches(config, height, width), getattr(config, "num_attention_heads", None)
    if patches and isinstance(heads, int):
        width_of = getattr(config, "hidden_size", 0)
        needs[f"the positions of {patches:,} patches"] = patches * width_of * _FLOAT * _WITH_STATE
        if config._attn_implementation == "eager" or not torch.cuda.is_available():
            needs[f"one layer's attention among the {patches:,} patches of one view"] = patches**2 * heads * _FLOAT
    what, most = max(needs.items(), key=lambda item: item[1])
    if most > memory:
        raise ValueError(
            f"{height}×{width} pixels do not fit into memory: {what} would take {_size(most)}, and there are "
            f"{_size(memory)}. Take a smaller image_size{' or batch' if images > 1 else ''}"
            f"{', or a larger patch_size' if patches else ''}"
        )


def _patches(config: Any, height: int, width: int) -> int:
    """How many patches attend to each other; 0 where attention keeps to windows, or there is none."""
    side = getattr(config, "patch_size", None)
    if side is None or getattr(config, "window_size", None):
        return 0
    down, across = (side, side) if isinstance(side, int) else side
    return (height // down) * (width // across)


def _memory() -> int:
    """Bytes of the first accelerator; without one what this machine has and this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # "max": no limit
        return whole


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {_UNITS[-1]}"
