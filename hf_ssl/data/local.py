"""Datasets that are files on this machine: folders of images, shards, and Debian's Fashion-MNIST."""

from __future__ import annotations

import csv
import gzip
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hf_ssl.data.captions import FILE_COLUMN
from hf_ssl.data.shards import SourceError
from hf_ssl.documents import DocumentError, parse_json

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


def usual_split(split: str) -> str | None:
    """train, validation or test, for any of its usual names; None for another split."""
    return _SPLIT_OF.get(split)


def is_test(split: str) -> bool:
    """Whether `split` is a test split, by any of its usual names."""
    return usual_split(split) == "test"


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


def image_folder(spec: str, root: str, files: list[str], split: str) -> Dataset:
    """The pictures among the `files` below `root`, none opened; a `label` where each lies in exactly one class folder.

    The columns of a metadata.csv or metadata.jsonl with `file_name` are added (its `label` comes first), and
    `caption_file`, the path of `<image>.txt`, where any image has one.
    """
    import datasets

    parts = [name.split(os.sep) for name in files if is_image(name)]
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
    parts = [part for part in parts if chosen in (None, part[0])]
    columns["image"] = [os.path.join(os.path.abspath(root), *part) for part in parts]
    if "label" in columns:
        columns["label"] = [classes.index(part[depth]) for part in parts]
    known = set(files)
    texts = [os.path.splitext(os.path.join(*part))[0] + ".txt" for part in parts]
    if any(text in known for text in texts):
        columns[FILE_COLUMN] = [os.path.join(os.path.abspath(root), t) if t in known else None for t in texts]
    for name, values in _metadata(root, files, ["/".join(part) for part in parts]).items():
        columns[name] = values
        features.pop(name, None)
    for name in [name for name in columns if name not in features]:
        try:
            features[name] = datasets.features.features.generate_from_arrow_type(pa.array(columns[name]).type)
        except pa.ArrowException as error:
            raise SourceError(f"{spec}: the metadata column {name!r} mixes kinds of values: {error}") from error
    return datasets.Dataset.from_dict(columns, features=features)


def _metadata(root: str, files: list[str], images: list[str]) -> dict[str, list]:
    """Column -> one value for each of `images`, None where no metadata file names it."""
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        folder, name = os.path.split(file)
        if name not in ("metadata.csv", "metadata.jsonl"):
            continue
        path = os.path.join(root, file)
        for number, row in _table(path):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise SourceError(
                    f"{path}, line {number}: there is no file_name; each row names its image, relative to {name}."
                )
            rows[os.path.normpath(os.path.join(folder, row.pop("file_name"))).replace(os.sep, "/")] = row
    names = dict.fromkeys(name for row in rows.values() for name in row if name != "image")
    return {name: [rows.get(image, {}).get(name) for image in images] for name in names}


def _table(path: str) -> Iterator[tuple[int, Any]]:
    """(line, row) of a .csv or .jsonl file. In a CSV nothing is None, and a column of whole numbers holds ints."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.endswith(".jsonl"):
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, parse_json(line, finite=False)
                return
            reader = csv.DictReader(file)
            lines = [(reader.line_num, {k: v or None for k, v in row.items() if isinstance(k, str)}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error, DocumentError) as error:
        raise SourceError(f"{path} cannot be read as a table: {error}") from error
    for name in reader.fieldnames or ():
        if name != "file_name" and all(re.fullmatch(r"-?\d{1,18}", row.get(name) or "0") for _, row in lines):
            lines = [
                (number, {**row, name: int(value) if (value := row.get(name)) else None}) for number, row in lines
            ]
    yield from lines


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
