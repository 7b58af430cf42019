"""The photometric half of a view on the training device: `pack` writes one draw's choices, `finish` applies a batch's.

The host crops, resizes, flips, warps and runs RandAugment, as ever; what is left is colour, blur, solarise, Cutout,
normalise and erase, in this order. `finish` is float32, clamps after each jitter as torchvision v2 does and never
rounds to uint8 in between, so its pixels differ from the host's by the host's rounding. It has static shapes, makes no
host sync, and compiles into one graph (`torch.compile(finish, fullgraph=True)`).
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops, randaugment
from .views import Draw, ViewGroup

logger = logging.getLogger("hf_ssl.processing")

# Columns of `params`. A jitter is gain * picture + to_mean * its mean luma + to_luma * luma: brightness, contrast and
# saturation are that, and (1, 0, 0) is none. A view has at most three of them, before or after its hue, so one hue and
# 3 + 3 slots hold every order; four slots of any operation would compute four hues, the dearest operation by far.
_SLOTS = 3
_HUE = 2 * _SLOTS * 3
_GRAY, _SOLARIZE = _HUE + 1, _HUE + 2
_CUTOUT, _ERASE = _HUE + 3, _HUE + 7  # boxes: top, left, height, width; all 0 is none
_TAPS = _HUE + 11  # the blur kernel from its centre to one side; (1, 0, 0, ...) is none


def _reach(sigma: float, group: ViewGroup) -> int:
    """Pixels to each side that a blur reads, by the rule of `ops.blur`; 0 is no blur."""
    if sigma < 0.2:
        return 0
    widest = math.ceil(3 * sigma)
    return min(widest, group.kernel_pixels // 2) if group.kernel_pixels else widest


def columns(groups: Iterable[ViewGroup]) -> int:
    """P of `pack` for the groups of one key: 30, plus a column per pixel to one side that their widest blur reads.

    0 where no group has anything for `finish` to do but normalise.
    """
    groups = list(groups)
    if not any(has_jitter(g) or g.grayscale_p or g.blur_p or g.solarize_p or g.cutout or g.erase_p for g in groups):
        return 0
    return _TAPS + 1 + max(_reach(g.blur_sigma[1], g) if g.blur_p else 0 for g in groups)


def has_jitter(group: ViewGroup) -> bool:
    """Whether any of the group's views changes brightness, contrast, saturation or hue."""
    plain = ((1.0, 1.0),) * 3 + ((0.0, 0.0),)
    return group.jitter_p > 0 and (group.brightness, group.contrast, group.saturation, group.hue) != plain


def pack(draw: Draw, group: ViewGroup, width: int | None = None) -> np.ndarray:
    """The photometric choices of one view: float32 (P,). P is `columns([group])`, or `width` where several groups'
    views are stacked, which is then `columns` of all of them."""
    params = np.zeros(columns([group]) if width is None else width, np.float32)
    if not len(params):
        return params
    slots = params[:_HUE].reshape(2, _SLOTS, 3)  # before the hue, after it
    slots[..., 0] = 1
    half, filled = 0, 0
    for name, factor in draw.jitter:
        if name == "hue":
            params[_HUE], half, filled = factor, 1, 0
            continue
        rest = 1 - factor
        slots[half, filled] = factor, rest * (name == "contrast"), rest * (name == "saturation")
        filled += 1
    params[_GRAY], params[_SOLARIZE] = draw.gray, draw.solarize
    params[_CUTOUT:_ERASE] = draw.cutout or 0
    params[_ERASE:_TAPS] = draw.erase or 0
    side = _reach(draw.sigma, group)
    taps = np.exp(-0.5 * (np.arange(side + 1) / (draw.sigma or 1.0)) ** 2)
    params[_TAPS : _TAPS + side + 1] = taps / (2 * taps.sum() - 1)
    return params


def finish(views: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], jitter: bool = True) -> Tensor:
    """uint8 (N, H, W, C) to normalised float32 (N, C, H, W) in channels-last memory, on the tensors' own device.

    params: float32 (N, P), one row of `pack` per view. jitter: False promises that no row holds a jitter, which saves
    most of the time. mean, std: C numbers, of pictures scaled to 0..1. What needs RGB is left out unless C is 3.

    On CUDA it compiles itself at the first call of a shape, which made it 5 times faster on an H100.
    """
    if views.is_cuda and not torch.compiler.is_compiling():
        return _compiled()(views, params, mean, std, jitter)
    return _finish(views, params, mean, std, jitter)


@torch.no_grad()
def _finish(views: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], jitter: bool) -> Tensor:
    height, width, channels = views.shape[1:]
    column = params[:, :, None, None, None].unbind(1)  # each (N, 1, 1, 1)
    x = views.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255
    if jitter:
        for i in range(2 * _SLOTS):
            if i == _SLOTS and channels == 3:
                x = _turn_hue(x, column[_HUE])
            x = _blend(x, *column[3 * i : 3 * i + 3])
    x = torch.where(column[_GRAY] > 0, _luma(x), x)
    x = _blur(_blur(x, column[_TAPS:], 2), column[_TAPS:], 3)
    x = torch.where(column[_SOLARIZE] > 0, torch.minimum(x, 1 - x), x)  # the host inverts what rounds to 128 or more
    x = torch.where(_inside(column[_CUTOUT:_ERASE], height, width, x), randaugment.CUTOUT_GREY / 255, x)
    erased = _inside(column[_ERASE:_TAPS], height, width, x)
    # Channel by channel, because a tensor of `mean` would have to be copied from the host, which waits for the device.
    planes = [(x[:, c : c + 1] - mean[c]) / std[c] for c in range(channels)]
    return torch.stack([plane.masked_fill(erased, 0.0)[:, 0] for plane in planes], dim=-1).permute(0, 3, 1, 2)


@cache
def _compiled() -> Callable[..., Tensor]:
    """`_finish` compiled, or as it is from the first failure on. Imports the compiler, which workers do not need."""
    from torch._dynamo.exc import TorchDynamoException

    function = torch.compile(_finish, fullgraph=True, dynamic=False)

    def run(*arguments: Any) -> Tensor:
        nonlocal function
        try:
            return function(*arguments)
        except TorchDynamoException as error:  # most often there is no C compiler
            logger.warning("Views cannot be compiled and take 5 times longer: %s", str(error).partition("\n")[0])
            function = _finish
            return function(*arguments)

    return run


def _luma(x: Tensor) -> Tensor:
    """(N, 3, H, W) to (N, 1, H, W). Other pictures are their own luma, so that grayscale and saturation leave them."""
    if x.shape[1] != 3:
        return x
    red, green, blue = x.split(1, dim=1)
    return ops.LUMA[0] * red + ops.LUMA[1] * green + ops.LUMA[2] * blue


def _blend(x: Tensor, gain: Tensor, to_mean: Tensor, to_luma: Tensor) -> Tensor:
    luma = _luma(x)
    middle = luma.mean((2, 3), keepdim=True)
    return torch.addcmul(to_mean * middle + to_luma * luma, gain, x).clamp(0, 1)


def _turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    """RGB to HSV, hue plus `shift` of a full circle, and back: torchvision's formulas without its six cases."""
    red, green, blue = x.split(1, dim=1)
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = high - low
    grey = chroma == 0
    per = 1 / torch.where(grey, 1.0, chroma)
    sixth = torch.where(
        high == red,
        (green - blue) * per,
        torch.where(high == green, 2 + (blue - red) * per, 4 + (red - green) * per),
    )
    sixth = sixth + 6 * shift
    planes = []
    for start in (5, 3, 1):
        k = torch.remainder(sixth + start, 6)
        planes.append(high - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.cat(planes, dim=1)


def _blur(x: Tensor, taps: Sequence[Tensor], dim: int) -> Tensor:
    """Along one axis with each view's own symmetric kernel, mirrored at the border without repeating its pixel.

    Shifted sums, not a convolution: a convolution would run in TF32, which drops half of the bits.
    """
    size, side = x.shape[dim], len(taps) - 1
    if side == 0 or size == 1:
        return x
    index = torch.arange(-side, size + side, device=x.device).remainder(2 * size - 2)
    padded = x.index_select(dim, torch.minimum(index, 2 * size - 2 - index))
    result = taps[0] * x
    for k in range(1, side + 1):
        pair = padded.narrow(dim, side - k, size) + padded.narrow(dim, side + k, size)
        result = torch.addcmul(result, taps[k], pair)
    return result


def _inside(box: Sequence[Tensor], height: int, width: int, like: Tensor) -> Tensor:
    """(N, 1, height, width) bool: whether the pixel lies in the view's box."""
    top, left, tall, wide = box
    rows = torch.arange(height, device=like.device)[:, None]
    columns = torch.arange(width, device=like.device)
    return (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
