"""A classifier's own labels for unlabelled pictures, as a `datasets.Dataset` that any training loop can read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from hf_ssl.data.sources import load_source
from hf_ssl.evaluation.classification import predict
from hf_ssl.files import whole_file

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("image", "label", "confidence", "weight", "index")


def pseudo_label(
    model: str | Path | nn.Module,
    source: Any,
    processor: Any = None,
    threshold: float = 0.0,
    weight: Callable[[np.ndarray], np.ndarray] | None = None,
    keep: str = "all",
    **loading: Any,
) -> Dataset:
    """Label the pictures of `source` by a native image classifier.

    Columns: image (undecoded), label (ClassLabel with the model's names), confidence (float32, the label's
    probability), weight (float32: 1 where confidence >= threshold, else 0; or `weight(confidences)`, (N,) -> (N,)) and
    index (int64, the row in the source). Rows stand in the source's order; keep="confident" leaves out those below
    `threshold`, keep="all" none; a picture that cannot be decoded has no row. `model`, `processor` and `loading`
    (batch_size, device, max_images, ...): as in `predict`. True labels of the source are neither read nor kept.
    Raises ValueError for a streamed source, whose rows cannot be asked for again, and for a threshold outside [0, 1].
    """
    source = load_source(source)
    from datasets import ClassLabel, Value

    if not 0 <= threshold <= 1 or keep not in ("all", "confident"):
        raise ValueError(f'threshold must be in [0, 1] and keep "all" or "confident", got {threshold} and {keep!r}.')
    if source.is_stream:
        raise ValueError(f"{source.name} is a stream; pseudo-labels need a source whose rows can be asked for.")
    found = predict(model, source, processor, label="", **loading)
    top = found.probabilities.max(dim=1)
    confidence, labels, index = top.values.numpy(), top.indices.numpy(), found.index.numpy()
    # the threshold in the confidences' own precision: a float32 0.95 lies below the float64 one
    weights = (confidence >= np.float32(threshold)) if weight is None else np.asarray(weight(confidence))
    if weights.shape != confidence.shape or not np.isfinite(weights.astype(np.float64)).all():
        raise ValueError(
            f"weight must return one finite number a picture; of {confidence.shape} came {weights.shape}."
        )
    rows = np.flatnonzero(confidence >= np.float32(threshold)) if keep == "confident" else np.arange(len(index))
    dataset = source.dataset.select(index[rows]).select_columns(["image"])
    dataset = dataset.add_column("label", labels[rows].tolist(), feature=ClassLabel(names=list(found.names)))
    dataset = dataset.add_column("confidence", confidence[rows].tolist(), feature=Value("float32"))
    dataset = dataset.add_column("weight", weights[rows].astype(np.float32).tolist(), feature=Value("float32"))
    numbers = [source.number(position) for position in index[rows].tolist()]
    return dataset.add_column("index", numbers, feature=Value("int64"))


def save_pseudo_labels(dataset: Dataset, path: str | Path) -> Path:
    """Write `dataset` to `path`: one file where it ends in .parquet, else a folder with pseudo_labels.parquet.

    Pictures that are files are read and stored, so that the result can be moved. Raises ValueError for a dataset that
    lacks a column, OSError for a place that cannot be written.
    """
    import pyarrow.parquet as pq
    from datasets.table import embed_table_storage

    check_pseudo_labels(dataset, "The dataset")
    path = Path(path).expanduser()
    file = path if path.suffix == ".parquet" else path / "pseudo_labels.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = dataset.features.arrow_schema
    with whole_file(file) as scratch, pq.ParquetWriter(scratch, schema) as writer:
        for table in dataset.with_format("arrow").iter(1000):
            writer.write_table(embed_table_storage(table.cast(schema)))
    return file


def load_pseudo_labels(path: str | Path) -> Dataset:
    """The dataset that `save_pseudo_labels` wrote at `path` (file or folder), images undecoded; no cache is written.

    `datasets.Dataset.cast_column("image", datasets.Image())` decodes them on access; `load_source(path)` reads the
    same file. Raises FileNotFoundError, or ValueError naming the column that is missing or of the wrong type.
    """
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image

    path = Path(path).expanduser()
    file = path / "pseudo_labels.parquet" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There are no pseudo-labels at {path}: {file} does not exist.")
    try:
        table = pq.read_table(file)
    except Exception as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from None
    features = Features.from_arrow_schema(table.schema)
    if isinstance(features.get("image"), Image):
        features["image"] = Image(decode=False)
    dataset = Dataset(table.cast(features.arrow_schema))
    check_pseudo_labels(dataset, str(file))
    return dataset


def check_pseudo_labels(dataset: Dataset, where: str) -> None:
    """Raise ValueError unless `dataset` has the columns of `pseudo_label`, `label` a ClassLabel."""
    from datasets import ClassLabel

    lacking = [name for name in COLUMNS if name not in dataset.features]
    if lacking:
        raise ValueError(
            f"{where} lacks the column {lacking[0]!r}; pseudo-labels have {', '.join(COLUMNS)}, it has "
            f"{', '.join(dataset.column_names)}."
        )
    if not isinstance(dataset.features["label"], ClassLabel):
        raise ValueError(f"{where}: its column 'label' has no class names (it is {dataset.features['label']}).")
    for name in ("confidence", "weight"):
        if not str(getattr(dataset.features[name], "dtype", "")).startswith("float"):
            raise ValueError(f"{where}: its column {name!r} holds {dataset.features[name]} instead of numbers.")
