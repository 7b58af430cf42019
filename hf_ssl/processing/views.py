"""One view of one picture: what may vary (`ViewGroup`), one draw of it (`draw_view`), and the pixels (`render_view`).

A recipe is a list of groups; a group is a plain dict in JSON and a `ViewGroup` once checked. Order of the operations:
random resized crop with flips, rotation and shift, RandAugment, colour jitter in random order, grayscale, blur,
solarise, Cutout, erase; normalisation is left to the device. What needs RGB (saturation, hue, grayscale, RandAugment's
color) is left out where there are not exactly three channels.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import ops, randaugment

Range = tuple[float, float]
_TRIES = 10  # boxes tried before the centre is taken, as in torchvision
_DRAWS = 8 * _TRIES + 20  # uniform numbers per view, always, so that one field never moves the draws of another;
# a group with RandAugment or Cutout takes 2 + 4 * randaugment more
_JITTERS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class ViewGroup:
    """How `count` views are drawn: the checked values, made by `from_dict`. What a dict may say:

    - key: name of the tensor; groups of one key are concatenated along V in order. count: 0 leaves the group out.
    - size: pixels, or [height, width]; absent or None takes the processor's.
    - scale: [low, high] area of the crop, relative; None takes the largest centred crop of the view's shape.
    - ratio: [low, high] width / height of the crop, log-uniform.
    - interpolation: bicubic, bilinear (both antialiased) or nearest.
    - hflip, vflip, jitter_p, grayscale_p, blur_p, solarize_p, erase_p: probabilities per view.
    - rotation: r gives U(-r, r) degrees. translate: t gives U(-t, t) of the side in whole pixels. Both
      mirror the picture at its border.
    - brightness, contrast, saturation: b gives U(max(0, 1-b), 1+b), or [low, high].
    - hue: h gives U(-h, h) of a full circle, or [low, high].
    - blur_sigma: [low, high] pixels. blur_kernel: the kernel's widest side relative to the view's height, as in SimCLR
      (.1 is 23 pixels at 224); 0 is as wide as sigma asks, as in PIL, hence DINO and BYOL.
    - solarize_p: levels from 128 of 255 up are inverted.
    - erase_scale: [low, high] relative area of the one box that erase_p sets to the mean level (0 once normalised).
    - randaugment: operations per view, out of FixMatch's 14 with replacement (`randaugment.OPERATIONS`); 0 is none.
    - randaugment_p: probability of each of these operations.
    - randaugment_magnitude: m from 2 to 10; each operation draws a level of 10, at least 1 and below m.
    - cutout: side of Cutout's one grey square relative to the view's shorter side, in every view; 0 is none.
    - grid: n gives n * n patches, one from each cell of one crop, row by row or, with grid_shuffle, in random order;
      crop and flips are drawn once, all else per patch. 0 is no grid. grid_patch: the patch's side relative to its
      cell, in which it lies at random (64 of 85 pixels in PIRL and jigsaw puzzles).
    - crops_of: a key before it whose views' crops, flips, rotations and shifts are repeated at this group's size; no
      other field but count, their number, and interpolation then matters (DINOv3's Gram teacher).
    """

    size: tuple[int, int]
    key: str = "pixel_values"
    count: int = 1
    scale: Range | None = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    hflip: float = 0.0
    vflip: float = 0.0
    rotation: float = 0.0
    translate: float = 0.0
    brightness: Range = (1.0, 1.0)
    contrast: Range = (1.0, 1.0)
    saturation: Range = (1.0, 1.0)
    hue: Range = (0.0, 0.0)
    jitter_p: float = 1.0
    grayscale_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: Range = (0.1, 2.0)
    blur_kernel: float = 0.0
    solarize_p: float = 0.0
    erase_p: float = 0.0
    erase_scale: Range = (0.02, 0.33)
    randaugment: int = 0
    randaugment_p: float = 0.5
    randaugment_magnitude: int = 10
    cutout: float = 0.0
    grid: int = 0
    grid_patch: float = 64 / 85
    grid_shuffle: bool = False
    crops_of: str = ""

    @classmethod
    def from_dict(cls, fields: dict[str, Any], default_size: tuple[int, int], where: str = "views") -> "ViewGroup":
        """The checked group. Raises ValueError naming the field and what it may be, or the nearest one if unknown."""
        checked: dict[str, Any] = {}
        for name, value in fields.items():
            if name not in VIEW_FIELDS:
                raise ValueError(f"{where} has an unknown field {name!r}. {nearest(str(name), VIEW_FIELDS)}")
            try:
                checked[name] = _CHECKS[name](value)
            except _BadField as error:
                raise ValueError(f"{where}: {name} must be {error}, not {value!r}.") from None
        checked["size"] = checked.get("size") or default_size
        if (cells := checked.get("grid", 0) ** 2) and checked.setdefault("count", cells) != cells:
            raise ValueError(f"{where}: count must be {cells}, a patch from each cell of its grid, or left out.")
        return cls(**checked)

    @property
    def kernel_pixels(self) -> int:
        """The blur kernel's widest side, odd: SimCLR's size // 10, a pixel more where that is even. 0 is no limit."""
        return int(self.size[0] * self.blur_kernel) // 2 * 2 + 1 if self.blur_kernel else 0


VIEW_FIELDS = tuple(field.name for field in dataclasses.fields(ViewGroup))


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that points from a misspelt name to the nearest known one."""
    names = list(known)
    similarity = [difflib.SequenceMatcher(None, name, other).ratio() for other in names]
    best = max(similarity)  # of two equally near names the first wins, unlike difflib.get_close_matches
    if best < 0.4:
        return f"Known are: {', '.join(sorted(names))}."
    return f"Did you mean {names[similarity.index(best)]!r}?"


class _BadField(Exception):
    """Says what the field must be."""


def _number(low: float, high: float, what: str) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise _BadField(what)
        return float(value)

    return check


def _range(low: float, high: float, what: str) -> Callable[[Any], Range]:
    number = _number(low, high, what)

    def check(value: Any) -> Range:
        if not isinstance(value, (list, tuple)) or len(value) != 2 or number(value[0]) > number(value[1]):
            raise _BadField(what)
        return float(value[0]), float(value[1])

    return check


def _jitter(value: Any) -> Range:
    what = "a finite number from 0 up, or [low, high] of such"
    if isinstance(value, (list, tuple)):
        return _range(0.0, 1e6, what)(value)
    half = _number(0.0, 1e6, what)(value)
    return max(0.0, 1 - half), 1 + half


def _hue(value: Any) -> Range:
    what = "a number from 0 to .5, or [low, high] within -.5 to .5"
    if isinstance(value, (list, tuple)):
        return _range(-0.5, 0.5, what)(value)
    half = _number(0.0, 0.5, what)(value)
    return -half, half


def _is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int, high: float, what: str) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not _is_whole(value, low, high):
            raise _BadField(what)
        return value

    return check


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _BadField("true or false")
    return value


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or not all(_is_whole(v, 1) for v in pair):
        raise _BadField("a whole number of pixels or [height, width]")
    return pair[0], pair[1]


def _key(value: Any) -> str:
    if not isinstance(value, str) or not value.isidentifier():
        raise _BadField("a name such as 'pixel_values'")
    return value


def _interpolation(value: Any) -> str:
    if not isinstance(value, str) or value not in ops.INTERPOLATIONS:
        raise _BadField(f"one of {', '.join(ops.INTERPOLATIONS)}")
    return value


_probability = _number(0.0, 1.0, "a probability from 0 to 1")
_area = _range(1e-6, 1.0, "[low, high] above 0 and up to 1")
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "key": _key,
    "count": _whole(0, math.inf, "a whole number from 0 up"),
    "crops_of": lambda value: value and _key(value),
    "size": _size,
    "scale": lambda value: None if value is None else _area(value),
    "ratio": _range(0.01, 100.0, "[low, high] of width / height, .01 to 100"),
    "interpolation": _interpolation,
    "rotation": _number(0.0, 180.0, "degrees from 0 to 180"),
    "translate": _number(0.0, 0.5, "a share of the side from 0 to .5"),
    "hue": _hue,
    "blur_sigma": _range(0.0, 100.0, "[low, high] in pixels, 0 to 100"),
    "blur_kernel": _number(0.0, 1.0, "a share of the view's height from 0 to 1"),
    "erase_scale": _area,
    "randaugment": _whole(0, math.inf, "a whole number from 0 up"),
    "randaugment_magnitude": _whole(2, randaugment.TOP_LEVEL, "a whole number from 2 to 10"),
    "cutout": _number(0.0, 1.0, "a share of the view's shorter side from 0 to 1"),
    "grid": _whole(0, 100, "a whole number of cells per side, 0 to 100"),
    "grid_patch": _number(1e-6, 1.0, "a share of the cell's side, above 0 and up to 1"),
    "grid_shuffle": _yes_or_no,
    **dict.fromkeys(("brightness", "contrast", "saturation"), _jitter),
    **dict.fromkeys(
        ("hflip", "vflip", "jitter_p", "grayscale_p", "blur_p", "solarize_p", "erase_p", "randaugment_p"), _probability
    ),
}


class Draw(NamedTuple):
    """One view's random choices, all that `render_view` needs; the defaults leave an operation out."""

    box: ops.Box
    hflip: bool = False
    vflip: bool = False
    rotation: float = 0.0
    shift: tuple[int, int] = (0, 0)  # (down, right) in pixels
    jitter: tuple[tuple[str, float], ...] = ()  # (operation, factor) in the order to apply
    gray: bool = False
    sigma: float = 0.0
    solarize: bool = False
    erase: ops.Box | None = None
    randaugment: tuple[tuple[str, int], ...] = ()  # (operation, level, negative for the other direction) in order
    cutout: ops.Box | None = None


def _between(span: Range, uniform: float) -> float:
    return span[0] + (span[1] - span[0]) * uniform


def draw_box(uniform: Sequence[float], height: int, width: int, scale: Range, ratio: Range) -> ops.Box | None:
    """A box of random area and aspect in (height, width), from 40 uniform numbers: ten tries, None if none fits."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 4 * _TRIES, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[i])
        aspect = math.exp(low + (high - low) * uniform[i + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(uniform[i + 2] * (height - h + 1)), int(uniform[i + 3] * (width - w + 1)), h, w
    return None


def centre_box(height: int, width: int, ratio: Range) -> ops.Box:
    """The largest centred box whose width / height lies within `ratio`."""
    h, w = height, width
    if width < height * ratio[0]:
        h = min(max(round(width / ratio[0]), 1), height)
    elif width > height * ratio[1]:
        w = min(max(round(height * ratio[1]), 1), width)
    return (height - h) // 2, (width - w) // 2, h, w


def draw_view(group: ViewGroup, height: int, width: int, rng: np.random.Generator) -> Draw:
    """All choices for one view of a (height, width) picture. Takes as much from `rng` whatever the fields say, and
    where the group has RandAugment or Cutout a second block that depends on `randaugment` alone."""
    uniform: list[float] = rng.random(_DRAWS).tolist()
    at, size = 8 * _TRIES, group.size  # in front are the numbers of the crop and of the erased box
    keys, amounts = uniform[at : at + 4], uniform[at + 4 : at + 8]
    jittered, blurred, sigma, erased, hflip, vflip, angle, down, right, gray, solarized, _ = uniform[at + 8 :]
    if group.scale is None:
        box = centre_box(height, width, (size[1] / size[0], size[1] / size[0]))
    else:
        box = draw_box(uniform, height, width, group.scale, group.ratio) or centre_box(height, width, group.ratio)
    jitter: tuple[tuple[str, float], ...] = ()
    if jittered < group.jitter_p:
        spans = (group.brightness, group.contrast, group.saturation, group.hue)
        order = sorted(range(4), key=keys.__getitem__)
        jitter = tuple([(_JITTERS[i], _between(spans[i], amounts[i])) for i in order])
    strong: list[float] = []
    if group.randaugment or group.cutout:
        strong = rng.random(2 + 4 * group.randaugment).tolist()
    shift = (0, 0)
    if group.translate:
        slide = (-group.translate, group.translate)
        shift = (round(_between(slide, down) * size[0]), round(_between(slide, right) * size[1]))
    is_erased = erased < group.erase_p
    return Draw(
        box,
        hflip < group.hflip,
        vflip < group.vflip,
        _between((-group.rotation, group.rotation), angle) if group.rotation else 0.0,
        shift,
        jitter,
        gray < group.grayscale_p,
        _between(group.blur_sigma, sigma) if blurred < group.blur_p else 0.0,
        solarized < group.solarize_p,
        draw_box(uniform[4 * _TRIES : at], *size, group.erase_scale, (0.3, 3.3)) if is_erased else None,
        randaugment.draw_operations(strong[2:], group.randaugment_magnitude, group.randaugment_p) if strong else (),
        randaugment.draw_cutout(strong[:2], group.cutout, *size) if group.cutout else None,
    )


def draw_grid(group: ViewGroup, height: int, width: int, rng: np.random.Generator) -> list[Draw]:
    """All choices for the patches of one crop: a view's for each, of which the first says the crop and its flips, then
    a block of the places in the cells and of the order."""
    draws = [draw_view(group, height, width, rng) for _ in range(group.count)]
    cells, crop = group.grid, draws[0]
    top, left, rows, columns = crop.box
    down, right, order = rng.random((3, group.count)).tolist()
    shown = sorted(range(group.count), key=order.__getitem__) if group.grid_shuffle else range(group.count)
    for i, (row, column) in enumerate(divmod(cell, cells) for cell in shown):
        row, column = cells - 1 - row if crop.vflip else row, cells - 1 - column if crop.hflip else column
        y, tall = _in_cell(rows, row, group, down[i])
        x, wide = _in_cell(columns, column, group, right[i])
        draws[i] = draws[i]._replace(box=(top + y, left + x, tall, wide), hflip=crop.hflip, vflip=crop.vflip)
    return draws


def _in_cell(side: int, cell: int, group: ViewGroup, uniform: float) -> tuple[int, int]:
    """Where a patch starts in a crop of `side` pixels, and its length; at least a pixel in the smallest crop."""
    start, end = side * cell // group.grid, side * (cell + 1) // group.grid
    length = max(round((end - start) * group.grid_patch), 1)
    return start + int(uniform * max(end - start - length + 1, 0)), length


def shrink(draw: Draw, group: ViewGroup) -> float:
    """By how much the view shrinks its crop, at least; 1 where every pixel must be there."""
    return 1.0 if group.interpolation == "nearest" else min(draw.box[2] / group.size[0], draw.box[3] / group.size[1])


def shares(draw: Draw, shape: Sequence[int]) -> tuple[float, float, float, float, float]:
    """(left, top, width, height) of the crop as shares of a (height, width, ...) picture, and 1 if it is mirrored."""
    top, left, height, width = draw.box
    return left / shape[1], top / shape[0], width / shape[1], height / shape[0], float(draw.hflip)


def render_view(
    image: np.ndarray,
    draw: Draw,
    group: ViewGroup,
    fill: np.ndarray,
    out: np.ndarray,
    photometric: bool = True,
    shrunk: int = 1,
) -> None:
    """Writes the drawn view of a (H, W, C) uint8 picture to `out`, uint8 (height, width, C).

    fill: uint8 (C,), the level of what is erased. Without `photometric` only the geometry is done, up to RandAugment.
    shrunk: `image` is the picture that was drawn for at 1 / shrunk of its size.
    """
    view = ops.crop_resize(image, draw.box, group.size, group.interpolation, draw.hflip, draw.vflip, shrunk)
    if draw.rotation or draw.shift != (0, 0):
        view = ops.warp(view, draw.rotation, *draw.shift)
    view = randaugment.apply(view, draw.randaugment)
    if not photometric:
        out[:] = view
        return
    view = ops.jitter(view, draw.jitter)
    if draw.gray and view.shape[2] == 3:
        view = ops.grayscale(view)
    if draw.sigma:
        view = ops.blur(view, draw.sigma, group.kernel_pixels)
    out[:] = ops.solarize(view) if draw.solarize else view  # one grey channel becomes three
    for box, level in ((draw.cutout, randaugment.CUTOUT_GREY), (draw.erase, fill)):
        if box:  # written here, because `view` may be the given picture itself; solarising leaves this alone
            top, left, height, width = box
            out[top : top + height, left : left + width] = level
