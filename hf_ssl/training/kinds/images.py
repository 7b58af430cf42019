"""Images alone: a native backbone is trained, and kNN measures it where some images have labels."""

import logging
from typing import Any

from ...data.sources import ImageSource
from ...modeling import SSLModel
from ...processing import SSLImageProcessor
from ..build import Request, on_a_backbone
from . import Kind

logger = logging.getLogger("hf_ssl.training")


class Images(Kind):
    def build(self, request: Request) -> tuple[SSLModel, SSLImageProcessor]:
        return on_a_backbone(request)

    def measure(
        self,
        method: Any,
        views: SSLImageProcessor,
        bank: ImageSource,
        queries: ImageSource,
        options: dict[str, Any],
    ) -> dict[str, float]:
        """kNN with ``bank``: knn_<label> per label column, knn_top1 for the first."""
        from ...evaluation import extract_features, measure_features
        from ...evaluation.evaluate import with_columns

        model, processor = method.export_backbone, views.eval_processor()
        known, asked = (
            with_columns(extract_features(model, source, processor, **options), source, queries.labels)
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
