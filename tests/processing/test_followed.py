"""Views that repeat the crops of others at another size: DINOv3's Gram teacher."""

import numpy as np
import pytest

from hf_ssl.processing import SSLImageProcessor

COLOUR = {"brightness": 0.4, "contrast": 0.4, "jitter_p": 1.0, "blur_p": 1.0, "solarize_p": 0.5}
GEOMETRY = {"scale": [0.1, 0.7], "hflip": 0.5, "vflip": 0.5, "rotation": 20.0, "translate": 0.1}


class Plain(SSLImageProcessor):
    size = {"height": 16, "width": 24}
    views = [
        {"key": "pixel_values", "count": 1, **GEOMETRY},
        {"key": "pixel_values", "count": 2, **GEOMETRY},
        {"key": "gram", "count": 0, "crops_of": "pixel_values"},
        {"key": "local", "count": 2, "size": 8, **GEOMETRY},
    ]


def draw(image: np.ndarray, seed: int = 0, **fields) -> dict[str, np.ndarray]:
    made = Plain(**fields)
    return made.draw([image] * made.num_views, np.random.default_rng(seed))


@pytest.fixture
def image(photo: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(photo[::5, ::4])


def test_the_same_pixels_at_the_same_size_where_there_is_no_colour(image: np.ndarray) -> None:
    drawn = draw(image, gram={"count": 3})
    np.testing.assert_array_equal(drawn["gram"], drawn["pixel_values"])
    coloured = draw(image, gram={"count": 3}, **COLOUR)  # fields for all groups colour the others alone
    np.testing.assert_array_equal(coloured["gram"], drawn["pixel_values"])
    assert not np.array_equal(coloured["pixel_values"], drawn["pixel_values"])


def test_the_others_are_drawn_as_without_them(image: np.ndarray) -> None:
    without, with_them = draw(image), draw(image, gram={"count": 3, "size": [32, 48]})
    assert set(with_them) - set(without) == {"gram"} and with_them["gram"].shape == (3, 32, 48, 3)
    for key, value in without.items():
        np.testing.assert_array_equal(with_them[key], value)


@pytest.mark.parametrize("seed", range(4))
def test_a_larger_one_shows_the_same_crop(image: np.ndarray, seed: int) -> None:
    """Averaged down to the small size it is the small view, up to what two resizings and a turned border differ by."""
    drawn = draw(image, seed, gram={"count": 3, "size": [64, 96]}, rotation=0.0)
    small = drawn["gram"].reshape(3, 16, 4, 24, 4, 3).mean((2, 4))
    inner = (slice(None), slice(3, -3), slice(3, -3))
    for own, view in zip(small[inner], drawn["pixel_values"][inner].astype(float)):
        assert np.abs(own - view).mean() < 6
        assert np.abs(own - view[:, ::-1]).mean() > 12  # a view that is mirrored, or not, would be noticed


def test_the_device_has_nothing_to_finish_for_them(image: np.ndarray) -> None:
    made = Plain(gram={"count": 3}, views_on="device", pixel_values=COLOUR)
    batch = made([image], seed=0)
    plain = Plain(gram={"count": 3})([image], seed=0)
    assert (batch["gram"] - plain["pixel_values"]).abs().max() < 1e-5


@pytest.mark.parametrize(("fields", "words"), [
    ({"gram": {"count": 2}}, "gram repeats the crops of pixel_values, of which 3 are drawn before it and not 2"),
    ({"gram": {"count": 2, "crops_of": "local"}}, "of which 0 are drawn before it"),
    ({"gram": {"crops_of": 3}}, "crops_of must be a name"),
])  # fmt: skip
def test_what_cannot_be_followed_is_said(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Plain(**fields)
    made = Plain(gram={"count": 3})
    with pytest.raises(ValueError, match="they must be drawn as well"):
        made.count_views(["gram"])
    assert made.count_views(["gram", "pixel_values"]) == 6 and Plain().model_input_names == ["pixel_values", "local"]
