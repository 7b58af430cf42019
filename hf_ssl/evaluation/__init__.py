"""Evaluation of any native transformers vision model, trained here or not."""

from __future__ import annotations

from pathlib import Path

from hf_ssl.evaluation.evaluate import EMOJI_PAIRING, MEASURES, Pairing, evaluate_backbone, measure_features
from hf_ssl.evaluation.features import Features, extract_features, load_backbone, raw_pixels, untrained
from hf_ssl.evaluation.health import (
    alignment,
    diagnose,
    distribution_entropy,
    feature_std,
    health_report,
    rankme,
    uniformity,
)
from hf_ssl.evaluation.knn import knn_accuracy, nearest, retrieval_recall
from hf_ssl.evaluation.linear import linear_probe
from hf_ssl.evaluation.segmentation import (
    NoAttentionError,
    NoMaskError,
    attention_at_mass,
    attention_jaccard,
    attention_segmentation,
)
from hf_ssl.evaluation.tables import format_table, markdown_table, print_table

__all__ = [
    "EMOJI_PAIRING",
    "MEASURES",
    "Features",
    "NoAttentionError",
    "NoMaskError",
    "Pairing",
    "alignment",
    "attention_at_mass",
    "attention_jaccard",
    "attention_segmentation",
    "diagnose",
    "distribution_entropy",
    "evaluate_backbone",
    "extract_features",
    "feature_std",
    "format_table",
    "health_report",
    "knn_accuracy",
    "linear_probe",
    "load_backbone",
    "markdown_table",
    "measure_features",
    "metric_path",
    "nearest",
    "print_table",
    "rankme",
    "raw_pixels",
    "retrieval_recall",
    "uniformity",
    "untrained",
]


def metric_path(name: str) -> str:
    """Where `evaluate.load` finds the packaged metric `name`: `evaluate.load(metric_path("rankme"))` works offline."""
    folder = Path(__file__).parent / "metrics"
    if not (folder / name / f"{name}.py").is_file():
        known = sorted(path.name for path in folder.iterdir() if (path / f"{path.name}.py").is_file())
        raise ValueError(f"No metric named {name!r}: choose among {', '.join(known)}.")
    return str(folder / name)
