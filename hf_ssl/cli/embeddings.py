"""Feature vectors into a file: parquet, csv, npz or safetensors. None of them can run code when it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import whole_file

if TYPE_CHECKING:
    from ..data.sources import ImageSource
    from ..evaluation import Features


def write(path: Path, found: Features, source: ImageSource) -> None:
    """`found` to `path`, the format told by its ending.

    Beside a label's numbers stand its names, as NAME_name. Paths are relative to the folder that was embedded.

    - parquet: columns index, path (where the pictures have one), the labels, embedding (fixed-size list of float32).
    - csv: the same columns, and one for each number of the embedding: e0, e1, ...
    - npz: arrays embedding (N, D) float32, index (N,), and one per column; text as fixed-width unicode.
    - safetensors: tensors embedding and index, labels as numbers; the names behind text labels in the metadata, JSON.
    """
    vectors = found.embeddings.numpy()
    columns = _named(found.labels, source)
    paths = _paths(found, source)
    if paths is not None and "path" not in columns:
        columns["path"] = paths
    writer = {".parquet": _parquet, ".csv": _csv, ".npz": _npz, ".safetensors": _safetensors}[path.suffix]
    with whole_file(path) as scratch:
        writer(scratch, vectors, found.index.numpy(), columns)


def _named(labels: Mapping[str, list], source: ImageSource) -> dict[str, list]:
    """The columns, each label that numbers stand for followed by its names."""
    columns: dict[str, list] = {}
    for column, values in labels.items():
        columns[column] = values
        names = getattr((source.dataset.features or {}).get(column), "names", None)
        if names and f"{column}_name" not in labels:
            columns[f"{column}_name"] = [
                names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values
            ]
    return columns


def _paths(found: Features, source: ImageSource) -> list[str | None] | None:
    """Paths of the pictures, below the source's folder; None where they have none or the source is a stream."""
    if source.is_stream:
        return None
    images = source.dataset.select(found.index.tolist())["image"]
    paths = [image.get("path") if isinstance(image, dict) else None for image in images]
    root = os.path.abspath(os.path.expanduser(source.name))
    return [_below(root, path) for path in paths] if any(paths) else None


def _below(root: str, path: str | None) -> str | None:
    """`path` relative to the folder `root` that holds it, with slashes; as it is where it lies elsewhere."""
    if path and os.path.isabs(path) and path.startswith(os.path.join(root, "")):
        return os.path.relpath(path, root).replace(os.sep, "/")
    return path


def _parquet(path: Path, vectors: np.ndarray, index: np.ndarray, columns: dict[str, list]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
    embedding = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    pq.write_table(pa.table({"index": pa.array(index), **columns, "embedding": embedding}), path)


def _csv(path: Path, vectors: np.ndarray, index: np.ndarray, columns: dict[str, list]) -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", *columns, *(f"e{i}" for i in range(vectors.shape[1]))])
        for number, vector, *values in zip(index.tolist(), vectors, *columns.values(), strict=True):
            texts = [_text(value) if isinstance(value, (list, dict)) else value for value in values]
            writer.writerow([number, *texts, *(f"{x:.9g}" for x in vector)])


def _npz(path: Path, vectors: np.ndarray, index: np.ndarray, columns: dict[str, list]) -> None:
    arrays: dict[str, Any] = {}
    for name, values in columns.items():
        array = np.asarray(values)
        # an object array would be pickled
        arrays[name] = array if array.dtype.kind in "biufU" else np.asarray([_text(value) for value in values])
    np.savez(path, embedding=vectors, index=index, **arrays)


def _safetensors(path: Path, vectors: np.ndarray, index: np.ndarray, columns: dict[str, list]) -> None:
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {"embedding": np.ascontiguousarray(vectors), "index": index}
    names: dict[str, str] = {}
    for name, values in columns.items():
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            known, array = np.unique(np.asarray([_text(value) for value in values]), return_inverse=True)
            names[name] = json.dumps(known.tolist(), ensure_ascii=False)
        arrays[name] = np.ascontiguousarray(array)
    save_file(arrays, path, metadata=names)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
