"""Datasets that are files on this machine: folders of images, shards, and Debian's Fashion-MNIST."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_ssl.data.shards import SourceError

if TYPE_CHECKING:
    from datasets import Dataset

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IMAGE_EXTENSIONS = frozenset(
    {
        *(
            ".jpg",
            ".jpeg",
            ".jpe",
            ".jfif",
            ".png",
            ".apng",
            ".bmp",
            ".dib",
            ".gif",
            ".webp",
            ".avif",
            ".tif",
            ".tiff",
        ),
        *(".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"),
    }
)
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _SPLIT_NAMES.items() for name in names}


def pick_split(spec: str, split: str, available: Iterable[str]) -> str:
    """The name under which `available` holds `split` (val is validation); SourceError lists what there is."""
    available = list(available)
    for name in available:
        if name == split or _SPLIT_OF.get(name, name) == _SPLIT_OF.get(split, split):
            return name
    raise SourceError(f"{spec} has no split {split!r}; it has {', '.join(available) or 'none'}.")


def walk(root: str) -> list[str]:
    """All visible files below `root`, relative to it and sorted; links are followed, but not in circles."""
    files, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        files += [os.path.relpath(os.path.join(folder, name), root) for name in names if not name.startswith(".")]
    return sorted(files)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def image_folder(spec: str, root: str, images: list[str], split: str) -> Dataset:
    """The pictures below `root` by path, none opened; a `label` where each lies in exactly one class folder."""
    import datasets

    parts = [name.split(os.sep) for name in images]
    tops = {part[0] for part in parts if len(part) > 1}
    splits = {top for top in tops if top in _SPLIT_OF}
    # "train" alone among other folders may well be a class (of vehicles)
    if any(_SPLIT_OF[top] == "train" for top in splits) and (len(splits) > 1 or len(tops) == 1):
        parts = [part for part in parts if part[0] in splits]
        chosen, depth = pick_split(spec, split, sorted(splits)), 1
    else:
        pick_split(spec, split, ["train"])
        chosen, depth = None, 0
    columns: dict[str, list] = {"image": []}
    features = datasets.Features(image=datasets.Image(decode=False))
    classes = sorted({part[depth] for part in parts})
    if len(classes) > 1 and all(len(part) == depth + 2 for part in parts):
        # one numbering over all splits, so that a class has the same number in each
        columns["label"], features["label"] = [], datasets.ClassLabel(names=classes)
    for part in parts:
        if chosen in (None, part[0]):
            columns["image"].append(os.path.join(os.path.abspath(root), *part))
            if "label" in columns:
                columns["label"].append(classes.index(part[depth]))
    return datasets.Dataset.from_dict(columns, features=features)


def shard_files(spec: str, files: list[str], split: str) -> tuple[list[str], str]:
    """The files of one split and its name. Files (or their folders) named train..., test... are the splits."""
    groups: dict[str, list[str]] = {}
    for file in files:
        words = [
            re.split(r"[-_.]", name)[0] for name in (os.path.basename(file), os.path.basename(os.path.dirname(file)))
        ]
        groups.setdefault(next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), ""), []).append(file)
    if "" in groups or "train" not in groups:
        groups = {"train": files}
    name = pick_split(spec, split, groups)
    return groups[name], name


def fashion_mnist(split: str) -> tuple[Dataset, str]:
    """Debian's dataset-fashion-mnist, (28, 28) grey, as undecoded PGM files in memory, and the split's name."""
    import datasets
    import pyarrow as pa

    split = pick_split("fashion-mnist", split, ["train", "test"])
    stem = FASHION_MNIST / ("train" if split == "train" else "t10k")
    try:
        with gzip.open(f"{stem}-images-idx3-ubyte.gz") as images, gzip.open(f"{stem}-labels-idx1-ubyte.gz") as labels:
            pixels = np.frombuffer(images.read(), np.uint8, offset=16).reshape(-1, 28 * 28)
            classes = np.frombuffer(labels.read(), np.uint8, offset=8)
    except FileNotFoundError as error:
        raise SourceError(
            f"fashion-mnist is a Debian package that is not installed here ({error.filename} is missing). "
            "Install it with `apt-get install dataset-fashion-mnist`."
        ) from error
    # a PGM file is this header and the raw pixels: undecoded rows like any other, at no cost
    header = np.frombuffer(b"P5 28 28 255\n", np.uint8)
    files = np.concatenate([np.broadcast_to(header, (len(pixels), header.size)), pixels], axis=1)
    ends = pa.py_buffer(np.arange(len(files) + 1, dtype=np.int32) * files.shape[1])
    contents = pa.Array.from_buffers(pa.binary(), len(files), [None, ends, pa.py_buffer(files)])
    image = pa.StructArray.from_arrays([contents, pa.nulls(len(files), pa.string())], ["bytes", "path"])
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot"]
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names))
    table = pa.table({"image": image, "label": pa.array(classes.astype(np.int64))})
    return datasets.Dataset(datasets.table.InMemoryTable(table.cast(features.arrow_schema))), split
