"""What ``SSLTrainer.evaluate`` measures while a method trains, by family."""

import logging
from typing import Any

import torch

from ..data.sources import ImageSource
from ..modeling import SSLModel
from ..processing import SSLImageProcessor

logger = logging.getLogger("hf_ssl.training")


def measure(
    method: SSLModel,
    views: SSLImageProcessor,
    bank: ImageSource,
    queries: ImageSource,
    max_images: int | None,
    device: torch.device | str,
) -> dict[str, float]:
    """{name: value} for ``queries``; at most ``max_images`` pictures of each source, a fixed draw (None: all).

    Semi-supervised: accuracy, macro_f1 and ece of the EMA weights, student_accuracy, ... of the last ones. Image-text:
    recall among the texts. Else kNN with ``bank``: knn_<label> per label column, knn_top1 for the first.
    """
    options: dict[str, Any] = {"device": device, "progress": False, "max_images": max_images}
    how = {"labels": _classifier, "texts": _image_text}.get(method.reads, _knn)
    return how(method, views, bank, queries, options)


def _classifier(
    method: Any, views: SSLImageProcessor, bank: ImageSource, queries: ImageSource, options: dict[str, Any]
) -> dict[str, float]:
    from ..evaluation import classification_report, predict

    processor = views.eval_processor()
    reports = []
    for model in (method.ema, method.backbone):
        found = predict(model, queries, processor, **options)
        reports.append(classification_report(found.probabilities, found.labels, found.names))
    averaged, last = reports
    return {
        **{name: averaged[name] for name in ("accuracy", "macro_f1", "ece")},
        **{f"student_{name}": last[name] for name in ("accuracy", "macro_f1", "ece")},
    }


def _image_text(
    method: Any, views: SSLImageProcessor, bank: ImageSource, queries: ImageSource, options: dict[str, Any]
) -> dict[str, float]:
    from ..evaluation import text_retrieval

    found = text_retrieval(method.backbone, views.native_processor(), queries, **options)
    return {name: value for name, value in found.items() if name.startswith(("i2t", "t2i")) and "chance" not in name}


def _knn(
    method: SSLModel, views: SSLImageProcessor, bank: ImageSource, queries: ImageSource, options: dict[str, Any]
) -> dict[str, float]:
    from ..evaluation import extract_features, measure_features
    from ..evaluation.evaluate import with_columns

    processor = views.eval_processor()
    known, asked = (
        with_columns(extract_features(method.export_backbone, source, processor, **options), source, queries.labels)
        for source in (bank, queries)
    )
    scores = {}
    for label in queries.labels:
        try:
            found = measure_features(known, asked, (label,), ("knn",), (20,), pairing=None)
        except ValueError as error:  # nothing to compare with: no reason to end a training
            logger.warning("%s is not measured while training: %s", label, error)
            continue
        scores[f"knn_{label}"] = found[f"knn20_{label}"]
    return {"knn_top1": next(iter(scores.values())), **scores} if scores else scores
