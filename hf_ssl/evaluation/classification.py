"""Classifiers on labelled pictures: probabilities, and the figures that tell how good and how honest they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ssl.data.classes import UNLABELED, class_value, declared_names, names_of
from hf_ssl.data.sources import ImageSource, load_source
from hf_ssl.evaluation.features import Collect, Prepare, run_over
from hf_ssl.evaluation.natives import class_names, load_native

CALIBRATION_BINS = 15  # as Guo et al. 2017 (arXiv 1706.04599) report their tables
UNKNOWN = UNLABELED


class LabelMismatchError(ValueError):
    """The data's labels and the model's classes cannot be told apart by name or number; the message says why."""


@dataclass
class Predictions:
    """What `predict` returns; rows of all tensors correspond."""

    probabilities: Tensor  # (N, C) float32 on the CPU
    labels: Tensor  # (N,) int64 in the model's numbering, -1 = unlabelled
    index: Tensor  # (N,) int64, position of the row in the source
    names: tuple[str, ...]  # C class names
    skipped: list[str] = field(default_factory=list)  # "where: reason" of each picture left out

    def __len__(self) -> int:
        return len(self.probabilities)


def predict(
    model: str | Path | nn.Module,
    source: Any,
    processor: Any = None,
    label: str | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    progress: bool = True,
    max_images: int | None = None,
) -> Predictions:
    """Class probabilities of every picture of `source` by a native image classifier, in eval mode.

    `model`: an instance (with `processor`), a folder or a Hub id; the other arguments as in `extract_features`.
    `label`: the column of true labels (default: the source's column whose names are the model's classes, else its
    first). Labels go by NAME where data and model have names, else by number. A source without labels, or label="",
    gives -1.
    Raises LabelMismatchError where labels and classes do not fit, ValueError for a model that is no classifier.
    """
    source = load_source(source)
    native, processor, kind = load_native(model, processor, device)
    if kind != "classifier" or (count := native.config.num_labels) < 2:
        raise ValueError(f"{type(native).__name__} is no image classifier of 2 classes or more.")
    names = class_names(native)
    label = label_column(source, names) if label is None else label
    collect = Collect(source, Prepare(processor), (label,) if label else ())
    outputs = run_over(
        native, _probabilities, collect, batch_size, device, num_workers, progress, max_images, "probabilities"
    )
    found = collect.finish(outputs, type(native).__name__)
    values = found.labels[label] if label else [None] * len(found)
    numbers = match_labels(source, label, values, names, count) if label else [UNKNOWN] * len(found)
    shown = names or _own_names(source, label, count) or tuple(map(str, range(count)))
    return Predictions(found.embeddings, torch.tensor(numbers, dtype=torch.long), found.index, shown, found.skipped)


def _probabilities(model: Any, pixel_values: Tensor) -> Tensor:
    return model(pixel_values=pixel_values).logits.float().softmax(dim=-1)


# --- labels -------------------------------------------------------------------------------------------------------


def label_column(source: ImageSource, names: Sequence[str] | None) -> str | None:
    """The label column whose values are the classes `names`, else the first; None where the source has none."""
    for column in source.labels if names else ():
        if set(names or ()) >= set(declared_names(source, column) or ("",)):
            return column
    for column in source.labels if names and not source.is_stream else ():
        if set(names or ()) >= {value for value in source.dataset.unique(column) if isinstance(value, str)} != set():
            return column
    return next(iter(source.labels), None)


def _own_names(source: ImageSource, label: str | None, count: int) -> tuple[str, ...] | None:
    names = declared_names(source, label) if label else None
    return names if names and len(names) == count else None


def match_labels(
    source: ImageSource, label: str, values: Sequence[Any], names: Sequence[str] | None, count: int
) -> list[int]:
    """`values` of column `label` as numbers of the model's `count` classes, -1 where unlabelled.

    By name where both sides have names, or the model's are numbers written out; else by number. Raises
    LabelMismatchError naming the classes that do not fit.
    """
    declared = declared_names(source, label)
    known = [class_value(value) for value in values]
    where = f"{source.name} ({source.split}), column {label!r}"
    texts = {value for value in known if isinstance(value, str)}
    if names is None and texts:
        raise LabelMismatchError(
            f"{where} holds names such as {min(texts)!r}, but the model's config has none (only LABEL_0, "
            "LABEL_1, ...): set id2label in its config.json."
        )
    if names is None and declared and len(declared) != count:
        raise LabelMismatchError(f"{where} has {len(declared)} classes, the model {count} without names.")
    if names is not None and (declared or texts or any(name.isdecimal() for name in names)):
        told = names_of(known, declared, names)
        number = {name: i for i, name in enumerate(names)}
        strange = sorted({str(value) for value in told if value is not None and value not in number})
        if strange:
            raise LabelMismatchError(
                f"{where} has classes that the model does not know: {few(strange)}. The model's classes are "
                f"{few(list(names))}. Evaluate it on pictures of its own classes, or choose --label_column."
            )
        return [UNKNOWN if value is None else number[value] for value in told]
    strange_numbers = sorted({int(value) for value in known if value is not None and not 0 <= int(value) < count})
    if strange_numbers:
        raise LabelMismatchError(f"{where} has label {strange_numbers[0]}; the model's classes are 0 to {count - 1}.")
    return [UNKNOWN if value is None else int(value) for value in known]


def few(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- figures ------------------------------------------------------------------------------------------------------


def classification_report(
    probabilities: Tensor | np.ndarray, labels: Tensor | Sequence[int], names: Sequence[str] | None = None
) -> dict[str, Any]:
    """How good and how honest probabilities (N, C) are against `labels` (N,), class numbers; -1 is left out.

    Returns {"accuracy", "top5" (only with more than 5 classes), "macro_f1", "ece", "samples", "per_class_recall":
    {name: share, None where the class has no picture}, "confusion": C lists of C counts, rows the truth,
    "calibration": one {"confidence", "accuracy", "count"} for each of 15 bins}. All but the counts are fractions.
    macro_f1: mean over the classes that occur in the truth or the predictions; a class never predicted or never true
    scores 0. ece: mean distance of top confidence and accuracy over 15 equal bins (lower edge open), weighted by
    count. Equal probabilities: the lower class number wins. Raises ValueError for shapes that do not match, no label,
    rows that are no probabilities, or a label beyond C - 1.
    """
    p, y = _checked(probabilities, labels)
    count = p.shape[1]
    names = tuple(map(str, range(count))) if names is None else tuple(names)
    if len(names) != count:
        raise ValueError(f"{count} columns of probabilities came with {len(names)} class names.")
    ranking = np.argsort(-p, axis=1, kind="stable")
    guess = ranking[:, 0]
    right = guess == y
    confusion = np.bincount(y * count + guess, minlength=count * count).reshape(count, count)
    hit, true, guessed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    present = (true + guessed) > 0
    f1 = 2 * hit[present] / (true + guessed)[present]
    bins = _calibration(p[np.arange(len(p)), guess], right)
    report: dict[str, Any] = {"accuracy": float(right.mean())}
    if count > 5:
        report["top5"] = float((ranking[:, :5] == y[:, None]).any(axis=1).mean())
    return report | {
        "macro_f1": float(f1.mean()),
        "ece": sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins if b["count"]) / len(y),
        "samples": len(y),
        "per_class_recall": {n: float(h / t) if t else None for n, h, t in zip(names, hit, true, strict=True)},
        "confusion": confusion.tolist(),
        "calibration": bins,
    }


def _checked(probabilities: Tensor | np.ndarray, labels: Tensor | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if p.ndim != 2 or p.shape[1] < 2 or y.shape != p.shape[:1]:
        raise ValueError(
            f"probabilities {p.shape} and labels {y.shape} must have shapes (N, C) and (N,), C at least 2."
        )
    if not np.isfinite(p).all() or p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("probabilities must be finite rows that sum to 1: apply softmax to logits first.")
    p, y = p[y != UNKNOWN], y[y != UNKNOWN].astype(np.int64)
    if not len(y):
        raise ValueError("No row has a label, so there is nothing to compare the predictions with.")
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"labels run from {y.min()} to {y.max()}, but there are {p.shape[1]} classes.")
    return p, y


def _calibration(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    # float32 probabilities of exactly k/15 must not fall over the edge that float64 draws a hair lower
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1].astype(np.float32)
    at = np.searchsorted(edges, confidence.astype(np.float32), side="left")
    bins: list[dict[str, Any]] = []
    for i in range(CALIBRATION_BINS):
        inside = at == i
        filled = bool(inside.any())
        mean = float(confidence[inside].mean()) if filled else None
        share = float(right[inside].mean()) if filled else None
        bins.append({"confidence": mean, "accuracy": share, "count": int(inside.sum())})
    return bins


def majority_class(labels: Tensor | Sequence[Any]) -> float:
    """The accuracy of always naming the commonest of `labels` (None and -1 left out): what a classifier must beat."""
    values = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    values = [value for value in map(class_value, values) if value is not None]
    if not values:
        raise ValueError("No row has a label, so there is no commonest class.")
    return max(values.count(value) for value in set(values)) / len(values)
