"""One call from a backbone to the table: raw pixels, the untrained twin and the trained model, side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_ssl.evaluation.features import Features, extract_features, load_backbone, raw_pixels, untrained
from hf_ssl.evaluation.health import feature_std, rankme
from hf_ssl.evaluation.knn import knn_accuracy, retrieval_recall
from hf_ssl.evaluation.linear import linear_probe
from hf_ssl.evaluation.segmentation import NoAttentionError, NoMaskError, attention_segmentation

if TYPE_CHECKING:
    from hf_ssl.data.sources import ImageSource

logger = logging.getLogger(__name__)

MEASURES = ("knn", "linear", "retrieval", "segmentation", "health")
PROTOCOL_NAMES = {"emoji": "centred", "emoji:placed": "placed"}


@dataclass(frozen=True)
class Pairing:
    """Cross-style retrieval: a row with `side` == query looks for its own `item` among those == gallery."""

    item: str
    side: str
    query: object
    gallery: object


EMOJI_PAIRING = Pairing(item="code_point", side="style", query="google", gallery="twitter")


def evaluate_backbone(
    model,
    processor,
    train_source: ImageSource,
    test_source: ImageSource,
    labels: Sequence[str] | None = None,
    measures: Sequence[str] = ("knn", "linear", "retrieval", "health"),
    baselines: bool = True,
    protocol: str | None = None,
    k: Sequence[int] = (20, 200),
    solver: str = "lbfgs",
    pairing: Pairing | None = EMOJI_PAIRING,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    progress: bool = True,
    max_images: int | None = None,
    seed: int = 0,
) -> list[dict]:
    """Rows {"protocol", "model", "knn20_<label>", ..., "linear_<label>", "r1", "r5", "jaccard_best", "std", "rankme"}.

    `model`, `processor`, `batch_size`, `device`, `num_workers`, `max_images`: as in `extract_features`. `labels`:
    columns to predict (default: the train source's). Train is the bank and the probe's data, test is only scored.
    `measures`: any of MEASURES. `baselines`: rows for raw pixels (32 x 32) and the untrained twin (`seed`) come first.
    `protocol`: the rows' name (default: "centred" / "placed" for emoji, else the source's name). `pairing`: which test
    rows search which; skipped where the columns are absent. What cannot be measured is left out of the row and said
    once in the log. Raises ValueError for an unknown measure or label.
    """
    unknown = [name for name in measures if name not in MEASURES]
    if unknown:
        raise ValueError(f"Unknown measure {unknown[0]!r}: choose among {', '.join(MEASURES)}.")
    labels = tuple(train_source.labels if labels is None else labels)
    protocol = protocol or PROTOCOL_NAMES.get(test_source.name, test_source.name)
    model, processor = load_backbone(model, processor, device)
    pair_columns = (pairing.item, pairing.side) if pairing else ()
    loading: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "progress": progress,
        "max_images": max_images,
    }
    loading["columns"] = (*labels, *pair_columns)

    candidates: list[tuple[str, torch.nn.Module | None]] = [("trained", model)]
    if baselines:
        candidates = [
            ("raw pixels", None),
            ("untrained", untrained(model, seed).to(next(model.parameters()).device)),
            *candidates,
        ]
    rows = []
    for name, candidate in candidates:
        row: dict = {"protocol": protocol, "model": name}
        if set(measures) - {"segmentation"}:
            train, test = (
                raw_pixels(source, **loading)
                if candidate is None
                else extract_features(candidate, source, processor, device=device, **loading)
                for source in (train_source, test_source)
            )
            wanted = [m for m in measures if m != "health" or candidate is not None]  # pixels cannot collapse
            row |= measure_features(train, test, labels, wanted, k, solver, pairing, seed)
        if "segmentation" in measures and candidate is not None:
            row |= _segmentation(candidate, test_source, processor, device, progress, max_images)
        rows.append(row)
    return rows


def measure_features(
    train: Features,
    test: Features,
    labels: Sequence[str],
    measures: Sequence[str] = ("knn", "linear", "retrieval", "health"),
    k: Sequence[int] = (20, 200),
    solver: str = "lbfgs",
    pairing: Pairing | None = EMOJI_PAIRING,
    seed: int = 0,
) -> dict[str, float]:
    """The figures of one row of `evaluate_backbone`, from features already extracted."""
    row: dict[str, float] = {}
    for label in labels:
        fit, score = _labelled(train, label), _labelled(test, label)
        data = (fit.embeddings, fit.labels[label], score.embeddings, score.labels[label])
        if "knn" in measures:
            accuracy = knn_accuracy(*data, k=k)
            row |= {f"knn{n}_{label}": accuracy[f"knn{n}_top1"] for n in k}
        if "linear" in measures:
            groups = fit.labels.get(pairing.item) if pairing else None
            groups = None if groups is None or None in groups else groups
            row[f"linear_{label}"] = float(linear_probe(*data, solver=solver, groups=groups, seed=seed)["top1"])
    if "retrieval" in measures and pairing:
        row |= _retrieval(test, pairing)
    if "health" in measures:
        row |= {"std": feature_std(train.embeddings), "rankme": rankme(train.embeddings)}
    return row


def _labelled(features: Features, label: str) -> Features:
    """The rows that carry `label`: None and -1 mean unlabelled."""
    values = features.labels.get(label)
    keep = [i for i, value in enumerate(values or ()) if value is not None and value != -1]
    if values is None or not keep:
        raise ValueError(
            f"No row has a {label!r} label; the columns at hand are {', '.join(features.labels) or 'none'}."
        )
    return features if len(keep) == len(features) else features.select(keep)


def _retrieval(test: Features, pairing: Pairing) -> dict[str, float]:
    items, sides = test.labels.get(pairing.item), test.labels.get(pairing.side)
    if items is None or sides is None:
        return {}
    query = test.select([i for i, side in enumerate(sides) if side == pairing.query])
    gallery = test.select([i for i, side in enumerate(sides) if side == pairing.gallery])
    if not len(query) or not len(gallery):
        return {}
    return retrieval_recall(
        query.embeddings, gallery.embeddings, query.labels[pairing.item], gallery.labels[pairing.item]
    )


def _segmentation(
    model, source: ImageSource, processor, device, progress: bool, max_images: int | None
) -> dict[str, float]:
    try:
        found = attention_segmentation(
            model, source, processor, device=device, progress=progress, max_images=max_images
        )
    except (NoAttentionError, NoMaskError) as error:
        logger.warning("%s", error)
        return {}
    return {"jaccard_best": found["jaccard_best"], "jaccard_mean": found["jaccard_mean"]}
