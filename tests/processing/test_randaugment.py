"""FixMatch's strong view: each operation against PIL at the reference's values, the draws, Cutout's box, the order.

The values below are written out by hand from kekmodel/FixMatch-pytorch (dataset/randaugment.py: the pool, the order of
its roundings, `randint(1, m)`), not read from our table.
"""

from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from hf_ssl.processing import ops, randaugment
from hf_ssl.processing.views import Draw, ViewGroup, draw_view, render_view

FACTORS = [0.14, 0.23, 0.32, 0.41, 0.5, 0.59, 0.68, 0.77, 0.86]
BITS = [4, 4, 5, 5, 6, 6, 6, 7, 7]
DEGREES = [3, 6, 9, 12, 15, 18, 21, 24, 27]
THRESHOLDS = [231, 205, 180, 154, 128, 103, 77, 52, 26]
SHARES = [0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24, 0.27]
PIXELS = {28: [0, 1, 2, 3, 4, 5, 5, 6, 7], 32: [0, 1, 2, 3, 4, 5, 6, 7, 8], 224: [6, 13, 20, 26, 33, 40, 47, 53, 60]}
SIGNED = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
# How far from PIL: the most a level may differ, or the share of pixels that may come from a neighbour (see `_warp`:
# both take the nearest pixel, from coordinates rounded to other fractions; at shear .12 whole rows lie on a tie).
MOST = {"brightness": 1, "color": 1, "contrast": 1, "sharpness": 2}
ELSEWHERE = {"rotate": 0.003, "shear_x": 0.04, "shear_y": 0.04}


def by_pil(name: str, picture: Image.Image, level: int) -> Image.Image:
    """The reference's operation at a level of 1 to 9, negative for its other sign."""
    at, sign, side = abs(level) - 1, np.sign(level), picture.size[0]
    affine = {
        "shear_x": (1, sign * SHARES[at], 0, 0, 1, 0), "shear_y": (1, 0, 0, sign * SHARES[at], 1, 0),
        "translate_x": (1, 0, sign * PIXELS[side][at], 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * PIXELS[side][at]),
    }  # fmt: skip
    if name in affine:
        return picture.transform(picture.size, Image.Transform.AFFINE, affine[name])
    enhancers = {"brightness": "Brightness", "color": "Color", "contrast": "Contrast", "sharpness": "Sharpness"}
    if name in enhancers:
        return getattr(ImageEnhance, enhancers[name])(picture).enhance(FACTORS[at])
    others = {
        "autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize, "identity": lambda p: p,
        "posterize": lambda p: ImageOps.posterize(p, BITS[at]), "rotate": lambda p: p.rotate(sign * DEGREES[at]),
        "solarize": lambda p: ImageOps.solarize(p, THRESHOLDS[at]),
    }  # fmt: skip
    return others[name](picture)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photo = Image.open(path).convert("RGB").crop((20, 40, 500, 460))
    dim = photo.resize((32, 32)).point(lambda level: 40 + level // 2)  # gives autocontrast something to do
    return [photo.resize((224, 224)), photo.resize((32, 32)), dim, photo.resize((28, 28)).convert("L")]


def as_array(picture: Image.Image) -> np.ndarray:
    array = np.array(picture)
    return array if array.ndim == 3 else array[:, :, None]


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_an_operation_is_pil_s_at_every_level(pictures, name):
    assert len(randaugment.OPERATIONS) == 14
    for picture in pictures:
        image = as_array(picture)
        for level in [*range(1, 10), *(range(-9, 0) if name in SIGNED else [])]:
            ours = randaugment.apply(image, [(name, level)]).astype(int)
            difference = np.abs(ours - as_array(by_pil(name, picture, level))).max(axis=2)
            if name in ELSEWHERE:
                assert (difference > 0).mean() <= ELSEWHERE[name], (image.shape, level)
            else:
                assert difference.max() <= MOST.get(name, 0), (image.shape, level)


def test_shears_are_exact_off_the_ties(pictures):
    for picture in pictures:
        for name in ("shear_x", "shear_y"):
            for level in (-9, -7, -5, -2, 1, 3, 6, 8):
                ours = randaugment.apply(as_array(picture), [(name, level)])
                np.testing.assert_array_equal(ours, as_array(by_pil(name, picture, level)))


def test_spreading_the_levels_of_odd_pictures():
    """Flat, nearly flat, and too small for 255 steps: PIL leaves or clips them."""
    rng = np.random.default_rng(0)
    flat, dot = np.full((20, 20, 1), 7, np.uint8), np.full((20, 20, 1), 7, np.uint8)
    dot[3, 4] = 200
    noise = [rng.integers(0, 256, (side, side, 1), dtype=np.uint8) for side in (3, 17, 20, 23)]
    for image in [flat, dot, 255 - dot, *noise, np.where(noise[2] < 200, 0, noise[2])]:
        for name, theirs in (("autocontrast", ImageOps.autocontrast), ("equalize", ImageOps.equalize)):
            expected = as_array(theirs(Image.fromarray(image[:, :, 0])))
            np.testing.assert_array_equal(randaugment.apply(image, [(name, 1)]), expected)


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_any_channel_count_and_the_picture_given_stays(channels):
    image = np.random.default_rng(1).integers(20, 220, (30, 34, channels), dtype=np.uint8)
    before = image.copy()
    for name in randaugment.OPERATIONS:
        result = randaugment.apply(image, [(name, 5)])
        assert (result.dtype, result.shape) == (np.uint8, image.shape), name
        for c in range(channels if channels != 3 or name not in ("color", "contrast") else 0):
            alone = randaugment.apply(np.ascontiguousarray(image[:, :, c : c + 1]), [(name, 5)])
            np.testing.assert_array_equal(alone[:, :, 0], result[:, :, c], err_msg=name)
        if name not in ("identity", "color"):
            assert not np.array_equal(result, image), name
    if channels != 3:
        np.testing.assert_array_equal(randaugment.apply(image, [("color", 1)]), image)
    np.testing.assert_array_equal(image, before)
    for shape in ((1, 1), (1, 5), (2, 3)):
        tiny = np.full((*shape, channels), 9, np.uint8)
        assert all(randaugment.apply(tiny, [(name, 9)]).shape == tiny.shape for name in randaugment.OPERATIONS)


def group(**fields) -> ViewGroup:
    return ViewGroup.from_dict({"scale": None, **fields}, (32, 32))


def draws(count: int, **fields) -> list[Draw]:
    rng, recipe = np.random.default_rng(0), group(**fields)
    return [draw_view(recipe, 40, 40, rng) for _ in range(count)]


def test_what_is_drawn():
    """Over 28 000 slots: half act, 14 operations alike, levels 1 to 9 alike, half of the signs negative."""
    slots = 28000
    drawn = [d.randaugment for d in draws(slots // 2, randaugment=2)]
    applied = [pair for chosen in drawn for pair in chosen]
    assert abs(len(applied) / slots - 0.5) < 0.01
    assert np.allclose([sum(len(d) == n for d in drawn) / len(drawn) for n in range(3)], [0.25, 0.5, 0.25], atol=0.015)
    names, levels = Counter(name for name, _ in applied), Counter(abs(level) for _, level in applied)
    assert set(names) == set(randaugment.OPERATIONS)
    assert all(abs(n / len(applied) - 1 / 14) < 0.009 for n in names.values()), names
    assert sorted(levels) == list(range(1, 10))
    assert all(abs(n / len(applied) - 1 / 9) < 0.011 for n in levels.values()), levels
    mean = np.mean([abs(level) for _, level in applied if level < 0])
    assert abs(mean - 5) < 0.15  # the sign says nothing of the level, nor does the operation
    for name in randaugment.OPERATIONS:
        assert abs(np.mean([abs(level) for chosen, level in applied if chosen == name]) - 5) < 0.35, name
        negative = np.mean([level < 0 for chosen, level in applied if chosen == name])
        assert abs(negative - 0.5) < 0.06 if name in SIGNED else negative == 0, name
    pairs = [(a, b) for (a, _), (b, _) in (d for d in drawn if len(d) == 2)]
    assert abs(np.mean([a == b for a, b in pairs]) - 1 / 14) < 0.015  # with replacement
    low = {abs(level) for d in draws(500, randaugment=3, randaugment_magnitude=4) for _, level in d.randaugment}
    assert low == {1, 2, 3}
    assert all(len(d.randaugment) == 3 for d in draws(50, randaugment=3, randaugment_p=1.0))
    assert not any(d.randaugment for d in draws(50, randaugment=3, randaugment_p=0.0))
    assert not any(d.cutout for d in draws(50, randaugment=3))


def test_the_cutout_box():
    boxes = np.array([d.cutout for d in draws(6000, cutout=0.5)])
    assert boxes[:, 2:].max() == 16
    assert boxes[:, 2:].min() == 8  # half of it, about the very corner
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 32).all()
    starts = np.where(boxes[:, :2] > 0, boxes[:, :2], boxes[:, 2:] - 16)  # cut at the first border: the end tells it
    for axis in (0, 1):
        counts = Counter((starts[:, axis] + 8).tolist())
        assert sorted(counts) == list(range(32))
        assert max(abs(n / 6000 - 1 / 32) for n in counts.values()) < 0.009, counts
    assert abs(np.corrcoef(starts.T)[0, 1]) < 0.05
    assert randaugment.draw_cutout((0.5, 0.99), 0.5, 20, 40) == (5, 34, 10, 6)
    assert randaugment.draw_cutout((0.0, 0.0), 0.01, 20, 40) == (0, 0, 1, 1)
    assert randaugment.draw_cutout((0.999, 0.0), 1.0, 20, 40) == (9, 0, 11, 10)


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_the_order_is_weak_part_then_operations_then_cutout(channels):
    """By hand, from our own operations; the box is level 127 whatever came before, jitter and solarising too."""
    image = np.random.default_rng(2).integers(0, 256, (32, 32, channels), dtype=np.uint8)
    before, recipe = image.copy(), group()
    fill = np.arange(100, 100 + channels, dtype=np.uint8)
    out = np.empty((32, 32, channels), np.uint8)
    chosen = (("contrast", 2), ("rotate", -4))  # the other way round, the black corners would turn grey
    draw = Draw((0, 0, 32, 32), True, shift=(3, -2), randaugment=chosen, cutout=(20, 5, 12, 9))
    render_view(image, draw, recipe, fill, out)
    view = ops.warp(np.ascontiguousarray(image[:, ::-1]), 0.0, 3, -2)
    view = randaugment.rotate(ops.contrast(view, 0.23), -12)
    assert (view[0, 0] == 0).all()
    view[20:32, 5:14] = 127
    np.testing.assert_array_equal(out, view)
    late = draw._replace(jitter=(("brightness", 0.3),), solarize=True, gray=True, sigma=1.0)
    render_view(image, late._replace(erase=(2, 3, 4, 5)), recipe, fill, out)
    assert (out[20:32, 5:14] == 127).all()
    assert not (out[16:20] == 127).all()
    assert (out[2:6, 3:8] == fill).all()
    swapped = draw._replace(randaugment=chosen[::-1])
    render_view(image, swapped, recipe, fill, out)
    assert not np.array_equal(out, view)
    only = Draw((0, 0, 32, 32), cutout=(20, 5, 12, 9))  # nothing before it made a copy
    render_view(image, only, recipe, fill, out)
    np.testing.assert_array_equal(image, before)
