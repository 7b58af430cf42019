"""FixMatch's strong augmentation: RandAugment's 14 operations and Cutout's box, on uint8 (H, W, C) with any C.

Ranges, draws and pixels follow the PyTorch FixMatch (kekmodel/FixMatch-pytorch, dataset/randaugment.py), which runs on
PIL; `OPERATIONS` holds all of them. Two things of its Cutout are left out: the box is one pixel too wide there, and is
cut off at the right and the lower border only.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from . import ops

TOP_LEVEL = 10  # the level at which an operation has its whole range
FILL = 0  # what rotation, shear and translation bring in from outside: black, which is what PIL does unless told
CUTOUT_GREY = 127  # of 255, in every channel


def _look_up(image: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """tables[c][image[:, :, c]] for (C, 256) tables, or one (256,) table for all channels."""
    if tables.ndim == 2:
        planes = zip(cv2.split(image), tables, strict=True)
        return cv2.merge([cv2.LUT(plane, table) for plane, table in planes]).reshape(image.shape)
    return cv2.LUT(image, tables).reshape(image.shape)


def autocontrast(image: np.ndarray, _: float = 0) -> np.ndarray:
    """Each channel's lowest level to 0 and its highest to 255; a channel of one level stays as it is."""
    tables = np.tile(np.arange(256, dtype=np.float64), (image.shape[2], 1))
    for table, plane in zip(tables, cv2.split(image), strict=True):
        low, high = cv2.minMaxLoc(plane)[:2]
        if high > low:
            table *= 255 / (high - low)
            table -= low * (255 / (high - low))
    return _look_up(image, np.clip(tables, 0, 255).astype(np.uint8))


def equalize(image: np.ndarray, _: float = 0) -> np.ndarray:
    """Each channel's levels spread to be about equally frequent, by PIL's rule (cv2.equalizeHist has another)."""
    tables = np.empty((image.shape[2], 256), np.uint8)
    for channel, table in enumerate(tables):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        used = np.flatnonzero(counts)
        step = (image.shape[0] * image.shape[1] - int(counts[used[-1]])) // 255
        if step == 0:  # one level alone, or too few pixels below the highest one
            table[:] = np.arange(256)
        else:
            table[:] = np.minimum((np.cumsum(counts) - counts + step // 2) // step, 255)
    return _look_up(image, tables)


def posterize(image: np.ndarray, bits: float) -> np.ndarray:
    """Keeps the highest `bits` bits of each level, 1 to 8."""
    return image & np.uint8(256 - (1 << (8 - int(bits))))


def solarize(image: np.ndarray, count: float) -> np.ndarray:
    """Inverts the highest `count` of the 256 levels."""
    levels = np.arange(256, dtype=np.uint8)
    return _look_up(image, np.where(levels >= 256 - count, 255 - levels, levels))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from each pixel's own luma by `factor`; no change where the picture is not RGB."""
    return ops.saturation(image, factor) if image.shape[2] == 3 else image


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from PIL's 3x3 smoothing (centre 5/13, neighbours 1/13 each) by `factor`; the outermost pixels stay."""
    share = (1 - factor) / 13  # of every pixel in the window, and of the centre four times more
    sharper = cv2.addWeighted(image, factor + 4 * share, cv2.blur(image, (3, 3)), 9 * share, 0).reshape(image.shape)
    sharper[0], sharper[-1], sharper[:, 0], sharper[:, -1] = image[0], image[-1], image[:, 0], image[:, -1]
    return sharper


def _warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The pixel that lies at `matrix` (2, 3) of each result pixel (x, y), measured from the corner as in PIL."""
    matrix = matrix.copy()
    matrix[:, 2] += (matrix[:, 0] + matrix[:, 1] - 1) / 2  # cv2 measures from the centre of the first pixel
    size = (image.shape[1], image.shape[0])
    flags, border = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP, cv2.BORDER_CONSTANT
    return ops.by_channels(
        lambda part: cv2.warpAffine(part, matrix, size, flags=flags, borderMode=border, borderValue=(FILL,) * 4), image
    )


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Counter-clockwise about the centre."""
    middle = np.array([image.shape[1] / 2, image.shape[0] / 2])
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[cos, -sin], [sin, cos]])
    return _warp(image, np.column_stack([turn, middle - turn @ middle]))


def shear_x(image: np.ndarray, slope: float) -> np.ndarray:
    """Every row moves left by `slope` of its distance from the top."""
    return _warp(image, np.array([[1, slope, 0], [0, 1, 0]], np.float64))


def shear_y(image: np.ndarray, slope: float) -> np.ndarray:
    """Every column moves up by `slope` of its distance from the left."""
    return _warp(image, np.array([[1, 0, 0], [slope, 1, 0]], np.float64))


def translate_x(image: np.ndarray, share: float) -> np.ndarray:
    """Left by `share` of the width, in whole pixels, rounded towards 0."""
    pixels = int(share * image.shape[1])
    moved = np.full_like(image, FILL)
    if pixels >= 0:
        moved[:, : image.shape[1] - pixels] = image[:, pixels:]
    else:
        moved[:, -pixels:] = image[:, :pixels]
    return moved


def translate_y(image: np.ndarray, share: float) -> np.ndarray:
    """Up by `share` of the height, in whole pixels, rounded towards 0."""
    pixels = int(share * image.shape[0])
    moved = np.full_like(image, FILL)
    if pixels >= 0:
        moved[: image.shape[0] - pixels] = image[pixels:]
    else:
        moved[-pixels:] = image[:pixels]
    return moved


class Operation(NamedTuple):
    """At level v the value is span * v / TOP_LEVEL, cut to a whole number if `whole`, plus `start`."""

    apply: Callable[[np.ndarray, float], np.ndarray]
    span: float = 0.0
    start: float = 0.0
    whole: bool = False
    signed: bool = False  # a random sign

    def value(self, level: int) -> float:
        """What `apply` takes at this level, negative where the level is."""
        value = level * self.span / TOP_LEVEL  # in the reference's order, for equal whole pixels
        return (int(value) if self.whole else value) + self.start


OPERATIONS = {  # at levels 1 to 9, the ones that magnitude 10 draws
    "autocontrast": Operation(autocontrast),
    "brightness": Operation(ops.brightness, 0.9, 0.05),  # factor .14 to .86: only ever darker
    "color": Operation(color, 0.9, 0.05),  # likewise, so the highest level changes least
    "contrast": Operation(ops.contrast, 0.9, 0.05),
    "equalize": Operation(equalize),
    "identity": Operation(lambda image, _: image),
    "posterize": Operation(posterize, 4, 4, whole=True),  # bits 4 4 5 5 6 6 6 7 7
    "rotate": Operation(rotate, 30, whole=True, signed=True),  # 3 to 27 degrees
    "sharpness": Operation(sharpness, 0.9, 0.05),  # only ever smoother
    "shear_x": Operation(shear_x, 0.3, signed=True),  # .03 to .27
    "shear_y": Operation(shear_y, 0.3, signed=True),
    "solarize": Operation(solarize, 256, whole=True),  # levels from 231 up to from 26 up
    "translate_x": Operation(translate_x, 0.3, signed=True),  # .03 to .27 of the side
    "translate_y": Operation(translate_y, 0.3, signed=True),
}
_NAMES = tuple(OPERATIONS)


def draw_operations(uniform: Sequence[float], magnitude: int, probability: float) -> tuple[tuple[str, int], ...]:
    """(operation, level) in the order to apply, from four uniform numbers for each that may come: which one, whether,
    its level from 1 to magnitude - 1, its sign."""
    drawn = []
    for i in range(0, len(uniform), 4):
        if uniform[i + 1] < probability:
            name, level = _NAMES[int(uniform[i] * len(_NAMES))], 1 + int(uniform[i + 2] * (magnitude - 1))
            drawn.append((name, -level if OPERATIONS[name].signed and uniform[i + 3] < 0.5 else level))
    return tuple(drawn)


def draw_cutout(uniform: Sequence[float], share: float, height: int, width: int) -> ops.Box:
    """A square of `share` of the shorter side about a uniform pixel, from two numbers, clipped at all four borders."""
    side = max(round(share * min(height, width)), 1)
    top, left = int(uniform[0] * height) - side // 2, int(uniform[1] * width) - side // 2
    bottom, right = min(top + side, height), min(left + side, width)
    top, left = max(top, 0), max(left, 0)
    return top, left, bottom - top, right - left


def apply(image: np.ndarray, drawn: Sequence[tuple[str, int]]) -> np.ndarray:
    """The drawn operations one after the other, (H, W, C) uint8 in and out; the picture given is never written to."""
    for name, level in drawn:
        operation = OPERATIONS[name]
        image = operation.apply(image, operation.value(level))
    return image
