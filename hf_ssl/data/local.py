"""Datasets that are files on this machine: folders of images, shards, and Debian's Fashion-MNIST."""

from __future__ import annotations

import csv
import fnmatch
import glob
import gzip
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hf_ssl.data.captions import FILE_COLUMN
from hf_ssl.data.files import open_regular, printable, storable
from hf_ssl.data.shards import SourceError
from hf_ssl.data.tars import SUFFIXES
from hf_ssl.documents import DocumentError, parse_json

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("hf_ssl.data")

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
    """All visible files below `root`, relative to it and sorted; links are followed, each folder is read once.

    SourceError: a folder in it cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise SourceError(
            f"The folder {printable(error.filename)} cannot be read ({error.strerror}); what it holds would be left "
            "out. Make it readable, or move it out of the data set."
        ) from error

    files: list[str] = []
    seen: dict[str, str] = {}
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            if not os.path.abspath(folder).startswith(os.path.join(os.path.abspath(seen[real]), "")):  # no circle
                words = "%s is a link to %s, which is read already: it is left out."
                logger.warning(words, printable(folder), printable(seen[real]))
            folders.clear()
            continue
        seen[real] = folder
        visible = (name for name in folders if not name.startswith((".", "__MACOSX")))
        folders[:] = sorted(visible, key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        files += [os.path.relpath(os.path.join(folder, name), root) for name in names if not name.startswith(".")]
    return sorted(files)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def shard_kind(name: str) -> str:
    """ ".parquet" or ".tar" for a shard, compressed ones included; the extension of any other file."""
    lower = name.lower()
    return ".tar" if lower.endswith(SUFFIXES) else os.path.splitext(lower)[1]


def check_one_kind(spec: str, names: list[str]) -> None:
    """SourceError where a folder holds images, parquet and tar files side by side: one kind would be left out."""
    counts = Counter("image" if is_image(name) else shard_kind(name) for name in names)
    found = [f"{counts[kind]:,} {kind} file(s)" for kind in ("image", ".parquet", ".tar") if counts[kind]]
    if len(found) > 1:
        raise SourceError(
            f"{printable(spec)} holds {' and '.join(found)}, and one kind is read at a time: name the files to read, "
            f"in quotes, as in '{os.path.join(printable(spec), '**', '*.png')}'."
        )


def matching(pattern: str) -> tuple[str, list[str]]:
    """The folder that a glob starts from, and the files below it that match or lie in a folder that matches, sorted.

    As in the shell, * stays within a folder and ** goes into all of them; hidden files are left out.
    """
    parts = os.path.normpath(pattern).split(os.sep)
    start = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = os.sep.join(parts[:start]) or (os.sep if pattern.startswith(os.sep) else os.curdir)
    if "**" in parts:  # not by glob, which goes in circles
        names = walk(root) if os.path.isdir(root) else []
        return root, [name for name in names if _matches(name.split(os.sep), parts[start:])]
    found = glob.glob(pattern)
    folders = tuple(os.path.join(os.path.relpath(path, root), "") for path in found if os.path.isdir(path))
    names = [os.path.relpath(path, root) for path in found if not os.path.isdir(path)]
    if folders:
        names += [name for name in walk(root) if name.startswith(folders)]
    return root, sorted(names)


def _matches(names: list[str], parts: list[str]) -> bool:
    if not names or not parts:
        return not names and not parts
    if parts[0] == "**":
        return parts[1:] == [] or any(_matches(names[i:], parts[1:]) for i in range(len(names)))
    return fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def beside(root: str, images: list[str]) -> list[str]:
    """The files below `root` that describe these images: metadata in their folders and above, and texts."""
    folders = {os.path.dirname(name) for name in images}
    above = {os.sep.join(folder.split(os.sep)[:i]) for folder in folders for i in range(folder.count(os.sep) + 2)}
    found = [os.path.join(folder, name) for folder in {*above, ""} for name in ("metadata.csv", "metadata.jsonl")]
    texts = {os.path.splitext(name)[0] + ".txt" for name in images}
    for folder in folders:
        found += texts & {os.path.join(folder, name) for name in os.listdir(os.path.join(root, folder))}
    return sorted({name for name in found if os.path.isfile(os.path.join(root, name))})


def image_folder(
    spec: str, root: str, files: list[str], split: str, whole: bool = True
) -> tuple[Dataset, tuple[str, ...]]:
    """The pictures among the `files` below `root`, none opened; a `label` where each lies in exactly one class folder.

    The columns of a metadata.csv or metadata.jsonl with `file_name` are added (its `label` comes first), and
    `caption_file`, the path of `<image>.txt`, where any image has one. Also returns, in words, each image that the
    metadata name and that is not there; not where `files` are a choice (not the `whole` folder).
    """
    import datasets

    rows = _metadata(root, files)
    parts = [name.split(os.sep) for name in files if is_image(name)]
    missing = _missing(root, rows, files) if whole else ()
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
    classes = sorted({printable(part[depth]) for part in parts})
    if len(classes) > 1 and all(len(part) == depth + 2 for part in parts):
        # one numbering over all splits, so that a class has the same number in each
        columns["label"], features["label"] = [], datasets.ClassLabel(names=classes)
    parts = [part for part in parts if chosen in (None, part[0])]
    home = os.path.abspath(root)
    columns["image"] = [storable(os.path.join(home, *part)) for part in parts]
    if "label" in columns:
        numbers = {name: number for number, name in enumerate(classes)}
        columns["label"] = [numbers[printable(part[depth])] for part in parts]
    known = set(files)
    texts = [os.path.splitext(os.path.join(*part))[0] + ".txt" for part in parts]
    if any(text in known for text in texts):
        columns[FILE_COLUMN] = [storable(os.path.join(home, text)) if text in known else None for text in texts]
    for name, values in _columns(rows, ["/".join(part) for part in parts]).items():
        columns[name] = values
        features.pop(name, None)
    for name in [name for name in columns if name not in features]:
        try:
            features[name] = datasets.features.features.generate_from_arrow_type(pa.array(columns[name]).type)
        except pa.ArrowException as error:
            raise SourceError(f"{spec}: the metadata column {name!r} mixes kinds of values: {error}") from error
    return datasets.Dataset.from_dict(columns, features=features), missing


def _missing(root: str, rows: dict[str, dict[str, Any]], files: list[str]) -> tuple[str, ...]:
    """The images that metadata name and that are not there, as sentences; other files that they name are logged."""
    if others := [name for name in rows if not is_image(name)]:
        logger.warning("%s: the metadata name %d file(s) that are no images, such as %s; their rows are left out.",
                       printable(root), len(others), others[0])  # fmt: skip
    named = (name for name in rows if is_image(name))
    present = {name.replace(os.sep, "/") for name in files}
    where = printable(os.path.abspath(root))
    return tuple(
        f"{where}/{name}: the metadata name it, and there is no such file" for name in named if name not in present
    )


def _metadata(root: str, files: list[str]) -> dict[str, dict[str, Any]]:
    """Image, relative to `root` -> its row in a metadata file. SourceError: an image has two rows, a row no image."""
    rows: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    for file in files:
        folder, name = os.path.split(file)
        if name not in ("metadata.csv", "metadata.jsonl"):
            continue
        path = os.path.join(root, file)
        for number, row in _table(path):
            place = f"{printable(path)}, line {number}"
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise SourceError(f"{place}: there is no file_name; each row names its image, relative to {name}.")
            image = os.path.normpath(os.path.join(folder, row.pop("file_name"))).replace(os.sep, "/")
            if image.startswith(("../", "/")):
                raise SourceError(f"{place} names {image}, which lies outside of the folder {printable(root)}.")
            if image in rows:
                raise SourceError(
                    f"{place} names {image} again, after {places[image]}: give each image one row; several texts of "
                    "one are a list in a metadata.jsonl."
                )
            rows[image], places[image] = row, place
    return rows


def _columns(rows: dict[str, dict[str, Any]], images: list[str]) -> dict[str, list]:
    """Column -> one value for each of `images`, None where no row names it."""
    names = dict.fromkeys(name for row in rows.values() for name in row if name != "image")
    return {name: [rows.get(image, {}).get(name) for image in images] for name in names}


def _table(path: str) -> Iterator[tuple[int, Any]]:
    """(line, row) of a .csv or .jsonl file. In a CSV nothing is None, and a column of whole numbers holds ints."""
    try:
        with open_regular(path, "r", encoding="utf-8-sig", newline="") as file:
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
