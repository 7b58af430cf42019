"""Which pictures two sources share: by row number within one dataset, else byte for byte. Nothing is decoded."""

from __future__ import annotations

import os
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ssl.data.files import OutsideError, read_starting, resolved
from hf_ssl.data.local import usual_split
from hf_ssl.data.shards import table_rows
from hf_ssl.data.sources import ImageSource

MAX_COMPARED = 200_000  # rows of a source that is compared byte for byte
MAX_READ = 2**32  # bytes of pictures of equal size, which are read to tell them apart
_CHUNK = 1000  # rows read at a time


def canonical(spec: str | os.PathLike) -> str:
    """One name for the spellings of one dataset: a path without links, "emoji" for its placed variant as well."""
    spec = os.fspath(spec)
    path = os.path.expanduser(spec)
    return os.path.realpath(path) if os.path.exists(path) else "emoji" if spec.startswith("emoji:") else spec


def placed(spec: str) -> str:
    """`spec`, found from every folder: a path that exists is made absolute."""
    path = os.path.expanduser(spec)
    return os.path.abspath(path) if os.path.exists(path) else spec


def same_data(spec: str, other: str) -> bool:
    """Whether two names mean one dataset."""
    return canonical(spec) == canonical(other)


def shared(source: ImageSource, other: ImageSource) -> np.ndarray | None:
    """Positions of the rows of `source` whose picture is also in `other`; None where they cannot be compared.

    Splits that a dataset declares (train, validation, test) are taken to be apart. Of other datasets, a stream, more
    than MAX_COMPARED rows, and more than MAX_READ bytes of pictures of equal size cannot be compared.
    """
    mine, theirs = source.part, other.part
    if mine is not None and theirs is not None:
        if mine.of[0] == theirs.of[0] and _declared_apart(mine.of[1], theirs.of[1]):
            return np.empty(0, np.int64)
        if mine.of == theirs.of and not source.is_stream:
            every = np.arange(len(source))
            numbers = every if mine.numbers is None else mine.numbers
            return every if theirs.numbers is None else np.flatnonzero(np.isin(numbers, theirs.numbers))
    if not (_countable(source) and _countable(other)):
        return None
    sizes, others = _sizes(source), _sizes(other)
    rows, candidates = np.flatnonzero(np.isin(sizes, others)), np.flatnonzero(np.isin(others, sizes))
    if sizes[rows].sum() + others[candidates].sum() > MAX_READ:
        return None
    wanted = set(_digests(other, candidates)) - {None}
    return rows[[digest in wanted for digest in _digests(source, rows)]] if len(rows) else rows


def copies(source: ImageSource) -> np.ndarray | None:
    """(N,) numbers that are equal for identical pictures; None where all differ, or cannot be compared."""
    if not _countable(source):
        return None
    sizes = _sizes(source)
    _, place, count = np.unique(sizes, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(count[place] > 1)
    if sizes[rows].sum() > MAX_READ:
        return None
    group = np.arange(len(sizes))
    first: dict[bytes, int] = {}
    for row, digest in zip(rows.tolist(), _digests(source, rows)):
        group[row] = first.setdefault(digest, row) if digest is not None else row
    return group if len(np.unique(group)) < len(group) else None


def _declared_apart(split: str, other: str) -> bool:
    usual = usual_split(split), usual_split(other)
    return None not in usual and usual[0] != usual[1]


def _countable(source: ImageSource) -> bool:
    return not source.is_stream and len(source) <= MAX_COMPARED


def _sizes(source: ImageSource) -> np.ndarray:
    """(N,) bytes of each picture as it is stored, -1 where it cannot be read."""
    dataset = source.dataset.select_columns(["image"]).with_format("arrow")
    parts = [_chunk_sizes(table["image"].combine_chunks(), source) for table in dataset.iter(_CHUNK)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _chunk_sizes(column: Any, source: ImageSource) -> np.ndarray:
    if pa.types.is_struct(column.type) and {"bytes", "path"} <= {kind.name for kind in column.type}:
        sizes = (
            pc.fill_null(pc.binary_length(column.field("bytes")), -1).to_numpy(zero_copy_only=False).astype(np.int64)
        )
        files = np.flatnonzero(sizes < 0)
        named = table_rows(pa.table({"path": column.field("path").take(pa.array(files))}))
        sizes[files] = [_file_size(source, row["path"]) for row in named]
        return sizes
    pictures = [row["image"] for row in table_rows(pa.table({"image": column}))]
    return np.array([_file_size(source, p) if isinstance(p, str) else _length(p) for p in pictures], np.int64)


def _length(picture: Any) -> int:
    return -1 if picture is None else len(picture) if isinstance(picture, bytes) else np.asarray(picture).nbytes


def _file_size(source: ImageSource, path: str | None) -> int:
    try:
        return os.path.getsize(resolved(path, source.home, source.outside)) if path else -1
    except (OSError, OutsideError):
        return -1


def _digests(source: ImageSource, rows: np.ndarray) -> list[bytes | None]:
    """What tells the pictures at those positions from all others; None for one that cannot be read."""
    dataset = source.dataset.select_columns(["image"]).with_format("arrow")
    found: list[bytes | None] = []
    for start in range(0, len(rows), _CHUNK):
        for row in table_rows(dataset[rows[start : start + _CHUNK].tolist()]):
            content = _bytes(source, row["image"])
            found.append(None if content is None else blake2b(content, digest_size=16).digest())
    return found


def _bytes(source: ImageSource, picture: Any) -> bytes | None:
    if isinstance(picture, dict):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, str):
        try:
            return read_starting(resolved(picture, source.home, source.outside), b"")
        except (OSError, OutsideError):
            return None
    return picture if isinstance(picture, bytes) else None if picture is None else np.asarray(picture).tobytes()
