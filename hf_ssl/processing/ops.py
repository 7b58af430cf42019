"""The pixel operations of a view: uint8 (H, W, C) in, uint8 out, a few passes of cv2 each, any number of channels.

Each follows torchvision v2's float operation of the same name, clamped after every step, with uint8 in between.
"""

from collections.abc import Callable, Sequence
from functools import cache

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
    """The 7 or 9 symmetric taps that make "block average, taps, cv2's resize" most like one antialiased resize.

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
    sides = np.arange(1, 4 if shrink <= 2.5 else 5)  # the taps sum to 1, so only those at the sides are free
    effect = 2 * (np.cos(2 * np.pi * frequency[:, None] * sides) - 1) * (read / frequency)[:, None]
    wanted = (response(_TARGETS[target], shrink) - read) / frequency
    half = np.linalg.lstsq(effect, wanted, rcond=None)[0]
    return np.concatenate([half[::-1], [1 - 2 * half.sum()], half]).astype(np.float32)


def _resize(crop: np.ndarray, height: int, width: int, interpolation: int) -> np.ndarray:
    """Antialiased resize. cv2 has none that is both right and fast: INTER_AREA takes twice as long and errs more."""
    shrink_y, shrink_x = crop.shape[0] / height, crop.shape[1] / width
    if interpolation == cv2.INTER_NEAREST or max(shrink_y, shrink_x) <= 1:
        return cv2.resize(crop, (width, height), interpolation=interpolation)
    by_y, by_x = max(int(shrink_y / 2), 1), max(int(shrink_x / 2), 1)
    top, left = crop.shape[0] % by_y // 2, crop.shape[1] % by_x // 2
    is_whole = crop.shape[0] % by_y == 0 and crop.shape[1] % by_x == 0
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
    shift_y, shift_x = 0.5 * step_y - 0.5 - top / by_y, 0.5 * step_x - 0.5 - left / by_x
    matrix = np.array([[step_x, 0, shift_x], [0, step_y, shift_y]])  # the crop's true edges, which the blocks miss
    flags = reader | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(crop, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def crop_resize(
    image: np.ndarray, box: Box, size: tuple[int, int], interpolation: str, hflip: bool = False, vflip: bool = False
) -> np.ndarray:
    """The box of a (H, W, C) picture, antialiased to `size` = (height, width), then flipped: (height, width, C)."""
    top, left, height, width = box
    crop = image[top : top + height, left : left + width]
    if (height, width) == size:
        result = np.ascontiguousarray(crop)
    else:
        result = by_channels(lambda part: _resize(part, size[0], size[1], INTERPOLATIONS[interpolation]), crop)
    if hflip or vflip:
        result = by_channels(lambda part: cv2.flip(part, -1 if hflip and vflip else int(hflip)), result)
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


def _affine(image: np.ndarray, gain: float, offset: Sequence[float]) -> np.ndarray:
    """clip(gain * image + offset per channel)."""
    channels = image.shape[2]
    if channels == 3:
        matrix = np.zeros((3, 4))
        matrix[0, 0] = matrix[1, 1] = matrix[2, 2] = gain
        matrix[:, 3] = offset
        return cv2.transform(image, matrix)
    levels = np.arange(256.0)[:, None] * gain + np.asarray(offset, dtype=np.float64)
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    if channels <= 4:
        result = cv2.LUT(image, table.reshape(1, 256, channels))
        return result if result.ndim == 3 else result[:, :, None]
    return np.stack([table[:, c][image[:, :, c]] for c in range(channels)], axis=2)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Every channel times `factor`."""
    if factor == 1:
        return image
    return _affine(image, factor, [0.0] * image.shape[2])


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from the mean luma by `factor`; where there is no luma (C not 1 or 3) away from each channel's own mean."""
    if factor == 1:
        return image
    channels = image.shape[2]
    if channels == 3:
        mean = cv2.mean(image)
        middle = [sum(weight * value for weight, value in zip(LUMA, mean, strict=False))] * 3
    else:
        middle = image.reshape(-1, channels).mean(axis=0).tolist()
    return _affine(image, factor, [(1 - factor) * value for value in middle])


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from each pixel's own luma by `factor`. RGB only."""
    if factor == 1:
        return image
    matrix = np.tile(np.asarray(LUMA) * (1 - factor), (3, 1))
    matrix[0, 0] += factor
    matrix[1, 1] += factor
    matrix[2, 2] += factor
    return cv2.transform(image, matrix)


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
    """
    width = 2 * int(np.ceil(3 * sigma)) + 1
    width = min(width, kernel) if kernel else width
    if width < 3 or sigma < 0.2:  # below that, the neighbours weigh less than one level in 255
        return image
    return by_channels(
        lambda part: cv2.GaussianBlur(part, (width, width), sigma, borderType=cv2.BORDER_REFLECT_101), image
    )


def level_tables(mean: Sequence[float], std: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(C, 256) float32: each channel's normalised value of each level; and the same after solarising at 128."""
    levels = np.arange(256.0)
    plain, solarized = levels / 255, np.where(levels >= 128, 255 - levels, levels) / 255
    tables = [(t[None] - np.asarray(mean)[:, None]) / np.asarray(std)[:, None] for t in (plain, solarized)]
    return tables[0].astype(np.float32), tables[1].astype(np.float32)


def normalise(image: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Writes table[c][image[:, :, c]] to out[c]: (H, W, C) uint8 to (C, H, W) float32. One channel in is repeated."""
    planes = cv2.split(image) if image.shape[2] > 1 else [image] * len(out)
    for plane, levels, target in zip(planes, table, out, strict=True):
        cv2.LUT(plane, levels, dst=target)
