"""Feature vectors into a file: parquet, npz or safetensors. None of them can run code when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..data.sources import ImageSource
    from ..evaluation import Features


def write(path: Path, found: Features, source: ImageSource) -> None:
    """`found` to `path`, the format told by its ending.

    - parquet: columns index, path (where the pictures have one), the labels, embedding (fixed-size list of float32).
    - npz: arrays embedding (N, D) float32, index (N,), and one per column; text as fixed-width unicode.
    - safetensors: tensors embedding and index, labels as numbers; the names behind text labels in the metadata, JSON.
    """
    vectors = found.embeddings.numpy()
    columns: dict[str, list] = dict(found.labels)
    paths = _paths(found, source)
    if paths is not None and "path" not in columns:
        columns["path"] = paths
    writer = {".parquet": _parquet, ".npz": _npz, ".safetensors": _safetensors}[path.suffix]
    writer(path, vectors, found.index.numpy(), columns)


def _paths(found: Features, source: ImageSource) -> list[str | None] | None:
    """File names of the pictures; None where they have none or the source is a stream."""
    if source.is_stream:
        return None
    images = source.dataset.select(found.index.tolist())["image"]
    paths = [image.get("path") if isinstance(image, dict) else None for image in images]
    return paths if any(paths) else None


def _parquet(path: Path, vectors: np.ndarray, index: np.ndarray, columns: dict[str, list]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
    embedding = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    pq.write_table(pa.table({"index": pa.array(index), **columns, "embedding": embedding}), path)


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
