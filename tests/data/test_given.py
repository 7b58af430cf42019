"""Whatever a person has in memory becomes a source with the same pixels: lists, splits, columns, torch datasets."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_ssl.data.shards import SourceError
from hf_ssl.data.sources import load_source
from hf_ssl.data.stream import RowStream

RNG = np.random.default_rng(0)
ARRAYS = [RNG.integers(0, 256, (18 + i, 20, 3), dtype=np.uint8) for i in range(4)]
PICTURES = [Image.fromarray(array) for array in ARRAYS]
LABELS = [0, 1, 0, 1]
SQUARE = np.stack([array[:18] for array in ARRAYS])


class Pairs(torch.utils.data.Dataset):
    """As torchvision's folders: (image, label) and the names of the classes."""

    classes = ["cat", "dog"]

    def __len__(self):
        return len(PICTURES)

    def __getitem__(self, i):
        return PICTURES[i], LABELS[i]


class Rows(Pairs):
    """As many a Trainer's data set: dicts of tensors, pictures scaled to 0..1."""

    def __getitem__(self, i):
        pixels = torch.from_numpy(ARRAYS[i]).permute(2, 0, 1).float() / 255
        return {"image": pixels, "label": torch.tensor(LABELS[i]), "text": f"number {i}"}


class Torn(Pairs):
    def __getitem__(self, i):
        if i == 2:
            raise OSError("torn")
        return super().__getitem__(i)


def table():
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    return datasets.Dataset.from_dict({"image": PICTURES, "label": LABELS}, datasets.Features(kinds))


def rows():
    yield from ({"image": image, "label": label} for image, label in zip(PICTURES, LABELS))


GIVEN = {
    "dataset": table,
    "dataset as torch": lambda: table().with_format("torch"),
    "dataset with a transform": lambda: table().with_transform(lambda batch: {"pixel_values": [0]}),
    "splits": lambda: datasets.DatasetDict(train=table(), test=table().select([0])),
    "stream": lambda: table().to_iterable_dataset(num_shards=2),
    "stream as torch": lambda: table().to_iterable_dataset().with_format("torch"),
    "generator": lambda: datasets.IterableDataset.from_generator(rows),
    "images": lambda: PICTURES,
    "tuple": lambda: tuple(PICTURES),
    "arrays": lambda: ARRAYS,
    "tensors": lambda: [torch.from_numpy(array).permute(2, 0, 1) for array in ARRAYS],
    "pairs": lambda: list(zip(PICTURES, LABELS)),
    "rows": lambda: list(rows()),
    "columns": lambda: {"image": PICTURES, "label": LABELS},
    "table": lambda: table().to_pandas(),
    "torch pairs": Pairs,
    "torch rows": Rows,
}


@pytest.mark.parametrize("kind", GIVEN)
def test_everything_gives_the_same_pictures_and_labels(kind):
    source = load_source(GIVEN[kind]())
    found = [row for row, _ in zip(RowStream(source, 2, shuffle=False), range(4))]
    for row, expected in zip(found, ARRAYS):
        np.testing.assert_array_equal(source.image(row, 0), expected)
    if kind not in ("images", "tuple", "arrays", "tensors"):
        assert source.labels == ("label",) and [row["label"] for row in found] == LABELS
    if kind.startswith(("dataset", "splits", "torch", "stream")):
        assert source.dataset.features["label"].names == ["cat", "dog"]
    assert load_source(source) is source


def test_one_array_paths_bytes_and_other_channels(tmp_path):
    for batch in (SQUARE, torch.from_numpy(SQUARE).permute(0, 3, 1, 2)):
        source = load_source(batch)
        np.testing.assert_array_equal(np.stack([source.image(row, 0) for row in source.dataset]), SQUARE)
    for i, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.iterdir())
    for given in (files, [str(file) for file in files], [file.read_bytes() for file in files]):
        source = load_source(given)
        np.testing.assert_array_equal(source.image(source.dataset[3], 3), ARRAYS[3])
    for channels in (1, 4, 13):
        bands = RNG.integers(0, 256, (3, 20, 20, channels), dtype=np.uint8)
        source = load_source(list(bands), channels=channels)
        np.testing.assert_array_equal(source.image(source.dataset[1], 1), bands[1])
    assert load_source(list(RNG.integers(0, 256, (3, 20, 20, 13), dtype=np.uint8))).channels == 13


def test_a_picture_that_says_it_is_turned_is_turned_once_and_a_palette_stays(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURES[0].save(tmp_path / "turned.png", exif=exif)
    opened, palette = Image.open(tmp_path / "turned.png"), PICTURES[1].quantize(8)
    source = load_source([opened, palette, PICTURES[1].convert("CMYK")])
    turned, colours, cmyk = (source.image(row, 0) for row in source.dataset)
    np.testing.assert_array_equal(turned, np.rot90(ARRAYS[0], -1))
    np.testing.assert_array_equal(colours, np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(cmyk, ARRAYS[1])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "type int is not a dataset"),
        (None, "type NoneType is not a dataset"),
        (iter(PICTURES), "IterableDataset.from_generator"),
        (torch.utils.data.DataLoader(Pairs()), "type DataLoader is not a dataset"),
        ([], "empty"),
        ([5], "Item 0 of the images given is not an image but a int"),
        (Torn(), "Item 2 of the images given cannot be read: OSError: torn"),
        ([{"x": 1}], "no image column; its columns are x"),
        ({"a": [1], "b": [1, 2]}, "columns of one length"),
        (datasets.DatasetDict(test=datasets.Dataset.from_dict({"image": []})), "no split 'train'; there are test"),
    ],
)
def test_what_is_no_images_is_said(given, words):
    with pytest.raises(SourceError, match=words):
        load_source(given)
