"""What a person has in memory, as a dataset of the `datasets` library: lists, columns, splits, torch datasets."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hf_ssl.data.decode import BadImageError, decode_image
from hf_ssl.data.shards import SourceError

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes that PNG holds as they are


def is_dataset(data: Any) -> bool:
    """Whether `data` is a Dataset or IterableDataset of the `datasets` library."""
    return hasattr(data, "column_names") and hasattr(data, "features") and not isinstance(data, Mapping)


def pick(data: Any, split: str) -> Any:
    """The split of a mapping of datasets, such as a DatasetDict; other data as it is. SourceError: no such split."""
    if not isinstance(data, Mapping) or not data or not all(is_dataset(part) for part in data.values()):
        return data
    if split not in data:
        raise SourceError(f"The datasets given have no split {split!r}; there are {', '.join(map(str, data))}.")
    return data[split]


def in_memory(data: Any, image_column: str | None = None) -> Any:
    """A Dataset of a list of images or rows, a dict or table of columns, or a torch dataset; None for anything else.

    A row is a dict with an image, an (image, label) pair, or an image alone; an image is a PIL image, an array or
    tensor (H, W), (H, W, C) or (C, H, W), the bytes of a file or its path. Everything is read once and held in memory,
    pictures as lossless PNG; where `data.classes` names the classes, as torchvision's datasets do, labels are named.
    Raises SourceError for an item that is none of these.
    """
    import datasets

    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # pandas
        data = data.to_dict("list")
    if isinstance(data, Mapping):
        data = _Columns(data)
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return None
    rows = [_row(_item(data, i), i, image_column) for i in range(len(data))]
    if not rows:
        raise SourceError("The list of images given is empty.")
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    try:
        dataset = datasets.Dataset.from_dict(columns)
    except Exception as error:  # Arrow's, for columns that mix types
        raise SourceError(f"The rows given make no dataset: {type(error).__name__}: {error}") from error
    features = datasets.Features(dataset.features)
    for name, kind in dataset.features.items():
        if isinstance(kind, dict) and set(kind) == {"bytes", "path"}:
            features[name] = datasets.Image(decode=False)
    classes = getattr(data, "classes", None)
    if classes is not None and features.get("label") == datasets.Value("int64"):
        features["label"] = datasets.ClassLabel(names=[str(name) for name in classes])
    return datasets.Dataset(dataset.data.table.cast(features.arrow_schema))


def _item(data: Any, number: int) -> Any:
    try:
        return data[number]
    except Exception as error:  # a torch dataset from elsewhere may raise anything
        raise SourceError(
            f"Item {number} of the images given cannot be read: {type(error).__name__}: {error}"
        ) from error


class _Columns:
    """A dict of columns of one length, by row."""

    def __init__(self, columns: Mapping[str, Any]):
        self.columns = columns
        lengths = {len(values) if hasattr(values, "__len__") else -1 for values in columns.values()}
        if len(lengths) != 1 or -1 in lengths:
            raise SourceError("A dict must hold datasets by split, or columns of one length by name.")
        self.length = lengths.pop()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {name: values[i] for name, values in self.columns.items()}


def _row(item: Any, number: int, image_column: str | None) -> dict[str, Any]:
    if isinstance(item, tuple) and len(item) == 2:
        item = {"image": item[0], "label": item[1]}
    elif not isinstance(item, Mapping) or {"bytes", "path"} & set(item):
        item = {"image": item}
    names = set(_image_columns(item, image_column))
    return {name: _stored(value, number) if name in names else _plain(value) for name, value in item.items()}


def _image_columns(row: Mapping[str, Any], asked: str | None) -> Iterator[str]:
    for name, value in row.items():
        if name == asked or name in IMAGE_NAMES or isinstance(value, Image.Image):
            yield name


def _plain(value: Any) -> Any:
    """A label or text as `datasets` stores it: a tensor or array without axes is its number."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _stored(value: Any, number: int) -> Any:
    """An image as {"bytes", "path"}; an array of other than 1, 3 or 4 channels as it is."""
    if value is None or (isinstance(value, Mapping) and {"bytes", "path"} & set(value)):
        return {"bytes": None, "path": None, **(value or {})}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, (str, Path)):
        return {"bytes": None, "path": str(value)}
    if isinstance(value, Image.Image):
        return {"bytes": _png(ImageOps.exif_transpose(value)), "path": None}
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.ndim not in (2, 3):
        raise SourceError(
            f"Item {number} of the images given is not an image but a {type(value).__name__} of shape {array.shape}: "
            "give PIL images, arrays (H, W, C), paths, (image, label) pairs, or rows with an image."
        )
    channels = channels_of(array.shape)
    if channels not in (1, 3, 4):
        return array
    try:
        pixels = decode_image(array, channels, f"item {number} of the images given")
    except BadImageError as error:
        raise SourceError(str(error)) from error
    return {"bytes": _png(Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)), "path": None}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    if image.mode in _AS_PNG:
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "TIFF")
    return buffer.getvalue()


def channels_of(shape: tuple[int, ...]) -> int:
    """Bands of an (H, W), (H, W, C) or (C, H, W) array: the smaller end, the last where both are equal."""
    return 1 if len(shape) < 3 else shape[2] if shape[2] <= shape[0] else shape[0]
