"""Where each view was cut from, for methods that match places: the boxes, and that they change nothing else."""

import numpy as np
import pytest
import torch

from hf_ssl.processing import SSLImageProcessor

VIEWS = [
    {"key": "pixel_values", "count": 2, "hflip": 0.5, "scale": [0.1, 0.6], "brightness": 0.4},
    {"key": "small", "count": 3, "size": 8, "hflip": 1.0, "scale": None},
]


class PlainImageProcessor(SSLImageProcessor):
    size = 16
    views = VIEWS


class BoxedImageProcessor(PlainImageProcessor):
    _view_boxes = True


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize("views_on", ["host", "device"])
def test_boxes_change_no_pixel_and_take_no_random_number(image: np.ndarray, views_on: str) -> None:
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    plain = PlainImageProcessor(views_on=views_on).draw([image] * 5, first)
    boxed = BoxedImageProcessor(views_on=views_on).draw([image] * 5, second)
    assert set(boxed) - set(plain) == {"pixel_values_boxes", "small_boxes"}
    for key, value in plain.items():
        np.testing.assert_array_equal(boxed[key], value)
    assert first.random() == second.random()


def test_boxes_are_shares_of_the_picture(image: np.ndarray) -> None:
    processor = BoxedImageProcessor()
    drawn = processor.draw([image] * 5, np.random.default_rng(0))
    boxes, small = drawn["pixel_values_boxes"], drawn["small_boxes"]
    assert (boxes.dtype, boxes.shape, small.shape) == (np.float32, (2, 5), (3, 5))
    np.testing.assert_allclose(small, [[1 / 6, 0, 2 / 3, 1, 1]] * 3, rtol=1e-6)  # the largest centred square, mirrored
    left, top, width, height, mirrored = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (left + width <= 1.0001).all() and (top + height <= 1.0001).all()
    assert set(mirrored) <= {0.0, 1.0}
    before = boxes.copy()
    again = processor.draw([image] * 5, np.random.default_rng(1), out=drawn)
    assert again is drawn and not np.array_equal(boxes, before)  # written in place, as the collator wants it
    np.testing.assert_array_equal(boxes, processor.draw([image] * 5, np.random.default_rng(1))["pixel_values_boxes"])


def test_a_call_and_a_part_of_the_keys_have_them(image: np.ndarray) -> None:
    processor = BoxedImageProcessor()
    batch = processor([image, image[:, :30]], seed=0)
    assert batch["pixel_values_boxes"].shape == (2, 2, 5) and batch["small_boxes"].shape == (2, 3, 5)
    assert batch["pixel_values_boxes"].dtype == torch.float32
    assert not torch.equal(*batch["pixel_values_boxes"])
    assert list(processor.draw([image] * 3, np.random.default_rng(0), ["small"])) == ["small", "small_boxes"]


@pytest.mark.parametrize("field", ["vflip", "rotation", "translate"])
def test_what_boxes_cannot_tell_is_refused(field: str) -> None:
    assert PlainImageProcessor(**{field: 0.5})
    with pytest.raises(ValueError, match=r"views\[0\]: vflip, rotation and translate must be 0"):
        BoxedImageProcessor(**{field: 0.5})


def test_nothing_of_it_is_saved(image: np.ndarray) -> None:
    saved, plain = BoxedImageProcessor().to_dict(), PlainImageProcessor().to_dict()
    assert {**saved, "image_processor_type": ""} == {**plain, "image_processor_type": ""}
