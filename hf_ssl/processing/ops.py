"""The pixel operations of a view: uint8 (H, W, C) in, uint8 out, a few passes of cv2 each, any number of channels.

Each follows torchvision v2's float operation of the same name, clamped after every step, with uint8 in between.
cv2 on purpose: at 224 pixels a numba kernel of all colour and blur in one pass took .15 ms against .16 for a whole
jitter and .20 against .13 for a blur, for 16 s of compiling and 1.5 s to load; torch's uint8 resize took 1.1 times as
long in a whole view (one Zen 5 core).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np

LUMA = (0.299, 0.587, 0.114)
INTERPOLATIONS = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def by_channels(function: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """`function` over (H, W, C); cv2 takes at most four channels in many calls and drops the axis of a single one."""
    channels = image.shape[2]
    if channels > 4:
        parts = [np.ascontiguousarray(image[:, :, i : i + 4]) for i in range(0, channels, 4)]
        return np.concatenate([by_channels(function, part) for part in parts], axis=2)
    result = function(image)
    return result if result.ndim == 3 else result[:, :, None]


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - x, 0.0)


# At distance x >= 0: what an antialiased resize weighs with (PIL and torch: a = -.5), what cv2 reads with (a = -.75).
_TARGETS = {cv2.INTER_LINEAR: _triangle, cv2.INTER_CUBIC: lambda x: _cubic(x, -0.5)}
_READERS = {cv2.INTER_LINEAR: _triangle, cv2.INTER_CUBIC: lambda x: _cubic(x, -0.75)}


@cache
def _prefilter(shrink: float, block: int, target: int, reader: int) -> np.ndarray:
    """The 3 to 9 symmetric taps that make "block average, taps, cv2's resize" most like one antialiased resize.

    Least squares between the two frequency responses, weighted for photographs (power 1/f^2). `shrink` is what remains
    after averaging blocks of `block` pixels, in steps of 1/50.
    """
    if shrink <= 1:
        return np.ones(1, np.float32)
    frequency = np.linspace(0.005, 0.5, 60)
    x = (np.arange(400) + 0.5) / 100

    def response(kernel, scale):
        return (kernel(x) * np.cos(2 * np.pi * scale * frequency[:, None] * x)).sum(axis=1) / 50

    read = response(_READERS[reader], 1.0) * np.sin(np.pi * frequency) / (block * np.sin(np.pi * frequency / block))
    # the taps sum to 1, so only those at the sides are free; more of them would not err less
    sides = np.arange(1, 2 if shrink <= 1.2 else 3 if shrink <= 1.6 else 4 if shrink <= 2.5 else 5)
    effect = 2 * (np.cos(2 * np.pi * frequency[:, None] * sides) - 1) * (read / frequency)[:, None]
    wanted = (response(_TARGETS[target], shrink) - read) / frequency
    half = np.linalg.lstsq(effect, wanted, rcond=None)[0]
    return np.concatenate([half[::-1], [1 - 2 * half.sum()], half]).astype(np.float32)


Frame = tuple[float, float, float, float]  # top, left, height, width, of a part of a picture


def _resize(crop: np.ndarray, frame: Frame | None, height: int, width: int, interpolation: int) -> np.ndarray:
    """Antialiased resize of the crop, or of the frame in it. cv2 has none that is both right and fast: INTER_AREA
    takes twice as long and errs more."""
    y, x, rows, columns = frame or (0, 0, *crop.shape[:2])
    shrink_y, shrink_x = rows / height, columns / width
    if frame is None and (interpolation == cv2.INTER_NEAREST or max(shrink_y, shrink_x) <= 1):
        return cv2.resize(crop, (width, height), interpolation=interpolation)
    by_y, by_x = max(int(shrink_y / 2), 1), max(int(shrink_x / 2), 1)
    top, left = crop.shape[0] % by_y // 2, crop.shape[1] % by_x // 2
    is_whole = frame is None and crop.shape[0] % by_y == 0 and crop.shape[1] % by_x == 0
    if by_y > 1 or by_x > 1:  # whole blocks first: quick, and the taps below stay few on a picture of any size
        rows, columns = crop.shape[0] // by_y, crop.shape[1] // by_x
        crop = crop[top : top + rows * by_y, left : left + columns * by_x]
        crop = cv2.resize(crop, (columns, rows), interpolation=cv2.INTER_AREA)
    step_y, step_x = shrink_y / by_y, shrink_x / by_x
    reader = cv2.INTER_LINEAR if interpolation == cv2.INTER_LINEAR and min(step_y, step_x) < 1 else cv2.INTER_CUBIC
    taps_y = _prefilter(round(step_y * 50) / 50, by_y, interpolation, reader)
    taps_x = _prefilter(round(step_x * 50) / 50, by_x, interpolation, reader)
    crop = cv2.sepFilter2D(crop, -1, taps_x, taps_y, borderType=cv2.BORDER_REPLICATE)
    if is_whole:
        return cv2.resize(crop, (width, height), interpolation=reader)
    # the true edges, which the blocks or the whole pixels of the crop miss
    shift_y, shift_x = 0.5 * step_y - 0.5 + (y - top) / by_y, 0.5 * step_x - 0.5 + (x - left) / by_x
    matrix = np.array([[step_x, 0, shift_x], [0, step_y, shift_y]])
    flags = reader | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(crop, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def crop_resize(
    image: np.ndarray,
    box: Box,
    size: tuple[int, int],
    interpolation: str,
    hflip: bool = False,
    vflip: bool = False,
    shrunk: int = 1,
) -> np.ndarray:
    """The box of a (H, W, C) picture, antialiased to `size` = (height, width), then flipped: (height, width, C).

    shrunk: `image` is the picture at 1 / shrunk of its size, the sides rounded up; the box counts whole pixels.
    """
    top, left, height, width = box
    frame = None
    if shrunk > 1:
        y, x = top // shrunk, left // shrunk
        crop = image[y : -(-(top + height) // shrunk), x : -(-(left + width) // shrunk)]
        frame = (top / shrunk - y, left / shrunk - x, height / shrunk, width / shrunk)
    else:
        crop = image[top : top + height, left : left + width]
    if (height, width) == size:
        result = np.ascontiguousarray(crop)
    elif crop.shape[2] == 3:
        result = _resize(crop, frame, size[0], size[1], INTERPOLATIONS[interpolation])
    else:
        result = by_channels(lambda part: _resize(part, frame, size[0], size[1], INTERPOLATIONS[interpolation]), crop)
    if hflip or vflip:
        axis = -1 if hflip and vflip else int(hflip)
        result = cv2.flip(result, axis) if result.shape[2] == 3 else by_channels(lambda p: cv2.flip(p, axis), result)
    return result


def warp(image: np.ndarray, degrees: float, shift_y: int, shift_x: int) -> np.ndarray:
    """Rotates counter-clockwise about the centre, then shifts by whole pixels; mirrored at the border."""
    height, width = image.shape[:2]
    border = cv2.BORDER_REFLECT_101
    if degrees == 0:  # the same bytes, 2 to 20 times faster
        down, right, up, left = max(shift_y, 0), max(shift_x, 0), max(-shift_y, 0), max(-shift_x, 0)
        padded = by_channels(lambda part: cv2.copyMakeBorder(part, down, up, right, left, border), image)
        return np.ascontiguousarray(padded[up : up + height, left : left + width])
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    matrix[:, 2] += (shift_x, shift_y)
    return by_channels(
        lambda part: cv2.warpAffine(part, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=border), image
    )


def _affine(image: np.ndarray, gain: float, to_luma: float, offset: float | Sequence[float]) -> np.ndarray:
    """clip(gain * image + to_luma * its luma + offset), one offset for all channels or one each; luma is RGB's."""
    channels = image.shape[2]
    if channels == 1:  # a seventh of a table's time on a small picture
        return cv2.addWeighted(image, gain, image, 0.0, float(offset))[:, :, None]  # type: ignore[arg-type]
    if channels == 3:
        red, green, blue = (to_luma * weight for weight in LUMA)
        rows = [red + gain, green, blue, offset, red, green + gain, blue, offset, red, green, blue + gain, offset]
        return cv2.transform(image, np.array(rows).reshape(3, 4))
    levels = np.arange(256.0)[:, None] * gain + np.broadcast_to(offset, channels)
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    if channels <= 4:
        result = cv2.LUT(image, table.reshape(1, 256, channels))
        return result if result.ndim == 3 else result[:, :, None]
    return np.stack([table[:, c][image[:, :, c]] for c in range(channels)], axis=2)


def _middle(image: np.ndarray) -> float | np.ndarray:
    """What contrast moves away from: the mean luma; where there is no luma (C not 1 or 3), each channel's own mean."""
    if image.shape[2] == 3:
        red, green, blue, _ = cv2.mean(image)
        return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    if image.shape[2] == 1:
        return cv2.mean(image)[0]
    return image.reshape(-1, image.shape[2]).mean(axis=0)


def jitter(image: np.ndarray, choices: Iterable[tuple[str, float]]) -> np.ndarray:
    """(operation, factor) one after the other, as `brightness`, `contrast`, `saturation` and `hue` do it.

    The first three are gain * image + to_luma * luma + offset, and so are two in a row unless the first one clips,
    which no factor up to 1 does: these become one pass (and round once). What needs RGB is left out elsewhere.
    """
    is_rgb, clips = image.shape[2] == 3, False
    affine: Any = None  # (gain, to_luma, offset) still to be done
    middle: Any = None  # of `image`
    for name, factor in choices:
        if name == "hue" or clips:
            image = image if affine is None else _affine(image, *affine)
            affine, middle, clips = None, None, False
        if name == "hue":
            image = hue(image, factor) if is_rgb else image
        elif factor != 1 and (is_rgb or name != "saturation"):
            gain, to_luma, offset = affine or (1.0, 0.0, 0.0)
            if name == "saturation":
                affine = gain * factor, to_luma * factor + (1 - factor) * (gain + to_luma), offset
            else:
                affine = gain * factor, to_luma * factor, offset * factor
            if name == "contrast":
                middle = _middle(image) if middle is None else middle
                affine = *affine[:2], affine[2] + (1 - factor) * ((gain + to_luma) * middle + offset)
            clips = factor > 1
    return image if affine is None else _affine(image, *affine)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Every channel times `factor`."""
    return jitter(image, [("brightness", factor)])


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from the mean luma by `factor`; where there is no luma (C not 1 or 3) away from each channel's own mean."""
    return jitter(image, [("contrast", factor)])


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from each pixel's own luma by `factor`. RGB only."""
    return jitter(image, [("saturation", factor)])


def hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turns the hue by `shift` of a full circle (-.5 to .5), in 256 steps. RGB only."""
    step = round(shift * 256) % 256
    if step == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    row = np.zeros(hsv.shape[1] * 3, np.uint8)
    row[::3] = step
    rows = hsv.reshape(hsv.shape[0], -1)
    rows += row  # uint8 wraps around, as the circle does; whole rows, because numpy is slow on an inner axis of 3
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) to its luma (H, W, 1)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]


def blur(image: np.ndarray, sigma: float, kernel: int = 0) -> np.ndarray:
    """Gaussian blur, mirrored at the border. `kernel` (odd) limits the width in pixels; 0 does not.

    Taps beyond 3 sigma weigh under .3 % and are left out: the mean blur costs a third of a full 23-tap one.
    sepFilter2D takes half the time of GaussianBlur and differs from it by .1 levels.
    """
    width = 2 * math.ceil(3 * sigma) + 1
    width = min(width, kernel) if kernel else width
    if width < 3 or sigma < 0.2:  # below that, the neighbours weigh less than one level in 255
        return image
    taps = cv2.getGaussianKernel(width, sigma, cv2.CV_32F)
    return by_channels(lambda part: cv2.sepFilter2D(part, -1, taps, taps, borderType=cv2.BORDER_REFLECT_101), image)


_SOLARIZED = np.where(np.arange(256) >= 128, 255 - np.arange(256), np.arange(256)).astype(np.uint8)


def solarize(image: np.ndarray) -> np.ndarray:
    """Inverts the levels from 128 up."""
    return cv2.LUT(image, _SOLARIZED).reshape(image.shape)
