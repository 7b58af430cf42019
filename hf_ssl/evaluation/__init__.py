"""Evaluation of any native transformers vision model, trained here or not."""

from __future__ import annotations

from pathlib import Path

from hf_ssl.backbones import model_kind
from hf_ssl.evaluation.classification import (
    LabelMismatchError,
    Predictions,
    classification_report,
    majority_class,
    predict,
)
from hf_ssl.evaluation.evaluate import (
    EMOJI_PAIRING,
    MEASURES,
    Pairing,
    evaluate_backbone,
    measure_features,
    natural_measures,
)
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
from hf_ssl.evaluation.low_shot import low_shot
from hf_ssl.evaluation.natives import load_native
from hf_ssl.evaluation.prompts import DEFAULT_TEMPLATES, EMOJI_GROUPS, SIMPLE_TEMPLATES, Prompts, load_prompts
from hf_ssl.evaluation.pseudo_labels import load_pseudo_labels, pseudo_label, save_pseudo_labels
from hf_ssl.evaluation.segmentation import (
    NoAttentionError,
    NoMaskError,
    attention_at_mass,
    attention_jaccard,
    attention_segmentation,
)
from hf_ssl.evaluation.tables import format_table, markdown_table, print_table
from hf_ssl.evaluation.zero_shot import (
    class_embeddings,
    embed_texts,
    text_retrieval,
    zero_shot,
    zero_shot_predict,
)

__all__ = [
    "DEFAULT_TEMPLATES",
    "EMOJI_GROUPS",
    "EMOJI_PAIRING",
    "MEASURES",
    "SIMPLE_TEMPLATES",
    "Features",
    "LabelMismatchError",
    "NoAttentionError",
    "NoMaskError",
    "Pairing",
    "Predictions",
    "Prompts",
    "alignment",
    "attention_at_mass",
    "attention_jaccard",
    "attention_segmentation",
    "class_embeddings",
    "classification_report",
    "diagnose",
    "distribution_entropy",
    "embed_texts",
    "evaluate_backbone",
    "extract_features",
    "feature_std",
    "format_table",
    "health_report",
    "knn_accuracy",
    "linear_probe",
    "load_backbone",
    "load_native",
    "load_prompts",
    "load_pseudo_labels",
    "low_shot",
    "majority_class",
    "markdown_table",
    "measure_features",
    "metric_path",
    "model_kind",
    "natural_measures",
    "nearest",
    "predict",
    "print_table",
    "pseudo_label",
    "rankme",
    "raw_pixels",
    "retrieval_recall",
    "save_pseudo_labels",
    "text_retrieval",
    "uniformity",
    "untrained",
    "zero_shot",
    "zero_shot_predict",
]


def metric_path(name: str) -> str:
    """Where `evaluate.load` finds the packaged metric `name`: `evaluate.load(metric_path("rankme"))` works offline."""
    folder = Path(__file__).parent / "metrics"
    if not (folder / name / f"{name}.py").is_file():
        known = sorted(path.name for path in folder.iterdir() if (path / f"{path.name}.py").is_file())
        raise ValueError(f"No metric named {name!r}: choose among {', '.join(known)}.")
    return str(folder / name)
