"""Patches of a grid: one crop, a patch in each of its cells, colours of their own, and no other view's draw moved."""

import numpy as np
import pytest

from hf_ssl.processing import SSLImageProcessor
from hf_ssl.processing.views import ViewGroup, draw_grid, draw_view


def group(**fields) -> ViewGroup:
    return ViewGroup.from_dict({"grid": 3, **fields}, (32, 32))


def test_each_patch_lies_in_its_cell_of_one_crop() -> None:
    rng, recipe = np.random.default_rng(0), group(scale=[0.3, 1.0], hflip=0.5, vflip=0.5)
    twin = np.random.default_rng(0)
    places, flips = [], set()
    for _ in range(300):
        crop = draw_view(recipe, 200, 270, twin)  # the first patch's draw says the crop
        for _ in range(8):
            draw_view(recipe, 200, 270, twin)
        twin.random((3, 9))
        draws = draw_grid(recipe, 200, 270, rng)
        top, left, height, width = crop.box
        flips |= {(draw.hflip, draw.vflip) for draw in draws}
        assert {(draw.hflip, draw.vflip) for draw in draws} == {(crop.hflip, crop.vflip)}
        for cell, draw in enumerate(draws):
            row, column = divmod(cell, 3)
            row, column = 2 - row if crop.vflip else row, 2 - column if crop.hflip else column
            y, x, tall, wide = draw.box
            assert top + height * row // 3 <= y and y + tall <= top + height * (row + 1) // 3
            assert left + width * column // 3 <= x and x + wide <= left + width * (column + 1) // 3
            assert abs(tall - height / 3 * 64 / 85) <= 1 and abs(wide - width / 3 * 64 / 85) <= 1
            places.append((y - top - height * row // 3) / max(height // 3 - tall, 1))
    assert len(flips) == 4
    assert 0.45 < np.mean(places) < 0.55 and min(places) == 0 and max(places) >= 1  # anywhere in the cell


def test_colours_are_each_patchs_own() -> None:
    recipe = group(brightness=0.4, hue=0.2, grayscale_p=0.5, blur_p=0.5)
    draws = draw_grid(recipe, 90, 90, np.random.default_rng(1))
    assert len({draw.jitter for draw in draws}) == 9
    assert {draw.gray for draw in draws} == {False, True}


def test_shuffled_patches_come_in_every_order() -> None:
    recipe, rng = group(scale=None, grid_patch=1.0, grid_shuffle=True), np.random.default_rng(2)
    first = []
    for _ in range(900):
        boxes = [draw.box for draw in draw_grid(recipe, 90, 90, rng)]
        assert sorted(boxes) == [(30 * i, 30 * j, 30, 30) for i in range(3) for j in range(3)]
        first.append(boxes[0])
    counts = np.unique(first, axis=0, return_counts=True)[1]
    assert len(counts) == 9 and ((counts - 100) ** 2 / 100).sum() < 26.1  # chi-square, 8 degrees, p .001
    plain = draw_grid(group(scale=None, grid_patch=1.0), 90, 90, rng)
    assert [draw.box[:2] for draw in plain] == [(30 * i, 30 * j) for i in range(3) for j in range(3)]


def test_pixels_are_the_pictures_own() -> None:
    """A picture whose colour says the place: patches in order, mirrored with the crop."""
    y, x = np.mgrid[0:240, 0:240]
    picture = np.stack([y, x, 0 * x], -1).astype(np.uint8)
    fields = {"key": "patches", "grid": 2, "scale": None, "size": 60, "interpolation": "nearest", "grid_patch": 0.5}
    for hflip in (0.0, 1.0):
        made = SSLImageProcessor(size=32, views=[{**fields, "hflip": hflip}])
        patches = made.draw([picture] * 4, np.random.default_rng(0))["patches"]
        assert patches.shape == (4, 60, 60, 3)
        middle = patches.mean(axis=(1, 2)) // 120
        columns = [1, 0, 1, 0] if hflip else [0, 1, 0, 1]
        assert middle[:, :2].tolist() == [[row, column] for row, column in zip([0, 0, 1, 1], columns)]
        step = np.diff(patches[0, 0, :, 1].astype(int))
        assert set(step) == ({-1} if hflip else {1})


def test_all_patches_are_of_the_groups_first_picture() -> None:
    """A source that renders each view anew must not puzzle together two renderings."""
    views = [{"count": 1}, {"key": "patches", "grid": 2, "size": 8}, {"key": "last", "size": 8}]
    made = SSLImageProcessor(size=16, views=views)
    assert made.num_views == 6
    pictures = [np.full((40, 40, 3), level, np.uint8) for level in (10, 20, 30, 40, 50, 60)]
    drawn = made.draw(pictures, np.random.default_rng(0))
    assert [drawn[key].mean(axis=(1, 2, 3)).tolist() for key in drawn] == [[10], [20, 20, 20, 20], [60]]


def test_a_grid_moves_no_draw_before_it_and_repeats_by_seed() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    fields = {"count": 2, "hflip": 0.5, "brightness": 0.4, "blur_p": 0.5}
    plain, more = (
        SSLImageProcessor(size=16, views=[fields, *grids])(picture, seed=5)
        for grids in ([], [{"key": "patches", "grid": 3, "size": 8, "grid_shuffle": True, **fields, "count": 9}])
    )
    assert plain["pixel_values"].equal(more["pixel_values"])
    made = SSLImageProcessor(size=8, views=[{"grid": 2, "hue": 0.2, "blur_p": 1.0}], views_on="device")
    one, two = made(picture, seed=1), made(picture, seed=1)
    assert one["pixel_values"].shape == (1, 4, 3, 8, 8) and one["pixel_values"].equal(two["pixel_values"])


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_a_tiny_picture_gives_patches_of_at_least_a_pixel(side: int) -> None:
    for draw in draw_grid(group(scale=None), side, side, np.random.default_rng(0)):
        y, x, tall, wide = draw.box
        assert min(tall, wide) >= 1 and min(y, x) >= 0 and y + tall <= side and x + wide <= side


@pytest.mark.parametrize(("fields", "words"), [
    ({"count": 8}, "count must be 9, a patch from each cell of its grid"),
    ({"grid": -1}, "grid must be a whole number"), ({"grid": 1.5}, "grid must be a whole number"),
    ({"grid_patch": 0}, "grid_patch must be a share"), ({"grid_shuffle": 1}, "grid_shuffle must be true or false"),
])  # fmt: skip
def test_bad_fields_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        group(**fields)
