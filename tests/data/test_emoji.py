import io

import numpy as np
import pytest
from PIL import Image

from hf_ssl.data import emoji


def drawing(row: dict) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA"))


@pytest.fixture(scope="module")
def rows():
    return emoji.load_emoji("all")


def test_counts_columns_and_size(rows):
    assert emoji.ASSET.stat().st_size <= 9_000_000
    assert rows.column_names == ["image", "code_point", "style", "name", "keywords", "group", "subgroup", "split"]
    assert len(rows) == 2 * 1892
    assert len(set(rows["code_point"])) == 1892
    assert len(set(rows["group"])) == 9
    assert len(set(rows["subgroup"])) == 98
    assert all(rows["name"]) and all(rows["keywords"])


def test_every_code_point_has_both_styles_with_one_name_and_group(rows):
    columns = rows.remove_columns("image").to_pandas()
    for _, pair in columns.groupby("code_point"):
        assert sorted(pair["style"]) == ["google", "twitter"]
        assert pair[["name", "group", "subgroup", "split"]].nunique().max() == 1


def test_split_is_by_code_point_and_variants_stay_together(rows):
    train, test = emoji.load_emoji("train"), emoji.load_emoji("test")
    assert len(train) + len(test) == len(rows)
    assert set(train["split"]) == {"train"} and set(test["split"]) == {"test"}
    assert not set(train["code_point"]) & set(test["code_point"])
    assert len(test) == 2 * 378
    side = dict(zip(rows["code_point"], rows["split"], strict=True))
    # person, man, woman running; health worker; prince and princess; Romania and Chad (the same flag)
    for variants in (
        ("1F3C3", "1F3C3-200D-2642-FE0F", "1F3C3-200D-2640-FE0F", "1F3C3-200D-27A1-FE0F"),
        ("1F9D1-200D-2695-FE0F", "1F468-200D-2695-FE0F", "1F469-200D-2695-FE0F"),
        ("1F934", "1F478"),
        ("1F1F7-1F1F4", "1F1F9-1F1E9"),
    ):
        assert len({side[variant] for variant in variants}) == 1, variants


def test_no_test_drawing_is_in_train():
    held_out = {drawing(row).tobytes() for row in emoji.load_emoji("test")}
    assert not any(drawing(row).tobytes() in held_out for row in emoji.load_emoji("train"))


def test_rows_are_undecoded_and_64_px(rows):
    row = rows[0]
    assert isinstance(row["image"]["bytes"], bytes) and row["image"]["path"] == "google/1f600.webp"
    assert row["name"] == "grinning face" and row["group"] == "smileys-emotion"
    assert drawing(row).shape == (64, 64, 4)


def test_file_opens_as_an_image_column_and_carries_its_licences(tmp_path):
    import pyarrow.parquet as pq
    from datasets import Dataset

    opened = Dataset.from_parquet(str(emoji.ASSET), cache_dir=str(tmp_path))
    assert opened[0]["image"].size == (64, 64) and opened[0]["image"].mode == "RGBA"
    metadata = pq.read_schema(emoji.ASSET).metadata
    for name, words in (("google", b"Apache License"), ("twitter", b"Attribution 4.0"), ("names", b"MIT License")):
        assert words in metadata[f"licence:LICENSE-emoji-{name}".encode()]
        assert words in (emoji.ASSET.parent / f"LICENSE-emoji-{name}.txt").read_bytes()


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"'validation'.*train, test, all"):
        emoji.load_emoji("validation")


def test_centre_is_exact():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]], [[0, 100, 255, 51], [255, 0, 0, 128]]], np.uint8)
    # 0.2 * 0 + 0.8 * 255 = 204; 0.2 * 100 + 204 = 224; red at 128/255 leaves 127 of white
    expected = [[[10, 20, 30], [255, 255, 255]], [[204, 224, 255], [255, 127, 127]]]
    assert emoji.centre(rgba).tolist() == expected


def test_placement_is_seeded_and_inside_the_canvas(rows):
    rgba = np.full((64, 64, 4), (255, 255, 255, 255), np.uint8)
    for seed in range(200):
        picture, mask = emoji.place(rgba, np.random.default_rng(seed), return_mask=True)
        again = emoji.place(rgba, np.random.default_rng(seed))
        assert np.array_equal(picture, again)
        ys, xs = np.nonzero(mask)
        side = ys.max() - ys.min() + 1
        # A solid square stays a whole solid square: nothing was cut off at the border.
        assert side == xs.max() - xs.min() + 1 and mask.sum() == side**2 and 32 <= side <= 64
        assert (picture[mask] == 255).all()
        assert len(np.unique(picture[~mask], axis=0)) <= 1
    assert not np.array_equal(emoji.place(rgba, np.random.default_rng(0)), emoji.place(rgba, np.random.default_rng(1)))


@pytest.mark.parametrize("size", [32, 40, 64, 96])
def test_mask_agrees_with_alpha(rows, size):
    rgba = drawing(rows[100])
    for seed in range(20):
        picture, mask = emoji.place(rgba, np.random.default_rng(seed), size=size, return_mask=True)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8 and mask.shape == (size, size)
        draws = np.random.default_rng(seed).random(6)
        side = round((0.5 + 0.5 * draws[0]) * size)
        assert abs(mask.sum() - (rgba[..., 3] >= emoji.FOREGROUND_ALPHA).mean() * side**2) < 0.04 * side**2
        background = (draws[3:] * 256).astype(np.uint8)
        assert (picture[mask] != background).any(1).mean() > 0.9


def test_placement_has_no_fringe():
    # Opaque white next to transparent black: resizing straight alpha would draw a rim darker than the background.
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[16:48, 16:48] = 255
    for seed in range(20):
        background = (np.random.default_rng(seed).random(6)[3:] * 256).astype(int)
        picture = emoji.place(rgba, np.random.default_rng(seed)).astype(int)
        assert (picture - background).min() >= -1
